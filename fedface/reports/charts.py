"""The charts of a report: curves, histograms and intervals as SVG, grids of faces as PNG.

Colours are the colour-blind-safe set of Okabe and Ito (2008). Text in an SVG stays text, and its colour is a
placeholder that html_report replaces by a CSS variable, so that a chart follows light and dark. No pyplot.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fedface.measurements import Interval
from fedface.photos.image_io import SOFTWARE
from fedface.tensor_types import Images

INK, FAINT = "#3b3f46", "#c9ccd1"  # text and axes; grid lines
BEFORE, AFTER, DEVICES, LIMIT = "#8a8f98", "#0072b2", "#d9a441", "#d55e00"
GREY_ON_BOTH = "#7b7f86"  # readable on white and on near-black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8f98")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedface",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
}


Points = Sequence[tuple[float, Interval]]  # at a position, such as a round or the index of a group


def curve(points: Points, *, limit: float | None = None, from_zero: bool) -> bytes:
    """One metric by round, with a band of 95 % intervals; SVG.

    Args:
        points: At rounds; round 0 is before the run.
        limit: Where to draw a dashed line, such as at the guaranteed epsilon; None for no line.
        from_zero: Whether zero belongs on the axis.
    """
    rounds, estimates, low, high = _columns(points)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(3.5, 2.2), layout="constrained")
        axes = canvas.subplots()
        axes.fill_between(rounds, low, high, color=AFTER, alpha=0.2, linewidth=0)
        axes.plot(rounds, estimates, color=AFTER, linewidth=1.8, marker="o", markersize=3.2)
        if limit is not None:
            axes.axhline(limit, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        if from_zero:
            axes.set_ylim(bottom=0.0)
        axes.grid(axis="x", visible=False)
        return _svg(canvas)


def _columns(points: Points) -> tuple[list[float], list[float], list[float], list[float]]:
    """Positions, estimates, lower and upper ends."""
    values = [value for _, value in points]
    ends = [value.low for value in values], [value.high for value in values]
    return [at for at, _ in points], [value.estimate for value in values], *ends


def tone_bars(groups: Sequence[str], bars: Sequence[tuple[str, Sequence[float]]]) -> bytes:
    """A histogram of skin tone with one bar per source and group; SVG.

    Args:
        groups: Names of tone groups, light to dark.
        bars: (colour, share per group in [0, 1]) per source.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(6.6, 2.5), layout="constrained")
        axes = canvas.subplots()
        width = 0.8 / max(1, len(bars))
        places = np.arange(len(groups))
        for index, (color, shares) in enumerate(bars):
            offset = (index - (len(bars) - 1) / 2) * width
            axes.bar(places + offset, 100 * np.asarray(shares), 0.88 * width, color=color)
        axes.set_xticks(places, [_short(group, 14) for group in groups])
        axes.set_ylabel("share, %")
        axes.grid(axis="x", visible=False)
        return _svg(canvas)


def group_dots(groups: Sequence[str], series: Sequence[tuple[str, Points]], *, unit: str) -> bytes:
    """One metric per group as dots with whiskers, before above after; SVG.

    Args:
        groups: Names, from top to bottom.
        series: (colour, points at indices of groups) per source.
        unit: What the x axis counts.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(3.5, 0.75 + 0.36 * len(groups)), layout="constrained")
        axes = canvas.subplots()
        for index, (color, points) in enumerate(series):
            at, estimates, low, high = _columns(points)
            height = np.asarray(at) + (index - (len(series) - 1) / 2) * 0.32
            axes.hlines(height, low, high, color=color, linewidth=1.8, alpha=0.6)
            axes.plot(estimates, height, "o", color=color, markersize=5.5)
        ends = [end for _, points in series for _, value in points for end in (value.low, value.high)]
        if ends and min(ends) < 0 < max(ends):
            axes.axvline(0.0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(groups)), [_short(group, 18) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        return _svg(canvas)


def face_grid(rows: Sequence[tuple[str, Images]], columns: Sequence[str], *, side: int = 128) -> bytes:
    """Faces in a grid, one row per kind and one column per person; PNG with a clear background.

    Args:
        rows: (label, images (n, 3, h, w)); sizes may differ between rows, all are enlarged to one side by
            repeating pixels, so that a low-resolution input looks like what it is. Clamped to [0, 1].
        columns: One label per person, such as the tone group; lines are separated by a line feed.
        side: Side of one face in the picture, pixels.

    Raises:
        ValueError: A row whose number of images is not the number of columns.
    """
    for label, images in rows:
        if len(images) != len(columns):
            raise ValueError(f"rows must hold {len(columns)} images each, got {len(images)} in {label!r}")
    with matplotlib.rc_context({**STYLE, "text.color": GREY_ON_BOTH}):
        longest = max((len(line) for label, _ in rows for line in label.split("\n")), default=0)
        lines = max((label.count("\n") for label in columns), default=0)
        gap, left, top = 6, 24 + 8 * longest, 34 + 18 * lines
        width = left + len(columns) * (side + gap)
        height = top + len(rows) * (side + gap)
        canvas = Canvas(figsize=(width / 100, height / 100), dpi=100, facecolor="none")
        picture = np.zeros((height, width, 4), dtype=np.uint8)
        for r, (label, images) in enumerate(rows):
            y = top + r * (side + gap)
            canvas.text(
                (left - 12) / width, 1 - (y + side / 2) / height, label, ha="right", va="center", fontsize=11
            )
            for c, face in enumerate(images):
                x = left + c * (side + gap)
                picture[y : y + side, x : x + side, :3] = _enlarged(pixels_of(face), side)
                picture[y : y + side, x : x + side, 3] = 255
        canvas.figimage(picture)  # one picture, since an axes for each face would take a second to draw
        for c, label in enumerate(columns):
            middle = left + c * (side + gap) + side / 2
            shown = "\n".join(_short(line, 18) for line in label.split("\n"))
            canvas.text(middle / width, 1 - (top - 8) / height, shown, ha="center", fontsize=11)
        return figure_png(canvas)


def attack_grid(truth: Images, recovered: Sequence[tuple[str, Images]], guess: Images) -> bytes:
    """What an attack recovered under each defence, between the truth and a guess without the update; PNG."""
    rows = [("the photo", truth), *recovered, ("mean public face,\nno update used", guess)]
    return face_grid(rows, [f"photo {index + 1}" for index in range(len(truth))])


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def pixels_of(face: Tensor) -> np.ndarray:
    """A picture (3, h, w), clamped to [0, 1], as uint8 pixels (h, w, 3)."""
    values = face.detach().clamp(0.0, 1.0).permute(1, 2, 0).numpy()
    return np.asarray((values * 255.0).round(), dtype=np.uint8)


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """A square with `side` rows and columns, by repeating the pixels of a picture (h, w, 3)."""
    rows, columns = (np.arange(side) * length // side for length in pixels.shape[:2])
    return np.asarray(pixels[rows[:, None], columns])


def _svg(canvas: Canvas) -> bytes:
    target = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    canvas.savefig(target, format="svg", transparent=True, metadata=nothing)
    return target.getvalue()


def figure_png(canvas: Canvas, software: str = SOFTWARE) -> bytes:
    """A figure as PNG on its own background, which is white unless it was made with another."""
    target = io.BytesIO()
    FigureCanvasAgg(canvas)
    canvas.savefig(target, format="png", facecolor="auto", metadata={"Software": software})
    return target.getvalue()


def error_bars(axes: Axes, points: Points, index: int, label: str, *, linewidth: float = 0.0) -> None:
    """Estimates with their intervals at positions, in the colour and with the marker of the `index`-th series."""
    at, estimates, low, high = _columns(points)
    below, above = np.subtract(estimates, low).clip(min=0), np.subtract(high, estimates).clip(min=0)
    axes.errorbar(
        at, estimates, yerr=[below, above], label=label,
        color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], markersize=4.5,
        linewidth=linewidth, elinewidth=1.0, capsize=2,
    )  # fmt: skip


@contextmanager
def panels(
    count: int, size: tuple[float, float], *, sharey: bool = False
) -> Iterator[tuple[Canvas, list[Axes]]]:
    """A figure on white, of this width and height in inches, with panels side by side."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=size, layout="constrained", dpi=110)
        yield canvas, list(canvas.subplots(1, count, sharey=sharey, squeeze=False)[0])


def legend_below(canvas: Canvas, axes: Axes, columns: int = 6) -> None:
    """The legend of one panel below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(labels))))
