"""The code a step of the pipeline rests on: its script and every module of the project that it imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

PACKAGES = {"fastserve": "system", "baselines": ".", "harness": "workflows"}
"""Packages of the project, and the folder of the checkout that holds each."""
_ENGINES = "fastserve.runtime"
_DIGITS = 12


def code_digest(script: Path, root: Path) -> str:
    """A digest of the script and of everything it imports (`code_of`), which changes if any of these files does."""
    digest = hashlib.sha256()
    for path in code_of(script, root):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def code_of(script: Path, root: Path) -> list[Path]:
    """The script and the files of all modules that it imports, directly or through others, in the checkout `root`.

    - Imports inside functions count.
    - `fastserve.runtime` does not count: it is for real engines, whose results are measurements.
    - Imports for type checking alone never run and do not count.
    - Imports by name count where the name is a text in the code. An f-string such as f"package.{name}" counts as the
      whole package.
    """
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _files_named_in(path, root, script.parent)
    return sorted(found)


@cache
def _files_named_in(path: Path, root: Path, beside: Path) -> frozenset[Path]:
    """Files that the imports and the texts of a file name; cached, since the scripts share most of their code."""
    imported = (_files_of(name, root, beside) for name in imports_of(path, for_types=False))
    named = (_files_of(name, root) for name in _texts_in(_parsed(path)))
    return frozenset(chain.from_iterable((*imported, *named)))


@cache
def imports_of(path: Path, for_types: bool = True) -> frozenset[str]:
    """Full names of what a file imports: modules, and names in them, which may be modules too.

    Without `for_types` imports under `if TYPE_CHECKING` are left out.
    """
    found = set()
    for node in _statements(_parsed(path), for_types):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(node: ast.AST, for_types: bool) -> Iterator[ast.stmt]:
    """The statements below a node, with the exception that `imports_of` names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.If) and not for_types and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        if isinstance(child, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
            yield from _statements(child, for_types)


@cache
def _texts_in(tree: ast.Module) -> frozenset[str]:
    """Texts that may name a module of the project: `package.module`, or `package.*` for all of a package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            beginning, dot, _ = str(node.values[0].value).rpartition(".")
            if dot:
                found.add(f"{beginning}.*")
    return frozenset(name for name in found if name.partition(".")[0] in PACKAGES)


def _files_of(name: str, root: Path, beside: Path | None = None) -> Iterator[Path]:
    """Files that an import of `name` runs: the module and the packages it lies in, or a module of folder `beside`."""
    if name.startswith(_ENGINES):
        return
    package, *rest = name.split(".")
    folder = root / PACKAGES[package] if package in PACKAGES else beside
    if folder is None:
        return
    for part in (package, *rest):
        if part == "*":
            yield from folder.rglob("*.py")
        if not part.isidentifier():
            return
        folder /= part
        yield from filter(Path.is_file, (folder.with_suffix(".py"), folder / "__init__.py"))
