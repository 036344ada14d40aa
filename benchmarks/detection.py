"""How many faces of each group three detectors find: the table of docs/detection.md.

Run: python benchmarks/detection.py ../shared/data/faces/fairface_eval128 --yunet YUNET.onnx
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedface.photos.detection_rates import DetectionRate, measure_detection
from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector


def table(columns: Sequence[Sequence[DetectionRate]]) -> str:
    """A Markdown table: a row a group, a column a detector."""
    head = ["group", *(rates[0].detector for rates in columns)]
    lines = [head, ["---"] * len(head)]
    for row in zip(*columns, strict=True):
        lines.append([row[0].group, *(cell(rate) for rate in row)])
    lines.append(["CPU ms per photo", *(f"{1000 * rates[-1].seconds:.0f}" for rates in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(rate: DetectionRate) -> str:
    """Found of count, the share and its 95 % interval."""
    found = rate.interval
    return f"{rate.found}/{rate.count} = {100 * found.estimate:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def main() -> None:
    """Measure all three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faces", type=Path, help="a labelled set with columns race and gender")
    parser.add_argument("--yunet", type=Path, help="the YuNet ONNX file; without it that column is left out")
    parser.add_argument("--per-cell", type=int, default=100, help="photos of each race and gender")
    parser.add_argument("--per-cell-default", type=int, default=30, help="the same, for the default")
    chosen = parser.parse_args()
    columns = [
        measure_detection(chosen.faces, HogDetector(), per_cell=chosen.per_cell),
        measure_detection(chosen.faces, EmbeddedDetector(), per_cell=chosen.per_cell_default),
    ]
    if chosen.yunet:
        yunet = YuNetDetector(chosen.yunet)
        columns.append(measure_detection(chosen.faces, yunet, per_cell=chosen.per_cell))
    print(table(columns))


if __name__ == "__main__":
    main()
