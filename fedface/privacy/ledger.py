"""What this device's photos have paid so far: an append-only, hash-chained file on the device's own disk.

Called from federation/device.py: a round is booked before it is computed, and its reply is kept, so that
asking again gets the same bytes instead of a second release. What was booked and never answered never left.
One ledger per library, for the library's whole life; every reading verifies the chain and fails closed.
Source: SQLite with a rollback journal and synchronous=EXTRA (https://sqlite.org/pragma.html); the price
composes all events at reading time, see privacy/accounting.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedface.errors import LedgerError, PolicyRefusal, PrivacyError
from fedface.privacy.accounting import (
    Bounds,
    compose,
    costs_at_most,
    epsilon_of,
    event_from_json,
    event_to_json,
)
from fedface.privacy.limits import Limit
from fedface.privacy.mechanism import Event
from fedface.privacy.neighbours import seen_by
from fedface.units import UNITS, Unit

GENESIS = hashlib.sha256(b"fedface ledger 1").hexdigest()
PATIENCE = 60.0  # seconds to wait for another process that is booking

_SCHEMA = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    written TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    event TEXT NOT NULL, marks TEXT NOT NULL, parent TEXT NOT NULL, digest TEXT NOT NULL UNIQUE,
    UNIQUE (run, round, attempt)
);
CREATE TABLE replies (
    run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, body BLOB, PRIMARY KEY (run, round)
);
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One booked release."""

    number: int  # 1, 2, 3, ...
    written: str  # UTC, ISO 8601
    run: str  # which run asked
    round: int  # which of its rounds, >= 0
    attempt: int  # 1, or more if the round was answered before and is computed anew
    event: str  # what was released, see accounting.event_to_json
    marks: str  # canonical JSON: whatever identifies the release (model hash, clip norm, unit)
    parent: str  # digest of the entry before
    digest: str  # SHA-256 of all of the above

    @staticmethod
    def chained(
        *, number: int, written: str, run: str, round: int, attempt: int, event: str, marks: str, parent: str
    ) -> Entry:
        """An entry whose digest is computed from what it says."""
        said = json.dumps([number, written, run, round, attempt, event, marks, parent], separators=(",", ":"))
        digest = hashlib.sha256(said.encode()).hexdigest()
        return Entry(
            number=number, written=written, run=run, round=round, attempt=attempt,
            event=event, marks=marks, parent=parent, digest=digest,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """The first limit that a release would break, and by how much; every number is an upper bound."""

    limit: Limit  # what is allowed, at which delta, of which unit and period
    asked: float  # what the release alone costs
    spent: float  # what is booked in the limit's period
    together: float  # what both cost together, composed: less than their sum

    def in_words(self) -> str:
        """All numbers in one phrase that can follow "asks for"."""
        limit = self.limit
        period = "for life" if limit.days is None else f"in any {limit.days:g} days"
        return (
            f"epsilon {self.asked:.3f}; {self.spent:.3f} of {limit.epsilon:g} is already spent "
            f"(together {self.together:.3f}, delta {limit.delta:g}, per {limit.unit} {period})"
        )


class Ledger:
    """The book of one library. Safe to use from several threads and processes at once.

    Times are the owner's own clock, which is trusted: put forward, it lets entries leave a limit's period early,
    as if the days had passed. Put back, it frees nothing: no entry is dated before the one above it, and a period
    that counts back from an earlier now holds more entries, not fewer.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = path
        self._now = now
        self._head_path = path.with_name(path.name + ".head")

    @staticmethod
    def open(path: Path | str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Ledger:
        """Open the ledger at `path`, or begin one where there is neither a ledger nor a trace of one.

        Args:
            path: The file.
            now: The clock, which must know its time zone.

        Returns:
            A ledger whose chain has been verified. Its file is readable by its owner alone, and so is its
            folder if this call made it.

        Raises:
            LedgerError: The file is damaged, was rolled back or replaced, or has gone while its head remains.
        """
        ledger = Ledger(Path(path), now)
        try:
            ledger._begin()
        except OSError as error:
            raise LedgerError(f"cannot open the ledger {path}: {error}") from error
        ledger.verify()
        return ledger

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self._path.exists() and self._head_path.exists():
            raise LedgerError(
                f"the ledger {self._path} has gone but {self._head_path.name} remembers it; "
                "restore it, or treat these photos as spent"
            )
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(self._path, 0o600)
        with self._transaction() as book:
            if book.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                if self._head() not in (None, GENESIS):
                    raise LedgerError(f"the ledger {self._path} was emptied; restore it from a backup")
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        book.execute(statement)
        self._remember()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time; committed and on disk when the block ends without an exception."""
        try:
            book = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
        except sqlite3.Error as error:
            raise LedgerError(f"cannot open the ledger {self._path}: {error}") from error
        try:
            book.execute("PRAGMA journal_mode = DELETE")
            book.execute("PRAGMA synchronous = EXTRA")
            book.execute("PRAGMA fullfsync = 1")
            book.execute("BEGIN IMMEDIATE")
            try:
                yield book
            except BaseException:
                if book.in_transaction:
                    book.execute("ROLLBACK")
                raise
            book.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"the ledger {self._path} is damaged or locked: {error}") from error
        finally:
            book.close()

    def _remember(self) -> None:
        """Keep the chain's head beside the file, so that an older copy of the file is noticed.

        Written after the booking is on disk: a crash between leaves an older head, which the chain contains;
        a newer head than the chain can only mean that the chain was put back.
        """
        with self._transaction() as book:  # holds the lock, so that the newest head is the one that stays
            entries = self._read(book)
            head = entries[-1].digest if entries else GENESIS
            draft = self._head_path.with_name(f"{self._head_path.name}.draft")
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.write(handle, f"{head}\n".encode())
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(draft, self._head_path)

    def _head(self) -> str | None:
        """The digest that the file beside the ledger remembers, if there is one."""
        if not self._head_path.exists():
            return None
        return self._head_path.read_text(encoding="ascii", errors="replace").strip()

    def _read(self, book: sqlite3.Connection) -> list[Entry]:
        """All entries, oldest first, each checked against its own digest and its parent's."""
        columns = "number, written, run, round, attempt, event, marks, parent, digest"
        rows = book.execute(f"SELECT {columns} FROM entries ORDER BY number").fetchall()
        entries, parent = [], GENESIS
        for position, row in enumerate(rows, start=1):
            number, written, run, round, attempt, event, marks, before, digest = row
            entry = Entry.chained(
                number=number, written=written, run=run, round=round, attempt=attempt,
                event=event, marks=marks, parent=before,
            )  # fmt: skip
            if entry.digest != digest or before != parent or number != position:
                raise LedgerError(f"the ledger {self._path} was altered: entry {position} does not add up")
            entries.append(entry)
            parent = digest
        last = book.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        if (last[0] if last else 0) != len(entries):
            raise LedgerError(f"the ledger {self._path} has lost entries; {len(entries)} remain")
        head = self._head()
        if head is None and entries:
            raise LedgerError(f"the ledger {self._path} has lost {self._head_path.name}; restore both files")
        if head not in (None, GENESIS) and head not in {entry.digest for entry in entries}:
            raise LedgerError(f"the ledger {self._path} was rolled back or replaced: it lacks its own head")
        return entries

    def verify(self) -> None:
        """Check every entry, the chain and the head.

        Raises:
            LedgerError: The file was altered, shortened, rolled back or damaged.
        """
        self.entries()

    def entries(self) -> list[Entry]:
        """Everything ever booked, oldest first, verified."""
        with self._transaction() as book:
            return self._read(book)

    def export(self) -> list[dict[str, str | int]]:
        """The entries as plain dicts, for the owner to read or keep."""
        return [asdict(entry) for entry in self.entries()]

    def already(self, run: str, round: int) -> bool:
        """Whether a round has been booked, whether or not its reply was kept."""
        return any(entry.run == run and entry.round == round for entry in self.entries())

    def rounds_booked(self, run: str) -> int:
        """How many different rounds of a run have been booked."""
        return len({entry.round for entry in self.entries() if entry.run == run})

    def spent(self, delta: float, *, unit: Unit = "photo", since: datetime | None = None) -> Bounds:
        """What everything booked costs together for one unit, composed anew.

        Args:
            delta: Where epsilon is read.
            unit: Whose price; entries of runs that promise for another unit are converted, see neighbours.py.
            since: Only entries written at or after this time count; all if None.
        """
        return epsilon_of(_everything(self.entries(), unit, since), delta)

    def would_spend(
        self,
        event: Event,
        delta: float,
        *,
        told: Unit = "photo",
        unit: Unit = "photo",
        since: datetime | None = None,
    ) -> Bounds:
        """What everything booked and one more event, of a run that promises per `told`, would cost together."""
        before = _everything(self.entries(), unit, since)
        return epsilon_of(compose([before, seen_by(event, told=told, wanted=unit)]), delta)

    def room_for(self, event: Event, limits: Sequence[Limit], *, told: Unit) -> Shortfall | None:
        """Whether everything booked and one more event stay within every limit.

        Args:
            event: What would be released.
            limits: What the owner allows, at least one.
            told: The unit that the event's run promises for.

        Returns:
            None if every limit holds; otherwise the first that does not.

        Raises:
            ValueError: No limit at all was given.
        """
        return self._shortfall(self.entries(), event, limits, told)

    def _shortfall(
        self, entries: Sequence[Entry], event: Event, limits: Sequence[Limit], told: Unit
    ) -> Shortfall | None:
        if not limits:
            raise ValueError("a release needs at least one limit, got none")
        now = self._time()
        for limit in limits:
            since = None if limit.days is None else _before(now, limit.days)
            before = _everything(entries, limit.unit, since)
            asked = seen_by(event, told=told, wanted=limit.unit)
            both = compose([before, asked])
            if not costs_at_most(both, limit.epsilon, limit.delta):
                alone, spent, together = (epsilon_of(e, limit.delta).upper for e in (asked, before, both))
                return Shortfall(limit=limit, asked=alone, spent=spent, together=together)
        return None

    def _time(self) -> datetime:
        """Now, in whole seconds, as entries are dated."""
        return _aware(self._now()).replace(microsecond=0)

    def book(self, event: Event, *, run: str, round: int, marks: Mapping[str, str] | None = None) -> Entry:
        """Write down a release before it is computed; on disk when this returns.

        A round whose reply has been kept is not booked again: its bytes are resent. A round that was booked
        but never answered is not booked again either: a reply is kept before it is sent, so nothing of it has
        left the device, and what never left is no release. A round that was answered and whose bytes were
        dropped since is booked once more: fresh noise on the same photos is a second release.

        Args:
            event: What will be released.
            run: Which run asks. A round that releases two things needs two names: "r7", "r7/evaluation".
            round: Which round, >= 0.
            marks: What identifies the release, such as the model's hash.

        Raises:
            LedgerError: The ledger is damaged, or this round was answered for a different event or marks.
        """
        with self._transaction() as book:
            entry = self._append(book, event, run, round, marks or {})
        self._remember()
        return entry

    def book_within(
        self,
        event: Event,
        limits: Sequence[Limit],
        *,
        run: str,
        round: int,
        marks: Mapping[str, str] | None = None,
    ) -> Entry:
        """Book a release if every limit then holds: price and booking in one transaction.

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
        with self._transaction() as book:
            entries = self._read(book)
            paid = self._paid(book, entries, event, run, round, marks)
            if paid is None:
                shortfall = self._shortfall(entries, event, limits, told)
                if shortfall is not None:
                    raise PolicyRefusal(
                        f"round {round} of {run} asks for {shortfall.in_words()}. "
                        "Ask the owner of this device for a larger budget, or stop here."
                    )
            entry = self._append(book, event, run, round, marks)
        self._remember()
        return entry

    def _answered(self, book: sqlite3.Connection, run: str, round: int) -> int | None:
        """The attempt whose reply to this round is kept, if any."""
        found = book.execute(
            "SELECT attempt FROM replies WHERE run = ? AND round = ? AND body IS NOT NULL", (run, round)
        )
        row = found.fetchone()
        return None if row is None else int(row[0])

    def _paid(
        self, book: sqlite3.Connection, entries: list[Entry], event: Event, run: str, round: int,
        marks: Mapping[str, str],
    ) -> Entry | None:  # fmt: skip
        """The entry that has paid for this release already, if any."""
        said, noted = event_to_json(event), _canonical(marks)
        same = [entry for entry in entries if entry.run == run and entry.round == round]
        answered = self._answered(book, run, round)
        if answered is not None:
            kept = next((entry for entry in same if entry.attempt == answered), None)
            if kept is None:
                raise LedgerError(f"the ledger {self._path} keeps a reply to round {round}, never booked")
            if (kept.event, kept.marks) != (said, noted):
                raise LedgerError(f"round {round} of {run} was answered already, for a different release")
            return kept
        if not same or (same[-1].event, same[-1].marks) != (said, noted):
            return None
        ever = book.execute(
            "SELECT 1 FROM replies WHERE run = ? AND round = ? AND attempt = ?",
            (run, round, same[-1].attempt),
        ).fetchone()
        return same[-1] if ever is None else None

    def _append(
        self, book: sqlite3.Connection, event: Event, run: str, round: int, marks: Mapping[str, str]
    ) -> Entry:
        if round < 0:
            raise ValueError(f"round must be >= 0, got {round}")
        entries = self._read(book)
        paid = self._paid(book, entries, event, run, round, marks)
        if paid is not None:
            return paid
        same = [entry for entry in entries if entry.run == run and entry.round == round]
        entry = Entry.chained(
            number=len(entries) + 1,
            written=_date(self._time(), entries),
            run=run,
            round=round,
            attempt=len(same) + 1,
            event=event_to_json(event),
            marks=_canonical(marks),
            parent=entries[-1].digest if entries else GENESIS,
        )
        book.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", tuple(asdict(entry).values()))
        return entry

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
        with self._transaction() as book:
            same = [entry for entry in self._read(book) if entry.run == run and entry.round == round]
            if not same:
                raise LedgerError(f"round {round} of {run} was never booked; nothing may be sent")
            before = book.execute(
                "SELECT attempt, body FROM replies WHERE run = ? AND round = ?", (run, round)
            ).fetchone()
            paid = same[-1].attempt if attempt is None else attempt
            if before is not None and before[0] >= paid and before[1] != body:
                raise LedgerError(f"round {round} of {run} was answered already; send the kept reply")
            # That a round was answered is remembered for good; its bytes only until the next answer.
            book.execute("UPDATE replies SET body = NULL WHERE run = ?", (run,))
            book.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (run, round, paid, body))

    def stored_reply(self, run: str, round: int) -> bytes | None:
        """The bytes that answered this round; None if it was never answered or they were replaced since."""
        with self._transaction() as book:
            self._read(book)
            found = book.execute(
                "SELECT body FROM replies WHERE run = ? AND round = ? AND body IS NOT NULL", (run, round)
            )
            row = found.fetchone()
        return None if row is None else bytes(row[0])


def _canonical(marks: Mapping[str, str]) -> str:
    return json.dumps(dict(marks), sort_keys=True, separators=(",", ":"))


def _unit(marks: Mapping[str, str]) -> Unit:
    """What the run of a release promises for; entries from before there was a choice mean one photo."""
    for unit in UNITS:
        if marks.get("unit", "photo") == unit:
            return unit
    raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {marks['unit']!r}")


def _aware(time: datetime) -> datetime:
    if time.tzinfo is None:
        raise ValueError(f"a time must know its zone, got {time.isoformat()}")
    return time.astimezone(UTC)


def _before(now: datetime, days: float) -> datetime:
    """Where a period that ends now begins; the beginning of time where it would begin before that."""
    try:
        return now - timedelta(days=days)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _date(now: datetime, entries: Sequence[Entry]) -> str:
    """Now, or the last entry's time if a clock was put back: a period must not lose what was booked late."""
    return max([now, *(_written(entry) for entry in entries[-1:])]).isoformat(timespec="seconds")


def _written(entry: Entry) -> datetime:
    try:
        return _aware(datetime.fromisoformat(entry.written))
    except ValueError as error:
        raise LedgerError(f"entry {entry.number} of the ledger has no date: {error}") from error


def _everything(entries: Sequence[Entry], unit: Unit, since: datetime | None) -> Event:
    """All entries written at or after `since` as one event, as one `unit` sees it."""
    start = None if since is None else _aware(since)
    seen: dict[tuple[str, str], Event] = {}
    kept = [entry for entry in entries if start is None or _written(entry) >= start]
    try:
        for entry in kept:
            if (entry.event, entry.marks) not in seen:
                told = _unit(json.loads(entry.marks))
                event = event_from_json(entry.event)
                seen[entry.event, entry.marks] = seen_by(event, told=told, wanted=unit)
        return compose(seen[entry.event, entry.marks] for entry in kept)
    except (PrivacyError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event that cannot be priced: {error}") from error
