"""What events cost: privacy loss distributions, and the noise that meets a privacy target.

All prices are for neighbours that differ by adding or removing one unit; for others, adjacency.py finds the event to
price. An event is first flattened to its leaves with
counts, so that a thousand equal rounds cost one self-composition. The upper bound uses connect-the-dots (Doroshenko
et al. 2022, arXiv:2207.04380), which dominates the true distribution; the lower bound rounds every loss down (Koskela
et al. 2020, arXiv:1906.03049). The ceiling on reconstruction is that of Hayes et al. (2023), arXiv:2302.07225.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import minimize_scalar

from fedface.errors import PrivacyError
from fedface.measurements import Epsilon
from fedface.number_format import format_delta
from fedface.privacy.privacy_target import PrivacyTarget, check_delta
from fedface.privacy_units import Unit

ADJACENCY = "add or remove one"  # ADD_OR_REMOVE_ONE: the neighbouring relation of every price here

SLACK = 1e-12  # covers truncated tails (1e-15 each) and the rounding of the Fourier transforms
MIN_GRID = 1e-4  # grid step of losses for long runs; the lower bound loses half a step per release
MAX_GRID_SPAN = 8e-4  # grid step for short runs
LARGEST_GRID = 2**19  # points of a composed loss grid
LARGEST_ONE = 2**17  # points of one release's loss grid, which the library fills one by one
MAX_GRID_STEP = 50.0  # what needs a wider grid (epsilon beyond 1e7) is priced as no noise at all
COARSE = 8  # how much coarser the grid is while bracketing the noise
MIN_NOISE_SCALE = 1e-3  # less noise than this (epsilon beyond 1e5) is priced as no noise at all
MAX_RELEASES = 10**9
MAX_NOISE_MULTIPLIER = 1e4  # of a plan and of a task
# Noise multipliers and sampling rates are numbers of a public grid: a server cannot encode anything in them, and a
# ledger holds few kinds of releases.
GRID_DIGITS = 4
_GRID_DECADE = 9 * 10 ** (GRID_DIGITS - 1)  # numbers between two powers of ten
_GRID_DECADES = 6  # from 0.01 to MAX_NOISE_MULTIPLIER

Kind = Literal["gaussian", "nonprivate", "swapped"]  # swapped: a sampled Gaussian in ReplaceOneDpEvent


@dataclass(frozen=True, order=True)
class Release:
    """One elementary release. `q` is 1 for everyone for certain; `scale` is noise / sensitivity."""

    kind: Kind
    scale: float
    q: float

    def mean_loss_bound(self) -> float:
        """An upper bound on the mean privacy loss of one release, in nats."""
        whole, swapped = self.scale**-2, self.kind == "swapped"
        convex = self.q * whole * (2.0 if swapped else 0.5)
        if whole > 500.0:  # where exp would overflow
            return convex
        chi_squared = 4.0 * math.sinh(whole) / (1.0 - self.q) if swapped else math.expm1(whole)
        return min(convex, math.log1p(self.q**2 * chi_squared))

    def tail_bound(self) -> float:
        """An upper bound on the loss of one release that matters, in nats."""
        far = 0.5 * self.scale**-2 + 10.0 / self.scale
        return far + min(far + self.scale**-2, -math.log1p(-self.q)) if self.kind == "swapped" else far


Releases = tuple[tuple[Release, int], ...]  # sorted, so that equal bundles of releases are equal values


@dataclass(frozen=True)
class ReplaceOneDpEvent(DpEvent):  # type: ignore[misc]
    """What an event releases about a unit that stays while its content changes; why it costs that: neighbours.py."""

    event: DpEvent


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """One event for everything that was released, in any order, each chosen knowing the ones before."""
    return ComposedDpEvent(list(events))


def _noisy(kind: Kind, scale: float) -> Release:
    if not (math.isfinite(scale) and scale >= 0):
        raise PrivacyError(f"a noise multiplier must be a finite number >= 0, got {scale}")
    return Release(kind, float(scale), 1.0) if scale >= MIN_NOISE_SCALE else Release("nonprivate", 0.0, 1.0)


def _replaced(leaf: Release) -> Release:
    if leaf.kind == "swapped":
        raise PrivacyError("no price is known for replacing what was replaced already")
    if leaf.kind == "gaussian" and leaf.q < 1:
        return Release("swapped", leaf.scale, leaf.q)
    return leaf if leaf.kind == "nonprivate" else _noisy(leaf.kind, leaf.scale / 2.0)


def _flatten(event: DpEvent, count: int, into: Counter[Release]) -> None:
    match event:
        case NoOpDpEvent():
            return
        case NonPrivateDpEvent():
            into[Release("nonprivate", 0.0, 1.0)] += count
        case GaussianDpEvent(noise_multiplier=sigma):
            into[_noisy("gaussian", sigma)] += count
        case ReplaceOneDpEvent(event=inner):
            added: Counter[Release] = Counter()
            _flatten(inner, count, added)
            for leaf, times in added.items():
                into[_replaced(leaf)] += times
        case PoissonSampledDpEvent(sampling_probability=q, event=inner):
            if not 0 <= q <= 1:
                raise PrivacyError(f"a sampling rate must lie in [0, 1], got {q}")
            sampled: Counter[Release] = Counter()
            _flatten(inner, count, sampled)
            if len(sampled) > 1 or any(leaf.q < 1 for leaf in sampled):
                raise PrivacyError("only one release is priced per sample; sample each step by its own coins")
            for leaf, times in sampled.items():
                if times != count:
                    raise PrivacyError("several releases on one sample are not priced; sample anew for each")
                if q > 0:
                    into[Release(leaf.kind, leaf.scale, float(q))] += times
        case SelfComposedDpEvent(event=inner, count=times):
            if times < 0:
                raise PrivacyError(f"a release cannot happen {times} times")
            if times > 0:
                _flatten(inner, count * times, into)
        case ComposedDpEvent(events=parts):
            for part in parts:
                _flatten(part, count, into)
        case _:
            raise PrivacyError(f"no price is known for a release of the kind {type(event).__name__}")


def flatten_event(event: DpEvent) -> Releases:
    """The elementary releases in an event and how often each happened.

    Raises:
        PrivacyError: The event holds something that this accountant cannot price.
    """
    counted: Counter[Release] = Counter()
    _flatten(event, 1, counted)
    if counted.total() > MAX_RELEASES:
        raise PrivacyError(f"more than {MAX_RELEASES:.0e} releases are not priced, got {counted.total()}")
    return tuple(sorted((leaf, count) for leaf, count in counted.items() if count > 0))


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


@lru_cache(maxsize=4096)
def _upper(leaves: Releases, delta: float, coarser: int) -> float:
    if not leaves:
        return 0.0
    if not _is_private(leaves):
        return math.inf
    merged = _merged(leaves)
    distribution = _distribution(merged, coarser * _grid_step(merged), "up")
    return float(distribution.get_epsilon_for_delta(delta - SLACK))


@lru_cache(maxsize=4096)
def _bounds(leaves: Releases, delta: float) -> tuple[float, float, float]:
    if not leaves:
        return 0.0, 0.0, 0.0
    if not _is_private(leaves):
        return math.inf, math.inf, math.inf
    merged = _merged(leaves)
    upper = _upper(leaves, delta, 1)
    down = _distribution(merged, _grid_step(merged), "down")
    lower = min(float(down.get_epsilon_for_delta(delta + SLACK)), upper)
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
        low, below, above = -1, math.inf, price(high, coarser)
        for turn in itertools.count(1):
            if high - low <= 1:
                return high
            middle = (low + high) // 2
            if turn % 4:
                middle = _crossing((low, below), (high, above), target.epsilon)
            found = price(middle, coarser)
            if found <= target.epsilon:
                high, above = middle, found
            else:
                low, below = middle, found
        raise AssertionError("unreachable")

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
    distribution = _distribution(merged, _grid_step(merged), "up")

    def bound(epsilon: float) -> float:  # convex in e^eps and valid at each eps: a search can only end high
        return math.exp(epsilon) * kappa + float(distribution.get_delta_for_epsilon(float(epsilon)))

    # beyond -log(kappa) the first term alone exceeds 1
    best = minimize_scalar(bound, bounds=(-20.0, -math.log(kappa)), method="bounded", options={"xatol": 1e-4})
    ceiling = float(best.fun)
    return float(min(max(ceiling + SLACK, kappa), 1.0))


def event_to_json(event: DpEvent) -> str:
    """An event as canonical text for the ledger: its leaves and counts, sorted."""
    rows = [
        {"kind": leaf.kind, "scale": leaf.scale, "q": leaf.q, "count": n} for leaf, n in flatten_event(event)
    ]
    return json.dumps(rows, sort_keys=True, separators=(",", ":"))


def event_from_json(text: str) -> DpEvent:
    """The event that `event_to_json` wrote; costs the same to the last bit.

    Raises:
        PrivacyError: The text is no such event.
    """
    try:
        read = json.loads(text)
        if not isinstance(read, list):
            raise TypeError("a list of releases was expected")
        rows = [(str(r["kind"]), float(r["scale"]), float(r["q"]), int(r["count"])) for r in read]
    except (ValueError, TypeError, KeyError) as error:
        raise PrivacyError(f"not an event: {text[:80]!r}") from error
    for kind, *_ in rows:
        if kind not in get_args(Kind):
            raise PrivacyError(f'not an event: unknown kind "{kind}"')
    event = event_from_releases(tuple((Release(kind, scale, q), count) for kind, scale, q, count in rows))  # type: ignore[arg-type]
    flatten_event(event)
    return event


def event_from_releases(leaves: Releases) -> DpEvent:
    """One event that releases each leaf as often as it is counted."""
    return compose(SelfComposedDpEvent(_event_of(leaf), count) for leaf, count in leaves)


def _event_of(leaf: Release) -> DpEvent:
    one = NonPrivateDpEvent() if leaf.kind == "nonprivate" else GaussianDpEvent(leaf.scale)
    sampled = one if leaf.q == 1.0 else PoissonSampledDpEvent(leaf.q, one)
    return ReplaceOneDpEvent(sampled) if leaf.kind == "swapped" else sampled
