"""The distance between the skin tones of generated faces and those of a set of people.

Wasserstein-1 on the Monk scale: by how many steps faces must be moved, on average, until both sets have the same tones.
Unlike a difference of means it detects a generator that collapses a mixed population to one middle tone; unlike a
distance of histograms it knows that Monk 9 is nearer to 10 than to 1. Tone is measured from pixels, so light and camera
affect both sides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from fedface.measurements import Interval


def tone_distance(
    generated: ArrayLike, true: ArrayLike, rng: np.random.Generator, *, resamples: int = 400
) -> Interval:
    """Wasserstein-1 between two sets of Monk readings, in Monk steps, with its basic bootstrap interval.

    Two sets of n faces of the same people lie a little above zero, about 1.1 * sd / sqrt(n); compare with that
    floor. Resampling inflates a distance, hence the basic interval, which reflects the resamples about the
    estimate, and not the percentiles; near zero it is widened to hold the estimate.

    Args:
        generated: One continuous Monk reading per face, (n,), n >= 2.
        true: Likewise (m,), m >= 2.
        resamples: How many, >= 100.

    Returns:
        Distance >= 0 with its 95 % interval; the count is the smaller of n and m.
    """
    a, b = np.asarray(generated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    for name, readings in (("generated", a), ("true", b)):
        if readings.ndim != 1 or len(readings) < 2:
            raise ValueError(f"{name} must hold at least two readings, got shape {readings.shape}")
        if not np.isfinite(readings).all():
            raise ValueError(f"{name} must be finite")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}")
    estimate = float(stats.wasserstein_distance(a, b))
    again = [
        stats.wasserstein_distance(rng.choice(a, len(a)), rng.choice(b, len(b))) for _ in range(resamples)
    ]
    low, high = np.quantile(again, [0.025, 0.975])
    ends = (max(0.0, 2 * estimate - float(high)), max(estimate, 2 * estimate - float(low)))
    return Interval(estimate, *ends, min(len(a), len(b)))
