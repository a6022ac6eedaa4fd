"""The compiled core: use the modules that tools/compile_core.py has compiled, as long as their sources are unchanged.

`use()` is called when `fastserve` is first imported. Without compiled modules, or with `FASTSERVE_PURE=1`, Python reads
the same files as they are. Both give the same results to the byte.
"""

from __future__ import annotations

import abc
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:
    T = TypeVar("T", bound=type)

    def mypyc_attr(**attributes: Any) -> Any:
        """Class decorator that mypyc reads; in Python it does nothing."""

        def unchanged(cls: T) -> T:
            return cls

        return unchanged


__all__ = ["changed_sources", "core", "docstring", "is_forced_pure", "manifest", "mypyc_attr", "source_digest", "use"]

PURE_VARIABLE = "FASTSERVE_PURE"
"""Environment variable: 1 builds and uses pure Python."""
PACKAGE = Path(__file__).parents[1]
FOLDER = PACKAGE / "_compiled"
"""What tools/compile_core.py writes, unknown to git."""
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
"""What names of modules compiled for this Python end in."""
MANIFEST = "manifest.json"
"""In that folder: `suffix`, of the Python that the modules are for, `sources`, digests by module, and `files`."""


def core() -> Literal["compiled", "pure"]:
    """Whether this process uses the compiled core."""
    return "compiled" if any(isinstance(finder, _Finder) for finder in sys.meta_path) else "pure"


def is_forced_pure() -> bool:
    """Whether the user asks for pure Python."""
    return os.environ.get(PURE_VARIABLE, "") not in ("", "0")


def source_digest(module: str) -> str:
    """SHA-256 of the source of a module of this package; OSError if there is none."""
    return hashlib.sha256(_source(module).read_bytes()).hexdigest()


def _source(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def manifest() -> dict[str, Any] | None:
    """The manifest of the compiled modules; None if there are none for this Python."""
    try:
        found: dict[str, Any] = json.loads((FOLDER / MANIFEST).read_bytes())
    except OSError:
        return None
    return found if found["suffix"] == SUFFIX else None


def use() -> None:
    """Import compiled modules from here on, if there are any for this Python. Warn if their sources have changed."""
    if is_forced_pure() or core() == "compiled":
        return
    found = manifest()
    if found is None:
        return
    changed = changed_sources(found["sources"])
    if changed:
        print(
            f"warning: {changed[0]} has changed since it was compiled, so everything runs as pure Python; compile it "
            f"again (`make compile`), or set {PURE_VARIABLE}=1",
            file=sys.stderr,
        )
        return
    sys.meta_path.insert(0, _Finder({name: FOLDER / file for name, file in found["files"].items()}))


def changed_sources(digests: dict[str, str]) -> list[str]:
    """The modules whose source has not the digest given."""

    def is_changed(module: str) -> bool:
        try:
            return source_digest(module) != digests[module]
        except OSError:
            return True

    return [module for module in digests if is_changed(module)]


def docstring(cls: type) -> str:
    """The docstring of a class, which compiled classes do not have: it is read from the source."""
    path = _source(cls.__module__)
    if cls.__doc__ or not path.is_file() or not cls.__module__.startswith("fastserve."):
        return cls.__doc__ or ""
    nodes = ast.parse(path.read_bytes()).body
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return next(found, None) or ""


class _Finder:
    """Finds compiled modules by name, before the finders that read Python files."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = self.files.get(name)
        if file is None:
            return None
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))


class _Loader(importlib.machinery.ExtensionFileLoader):
    """Loads a compiled module, and makes its abstract classes what ABCMeta makes of them, which mypyc leaves out."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for cls in vars(module).values():
            if isinstance(cls, abc.ABCMeta) and cls.__module__ == module.__name__ and "_abc_impl" not in vars(cls):
                # Without, all classes share the answers of isinstance.
                abc._abc_init(cls)  # type: ignore[attr-defined]
