"""Whose code failed: tell a user's policy from ours, and name it where its code raises an error."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastserve.core.errors import PolicyError

MODULE_PREFIX = "fastserve_policy_"
"""Prefix of the names that modules of policy files get."""
_OURS = ("fastserve", "baselines", "harness")
_IMPORTERS = (str(Path(__file__).parents[1]), "<frozen", importlib.__file__)
"""Where frames come from that lead to the import of a policy."""


def is_own(policy: type) -> bool:
    """Whether the policy is a user's, neither ours nor a baseline."""
    return policy.__module__.partition(".")[0] not in _OURS


def source_digest(policy: type) -> str:
    """SHA-256 of the source of a policy: its file, and what it imports from the same folder or package."""
    digest = hashlib.sha256()
    for path in sorted(_sources(sys.modules[policy.__module__])):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def blamed(error: Exception, policy: type) -> Exception:
    """The error itself, or a PolicyError if the code of a user's policy raised it."""
    if isinstance(error, PolicyError) or not is_own(policy):
        return error
    files = {str(path) for path in _sources(sys.modules[policy.__module__])}
    summary = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(summary) if frame.filename in files), None)
    if first is None:
        return error
    module = sys.modules[policy.__module__]
    where = Path(module.__file__ or "").name if module.__name__.startswith(MODULE_PREFIX) else module.__name__
    return _policy_error(f"{where}:{policy.__name__}", error, summary[first:])


def failed(name: str, error: BaseException) -> PolicyError:
    """A PolicyError for the code of a policy that failed while it was imported or made."""
    summary = traceback.extract_tb(error.__traceback__)
    first = next(
        (i for i, frame in enumerate(summary) if not frame.filename.startswith(_IMPORTERS)),
        len(summary),
    )
    return _policy_error(name, error, summary[first:])


def _policy_error(name: str, error: BaseException, frames: list[traceback.FrameSummary]) -> PolicyError:
    *quoted, what = traceback.format_exception_only(error)  # A syntax error has its line as well.
    place = (error.filename, error.lineno) if isinstance(error, SyntaxError) else None
    if frames and place is None:
        place = (frames[-1].filename, frames[-1].lineno)
    where = f" ({Path(place[0] or '').name}, line {place[1]})" if place else ""
    found = PolicyError(f"the code of policy {name!r} failed: {what.strip()}{where}; mend it there")
    found.frames = "".join([*traceback.format_list(frames), *quoted])
    return found


def _sources(module: ModuleType) -> set[Path]:
    """The files of a module and of what it imports, directly or not, from its folder or package."""
    path = Path(module.__file__ or "")
    *packages, _ = module.__name__.split(".")
    root = path.parents[len(packages)] if packages and path.name != "__init__.py" else path.parent
    found: set[Path] = set()
    left = [path]
    while left:
        each = left.pop()
        if each in found:
            continue
        found.add(each)
        for name in _imports(each, root):
            top = name.partition(".")[0]
            is_near = top == packages[0] if packages else "site-packages" not in root.parts
            if is_near and top not in _OURS:
                file = root.joinpath(*name.split("."))
                left += [one for one in (file.with_suffix(".py"), file / "__init__.py") if one.is_file()]
    return found


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Names, relative to `root`, of the modules that a file may import."""
    folder = path.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*folder[: len(folder) + 1 - node.level], node.module or "")) if node.level else node.module
            base = (base or "").strip(".")
            yield from filter(None, (base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)))
