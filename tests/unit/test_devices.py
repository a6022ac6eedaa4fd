"""A device, a tokenizer or an output that is not there is named before any work."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from fastserve import LLM  # noqa: E402
from fastserve.cli import app as fastserve_app  # noqa: E402
from fastserve.core.errors import ConfigError, OutputError  # noqa: E402
from harness.run.config import RunConfig  # noqa: E402
from harness.run.runner import run  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
MODEL = {"model": "opt-tiny", "load_format": "dummy"}
SAYS = [
    ("xyz", "unknown device 'xyz'; known: cpu, cuda, cuda:N"),
    ("", "unknown device ''"),
    ("cuda:x", "unknown device 'cuda:x'"),
    ("meta", "device 'meta' is not supported; supported: cpu, cuda, cuda:N"),
    pytest.param("cuda", "device 'cuda' asked for, but torch finds no CUDA device; use cpu", marks=NO_GPU),
    pytest.param("cuda:3", "device 'cuda:3' asked for, but torch finds no CUDA device; use cpu", marks=NO_GPU),
]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not made, nor ranks started."""
    runtime = "fastserve.runtime"
    for name in (f"{runtime}.worker.worker.build_model", f"{runtime}.executors.ranks.processes.subprocess.Popen"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work was begun"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("device", "message"), SAYS)
def test_a_device_that_is_not_there(tmp_path: Path, device: str, message: str, ranks: int) -> None:
    config = RunConfig(
        backend="engine", device=device, trace="fixed", rate=1.0, num_requests=1, tensor_parallel_size=ranks, **MODEL
    )  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        run(config, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--device", device]
    arguments += ["--out", str(tmp_path / "p.json"), "--tensor-parallel-size", str(ranks)]
    result = CliRunner().invoke(fastserve_app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    arguments = ["serve", "--model", "opt-tiny", "--load-format", "dummy", "--device", device, "--port", "0"]
    result = CliRunner().invoke(fastserve_app, [*arguments, "--tensor-parallel-size", str(ranks)])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    for out in ("folder.json", "file/p.json", "new/p.json", "p.txt"):
        arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--out", str(tmp_path / out)]
        assert isinstance(CliRunner().invoke(fastserve_app, arguments).exception, OutputError), out


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (("none", "is not a directory"), ("empty", "could not be loaded")):
        with pytest.raises(ConfigError, match=message):
            LLM("opt-tiny", load_format="dummy", tokenizer=tmp_path / folder)


def test_a_dtype_or_a_policy_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        LLM("opt-tiny", load_format="dummy", dtype="int8")
    with pytest.raises(ConfigError, match="unknown policy 'nix'"):
        LLM("opt-tiny", load_format="dummy", policy="nix")
