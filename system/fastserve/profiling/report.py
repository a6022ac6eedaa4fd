"""Lines about a measured profile, for people."""

from __future__ import annotations

from fastserve.latency import Profile, fit_link


def describe(profile: Profile) -> list[str]:
    """Return lines on how well the fit describes the measurements, on the engine's own time and on the links."""
    provenance = profile.provenance
    lines = []
    fits = [provenance["residuals"], *provenance.get("later_residuals", ())]
    for stage, of_stage in enumerate(fits):
        for kind in ("prefill", "decode", "mixed"):
            if kind in of_stage:
                errors = of_stage[kind]
                lines.append(
                    f"{kind:8} {errors['points']:3} points: relative error {errors['mean_relative_error']:.1%} on "
                    f"average, {errors['max_relative_error']:.1%} at most" + (f" (stage {stage})" if fits[1:] else "")
                )
    own = provenance["engine_time"]
    seconds, per_request = own["overhead_s"] * 1e6, own["overhead_per_request_s"] * 1e6
    lines.append(
        f"engine   {seconds:.0f} us and {per_request:.2f} us a request from one iteration to the next; its "
        f"{own['iterations']} decode iterations: relative error {own['relative_error']:+.1%} in all"
    )
    if "channel_s" in provenance:
        lines.append(f"channel  {provenance['channel_s'] * 1e6:.0f} us to tell the ranks and to hear from them")
    if provenance.get("all_reduce"):
        latency_s, bandwidth = fit_link([(each["bytes"], each["seconds"]) for each in provenance["all_reduce"]])
        where = "apart" if profile.all_reduce else "slower alone than in iterations, so in their times"
        lines.append(f"sums     {bandwidth / 1e9:.2f} GB/s, {latency_s * 1e6:.0f} us an all-reduce ({where})")
    if profile.stage_link:
        sends = profile.stage_link
        lines.append(
            f"sends    {sends.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {sends.latency_s * 1e6:.0f} us to the next stage"
        )
    link = profile.host_link
    lines.append(f"link     {link.bandwidth_bytes_per_s / 1e9:.1f} GB/s, {link.latency_s * 1e6:.0f} us a transfer")
    return lines
