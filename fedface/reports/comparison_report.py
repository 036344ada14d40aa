"""The record of a comparison of several runs, and its tables: training methods by epsilon and by group.

Each method is compared with its own untrained public model, the row "0": it outperforms many private rows, and a table
without it would hide that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedface.atomic_io import replace_text
from fedface.audits.bias import ToneHistogram
from fedface.audits.group_metrics import mean_interval
from fedface.audits.sample_quality import TONE_GROUPS, GroupQuality, InsufficientSamples, Quality
from fedface.codec import dumps, load
from fedface.errors import RunError
from fedface.experiment import NO_DP_LABEL
from fedface.measurements import Epsilon, Interval, Measurement, NotMeasured, table_cell
from fedface.number_format import format_delta
from fedface.reports.markdown import table
from fedface.reports.run_record import MachineRecord

FILE = "comparison.json"
UNTRAINED = "0"  # the level of the unmodified public model
METRICS = ("tone_distance", "darker", "kernel", "coverage", "precision", "recall")
BY_GROUP = ("kernel", "coverage", "precision")
TITLES = {
    "tone_distance": "distance in tone, Monk steps",
    "darker": "share of darker samples",
    "kernel": "kernel distance",
    "coverage": "coverage",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True, kw_only=True)
class ModelQuality:
    """The samples of one set of weights compared with faces like the devices'."""

    weights_hash: str
    tones: ToneHistogram
    tone_distance: Interval  # in Monk steps
    quality: Quality

    def metric(self, name: str, group: str | None = None) -> Measurement:
        """One of METRICS over all samples, or one of BY_GROUP in a tone group."""
        if group is None and name == "tone_distance":
            return self.tone_distance
        if group is None and name == "darker":
            return self.tones.darker
        match self.quality.overall if group is None else self.quality.groups.get(group):
            case GroupQuality() as found:
                value: Interval = found.kernel if name == "kernel" else getattr(found.neighbours, name)
                return value
            case InsufficientSamples() as few:
                return few.reason()
            case None:
                return NotMeasured(not_measured="no faces of this group on either side")


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    method: str
    level: str  # "0" before training, the guaranteed epsilon, or "∞" without privacy
    epsilon: Epsilon | NotMeasured
    seed: int
    noise_multiplier: float  # 0 without privacy
    numbers_up: int  # values that a device sends per round
    bytes_up: int  # of all devices in all rounds
    seconds: float  # of all rounds together
    model: ModelQuality


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """Several runs of one question."""

    name: str
    question: str
    finished: str  # ISO 8601, UTC
    command: str
    versions: dict[str, str]
    machine: MachineRecord
    devices: str  # in deltas
    features: str  # on which distances rest, in deltas
    reference: ModelQuality  # of a second set of faces like the devices', as from a perfect generator
    runs: tuple[ComparedRun, ...]

    def methods(self) -> tuple[str, ...]:
        """The methods in the order in which they were run."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    def levels(self) -> tuple[str, ...]:
        """ "0" first, then ascending, "∞" last."""
        levels = {run.level for run in self.runs}
        return tuple(sorted(levels, key=lambda level: math.inf if level == NO_DP_LABEL else float(level)))

    def chosen(self, method: str, level: str) -> tuple[ComparedRun, ...]:
        """The runs of one method at one level, one per seed."""
        return tuple(run for run in self.runs if (run.method, run.level) == (method, level))

    def rows(self) -> Iterator[tuple[str, str, tuple[ComparedRun, ...]]]:
        """Each method at each of its levels, with its runs."""
        for method in self.methods():
            for level in self.levels():
                if runs := self.chosen(method, level):
                    yield method, level, runs

    def over_seeds(self, method: str, level: str, metric: str, group: str | None = None) -> Measurement:
        """One metric of one method at one level, over its seeds; see `over_seeds`."""
        return over_seeds([run.model.metric(metric, group) for run in self.chosen(method, level)])


def over_seeds(metrics: Sequence[Measurement]) -> Measurement:
    """The mean over runs that differ only in their seed.

    With three or more runs it is Student's t interval, which covers the effect of the seed; with fewer it reaches from
    the lowest to the highest end of the runs' own intervals. It is never narrower than the mean of the runs' own.
    """
    measured = [metric for metric in metrics if isinstance(metric, Interval)]
    reasons = [metric.not_measured for metric in metrics if isinstance(metric, NotMeasured)]
    if reasons or not measured:
        # The runs in which it was measured are a biased selection: they generated more faces of the group.
        part = f"in {len(measured)} of {len(metrics)} runs only: " if measured else ""
        return NotMeasured(not_measured=part + (reasons[0] if reasons else "no run"))
    estimates = np.array([metric.estimate for metric in measured])
    mean, count = float(estimates.mean()), sum(metric.count for metric in measured)
    if len(measured) < 3:
        low, high = min(f.low for f in measured), max(f.high for f in measured)
        return Interval(estimate=mean, low=low, high=high, count=count)
    spread = mean_interval(estimates, np.random.Generator(np.random.PCG64(0)))
    below = float(np.mean([metric.estimate - metric.low for metric in measured])) / len(measured) ** 0.5
    above = float(np.mean([metric.high - metric.estimate for metric in measured])) / len(measured) ** 0.5
    return Interval(
        estimate=mean, low=min(spread.low, mean - below), high=max(spread.high, mean + above), count=count
    )


def write(record: ComparisonRecord, folder: Path) -> None:
    """`comparison.json` and `comparison.md` in a folder."""
    replace_text(folder / FILE, dumps(record))
    replace_text(folder / "comparison.md", markdown(record))


def read(folder: Path) -> ComparisonRecord:
    """The record in a folder; raises RunError where there is none, or it is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise RunError(f"{folder}: contains no finished comparison; run `fedface compare`")
    return load(ComparisonRecord, path)


def markdown(record: ComparisonRecord) -> str:
    """The comparison as tables: all faces first, then by tone group."""
    lines = [f"# {record.question}", "", record.devices, "", record.features, ""]
    lines += [
        "Each cell: the mean over the runs' seeds and its 95 % interval. Epsilon 0 is the public model, not trained; "
        f"∞ is training with clipping and without noise. {_guarantee(record)}",
        "",
        _reference(record),
        "",
    ]
    heads = ["method", "epsilon", "noise multiplier", "parameters up", "runs", *TITLES.values(), "seconds"]
    rows = []
    for method, level, runs in record.rows():
        metrics = [table_cell(record.over_seeds(method, level, metric)) for metric in METRICS]
        seconds = f"{np.mean([run.seconds for run in runs]):.0f}"
        sigma = f"{runs[0].noise_multiplier:.3g}" if runs[0].noise_multiplier else "-"
        up = f"{runs[0].numbers_up:,}" if level != UNTRAINED else "-"
        rows.append([method, level, sigma, up, str(len(runs)), *metrics, seconds])
    lines += [*table(heads, rows), "", "## By tone group", ""]
    for metric in BY_GROUP:
        by_group = [
            [method, level, *(table_cell(record.over_seeds(method, level, metric, g)) for g in TONE_GROUPS)]
            for method, level, _ in record.rows()
        ]
        lines += [f"### {TITLES[metric]}", "", *table(["method", "epsilon", *TONE_GROUPS], by_group), ""]
    return "\n".join(lines) + "\n"


def _guarantee(record: ComparisonRecord) -> str:
    known = [run.epsilon for run in record.runs if isinstance(run.epsilon, Epsilon)]
    if not known:
        return "No run has a privacy guarantee."
    deltas = ", ".join(format_delta(delta) for delta in sorted({epsilon.delta for epsilon in known}))
    return f"Every other epsilon is an upper bound over all rounds at delta {deltas}, per {known[0].unit}."


def _reference(record: ComparisonRecord) -> str:
    values = [f"{TITLES[metric]} {table_cell(record.reference.metric(metric))}" for metric in METRICS]
    return f"Metrics of a second set of faces like the devices': {'; '.join(values)}."
