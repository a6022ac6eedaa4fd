import inspect
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from fastserve.core.checks import Integer
from fastserve.core.command import Taken, with_options
from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.core.errors import ConfigError
from fastserve.core.options import build_options, check_options, option, option_of
from fastserve.core.parallel import ParallelConfig
from harness.run.config import RunConfig


@dataclass(frozen=True)
class Options:
    size: int = 1
    share: float = 0.5
    limit: float | None = 1.0
    mode: Literal["a", "b"] = "a"
    on: bool = False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": "3"}, Options(size=3)),
        ({"share": "2"}, Options(share=2.0)),
        ({"limit": "none"}, Options(limit=None)),
        ({"limit": "0.25"}, Options(limit=0.25)),
        ({"mode": "b"}, Options(mode="b")),
        ({"on": "true"}, Options(on=True)),
        ({"size": 3, "limit": None}, Options(size=3, limit=None)),
    ],
)
def test_text_becomes_typed(given: dict[str, Any], expected: Options) -> None:
    assert build_options(Options, given, "policy 'x'") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sise": "3"}, "unknown option 'sise' for policy 'x'; valid options: size, share, limit, mode, on"),
        ({"size": "3.5"}, "option size must be of type int, got '3.5'"),
        ({"size": 3.5}, "option size must be of type int, got 3.5"),
        ({"share": "much"}, "option share must be of type float, got 'much'"),
        ({"share": "none"}, "option share must be of type float, got 'none'"),
        ({"mode": "c"}, "option mode must be one of a, b, got 'c'"),
        ({"on": "perhaps"}, "option on must be of type bool, got 'perhaps'"),
        ({"size": True}, "option size must be of type int, got True"),
    ],
)
def test_errors_name_the_value_and_what_is_valid(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_options(Options, given, "policy 'x'")
    assert message in str(caught.value)


@dataclass(frozen=True)
class Inner:
    size: int = option(1, "Items at a time.", Integer(1, 9))
    layers: tuple[int, ...] | None = option_of(ParallelConfig, "stage_layers", backends=("engine",))

    def __post_init__(self) -> None:
        check_options(self)


def _is_off(given: bool) -> bool:
    return not given


@dataclass(frozen=True)
class Outer:
    name: str = option("a", "Name of it.")
    inner: Inner = field(default_factory=Inner)
    wait_s: float = option(0.5, "Seconds to wait.", show_default="a short while")
    on: bool = option(True, "Do nothing.", flag="--off", parse=_is_off)


def called(*words: str) -> tuple[Any, str]:
    """What a command of `Outer` is given, and what it prints."""
    got: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_options
    def command(outer: Annotated[Outer, Taken(required=("name",), help={"size": "More."})], times: int = 2) -> None:
        got.append((outer, times))

    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    return (got[0] if got else None), result.output


def test_a_commands_options_stand_side_by_side() -> None:
    words = "--name", "b", "--size", "3", "--layers", "2,3", "--wait", "1", "--off", "--times", "4"
    assert called(*words)[0] == (Outer("b", Inner(3, (2, 3)), 1.0, on=False), 4)
    assert called("--name", "a")[0] == (Outer(), 2)


def test_a_commands_help_is_its_definitions() -> None:
    _, text = called("--help")
    for part in (
        "Name of it. [required]",
        "More. [default: 1]",
        "1<=x<=9",
        "Layers of each stage (engine). [default: (o",
    ):
        assert part in text
    assert "Missing option '--name'" in called()[1]


@pytest.mark.parametrize("size", [0, 10, True, 1.0])
def test_a_definition_checks_its_values(size: Any) -> None:
    with pytest.raises(ConfigError, match=f"size must be an integer of at (least 1|most 9), got {size}"):
        Inner(size)


@pytest.mark.parametrize("definition", [ModelSource, EngineOptions, ParallelConfig, Processes])
def test_the_engine_and_runs_take_what_is_defined(definition: type) -> None:
    pytest.importorskip("torch")
    from fastserve import LLM

    own = {name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()}
    runs = {each.name: each.default for each in fields(RunConfig)}
    for each in fields(definition):
        if each.name not in ("model", "torch_threads"):  # LLM needs a model and leaves threads alone.
            assert own[each.name] == each.default
        if definition is not EngineOptions:  # A run takes those as settings.
            assert each.name in runs
            assert each.name == "model" or runs[each.name] == each.default
