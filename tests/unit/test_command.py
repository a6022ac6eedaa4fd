"""What both commands answer before they do anything."""

import pytest
from typer.testing import CliRunner

import fastserve
from fastserve.cli import app as fastserve_app
from harness.cli import app as fastbench_app

COMMANDS = {
    "fastserve": (fastserve_app, ["serve", "profile"]),
    "fastbench": (fastbench_app, ["run", "capacity", "policies", "traces", "profiles"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name][0], ["--version"])
    assert (result.exit_code, result.output) == (0, f"fastserve-repro {fastserve.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help_for_the_command_and_its_subcommands(name: str) -> None:
    app, subcommands = COMMANDS[name]
    for before in ([], *([subcommand] for subcommand in subcommands)):
        short, long = (CliRunner().invoke(app, [*before, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0
        assert short.output == long.output
        assert "Usage:" in short.output
