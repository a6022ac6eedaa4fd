"""How vLLM's server is started, and the environment it is started from. One test alone needs vLLM itself."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from baselines.external.environment import RECIPES, InstallError, Recipe, build, python_of, versions_in
from baselines.external.vllm import VllmServer

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-vllm"
SERVER = VllmServer(
    environment=Path("/e"),
    model=Path("/m/small"),
    port=8123,
    device="cpu",
    dtype="float32",
    max_batch_size=16,
    token_budget=2048,
    block_size=32,
    num_blocks=128,
    max_model_len=1024,
    threads=1,
)


def changed(**changes: object) -> VllmServer:
    return replace(SERVER, **changes)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_says_what_must_be_equal() -> None:
    command = SERVER.command()
    assert command[:3] == ["/e/bin/vllm", "serve", "/m/small"]
    expected = {
        "--host": "127.0.0.1", "--port": "8123", "--served-model-name": "small", "--dtype": "float32",
        "--max-num-seqs": "16", "--max-num-batched-tokens": "2048", "--max-model-len": "1024", "--block-size": "32",
        # One more than requests can have, since vLLM keeps one for itself.
        "--num-gpu-blocks-override": "129",
    }  # fmt: skip
    assert {name: option(command, name) for name in expected} == expected
    assert {"--no-enable-prefix-caching", "--no-enable-log-requests"} < set(command)
    assert SERVER.url == "http://127.0.0.1:8123"


def test_prompts_are_cut_only_if_asked() -> None:
    cut, whole = "--enable-chunked-prefill", "--no-enable-chunked-prefill"
    assert [name in SERVER.command() for name in (cut, whole)] == [False, True]
    assert [name in changed(chunked_prefill=True).command() for name in (cut, whole)] == [True, False]


def test_variables() -> None:
    variables = SERVER.variables()
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["VLLM_CACHE_ROOT"] == "/e/cache"
    assert variables["PYTHONPATH"] is None  # Of our packages it sees nothing.
    assert "OMP_NUM_THREADS" not in changed(threads=None).variables()
    assert not [name for name in changed(device="cuda").variables() if name.startswith(("VLLM_CPU", "OMP"))]


def test_every_package_for_the_cpu_is_pinned_exactly() -> None:
    pins = requirements(RECIPES["cpu"])
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+]+", line) for line in pins)
    assert RECIPES["cpu"].called == f"{dict(line.split('==') for line in pins)['vllm-cpu']}+cpu"
    assert requirements(RECIPES["cuda"]) == ["vllm==0.32.0"]


def requirements(recipe: Recipe) -> list[str]:
    lines = recipe.requirements.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def recipe(folder: Path, text: str) -> Recipe:
    path = folder / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return Recipe(path, is_complete=True, called="0.32.0+cpu")


def test_an_environment_has_what_is_asked_for_and_the_name_that_vllm_looks_for(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    folder.mkdir()
    (folder / "old").touch()
    versions = build(recipe(tmp_path, "# nothing but comments\n"), folder)
    assert versions["vllm"] == "0.32.0+cpu"
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert versions == versions_in(folder)
    assert not (folder / "old").exists()


def test_an_installation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    with pytest.raises(InstallError, match=r"ended with status 1:\n(.*\n)*.*not a requirement"):
        build(recipe(tmp_path, "this is not a requirement\n"), folder)
    assert not folder.exists()


@pytest.mark.skipif(
    not python_of(INSTALLED).exists(), reason="vLLM is not installed; `make real-vllm` does it, into .venv-vllm"
)
def test_what_is_installed_is_what_is_pinned() -> None:
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in versions_in(INSTALLED).items()}
    assert versions["vllm"] in ("0.32.0", "0.32.0+cpu")
    if versions["vllm"].endswith("+cpu"):
        pins = dict(line.split("==") for line in requirements(RECIPES["cpu"]))
        assert {name: versions.get(re.sub(r"[-_.]+", "-", name).lower()) for name in pins} == pins
        assert not {"torchvision", "torchaudio", "torchcodec"} & versions.keys()
