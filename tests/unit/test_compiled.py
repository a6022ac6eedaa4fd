"""The compiled core: what is compiled, and when it is used. Compiling itself is `make compile`'s."""

import ast
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.core import compiled

ROOT = Path(__file__).parents[2]


def compile_core_module():
    spec = importlib.util.spec_from_file_location("compile_core", ROOT / "tools/compile_core.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = compile_core_module().MODULES


def test_every_module_of_the_list_exists_once_in_order() -> None:
    assert list(MODULES) == sorted(set(MODULES))
    for module in MODULES:
        assert len(compiled.source_digest(f"fastserve.{module}")) == 64


@pytest.mark.parametrize("module", MODULES)
def test_classes_have_only_decorators_that_mypyc_knows(module: str) -> None:
    path = ROOT / "system/fastserve" / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            names = {
                getattr(each.func if isinstance(each, ast.Call) else each, "id", "") for each in node.decorator_list
            }
            assert names <= {"dataclass", "mypyc_attr"}, f"{module}: {node.name}"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of `core` with a manifest that is current and names no module: which is enough to be used."""
    folder = tmp_path / "fastserve"
    shutil.copytree(compiled.PACKAGE / "core", folder / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").touch()
    (folder / "_compiled").mkdir()
    sources = {"fastserve.core.clock": compiled.source_digest("fastserve.core.clock")}
    manifest = {"suffix": importlib.machinery.EXTENSION_SUFFIXES[0], "sources": sources, "files": {}}
    (folder / "_compiled/manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def core(folder: Path, **environment: str) -> tuple[str, str]:
    """Which core a new process uses, and what it says on stderr."""
    code = "from fastserve.core import compiled; compiled.use(); print(compiled.core())"
    kept = {name: value for name, value in os.environ.items() if name != "FASTSERVE_PURE"}
    environment = kept | {"PYTHONPATH": str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_an_unchanged_core_is_used(package: Path) -> None:
    assert core(package) == ("compiled", "")
    assert core(package, FASTSERVE_PURE="1") == ("pure", "")
    assert core(package, FASTSERVE_PURE="0") == ("compiled", "")


def test_a_core_whose_sources_have_changed_is_not_used_and_the_remedy_is_named(package: Path) -> None:
    with (package / "fastserve/core/clock.py").open("a") as file:
        file.write("\n")
    used, said = core(package)
    assert used == "pure"
    assert said.startswith("warning: fastserve.core.clock has changed since it was compiled")
    assert "make compile" in said
    assert core(package, FASTSERVE_PURE="1") == ("pure", "")


def test_without_a_core_or_with_that_of_another_python_nothing_is_said(package: Path) -> None:
    path = package / "fastserve/_compiled/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suffix": ".cpython-39-other.so"}))
    assert core(package) == ("pure", "")
    shutil.rmtree(path.parent)
    assert core(package) == ("pure", "")


def test_docstrings_are_there_both_ways() -> None:
    from fastserve.policies.fcfs import FCFS

    assert compiled.docstring(FCFS).startswith("Prompts and decode tokens share iterations")


def test_abstract_classes_are_told_apart_both_ways() -> None:
    from fastserve.policies.fcfs import FCFS, ArrivalOrder
    from fastserve.policies.skip_join_mlfq import SkipJoinMLFQ

    assert issubclass(FCFS, ArrivalOrder)
    assert not issubclass(FCFS, SkipJoinMLFQ)
