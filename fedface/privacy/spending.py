"""What booked releases cost together, against a budget, and over time; nothing here writes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from fedface.errors import LedgerError, PolicyRefusal, PrivacyError
from fedface.measurements import Epsilon
from fedface.privacy.accounting import (
    compose,
    epsilon_of,
    event_from_json,
    event_to_json,
    within_budget,
)
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.budget import Budget, BudgetExceeded
from fedface.privacy.ledger_records import LedgerEntry
from fedface.privacy.mechanism import Event
from fedface.privacy_units import Unit

MAX_RELEASE_KINDS = 500  # each with its own noise or sampling rate: each makes pricing them together slower
MAX_PERIOD = 100 * 366.0  # days; a longer one counts as this, so that every period begins after year 1
MOMENTS = 24  # how often a total is computed for a table or a curve; each takes about a second


def total_event(entries: Sequence[LedgerEntry], unit: Unit) -> Event:
    """All entries as one event, as one `unit` sees it.

    Raises:
        LedgerError: One of them cannot be priced.
    """
    seen: dict[tuple[str, Unit], Event] = {}
    released = []
    try:
        for entry in entries:
            key = entry.event, entry.unit
            if key not in seen:
                seen[key] = convert_unit(event_from_json(entry.event), source=key[1], target=unit)
            released.append(seen[key])
    except (PrivacyError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event that cannot be priced: {error}") from error
    return compose(released)


def counted_entries(entries: Sequence[LedgerEntry], budget: Budget, now: datetime) -> Sequence[LedgerEntry]:
    """The entries that count against a budget now: those of its period."""
    if budget.days is None:
        return entries
    since = now - timedelta(days=min(budget.days, MAX_PERIOD))
    return [entry for entry in entries if entry.time >= since]


def against_budget(
    entries: Sequence[LedgerEntry], event: Event, budget: Budget, *, run_unit: Unit, now: datetime
) -> tuple[Event, Event, Event]:
    """One more event of a run with `run_unit`, what counts against a budget now, and both, in the budget's unit."""
    asked = convert_unit(event, source=run_unit, target=budget.unit)
    before = total_event(counted_entries(entries, budget, now), budget.unit)
    return asked, before, compose([before, asked])


def budget_exceeded(
    entries: Sequence[LedgerEntry], event: Event, budgets: Sequence[Budget], *, run_unit: Unit, now: datetime
) -> BudgetExceeded | None:
    """The first budget that one more event would exceed; None if every budget holds.

    Args:
        entries: Everything booked.
        event: What would be released.
        budgets: What the owner allows, at least one.
        run_unit: The privacy unit of the event's run.
        now: Where periods end.

    Raises:
        PolicyRefusal: It is one kind of release too many to be priced.
        LedgerError: An entry cannot be priced.
        ValueError: No budget at all was given.
    """
    if not budgets:
        raise ValueError("a release needs at least one limit, got none")
    kinds = {(entry.event, entry.unit) for entry in entries} | {(event_to_json(event), run_unit)}
    if len(kinds) > MAX_RELEASE_KINDS:
        raise PolicyRefusal(
            f"this device has answered {MAX_RELEASE_KINDS} kinds of releases, each with a noise or a rate of its own, "
            "and takes no more: pricing them together would take minutes, however little each costs"
        )
    for budget in budgets:
        asked, before, both = against_budget(entries, event, budget, run_unit=run_unit, now=now)
        if not within_budget(both, budget.epsilon, budget.delta):
            alone, spent, together = (epsilon_of(e, budget.delta).upper for e in (asked, before, both))
            return BudgetExceeded(budget=budget, asked=alone, spent=spent, together=together)
    return None


def price_of(entries: Sequence[LedgerEntry], *, delta: float, unit: Unit) -> Epsilon:
    """What some entries cost together for one unit. Raises LedgerError if one cannot be priced."""
    return epsilon_of(total_event(entries, unit), delta, unit=unit)


def spent_against(entries: Sequence[LedgerEntry], budget: Budget, now: datetime) -> Epsilon:
    """What counts against a budget now."""
    return price_of(counted_entries(entries, budget, now), delta=budget.delta, unit=budget.unit)


def totals(
    entries: Sequence[LedgerEntry], *, delta: float, unit: Unit, most: int | None = MOMENTS
) -> dict[int, Epsilon]:
    """What the first entries cost together, by the number of the last of them; at `most` of them, always the last."""
    return {
        entries[i].number: price_of(entries[: i + 1], delta=delta, unit=unit)
        for i in _spread(len(entries), most)
    }


def spending_curve(
    entries: Sequence[LedgerEntry], budget: Budget, now: datetime
) -> list[tuple[datetime, float]]:
    """When the upper bound that counts against a budget became what; ends now, has at most MOMENTS + 1 points."""
    times = [entry.time for entry in entries]
    if budget.days is not None:
        # An entry that is as old as the period still counts; a second later it does not.
        over = timedelta(days=min(budget.days, MAX_PERIOD), seconds=1)
        times = sorted([*times, *(time + over for time in times if time + over < now)])
    chosen = [times[i] for i in _spread(len(times), MOMENTS)]
    then = [(at, [entry for entry in entries if entry.time <= at]) for at in chosen]
    return [(at, spent_against(known, budget, at).upper) for at, known in [*then, (now, entries)]]


def _spread(count: int, most: int | None) -> list[int]:
    """At most so many of `count` positions, evenly, the first and the last among them."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
