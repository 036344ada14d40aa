"""A metric of each group with its confidence interval and count, and the gap between two groups.

Resampling is over photos, the sampled unit; several faces of one photo are averaged first. The interval covers the
choice of photos from the same source, not whether that source is representative.

Sources: Efron (1987) for BCa intervals; Games & Howell (1976) for gaps.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import ndtr, ndtri

from fedface.measurements import LEVEL, SMALL_COUNT, Interval, Measurement, NotMeasured, rate_interval

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How much worse the worst served group is than the best served one."""

    worst: str
    best: str
    difference: Interval  # worst minus best in the metric's unit, for all pairs at once; count: both groups

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.difference.covers_zero


def _as_vector(values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"values must be one number per photo, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("values must be finite; count failures as a rate instead")
    return vector


def mean_interval(values: ArrayLike, rng: np.random.Generator, *, resamples: int = 2000) -> Interval:
    """The mean with its 95 % BCa bootstrap interval; Student's interval below ten photos, where resampling fails.

    Args:
        values: One finite number per photo, (n,), n >= 2.
        resamples: How many, >= 100.

    Raises:
        ValueError: Fewer than two values, which have no interval, or a value that is not finite.
    """
    if resamples < 100:
        raise ValueError(f"resamples must be >= 100, got {resamples}")
    x = _as_vector(values)
    n = len(x)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = float(x.mean())
    if np.ptp(x) == 0:
        return Interval(mean, mean, mean, n)
    if n < SMALL_COUNT:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, n)
    means = np.sort(x[rng.integers(n, size=(resamples, n))].mean(axis=1))
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / resamples
    z0 = ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    centred = x - mean
    acceleration = np.sum(centred**3) / (6 * np.sum(centred**2) ** 1.5)
    z = z0 + ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(means, ndtr(z0 + z / (1 - acceleration * z)))
    return Interval(mean, float(low), float(high), n)


def _split(values: ArrayLike, groups: Sequence[Group], expected: Sequence[Group]) -> dict[Group, np.ndarray]:
    vector = _as_vector(values)
    if len(groups) != len(vector):
        raise ValueError(f"groups must name {len(vector)} photos, got {len(groups)}")
    names = list(dict.fromkeys([*expected, *groups]))
    return {name: vector[[group == name for group in groups]] for name in names}


def metrics_by_group(
    values: ArrayLike, groups: Sequence[Group], rng: np.random.Generator, *, expected: Sequence[Group] = ()
) -> dict[Group, Measurement]:
    """The mean of each group with its interval.

    Args:
        values: One finite number per photo, (n,).
        groups: Each photo's group, n names.
        expected: Groups that must appear, in this order, even without a photo; others follow as they come.

    Returns:
        One interval per group; `NotMeasured` for a group of fewer than two photos.
    """
    split = _split(values, groups, expected).items()
    return {name: mean_interval(part, rng) if len(part) > 1 else _too_few(len(part)) for name, part in split}


def rates_by_group(
    shares: ArrayLike, groups: Sequence[Group], *, expected: Sequence[Group] = ()
) -> dict[Group, Measurement]:
    """The rate of each group with Wilson's interval, from one share in [0, 1] per photo; see `metrics_by_group`."""
    split = _split(shares, groups, expected).items()
    return {
        name: rate_interval(float(part.sum()), len(part)) if len(part) else _too_few(0)
        for name, part in split
    }


def _too_few(photos: int) -> NotMeasured:
    return NotMeasured(not_measured=f"only {photos} photo, so no interval" if photos else "no photos")


def gap_between(
    values: ArrayLike,
    groups: Sequence[str],
    cost: Mapping[str, float],
    rng: np.random.Generator,
    *,
    rate: bool,
    draws: int = 20_000,
) -> Gap | None:
    """The gap between the worst and the best served group, corrected for having selected both.

    The interval holds for all pairs of groups at once: its half width is the 95 % quantile of the largest studentised
    difference between any two of equal groups (Games & Howell 1976; the quantile is simulated). Where all groups are
    served equally, it covers zero in about 95 % of probes.

    Args:
        values: One finite number per photo, (n,).
        groups: Each photo's group, n names.
        cost: How badly each group is served; larger is worse. Groups that it does not name are left out.
        rate: Whether the values are shares in [0, 1]; their spread is then taken with one success and one
            failure added (Agresti & Caffo 2000): a group without a failure is not certain to have none.
        draws: Simulated probes.

    Returns:
        The gap, among groups of at least ten photos where two such exist, else among those of at least two;
        None where fewer than two groups can be compared.
    """
    parts = {name: part for name, part in _split(values, groups, ()).items() if name in cost}
    for least in (SMALL_COUNT, 2):
        chosen = {name: part for name, part in parts.items() if len(part) >= least}
        if len(chosen) >= 2:
            break
    else:
        return None
    names = list(chosen)
    worst, best = max(names, key=cost.__getitem__), min(names, key=cost.__getitem__)
    if worst == best:
        worst, best = names[0], names[1]
    error = np.array([_standard_error(chosen[name], rate=rate) for name in names])
    freedom = np.array([len(chosen[name]) - 1 for name in names])
    i, j = np.triu_indices(len(names), 1)
    pair_error = np.hypot(error[i], error[j])
    seen = pair_error > 0
    difference = float(chosen[worst].mean() - chosen[best].mean())
    count = len(chosen[worst]) + len(chosen[best])
    if not seen.any():
        return Gap(worst=worst, best=best, difference=Interval(difference, difference, difference, count))
    noise = rng.standard_t(freedom, size=(draws, len(names))) * error
    furthest = (np.abs(noise[:, i] - noise[:, j])[:, seen] / pair_error[seen]).max(axis=1)
    half = float(np.quantile(furthest, 0.95))
    half *= math.hypot(error[names.index(worst)], error[names.index(best)])
    most = 1.0 if rate else math.inf
    interval = Interval(difference, max(difference - half, -most), min(difference + half, most), count)
    return Gap(worst=worst, best=best, difference=interval)


def _standard_error(part: np.ndarray, *, rate: bool) -> float:
    n = len(part)
    if rate:
        p = (float(part.sum()) + 1) / (n + 2)
        return math.sqrt(p * (1 - p) / (n + 2))
    return float(part.std(ddof=1)) / math.sqrt(n)
