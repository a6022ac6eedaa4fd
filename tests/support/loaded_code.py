"""What the scripts of the pipeline really import, held against the code that their steps name."""

from pathlib import Path

from harness.experiments.imports import PACKAGES, code_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "workflows/scripts"
_OURS = [ROOT / folder for folder in ("system", "baselines", "workflows")]
_WATCH = """
import os, runpy, sys
from pathlib import Path

os.environ["FASTSERVE_PURE"] = "1"  # Compiled modules do not name their sources, and cannot be imported anew.

run_path = runpy.run_path

def ours():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}

def watched(path, *arguments):
    before = ours()
    for name in before:
        del sys.modules[name]  # So that the script imports all that it needs.
    try:
        return run_path(path, *arguments)
    finally:
        after = ours()
        files = sorted(file for module in after.values() if (file := getattr(module, "__file__", None)))
        (Path(__file__).parent / Path(path).stem).write_text("\\n".join(files))
        for name in after:
            del sys.modules[name]
        sys.modules.update(before)

runpy.run_path = watched
"""


def watch_scripts(folder: Path) -> str:
    """Prepare the folder. With the returned text as PYTHONPATH, every script that a worker runs leaves there, when it
    ends, what it has imported of the project."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"PACKAGES = {tuple(PACKAGES)!r}\n{_WATCH}", encoding="utf-8")
    return ":".join(map(str, (folder, ROOT / "system", ROOT / "workflows", ROOT)))


def scripts_watched(folder: Path) -> set[str]:
    """Names of the scripts that ran. Fails if one of them imported a file that is not in the code of its step."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.suffix]
    for path in files:
        check_loaded(path.name, set(map(Path, path.read_text(encoding="utf-8").splitlines())))
    return {path.name for path in files}


def check_loaded(script: str, loaded: set[Path]) -> None:
    """Fail if files of the project among those loaded are not in the code of the script's step."""
    ours = {path.resolve() for path in loaded if any(path.is_relative_to(folder) for folder in _OURS)}
    assert ours, "nothing of the project was imported"
    assert ours - set(code_of(SCRIPTS / f"{script}.py", ROOT)) == set()
