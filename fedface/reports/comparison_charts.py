"""The pictures of a comparison: each metric against epsilon, tone histograms, quality by group, and samples.

PNG on white. Colours are the colour-blind-safe set of Okabe and Ito (2008); each method also has its own marker.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from fedface.audits.sample_quality import TONE_GROUPS
from fedface.experiment import NO_DP_LABEL
from fedface.measurements import Interval
from fedface.reports.charts import FAINT, INK, error_bars, face_grid, figure_png, legend_below, panels
from fedface.reports.comparison_report import TITLES, UNTRAINED, ComparisonRecord
from fedface.tensor_types import Images

PANELS = ("tone_distance", "darker", "kernel")


def against_epsilon(record: ComparisonRecord) -> bytes:
    """Distance in tone, share of darker samples and kernel distance against epsilon, one line per method; PNG.

    The dashed line is the metric of a second set of faces like the devices'.
    """
    with panels(len(PANELS), (10.2, 3.3)) as (canvas, row):
        for axes, metric in zip(row, PANELS, strict=True):
            _panel(axes, record, metric, None)
            known = record.reference.metric(metric)
            if isinstance(known, Interval):
                axes.axhline(known.estimate, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.set_title(TITLES[metric], loc="left", fontsize=9)
        row[0].set_ylim(bottom=0)
        row[1].set_ylim(0, 1)
        legend_below(canvas, row[0])
        return figure_png(canvas)


def by_group(record: ComparisonRecord, metric: str = "kernel") -> bytes:
    """One metric against epsilon, one panel per tone group from light to dark; PNG."""
    with panels(len(TONE_GROUPS), (2.15 * len(TONE_GROUPS), 2.9), sharey=True) as (canvas, row):
        for axes, group in zip(row, TONE_GROUPS, strict=True):
            _panel(axes, record, metric, group)
            axes.set_title(group, loc="left", fontsize=9)
        row[0].set_ylabel(TITLES[metric])
        legend_below(canvas, row[0])
        return figure_png(canvas)


def tone_histograms(record: ComparisonRecord) -> bytes:
    """Monk tone of samples at every epsilon, one panel per method, and the devices' own distribution; PNG."""
    methods, levels = record.methods(), record.levels()
    true = np.array(record.reference.tones.counts) / record.reference.tones.count
    steps = np.arange(1, 11)
    with panels(len(methods), (max(6.2, 2.7 * len(methods)), 2.9), sharey=True) as (canvas, row):
        for axes, method in zip(row, methods, strict=True):
            axes.bar(steps, 100 * true, color=FAINT, width=0.9, label="devices' faces")
            for index, level in enumerate(levels):
                runs = record.chosen(method, level)
                if not runs:
                    continue
                counts = np.sum([run.model.tones.counts for run in runs], axis=0)
                shade = matplotlib.colormaps["viridis"](index / max(1, len(levels) - 1))
                dash = (0, (2, 1.5)) if level == UNTRAINED else "-"
                axes.plot(
                    steps, 100 * counts / max(1, counts.sum()), color=shade, linewidth=1.6, linestyle=dash,
                    label=f"epsilon {level}",
                )  # fmt: skip
            axes.set_title(method, loc="left", fontsize=9)
            axes.set_xlabel("Monk tone, light to dark")
            axes.set_xticks([1, 4, 7, 10])
        row[0].set_ylabel("share of faces, %")
        legend_below(canvas, row[0], columns=len(levels) + 1)
        return figure_png(canvas)


def samples(rows: Mapping[str, Images], truth: Images) -> bytes:
    """Samples row by row, the devices' own faces first; PNG.

    Args:
        rows: Method and epsilon -> images (n, 3, s, s), n as in `truth`.
        truth: (n, 3, s, s), faces like the devices'.
    """
    grid = [("devices' faces", truth), *rows.items()]
    return face_grid(grid, [str(i + 1) for i in range(len(truth))], side=64)


def _panel(axes: Axes, record: ComparisonRecord, metric: str, group: str | None) -> None:
    levels, methods = record.levels(), record.methods()
    for index, method in enumerate(methods):
        shift = 0.07 * (index - (len(methods) - 1) / 2)
        found = [record.over_seeds(method, level, metric, group) for level in levels]
        points = [(place + shift, value) for place, value in enumerate(found) if isinstance(value, Interval)]
        error_bars(axes, points, index, method, linewidth=1.4)
    names = {UNTRAINED: "0\n(base)", NO_DP_LABEL: "∞"}
    axes.set_xticks(range(len(levels)), [names.get(level, level) for level in levels])
    axes.set_xlabel("epsilon")
