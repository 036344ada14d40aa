"""What a device has spent: the price of ledger entries together, over time, and of each payload that left.

Nothing here writes; callers pass what privacy/ledger.py and privacy/transmission_log.py have read and verified.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from fedface.errors import LedgerError, PrivacyError
from fedface.measurements import Epsilon
from fedface.privacy.accounting import compose, epsilon_of, event_from_json
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import MAX_PERIOD, Entry
from fedface.privacy.transmission_log import Transmission, Withdrawal
from fedface.privacy_units import UNITS, Unit

MOMENTS = 24  # how often a total is computed for a table or a curve; each takes about a second


def line_record(line: Transmission | Withdrawal) -> dict[str, Any]:
    """A line of the journal for JSON; "line" says which kind it is."""
    return {"line": "sent" if isinstance(line, Transmission) else "withdrawn", **asdict(line)}


def payments(lines: Sequence[Transmission | Withdrawal], entries: Sequence[Entry]) -> dict[int, Entry]:
    """The entry that paid for each line of the journal that names one, by the line's number.

    Raises:
        LedgerError: The ledger has no such entry, or it is of another run or round, or it paid for two answers.
    """
    by_number = {entry.number: entry for entry in entries}
    paid = {}
    answers: dict[int, str] = {}
    for line in lines:
        if not isinstance(line, Transmission) or line.entry is None:
            continue
        entry = by_number.get(line.entry)
        if entry is None or entry.round != line.round or not belongs_to(entry, line.run):
            raise LedgerError(
                f"line {line.number} of the journal says that entry {line.entry} paid for round {line.round} of "
                f"{line.run}; the ledger has no such entry. Restore both files from one moment"
            )
        if answers.setdefault(line.entry, line.digest_of_payload) != line.digest_of_payload:
            raise LedgerError(
                f"entry {line.entry} of the ledger pays for one answer, and the journal knows two different ones (the "
                f"second in line {line.number}): the ledger was put back in between. Treat these photos as spent more "
                "than it says"
            )
        paid[line.number] = entry
    return paid


def price_of(entries: Sequence[Entry], *, delta: float, unit: Unit) -> Epsilon:
    """What some entries cost together for one unit.

    Raises:
        LedgerError: One cannot be priced.
    """
    seen: dict[tuple[str, Unit], Any] = {}
    try:
        for entry in entries:
            if (key := (entry.event, unit_of(entry))) not in seen:
                seen[key] = convert_unit(event_from_json(entry.event), source=key[1], target=unit)
        together = compose([seen[entry.event, unit_of(entry)] for entry in entries])
        return epsilon_of(together, delta, unit=unit)
    except PrivacyError as error:
        raise LedgerError(f"the ledger holds an event that cannot be priced: {error}") from error


def totals(
    entries: Sequence[Entry], *, delta: float, unit: Unit, most: int | None = MOMENTS
) -> dict[int, Epsilon]:
    """What the first entries cost together, by the number of the last of them; at `most` of them, always the last."""
    return {
        entries[i].number: price_of(entries[: i + 1], delta=delta, unit=unit)
        for i in _spread(len(entries), most)
    }


def unit_of(entry: Entry) -> Unit:
    """The privacy unit that an entry's release was noised for. Raises LedgerError for an unknown one."""
    name = json.loads(entry.metadata).get("unit", "photo")
    for unit in UNITS:
        if unit == name:
            return unit
    raise LedgerError(f"entry {entry.number} of the ledger names an unknown unit {name!r}; update fedface")


def spending_curve(entries: Sequence[Entry], limit: Budget, now: datetime) -> list[tuple[datetime, float]]:
    """When the upper bound that counts against a limit became what; ends now, has at most MOMENTS + 1 points."""
    times = [entry.time for entry in entries]
    if limit.days is not None:
        # An entry that is as old as the period still counts; a second later it does not.
        over = timedelta(days=min(limit.days, MAX_PERIOD), seconds=1)
        times = sorted([*times, *(time + over for time in times if time + over < now)])
    chosen = [times[i] for i in _spread(len(times), MOMENTS)]
    then = [(at, [entry for entry in entries if entry.time <= at]) for at in chosen]
    return [(at, spent_against(known, limit, at).upper) for at, known in [*then, (now, entries)]]


def spent_against(entries: Sequence[Entry], limit: Budget, now: datetime) -> Epsilon:
    """What counts against a limit now."""
    since = None if limit.days is None else now - timedelta(days=min(limit.days, MAX_PERIOD))
    counted = [entry for entry in entries if since is None or entry.time >= since]
    return price_of(counted, delta=limit.delta, unit=limit.unit)


def _spread(count: int, most: int | None) -> list[int]:
    """At most so many of `count` positions, evenly, the first and the last among them."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def belongs_to(entry: Entry, run: str) -> bool:
    """Whether a run asked for an entry: what it asks beside its updates is booked under its name and a slash."""
    return entry.run == run or entry.run.startswith(f"{run}/")
