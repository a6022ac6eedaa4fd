"""Write the profiles shipped under system/fastserve/latency/profiles, and show the errors of predicted profiles.

    python tools/make_profiles.py --fits a100_80g_fits.json   measured profiles from their source, and derived ones
    python tools/make_profiles.py --kernels-dir DIR --aiconfigurator SYSTEMS
                                                              those of kernel tables too: tools/_kernel_profiles.py
    python tools/make_profiles.py                             derived profiles from the shipped measured ones
    python tools/make_profiles.py --check                     print the tables of docs/calibration.md, write nothing

DIR holds LLMServingSim's folders of tables, SYSTEMS is `aiconfigurator/systems` of aiconfigurator 0.8.0 (`pip download
--no-deps aiconfigurator==0.8.0`, unpacked).

A derived profile starts from the measured fit of its engine, model and tensor-parallel size, if there is one: scaled to
the GPU's memory bandwidth, and divided by the number of pipeline stages. Without a fit, the roofline predicts it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from _kernel_profiles import (
    A100_SENDS,
    GPUS_PER_NODE,
    NAMES,
    Case,
    kernel_profile,
    kernel_profiles,
    operator_source,
    parts_table,
)

from fastserve.core.config import ModelConfig
from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.latency.calibration import (
    CHECKED_SHAPES,
    FITTED_RANGE,
    calibrate,
    difference_as_engine_time,
    relative_errors,
)
from fastserve.latency.communication import HostLink, StageLink
from fastserve.latency.engine_time import EngineTime
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillFit
from fastserve.latency.gpus import A100_40G, A100_80G, RatedGpu
from fastserve.latency.measured_range import MeasuredRange
from fastserve.latency.profile import Profile, list_profiles, load_profile
from fastserve.latency.roofline import Calibration, predict, transfer

TARGET = Path(__file__).parents[1] / "system/fastserve/latency/profiles"
ENGINES = ("swifttransformer", "vllm")
BAD_FITS = {("vllm", "opt-66b", "tp2"): "its quadratic prefill coefficient is negative"}
FOLDERS = {"a100-40g": A100_40G, "a100-80g": A100_80G}
DERIVED = (("opt-66b", 2, 2), ("opt-175b", 8, 2), ("llama-3-8b", 1, 1))
"""Model, tensor-parallel and pipeline-parallel size of the profiles made from the measured fits, for each engine."""
ON_40G = {
    Case("opt-13b"): ("opt-13b", 1),
    Case("opt-66b", 4): ("opt-66b", 4),
    Case("opt-66b", 2, 2): ("opt-66b", 4),
    Case("opt-175b", 8, 2): ("opt-66b", 4),
    Case("llama-3-8b"): ("opt-13b", 1),
}
"""Cases on A100-40GB, and the model and tensor-parallel size of the pair of fits that gives vLLM's own time."""

PUBLISHED_CAPACITY = {
    ("opt-13b", 1, 1): 66_144,
    ("opt-66b", 4, 1): 78_496,
    ("opt-66b", 2, 2): 78_512,
    ("opt-175b", 8, 2): 192_784,
}
"""KV cache in tokens on A100-80GB from DistServe's table, by model, tensor- and pipeline-parallel size."""
USABLE_BYTES_80G = 79.6e9
"""Bytes of an A100-80GB for weights and cache: both published one-stage capacities imply about the same, 79.9e9 bytes
(OPT-13B TP1) and 79.3e9 (OPT-66B TP4)."""
ARTIFACT_SHARES = (0.9, 0.01)
"""Of a GPU's memory, what the artifact takes, and what of it is for activations."""
ENGINE_TIME = Path(__file__).parents[1] / "workflows/data/artifact_engine_time.json"
"""The own time of the artifact's engine, which tools/fit_engine_time.py fits."""
ARTIFACT = (
    "a100-40g/opt-13b-tp1",
    "a100-40g/llama-3-8b-tp1",
    "a100-40g/opt-66b-tp4",
    "a100-40g/opt-175b-tp8-pp2",
)
"""Profiles that are shipped with that time too, as `artifact-` and their name: those of the paper's models. On several
GPUs it is an assumption: the engine's Python is the same, and what it tells more workers is not counted."""
BLOCK = 16
PCIE_LATENCY_S = 10e-6

SOURCE = "Least-squares fits published with DistServe (OSDI'24; LLMServe/DistServe, Apache-2.0)"
HOST_LINK = "PCIe 4.0 x16 for each GPU, about 25 GB/s achieved a direction; latency assumed 10 us"
OPT_RANGE = MeasuredRange(prompt_tokens=2048, context_tokens=2048)
"""Where the published fits were measured, as far as it is known."""
OPT_RANGE_REASON = "not published; OPT's context of 2,048 tokens bounds prompts and contexts"
ROOFLINE_RANGE_REASON = "the iterations it is calibrated on (fastserve/latency/calibration.py)"
MIXED = "not measured: the larger constant plus the sum of both fits' other terms is assumed"


def measured_profiles(data: dict) -> Iterator[Profile]:
    """Make a profile from each usable fit of the source, which is in milliseconds."""
    for engine in ENGINES:
        for model, by_parallel in data[engine].items():
            for parallel, fits in by_parallel.items():
                if (engine, model, parallel) in BAD_FITS:
                    print(f"left out {engine} {model} {parallel}: {BAD_FITS[engine, model, parallel]}")
                    continue
                small, large = ([value / 1e3 for value in fits[key]] for key in ("decode_small", "decode_large"))
                stage = FittedLatency(
                    PrefillFit(*(value / 1e3 for value in fits["prefill"])),
                    (replace(DecodeFit(*small), max_batch_size=data["threshold"] - 1), DecodeFit(*large)),
                )
                provenance = {
                    "source": data["source"],
                    "measured": "by the authors of DistServe, published 2024; not by this project",
                    "residuals": None,
                    "residuals_note": "the source publishes coefficients only",
                }
                tp = int(parallel.removeprefix("tp"))
                yield _profile("a100-80g", engine, model, tp, 1, stage, provenance)


def load_measured() -> dict[tuple[str, str, int], Profile]:
    """Load the shipped measured profiles, by engine, model and tensor-parallel size."""
    profiles = (load_profile(name) for name in list_profiles() if name.endswith(ENGINES))
    return {(p.engine, p.model, p.tensor_parallel_size): p for p in profiles if "measured" in p.provenance}


def derived_profiles(measured: dict[tuple[str, str, int], Profile]) -> Iterator[Profile]:
    """Make the profiles of `DERIVED` that no measured kernels replace, calibrated on all measured profiles."""
    for profile in _by_fits("a100-80g", DERIVED, measured):
        if not (profile.engine == "swifttransformer" and profile.kind == "roofline"):
            yield profile


def by_fits_on_40g(measured: dict[tuple[str, str, int], Profile]) -> Iterator[Profile]:
    """The A100-40GB's profiles as fits and rooflines give them: not shipped, but compared with those of kernels."""
    return _by_fits("a100-40g", [(case.model, case.shards, case.stages) for case in ON_40G], measured)


def _by_fits(
    folder: str, cases: Iterable[tuple[str, int, int]], measured: dict[tuple[str, str, int], Profile]
) -> Iterator[Profile]:
    calibrations = calibrate(measured.values())
    errors = held_out_errors(measured)
    gpu = FOLDERS[folder]
    for model, tp, pp in cases:
        for engine in ENGINES:
            fit = measured.get((engine, model, tp))
            calibration = calibrations[engine]
            if fit is None:
                stage = predict(preset(model), gpu, calibration, tp, pp)
                worst = max(abs(error) for (name, *_), row in errors.items() if name == engine for error in row)
                provenance = _of_roofline(engine, calibration, worst)
            else:
                whole = transfer(fit.stage, preset(model), calibration, tp, A100_80G, gpu)
                stage = _divided(whole, pp)
                provenance = _of_measured(fit, gpu, pp, calibration)
            yield _profile(folder, engine, model, tp, pp, stage, provenance)


def profiles_on_40g(systems: Path, measured: dict[tuple[str, str, int], Profile]) -> Iterator[Profile]:
    """The A100-40GB's profiles: kernels measured on 80 GB with the memory of 40 GB, also with vLLM's own time."""
    source, origin = operator_source(systems, "a100-80g")
    for case in ON_40G:
        name = f"a100-40g/{case.name}"
        kernels = kernel_profile(source, case, name, origin, A100_40G.bandwidth_bytes_per_s)
        capacity, capacity_source = _capacity(A100_40G, case.model, case.shards, case.stages)
        plain = replace(
            kernels,
            hardware=A100_40G.name,
            kv_capacity_tokens=capacity,
            provenance=kernels.provenance
            | {
                "error": "not known: there is no measurement of this GPU to compare with",
                "kv_capacity": capacity_source,
                "engine_time": "none: the host of a C++ engine is taken to cost nothing",
            },
        )
        yield plain
        yield with_time_of_vllm(plain, case, measured)


def with_time_of_vllm(plain: Profile, case: Case, measured: dict[tuple[str, str, int], Profile]) -> Profile:
    """The same kernels with the time that vLLM takes more than SwiftTransformer, by DistServe's fits of both."""
    model, tp = ON_40G[case]
    pair = [measured[engine, model, tp] for engine in ENGINES]
    is_own = (case.model, case.shards, case.stages) == (model, tp, 1)
    said = f"non-negative least squares of {pair[1].name} less {pair[0].name}, by iteration, request and token"
    if not is_own:
        said += f"; of {model} TP{tp}, since there is no such pair of this model and split"
    return replace(
        plain,
        name=f"{plain.name}-vllm",
        engine=f"{plain.engine}, own time of vLLM in 2024",
        engine_time=difference_as_engine_time(pair[1], pair[0]),
        provenance=plain.provenance | {"engine_time": said},
    )


def artifact_profiles() -> Iterator[Profile]:
    """Make the profiles of `ARTIFACT`: the shipped ones, and the own time of the artifact's engine."""
    record = json.loads(ENGINE_TIME.read_text(encoding="utf-8"))
    own = EngineTime(**record["engine_time"])
    source = (
        "fitted by simulation to FastServe-FCFS of the rerun of FastServe's authors, on "
        f"{record['profile']} (tools/fit_engine_time.py, docs/reproduction.md)"
    )
    for name in ARTIFACT:
        base = load_profile(name)
        num_gpus = base.tensor_parallel_size * base.pipeline_parallel_size
        assumed = f"; that it is the same on {num_gpus} GPUs is an assumption" if num_gpus > 1 else ""
        provenance = base.provenance | {"engine_time": source + assumed}
        yield replace(base, name=f"artifact-{name}", engine_time=own, provenance=provenance)


def write_artifact_profiles() -> None:
    """Write the profiles of `ARTIFACT`."""
    for profile in artifact_profiles():
        _write(profile)


def held_out_errors(measured: dict[tuple[str, str, int], Profile]) -> dict[tuple[str, str, int], list[float]]:
    """Relative errors for OPT-66B with a calibration on OPT-13B only, by engine, model and TP size."""
    calibrations = calibrate(profile for (_, model, _), profile in measured.items() if model == "opt-13b")
    return {
        key: relative_errors(profile, calibrations[profile.engine])
        for key, profile in measured.items()
        if profile.model == "opt-66b"
    }


def _divided(whole: FittedLatency, num_stages: int) -> FittedLatency:
    """One of several stages with equal shares of the layers; all of the time is assumed to be in the layers."""
    prefill = PrefillFit(*(value / num_stages for value in asdict(whole.prefill).values()))
    decode = tuple(
        DecodeFit(
            fit.constant / num_stages,
            fit.per_context_token / num_stages,
            fit.per_request / num_stages,
            fit.max_batch_size,
        )
        for fit in whole.decode
    )
    return FittedLatency(prefill, decode)


def _of_measured(fit: Profile, gpu: RatedGpu, num_stages: int, calibration: Calibration) -> dict:
    provenance = {
        "source": f"{SOURCE}: {fit.name}",
        "method": "the measured fit",
        "error": "not known: there is no measurement of this configuration to compare with",
    }
    if gpu is not A100_80G:
        provenance["method"] += (
            f", with its memory traffic at {gpu.bandwidth_bytes_per_s / 1e12:g} TB/s instead of "
            f"{A100_80G.bandwidth_bytes_per_s / 1e12:g}"
        )
        provenance["assumptions"] = (
            f"weights are read at {1 / calibration.weight_read:.2f} of the bandwidth (calibrated on all measured "
            "profiles) in the constants of decode and of prefill; the KV read per context token is memory traffic "
            "only; overheads and arithmetic are those of the 80 GB GPU"
        )
    if num_stages > 1:
        provenance["method"] += f", divided by {num_stages} stages"
        provenance["division"] = "all coefficients are taken to be in the layers, the LM head's and the host's part too"
    return provenance


def _of_roofline(engine: str, calibration: Calibration, worst: float) -> dict:
    return {
        "source": f"{SOURCE}: every usable one of {engine}, OPT-13B and OPT-66B",
        "method": "roofline calibrated on them (fastserve/latency/roofline.py); not measured",
        "calibration": asdict(calibration),
        "assumptions": "docs/calibration.md",
        "error": f"at most {worst:.1%} for OPT-66B with a calibration that saw OPT-13B only (batches up to 64)",
    }


def _profile(folder: str, engine: str, model: str, tp: int, pp: int, stage: FittedLatency, provenance: dict) -> Profile:
    gpu, config, num_gpus = FOLDERS[folder], preset(model), tp * pp
    capacity, capacity_source = _capacity(gpu, model, tp, pp)
    is_fit = "calibration" not in provenance
    provenance |= {"range": OPT_RANGE_REASON if is_fit else ROOFLINE_RANGE_REASON}
    provenance |= {"kv_capacity": capacity_source, "host_link": HOST_LINK, "mixed_iterations": MIXED}
    stage_link = None
    if pp > 1:
        latency, bandwidth = A100_SENDS[num_gpus <= GPUS_PER_NODE]
        stage_link = StageLink(latency, bandwidth, 2 * config.hidden_size)
        where = "within a node" if num_gpus <= GPUS_PER_NODE else "between nodes"
        provenance["stage_link"] = (
            f"{where}, as profiled with Vidur; every GPU of a stage sends the whole activations, hidden size times "
            "2 bytes a token, to its peer, all at once and none slower for it"
        )
    # On 80 GB the plain names are those of measured kernels.
    suffix = "" if engine == "swifttransformer" and folder != "a100-80g" else f"-{engine}"
    return Profile(
        name=f"{folder}/{model}-tp{tp}{f'-pp{pp}' if pp > 1 else ''}{suffix}",
        model=model,
        hardware=gpu.name,
        engine=engine,
        dtype="float16",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        stage=stage,
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=config.kv_bytes_per_token("float16"),
        host_link=HostLink(gpu.host_link_bytes_per_s * num_gpus, PCIE_LATENCY_S),
        provenance=provenance,
        stage_link=stage_link,
        measured_range=OPT_RANGE if is_fit else FITTED_RANGE,
        kind="fitted" if is_fit else "roofline",
    )


def _capacity(gpu: RatedGpu, model: str, tp: int, pp: int) -> tuple[int, str]:
    """Tokens of the cache, and where the number comes from."""
    config, num_gpus = preset(model), tp * pp
    if gpu is A100_40G:
        return artifact_cache_tokens(config, tp, pp), (
            f"by the artifact's formula: {ARTIFACT_SHARES[0]} less {ARTIFACT_SHARES[1]} of "
            f"{gpu.memory_bytes / 1e9:.1f} GB, less the weights that it counts on a GPU (docs/calibration.md)"
        )
    published = PUBLISHED_CAPACITY.get((model, tp, pp))
    if published is not None:
        return published, "published with DistServe (OSDI'24)"
    free = USABLE_BYTES_80G * num_gpus - 2 * config.num_parameters()
    tokens = int(free / config.kv_bytes_per_token("float16")) // BLOCK * BLOCK
    return tokens, "estimated: 79.6 GB usable a GPU, as the published capacities imply"


def artifact_weight_bytes(config: ModelConfig, tp: int, pp: int) -> float:
    """Bytes of weights in fp16 that the artifact counts on every GPU, whatever the architecture.

    Embeddings of tokens and positions are on each, 12 matrices of hidden x hidden a layer are shared by the shards,
    and 5 vectors a layer are not. That is OPT; a Llama's larger MLP is not seen.
    """
    hidden, layers = config.hidden_size, config.num_layers / pp
    embeddings = (config.vocab_size + config.max_model_len) * hidden
    return 2 * (embeddings + layers * (12 * hidden**2 / tp + 5 * hidden))


def artifact_cache_tokens(config: ModelConfig, tp: int, pp: int) -> int:
    """Tokens of cache that the artifact's workers find room for on A100-40GBs, in whole blocks."""
    taken, of_activations = ARTIFACT_SHARES
    free = (taken - of_activations) * A100_40G.memory_bytes - artifact_weight_bytes(config, tp, pp)
    part = ParallelConfig(tp, pp).rank_kv_bytes_per_token(config, "float16")
    return int(free / part) // BLOCK * BLOCK


def error_table(measured: dict[tuple[str, str, int], Profile]) -> list[str]:
    """Markdown: errors of each measured profile's prediction, calibrated on OPT-13B and on all measured profiles."""
    shapes = [*CHECKED_SHAPES, ((), (512,) * 128)]
    heads = [f"prompt {prompts[0]}" if prompts else f"decode {len(contexts)}" for prompts, contexts in shapes]
    lines = [f"| calibrated on | engine | fit | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for seen in ("opt-13b", "all"):
        calibrations = calibrate(p for p in measured.values() if seen in (p.model, "all"))
        for (engine, model, tp), profile in measured.items():
            if model != seen:
                errors = relative_errors(profile, calibrations[engine], shapes)
                cells = " | ".join(f"{100 * error:+.1f} %" for error in errors)
                lines.append(f"| {seen} | {engine} | {model} TP{tp} | {cells} |")
    return lines


def calibration_table(measured: dict[tuple[str, str, int], Profile]) -> list[str]:
    """Markdown: the calibrations on OPT-13B and on all measured profiles."""
    lines = ["| calibrated on | engine | parameter | value |", "|---|---|---|---|"]
    for seen in ("opt-13b", "all"):
        calibrations = calibrate(p for p in measured.values() if seen in (p.model, "all"))
        for engine, calibration in calibrations.items():
            for name, value in asdict(calibration).items():
                shown = f"{1e6 * value:.1f} us" if name.endswith("_s") else f"{value:.3f}"
                lines.append(f"| {seen} | {engine} | `{name}` | {shown} |")
    return lines


LAYER_TIMES_US = {
    ("llama-2-7b", 1): {1: 290, 128: 382, 512: 1042, 2048: 4171},
    ("llama-2-7b", 4): {1: 98, 128: 128, 512: 318, 2048: 1053},
    ("llama-2-70b", 1): {1: 1118, 128: 1356, 512: 4084, 2048: 15402},
    ("llama-2-70b", 4): {1: 311, 128: 415, 512: 1116, 2048: 4156},
}
"""Times of a layer without attention and communication on an A100-80GB, by tokens; published with Vidur."""
ATTENTION_TIMES_US = {
    ("llama-2-70b", 2, "prompt of 512"): 72,
    ("llama-2-70b", 2, "prompt of 1024"): 216,
    ("llama-2-70b", 2, "prompt of 2048"): 681,
    ("llama-2-70b", 2, "prompt of 4096"): 2316,
    ("llama-2-70b", 2, "decode of 32 x 1024"): 64,
    ("llama-2-70b", 2, "decode of 128 x 1024"): 192,
    ("llama-2-7b", 1, "decode of 32 x 928"): 294,
    ("llama-2-7b", 1, "decode of 64 x 928"): 540,
    ("llama-2-7b", 1, "decode of 96 x 928"): 771,
}
"""Times of a layer's attention, from the same source."""


def layer_table(measured: dict[tuple[str, str, int], Profile]) -> list[str]:
    """Markdown: times of a Llama layer, profiled kernel by kernel, and predicted for SwiftTransformer."""
    calibration = calibrate(measured.values())["swifttransformer"]
    lines = ["| model | what | kernels | predicted | error |", "|---|---|---|---|---|"]

    def add(model: str, tp: int, what: str, kernels_us: float, predicted_s: float) -> None:
        predicted_us = 1e6 * predicted_s
        error = 100 * (predicted_us / kernels_us - 1)
        lines.append(f"| {model} TP{tp} | {what} | {kernels_us} us | {predicted_us:.0f} us | {error:+.0f} % |")

    for (model, tp), times in LAYER_TIMES_US.items():
        # No LM head and no communication: the traffic and arithmetic of one GPU that is `tp` times as fast.
        config = replace(preset(model), vocab_size=0)
        gpu = replace(
            A100_80G,
            bandwidth_bytes_per_s=tp * A100_80G.bandwidth_bytes_per_s,
            flops_per_s=tp * A100_80G.flops_per_s,
        )
        fit = predict(config, gpu, calibration).prefill
        for tokens, kernels_us in times.items():
            seconds = (fit.constant + tokens * fit.per_token) / config.num_layers
            add(model, tp, f"all but attention, {tokens} tokens", kernels_us, seconds)
    for (model, tp, what), kernels_us in ATTENTION_TIMES_US.items():
        config = preset(model)
        stage = predict(config, A100_80G, calibration, tp)
        *_, sizes = what.partition(" of ")
        if what.startswith("prompt"):
            seconds = stage.prefill.per_token_squared * int(sizes) ** 2
        else:
            batch, context = map(int, sizes.split(" x "))
            seconds = stage.decode[0].per_context_token * batch * context
        add(model, tp, f"attention, {what}", kernels_us, seconds / config.num_layers)
    return lines


def profile_table(profiles: Iterable[Profile]) -> list[str]:
    """Markdown: times of profiles, for a pipeline with one iteration in flight, and their caches."""
    lines = ["| profile | decode 16 x 500 | prompt 512 | KV cache tokens |", "|---|---|---|---|"]
    for profile in profiles:
        decode = profile.latency.iteration_time((), (500,) * 16)
        prompt = profile.latency.iteration_time((512,), ())
        lines.append(
            f"| {profile.name} | {1e3 * decode:.1f} ms | {1e3 * prompt:.1f} ms | {profile.kv_capacity_tokens:,} |"
        )
    return lines


def change_table(old: Iterable[Profile]) -> list[str]:
    """Markdown: the A100-40GB's profiles of kernels against those that fits and rooflines gave."""
    shapes = (*CHECKED_SHAPES[:3], ((), (500,)), ((), (500,) * 16), ((), (500,) * 64))
    heads = [f"prompt {prompts[0]}" if prompts else f"decode {len(contexts)} x 500" for prompts, contexts in shapes]
    lines = [f"| profile | was | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for before in old:
        now = load_profile(before.name)
        cells = []
        for shape in shapes:
            was, is_now = (1e3 * profile.latency.iteration_time(*shape) for profile in (before, now))
            cells.append(f"{was:.1f} → {is_now:.1f} ms ({100 * (is_now / was - 1):+.0f} %)")
        lines.append(f"| {before.name} | {before.kind} | {' | '.join(cells)} |")
    return lines


def own_time_table() -> list[str]:
    """Markdown: vLLM's own time in the A100-40GB's profiles."""
    lines = ["| profile | pair of fits | an iteration | a request | a token |", "|---|---|---|---|---|"]
    for case, (model, tp) in ON_40G.items():
        own = load_profile(f"a100-40g/{case.name}-vllm").engine_time
        times = (own.per_iteration_s, own.per_request_s, own.per_token_s)
        cells = " | ".join(f"{1e6 * seconds:,.0f} us" for seconds in times)
        lines.append(f"| a100-40g/{case.name}-vllm | {model} TP{tp} | {cells} |")
    return lines


def tables() -> dict[str, list[str]]:
    """The tables of docs/calibration.md, by title."""
    measured = load_measured()
    return {
        "Errors": error_table(measured),
        "Calibration": calibration_table(measured),
        "Layers": layer_table(measured),
        "Profiles": profile_table(derived_profiles(measured)),
        "Kernel profiles": profile_table(load_profile(name) for name in (*NAMES, *names_on_40g())),
        "Own time of vLLM": own_time_table(),
        "A100-40GB, old and new": change_table(by_fits_on_40g(measured)),
        "OPT-13B by kernels": parts_table(
            load_profile("a100-80g/opt-13b-tp1"),
            [measured[engine, "opt-13b", 1] for engine in ENGINES],
        ),
    }


def names_on_40g() -> list[str]:
    """Names of the A100-40GB's profiles."""
    return [f"a100-40g/{case.name}{suffix}" for case in ON_40G for suffix in ("", "-vllm")]


def fits_by_kernels(measured: dict[tuple[str, str, int], Profile]) -> dict[str, Profile]:
    """Fits of SwiftTransformer by the name of the kernel profile of the same configuration."""
    derived = (profile for profile in derived_profiles(measured) if profile.kind == "fitted")
    return {
        profile.name.removesuffix("-swifttransformer"): profile
        for profile in (*measured.values(), *derived)
        if profile.engine == "swifttransformer"
    }


def main() -> None:
    """Write the profiles, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=Path, help="a100_80g_fits.json: write the measured profiles from it as well")
    parser.add_argument("--kernels-dir", type=Path, help="folder with LLMServingSim's tables: write their profiles")
    parser.add_argument(
        "--aiconfigurator", type=Path, metavar="SYSTEMS", help="aiconfigurator's systems: write its tables' profiles"
    )
    parser.add_argument(
        "--check", action="store_true", help="print the tables of docs/calibration.md and write nothing"
    )
    arguments = parser.parse_args()
    if arguments.check:
        for title, lines in tables().items():
            print("\n".join([f"## {title}", "", *lines, ""]))
        return
    if arguments.fits:
        for profile in measured_profiles(json.loads(arguments.fits.read_text(encoding="utf-8"))):
            _write(profile)
    measured = load_measured()
    for profile in derived_profiles(measured):
        _write(profile)
    for profile in kernel_profiles(arguments.kernels_dir, arguments.aiconfigurator, fits_by_kernels(measured)):
        _write(profile)
    if arguments.aiconfigurator:
        for profile in profiles_on_40g(arguments.aiconfigurator, measured):
            _write(profile)
    write_artifact_profiles()


def _write(profile: Profile) -> None:
    path = TARGET / f"{profile.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    print(f"{profile.name}: KV cache {profile.kv_capacity_tokens} tokens")


if __name__ == "__main__":
    main()
