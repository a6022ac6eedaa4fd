"""What both commands share: -h and --version, and options that are made of their definitions."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import fastserve
from fastserve.core.checks import Integer
from fastserve.core.options import Option, described, flag_of


def new_app() -> typer.Typer:
    """Make a command, without subcommands yet. It and they answer -h as well as --help."""
    return typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastserve-repro {fastserve.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
]
"""Option of the command itself: it ends the command before a subcommand runs."""


@dataclass(frozen=True)
class Taken:
    """Annotates a command's parameter: which fields of its definition the command takes."""

    without: tuple[str, ...] = ()
    """Fields, or definitions inside the definition, that keep their defaults."""
    required: tuple[str, ...] = ()
    """Fields that must be given."""
    help: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of fields that mean more to this command than their definition says."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a definition (`fastserve.core.options`) by an option for each of its fields.

    A definition's fields may be definitions themselves: on the command line all options stand side by side. The command
    is called with an instance of the definition, made of the values given.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    definitions: dict[str, tuple[type, Taken]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        definition, *notes = typing.get_args(hints[name]) or (hints[name],)
        if not dataclasses.is_dataclass(definition):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        taken = next((note for note in notes if isinstance(note, Taken)), Taken())
        definitions[name] = definition, taken  # type: ignore[assignment]
        parameters += _parameters(definition, taken)  # type: ignore[arg-type]

    def run(**given: Any) -> None:
        for name, (definition, taken) in definitions.items():
            given[name] = _build(definition, taken, given)
        command(**{name: given[name] for name in hints if name in given})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter_name(name: str, known: Option) -> str:
    return flag_of(name, known).removeprefix("--").replace("-", "_")


def _fields(definition: type, taken: Taken) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Fields that the command takes, with their types."""
    hints = typing.get_type_hints(definition)
    for field in dataclasses.fields(definition):
        if field.name not in taken.without:
            yield field, hints[field.name]


def _parameters(definition: type, taken: Taken) -> Iterator[inspect.Parameter]:
    for field, hint in _fields(definition, taken):
        known = described(field)
        if known is not None:
            text = taken.help.get(field.name, known.help)
            yield _parameter(field, hint, dataclasses.replace(known, help=text), field.name in taken.required)
        elif dataclasses.is_dataclass(hint):
            yield from _parameters(hint, taken)  # type: ignore[arg-type]


def _parameter(field: dataclasses.Field[Any], hint: Any, known: Option, required: bool) -> inspect.Parameter:
    default = field.default
    if known.parse is not None:
        (hint,) = (hint for name, hint in typing.get_type_hints(known.parse).items() if name != "return")
        default = False if hint is bool else None
    bounds: dict[str, int | None] = {}
    if isinstance(known.check, Integer):
        bounds = {"min": known.check.least, "max": known.check.most}
    text = known.help.removesuffix(".") + f" ({known.backends[0]})." if len(known.backends) == 1 else known.help
    made = typer.Option(
        *([known.flag] if known.flag else []),
        help=text,
        metavar=known.metavar,
        show_default=known.show_default,
        envvar=known.envvar,
        show_envvar=known.envvar is not None,
        **bounds,  # type: ignore[arg-type]
    )
    return inspect.Parameter(
        _parameter_name(field.name, known),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[hint, made],
    )


def _build(definition: type, taken: Taken, given: Mapping[str, Any]) -> Any:
    values = {}
    for field, hint in _fields(definition, taken):
        known = described(field)
        if known is not None:
            value = given[_parameter_name(field.name, known)]
            values[field.name] = value if known.parse is None else known.parse(value)
        elif dataclasses.is_dataclass(hint):
            values[field.name] = _build(hint, taken, given)  # type: ignore[arg-type]
    return definition(**values)
