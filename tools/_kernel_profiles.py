"""The shipped profiles that are made of measured kernels, by source, and how far they are from DistServe's fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.latency import Curve, KernelLatency, Profile, StageLink
from fastserve.latency.fitting import Shape
from fastserve.profiling.kernels.importing import AICONFIGURATOR, import_profile

LAYER_TABLES = {"rtx4090": "rtx4090-llama-3.1-8b", "rtxpro6000": "rtxpro6000-llama-3.1-8b"}
"""Folders of tables in LLMServingSim's layout, by the folder of profiles."""
OPERATOR_TABLES = {
    "a100-80g": "a100_sxm/vllm/0.14.0",
    "h100": "h100_sxm/vllm/0.14.0",
    "h200": "h200_sxm/vllm/0.12.0",
    "l40s": "l40s/vllm/0.14.0",
}
"""Folders in `systems/data` of aiconfigurator, by the folder of profiles."""
RECORDED_ERRORS = {
    "rtx4090": "mean TTFT +1.4 %, mean TPOT -0.2 %, mean completion time +1.0 %",
    "rtxpro6000": "mean TTFT +3.7 %, mean TPOT +2.6 %, mean completion time +2.8 %",
}
"""Of a simulated run on that GPU to the recorded one, by the folder of profiles: docs/gpu-truth.md; a test compares."""
LAYERS_SOURCE = "LLMServingSim, commit 5daddb2 (casys-kaist, MIT)"
OPERATORS_SOURCE = "aiconfigurator 0.8.0 (NVIDIA, Apache-2.0)"


@dataclass(frozen=True, slots=True)
class Case:
    """A model on so many shards and stages."""

    model: str
    shards: int = 1
    stages: int = 1

    @property
    def name(self) -> str:
        """The profile's name in its folder."""
        return f"{self.model}-tp{self.shards}" + (f"-pp{self.stages}" if self.stages > 1 else "")


_LLAMA = (Case("llama-3.1-8b"), Case("llama-3.1-70b", 4), Case("llama-3.1-70b", 8))
_OPT = (Case("opt-13b"), Case("opt-66b", 4), Case("opt-66b", 2, 2), Case("opt-175b", 8, 2))
CASES: dict[str, tuple[Case, ...]] = {
    "rtx4090": (Case("llama-3.1-8b"),),
    "rtxpro6000": (Case("llama-3.1-8b"),),
    # Qwen3-32B on the fewest GPUs that hold one request of its whole context.
    "a100-80g": (*_OPT, Case("llama-3-8b"), *_LLAMA, Case("qwen3-32b", 2)),
    "h100": (*_LLAMA, Case("qwen3-32b", 2)),
    "h200": (*_LLAMA, Case("qwen3-32b", 1)),
    "l40s": (*_LLAMA, Case("qwen3-32b", 2)),
}
NAMES = tuple(f"{folder}/{case.name}" for folder, cases in CASES.items() for case in cases)
A100_SENDS = {True: (8e-6, 230e9), False: (24e-6, 8e9)}
"""Latency in seconds and bytes/s of a send between two A100s, within a node and between nodes: profiled with Vidur."""
A100_SENDS_SOURCE = "as profiled with Vidur; every GPU of a stage sends hidden size times 2 bytes a token to its peer"
GPUS_PER_NODE = 8

DECODE_SHAPES: tuple[Shape, ...] = tuple(((), (512,) * batch) for batch in (1, 16, 32, 64))
PROMPT_SHAPES: tuple[Shape, ...] = tuple(((length,), ()) for length in (128, 512, 1024, 2048))


def operator_source(systems: Path, folder: str) -> tuple[str, str]:
    """What `import_profile` reads for a folder of profiles, and what its provenance says."""
    tables = f"data/{OPERATOR_TABLES[folder]}"
    return f"{AICONFIGURATOR}{systems / tables}", f"{OPERATORS_SOURCE}, systems/{tables}"


def kernel_profiles(kernels: Path | None, systems: Path | None, fits: dict[str, Profile]) -> Iterator[Profile]:
    """Make the profiles whose source is given: a folder with LLMServingSim's folders, aiconfigurator's `systems`.

    `fits` are profiles measured by others, by the kernel profile's name: what its known error is against.
    """
    for folder, cases in CASES.items():
        if folder in LAYER_TABLES and kernels is not None:
            source, origin = str(kernels / LAYER_TABLES[folder]), LAYERS_SOURCE
        elif folder in OPERATOR_TABLES and systems is not None:
            source, origin = operator_source(systems, folder)
        else:
            continue
        for case in cases:
            profile = kernel_profile(source, case, f"{folder}/{case.name}", origin)
            error = _known_error(profile, fits.get(profile.name))
            if folder in RECORDED_ERRORS:
                error = f"against a recorded run of vLLM 0.19.0: {RECORDED_ERRORS[folder]}"
            yield replace(profile, known_error=error)


def kernel_profile(source: str, case: Case, name: str, origin: str, memory_bandwidth: float | None = None) -> Profile:
    """Make one profile. `memory_bandwidth` is of a GPU that differs from the measured one in its memory alone."""
    parallel = ParallelConfig(case.shards, case.stages)
    profile = import_profile(source, preset(case.model), parallel, name, memory_bandwidth=memory_bandwidth)
    provenance = profile.provenance | {"source": origin}
    link = profile.stage_link
    if link is not None:
        latency_s, bandwidth = A100_SENDS[parallel.world_size <= GPUS_PER_NODE]
        link = StageLink(latency_s, bandwidth, link.bytes_per_token)
        provenance["stage_link"] = A100_SENDS_SOURCE
    return replace(profile, provenance=provenance, stage_link=link)


def _known_error(profile: Profile, fit: Profile | None) -> str | None:
    """How far the times are from a fit to measured iterations, in words."""
    if fit is None:
        return None
    decode, prompts = (
        [100 * error for error in errors(profile, fit, shapes)] for shapes in (DECODE_SHAPES, PROMPT_SHAPES)
    )
    return (
        f"against {fit.name}: decode {min(decode):+.0f} to {max(decode):+.0f} % (1 to 64 requests of 512), prompts "
        f"{min(prompts):+.0f} to {max(prompts):+.0f} % (128 to 2,048)"
    )


def errors(profile: Profile, truth: Profile, shapes: Iterable[Shape]) -> list[float]:
    """The profile's time over that of the other, less one, for each shape."""
    return [profile.latency.iteration_time(*shape) / truth.latency.iteration_time(*shape) - 1 for shape in shapes]


def parts_table(profile: Profile, fits: Iterable[Profile]) -> list[str]:
    """Markdown: the parts of an iteration by kernels, and what published fits say of the whole."""
    assert isinstance(profile.stage, KernelLatency)
    tables, fits = profile.stage.tables, list(fits)
    heads = [fit.name.rpartition("-")[2] + "'s fit" for fit in fits]
    lines = [
        f"| iteration | layers | head, sampler | attention | sum | {' | '.join(heads)} |",
        "|---|---|---|---|---|" + "---|" * len(heads),
    ]
    no_attention = KernelLatency(replace(tables, decode=_free(tables.decode), prompts=_free(tables.prompts)))
    layers_alone = KernelLatency(replace(no_attention.tables, per_sequence=None))
    for prompts, contexts in (*PROMPT_SHAPES, *DECODE_SHAPES):
        what = f"prompt of {prompts[0]:,}" if prompts else f"decode of {len(contexts)} x {contexts[0]}"
        layers, beside, whole = (
            1e3 * latency.iteration_time(prompts, contexts) for latency in (layers_alone, no_attention, profile.latency)
        )
        parts = [f"{value:.1f} ms" for value in (layers, beside - layers, whole - beside, whole)]
        measured = [1e3 * fit.latency.iteration_time(prompts, contexts) for fit in fits]
        cells = [f"{value:.1f} ms ({100 * (whole / value - 1):+.0f} %)" for value in measured]
        lines.append(f"| {what} | {' | '.join(parts + cells)} |")
    return lines


def _free(rows: tuple[tuple[int, Curve], ...]) -> tuple[tuple[int, Curve], ...]:
    return tuple((number, Curve(curve.at, (0.0,) * len(curve.at))) for number, curve in rows)
