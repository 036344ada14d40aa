"""What events cost: privacy loss distributions, and the noise that meets a privacy target.

All prices are for neighbours that differ by adding or removing one unit; for others, adjacency.py finds the event to
price. The upper bound uses connect-the-dots (Doroshenko et al. 2022, arXiv:2207.04380), which dominates the true
distribution; the lower bound rounds every loss down (Koskela et al. 2020, arXiv:1906.03049). More releases than
Fourier transforms compose exactly enough have an upper bound by Rényi divergences instead. The ceiling on
reconstruction is that of Hayes et al. (2023), arXiv:2302.07225.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import minimize_scalar

from fedface.errors import PrivacyError
from fedface.measurements import Epsilon
from fedface.number_format import format_delta
from fedface.privacy.privacy_target import PrivacyTarget, check_delta
from fedface.privacy.releases import Release, Releases, flatten_event
from fedface.privacy.renyi_filter import epsilon_overhead, renyi_divergence
from fedface.privacy_units import Unit

ADJACENCY = "add or remove one"  # ADD_OR_REMOVE_ONE: the neighbouring relation of every price here

SLACK = 1e-12  # of delta: covers truncated tails (1e-15 each)
# Of delta, for each release: Fourier coefficients, at most 1, are raised to the power of the count.
ROUNDING = 2.0**-52
MAX_CONVOLVED = 10**6  # sampled releases; more are priced by Rényi divergences
MIN_GRID = 1e-4  # grid step of losses for long runs; the lower bound loses half a step per release
MAX_GRID_SPAN = 8e-4  # grid step for short runs
LARGEST_GRID = 2**19  # points of a composed loss grid
LARGEST_ONE = 2**17  # points of one release's loss grid, which the library fills one by one
MAX_GRID_STEP = 50.0  # what needs a wider grid (epsilon beyond 1e7) is priced as no noise at all
COARSE = 8  # how much coarser the grid is while bracketing the noise
MAX_NOISE_MULTIPLIER = 1e4  # of a plan and of a task
# Noise multipliers and sampling rates are numbers of a public grid: a server cannot encode anything in them, and a
# ledger holds few kinds of releases.
GRID_DIGITS = 4
_GRID_DECADE = 9 * 10 ** (GRID_DIGITS - 1)  # numbers between two powers of ten
_GRID_DECADES = 6  # from 0.01 to MAX_NOISE_MULTIPLIER


def _is_private(leaves: Releases) -> bool:
    return (
        all(leaf.kind != "nonprivate" for leaf, _ in leaves) and _grid_step(_merged(leaves)) <= MAX_GRID_STEP
    )


def _grid_step(leaves: Releases) -> float:
    """A grid step, 1e-4 times a power of two: fine beside one release's loss, affordable over all of them."""
    drift = sum(count * leaf.mean_loss_bound() for leaf, count in leaves)
    reach = max(leaf.tail_bound() for leaf, _ in leaves)
    span = 2.0 * (drift + 12.0 * math.sqrt(2.0 * drift) + reach)
    releases = sum(count for _, count in leaves)
    finest = min(max(0.1 / releases, MIN_GRID), MAX_GRID_SPAN)
    finest = min(finest, min(math.sqrt(2.0 * leaf.mean_loss_bound()) for leaf, _ in leaves) / 20.0)
    coarse_enough = max(finest, span / LARGEST_GRID, 2.0 * reach / LARGEST_ONE)
    return float(MIN_GRID * 2.0 ** math.floor(math.log2(coarse_enough / MIN_GRID) + 1e-9))


@lru_cache(maxsize=4)  # one event is often priced at several deltas
def _distribution(leaves: Releases, step: float, direction: Literal["up", "down"]) -> Any:
    """The composed privacy loss distribution, every loss rounded in one direction on a grid of `step`."""
    total, up = None, direction == "up"
    for leaf, count in leaves:
        options: dict[str, Any] = {"value_discretization_interval": step, "pessimistic_estimate": up}
        options["use_connect_dots"] = up
        if leaf.q == 1.0:  # Gaussians compose exactly: the noise of all equals one with sigma / sqrt(count)
            one = pld.from_gaussian_mechanism(leaf.scale / math.sqrt(count), **options)
        else:
            if leaf.kind == "swapped":  # (1-q) N(0) + q N(1) beside (1-q) N(0) + q N(-1)
                options["neighboring_relation"] = NeighboringRelation.REPLACE_ONE
            one = pld.from_gaussian_mechanism(leaf.scale, sampling_prob=leaf.q, **options).self_compose(count)
        total = one if total is None else total.compose(one)
    return total


def _merged(leaves: Releases) -> Releases:
    """All unsampled Gaussian releases as one: 1/sigma^2 adds up."""
    whole = [(leaf, count) for leaf, count in leaves if leaf.kind == "gaussian" and leaf.q == 1]
    rest = [pair for pair in leaves if pair not in whole]
    information = sum(count * leaf.scale**-2 for leaf, count in whole)
    if information > 0:
        rest.append((Release("gaussian", information**-0.5, 1.0), 1))
    return tuple(sorted(rest))


def _error(leaves: Releases) -> float:
    """What rounding can change of delta in the composed distribution."""
    return SLACK + ROUNDING * sum(count for leaf, count in leaves if leaf.q < 1)


def _is_convolved(leaves: Releases, delta: float) -> bool:
    """Whether Fourier transforms compose so many releases fast, and exactly enough for this delta."""
    return _error(leaves) <= min(SLACK + ROUNDING * MAX_CONVOLVED, delta / 10)


def _renyi_epsilon(leaves: Releases, delta: float) -> float:
    """An upper bound by the Rényi divergence of the best order, however many releases there are."""

    def epsilon(log_excess: float) -> float:  # valid at each order: a search can only end high
        order = 1.0 + math.exp(log_excess)
        total = sum(count * renyi_divergence(leaf, order) for leaf, count in leaves)
        return total + epsilon_overhead(order, delta)

    best = minimize_scalar(epsilon, bounds=(math.log(1e-3), math.log(1e3)), method="bounded")
    return max(float(best.fun), 0.0)


@lru_cache(maxsize=4096)
def _upper(leaves: Releases, delta: float, coarser: int) -> float:
    if not leaves:
        return 0.0
    if not _is_private(leaves):
        return math.inf
    merged = _merged(leaves)
    if not _is_convolved(merged, delta):
        return _renyi_epsilon(merged, delta)
    distribution = _distribution(merged, coarser * _grid_step(merged), "up")
    return float(distribution.get_epsilon_for_delta(delta - _error(merged)))


def _lower(merged: Releases, delta: float) -> float:
    if not _is_convolved(merged, delta):
        return 0.0
    distribution = _distribution(merged, _grid_step(merged), "down")
    try:
        return float(distribution.get_epsilon_for_delta(delta + _error(merged)))
    except OverflowError:  # rounded down, losses lie so far below zero that their exponentials overflow
        return 0.0


@lru_cache(maxsize=4096)
def _bounds(leaves: Releases, delta: float) -> tuple[float, float, float]:
    if not leaves:
        return 0.0, 0.0, 0.0
    if not _is_private(leaves):
        return math.inf, math.inf, math.inf
    merged = _merged(leaves)
    upper = _upper(leaves, delta, 1)
    lower = min(_lower(merged, delta), upper)
    excess = (_upper(leaves, delta, 2) - upper) / 3.0  # connect-the-dots errs by the square of the grid step
    estimate = min(max(upper - excess, lower), upper) if math.isfinite(excess) else upper
    return lower, estimate, upper


def epsilon_of(event: DpEvent, delta: float, *, unit: Unit = "photo") -> Epsilon:
    """What an event costs at `delta`, for neighbours that differ by one unit.

    Args:
        event: Gaussian releases, Poisson-sampled or not, and compositions of these.
        delta: 1e-10 <= delta < 1.
        unit: By which neighbours differ; it is stated in the result and changes no number.

    Returns:
        Bounds on epsilon; all infinite if any part has no noise, all zero if nothing was released.

    Raises:
        PrivacyError: The event holds something that this accountant cannot price.
        ValueError: Delta out of bounds.
    """
    check_delta(delta)
    lower, estimate, upper = _bounds(flatten_event(event), delta)
    return Epsilon(lower=lower, estimate=estimate, upper=upper, delta=delta, unit=unit)


def within_budget(event: DpEvent, budget: float, delta: float) -> bool:
    """Whether an event's upper price is within a budget; much faster than `epsilon_of` if it clearly is."""
    check_delta(delta)
    leaves = flatten_event(event)
    return _upper(leaves, delta, COARSE) <= budget or _upper(leaves, delta, 1) <= budget


def calibrate_noise_multiplier(target: PrivacyTarget, event_of: Callable[[float], DpEvent]) -> float:
    """The smallest noise multiplier, of `GRID_DIGITS` significant digits, whose event meets a privacy target.

    Guarantees:
        * The upper bound on epsilon at sigma is at most the target epsilon; at the next smaller number it is not
          (unless sigma is at its floor).

    Args:
        target: The privacy target.
        event_of: The whole run's event as a function of sigma; more noise must cost less.

    Returns:
        Sigma, between 0.01 and `MAX_NOISE_MULTIPLIER`.

    Raises:
        PrivacyError: No amount of noise in that range meets the target.
    """

    def price(index: int, coarser: int) -> float:
        return _upper(flatten_event(event_of(_grid_number(index))), target.delta, coarser)

    def smallest(high: int, coarser: int) -> int:
        """The smallest index that fits, up to `high`, which does: by interpolation, since each price takes long."""
        low, below, above, turn = -1, math.inf, price(high, coarser), 0
        while high - low > 1:
            turn += 1
            interpolated = (
                turn % 4 != 0
            )  # each fourth time the middle, where prices are far from a power of sigma
            middle = (
                _crossing((low, below), (high, above), target.epsilon) if interpolated else (low + high) // 2
            )
            found = price(middle, coarser)
            if found <= target.epsilon:
                high, above = middle, found
            else:
                low, below = middle, found
        return high

    top = _GRID_DECADES * _GRID_DECADE
    if price(top, 1) > target.epsilon:
        raise PrivacyError(
            f"no noise keeps epsilon {target.epsilon:g} at delta {format_delta(target.delta)}; "
            "use fewer steps or a lower sampling rate"
        )
    safe = smallest(top, COARSE) if price(top, COARSE) <= target.epsilon else top
    return _grid_number(smallest(safe, 1) if price(safe, 1) <= target.epsilon else safe)


def _crossing(low: tuple[int, float], high: tuple[int, float], epsilon: float) -> int:
    """An index strictly between two others at which the price is about epsilon.

    Log epsilon is interpolated linearly in log sigma; without a price at `low`, epsilon is taken as proportional to
    1 / sigma.
    """
    end, slope = math.log(_grid_number(high[0])), -1.0
    excess = math.log(epsilon / max(high[1], 1e-12))
    if math.isfinite(low[1]):
        slope = math.log(low[1] / max(high[1], 1e-12)) / (math.log(_grid_number(low[0])) - end)
    sigma = math.exp(max(end + excess / slope, math.log(_grid_number(0))))
    return min(max(bisect.bisect_left(range(high[0] + 1), sigma, key=_grid_number), low[0] + 1), high[0] - 1)


def _grid_number(index: int) -> float:
    """The numbers of `GRID_DIGITS` digits from 0.01 on: 0.01000, 0.01001, ..., 0.09999, 0.1000, ..."""
    decade, mantissa = divmod(index, _GRID_DECADE)
    return float(f"{_GRID_DECADE // 9 + mantissa}e{decade - 2 - (GRID_DIGITS - 1)}")


def reconstruction_success_bound(event: DpEvent, kappa: float) -> float:
    """The highest probability to name or rebuild one unit from everything released, by any attack whatever.

    Args:
        event: What was released.
        kappa: The probability of success from prior knowledge alone, 0 < kappa < 1 (1/n for a gallery of n).

    Returns:
        The smallest e^eps * kappa + delta(eps) over all eps, in [kappa, 1]. One Gaussian step has the closed
        form Phi(Phi^-1(kappa) + 1 / sigma).
    """
    if not 0 < kappa < 1:
        raise ValueError(f"kappa must lie in (0, 1), got {kappa}")
    leaves = flatten_event(event)
    if not leaves:
        return kappa
    if not _is_private(leaves):
        return 1.0
    merged = _merged(leaves)
    if not _is_convolved(merged, kappa):

        def from_delta(log_delta: float) -> float:  # valid at each delta
            log_success = _renyi_epsilon(merged, math.exp(log_delta)) + math.log(kappa)
            return math.exp(min(log_success, 0.0)) + math.exp(log_delta)

        lowest = math.log(1e-10 * kappa)
        best = minimize_scalar(from_delta, bounds=(lowest, math.log(kappa)), method="bounded")
        return float(min(best.fun, 1.0))
    distribution = _distribution(merged, _grid_step(merged), "up")

    def bound(epsilon: float) -> float:  # convex in e^eps and valid at each eps: a search can only end high
        return math.exp(epsilon) * kappa + float(distribution.get_delta_for_epsilon(float(epsilon)))

    # beyond -log(kappa) the first term alone exceeds 1
    best = minimize_scalar(bound, bounds=(-20.0, -math.log(kappa)), method="bounded", options={"xatol": 1e-4})
    ceiling = float(best.fun)
    return float(min(max(ceiling + SLACK, kappa), 1.0))
