"""The installed packages work without the checkout and name the commit they were built from.

`make test` installs the wheel without its dependencies and runs it with those of this environment. With
`--empty-environment` (`make wheel-test`), pip installs the wheel and its dependencies into a fresh environment, in the
versions of requirements.txt, and the commands run there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import fastserve
from fastserve.core.compiled import FOLDER
from harness.run.meta import _commit_of_checkout

ROOT = Path(__file__).parents[2]
PROFILE = "a100-80g/opt-13b-tp1-swifttransformer"
PACKAGES = {"system/fastserve": "fastserve", "baselines": "baselines", "workflows/harness": "harness"}


def clean_environment() -> dict[str, str]:
    """Environment variables without the checkout's path, and without those of a git hook that runs the tests."""
    dropped = ("PYTHONPATH", "FASTSERVE_COMMIT", "FASTSERVE_PURE")
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name not in dropped}


def call_well(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed, and return its output."""
    words = list(map(str, command))
    environment = clean_environment() | environment
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make_repository(folder: Path) -> str:
    """Commit everything in `folder` and give the commit."""
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    call_well(*git, "init", "-q", cwd=folder)
    call_well(*git, "add", "--all", cwd=folder)
    call_well(*git, "commit", "-q", "-m", "everything", cwd=folder)
    return call_well("git", "rev-parse", "HEAD", cwd=folder).strip()


def build(hook: str, source: Path, folder: Path, **environment: str) -> Path:
    """Build a distribution with the backend that pyproject.toml names, without installing anything."""
    folder.mkdir()
    code = f"from setuptools.build_meta import {hook}; print({hook}({str(folder)!r}))"
    name = call_well(sys.executable, "-c", code, cwd=source, **environment).splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built."""
    folder = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("system", "baselines", "workflows"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "tools").mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        ".gitignore",
        "tools/compile_core.py",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def commit(source: Path) -> str:
    return make_repository(source)


@pytest.fixture(scope="module")
def has_core(request: pytest.FixtureRequest) -> bool:
    """Whether the wheel is to have the compiled core; `make test` does not compile one for it."""
    return shutil.which("cc") is not None and (request.config.getoption("--empty-environment") or FOLDER.is_dir())


@pytest.fixture(scope="module")
def wheel(source: Path, commit: str, has_core: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "wheel"
    return build("build_wheel", source, folder, FASTSERVE_PURE="0" if has_core else "1")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages alone."""
    target = tmp_path_factory.mktemp("installed") / "packages"
    call_well(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
        "--target", target, wheel, cwd=target.parent,
    )  # fmt: skip
    return target


class Commands(NamedTuple):
    """Installed commands and what they need to run."""

    python: Path
    bin: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def commands(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    if not request.config.getoption("--empty-environment"):
        installed = request.getfixturevalue("installed")
        return Commands(Path(sys.executable), installed / "bin", {"PYTHONPATH": str(installed)})
    folder = tmp_path_factory.mktemp("empty")
    call_well(sys.executable, "-m", "venv", folder, cwd=folder)
    bin = folder / "bin"
    call_well(
        bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--constraint", ROOT / "requirements.txt", wheel, cwd=folder,
    )  # fmt: skip
    return Commands(bin / "python", bin, {})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The repository of another project."""
    (tmp_path / "file").write_text("theirs")
    make_repository(tmp_path)
    return tmp_path


@pytest.fixture
def fastbench(commands: Commands, elsewhere: Path):
    """Run the installed command in another project's repository."""

    def run(*arguments: object) -> str:
        return call_well(commands.bin / "fastbench", *arguments, cwd=elsewhere, **commands.environment)

    return run


@contextmanager
def serving(commands: Commands, cwd: Path) -> Iterator[str]:
    """The URL of the installed server, which simulates a model."""
    command = [commands.bin / "fastserve", "serve", "--backend", "sim", "--profile", PROFILE, "--port", "0"]
    environment = clean_environment() | commands.environment
    with subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving "):
                    yield f"http://127.0.0.1:{line.rpartition(':')[2].strip()}"
                    break
            else:
                pytest.fail("".join(said))
        finally:
            process.kill()


def fetched(url: str, body: object = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_wheel_holds_every_file_of_the_packages(source: Path, wheel: Path) -> None:
    expected = {
        f"{name}/{path.relative_to(source / folder).as_posix()}"
        for folder, name in PACKAGES.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected | {"harness/COMMIT"}


def without_core(wheel: zipfile.ZipFile) -> set[str]:
    """Names of the files that every wheel has."""
    return {name for name in wheel.namelist() if "/_compiled/" not in name}


CORE = "from fastserve.policies.fcfs import FCFS; from fastserve.core.compiled import core; print(core())"


def test_the_wheel_has_the_compiled_core_where_a_compiler_is(
    wheel: Path, has_core: bool, commands: Commands, elsewhere: Path
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert (without_core(zipfile.ZipFile(wheel)) != names) is has_core
    used = call_well(commands.python, "-c", CORE, cwd=elsewhere, **commands.environment).strip()
    assert used == ("compiled" if has_core else "pure")
    tables = []
    for pure in "01":
        command = (commands.bin / "fastbench", "run", "--profile", PROFILE, "--rate", 2, "--num-requests", 50)
        call_well(*command, "--out", pure, cwd=elsewhere, **commands.environment, FASTSERVE_PURE=pure)
        tables.append([(elsewhere / pure / f"{name}.parquet").read_bytes() for name in ("requests", "iterations")])
    assert tables[0] == tables[1]


def test_the_lists_are_those_of_the_checkout(fastbench) -> None:
    assert PROFILE in fastbench("profiles")
    assert "fastserve-fcfs" in fastbench("policies")
    assert "sharegpt-client" in fastbench("traces")
    assert fastserve.__version__ in fastbench("--version")


RUN_TRACES = f"""
import sys
from harness.cli import app
for trace in sys.argv[1:]:
    run = ["run", "--profile", "{PROFILE}", "--trace", trace, "--rate", "2", "--num-requests", "5"]
    app(run, standalone_mode=False)
"""


def test_every_built_in_trace_serves(fastbench, commands: Commands, elsewhere: Path) -> None:
    names = [re.split(r"[\[:]", line)[0].split()[0] for line in fastbench("traces").splitlines() if "PATH" not in line]
    assert len(names) == 9
    with_options = {"measured": "measured:rtx4090"}
    specs = [with_options.get(name, name) for name in names]
    said = call_well(commands.python, "-c", RUN_TRACES, *specs, cwd=elsewhere, **commands.environment)
    assert said.count("5 finished, 0 failed") == len(names)


def test_the_server_has_its_pages_and_its_tokenizer(commands: Commands, elsewhere: Path) -> None:
    with serving(commands, elsewhere) as url:
        for path in ("/", "/docs"):
            assert "<html" in fetched(url + path)
        answer = json.loads(fetched(f"{url}/v1/completions", {"prompt": "What is a quantum?", "max_tokens": 3}))
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["text"]


def test_a_run_by_default_records_the_commit_of_the_wheel_not_of_the_repository_around_it(
    fastbench, installed: Path, elsewhere: Path, commit: str
) -> None:
    fastbench("run", "--backend", "sim", "--profile", PROFILE, "--rate", 2, "--num-requests", 5)
    (path,) = elsewhere.glob("results/*/meta.json")
    meta = json.loads(path.read_text())
    assert meta["commit"] == commit
    assert meta["versions"]["fastserve-repro"] == fastserve.__version__


def test_an_install_inside_another_repository_has_not_its_commit(installed: Path, elsewhere: Path, commit: str) -> None:
    inside = elsewhere / "packages"
    shutil.copytree(installed, inside)
    said = call_well(
        sys.executable, "-c", "from harness.run.meta import environment_meta; print(environment_meta()['commit'])",
        cwd=elsewhere, PYTHONPATH=str(inside),
    )  # fmt: skip
    assert said.strip() == commit


def test_a_checkout_has_its_own_commit_and_says_where_it_was_changed(source: Path, commit: str) -> None:
    file = source / "workflows/harness/run/meta.py"
    assert _commit_of_checkout(file) == commit
    text = file.read_text()
    try:
        file.write_text(f"{text}\n")
        assert _commit_of_checkout(file) == f"{commit}-dirty"
    finally:
        file.write_text(text)
    untracked = file.with_name("untracked.py")
    untracked.touch()
    try:
        assert _commit_of_checkout(untracked) is None
    finally:
        untracked.unlink()


def test_a_pure_wheel_built_from_a_source_archive_has_the_same_files(
    source: Path, wheel: Path, commit: str, tmp_path: Path
) -> None:
    archive = build("build_sdist", source, tmp_path / "archive")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("build_wheel", unpacked, tmp_path / "wheel", FASTSERVE_PURE="1")
    assert again.name.endswith("-py3-none-any.whl")
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert without_core(first) == set(second.namelist())
    assert second.read("harness/COMMIT").decode().strip() == commit
