"""The `fastserve` command."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastserve.core.command import Taken, Version, new_app, with_options
from fastserve.core.console import Progress, run_app
from fastserve.core.errors import ConfigError, OutputError
from fastserve.core.files import check_writable
from fastserve.core.tokenizer import BUILTIN
from fastserve.policies.settings import parse_settings, resolve_settings
from fastserve.profiling.config import TIMED_BLOCKS, ProfileConfig
from fastserve.server.options import ModelOptions, ServerOptions

app = new_app()


@app.callback()
def fastserve(version: Version = False) -> None:
    """FastServe: an LLM serving engine with preemptive scheduling."""


@app.command()
@with_options
def profile(
    config: Annotated[
        ProfileConfig,
        Taken(
            without=("seed", "max_model_len", "swap_space_gib_per_gpu", "host_link_gb_per_s", "prefix_caching"),
            required=("model",),
            help={"num_host_blocks": f"Cache blocks in host memory, to time transfers; {TIMED_BLOCKS} if not given."},
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Measure nothing: make the profile of the kernel tables in this folder, in LLMServingSim's layout, or "
            "of aiconfigurator:PATH/systems/data/GPU/ENGINE/VERSION.",
        ),
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option("--gpu-memory-gb", help="With --kernels: memory of a GPU in 1e9 bytes.", show_default="as known"),
    ] = None,
) -> None:
    """Measure this machine's iteration times, fit them, and write a profile for simulations and policies.

    With --kernels: make it of kernel times that others measured.
    """
    if out.suffix != ".json" or not out.parent.is_dir():
        raise OutputError(f"--out must be a .json file in an existing folder, got {out}")
    check_writable(out)
    if kernels is not None:
        _profile_of_kernels(config, out, kernels, gpu_memory_gb)
        return
    if gpu_memory_gb is not None:
        raise ConfigError("--gpu-memory-gb is for --kernels; a measured profile has this machine's memory")
    from fastserve.profiling.measure import measure_profile
    from fastserve.profiling.report import describe

    with ExitStack() as progress:

        def begin(steps: int) -> Callable[[], None]:
            return progress.enter_context(Progress("profile", steps)).advance

        measured = measure_profile(config, str(out), begin)
    measured.save(out)
    for line in describe(measured):
        print(line)
    print(f"wrote {out}")


def _profile_of_kernels(config: ProfileConfig, out: Path, kernels: str, gpu_memory_gb: float | None) -> None:
    """Without torch, so that it works where there is none."""
    from fastserve.core.model_directory import find_config
    from fastserve.profiling.kernels.importing import describe, import_profile

    config.require_none_of_measuring()
    imported = import_profile(kernels, find_config(config.source.model), config.parallel, str(out), gpu_memory_gb)
    imported.save(out)
    for line in describe(imported):
        print(line)
    print(f"wrote {out}")


@app.command()
@with_options
def serve(
    options: Annotated[ModelOptions, Taken(without=("engine",))],
    server: ServerOptions,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the engine or the policy.")
    ] = None,
) -> None:
    """Serve a model behind OpenAI's HTTP interface, until SIGTERM or Ctrl-C."""
    from fastserve.server.serve import serve as serve_model

    engine, policy_options = resolve_settings(options.policy, parse_settings(settings))
    serve_model(replace(options, engine=engine, policy_options=policy_options), server)


@app.command()
def tokenizer() -> None:
    """Print the directory of the built-in tokenizer, for clients of presets and simulations."""
    print(BUILTIN)


def main() -> None:
    """Run the command; the entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
