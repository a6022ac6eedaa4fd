"""The `fastserve` command."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fastserve.console import Progress, parse_stage_layers, run_app
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
    num_gpu_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Cache blocks on the device.  [default: for a full batch of full contexts]"),
    ] = None,
    num_host_blocks: Annotated[
        int | None, typer.Option(min=1, help="Cache blocks in host memory, to time transfers.  [default: 64]")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Largest decode batch to measure.")] = 16,
    token_budget: Annotated[int, typer.Option(min=1, help="Most prompt tokens of an iteration to measure.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Times each point is measured; the median counts.")] = 3,
    dense: Annotated[
        bool | None,
        typer.Option(help="Follow a GPU's steps, with many points, or fit lines to few.  [default: dense on a GPU]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure fewer points.")] = False,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="Stages that the layers are divided into.")] = 1,
    stage_layers: Annotated[
        str | None, typer.Option(help="Layers of each stage, as 5,7.  [default: of equal weight]")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="HOST:PORT at which to wait for ranks that torchrun starts.  [default: start them here]"),
    ] = None,
) -> None:
    """Measure this machine's iteration times, fit them, and write a profile that simulations and policies take."""
    from fastserve.profiling import ProfileConfig, describe, measure_profile

    if out.suffix != ".json" or not out.parent.is_dir():
        raise OutputError(f"--out must be a .json file in an existing folder, got {out}")
    config = ProfileConfig(
        model,
        load_format,
        device,
        dtype,
        block_size,
        num_gpu_blocks,
        num_host_blocks,
        max_batch_size,
        token_budget,
        repeats,
        dense,
        quick,
        tensor_parallel_size,
        pipeline_parallel_size,
        parse_stage_layers(stage_layers),
        ranks,
    )
    with ExitStack() as progress:

        def begin(steps: int) -> Callable[[], None]:
            return progress.enter_context(Progress("profile", steps)).advance

        measured = measure_profile(config, str(out), begin)
    measured.save(out)
    for line in describe(measured):
        print(line)
    print(f"wrote {out}")


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
