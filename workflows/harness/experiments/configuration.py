"""Configuration of the pipeline: workflows/config/default.yaml, and `--config KEY=VALUE` on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import yaml

from harness.experiments.files import Keys, Seeds, Text, parse_as


class Configuration(Keys):
    """What the pipeline carries out, and with which seeds."""

    experiments: Text = "workflows/config/experiments"
    """Folder of experiments, one YAML file each, or one such file; of the working directory if it is there, else of the
    project."""
    claims: Text | None = "workflows/config/claims.yaml"
    """The claims that are held against the results; null for none."""
    vllm: Literal["auto", "cpu", "cuda"] = "auto"
    """Which vLLM `real-vllm` installs and measures; auto: cuda where there is an NVIDIA GPU, else cpu."""
    seeds: Seeds | None = None
    """Seeds of every experiment, in place of its own; null leaves them."""
    quick: bool = False
    """The figures of the paper alone, with two seeds, each marked as such; `make reproduce QUICK=1`."""


def read_configuration(given: Mapping[str, Any]) -> Configuration:
    """Return Snakemake's `config` as the model. Raises ConfigError for an unknown key and for a wrong value."""
    return parse_as(Configuration, {key: _from_text(value) for key, value in given.items()}, "configuration")


def _from_text(value: Any) -> Any:
    """A value of the configuration: of `--config claims=null seeds=[0,1]` Snakemake makes "null" and ["0", "1"]."""
    if isinstance(value, list):
        return [_from_text(each) for each in value]
    with suppress(yaml.YAMLError):
        return yaml.safe_load(value) if isinstance(value, str) else value
    return value
