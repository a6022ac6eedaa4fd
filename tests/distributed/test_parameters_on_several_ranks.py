"""I6 on several ranks for what changes a draw and for what is told of it: however a model is divided, as on one."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.parameters import check_equal, generate
from support.ranks import rank_group
from support.tokens import CHUNK, TINY_POOL, save_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    save_model("llama", path, 2)
    return path


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=lambda shape: f"tp{shape[0]}-pp{shape[1]}")
def test_parameters_on_several_ranks(directory: Path, shape: tuple[int, int]) -> None:
    alone = generate(directory, "fastserve-fcfs", {}, num_gpu_blocks=100)
    with rank_group(directory, *shape, num_gpu_blocks=100, num_host_blocks=100, timeout_s=60.0) as ranks:
        parallel = {"ranks": ranks, "tensor_parallel_size": shape[0], "pipeline_parallel_size": shape[1]}
        for policy, options in (("fastserve", {"swap": "recompute"}), ("vllm-chunked", {"chunk_tokens": CHUNK})):
            outputs = generate(directory, policy, options, num_gpu_blocks=TINY_POOL, **parallel)
            check_equal(outputs, alone)
