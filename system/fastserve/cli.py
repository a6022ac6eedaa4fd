"""The `fastserve` command."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fastserve.config import EngineOptions
from fastserve.console import Progress, run_app
from fastserve.errors import OutputError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def fastserve() -> None:
    """FastServe: an LLM serving engine with preemptive scheduling."""


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="Model directory or preset.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights (a preset needs it).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    block_size: Annotated[int, typer.Option(help="Tokens per cache block.")] = 16,
    max_batch_size: Annotated[int, typer.Option(help="Largest decode batch to measure.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times each point is measured; the median counts.")] = 3,
) -> None:
    """Measure this machine's iteration times, fit them, and write a profile that simulations and policies take."""
    import torch

    from fastserve.latency.profile import HostLink, Profile
    from fastserve.latency.profiler import Grid, fit, measure, residuals
    from fastserve.llm import default_num_blocks, resolve_model
    from fastserve.worker import Worker
    from fastserve.worker.probe import WorkerProbe

    if out.suffix != ".json" or not out.parent.is_dir():
        raise OutputError(f"--out must be a .json file in an existing folder, got {out}")
    config, model_dir = resolve_model(model, load_format)
    options = EngineOptions(max_batch_size=max_batch_size, block_size=block_size)
    blocks = default_num_blocks(config, options, device, dtype)
    worker = Worker(
        config,
        num_gpu_blocks=blocks,
        num_host_blocks=min(blocks, 64),
        block_size=block_size,
        device=device,
        dtype=dtype,
        model_dir=model_dir,
    )
    probe = WorkerProbe(worker)
    shapes = Grid.for_model(config.max_model_len, max_batch_size).shapes
    with Progress("profile", len(shapes) * (1 + repeats)) as progress:
        measurements = measure(probe.iteration_time, shapes, repeats, progress.advance)
    latency = fit(measurements)
    described = residuals(latency, measurements)
    on_gpu = torch.device(device).type == "cuda"
    measured = Profile(
        name=str(out),
        model=config.name,
        hardware=torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        engine="fastserve",
        dtype=dtype,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        stage=latency,
        kv_capacity_tokens=blocks * block_size,
        kv_bytes_per_token=config.kv_bytes_per_token(dtype),
        host_link=HostLink(probe.copy_bandwidth(), 0.0),
        provenance={
            "source": "fastserve profile",
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "repeats": repeats,
            "residuals": described,
        },
    )
    measured.save(out)
    for kind in ("prefill", "decode", "mixed"):
        if kind in described:
            errors = described[kind]
            print(
                f"{kind:8} {errors['points']:3} points: relative error {errors['mean_relative_error']:.1%} on average, "
                f"{errors['max_relative_error']:.1%} at most"
            )
    print(f"wrote {out}")


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
