"""What this device's photos have paid so far: an append-only, hash-chained file on the device's own disk.

Called from device/client.py: a round is booked before it is computed, and its reply is kept, so that
asking again gets the same bytes instead of a second release. What was booked and never answered never left, but
whoever asks sees that no answer came: a booking pays for a few computations alone, see privacy/reply_cache.py.
One ledger per library, for the library's whole life; every reading verifies the chain and fails closed.
Source: SQLite with a rollback journal and synchronous=EXTRA (https://sqlite.org/pragma.html); the price
composes all events at reading time, see privacy/accounting.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedface.errors import LedgerError, PolicyRefusal, PrivacyError
from fedface.measurements import Epsilon
from fedface.privacy import reply_cache
from fedface.privacy.accounting import (
    compose,
    epsilon_of,
    event_from_json,
    event_to_json,
    within_budget,
)
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.budget import Budget, BudgetExceeded
from fedface.privacy.hash_chain import Chain, ChainSchema, Clock, Record, Transaction, in_utc, utc_now
from fedface.privacy.mechanism import Event
from fedface.privacy_units import UNITS, Unit

MAX_RELEASE_KINDS = (
    500  # of releases, each with its own noise or rate: each makes pricing them together slower
)
PAYS_FOR = timedelta(days=1)  # how long a booking waits for its answer where limits count days
MAX_PERIOD = 100 * 366.0  # days; a longer one counts as this, so that every period begins after year 1

FORM = ChainSchema(
    noun="ledger",
    table="entries",
    columns=(
        "run TEXT NOT NULL", "round INTEGER NOT NULL", "attempt INTEGER NOT NULL",
        "event TEXT NOT NULL", "marks TEXT NOT NULL",
    ),
    rules=("UNIQUE (run, round, attempt)",),
    beside=reply_cache.TABLES,
    counter_sql=reply_cache.GROWS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One booked release."""

    number: int  # 1, 2, 3, ...
    written: str  # UTC, ISO 8601
    run: str  # which run asked
    round: int  # which of its rounds, >= 0
    attempt: int  # 1, or more if the round was answered before and is computed anew
    event: str  # what was released, see accounting.event_to_json
    metadata: str  # canonical JSON: whatever identifies the release (model hash, clip norm, unit)
    parent: str  # digest of the entry before
    digest: str  # SHA-256 of all of the above

    @staticmethod
    def of(line: Record) -> Entry:
        """The entry that a line of the chain holds."""
        run, round, attempt, event, marks = line.values
        return Entry(
            number=line.number, written=line.written, run=str(run), round=int(round), attempt=int(attempt),
            event=str(event), metadata=str(marks), parent=line.parent, digest=line.digest,
        )  # fmt: skip

    @property
    def time(self) -> datetime:
        """When it was written."""
        return in_utc(datetime.fromisoformat(self.written))


class Ledger:
    """The book of one library. Safe to use from several threads and processes at once.

    Times are the owner's own clock, which is trusted: put forward, it lets entries leave a limit's period early,
    as if the days had passed. Put back, it frees nothing: no entry is dated before the one above it, and a period
    that counts back from an earlier now holds more entries, not fewer.
    """

    def __init__(self, chain: Chain, now: Clock) -> None:
        self._chain = chain
        self._now = now

    @staticmethod
    def open(path: Path | str, witness: Path | None = None, *, now: Clock = utc_now) -> Ledger:
        """Open the ledger at `path`, or begin one where there is neither a ledger nor a trace of one.

        Args:
            path: The file; readable by its owner alone, as is its folder if this call made it.
            witness: A folder elsewhere for a second copy of the chain's head, see `Chain.open`.
            now: The clock, which must know its time zone.

        Raises:
            LedgerError: The file is damaged, was rolled back or replaced, or has gone while its head remains; or
                its witness is missing.
        """
        return Ledger(Chain.open(Path(path), FORM, witness=witness, now=now), now)

    def verify(self) -> None:
        """Check every entry, the chain and the head.

        Raises:
            LedgerError: The file was altered, shortened, rolled back or damaged.
        """
        self.entries()

    def entries(self) -> list[Entry]:
        """Everything ever booked, oldest first, verified."""
        with self._chain.read_transaction() as page:
            return _entries(page)

    def export(self) -> list[dict[str, str | int]]:
        """The entries as plain dicts, for the owner to read or keep."""
        return [asdict(entry) for entry in self.entries()]

    def unanswered(self, numbers: Iterable[int]) -> list[int]:
        """Those of some entries' numbers that were never booked here, or never answered as far as this ledger knows."""
        with self._chain.read_transaction() as page:
            last = reply_cache.answered_attempts(page)
            given = {e.number for e in _entries(page) if last.get((e.run, e.round), 0) >= e.attempt}
        return [number for number in numbers if number not in given]

    def is_recorded(self, run: str, round: int) -> bool:
        """Whether a round has been booked, whether or not its reply was kept."""
        return any(entry.run == run and entry.round == round for entry in self.entries())

    def rounds_recorded(self, run: str) -> int:
        """How many different rounds of a run have been booked."""
        return len({entry.round for entry in self.entries() if entry.run == run})

    def spent(self, delta: float, *, unit: Unit = "photo", since: datetime | None = None) -> Epsilon:
        """What everything booked costs together for one unit, composed anew.

        Args:
            delta: Where epsilon is read.
            unit: Whose price; entries of runs that promise for another unit are converted, see neighbours.py.
            since: Only entries written at or after this time count; all if None.
        """
        return epsilon_of(_everything(self.entries(), unit, since), delta, unit=unit)

    def would_spend(
        self, event: Event, delta: float, *, told: Unit = "photo", unit: Unit = "photo",
        since: datetime | None = None,
    ) -> Epsilon:  # fmt: skip
        """What everything booked and one more event, of a run that promises per `told`, would cost together."""
        before = _everything(self.entries(), unit, since)
        return epsilon_of(compose([before, convert_unit(event, source=told, target=unit)]), delta, unit=unit)

    def check_budget(self, event: Event, limits: Sequence[Budget], *, told: Unit) -> BudgetExceeded | None:
        """Whether everything booked and one more event stay within every limit.

        Args:
            event: What would be released.
            limits: What the owner allows, at least one.
            told: The unit that the event's run promises for.

        Returns:
            None if every limit holds; otherwise the first that does not.

        Raises:
            PolicyRefusal: It is one kind of release too many to be priced.
            ValueError: No limit at all was given.
        """
        return self._shortfall(self.entries(), event, limits, told)

    def _shortfall(
        self, entries: Sequence[Entry], event: Event, limits: Sequence[Budget], told: Unit
    ) -> BudgetExceeded | None:
        if not limits:
            raise ValueError("a release needs at least one limit, got none")
        kinds = {(entry.event, _unit(json.loads(entry.metadata))) for entry in entries} | {
            (event_to_json(event), told)
        }
        if len(kinds) > MAX_RELEASE_KINDS:
            raise PolicyRefusal(
                f"this device has answered {MAX_RELEASE_KINDS} kinds of releases, each with a noise or a rate of its own, and "
                "takes no more: pricing them together would take minutes, however little each costs"
            )
        now = self._time()
        for limit in limits:
            since = None if limit.days is None else now - timedelta(days=min(limit.days, MAX_PERIOD))
            before = _everything(entries, limit.unit, since)
            asked = convert_unit(event, source=told, target=limit.unit)
            both = compose([before, asked])
            if not within_budget(both, limit.epsilon, limit.delta):
                alone, spent, together = (epsilon_of(e, limit.delta).upper for e in (asked, before, both))
                return BudgetExceeded(budget=limit, asked=alone, spent=spent, together=together)
        return None

    def _time(self) -> datetime:
        """Now, in whole seconds, as entries are dated."""
        return in_utc(self._now()).replace(microsecond=0)

    def record(self, event: Event, *, run: str, round: int, marks: Mapping[str, str] | None = None) -> Entry:
        """Write down a release before it is computed; on disk when this returns.

        A round whose reply has been kept is not booked again: its bytes are resent. A round that was booked
        but never answered is not booked again either, until `FREE_ATTEMPTS` of its computations were begun: a
        reply is kept before it is sent, so no answer has left the device, but that it broke may have been seen.
        A round that was answered and whose bytes were dropped since is booked once more: fresh noise on the
        same photos is a second release.

        Args:
            event: What will be released.
            run: Which run asks. A round that releases two things needs two names: "r7", "r7/evaluation".
            round: Which round, >= 0.
            marks: What identifies the release, such as the model's hash.

        Raises:
            LedgerError: The ledger is damaged, or this round was answered for a different event or marks.
        """
        with self._chain.write_transaction() as page:
            paid = self._paid(page, event, run, round, marks or {})
            return paid or _append(page, event, run, round, marks or {})

    def record_within_budget(
        self, event: Event, limits: Sequence[Budget], *, run: str, round: int,
        marks: Mapping[str, str] | None = None,
    ) -> Entry:  # fmt: skip
        """Book a release if every limit then holds: price and booking in one transaction.

        As `book`, but where a limit counts days, a booking that is not answered within a day pays no longer: the
        release would outlast its booking in that limit's period.

        Args:
            event: What will be released.
            limits: What the owner allows, at least one.
            run: Which run asks.
            round: Which round, >= 0.
            marks: What identifies the release; "unit" says what its run promises for, a photo if it is silent.

        Raises:
            PolicyRefusal: The upper bound on everything together would exceed a limit.
            LedgerError: As for `book`.
            ValueError: No limit at all was given, or the marks name no unit that we know.
        """
        marks = marks or {}
        told = _unit(marks)
        if not limits:
            raise ValueError("a release needs at least one limit, got none")
        with self._chain.write_transaction() as page:
            paid = self._paid(page, event, run, round, marks)
            if paid is not None and not self._too_old(page, paid, limits):
                return paid
            shortfall = self._shortfall(_entries(page), event, limits, told)
            if shortfall is not None:
                raise PolicyRefusal(
                    f"round {round} of {run} asks for {shortfall.describe()}. "
                    "Ask the owner of this device for a larger budget, or stop here."
                )
            return _append(page, event, run, round, marks)

    def _too_old(self, page: Transaction, paid: Entry, limits: Sequence[Budget]) -> bool:
        """Whether a booking would leave a limit's period well before the release it pays for, still to come."""
        if all(limit.days is None for limit in limits) or reply_cache.load_reply(page, paid.run, paid.round):
            return False
        return self._time() - paid.time > PAYS_FOR

    def _paid(
        self, page: Transaction, event: Event, run: str, round: int, marks: Mapping[str, str]
    ) -> Entry | None:
        """The entry that has paid for this release already, if any."""
        said, noted = event_to_json(event), _canonical(marks)
        same = _booked(page, run, round)
        reply = reply_cache.load_reply(page, run, round)
        if reply is not None:
            kept = next((entry for entry in same if entry.attempt == reply[0]), None)
            if kept is None:
                raise LedgerError(
                    f"the ledger {self._chain.path} keeps a reply to round {round}, never booked"
                )
            if (kept.event, kept.metadata) != (said, noted):
                raise LedgerError(f"round {round} of {run} was answered already, for a different release")
            return kept
        if not same or (same[-1].event, same[-1].metadata) != (said, noted):
            return None
        last = same[-1].attempt
        used = reply_cache.answered_attempt(page, run, round) == last
        tried = reply_cache.attempt_count(page, run, round, last)
        return None if used or tried >= reply_cache.FREE_ATTEMPTS else same[-1]

    def record_attempt(self, run: str, round: int, *, attempt: int) -> None:
        """Write down that a booked release is computed now; on disk when this returns, then open the photos.

        Args:
            run: Which run asked.
            round: Which round.
            attempt: The booking that pays for it, as `book` returned it.

        Raises:
            LedgerError: There is no such booking, it has its answer, or its computations are used up.
        """
        with self._chain.write_transaction() as page:
            if not 1 <= attempt <= len(_booked(page, run, round)):
                raise LedgerError(f"round {round} of {run} was never booked; no photo may be opened for it")
            reply_cache.record_attempt(page, run, round, attempt)

    def store_reply(self, run: str, round: int, body: bytes, *, attempt: int | None = None) -> None:
        """Keep the bytes that answer a booked round; the run's reply before is dropped.

        Each booking pays for one answer: of two computations that ran side by side, only the first is kept.

        Args:
            run: Which run asked.
            round: Which round.
            body: What may be sent once this returns.
            attempt: The booking that paid for it, as `book` returned it; the latest if None.

        Raises:
            LedgerError: The round was never booked, or that booking has a different answer already.
        """
        with self._chain.write_transaction() as page:
            booked = len(_booked(page, run, round))
            paid = booked if attempt is None else attempt
            if not 1 <= paid <= booked:
                raise LedgerError(f"round {round} of {run} was never booked; nothing may be sent")
            reply_cache.store_reply(page, run, round, paid, body)

    def load_reply(self, run: str, round: int) -> bytes | None:
        """The bytes that answered this round; None if it was never answered or they were dropped since."""
        with self._chain.read_transaction() as page:
            reply = reply_cache.load_reply(page, run, round)
        return None if reply is None else reply[1]

    def delete_replies(self, run: str | None = None) -> int:
        """Drop the kept bytes of one run, or of all, and overwrite them on disk; bookings stay.

        A round whose bytes were dropped is booked anew if it is asked once more.

        Returns:
            How many replies were dropped.
        """
        with self._chain.write_transaction() as page:
            return reply_cache.delete_replies(page, run)


def _entries(page: Transaction) -> list[Entry]:
    entries = [Entry.of(line) for line in page.lines]
    reply_cache.check_attempts(page, {(entry.run, entry.round, entry.attempt) for entry in entries})
    return entries


def _booked(page: Transaction, run: str, round: int) -> list[Entry]:
    """Every attempt at a round, oldest first."""
    return [entry for entry in _entries(page) if entry.run == run and entry.round == round]


def _append(page: Transaction, event: Event, run: str, round: int, marks: Mapping[str, str]) -> Entry:
    if round < 0:
        raise ValueError(f"round must be >= 0, got {round}")
    _unit(marks)  # what cannot be priced later is not booked
    attempt = len(_booked(page, run, round)) + 1
    return Entry.of(page.append(run, round, attempt, event_to_json(event), _canonical(marks)))


def _canonical(marks: Mapping[str, str]) -> str:
    return json.dumps(dict(marks), sort_keys=True, separators=(",", ":"))


def _unit(marks: Mapping[str, str]) -> Unit:
    """What the run of a release promises for; entries from before there was a choice mean one photo."""
    for unit in UNITS:
        if marks.get("unit", "photo") == unit:
            return unit
    raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {marks['unit']!r}")


def _everything(entries: Sequence[Entry], unit: Unit, since: datetime | None) -> Event:
    """All entries written at or after `since` as one event, as one `unit` sees it."""
    start = None if since is None else in_utc(since)
    seen: dict[tuple[str, Unit], Event] = {}
    released = []
    try:
        for entry in entries:
            if start is None or entry.time >= start:
                which = entry.event, _unit(json.loads(entry.metadata))
                if which not in seen:
                    seen[which] = convert_unit(event_from_json(entry.event), source=which[1], target=unit)
                released.append(seen[which])
    except (PrivacyError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event that cannot be priced: {error}") from error
    return compose(released)
