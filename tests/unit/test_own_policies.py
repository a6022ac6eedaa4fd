"""Policies of users: in files, in modules, in packages; with faults."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastserve.core.console import exit_on_error
from fastserve.core.errors import ConfigError, PolicyError
from fastserve.policies import discovery
from fastserve.policies.discovery import file_name, find_policy, list_policies
from fastserve.scheduler import registry
from fastserve.scheduler.blame import blamed, is_own, source_digest
from harness.analysis.capacity_result import Objective
from harness.analysis.capacity_search import find_capacity
from harness.cli import app
from harness.run.config import RunConfig
from harness.run.runner import run
from support.engines import make_engine
from support.processes import ENVIRONMENT

POLICY = """
from fastserve.scheduler import Policy, register
{imports}

@register
class Mine(Policy):
    name = "{name}"

    def on_add(self, request):
        self.queue.join(request, {level})

    def on_progress(self, request, start, end):
        {progress}
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is unknown to the next."""
    list_policies()
    monkeypatch.setattr(registry, "policies", dict(registry.policies))
    monkeypatch.setattr(discovery, "_skipped", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(path: Path, *, name: str = "mine", imports: str = "", level: str = "0", progress: str = "pass") -> Path:
    path.write_text(POLICY.format(name=name, imports=imports, level=level, progress=progress))
    return path


def config(policy: object, **changes: object) -> RunConfig:
    options = {
        "profile": "a100-80g/opt-13b-tp1-swifttransformer",
        "trace": "fixed",
        "rate": 2.0,
        "num_requests": 5,
    } | changes
    return RunConfig(policy=str(policy), **options)  # type: ignore[arg-type]


def test_a_file_is_run_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my policy.py", imports="from helper_of_mine import LEVEL", level="LEVEL")
    (tmp_path / "helper_of_mine.py").write_text("LEVEL = 3\n")
    monkeypatch.chdir(tmp_path)
    for path in ("my policy.py", "./my policy.py", tmp_path / "my policy.py", "../" + tmp_path.name + "/my policy.py"):
        assert run(config(f"{path}:Mine"), tmp_path / "out")["finished"] == 5


def test_a_module_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "module_of_mine.py")
    monkeypatch.chdir(tmp_path)
    assert run(config("module_of_mine:Mine"), tmp_path / "out")["finished"] == 5


def test_workers_of_a_capacity_search_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    found = find_capacity(
        config("mine.py:Mine"), Objective(1.0, seeds=(0, 1), low=500.0, high=1000.0), tmp_path, lambda _: None
    )
    assert found.rates


def test_a_file_that_has_changed_is_loaded_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py")
    before = find_policy(f"{path}:Mine")
    assert find_policy(f"{path}:Mine") is before
    write(path, level="1")
    assert find_policy(f"{path}:Mine") is not before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":Mine", "policy ':Mine' names no class in a file or module; write FILE.py:Class or module:Class"),
        (":", "names no class"),
        ("mine.py", "mine.py has no class ''; its classes: mine.py:Mine"),
        ("mine.py:", "mine.py has no class ''; its classes: mine.py:Mine"),
        ("mine.py:His", "mine.py has no class 'His'; its classes: mine.py:Mine"),
        ("his.py:His", "cannot read .*his.py: No such file or directory; give the path of a Python file"),
        ("folder.py:His", "cannot read .*folder.py: Is a directory"),
        (
            "no.such:Mine",
            "cannot import policy 'no.such:Mine': No module named 'no'; for a policy in a file, write FILE",
        ),
        ("..mine:Mine", "cannot import policy '..mine:Mine'"),
        ("os:path", "'os:path' is not a subclass of fastserve.scheduler.Policy"),
        ("twice.py:Mine", "two policies are called 'fcfs-twice'.*rename one"),
        ("unnamed.py:Mine", "has no name"),
        ("without.py:Mine", "its class has no method on_add; define it"),
    ],
)
def test_what_names_no_policy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    write(tmp_path / "mine.py")
    write(tmp_path / "unnamed.py", name="")
    write(tmp_path / "first.py", name="fcfs-twice")
    write(tmp_path / "twice.py", name="fcfs-twice")
    (tmp_path / "without.py").write_text(write(tmp_path / "whole.py", name="whole").read_text().replace("on_add", "ad"))
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    find_policy("first.py:Mine")
    with pytest.raises(ConfigError, match=message) as caught:
        find_policy(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f():\n    return 1 / 0\nf()", r"failed: ZeroDivisionError: division by zero \(mine.py, line 2\); mend"),
        ("class Mine(:\n    pass", r"failed: SyntaxError: invalid syntax \(mine.py, line 1\); mend it"),
        ("import no_such_module", r"failed: ModuleNotFoundError: No module named 'no_such_module' \(mine.py, line 1\)"),
        ("import sys\nsys.exit(3)", r"failed: SystemExit: 3 \(mine.py, line 2\)"),
        ("\0", "failed: "),
        (POLICY.format(name="m", imports="", level="[][1]", progress="pass"), r"IndexError: .* \(mine.py, line 10\)"),
        (
            POLICY.format(name="m", imports="", level="0", progress="self.queue.move(7, 1)"),
            "(Attribute|Type)Error: ",
        ),
    ],
)
@pytest.mark.parametrize("form", ["mine.py:Mine", "mine:Mine"])
def test_code_that_fails_is_named_with_its_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str, source: str,
    message: str,
) -> None:  # fmt: skip
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match=message) as caught:
        run(config(form), tmp_path / "out")
    assert f"policy {form!r}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(SystemExit), exit_on_error():
        raise caught.value
    *frames, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the code of policy")
    assert not any("runner.py" in frame or "loading.py" in frame for frame in frames)
    if "(mine.py" in message:
        assert any("mine.py" in frame for frame in frames)


def test_a_fault_of_ours_is_not_blamed_on_a_policy(tmp_path: Path) -> None:
    policy = find_policy(f"{write(tmp_path / 'mine.py')}:Mine")
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert blamed(caught.value, policy) is caught.value


def test_the_source_of_a_policy_is_its_file_and_those_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", imports="import helper_mine\nimport json", level="helper_mine.LEVEL")
    (tmp_path / "helper_mine.py").write_text("from deeper_mine import LEVEL\n")
    (tmp_path / "deeper_mine.py").write_text("LEVEL = 1\n")
    (tmp_path / "other_mine.py").write_text("LEVEL = 1\n")
    policy = find_policy(f"{path}:Mine")
    assert is_own(policy)
    seen = [source_digest(policy)]
    for changed in ("mine.py", "helper_mine.py", "deeper_mine.py"):
        with (tmp_path / changed).open("a") as file:
            file.write("# more\n")
        seen.append(source_digest(policy))
    assert len(set(seen)) == 4
    (tmp_path / "other_mine.py").write_text("LEVEL = 2\n")
    assert source_digest(policy) == seen[-1]


def test_the_source_of_a_policy_in_a_package_is_what_it_imports_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package_mine"
    (package / "inner").mkdir(parents=True)
    for path in (package / "__init__.py", package / "inner/__init__.py"):
        path.write_text("")
    write(package / "inner/policy.py", imports="from ..levels import LEVEL\nfrom . import beside", level="LEVEL")
    (package / "inner/beside.py").write_text("")
    (package / "levels.py").write_text("def late():\n    import package_mine.late\nLEVEL = 1\n")
    (package / "late.py").write_text("")
    (package / "other.py").write_text("")
    monkeypatch.chdir(tmp_path)
    policy = find_policy("package_mine.inner.policy:Mine")
    seen = [source_digest(policy)]
    for changed in ("inner/policy.py", "inner/beside.py", "levels.py", "late.py", "other.py"):
        with (package / changed).open("a") as file:
            file.write("# more\n")
        seen.append(source_digest(policy))
    assert len(set(seen)) == 5
    assert seen[-1] == seen[-2]


def test_policies_of_ours_and_baselines_are_no_users() -> None:
    assert not any(is_own(policy) for policy in discovery.list_policies().values() if policy.name != "mine")


def test_names_of_files() -> None:
    assert [file_name(name) for name in ("fastserve", "a.b:C", "./x/a b.py:C", "/x/a.py:C")] == [
        "fastserve", "a.b.C", "a.b.C", "a.C",
    ]  # fmt: skip


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """An installed package with a good policy, one with a stale entry point, and one without a docstring."""
    for name, module in (("good-mine", "good_mine"), ("stale", "no_such_module"), ("clash", "clash_mine")):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fastserve.policies]\n{name} = {module}\n")
    write(tmp_path / "good_mine.py", name="good-mine")
    write(tmp_path / "clash_mine.py", name="fastserve")
    return tmp_path


def fastbench(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((ENVIRONMENT["PYTHONPATH"], str(packages)))
    command = [sys.executable, "-m", "harness.cli", *arguments]
    return subprocess.run(command, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)


def test_a_stale_entry_point_is_named_and_skipped(packages: Path) -> None:
    listed = fastbench(packages, "policies")
    assert listed.returncode == 0, listed.stderr
    assert "good-mine          (its class has no docstring)" in listed.stdout
    assert "fastserve          Approximates" in listed.stdout
    first, second = sorted(listed.stderr.splitlines())
    assert first.startswith(
        "warning: skipped policy 'clash' of package 'clash': clash_mine cannot be imported: two pol"
    )
    assert second == (
        "warning: skipped policy 'stale' of package 'stale': no_such_module cannot be imported: ModuleNotFoundError: "
        "No module named 'no_such_module'; mend or uninstall the package"
    )
    asked = fastbench(
        packages, "run", "--policy", "stale", "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--rate", "1"
    )
    assert asked.returncode == 2
    assert asked.stderr.splitlines()[-1].startswith("error: policy 'stale' was skipped: no_such_module cannot be")


def test_a_policy_without_defaults_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", imports="import dataclasses")
    with path.open("a") as file:
        file.write("\n    @dataclasses.dataclass\n    class Options:\n        must: int\n")
    find_policy(f"{path}:Mine")
    listed = CliRunner().invoke(app, ["policies"])
    assert listed.exit_code == 0
    assert "options: must (no defaults: " in listed.stdout


def test_proactive_swapping_needs_its_options(tmp_path: Path) -> None:
    source = """
        from dataclasses import dataclass
        from fastserve.scheduler import Policy, PolicyOptions

        @dataclass(frozen=True)
        class MineOptions(PolicyOptions):
            swap: str = "proactive"

        class Mine(Policy):
            name = "mine-without-budget"
            Options = MineOptions

            def on_add(self, request):
                self.queue.join(request, 0)
    """
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(source))
    with pytest.raises(ConfigError, match="derive MineOptions from MemoryOptions"):
        make_engine(f"{path}:Mine")
