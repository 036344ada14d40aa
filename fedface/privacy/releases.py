"""What events consist of: elementary releases with counts, and their text in the ledger.

An event is flattened to its releases, so that a thousand equal rounds are one release and a count; accounting.py and
renyi_filter.py price them, adjacency.py converts them for other neighbours.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from fedface.errors import PrivacyError

MIN_NOISE_SCALE = 1e-3  # less noise than this (epsilon beyond 1e5) is priced as no noise at all
MAX_RELEASES = 10**9

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
    """What an event releases about a unit that stays while its content changes; why it costs that: adjacency.py."""

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


def is_private(event: DpEvent) -> bool:
    """Whether each release in an event has noise."""
    return all(leaf.kind != "nonprivate" for leaf, _ in flatten_event(event))


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
