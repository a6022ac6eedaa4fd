"""The experiments of a folder: a YAML file each, where one may take what it does not say from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from harness.experiments.experiment import Experiment
from harness.experiments.files import parse_as, read_yaml
from harness.experiments.points import check_runs

QUICK_SEEDS = (0, 1)
"""Seeds of a quick look."""


def read_experiments(path: Path, prefix: str = "", seeds: Sequence[int] | None = None) -> dict[str, Experiment]:
    """Read every experiment of a folder, or that of one file, by name; `prefix` is put before the names.

    `seeds`, if given, replace those of every experiment. Raises ConfigError, with file and key, for the first mistake.
    """
    files = {file.stem: file for file in ([path] if path.is_file() else sorted(path.glob("*.yaml")))}
    if not files:
        raise ConfigError(f"there are no experiments (*.yaml) in {path}; see workflows/config/experiments")
    contents = linked({name: read_yaml(file) for name, file in files.items()})
    experiments = {}
    # Linked ones last: a mistake is told of the file that has it, not of one that takes it from there.
    for name in sorted(files, key=lambda name: "same_points_as" in contents[name]):
        content = contents[name] | ({} if seeds is None else {"seeds": seeds})
        experiments[name] = parse_as(Experiment, content, files[name])
        check_runs(experiments[name], files[name])
    return {prefix + name: experiments[name] for name in files}


def quick_look(experiments: Mapping[str, Experiment]) -> dict[str, Experiment]:
    """The simulated figures of the paper with `QUICK_SEEDS`, as title and note of each say wherever it is shown.

    Replays of measured runs are whole: they have one seed and take seconds.
    """
    marked = {}
    for name, experiment in experiments.items():
        if experiment.figure == "measured":
            marked[name] = experiment
        if name.startswith("fig") and experiment.backend == "sim":
            seeds = f"{len(QUICK_SEEDS)} of {len(experiment.seeds)} seeds"
            changes = {
                "title": f"QUICK LOOK, {seeds}: {experiment.title}",
                "note": f"QUICK LOOK with {seeds}, not the full result: `make reproduce` makes that. {experiment.note}",
                "seeds": QUICK_SEEDS,
            }
            marked[name] = Experiment.model_validate(experiment.as_written() | changes)
    return marked


def linked(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Resolve `same_points_as`: what an experiment does not say is taken from the one it names.

    If it lists panels or series, it has those, and each takes what it does not say from its namesake. Raises
    ConfigError for an experiment that is not there, and for experiments that name each other.
    """
    return {name: _resolved(name, contents, ()) for name in contents}


def _resolved(name: str, contents: Mapping[str, Mapping[str, Any]], askers: tuple[str, ...]) -> dict[str, Any]:
    """The content of one experiment; `askers` are the experiments that take theirs from it."""
    content = contents[name]
    source_name = content.get("same_points_as")
    if source_name is None:
        return dict(content)
    if source_name not in list(contents):
        known = ", ".join(contents)
        raise ConfigError(f"experiment {name!r}: same_points_as names {source_name!r}; there are: {known}")
    if source_name in (*askers, name):
        raise ConfigError(
            f"experiment {name!r}: same_points_as names {source_name!r}, which takes its points from {name!r}; "
            "give one of them points of its own"
        )
    source = _resolved(source_name, contents, (*askers, name))
    resolved = {**source, **content}
    for key in ("panels", "series"):
        namesakes = {part.get("name"): part for part in _parts(source, key)}
        if own := _parts(content, key):
            resolved[key] = [{**namesakes.get(part.get("name"), {}), **part} for part in own]
    return resolved


def _parts(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The parts listed under a key; none if it holds anything else, which the model refuses."""
    listed = content.get(key)
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        return []
    return listed if all(isinstance(part.get("name"), str | None) for part in listed) else []
