"""Small real models to serve, with caches that are too small for their requests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.core.options import option_names
from fastserve.policies.discovery import find_policy
from fastserve.server.model import ServedModel, load_served_model
from fastserve.server.options import ModelOptions
from support.tokens import IMPATIENT, TINY_POOL


def served(
    directory: Path, policy: str, options: dict[str, Any], num_gpu_blocks: int = TINY_POOL
) -> Callable[[], ServedModel]:
    """Loads the model in `directory`, called "small", under an impatient policy."""
    known = option_names(find_policy(policy).Options)
    return partial(
        load_served_model,
        ModelOptions(
            source=ModelSource(str(directory)),
            policy=policy,
            policy_options={name: value for name, value in IMPATIENT.items() if name in known} | options,
            engine=EngineOptions(max_batch_size=4, num_gpu_blocks=num_gpu_blocks, num_host_blocks=100),
            profile="a100-80g/opt-13b-tp1-swifttransformer",
            processes=Processes(torch_threads=1),
            served_names=("small",),
        ),
    )
