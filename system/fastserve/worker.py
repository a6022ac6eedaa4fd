"""`python -m fastserve.worker`: run a rank. `LLM` starts it on its own machine, torchrun on several."""

from __future__ import annotations

from typing import Annotated

import typer

from fastserve.core.console import exit_on_error
from fastserve.runtime.worker.connect import run_rank

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def rank(
    engine: Annotated[str, typer.Option(help="HOST:PORT at which the engine waits for its ranks.")],
    model: Annotated[
        str | None, typer.Option(help="Where this machine keeps the model.  [default: where the engine has it]")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="HOST:PORT of the process group's store.  [default: torchrun's]")
    ] = None,
) -> None:
    """Compute one part of a model for an engine. RANK, WORLD_SIZE and LOCAL_RANK say which; torchrun sets them."""
    run_rank(engine, store, model)


if __name__ == "__main__":
    with exit_on_error():
        app()
