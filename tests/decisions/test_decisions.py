"""Decisions are those of tests/decisions/digests.json: a refactoring changes none of them."""

import json

import pytest

from support.decisions import FILE, MEMORY, Case, cases, digest

DIGESTS = json.loads(FILE.read_text(encoding="utf-8"))
CASES = list(cases())


def test_every_case_is_recorded() -> None:
    assert [case.name for case in CASES] == list(DIGESTS), "run `make digests` and explain the change in the commit"


@pytest.mark.parametrize("policy", dict.fromkeys(case.policy for case in CASES))
def test_decisions_are_those_recorded(policy: str) -> None:
    changed = [case.name for case in CASES if case.policy == policy and digest(case) != DIGESTS.get(case.name)]
    assert not changed, "decisions changed; if that is meant, run `make digests` and explain it in the commit"


def test_the_workload_exercises_what_it_is_for() -> None:
    """Where memory is short every policy that swaps, drops or preempts does so; else the digests would prove little."""
    by_case = {case: DIGESTS[case.name] for case in CASES}
    assert set(MEMORY) == {"ample", "short"}
    for case, recorded in by_case.items():
        ample = by_case[case._replace(memory="ample")]
        if case.memory == "short":
            assert recorded["sha256"] != ample["sha256"], f"{case.name}: short memory changes nothing"


def test_a_digest_depends_on_decisions() -> None:
    case = Case("fastserve", "proactive", "short", 1)
    assert digest(case) == digest(case)
    assert digest(case) != digest(case._replace(swap="reactive"))
