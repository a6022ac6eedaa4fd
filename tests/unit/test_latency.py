import json
from pathlib import Path

import pytest

from fastserve.errors import ConfigError
from fastserve.latency import DecodeFit, FittedLatency, HostLink, PrefillFit, list_profiles, load_profile
from fastserve.latency.profiler import Grid, Measurement, fit, measure, residuals


def test_opt_13b_takes_what_the_published_coefficients_say() -> None:
    latency = load_profile("a100-80g/opt-13b-tp1").latency
    # By hand, in ms: 18.1025 + 0.101912 * 300 + 7.12226e-6 * (100^2 + 200^2) = 49.032
    assert latency.iteration_time([100, 200], []) == pytest.approx(49.0323e-3, rel=1e-4)
    # 19.9347 + 6.26936e-4 * 1600 + 0.038507 * 16 = 21.554
    assert latency.iteration_time([], [100] * 16) == pytest.approx(21.5539e-3, rel=1e-4)
    # From 95 requests on, the other fit: 7.16619 + 5.798e-4 * 9500 + 0.158311 * 95 = 27.714
    assert latency.iteration_time([], [100] * 95) == pytest.approx(27.7138e-3, rel=1e-4)


def test_a_mixed_iteration_reads_the_weights_once() -> None:
    latency = FittedLatency(PrefillFit(3.0, 0.1, 0.01), (DecodeFit(2.0, 0.5, 0.25),))
    assert latency.iteration_time([2, 4], [1, 3]) == pytest.approx(3.0 + 0.1 * 6 + 0.01 * 20 + 0.5 * 4 + 0.25 * 2)
    assert latency.iteration_time([], []) == 0


@pytest.mark.parametrize("name", list_profiles())
def test_every_shipped_profile_loads_and_makes_sense(name: str) -> None:
    profile = load_profile(name)
    longer = profile.latency.iteration_time([512], [])
    assert 0 < profile.latency.iteration_time([], [1]) < longer
    assert profile.kv_capacity_tokens >= 2048
    assert profile.provenance["source"]


def test_the_fits_of_both_engines_are_shipped() -> None:
    names = list_profiles()
    assert len(names) == 13  # 7 of SwiftTransformer and 7 of vLLM, less the one that is a bad fit.
    assert "a100-80g/opt-66b-tp2-vllm" not in names


def test_a_profile_survives_being_written_and_read(tmp_path: Path) -> None:
    profile = load_profile("a100-80g/opt-66b-tp4")
    path = tmp_path / "copy.json"
    profile.save(path)
    again = load_profile(str(path))
    assert again.to_json() == profile.to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["copy.json"]


def test_unknown_and_malformed_profiles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'a100/opt'.*a100-80g/opt-13b-tp1"):
        load_profile("a100/opt")
    path = tmp_path / "bad.json"
    for text, reason in (("{", "JSONDecodeError"), ("{}", "format_version"), ("[]", "TypeError")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load_profile(str(path))
    data = json.loads(json.dumps(load_profile("a100-80g/opt-13b-tp1").to_json()))
    data["host_link"]["bandwidth_bytes_per_s"] = 0
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"bandwidth_bytes_per_s must be a finite number above 0, got 0"):
        load_profile(str(path))


def test_the_fit_recovers_a_known_machine() -> None:
    truth = FittedLatency(PrefillFit(0.02, 1e-4, 1e-8), (DecodeFit(0.015, 6e-7, 4e-5),))
    shapes = Grid.for_model(2048, 16).shapes
    measurements = measure(truth.iteration_time, shapes, repeats=1)
    fitted = fit(measurements)
    report = residuals(fitted, measurements)
    assert all(report[kind]["max_relative_error"] < 1e-6 for kind in ("prefill", "decode", "mixed"))
    assert len(report["measurements"]) == len(shapes)


def test_the_fit_is_never_negative_and_reports_what_it_misses() -> None:
    measurements = [Measurement((n,), (), t) for n, t in ((10, 0.03), (100, 0.02), (1000, 0.05))]
    measurements += [Measurement((), (n,), 0.01) for n in (10, 100)]
    fitted = fit(measurements)
    assert min(fitted.prefill.constant, fitted.prefill.per_token, fitted.prefill.per_token_squared) >= 0
    assert residuals(fitted, measurements)["prefill"]["max_relative_error"] > 0.05


def test_a_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    assert HostLink(100.0, 0.5).transfer_time(200) == 2.5
