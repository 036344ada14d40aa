"""How many faces the sample quality metrics need: the table of docs/quality.md, on synthetic faces.

Two comparisons at each count: faces of one tone mix with others of the same (truth: no distance) and with faces
of another mix. Every draw takes faces that no other draw of its count has.

Run: python benchmarks/quality_counts.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from fedface.audits.feature_distances import frechet_distance, frechet_interval, kernel_interval
from fedface.audits.feature_extractors import ColourFeatures, open_features
from fedface.audits.sample_quality import manifold_metrics
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces

COUNTS = (40, 80, 160, 320, 640, 1280, 2560)
HEAD = (
    "faces a side", "draws", "Frechet, plain", "Frechet, extrapolated", "kernel distance", "precision", "recall",
    "density", "coverage",
)  # fmt: skip


def synthetic_features(count: int, light_fraction: float, generator: torch.Generator) -> Tensor:
    """Colour features of synthetic faces at 32 px, (count, 132)."""
    extractor = open_features(ColourFeatures())
    parts = []
    for start in range(0, count, 2000):
        faces = sample_faces(min(2000, count - start), ToneMix(light_fraction=light_fraction), generator)
        parts.append(extractor.features(render(faces, 32)))
    return torch.cat(parts)


def row(real: Tensor, made: Tensor, count: int, most: int) -> tuple[str, ...]:
    """The mean and the standard deviation of each metric over draws."""
    draws = min(most, len(real) // count, len(made) // count)
    pairs = [(real[i * count : (i + 1) * count], made[i * count : (i + 1) * count]) for i in range(draws)]
    columns = [
        [frechet_distance(a, b) for a, b in pairs],
        [frechet_interval(a, b).estimate for a, b in pairs],
        [kernel_interval(a, b).estimate for a, b in pairs],
        *np.array([manifold_metrics(a, b, k=3) for a, b in pairs]).T,
    ]
    return (f"{count}", f"{draws}", *(f"{np.mean(values):.3f} ({np.std(values):.3f})" for values in columns))


def table(real: Tensor, made: Tensor, most: int) -> str:
    """A Markdown table: a row a count."""
    lines = [HEAD, ("---",) * len(HEAD), *(row(real, made, count, most) for count in COUNTS)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Draw the faces, measure, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=10_240, help="faces of each of three sets")
    parser.add_argument("--draws", type=int, default=20, help="at most so many draws of each count")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    streams, start = Streams(chosen.seed), time.perf_counter()
    real = synthetic_features(chosen.pool, 0.85, streams.generator("real"))
    same = synthetic_features(chosen.pool, 0.85, streams.generator("same"))
    other = synthetic_features(chosen.pool, 0.50, streams.generator("other"))
    print(f"Mean (standard deviation) over draws, {ColourFeatures.__name__}, k = 3.\n")
    print("Same mix (85 % light on both sides):\n\n" + table(real, same, chosen.draws))
    print("\nOther mix (85 % light against 50 %):\n\n" + table(real, other, chosen.draws))
    whole = frechet_interval(real, other), kernel_interval(real, other)
    print(f"\nAll faces, other mix: Frechet {whole[0]}; kernel {whole[1]}.")
    print(f"{time.perf_counter() - start:.0f} s on one core.")


if __name__ == "__main__":
    main()
