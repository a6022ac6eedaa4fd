"""What the script that drives our server with vLLM's client calls an agreement."""

import math
from typing import Any

import pytest

pytest.importorskip("torch")

from support.servers import running, simulated
from tools.vllm_bench_serve import Call, disagreements, ttft_s

CALL = Call("many at once, chat", 120, ())


def result(**changes: Any) -> dict[str, Any]:
    """What `vllm bench serve` wrote of a run, as far as it is read."""
    told = {"completed": 120, "total_output_tokens": 2880, "total_input_tokens": 3840, "mean_ttft_ms": 1540.0}
    return told | {"mean_tpot_ms": 9.4} | changes


def ours(mean_ttft_s: float = 1.518) -> dict[str, float]:
    return {
        "finished": 120.0,
        "output": 2880.0,
        "prompt": 3840.0,
        "first_tokens": 120.0,
        "first_tokens_s": 120 * mean_ttft_s,
    }


def test_what_agrees() -> None:
    assert disagreements(CALL, result(), ours()) == []
    # Sent at once, requests wait for one another in the client.
    assert disagreements(CALL, result(mean_ttft_ms=260.0), ours(0.067)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completed": 119}, "requests: 119 and 120 and 120.0"),
        ({"total_output_tokens": 2877}, "output tokens: 2877 and 2880.0"),
        ({"total_input_tokens": 0}, "prompt tokens: 0 and 3840.0"),
        # A chat whose stream opens before there is a token; one whose first tokens have no text.
        ({"mean_ttft_ms": 190.0}, "mean time to first token: 190.0 ms and 1518.0 ms"),
        ({"mean_ttft_ms": 2600.0}, "mean time to first token: 2600.0 ms and 1518.0 ms"),
    ],
)
def test_what_does_not(changes: dict[str, Any], says: str) -> None:
    assert disagreements(CALL, result(**changes), ours()) == [says]


def test_without_a_first_token_nothing_agrees() -> None:
    assert math.isnan(ttft_s(ours() | {"first_tokens": 0.0}))
    assert disagreements(CALL, result(), ours() | {"first_tokens": 0.0})


def test_the_servers_own_totals_are_read() -> None:
    from tools.vllm_bench_serve import counted

    pytest.importorskip("uvicorn")
    with running(simulated) as server:
        for _ in range(2):
            assert server.post({"prompt": [1, 2], "max_tokens": 3}).status == 200
        totals = counted(server.url)
    first_tokens_s = totals.pop("first_tokens_s")
    assert totals == {"finished": 2, "output": 6, "prompt": 4, "first_tokens": 2}
    assert 0 < first_tokens_s < 60
