"""A privacy filter: what adaptively chosen runs cost together, for as long as they are admitted one by one.

A server may choose the noise and the rate of its next run after it has seen the replies to the last one. Privacy loss
distributions of the parameters that were in the end used do not bound that: with two kinds of runs to choose from, a
budget of (3, 1e-5) is exceeded although every step fits (tests/privacy/test_renyi_filter.py). Rényi divergences of one
order, fixed in advance, do: if every run is admitted only while their sum at that order stays within a bound, the
bound holds for everything together (Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 4.3). The order follows from the
budget alone, so that no server can choose it.

One run alone is priced exactly, by its privacy loss distribution: its parameters are fixed before its first reply.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize_scalar

from fedface.privacy.mechanism import Event
from fedface.privacy.releases import Release, flatten_event

# Of DP-SGD the best order lies below that of a Gaussian with the same epsilon; this much below costs neither much.
ORDER_SHARE = 0.8
MIN_EPSILON, MAX_EPSILON = 1e-6, 1e5  # of budgets that `filter_epsilon` tries
PRECISION = 1e-4  # relative, of what it returns
# Less noise is priced as if everyone took part: the divergence is convex in the sampling rate.
_MIN_SCALE = 0.05
# Of the integral's grid, in standard deviations of the noise; the trapezoid rule errs below 1e-12.
_STEP = 0.02
_ROUNDING = 1e-12  # covers that error and the rounding of the sum
_LONGEST = 1e4  # of half the grid; beyond, where budgets are tiny, sampling is not counted
_TAIL = 12.0  # standard deviations beyond the outermost peak of the integrand


def epsilon_overhead(order: float, delta: float) -> float:
    """What turns a Rényi divergence of one order into an epsilon at delta, by addition.

    Source: Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Proposition 12.
    """
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)


@lru_cache(maxsize=256)
def filter_order(epsilon: float, delta: float) -> float:
    """The order at which a budget is counted, > 1: it depends on the budget and on nothing else."""

    def negative_capacity(log_excess: float) -> float:
        """Of Gaussian releases, whose divergence is order / (2 sigma^2), the admitted sum of 1 / (2 sigma^2)."""
        order = 1.0 + math.exp(log_excess)
        return -(epsilon - epsilon_overhead(order, delta)) / order

    best = minimize_scalar(negative_capacity, bounds=(math.log(1e-3), math.log(1e8)), method="bounded")
    return 1.0 + ORDER_SHARE * math.exp(float(best.x))


@lru_cache(maxsize=8192)
def renyi_divergence(release: Release, order: float) -> float:
    """The Rényi divergence of an order between two neighbours' outputs of one release, the larger of both directions.

    Infinite where nothing is guaranteed. By the trapezoid rule on the worst pair of distributions on a line, which is
    (1-q) N(0) + q N(1) beside N(0), or beside (1-q) N(0) + q N(-1) where a unit's content is replaced.

    Source: Mironov (2017), arXiv:1702.07476, Definition 3; Mironov, Talwar and Zhang (2019), arXiv:1908.10530.
    """
    if release.kind == "nonprivate":
        return math.inf
    q, distance = release.q, 2.0 if release.kind == "swapped" else 1.0
    whole = order * (distance / release.scale) ** 2 / 2.0
    if q == 1.0 or release.scale < _MIN_SCALE:
        return whole
    shift = 1.0 / release.scale
    end = _TAIL + order * distance * shift
    if end > _LONGEST:
        return whole
    half = math.ceil(end / _STEP)
    at, step = np.linspace(-end, end, 2 * half + 1), end / half

    def log_ratio(mean: float) -> np.ndarray:  # of (1-q) N(0) + q N(mean) to N(0)
        return np.logaddexp(math.log1p(-q), math.log(q) + mean * at - 0.5 * mean**2)

    one = log_ratio(shift)
    other = log_ratio(-shift) if release.kind == "swapped" else np.zeros_like(at)
    log_normal = -0.5 * at**2 - 0.5 * math.log(2.0 * math.pi)

    def divergence(p: np.ndarray, r: np.ndarray) -> float:
        terms = log_normal + order * p + (1.0 - order) * r
        top = float(terms.max())
        return (top + math.log(float(np.exp(terms - top).sum()) * step) + _ROUNDING) / (order - 1.0)

    return min(max(divergence(one, other), divergence(other, one), 0.0), whole)


def _total(events: Iterable[tuple[Event, int]]) -> Counter[Release]:
    counted: Counter[Release] = Counter()
    for event, times in events:
        for release, count in flatten_event(event):
            counted[release] += times * count
    return counted


def _excess(counted: Counter[Release], epsilon: float, delta: float) -> float:
    """By how much releases exceed a budget, in nats at its order; at most 0 where they fit."""
    order = filter_order(epsilon, delta)
    total = sum(count * renyi_divergence(release, order) for release, count in counted.items())
    return total + epsilon_overhead(order, delta) - epsilon


def within_filter(events: Iterable[tuple[Event, int]], epsilon: float, delta: float) -> bool:
    """Whether events, each so many times, fit into a budget.

    Guarantees:
        * If every event is admitted only while this holds with itself included, all of them together are
          (`epsilon`, `delta`)-DP, even if each was chosen knowing the outputs of those before it.

    Raises:
        PrivacyError: An event cannot be priced.
    """
    counted = _total(events)
    return not counted or _excess(counted, epsilon, delta) <= 0.0


def filter_epsilon(events: Iterable[tuple[Event, int]], delta: float) -> float:
    """The smallest budget, in epsilon at delta, that would have admitted events, each so many times.

    Returns:
        Epsilon, >= 0; infinite beyond `MAX_EPSILON`, and where an event guarantees nothing; 0 if there are no events.

    Raises:
        PrivacyError: An event cannot be priced.
    """
    counted = _total(events)
    if not counted:
        return 0.0
    if not _excess(counted, MAX_EPSILON, delta) <= 0.0:
        return math.inf
    low, high = MIN_EPSILON, MAX_EPSILON
    while high / low > 1.0 + PRECISION:  # a larger budget is counted at a lower order, and admits more
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _excess(counted, middle, delta) <= 0.0 else (middle, high)
    return high
