"""An experiment as its file has it: panels, series and points, each with a part of the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from harness.experiments.files import (
    Count,
    Keys,
    NumberOrText,
    Omittable,
    Positive,
    Seeds,
    Several,
    Share,
    Slug,
    Text,
    check_differ,
    rule,
)

BOTH, SERVED = "both", "http"
"""Backends of experiments that are carried out as a whole (`harness.studies`), not run by run."""

Metric = Annotated[
    str,
    Field(
        pattern=r"^((mean|p50|p90|p95|p99)_(jct|normalized_latency|latency_per_total_token|ttft|tpot|max_token_gap)_s"
        r"|(mean|p50|p99|max)_slowdown|(mean|p95)_normalized_latency_settled_s|mean_jct_settled_s"
        r"|(p99|max)_slowdown_settled|settled_requests|mean_(queueing|swapping|execution)_s"
        r"|slo_attainment_(0\.5|1|2)|output_tokens_per_s)$"
    ),
    rule("must be a metric of points.csv, such as mean_jct_s or p95_normalized_latency_s"),
]
SettingName = Annotated[
    str, Field(pattern="^[a-z][a-z0-9_]*$"), rule("must be the name of an option: small letters, digits and _")
]
Setting = Annotated[bool | int | float | str, rule("must be a number, a text, true or false")]
Limits = Annotated[int | float | dict[str, int | float], rule("must be a number, or numbers by panel")]


class RunPart(Keys):
    """A part of the configuration of a run."""

    profile: Omittable[str] = None
    """Latency profile: see `fastbench profiles`."""
    profile_suffix: Omittable[str] = None
    """Added to the profile's name: the same hardware under another engine."""
    profile_prefix: Omittable[str] = None
    """Put before the profile's name: the same hardware and engine, with other times (artifact-)."""
    trace: Omittable[str] = None
    """Request lengths: see `fastbench traces`."""
    arrivals: Omittable[str] = None
    """poisson, gamma:cv=4, constant or trace."""
    rate: Omittable[Positive] = None
    """Requests per second."""
    num_requests: Omittable[Count] = None
    history: Omittable[str] = None
    """Request lengths, some of which a policy that learns is taught before the run (sim, engine, both); same: those of
    trace."""
    history_requests: Omittable[Count] = None
    """How many requests of the history."""
    model: Omittable[str] = None
    """Preset, or directory in Hugging Face format (engine)."""
    load_format: Omittable[Literal["auto", "dummy"]] = None
    device: Omittable[Literal["cpu", "cuda"]] = None
    dtype: Omittable[Literal["float32", "bfloat16", "float16"]] = None
    torch_threads: Omittable[Count] = None
    tensor_parallel_size: Omittable[Count] = None
    """Ranks that share each layer (engine)."""
    pipeline_parallel_size: Omittable[Count] = None
    """Stages that the layers are divided into (engine)."""
    settings: Omittable[dict[SettingName, Setting]] = None
    """Options of the engine and of the policy, as for `fastbench run --set`."""

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the keys that the file has: the others are left to the other parts."""
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class PointPart(RunPart):
    """A row of the table of points: a part of the configuration of a run, and where the point stands on the axis."""

    x: Omittable[NumberOrText] = None
    """Where it stands, if that is not its rate or load."""
    load: Omittable[Positive] = None
    """Share of the service rate, in place of a rate (both, http)."""

    @property
    def at(self) -> float | str | None:
        """Where the point stands on the axis."""
        return next((value for value in (self.x, self.rate, self.load) if value is not None), None)


class PlottedPoints(Keys):
    """Which points that FastServe's authors plotted are drawn beside ours: the values that the table's columns have."""

    figure: Omittable[str] = None
    panel: Omittable[str] = None
    dataset: Omittable[str] = None
    model: Omittable[str] = None
    metric: Omittable[Annotated[str | list[str], rule("must be a text or a list of texts")]] = None


class Axis(Keys):
    """The axis of a figure, where it is not the rate."""

    label: Text
    log: bool = False


class Panel(Keys):
    """Settings that are shown together; every series has its points there."""

    name: Slug
    title: str = ""
    x: Omittable[NumberOrText] = None
    """Where the panel stands on the axis of a figure of capacities."""
    run: RunPart = RunPart()
    points: Omittable[Several[PointPart]] = None
    """In place of the experiment's."""
    slo: Omittable[Positive] = None
    """In place of the experiment's."""
    paper: PlottedPoints | None = None
    """Of workflows/data/reported_points.csv: the paper's."""
    rerun: PlottedPoints | None = None
    """Of workflows/data/artifact_rerun_points.csv: the authors' second measurement."""


class Series(Keys):
    """A policy, and how it is run."""

    name: Slug
    label: Text
    """Name in the legend."""
    policy: str
    """See `fastbench policies`; or FILE.py:Class or package.module:Class."""
    server: Omittable[Literal["fastserve", "vllm", "vllm-chunked"]] = None
    """Whose server it is (http): ours, or vLLM's, whose policy is its own."""
    run: RunPart = RunPart()
    by_panel: dict[Slug, RunPart] = Field(default_factory=dict)
    """A further part of the configuration, in some panels."""
    paper_system: Omittable[str] = None
    """Name in the tables of the authors' points, if they show such a system."""
    variant: bool = False
    """Not one of the paper's systems: drawn dashed."""
    up_to: Omittable[Limits] = None
    """Points with a larger x are not run, since the series is far beyond its bound there; or so by panel."""
    not_in: Annotated[tuple[Slug, ...], Field(strict=False)] = ()
    """Panels the series is not run in."""


class Comparison(Keys):
    """The load of one series over another's: a row of comparisons.csv for each panel that has both."""

    label: Text
    """What differs, in the table and the figure."""
    of: Slug
    over: Slug


class Target(Keys):
    """A bound on the ratio of two series' means over seeds, over all panels and x that both have (targets.csv)."""

    claim: Text
    """The target as a sentence."""
    metric: Metric
    of: Slug
    over: Slug
    statistic: Literal["geometric_mean", "largest"]
    at_most: Positive
    at: Omittable[Several[NumberOrText]] = None
    """These x only."""
    panels: Omittable[Several[Slug]] = None
    """These panels only."""


def _only_panel(given: dict[str, Any]) -> tuple[Panel, ...]:
    """An experiment without panels has one without a name."""
    return (Panel.model_construct(name="", paper=given.get("paper")),)


class Experiment(Keys):
    """One experiment of the pipeline; its file's name is its name.

    Its points are panels × series × points × seeds. `run` of the experiment, of the panel, of the series, and the point
    itself are each a part of the configuration of a run (`fastbench run`); the later ones win.
    """

    title: Text
    note: str = ""
    """A sentence for the caption of the figure."""
    figure: Literal[
        "load",
        "slo",
        "capacity",
        "sweep",
        "breakdown",
        "deciles",
        "bars",
        "fidelity",
        "ratios",
        "comparisons",
        "measured",
    ]
    """How it is drawn: harness/report/plots has a file for each. measured: runs that others measured on GPUs, which the
    traces of the panels name, and simulations of them (harness/studies/measured)."""
    backend: Literal["sim", "engine", "both", "http"]
    """sim: virtual time from a latency profile. engine: a real model on this machine, alone on it. both: engine and
    simulation of the same requests (harness/studies/fidelity). http: servers on this machine, driven over HTTP in turns
    (harness/studies/served). Points of the last two have a load in place of a rate."""
    same_points_as: Omittable[Slug] = None
    """Another experiment of the folder: what this one does not say is taken from it; its runs are shared."""
    seeds: Seeds
    metric: Metric = "mean_normalized_latency_s"
    """Column of points.csv that the figure shows and the SLO bounds."""
    metrics: Omittable[Several[Metric]] = None
    """Columns that a `sweep` shows one below the other, and `bars` and `ratios` side by side."""
    over: Omittable[Slug] = None
    """Series that a figure of `ratios` holds all others against; of a figure `measured`, the series that repeats what
    was measured."""
    targets: Annotated[tuple[Target, ...], Field(strict=False)] = ()
    """[] where another experiment's targets are not to be taken."""
    comparisons: Annotated[tuple[Comparison, ...], Field(strict=False)] = ()
    """Loads of series over others', which a figure of `comparisons` shows."""
    slo: Positive | None = None
    """Bound on the metric, in its unit, for the capacity; a lower bound for SLO attainment; null for none."""
    x: Omittable[Axis] = None
    architecture: Omittable[dict[str, Any]] = None
    """Of a model that is no preset, as in a config.json in Hugging Face format (both, http)."""
    least_processor_share: Omittable[Share] = None
    """Share of the processors that other programs must leave, or nothing is reported; 0: any (both; default 0.9)."""
    run: RunPart = RunPart()
    points: Omittable[Several[PointPart]] = None
    paper: PlottedPoints | None = None
    """For an experiment without panels."""
    panels: Several[Panel] = Field(default_factory=_only_panel)
    series: Several[Series]

    def slo_of(self, panel: str) -> float | None:
        """The bound in a panel; None: there is none."""
        own = next((each.slo for each in self.panels if each.name == panel), None)
        return self.slo if own is None else own

    def points_of(self, series: Series, panel: Panel) -> list[PointPart]:
        """The rows of the table of points that a series has in a panel."""
        if panel.name in series.not_in:
            return []
        up_to = series.up_to.get(panel.name) if isinstance(series.up_to, Mapping) else series.up_to
        rows = panel.points or self.points or ()
        return [row for row in rows if up_to is None or not isinstance(row.at, int | float) or row.at <= up_to]

    def as_written(self) -> dict[str, Any]:
        """Plain data with the keys of the file alone: a parameter of Snakemake, which compares nothing but plain data.

        A step is repeated if it changes, and not for a key that a later version has.
        """
        return self.model_dump(exclude_unset=True)

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        """Refuse what no key shows by itself: names used twice, panels without points, series that are not there."""
        check_differ(self.seeds, "seeds")
        check_differ([panel.name for panel in self.panels], "panels")
        names = [series.name for series in self.series]
        check_differ(names, "series")
        check_differ([series.label for series in self.series], "labels")
        for panel in self.panels:
            rows = panel.points or self.points
            if not rows:
                raise ValueError(f"panel {panel.name!r}: there are no points; give `points`, here or for all panels")
            check_differ([row.at for row in rows], f"values of x in panel {panel.name!r}")
        if self.least_processor_share is not None and self.backend != BOTH:
            raise ValueError(f"least_processor_share needs backend {BOTH!r}, not {self.backend!r}")
        if self.figure in ("ratios", "measured") and (self.over not in names or len(names) < 2):
            known = ", ".join(names)
            raise ValueError(
                f"over: figures {self.figure!r} need a series over which to show others, not {self.over!r}: {known}"
            )
        for each in self.series:
            _check_known(list(each.by_panel), [panel.name for panel in self.panels], "panels")
        if (self.comparisons or self.figure == "comparisons") and not (self.comparisons and self.slo):
            raise ValueError("comparisons are of loads within the SLO: give both `comparisons` and `slo`")
        check_differ([comparison.label for comparison in self.comparisons], "labels of comparisons")
        for comparison in self.comparisons:
            _check_known((comparison.of, comparison.over), names, "series")
        for target in self.targets:
            try:
                self._check_target(target)
            except ValueError as error:
                raise ValueError(f"target {target.claim!r}: {error}") from None
        return self

    def _check_target(self, target: Target) -> None:
        """Raise ValueError for a target that names what is not there, or that no point of both its series can meet."""
        if self.backend in (BOTH, SERVED):
            raise ValueError(f"targets need backend sim or engine, not {self.backend!r}")
        series = {each.name: each for each in self.series}
        panels = {each.name: each for each in self.panels}
        sides = target.of, target.over
        _check_known(sides, list(series), "series")
        _check_known(target.panels or (), list(panels), "panels")
        if target.of == target.over:
            raise ValueError(f"of and over are both {target.of!r}; name two series")
        shared: dict[str, None] = {}
        for panel in (panels[name] for name in target.panels or panels):
            of, over = ([x_key(row.at) for row in self.points_of(series[side], panel)] for side in sides)
            shared |= dict.fromkeys(x for x in of if x in over)
        missing = [x for x in map(x_key, target.at or ()) if x not in shared]
        if missing or not shared:
            at = f" at {missing[0]}" if missing else ""
            there = f"they do at: {', '.join(shared)}" if shared else "see up_to and not_in"
            raise ValueError(f"{target.of!r} and {target.over!r} share no point{at}; {there}")


def x_key(x: Any) -> str:
    """A value of x as text: 4, 4.0 and "4" are one."""
    try:
        return f"{float(x):g}"
    except (TypeError, ValueError):
        return str(x)


def _check_known(names: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of the {what}; there are: {', '.join(known)}")
