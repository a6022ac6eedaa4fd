"""requirements.txt, environment.yml and pyproject.toml agree on what is installed."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

import fastserve

ROOT = Path(__file__).parents[2]


def pins(lines: list[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if text:
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+-]+(; sys_platform == \"linux\")?)", text)
            assert match, f"not an exact pin: {line!r}"
            found[match[1].lower()] = match[2]
    return found


def test_environment_yml_has_the_same_pins() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert pins(pip) == requirements


def test_every_dependency_of_the_package_is_pinned() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(n for group in project["optional-dependencies"].values() for n in group)]
    for requirement in named:
        assert re.split(r"[<>=~!]", requirement)[0].lower() in requirements, requirement


def test_wheels_are_compiled_by_the_mypy_that_is_pinned() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"mypy=={requirements['mypy']}" in needed


COMES_WITH = {"starlette": "fastapi", "pydantic_core": "pydantic", "yarl": "aiohttp"}
"""Packages that a dependency needs itself, and whose names we use."""
CALLED = {"yaml": "pyyaml"}
"""Modules by another name than their package's."""


def imported_modules() -> dict[str, Path]:
    """Top-level modules that the installed packages import, each with a file that does."""
    found = {}
    for folder in ("system/fastserve", "workflows/harness", "baselines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0]: path for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found[str(node.module).partition(".")[0]] = path
    return found


def test_every_import_of_the_package_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.split(r"[<>=~!]", named)[0].lower() for named in project["dependencies"]}
    ours = {"fastserve", "harness", "baselines"}
    for module, path in imported_modules().items():
        if module == "mypy_extensions":  # Only type checkers and mypyc read it.
            continue
        if module not in sys.stdlib_module_names and module not in ours:
            name = CALLED.get(module, COMES_WITH.get(module, module)).replace("_", "-")
            assert name in dependencies, f"{path} imports {module}; add it to dependencies in pyproject.toml"


def test_clients_have_the_versions_that_we_have() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    clients = pins((ROOT / "requirements-clients.txt").read_text().splitlines())
    assert clients
    for name in clients.keys() & requirements.keys():
        assert clients[name] == requirements[name], name


def test_the_citation_has_the_version_of_the_code() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fastserve.__version__
