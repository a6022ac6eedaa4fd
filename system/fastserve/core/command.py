"""What both commands take before their own options: -h and --version."""

from __future__ import annotations

from typing import Annotated

import typer

import fastserve


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
