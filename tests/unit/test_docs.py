"""What the documentation shows works."""

import re
from pathlib import Path

import pytest

from fastserve.core.options import option_names
from fastserve.policies import discovery
from fastserve.scheduler import registry
from harness.run.config import RunConfig
from harness.run.runner import run

ROOT = Path(__file__).parents[2]


def test_the_example_policy_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/add-a-policy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# two_classes\.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "two_classes.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "policies", dict(registry.policies))
    for swap in ("proactive", "reactive", "recompute", "none"):
        config = RunConfig(
            policy="two_classes:TwoClasses", profile="a100-80g/opt-13b-tp1", trace="sharegpt", rate=20.0,
            num_requests=60, settings={"num_gpu_blocks": 250, "swap": swap, "share": "50"},
        )  # fmt: skip
        summary = run(config, tmp_path / swap)
        assert summary["finished"] == 60
        assert summary["preemptions"] > 0
        assert (summary["swap_out_bytes"] > 0) is (swap in ("proactive", "reactive"))


def test_every_policy_and_every_option_is_documented() -> None:
    text = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    for name, policy in discovery.list_policies().items():
        assert f"\n## `{name}`\n" in text
        for option in option_names(policy.Options):
            assert f"`{option}`" in text, f"option {option} of {name} is not in docs/policies.md"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"
