"""The record of a benchmark of upsampling methods on one probe, with its tables and charts.

Each metric carries its count and interval; each method the hash of the weights that it used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedface.atomic_io import replace_bytes, replace_text
from fedface.codec import dumps
from fedface.measurements import Interval, Measurement, NotMeasured
from fedface.reports import formatting
from fedface.reports.charts import INK, error_bars, figure_png, legend_below, panels
from fedface.reports.markdown import table
from fedface.reports.run_record import BiasRecord, MachineRecord

FILE = "benchmark.json"
OVERALL = (
    "consistency_error",
    "converged",
    "skin_difference",
    "face_difference",
    "lightness_shift",
    "same_half",
)
BY_GROUP = ("lightness_shift", "skin_difference", "same_half")
LIMITS = (
    "Skin tone is measured from pixels, so light and camera affect every tone metric.",
    "Each method has its own bound for whether a face fits: PULSE and the feed-forward methods compare the consistency "
    "error with a fixed tolerance, posterior samplers with the measurement noise.",
    "A similar colour is not the same person: no metric here measures whether a person is recognised.",
)


@dataclass(frozen=True, kw_only=True)
class MethodMetrics:
    method: str  # its name on the command line
    title: str
    settings: dict[str, Any]
    weights_hash: str  # of the networks used; empty for nearest and bicubic
    bias: BiasRecord  # overall and by group
    distance: Measurement  # kernel distance of its faces to the faces of the probe
    spread: Measurement  # per-pixel standard deviation of a photo's faces, in [0, 1]
    darker_true: Interval  # share of darker originals
    darker_generated: Interval  # share of darker generated faces
    seconds_per_face: float  # wall time of the search, including waits for other programs


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    finished: str  # ISO 8601, UTC
    command: str
    versions: dict[str, str]
    machine: MachineRecord
    probe: str  # a description
    downscale: str  # a description
    photos: int
    seed: int
    methods: tuple[MethodMetrics, ...]


def write(record: BenchmarkRecord, pictures: Mapping[str, bytes], folder: Path) -> Path:
    """Write record, table and pictures into a benchmark's folder; returns the table's path."""
    replace_text(folder / FILE, dumps(record))
    for name, png in pictures.items():
        replace_bytes(folder / f"{name}.png", png)
    path = folder / "benchmark.md"
    replace_text(path, markdown(record))
    return path


def markdown(record: BenchmarkRecord) -> str:
    heads = [
        "method",
        *map(formatting.title_of, OVERALL),
        "kernel distance to the originals",
        "spread of a photo's faces",
        "s per face",
    ]
    overall, tones = [], []
    for each in record.methods:
        metrics = [str(each.bias.report.overall[name]) for name in OVERALL]
        overall.append(
            [each.title, *metrics, str(each.distance), str(each.spread), f"{each.seconds_per_face:.2g}"]
        )
        shares = (each.darker_true, each.darker_generated, each.bias.report.darker_change)
        tones.append([each.title, *map(str, shares)])
    lines = [
        "# Every method on one probe",
        "",
        f"{record.probe}. Degraded by {record.downscale}. Estimates over photos with 95 % intervals.",
        "",
        *table(heads, overall),
        "",
        "## Skin tone by method",
        "",
        "Share of faces in the darker half of the Monk scale.",
        "",
        *table(["method", "originals", "generated", "change"], tones),
    ]
    for metric in BY_GROUP:
        found = {each.title: _by_group(each, metric) for each in record.methods}
        rows = [[title, *map(str, groups.values())] for title, groups in found.items()]
        lines += ["", f"## By group: {formatting.with_unit(formatting.title_of(metric), metric)}", ""]
        lines += table(["method", *record.methods[0].bias.report.counts], rows)
    lines += ["", "## Summary", ""]
    for each in record.methods:
        lines += [f"- **{each.title}**: {' '.join(each.bias.report.sentences()[:-1])}"]
    lines += ["", "## Limitations", "", *(f"- {limit}" for limit in LIMITS), ""]
    lines += ["Run it again:", "", f"    {record.command}", ""]
    return "\n".join(lines)


def by_group(record: BenchmarkRecord) -> bytes:
    """Change in lightness, colour difference and unchanged tone half by group, one colour per method; PNG on white."""
    groups = list(record.methods[0].bias.report.counts)
    with panels(len(BY_GROUP), (11.0, 3.4)) as (canvas, row):
        for axes, metric in zip(row, BY_GROUP, strict=True):
            for index, each in enumerate(record.methods):
                found = _by_group(each, metric)
                shift = 0.09 * (index - (len(record.methods) - 1) / 2)
                points = [(i + shift, found[name]) for i, name in enumerate(groups)]
                known = [(at, value) for at, value in points if isinstance(value, Interval)]
                error_bars(axes, known, index, each.title)
            if metric == "lightness_shift":
                axes.axhline(0.0, color=INK, linewidth=0.8)
            axes.set_xticks(range(len(groups)), [name.replace(" ", "\n", 1) for name in groups])
            title = formatting.with_unit(formatting.title_of(metric), metric)
            axes.set_title("\n".join(textwrap.wrap(title, 44)), loc="left", fontsize=9)
            axes.grid(axis="x", visible=False)
        legend_below(canvas, row[0], columns=8)
        return figure_png(canvas)


def _by_group(each: MethodMetrics, metric: str) -> dict[str, Measurement]:
    """One metric of every group; not measured for groups of fewer than two faces."""
    absent = NotMeasured(not_measured="fewer than two faces of this group")
    report = each.bias.report
    return {name: report.groups[name][metric] if name in report.groups else absent for name in report.counts}
