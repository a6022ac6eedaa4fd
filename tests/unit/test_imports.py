"""Imports run one way, from room to room; torch starts in `runtime`."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.experiments.imports import PACKAGES, imports_of

ROOT = Path(__file__).parents[2]

# A room may import itself and the rooms before it. Those on one line know nothing of each other.
ROOMS = {
    "fastserve.server": [
        {"http", "pages"},
        {"options", "text", "protocol"},
        {"model"},
        {"engine"},
        {"monitoring", "answers"},
        {"prompts"},
        {"service"},
        {"routes"},
        {"app"},
        {"serve"},
    ],
    "fastserve": [
        {"core"},
        {"kvcache", "latency"},
        {"scheduler"},
        {"policies"},
        {"engine"},
        {"simulation", "runtime"},
        {"llm", "worker"},
        {"profiling", "server"},
        {"cli"},
    ],
    "harness": [
        {"workload"},
        {"client"},
        {"run"},
        {"experiments"},
        {"analysis"},
        {"studies", "pipeline"},
        {"report"},
        {"cli"},
    ],
}
FOLDERS = {package: ROOT / folder / package for package, folder in PACKAGES.items()}
FOLDERS["fastserve.server"] = FOLDERS["fastserve"] / "server"
TORCH = {"torch", "triton", "safetensors"}
TORCH_FREE = ["core", "kvcache", "latency", "scheduler", "policies", "engine", "simulation"]


@pytest.mark.parametrize("package", ROOMS)
def test_imports_run_one_way(package: str) -> None:
    rank = {room: i for i, rooms in enumerate(ROOMS[package]) for room in rooms}
    wrong = []
    for path in sorted(FOLDERS[package].rglob("*.py")):
        room, *_ = path.relative_to(FOLDERS[package]).with_suffix("").parts
        if room == "__init__":
            continue
        assert room in rank, f"{path} is in no room: say in this test where it belongs"
        for module in imports_of(path):
            other = module.removeprefix(f"{package}.").partition(".")[0]
            inside = module.startswith(f"{package}.")
            if inside and other in rank and other != room and rank[other] >= rank[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "above"), [("fastserve", ("baselines", "harness")), ("baselines", ("harness",))], ids=str
)
def test_nothing_imports_a_package_above(package: str, above: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted(FOLDERS[package].rglob("*.py"))
        for module in imports_of(path)
        if module.partition(".")[0] in above
    ]
    assert wrong == []


def test_torch_is_imported_in_the_runtime_alone() -> None:
    """Also inside functions; `profiling` asks torch for its version and the names of GPUs."""
    others = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in FOLDERS[package].rglob("*.py")
        if FOLDERS["fastserve"] / "runtime" not in path.parents
        and any(module.partition(".")[0] in TORCH for module in imports_of(path))
    }
    assert others == {"system/fastserve/profiling/measure.py"}


def test_a_simulation_imports_no_torch() -> None:
    modules = [
        ".".join(path.relative_to(FOLDERS["fastserve"].parent).with_suffix("").parts)
        for room in TORCH_FREE
        for path in sorted((FOLDERS["fastserve"] / room).rglob("*.py"))
    ]
    code = f"import sys, {', '.join(modules)}, harness.cli, baselines; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_no_policy_imports_the_discovery_of_policies() -> None:
    """Discovery and settings know all policies; nothing that a policy imports knows them."""
    folder = FOLDERS["fastserve"] / "policies"
    above = {"discovery", "settings"}
    left = [path for path in folder.rglob("*.py") if path.stem not in above]
    seen: set[Path] = set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        assert path.parent != folder or path.stem not in above, f"a policy imports {path.name}"
        for module in imports_of(path):
            file = FOLDERS["fastserve"].parent.joinpath(*module.split("."))
            left += [each for each in (file.with_suffix(".py"), file / "__init__.py") if each.is_file()]
