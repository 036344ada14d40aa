"""What recorded runs and releases cost together, against a budget, and over time; nothing here writes.

For life a run counts as a whole from its first release on. So it does in a period while one of its releases lies in it,
if the whole run fits; of a run that is too long for the period, the releases of the period count one by one. One charge
alone costs what its privacy loss distribution says, several what a privacy filter counts (privacy/renyi_filter.py):
a later run may be chosen with knowledge of earlier replies. The first release of a life, or of a period, decides which:
what fits only by its distribution leaves no room in the filter for anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from fedface.errors import LedgerError, PrivacyError
from fedface.measurements import Epsilon
from fedface.privacy.accounting import epsilon_of, within_budget
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.budget import Budget, BudgetExceeded
from fedface.privacy.hash_chain import in_utc
from fedface.privacy.ledger_records import (
    Attempt,
    Charge,
    LedgerEntry,
    LedgerRecord,
    RecordedRun,
    StoredReply,
    Transmission,
)
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters
from fedface.privacy.releases import event_from_json, flatten_event
from fedface.privacy.renyi_filter import filter_epsilon, within_filter
from fedface.privacy_units import Unit

# How long a computation may take, and what was recorded may wait to be sent.
ENTRY_LIFETIME = timedelta(days=1)
MAX_PERIOD = 100 * 366.0  # days; a longer one counts as this, so that every period begins after year 1
MOMENTS = 24  # how often a total is computed for a table or a curve

Events = list[tuple[Event, int]]  # each so many times

# Of each entry, by its number: when its latest record was written, and whether it has a reply.
Activity = dict[int, tuple[str, bool]]


def note_activity(activity: Activity, kind: str, number: int, entry: int | None, written: str) -> None:
    """Note a record of the chain: its kind and number, the entry that it belongs to, and when it was written."""
    if kind == LedgerEntry.KIND:
        activity[number] = written, False
    elif entry is not None and kind in (Attempt.KIND, StoredReply.KIND, Transmission.KIND):
        # A second reply closes the first, and nothing leaves by that.
        if kind != StoredReply.KIND or not activity[entry][1]:
            activity[entry] = written, kind != Attempt.KIND


def activity_of(records: Iterable[LedgerRecord]) -> Activity:
    """The latest record of each entry."""
    activity: Activity = {}
    for record in records:
        note_activity(activity, record.KIND, record.number, getattr(record, "entry", None), record.written)
    return activity


def counts_until(latest: tuple[str, bool]) -> datetime:
    """The latest moment at which an entry's release may leave without being counted anew."""
    written, _ = latest
    return in_utc(datetime.fromisoformat(written)) + ENTRY_LIFETIME


def charges(records: Iterable[LedgerRecord]) -> list[Charge]:
    """What counts for life, oldest first: whole runs, and releases that are not part of a recorded run."""
    return [
        record
        for record in records
        if isinstance(record, RecordedRun) or (isinstance(record, LedgerEntry) and record.covered_by is None)
    ]


def counted(
    records: Iterable[LedgerRecord], budget: Budget, now: datetime, activity: Activity | None = None
) -> list[Charge]:
    """What counts against a budget now: all charges for life, or those of its period.

    Args:
        records: Runs and entries, and the other records if `activity` is None.
        now: The end of its period.
        activity: The latest record of each entry.
    """
    if budget.days is None:
        return charges(records)
    records = list(records)
    activity = activity_of(records) if activity is None else activity
    since = now - timedelta(days=min(budget.days, MAX_PERIOD))
    recent = [
        record
        for record in records
        if isinstance(record, LedgerEntry) and counts_until(activity[record.number]) >= since
    ]
    numbers = {entry.covered_by for entry in recent}
    recorded = [record for record in records if isinstance(record, RecordedRun) and record.number in numbers]
    whole = [run for run in recorded if fits_alone(event_from_json(run.event), run.unit, budget)]
    covering = {run.number for run in whole}
    return [*whole, *(entry for entry in recent if entry.covered_by not in covering)]


def fits_alone(event: Event, unit: Unit, budget: Budget) -> bool:
    """Whether a run fits a budget as long as nothing else is in it."""
    return _fits([(convert_unit(event, source=unit, target=budget.unit), 1)], budget.epsilon, budget.delta)


def _events(charged: Iterable[Charge], unit: Unit) -> Events:
    """Charges as one `unit` sees them.

    Raises:
        LedgerError: One of them cannot be priced.
    """
    kinds = Counter((charge.event, charge.unit) for charge in charged)
    try:
        return [
            (convert_unit(event_from_json(event), source=source, target=unit), count)
            for (event, source), count in kinds.items()
        ]
    except (PrivacyError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event that cannot be priced: {error}") from error


def _fits(events: Events, epsilon: float, delta: float) -> bool:
    events = [(event, count) for event, count in events if flatten_event(event)]
    if within_filter(events, epsilon, delta):
        return True
    return sum(count for _, count in events) == 1 and within_budget(events[0][0], epsilon, delta)


def _price(events: Events, delta: float, unit: Unit) -> Epsilon:
    """One event exactly; of several the smallest budget that admits them, and the largest lower bound among them."""
    events = [(event, count) for event, count in events if flatten_event(event)]
    alone = [epsilon_of(event, delta, unit=unit) for event, _ in events]
    if sum(count for _, count in events) <= 1:
        return alone[0] if alone else Epsilon(lower=0.0, estimate=0.0, upper=0.0, delta=delta, unit=unit)
    upper = filter_epsilon(events, delta)
    lower = min(max(price.lower for price in alone), upper)
    return Epsilon(lower=lower, estimate=upper, upper=upper, delta=delta, unit=unit)


def price_of(charged: Sequence[Charge], *, delta: float, unit: Unit) -> Epsilon:
    """What some charges cost together for one unit. Raises LedgerError if one cannot be priced."""
    return _price(_events(charged, unit), delta, unit)


def price_with(
    charged: Sequence[Charge], event: Event, budget: Budget, *, run_unit: Unit
) -> tuple[Epsilon, Epsilon, Epsilon]:
    """What one more event of a run with `run_unit` costs in a budget's unit: alone, what is spent, and both."""
    before = _events(charged, budget.unit)
    requested = [(convert_unit(event, source=run_unit, target=budget.unit), 1)]
    alone, spent, together = (
        _price(part, budget.delta, budget.unit) for part in (requested, before, before + requested)
    )
    return alone, spent, together


def exceeded(
    charged: Sequence[Charge], event: Event, budget: Budget, *, run_unit: Unit
) -> BudgetExceeded | None:
    """Whether one more event of a run with `run_unit` exceeds a budget, beside what counts against it already.

    Returns:
        None if the budget holds.

    Raises:
        LedgerError: A charge cannot be priced.
    """
    requested = convert_unit(event, source=run_unit, target=budget.unit)
    if _fits([*_events(charged, budget.unit), (requested, 1)], budget.epsilon, budget.delta):
        return None
    alone, spent, together = price_with(charged, event, budget, run_unit=run_unit)
    return BudgetExceeded(budget=budget, requested=alone.upper, spent=spent.upper, together=together.upper)


def rounds_that_fit(charged: Sequence[Charge], dp: DPParameters, budget: Budget) -> int:
    """How many rounds of a new run fit beside what counts against a budget already, by bisection.

    For life, and where the whole run fits the period, they count as one run; otherwise each by itself.
    """
    before = _events(charged, budget.unit)

    def fits(rounds: int) -> bool:
        run = convert_unit(dp.event(rounds), source=dp.unit, target=budget.unit)
        one = convert_unit(dp.event(1), source=dp.unit, target=budget.unit)
        as_whole = budget.days is None or rounds == dp.schedule.rounds
        return _fits([*before, (run, 1) if as_whole else (one, rounds)], budget.epsilon, budget.delta)

    if fits(dp.schedule.rounds):
        return dp.schedule.rounds
    fitting, too_many = 0, dp.schedule.rounds
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def spent_against(
    records: Iterable[LedgerRecord], budget: Budget, now: datetime, activity: Activity | None = None
) -> Epsilon:
    """What counts against a budget now, see `counted`."""
    return price_of(counted(records, budget, now, activity), delta=budget.delta, unit=budget.unit)


def totals(
    records: Sequence[LedgerRecord], *, delta: float, unit: Unit, most: int | None = MOMENTS
) -> dict[int, Epsilon]:
    """What counts for life up to each entry, by its number; at `most` of them, always the last."""
    entries = [record for record in records if isinstance(record, LedgerEntry)]
    charged = charges(records)
    chosen = [entries[i].number for i in _spread(len(entries), most)]
    return {
        number: price_of([charge for charge in charged if charge.number <= number], delta=delta, unit=unit)
        for number in chosen
    }


def spending_curve(
    records: Sequence[LedgerRecord], budget: Budget, now: datetime
) -> list[tuple[datetime, float]]:
    """When the upper bound that counts against a budget became what; ends now, has at most MOMENTS + 1 points."""
    times = [record.time for record in records if isinstance(record, RecordedRun | LedgerEntry)]
    if budget.days is not None:
        # An entry that is as old as the period still counts; a second later it does not.
        over = timedelta(days=min(budget.days, MAX_PERIOD), seconds=1)
        ends = [counts_until(latest) + over for latest in activity_of(records).values()]
        times = sorted([*times, *(end for end in ends if end < now)])
    chosen = [times[i] for i in _spread(len(times), MOMENTS)]
    dated = [(in_utc(datetime.fromisoformat(record.written)), record) for record in records]
    then = [(at, [record for time, record in dated if time <= at]) for at in chosen]
    return [(at, spent_against(known, budget, at).upper) for at, known in [*then, (now, list(records))]]


def _spread(count: int, most: int | None) -> list[int]:
    """At most so many of `count` positions, evenly, the first and the last among them."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
