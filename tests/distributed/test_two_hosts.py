"""Two hosts, played by two network namespaces: torchrun starts a rank on each, and then one of them is cut off.

As docs/distributed.md says: the engine ends with an error that names the rank it lost, what was finished is kept, and
every process ends by itself, on the side that is cut off as well.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.tokens import Reference, make_reference, prompts  # noqa: E402

ROOT = Path(__file__).parents[2]
HOSTS = {"fastserve-a": "10.213.77.1", "fastserve-b": "10.213.77.2"}
HERE, THERE = HOSTS
ENGINE_PORT, MASTER_PORT = 29511, 29500
SOON_S = 30.0
"""A rank counts as lost after 8 s of silence; the rest is for an overloaded machine."""
ENGINE = """
import json, sys
from fastserve import LLM, SamplingParams
from fastserve.core.errors import RankError

directory, address, tensor, pipeline, prompts = sys.argv[1:4] + sys.argv[4:]
llm = LLM(directory, policy="fastserve-fcfs", num_gpu_blocks=100, num_host_blocks=20, max_batch_size=4, ranks=address,
          tensor_parallel_size=int(tensor), pipeline_parallel_size=int(pipeline))
prompts = json.loads(prompts)
outputs = llm.generate(prompt_token_ids=prompts, sampling_params=SamplingParams(max_tokens=24, ignore_eos=True))
print(json.dumps([output.token_ids for output in outputs]), flush=True)
params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in [2] + [200] * 7]
try:
    while True:
        llm.generate(prompt_token_ids=prompts, sampling_params=params)
except RankError as error:
    statuses = [output.metrics.status for output in error.outputs]
    print(json.dumps({"error": str(error), "statuses": statuses}), flush=True)
    sys.exit(3)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[None]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the `ip` command (iproute2)")
    with ExitStack() as undo:
        try:
            for name in HOSTS:
                ip("netns", "add", name)
                undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        except (subprocess.CalledProcessError, OSError) as error:
            undo.close()
            pytest.skip(f"network namespaces cannot be made here (root only): {error}")
        ip("link", "add", "veth-a", "netns", HERE, "type", "veth", "peer", "name", "veth-b", "netns", THERE)
        for (name, address), device in zip(HOSTS.items(), ("veth-a", "veth-b"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield


def start(host: str, command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT / "system"), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def torchrun(node: int, host: str) -> subprocess.Popen[str]:
    here = HOSTS[HERE]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--node-rank", str(node), "--master-addr", here, "--master-port", str(MASTER_PORT)]
    command += ["-m", "fastserve.worker", "--engine", f"{here}:{ENGINE_PORT}"]
    return start(host, command, GLOO_SOCKET_IFNAME="veth-a" if host == HERE else "veth-b", FASTSERVE_TOKEN="between us")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("opt", tmp_path_factory.mktemp("opt"), num_layers=4)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 1)])
def test_two_hosts_of_which_one_is_cut_off(two_hosts: None, reference: Reference, tensor: int, pipeline: int) -> None:
    directory, expected = reference
    command = [sys.executable, "-c", ENGINE, str(directory), f"{HOSTS[HERE]}:{ENGINE_PORT}", str(tensor), str(pipeline)]
    engine = start(HERE, [*command, json.dumps(prompts())], FASTSERVE_TOKEN="between us")
    nodes = [torchrun(0, HERE), torchrun(1, THERE)]
    everyone = [engine, *nodes]
    try:
        assert engine.stdout is not None
        first = engine.stdout.readline()
        assert first, engine.communicate()[1]
        assert json.loads(first) == expected
        time.sleep(0.5)  # The second round has begun.
        cut_off = time.monotonic()
        ip("-n", THERE, "link", "set", "veth-b", "down")
        report = json.loads(engine.stdout.readline())
        assert time.monotonic() - cut_off < SOON_S
        # The rank's silence, or what the kernel makes of it sooner.
        assert re.match(r"rank 1 .* (has sent nothing for 8 s|is gone: (OSError|TimeoutError))", report["error"])
        assert set(report["statuses"]) == {"finished", "failed"}
        assert engine.wait(60) == 3
        for node in nodes:
            assert node.wait(60) != 0
    finally:
        for process in everyone:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for text in process.communicate():
                print(text)  # Shown if the test fails.
