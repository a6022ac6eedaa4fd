"""What the documentation shows works."""

import re
from pathlib import Path

import pytest

from fastserve.scheduler import registry
from harness.runner import RunConfig, run

ROOT = Path(__file__).parents[2]


def test_the_example_policy_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# my_policy\.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_policy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    settings = {"num_gpu_blocks": 100, "swap": "recompute"}
    config = RunConfig(
        policy="my_policy:ShortestPrompt", profile="a100-80g/opt-13b-tp1", trace="alpaca", rate=20.0,
        num_requests=60, settings=settings,
    )  # fmt: skip
    assert run(config, tmp_path / "out")["finished"] == 60


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"
