"""Several names of the served model: all are accepted, and answers say the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from support.servers import RunningServer, command, profile, running, simulated


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(lambda: replace(simulated(), name="first", aliases=("second", "org/third"))) as server:
        yield server


def test_every_name_is_accepted_and_answers_say_the_first(server: RunningServer) -> None:
    for name in ("first", "second", "org/third", None):
        answer = server.post({"prompt": [1], "max_tokens": 1, "model": name}).json
        assert answer["model"] == "first"
    reply = server.post({"prompt": [1], "model": "quick"})
    assert (reply.status, reply.error["param"]) == (404, "model")
    assert reply.error["message"].endswith("this server has 'first', 'second', 'org/third'")


def test_every_name_is_listed(server: RunningServer) -> None:
    cards = server.get("/v1/models").json["data"]
    assert [(card["id"], card["root"]) for card in cards] == [
        ("first", "first"),
        ("second", "first"),
        ("org/third", "first"),
    ]
    assert server.get("/v1/models/org/third").json == cards[2]
    assert server.metric("requests_arrived_total", model_name="first") >= 0


def test_the_command_takes_several(tmp_path: Path) -> None:
    profile().save(tmp_path / "quick.json")
    names = ["--served-model-name", "a", "--served-model-name", "b,c"]
    with command("--backend", "sim", "--profile", str(tmp_path / "quick.json"), *names) as server:
        assert server.said[-1].startswith("serving a by fastserve at ")
        stream = server.stream(prompt=[1], max_tokens=2, model="c")
        assert len(stream.tokens(2)) == 2
        stream.close()
