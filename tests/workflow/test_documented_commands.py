"""Every command that the documentation shows is run, or checked as far as it can be here; a new one too.

Fenced blocks of shell are cut into commands. `fastbench` and `fastserve` are run in a scratch folder, smaller where
`SMALLER` says so. What cannot be run here is in `INSTEAD`, with the reason and what is checked in its place. Of
commands inside a sentence the options must exist.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from fastserve.cli import app as fastserve_app
from fastserve.policies.discovery import list_policies
from fastserve.scheduler import registry
from harness.cli import app as fastbench_app
from support.processes import ENVIRONMENT, ROOT
from support.servers import command as server_command

APPS = {"fastbench": fastbench_app, "fastserve": fastserve_app}
PAGES = ("README.md", "traces/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))

SMALLER = (
    ("--model opt-125m", "--model opt-tiny"),
    ("--rate 2", "--rate 20"),
    ("--num-requests 400", "--num-requests 12"),
    ("--num-requests 100", "--num-requests 8"),
    ("--slo 0.3", "--slo 0.08"),
    ("fastbench capacity", "fastbench capacity --num-requests 100 --seeds 0,1 --tolerance 0.5 --low 2"),
    ("fastserve profile", "fastserve profile --quick --repeats 1 --max-batch-size 2"),
    ("--backend http", "--backend http --num-requests 8"),
)
"""What is replaced, in this order, so that commands take seconds."""


class Instead(NamedTuple):
    """Commands that are not run here."""

    pattern: str
    check: str
    """What is done instead: "options", "make -n", "list", "help", or "" for nothing."""
    reason: str


INSTEAD = (
    Instead(r"fastserve profile .*--kernels", "options", "it needs tables of others; tests/unit/test_layer_tables.py"),
    Instead(r"fastserve serve", "options", "it serves until it is told to stop; tests/server and the fixture start it"),
    Instead(r"fast.* --device cuda", "options", "it needs a GPU"),
    Instead(r"fast.*--ranks", "options", "it needs several machines"),
    Instead(r"fast.* --url http.*--model DIR", "options", "it needs the model that the server has"),
    Instead(r"fast.*--(tensor|pipeline)-parallel-size 2", "options", "tests/distributed starts ranks, in many ways"),
    Instead(r"make gpu .*GPU_OPTIONS", "list", "it needs a GPU"),
    Instead(r"make \S+", "make -n", "it installs, and takes minutes"),
    Instead(r"export \S+=", "", "it sets a variable"),
    Instead(r"sbatch ", "", "it needs a Slurm cluster"),
    Instead(r"torchrun ", "", "it needs several machines"),
    Instead(r"(vllm|lm_eval|guidellm|aiperf|inference-perf|locust|npx) ", "", "it is another project's client"),
    Instead(r"python tools/vllm_bench_serve.py", "help", "it needs vLLM"),
    Instead(r"python benchmarks/peers.py", "help", "it installs other projects' simulators"),
    Instead(r"python benchmarks/vllm_scheduler.py", "help", "it installs vLLM"),
    Instead(r"python tools/build_trace_tables.py", "help", "it needs files that are not ours to ship"),
)


class Shown(NamedTuple):
    """A command of a page, without its comment and with `.venv/bin/` taken off."""

    page: str
    text: str


def fenced(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_commands() -> Iterator[Shown]:
    programs = ("fastserve", "fastbench", "python", "make", "snakemake", ".venv/bin/")
    for page in PAGES:
        for language, block in fenced(page):
            if language not in ("sh", "bash", "shell", "console") and (language or not block.startswith(programs)):
                continue
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                if not words:
                    continue
                shown = shlex.join(words).replace(".venv/bin/", "")
                variables = re.match(r"(?:[A-Z_]+=\S+ +)+(?=[a-z])", shown)
                yield Shown(page, shown[variables.end() :] if variables else shown)
                for inner in re.findall(r"\$\((.*?)\)", line):
                    yield Shown(page, inner)


def inline_commands() -> Iterator[Shown]:
    """`fastbench ...` and `fastserve ...` inside a sentence, with an option."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for shown in re.findall(r"`((?:fastbench|fastserve) [a-z]+ [^`]*--[^`]*)`", text):
            yield Shown(page, " ".join(shown.split()))


def python_blocks() -> list[tuple[str, str]]:
    return [(page, block) for page in PAGES for language, block in fenced(page) if language == "python"]


COMMANDS = sorted(set(shell_commands()))


def instead_of(shown: Shown) -> Instead | None:
    return next((one for one in INSTEAD if re.match(one.pattern, shown.text)), None)


def names(shown: Shown) -> str:
    return f"{shown.page}: {shown.text[:60]}"


def test_the_documentation_shows_commands() -> None:
    assert len(COMMANDS) > 20
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/server.md", "docs/cluster.md"}


@pytest.mark.parametrize("one", INSTEAD, ids=lambda one: one.pattern)
def test_no_excuse_is_left_without_a_command(one: Instead) -> None:
    assert any(instead_of(shown) is one for shown in COMMANDS), "take it out of INSTEAD"


def check_options(arguments: list[str]) -> None:
    """The subcommand takes these options; its own values are not looked at."""
    program, subcommand, *rest = arguments
    group: Any = typer.main.get_command(APPS[program])
    assert subcommand in group.commands, f"{program} has no {subcommand}"
    command = group.commands[subcommand]
    command.make_context(subcommand, rest)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that blocks of Python begin by naming."""
    folder = tmp_path_factory.mktemp("workplace")
    for _, block in python_blocks():
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
    return folder


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of the server that the pages start without a model."""
    (shown,) = {shown.text for shown in COMMANDS if re.match(r"fastserve serve --backend sim .*--port", shown.text)}
    arguments = re.sub(r" --port \d+", "", shown).split()[2:]
    with server_command(*arguments, "--served-model-name", "opt-125m") as server:
        yield server.port


@pytest.fixture(autouse=True)
def in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    list_policies()
    monkeypatch.setattr(registry, "policies", dict(registry.policies))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("shown", [shown for shown in COMMANDS if not instead_of(shown)], ids=names)
def test_a_command_does_what_the_page_says(shown: Shown, request: pytest.FixtureRequest, workplace: Path) -> None:
    text = shown.text
    for long, short in SMALLER:
        text = text.replace(long, short)
    if "http://127.0.0.1:8000" in text:
        text = text.replace(":8000", f":{request.getfixturevalue('port')}")
    program, *arguments = shlex.split(text)
    assert program in APPS, f"{shown.page} shows {shown.text!r}: say in INSTEAD why it cannot be run"
    if "--backend engine" in text or arguments[0] == "profile":
        pytest.importorskip("torch")
    done = CliRunner().invoke(APPS[program], arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    for option in ("--out", "--timeline"):
        if option in arguments:
            assert (workplace / arguments[arguments.index(option) + 1]).exists()


@pytest.mark.parametrize("shown", [shown for shown in COMMANDS if instead_of(shown)], ids=names)
def test_a_command_that_cannot_be_run_here_would_be_taken(shown: Shown) -> None:
    found = instead_of(shown)
    assert found is not None
    words = shlex.split(re.sub(r"[\[\]]", "", shown.text))  # What is in brackets may be left out.
    if found.check == "options":
        check_options(words)
    elif found.check == "make -n":
        if not shutil.which("make"):
            pytest.skip("there is no make")
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif found.check == "list":
        options = next(word for word in words if word.startswith("GPU_OPTIONS=")).partition("=")[2]
        script = ROOT / "tools/gpu_session.py"
        listed = [sys.executable, script, *shlex.split(options), "--list"]
        done = subprocess.run(listed, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif found.check == "help":
        done = subprocess.run(
            [sys.executable, ROOT / words[1], "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not [word for word in words if word.startswith("--") and word not in done.stdout]


@pytest.mark.parametrize("shown", sorted(set(inline_commands())), ids=names)
def test_options_of_a_command_in_a_sentence_exist(shown: Shown) -> None:
    program, subcommand, *rest = shown.text.split()
    group: Any = typer.main.get_command(APPS[program])
    assert subcommand in group.commands, f"{program} has no {subcommand}"
    known = {name for option in group.commands[subcommand].params for name in (*option.opts, *option.secondary_opts)}
    given = {word.partition("=")[0].rstrip(",.;)") for word in rest if word.startswith("--")}
    assert given <= known | {"--help"}


SKETCHES = {
    "docs/calibration.md": "a profile by hand, in outline",
}
"""Pages whose blocks of Python are no whole programs, and why: their names must exist."""


@pytest.mark.parametrize(("page", "block"), python_blocks(), ids=lambda value: value[:30])
def test_a_block_of_python_runs(
    page: str, block: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = ast.parse(block)
    if page in SKETCHES:
        import fastserve.latency

        made = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert made
        assert all(hasattr(fastserve.latency, name) for name in made)
        return
    pytest.importorskip("torch")
    if "tensor_parallel_size" in block:
        block = re.sub(r"(tensor|pipeline)_parallel_size=2", r"\1_parallel_size=1", block)
    if "8000" in block:
        pytest.importorskip("openai")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        block = block.replace(":8000", f":{request.getfixturevalue('port')}")
    else:
        block = block.replace('"opt-125m"', '"opt-tiny"')
    if "import" not in block:
        block = "from fastserve import LLM, SamplingParams\n" + block
    exec(compile(block, page, "exec"), {"__name__": "a_module_of_the_docs"})


def test_how_long_the_pipeline_takes_is_said_in_one_place() -> None:
    """Wherever else its commands are shown, no time is beside them."""
    for path in (ROOT / "README.md", ROOT / "Makefile", ROOT / "Snakefile", ROOT / "docs/cluster.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"make (reproduce|smoke)|^(reproduce|smoke):|-c all smoke", line):
                assert not re.search(r"\b(minutes?|seconds?|half an hour)\b", line), f"{path.name}: {line}"
