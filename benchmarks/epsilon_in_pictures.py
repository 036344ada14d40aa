"""The picture of docs/epsilon.md: posterior probability after a run against the prior probability.

Bayes' rule under the privacy guarantee alone; nothing is measured.

Run: python benchmarks/epsilon_in_pictures.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas

from fedface.reports.charts import COLOURS, GREY_ON_BOTH, INK, STYLE, figure_png

EPSILONS = (8.0, 3.0, 1.0, 0.5)  # from the highest curve to the lowest
DASHES = ("-", "-", (0, (5, 2)), (0, (1.5, 1.5)))
MARKED, PRIORS = 3.0, (0.01, 0.5)  # the epsilon that the page explains, and its prior probabilities
BEFORE = {0.001: "1 in 1,000", 0.01: "1 in 100", 0.1: "1 in 10", 0.5: "1 in 2", 0.9: "9 in 10"}
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "epsilon.png"


def sure_after(before: float, epsilon: float) -> float:
    """The largest posterior for a prior, 0 < before < 1: odds grow by at most e^epsilon."""
    return 1.0 / (1.0 + (1.0 - before) / before * math.exp(-epsilon))


def picture() -> bytes:
    """One curve per epsilon, the diagonal of no information, two marked points; PNG."""
    with matplotlib.rc_context({**STYLE, "font.size": 9.5}):
        canvas = Canvas(figsize=(7.6, 3.7), layout="constrained", dpi=110)
        axes = canvas.subplots()
        places = 1.0 / (1.0 + np.exp(-np.linspace(math.log(0.0005), math.log(19.0), 400)))
        for epsilon, color, dash in zip(EPSILONS, COLOURS, DASHES, strict=False):
            heights = [100 * sure_after(float(before), epsilon) for before in places]
            axes.plot(
                places, heights, color=color, linestyle=dash, linewidth=2.0, label=f"epsilon {epsilon:g}"
            )
        axes.plot(places, 100 * places, color=GREY_ON_BOTH, linewidth=1.2, label="no information")
        for before in PRIORS:
            height = 100 * sure_after(before, MARKED)
            axes.plot([before], [height], "o", color=COLOURS[EPSILONS.index(MARKED)], markersize=6)
            axes.annotate(
                f"{height:.0f} %", (before, height), (7, -4), textcoords="offset points",
                ha="left", va="top", color=INK,
            )  # fmt: skip
        axes.set_xscale("logit")
        axes.set_xlim(places[0], places[-1])
        axes.set_ylim(0, 102)
        axes.set_xticks(list(BEFORE), list(BEFORE.values()))
        axes.minorticks_off()
        axes.set_xlabel("probability before the run that this birthday is among the photos")
        axes.set_ylabel("at most sure afterwards, %")
        canvas.legend(loc="outside right center")
        return figure_png(canvas)


def main() -> None:
    """Write the picture of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the PNG goes")
    chosen = parser.parse_args()
    chosen.out.write_bytes(picture())
    print(chosen.out)


if __name__ == "__main__":
    main()
