"""A cheap step of the pipeline is repeated if its script changes, or any module that this imports, and only then."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.experiments.imports import code_digest, code_of
from support.loaded_code import ROOT, SCRIPTS, check_loaded

MEASUREMENTS = {"run_engine", "measure_fidelity", "measure_served", "install_vllm"}
TREE = {
    "scripts/step.py": "import joblog\nfrom harness.plots import draw\n",
    "scripts/joblog.py": "from fastserve import files",
    "scripts/other.py": "",
    "workflows/harness/__init__.py": "",
    "workflows/harness/plots/__init__.py": "if TYPE_CHECKING:\n  import harness.types\nelse:\n  import harness.text",
    "workflows/harness/plots/draw.py": 'def draw():\n  from harness.lazy import at_last\n  load(f"harness.kinds.{a}")',
    "workflows/harness/types.py": "",
    "workflows/harness/text.py": "import numpy, harness.missing\nNAME = 'baselines'",
    "workflows/harness/lazy.py": "",
    "workflows/harness/unused.py": "",
    "workflows/harness/kinds/__init__.py": "",
    "workflows/harness/kinds/bars.py": "try:\n  import fastserve.runtime.worker\nfinally:\n  import baselines.fifo",
    "baselines/__init__.py": "",
    "baselines/fifo.py": "import step",
    "system/fastserve/__init__.py": "def __getattr__(name):\n  import fastserve.engine",
    "system/fastserve/engine.py": "",
    "system/fastserve/files.py": "import fastserve.files",
    "system/fastserve/runtime/__init__.py": "",
    "system/fastserve/runtime/worker.py": "",
}
LEFT_OUT = {"scripts/other.py", "workflows/harness/types.py", "workflows/harness/unused.py"}
LEFT_OUT |= {path for path in TREE if "runtime" in path}


def make_tree(root: Path) -> Path:
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root / "scripts/step.py"


def test_the_code_of_a_step_is_all_that_runs(tmp_path: Path) -> None:
    script = make_tree(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in code_of(script, tmp_path)} == TREE.keys() - LEFT_OUT


@pytest.mark.parametrize(("changed", "differs"), [("workflows/harness/lazy.py", True), ("scripts/other.py", False)])
def test_the_digest_changes_with_the_code_of_the_step_alone(tmp_path: Path, changed: str, differs: bool) -> None:
    script = make_tree(tmp_path)
    before = code_digest(script, tmp_path)
    (tmp_path / changed).write_text("# edited", encoding="utf-8")
    assert (code_digest(script, tmp_path) != before) == differs


def test_every_rule_but_a_measurement_names_the_code_of_its_own_script() -> None:
    scripts, named = {}, {}
    for file in (ROOT / "workflows/rules").glob("*.smk"):
        for rule, body in re.findall(r"^rule (\w+):\n(.*?)(?=^\S|\Z)", file.read_text(encoding="utf-8"), re.M | re.S):
            if rule == "simulate":  # The only rule without a script.
                continue
            (scripts[rule],) = re.findall(r'(?:"\.\./scripts/|WORKERS\.script\(")(\w+\.py)"', body)
            if named_here := re.findall(r'code=code_of\("(\w+\.py)"\)', body):
                (named[rule],) = named_here
    assert named == {rule: script for rule, script in scripts.items() if rule not in MEASUREMENTS}


@pytest.mark.parametrize("name", ["compare_recorded", "draw_recorded"])
def test_what_a_script_imports_is_its_code(name: str) -> None:
    """Of the steps that test_pipeline.py does not take; a comparison simulates."""
    code = f"""
import contextlib, runpy, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(SCRIPTS)!r})
with contextlib.suppress(NameError):  # Where its work begins: Snakemake has not given it `snakemake`.
    runpy.run_path({str(SCRIPTS / name)!r} + ".py")
if {name == "compare_recorded"}:
    from harness.run.config import RunConfig
    from harness.run.runner import run
    with tempfile.TemporaryDirectory() as folder:
        run(RunConfig(profile="a100-80g/opt-13b-tp1-swifttransformer", rate=1.0, num_requests=2), Path(folder) / "run")
print(*(file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))), sep="\\n")
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = {Path(line) for line in done.stdout.splitlines()}
    check_loaded(name, loaded)
    assert ROOT / "workflows/harness/studies/agreement.py" in loaded
