"""A mean as the ratio of two noised sums, its interval, and the difference of two such means.

The interval of m = S / N is Fieller's (1954): all m for which S - m N is within z standard deviations of zero. The
variance of S - m N is that of the noise, a + b m + c m^2, plus what other photos of the same kind would have added:
N m (1 - m) for a yes or no, where without noise the interval is Wilson's; for a ranged metric N times the estimated
spread. Noise is normal, so this is exact except for the spread, whose own error is about the square root of the
variance that it is added to. Fieller needs a denominator far from zero: a group is reported only if its count is.

Sources: Fieller (1954), J. R. Stat. Soc. B 16; Wilson (1927); Zou & Donner (2008), Stat. Med. 27, for differences
from two intervals, which for rates are Newcombe's (1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri

from fedface.audits.bias import METRICS, Metric
from fedface.audits.dp_metrics import RANGED_METRICS
from fedface.measurements import LEVEL, Interval

DP_METRICS: dict[str, Metric] = {
    **{name: METRICS[name] for name in RANGED_METRICS},
    "detected": Metric("share of generated faces that a detector finds", "", "rate", 2),
    "same_group": Metric("share of faces that keep their tone group", "", "rate", 2),
}


@dataclass(frozen=True, kw_only=True)
class DPRatioEstimate:
    """A mean as the ratio of two noised sums of a group, in public ranges mapped to [-1, 1] or [0, 1]."""

    above: float  # the noised sum of values
    below: float  # the noised count
    noise: tuple[float, float, float]  # variance of above - m * below by noise: the factors of 1, m and m^2
    photos: tuple[float, float, float]  # likewise by the choice of photos
    ends: tuple[float, float]  # between which m must lie
    unit: float  # of the metric, for one of m
    zero: float  # the metric at m = 0

    def interval(self, level: float = LEVEL) -> Interval:
        """The mean in the metric's unit, with the interval by noise and choice of photos, and the rounded count."""
        return self._within([n + p for n, p in zip(self.noise, self.photos, strict=True)], level)

    def noise_alone(self, level: float = LEVEL) -> Interval:
        """The interval of the mean over these very photos: by noise alone."""
        return self._within(self.noise, level)

    def _within(self, variance: Sequence[float], level: float) -> Interval:
        z2 = float(ndtri((1.0 + level) / 2.0)) ** 2
        one, linear, square = variance
        lowest, highest = self.ends
        ratio = self.above / self.below
        estimate = min(max(ratio, lowest), highest)
        # square_factor * m^2 - 2 * half_factor * m + rest <= 0
        square_factor = self.below**2 - z2 * square
        if square_factor <= 0:  # the count is lost in the noise at this level
            return self._in_unit(estimate, lowest, highest)
        half_factor = self.above * self.below + z2 * linear / 2.0
        rest = self.above**2 - z2 * one
        root = math.sqrt(max(half_factor**2 - square_factor * rest, 0.0))
        # Noise may push a mean out of its range. It is moved back with its interval: clipping alone would leave
        # short or empty intervals exactly where the noise was largest.
        low, high = ((half_factor + sign * root) / square_factor + estimate - ratio for sign in (-1.0, 1.0))
        return self._in_unit(estimate, max(min(low, estimate), lowest), min(max(high, estimate), highest))

    def _in_unit(self, *values: float) -> Interval:
        estimate, low, high = (self.zero + self.unit * m for m in values)
        return Interval(estimate, low, high, round(self.below))


def level_for(comparisons: int) -> float:
    """The level of each of several intervals that hold together in 95 % of cases (Bonferroni)."""
    return 1.0 - (1.0 - LEVEL) / max(comparisons, 1)


def difference_between(one: Interval, other: Interval) -> Interval:
    """One minus the other, from their intervals of equal level, whose errors are independent (Zou & Donner 2008)."""
    estimate = one.estimate - other.estimate
    below = math.hypot(one.estimate - one.low, other.high - other.estimate)
    above = math.hypot(one.high - one.estimate, other.estimate - other.low)
    return Interval(estimate, estimate - below, estimate + above, one.count + other.count)
