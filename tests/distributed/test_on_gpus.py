"""Ranks on GPUs: one in a process of its own, and two over NCCL."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.devices import NEEDS_GPU  # noqa: E402
from support.ranks import rank_group  # noqa: E402
from support.tokens import Reference, check_short_of_cache, make_reference  # noqa: E402

NEEDS_TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module", params=["opt", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param), num_layers=4)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1), marks=NEEDS_GPU),
        pytest.param((2, 1), marks=NEEDS_TWO_GPUS),
        pytest.param((1, 2), marks=NEEDS_TWO_GPUS),
    ],
    ids=lambda shape: f"tp{shape[0]}-pp{shape[1]}",
)
def test_i6_on_gpus(reference: Reference, shape: tuple[int, int]) -> None:
    with rank_group(reference[0], *shape, num_gpu_blocks=200, num_host_blocks=100, device="cuda") as ranks:
        parallel = {"ranks": ranks, "tensor_parallel_size": shape[0], "pipeline_parallel_size": shape[1]}
        for policy, swap in [("fastserve", "proactive"), ("fastserve", "reactive"), ("vllm-chunked", "as it is")]:
            check_short_of_cache(reference, policy, swap, "cuda", **parallel)
