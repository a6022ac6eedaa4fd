"""A rank that dies, hangs or fails ends the engine soon, by name, and nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from benchmarks.control_channel import IdleRank, decode_batch, idle_ranks  # noqa: E402
from fastserve import LLM, RequestStatus, SamplingParams  # noqa: E402
from fastserve.core.errors import ConfigError, RankError  # noqa: E402
from fastserve.runtime.executors.ranks import RankGroup  # noqa: E402
from fastserve.runtime.models import SequenceInput  # noqa: E402
from fastserve.runtime.parallel.channel import Channel  # noqa: E402
from fastserve.runtime.worker.protocol import versions  # noqa: E402
from support.polling import eventually  # noqa: E402
from support.processes import wait_until_stopped  # noqa: E402
from support.ranks import rank_config  # noqa: E402
from support.tokens import save_model  # noqa: E402

TIMEOUT_S = 3.0
SOON_S = 30.0
"""Loose enough for an overloaded machine, and short of what a rank computes or sleeps otherwise."""
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opt")
    save_model("opt", path, num_layers=4)
    return path


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Neither processes nor listening ports nor shared memory."""
    before = traces()
    yield
    eventually(lambda: traces() - before, lambda left: not left)


def traces() -> set[str]:
    me = psutil.Process()
    commands = [child.cmdline() for child in me.children(recursive=True)]
    processes = {f"process {command}" for command in commands if "fastserve.worker" in command}
    ports = {f"port {one.laddr.port}" for one in me.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    # What torch and its collectives name; other programs of this machine come and go meanwhile.
    segments = {name for name in os.listdir("/dev/shm") if name.startswith(("torch", "gloo", "nccl"))}
    return processes | ports | {f"shared memory {name}" for name in segments}


def engine(model: Path, tensor: int = 2, pipeline: int = 1) -> LLM:
    return LLM(
        model,
        policy="fastserve-fcfs",
        num_gpu_blocks=100,
        num_host_blocks=20,
        max_batch_size=4,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        rank_timeout_s=TIMEOUT_S,
    )


def pids(llm: LLM) -> list[int]:
    assert llm.ranks is not None
    return [peer.hello["pid"] for peer in llm.ranks._peers]


def strike(llm: LLM, act: Callable[[int], None], rank: int, output_tokens: int = 20) -> threading.Thread:
    """Have `act` done to the rank's process once the engine has produced some tokens."""

    def wait_and_strike(pid: int) -> None:
        while len(llm.engine.iterations) < output_tokens:
            time.sleep(0.001)
        act(pid)

    thread = threading.Thread(target=wait_and_strike, args=(pids(llm)[rank],))
    thread.start()
    return thread


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("act", "says"), [(kill, "was killed by SIGKILL"), (stop, f"has sent nothing for {TIMEOUT_S:g} s")]
)
def test_a_lost_rank_ends_the_engine(
    model: Path, tensor: int, pipeline: int, act: Callable[[int], None], says: str
) -> None:
    llm = engine(model, tensor, pipeline)
    with llm:
        finished = llm.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=SamplingParams(max_tokens=2))
        assert finished[0].metrics.status == "finished"
        last = tensor * pipeline - 1
        everyone = pids(llm)
        began = time.monotonic()
        striker = strike(llm, act, last)
        params = [SamplingParams(max_tokens=2, ignore_eos=True), *[LONG] * 5]
        with pytest.raises(RankError, match=f"rank {last} .*pid {everyone[last]} .*{says}") as caught:
            llm.generate(prompt_token_ids=[[1, 2, 3]] * 6, sampling_params=params)
        assert time.monotonic() - began < SOON_S
        striker.join()
        statuses = [output.metrics.status for output in caught.value.outputs]
        assert statuses == ["finished", *["failed"] * 5]
        assert len(caught.value.outputs[0].token_ids) == 2
        assert all(str(caught.value) == output.error for output in caught.value.outputs[1:])
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in everyone))
        with pytest.raises(RankError, match=f"rank {last} "):
            llm.generate(prompt_token_ids=[[1, 2, 3]])


def test_a_rank_that_dies_while_nothing_runs(model: Path) -> None:
    with engine(model) as llm:
        kill(pids(llm)[0])
        with pytest.raises(RankError, match=r"rank 0 .* was killed by SIGKILL"):
            llm.generate(prompt_token_ids=[[1, 2, 3]])


def test_an_engine_that_stood_still_blames_nobody(model: Path) -> None:
    with engine(model) as llm:
        llm.engine.add_request(request := new_request(llm), LONG)
        for _ in range(5):
            llm.engine.step()
        time.sleep(1.5 * TIMEOUT_S)
        while llm.engine.has_unfinished:
            llm.engine.step()
        assert request.status is RequestStatus.FINISHED


def new_request(llm: LLM):
    from fastserve import Request

    return Request.from_tokens("a", llm.engine.clock.now(), [1, 2, 3])


@pytest.mark.parametrize("frozen", [False, True])
def test_ranks_end_with_an_engine_that_is_killed(model: Path, frozen: bool) -> None:
    program = (
        "import os, sys\nfrom fastserve import LLM\n"
        f"llm = LLM({str(model)!r}, policy='fastserve-fcfs', num_gpu_blocks=20, num_host_blocks=0, max_batch_size=2,"
        "tensor_parallel_size=2)\n"
        f"{'frozen = llm.ranks.frozen(); frozen.__enter__()' if frozen else ''}\n"
        "print(*[peer.hello['pid'] for peer in llm.ranks._peers], flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    ranks = [int(pid) for pid in process.stdout.readline().split()]
    assert len(ranks) == 2
    if frozen:
        wait_until_stopped(map(psutil.Process, ranks))
    process.kill()
    process.wait()
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in ranks))
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the 4 attention heads"),
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size=5: model .* has 4 layers"),
        ({"pipeline_parallel_size": 2, "stage_layers": (1, 2)}, "has 3 layers in all, model .* has 4"),
        ({"pipeline_parallel_size": 2, "stage_layers": (4,)}, "names 1 stages, pipeline_parallel_size is 2"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1, got 0"),
        ({"tensor_parallel_size": 2, "device": "cuda"}, "^device 'cuda' asked for, but torch finds no CUDA"),
        ({"tensor_parallel_size": 2, "num_gpu_blocks": 10**9}, r"rank \d .* failed: .* GiB available"),
        ({"tensor_parallel_size": 2, "ranks": "nowhere"}, "ranks must be HOST:PORT, got 'nowhere'"),
    ],
)
def test_what_cannot_be(model: Path, changes: dict, says: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ConfigError, RankError), match=says):
        LLM(model, policy="fastserve-fcfs", **{"num_gpu_blocks": 20, "num_host_blocks": 0} | changes)


# -- ranks that others start -----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def say_hello(port: int, **changes: object) -> Channel:
    """A rank that only says hello."""

    def connect() -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            return None

    channel = Channel(eventually(connect), 5.0)
    hello = {"rank": 0, "world_size": 1, "local_rank": 0, "token": "", "host": "far", "pid": 1, "versions": versions()}
    channel.send("hello", **hello | changes)
    return channel


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"versions": {"fastserve": "0.0.1"}}, "rank 0 .*pid 1 on far.* has another version than the engine: .*0.0.1"),
        ({"world_size": 4}, "rank 0 .* of 4 connected, but this engine has 1 ranks"),
        ({"rank": 7}, "rank 7 .* of 1 connected"),
    ],
)
def test_ranks_that_do_not_fit(model: Path, changes: dict, says: str) -> None:
    port = free_port()
    greeter = threading.Thread(target=say_hello, args=(port,), kwargs=changes)
    greeter.start()
    with pytest.raises(ConfigError, match=says):
        RankGroup(rank_config(model, 1, 1), address=f"127.0.0.1:{port}")
    greeter.join()


def test_another_model_is_refused_before_it_is_loaded(model: Path) -> None:
    port = free_port()
    told: list[str] = []

    def pretend() -> None:
        channel = say_hello(port)
        try:
            while True:
                for message in channel.receive():
                    told.append(message.kind)
                    channel.send("configured", digest="another", gpu_blocks=1, host_blocks=1)
        except ConnectionError:
            pass

    greeter = threading.Thread(target=pretend)
    greeter.start()
    with pytest.raises(ConfigError, match="has another model than the engine: another instead of"):
        RankGroup(rank_config(model, 1, 1), address=f"127.0.0.1:{port}")
    greeter.join()
    assert told == ["configure"]


def test_strangers_are_sent_away_and_missing_ranks_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_TOKEN", "secret")
    port = free_port()
    greeter = threading.Thread(target=say_hello, args=(port,))
    greeter.start()
    with pytest.raises(RankError, match="rank 0 did not connect in time"):
        RankGroup(rank_config(model, 1, 1), address=f"127.0.0.1:{port}", start_timeout_s=1.5)
    greeter.join()


def test_a_port_that_is_taken(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot wait for ranks at 127.0.0.1:{port}"):
            RankGroup(rank_config(model, 1, 1), address=f"127.0.0.1:{port}")


# -- ranks that hang while their process lives -----------------------------------------------------------------------


class OneHangs(IdleRank):
    """Of two shards the second hangs, and the first waits for it."""

    def compute(self, sequences: Sequence[SequenceInput]) -> list[int]:
        if self._identity.rank == 0:
            self._progress.waiting_for = "the other shards of stage 0"
        time.sleep(60)
        return []


class BothWait(OneHangs):
    """Each for the other."""

    def compute(self, sequences: Sequence[SequenceInput]) -> list[int]:
        self._progress.waiting_for = "the other shards of stage 0"
        time.sleep(60)
        return []


class OneFails(OneHangs):
    """The second fails, but the first notices sooner, and is heard of first."""

    def compute(self, sequences: Sequence[SequenceInput]) -> list[int]:
        if self._identity.rank == 0:
            self._progress.waiting_for = "the other shards of stage 0"
            raise RuntimeError("connection closed by peer")
        time.sleep(0.5)
        raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (OneHangs, "rank 1 .* has computed nothing for 2 s: it hangs"),
        (
            BothWait,
            r"rank 0 .* has waited for the other shards of stage 0 for 2 s \(and so for rank 1\): no",
        ),
        (OneFails, "rank 1 .* failed: ValueError: no such thing"),
    ],
)
def test_the_rank_that_hangs_is_told_from_those_that_wait(kind: type[IdleRank], says: str) -> None:
    with idle_ranks(kind, 2, 4, timeout_s=2.0) as group:
        began = time.monotonic()
        with pytest.raises(RankError, match=says):
            group.execute(decode_batch(4), [SamplingParams()] * 4)
        assert time.monotonic() - began < SOON_S
