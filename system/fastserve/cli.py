"""The `fastserve` command."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fastserve.core.command import Version, new_app
from fastserve.core.console import Progress, parse_stage_layers, run_app
from fastserve.core.errors import OutputError
from fastserve.core.files import check_writable
from fastserve.core.tokenizer import BUILTIN
from fastserve.policies.settings import parse_settings, resolve_settings

app = new_app()


@app.callback()
def fastserve(version: Version = False) -> None:
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
    from fastserve.profiling.measure import ProfileConfig, describe, measure_profile

    if out.suffix != ".json" or not out.parent.is_dir():
        raise OutputError(f"--out must be a .json file in an existing folder, got {out}")
    check_writable(out)
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


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="Model directory or preset.")] = None,
    policy: Annotated[
        str, typer.Option(help="Scheduling policy: see `fastbench policies`, or FILE.py:Class or package.module:Class.")
    ] = "fastserve",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, typer.Option(envvar="FASTSERVE_API_KEY", help="Ask clients for this key.", show_envvar=True)
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; repeat it for further names.  [default: its own name]"),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Unfinished requests to hold; those beyond are answered 429.")
    ] = 10_000,
    drain_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to finish what was begun, when told to stop.")
    ] = 30.0,
    stall_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds without an iteration, while requests wait, until /health says stalled."),
    ] = 60.0,
    receive_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a request to arrive whole; later ones are answered 408.")
    ] = 60.0,
    page: Annotated[bool, typer.Option(help="A live page at /.")] = True,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origins whose pages may use the server from a browser, * for any; repeat it, or a list."),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Names the Host header may have, * for any; repeat it, or a list.  [default: on a loopback address "
            "localhost, else any]"
        ),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path below which a proxy offers the server, such as /llm.")] = "",
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM); with it the server speaks HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="The certificate's private key (PEM).  [default: in --ssl-certfile]")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="File for a trace of all requests, written at the end; until then it is in memory."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="error, warning, info (a line for each request) or debug.")
    ] = "warning",
    backend: Annotated[
        str, typer.Option(help="engine: a real model; sim: none, in real time by --profile, tokens are counted.")
    ] = "engine",
    profile: Annotated[
        str | None,
        typer.Option(help="Latency profile: what sim takes; for policies that need one, in place of measuring."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Directory of a tokenizer, builtin or none.  [default: the model directory's; of a preset or a "
            "simulation builtin]"
        ),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="auto: end tokens and sampling defaults from the model's generation_config.json; none: ignore it."
        ),
    ] = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights (a preset needs it).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of dummy weights.")] = 0,
    torch_threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads torch computes with.  [default: its own choice]")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="Stages that the layers are divided into.")] = 1,
    stage_layers: Annotated[
        str | None, typer.Option(help="Layers of each stage, as 5,7.  [default: of equal weight]")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="HOST:PORT at which to wait for ranks that torchrun starts.  [default: start them here]"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the engine or the policy."),
    ] = None,
) -> None:
    """Serve a model behind OpenAI's HTTP interface, until SIGTERM or Ctrl-C."""
    from fastserve.server.model import ModelOptions
    from fastserve.server.options import ServerOptions, names_of
    from fastserve.server.serve import serve as serve_model

    engine_options, policy_options = resolve_settings(policy, parse_settings(set_ or []))
    options = ModelOptions(
        model=model,
        backend=backend,
        profile=profile,
        policy=policy,
        policy_options=policy_options,
        engine_options=engine_options,
        served_names=names_of(served_model_name or ()),
        tokenizer=tokenizer,
        generation_config=generation_config,
        load_format=load_format,
        device=device,
        dtype=dtype,
        seed=seed,
        torch_threads=torch_threads,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        stage_layers=parse_stage_layers(stage_layers),
        ranks=ranks,
    )
    server_options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key or None,
        max_requests=max_requests,
        page=page,
        drain_timeout_s=drain_timeout,
        stall_timeout_s=stall_timeout,
        receive_timeout_s=receive_timeout,
        allowed_hosts=None if allowed_hosts is None else names_of(allowed_hosts),
        allowed_origins=names_of(allowed_origins or ()),
        root_path=root_path,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        timeline=timeline,
        log_level=log_level,
    )
    serve_model(options, server_options)


@app.command()
def tokenizer() -> None:
    """Print the directory of the built-in tokenizer, which clients of presets and simulations take."""
    print(BUILTIN)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
