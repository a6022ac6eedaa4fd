"""Measurements on a machine that other programs keep busy: real ones, which no child of the measuring process is."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

pytest.importorskip("torch")

from harness.studies.fidelity import measure_fidelity, study
from harness.studies.processors import (
    BusyMachineError,
    Watch,
    available_processors,
    busiest,
    check_share,
    probe,
    require_processors,
    share_left,
)
from support.processes import wait_until_ended

ROOT = Path(__file__).resolve().parents[2]
SPIN = "import time\nend = time.monotonic() + 240\nwhile time.monotonic() < end: pass"
CORES = available_processors()
EXPERIMENT = {
    "title": "Tiny",
    "figure": "fidelity",
    "backend": "both",
    "seeds": [0],
    "run": {
        "model": "opt-tiny",
        "load_format": "dummy",
        "trace": "zipf:min=4,max=24",
        "torch_threads": 1,
        "settings": {"max_batch_size": 2, "block_size": 8, "num_gpu_blocks": 12, "num_host_blocks": 64},
    },
    "series": [{"name": "fastserve", "label": "FastServe", "policy": "fastserve"}],
    "points": [{"load": 1.5, "num_requests": 6}],
}


@contextmanager
def busy(processes=2 * CORES):
    """Programs that compute all the time, started by a shell that has ended, so that they are none of ours."""
    command = f"for i in $(seq {processes}); do '{sys.executable}' -S -c '{SPIN}' >/dev/null 2>&1 & echo $!; done"
    told = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    programs = [psutil.Process(int(pid)) for pid in told.split()]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
        wait_until_ended(programs)


def test_a_busy_machine_is_refused_with_value_bound_and_remedy():
    with busy():
        assert probe(CORES) < 0.6  # A third, with room for how the system accounts time.
        with pytest.raises(BusyMachineError) as refused:
            require_processors(CORES, 0.95)
        names = busiest()
    message = str(refused.value)
    assert f"% of the {CORES} processors that it needs, and at least 95% must be left; nothing is reported" in message
    assert "before the measurement" in message
    assert "Stop the other programs (top shows them; now: " in message
    assert len(names) == 3
    assert all("(process " in name for name in names)


def test_a_watch_sees_others_and_not_its_own():
    watch = Watch(CORES, 0.0)
    with busy():
        time.sleep(1.0)
        assert watch.look_now() < 0.6
        strict = Watch(CORES, 0.95)
        time.sleep(1.0)
        with pytest.raises(BusyMachineError, match=r"during 1 s of the measurement other programs left [\d.]+% of"):
            strict.look_now()
    assert watch.lowest < 0.6

    # With children on every processor, the share is what these get: counted among the others, they would leave nothing.
    watch = Watch(CORES, 0.0)
    own = [subprocess.Popen([sys.executable, "-S", "-c", SPIN]) for _ in range(CORES)]
    time.sleep(2.0)
    own_s = sum(psutil.Process(each.pid).cpu_times().user for each in own)
    for each in own:
        each.kill()
        each.wait()  # What they took before they ended is still their own.
    assert own_s > 0.2
    assert watch.look_now() >= own_s / (2.0 * CORES) - 0.15


def test_a_watch_looks_no_more_often_than_its_window(monkeypatch):
    readings = iter([(0.0, 10.0, 5.0), (6.0, 16.0, 11.0), (12.0, 28.0, 17.0)])
    monkeypatch.setattr(Watch, "_read", staticmethod(lambda: next(readings)))
    now = {"s": 0.0}
    monkeypatch.setattr("harness.studies.processors.time.perf_counter", lambda: now["s"])
    monkeypatch.setattr("harness.studies.processors.os.cpu_count", lambda: 2)
    monkeypatch.setattr("harness.studies.processors.available_processors", lambda: 2)
    watch = Watch(2, 0.95)
    now["s"] = 4.9
    watch.look()  # Reads nothing.
    now["s"] = 6.0
    watch.look()
    assert watch.lowest == 1.0  # 6 s of processor time in 6 s, all its own.
    now["s"] = 12.0
    with pytest.raises(BusyMachineError, match=r"during 6 s of the measurement other programs left 50\.0% of the 2"):
        watch.look()  # 12 s, 6 of them its own: others kept one of two processors busy.
    assert watch.lowest == 0.5


@pytest.mark.parametrize(
    ("others", "needed", "left"), [(0.0, 2, 1.0), (0.5, 1, 1.0), (1.0, 2, 0.5), (1.5, 1, 0.5), (3.0, 2, 0.0)]
)
def test_the_share_left_of_two_processors(monkeypatch, others, needed, left):
    monkeypatch.setattr("harness.studies.processors.os.cpu_count", lambda: 2)
    monkeypatch.setattr("harness.studies.processors.available_processors", lambda: 2)
    assert share_left(others, needed) == left


def test_enough_is_enough():
    check_share(0.95, 2, 0.95, "before the measurement")
    with pytest.raises(BusyMachineError, match=r"left 94\.0% of the 2 processors"):
        check_share(0.94, 2, 0.95, "before the measurement")


def test_the_study_refuses_before_it_measures(tmp_path):
    with busy(), pytest.raises(BusyMachineError, match="before the measurement"):
        measure_fidelity(EXPERIMENT, tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_a_machine_that_gets_busy_during_the_measurement_gives_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "require_processors", lambda needed, least_share: None)
    with busy(), pytest.raises(BusyMachineError, match=r"during \d+ s of the measurement"):
        measure_fidelity(EXPERIMENT, tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_an_experiment_may_ask_for_no_share(tmp_path):
    with busy():
        table = measure_fidelity(EXPERIMENT | {"least_processor_share": 0}, tmp_path)
    assert (table["processor_share"] < 0.6).all()  # It is said all the same.


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", folder, "-c", "2", "--nocolor"]
    configuration = ["--config", "experiments=experiments", "claims=null"]
    return subprocess.run(
        [*command, "--workflow-profile", ROOT / "workflows/profiles/default", *arguments, *configuration],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    )


def test_the_pipeline_fails_aloud_and_keeps_all_other_results(tmp_path):
    simulated = {
        "title": "Simulated",
        "figure": "load",
        "backend": "sim",
        "seeds": [0],
        "run": {"trace": "sharegpt", "profile": "a100-80g/opt-13b-tp1-swifttransformer"},
        "points": [{"rate": 2, "num_requests": 10}],
        "series": [{"name": "fastserve", "label": "FastServe", "policy": "fastserve"}],
    }
    (tmp_path / "experiments").mkdir()
    for name, experiment in (("tiny", EXPERIMENT), ("simulated", simulated)):
        (tmp_path / f"experiments/{name}.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    with busy():
        failed = snakemake(tmp_path)
    assert failed.returncode != 0
    assert "error: this machine is too busy to measure: before the measurement other programs left" in failed.stderr
    assert "too busy" in (tmp_path / "results/logs/tiny-fidelity.log").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["simulated.pdf", "simulated.png"]
    assert not (tmp_path / "results/tiny/points.csv").exists()

    page = tmp_path / "report.html"
    made = snakemake(tmp_path, "--report", str(page), "written")
    assert made.returncode == 0, made.stderr
    assert "simulated.png" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("status", "targets"), [(0, ""), (1, " written")])
def test_make_reproduce_writes_the_report_of_what_there_is_and_keeps_the_status(tmp_path, status, targets):
    pretend = tmp_path / "snakemake.sh"
    pretend.write_text(f'echo "$@" >> {tmp_path}/calls\ncase "$*" in *--report*) exit 0;; *) exit {status};; esac\n')
    made = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "reproduce", f"SNAKEMAKE=sh {pretend} --profiles"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (made.returncode != 0) == (status != 0)
    assert ("error: a job failed" in made.stderr) == (status != 0)
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == [
        "--profiles/default",
        f"--profiles/default --report results/report.html{targets}",
    ]
