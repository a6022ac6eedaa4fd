"""Imports run one way, and a simulation never imports torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "system/fastserve"

# Each room may import itself and the rooms before it; `errors`, `config` and the like come before all.
ORDER = [
    {"errors"},
    {
        "config",
        "options",
        "clock",
        "command",
        "console",
        "files",
        "processes",
        "logprobs",
        "tokenizer",
        "countable_tokens",
    },
    {"request", "generation_config", "presets", "parallel.layout", "parallel"},
    {"latency", "kvcache"},
    {"scheduler"},
    {"settings"},
    {"executor.base", "executor.simulated", "executor"},
    {"job"},
    {"engine", "timeline"},
    {"simulation"},
    {"kernels", "parallel.groups", "parallel.timing", "parallel.channel"},
    {"models"},
    {"worker"},
    {"executor.local", "executor.distributed", "executor.inputs", "executor.ranks"},
    {"llm"},
    {"profiling", "server"},
    {"cli"},
]
TORCH_FREE = ["simulation", "engine", "timeline", "scheduler", "kvcache", "latency", "executor.simulated"]


def room_of(module: str) -> str:
    name = module.removeprefix("fastserve.")
    return name if name.startswith(("executor.", "parallel.")) else name.split(".")[0]


def runtime_imports(path: Path) -> set[str]:
    """fastserve modules a file imports, those for type checking only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastserve":
            whole = node.module == "fastserve"
            found |= {f"fastserve.{alias.name}" for alias in node.names} if whole else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastserve.")}
    return found


def test_imports_run_one_way() -> None:
    rank = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if module == "fastserve":
            continue
        room = room_of(module)
        assert room in rank, f"{module} is in no room: say in this test where it belongs"
        wrong += [f"{module} imports {other}" for other in runtime_imports(path) if rank[room_of(other)] > rank[room]]
    assert wrong == []


def test_nothing_in_fastserve_imports_baselines_or_the_harness() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in ("baselines", "harness")], path


def test_a_simulation_imports_no_torch() -> None:
    modules = ", ".join(f"fastserve.{name}" for name in TORCH_FREE)
    code = f"import sys, {modules}, harness.cli, baselines; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
