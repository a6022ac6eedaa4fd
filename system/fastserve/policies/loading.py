"""Load a user's policy from a file or a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.scheduler.blame import MODULE_PREFIX, failed


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


def _load_file(name: str, path: Path) -> ModuleType:
    """The module of a file, loaded again if the file has changed."""
    try:
        path = path.expanduser().resolve()
        source = path.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"policy {name!r}: cannot read {path}: {reason}; give the path of a Python file") from error
    module_name = f"{MODULE_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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
    """Add the folder at the end of the path, so that it hides no other module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
