"""Convert DistServe's published iteration-time fits into the profiles shipped under system/fastserve/latency/profiles.

Run once per change of the source: python workflows/scripts/convert_distserve_fits.py a100_80g_fits.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillFit
from fastserve.latency.profile import HostLink, Profile
from fastserve.presets import preset

TARGET = Path(__file__).parents[2] / "system/fastserve/latency/profiles/a100-80g"
PUBLISHED_CAPACITY = {("opt-13b", 1): 66_144, ("opt-66b", 4): 78_496}
"""KV cache in tokens on A100-80GB as DistServe's table gives it, by model and tensor-parallel size."""
USABLE_BYTES_PER_GPU = 79.6e9
"""What both published capacities leave for weights and cache: 79.9e9 (OPT-13B TP1) and 79.3e9 (OPT-66B TP4)."""
PCIE_BYTES_PER_S = 25e9
PCIE_LATENCY_S = 10e-6
BAD_FITS = {("vllm", "opt-66b", "tp2"): "its quadratic prefill coefficient is negative"}


def convert(data: dict, engine: str, model: str, parallel: str) -> Profile:
    """One profile from the coefficients of one engine, model and tensor-parallel size (milliseconds in the source)."""
    tp = int(parallel.removeprefix("tp"))
    fits = data[engine][model][parallel]
    prefill = PrefillFit(*(value / 1e3 for value in fits["prefill"]))
    threshold = data["threshold"]
    small, large = ([value / 1e3 for value in fits[key]] for key in ("decode_small", "decode_large"))
    config = preset(model)
    bytes_per_token = config.kv_bytes_per_token("float16")
    capacity = PUBLISHED_CAPACITY.get((model, tp))
    if capacity is None:
        capacity = int((USABLE_BYTES_PER_GPU * tp - 2 * config.num_parameters()) / bytes_per_token) // 16 * 16
        capacity_source = f"estimated: {USABLE_BYTES_PER_GPU / 1e9} GB usable a GPU, as the published capacities imply"
    else:
        capacity_source = "published with DistServe (OSDI'24)"
    suffix = "" if engine == "swifttransformer" else f"-{engine}"
    return Profile(
        name=f"a100-80g/{model}-{parallel}{suffix}",
        model=model,
        hardware=data["hardware"],
        engine=engine,
        dtype="float16",
        tensor_parallel_size=tp,
        pipeline_parallel_size=1,
        latency=FittedLatency(prefill, (DecodeFit(*small, max_batch_size=threshold - 1), DecodeFit(*large))),
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=bytes_per_token,
        host_link=HostLink(PCIE_BYTES_PER_S * tp, PCIE_LATENCY_S),
        provenance={
            "source": data["source"],
            "measured": "by the authors of DistServe, published 2024; not by this project",
            "residuals": None,
            "residuals_note": "the source publishes coefficients only",
            "kv_capacity": capacity_source,
            "host_link": "PCIe 4.0 x16 for each GPU, about 25 GB/s achieved a direction; latency assumed 10 us",
            "mixed_iterations": "not measured: the larger constant plus the sum of both fits' other terms is assumed",
        },
    )


def main() -> None:
    """Write one JSON file for every usable fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fits", type=Path, help="a100_80g_fits.json")
    data = json.loads(parser.parse_args().fits.read_text(encoding="utf-8"))
    TARGET.mkdir(parents=True, exist_ok=True)
    for engine in ("swifttransformer", "vllm"):
        for model, by_parallel in data[engine].items():
            for parallel in by_parallel:
                if (engine, model, parallel) in BAD_FITS:
                    print(f"left out {engine} {model} {parallel}: {BAD_FITS[engine, model, parallel]}")
                    continue
                profile = convert(data, engine, model, parallel)
                profile.save(TARGET / f"{Path(profile.name).name}.json")
                print(f"{profile.name}: KV cache {profile.kv_capacity_tokens} tokens")


if __name__ == "__main__":
    main()
