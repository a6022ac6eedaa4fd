"""Policies of users: found in a file or a module, named where their code fails, and told from ours by their source."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fastserve.core.errors import ConfigError, PolicyError

_OURS = ("fastserve", "baselines", "harness")
_PREFIX = "fastserve_policy_"
"""Of the names that modules of files get."""


def load_class(name: str) -> Any:
    """What `FILE.py:Class` or `package.module:Class` names. A path is relative to the current folder.

    Both the folder of the file and, for a module, the current one become importable. Raises ConfigError if there is no
    such file, module or class; PolicyError if its code fails.
    """
    where, separator, attribute = name.rpartition(":")
    if not separator:
        where, attribute = name, ""
    is_file = where.endswith(".py")
    if not where or (not attribute and not is_file):
        raise ConfigError(f"policy {name!r} names no class in a file or module; write FILE.py:Class or module:Class")
    module = _load_file(name, Path(where)) if is_file else _import(name, where)
    if attribute and hasattr(module, attribute):
        return getattr(module, attribute)
    found = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    known = ", ".join(f"{where}:{key}" for key in found if isinstance(getattr(module, key), type)) or "none"
    raise ConfigError(f"policy {name!r}: {where} has no class {attribute!r}; its classes: {known}")


def is_own(policy: type) -> bool:
    """Whether it is a user's, neither ours nor a baseline."""
    return policy.__module__.partition(".")[0] not in _OURS


def source_digest(policy: type) -> str:
    """SHA-256 of the source of a policy: its file, and those of the same folder or package that it imports from."""
    digest = hashlib.sha256()
    for path in sorted(_sources(sys.modules[policy.__module__])):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def blamed(error: Exception, policy: type) -> Exception:
    """The error itself, or PolicyError if code of a user's policy raised it."""
    if isinstance(error, PolicyError) or not is_own(policy):
        return error
    files = {str(path) for path in _sources(sys.modules[policy.__module__])}
    summary = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(summary) if frame.filename in files), None)
    if first is None:
        return error
    module = sys.modules[policy.__module__]
    where = Path(module.__file__ or "").name if module.__name__.startswith(_PREFIX) else module.__name__
    return _policy_error(f"{where}:{policy.__name__}", error, summary[first:])


def failed(name: str, error: BaseException) -> PolicyError:
    """PolicyError for code of a policy that failed while it was imported or made."""
    summary = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    first = next(
        (i for i, frame in enumerate(summary) if not frame.filename.startswith((ours, "<frozen", importlib.__file__))),
        len(summary),
    )
    return _policy_error(name, error, summary[first:])


def _policy_error(name: str, error: BaseException, frames: list[traceback.FrameSummary]) -> PolicyError:
    *quoted, what = traceback.format_exception_only(error)  # Of a syntax error the line as well.
    place = (error.filename, error.lineno) if isinstance(error, SyntaxError) else None
    if frames and place is None:
        place = (frames[-1].filename, frames[-1].lineno)
    where = f" ({Path(place[0] or '').name}, line {place[1]})" if place else ""
    found = PolicyError(f"the code of policy {name!r} failed: {what.strip()}{where}; mend it there")
    found.frames = "".join([*traceback.format_list(frames), *quoted])
    return found


def _load_file(name: str, path: Path) -> ModuleType:
    """The module of a file, loaded anew if the file has changed since."""
    try:
        path = path.expanduser().resolve()
        source = path.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"policy {name!r}: cannot read {path}: {reason}; give the path of a Python file") from error
    module_name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    loaded = sys.modules.get(module_name)
    if loaded is not None and getattr(loaded, "_source", None) == source:
        return loaded
    _make_importable(path.parent)
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # A dataclass looks its module up.
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except ConfigError:
        del sys.modules[module_name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise failed(name, error) from error
    vars(module)["_source"] = source
    return module


def _import(name: str, module: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(module)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise failed(name, error) from error
        raise ConfigError(
            f"cannot import policy {name!r}: {error}; for a policy in a file, write FILE.py:{name.rpartition(':')[2]}"
        ) from error
    except (TypeError, ValueError) as error:  # A relative or an empty name.
        if "package" in str(error) or "module name" in str(error):
            raise ConfigError(f"cannot import policy {name!r}: {error}") from error
        raise failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise failed(name, error) from error


def _make_importable(folder: Path) -> None:
    """Last, so that nothing in it hides a module that was found without it."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _sources(module: ModuleType) -> set[Path]:
    """The file of a module, and those of its folder, or package, that it imports, and that these import."""
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
    """Modules that a file may import, by their names from `root` on."""
    folder = path.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*folder[: len(folder) + 1 - node.level], node.module or "")) if node.level else node.module
            base = (base or "").strip(".")
            yield from filter(None, (base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)))
