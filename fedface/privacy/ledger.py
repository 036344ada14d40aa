"""The ledger of one device: privacy costs, computations, stored replies, transmissions and withdrawals.

One append-only, hash-chained file on the device's own disk, for the whole life of one photo library. A release is
recorded before it is computed, its reply is stored before it is sent, and each payload is recorded before it leaves.
A repeated request gets the same bytes instead of a second release. A release without a stored reply never left, but the
server sees that no reply came, and the content of the photos may be the cause (a picture that fills the memory). Power
fails too, so `FREE_ATTEMPTS` computations may begin on one entry, and `FREE_RETRIES` beside the first ones in a whole
run; the next one needs a new entry.

A run is recorded as a whole with its first release, and may then request what was recorded and nothing else. Costs are
computed when they are read, see privacy/spending.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedface.errors import LedgerError, PolicyRefusal
from fedface.measurements import Epsilon
from fedface.privacy.budget import Budget, BudgetExceeded
from fedface.privacy.hash_chain import GENESIS, Chain, Clock, Record, Transaction, in_utc, utc_now
from fedface.privacy.ledger_records import (
    Attempt,
    Charge,
    LedgerEntry,
    LedgerRecord,
    PlannedRound,
    RecordedRun,
    StoredReply,
    Transmission,
    TransmissionInfo,
    Withdrawal,
    decode,
    metrics_ledger_key,
    run_name,
)
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters
from fedface.privacy.releases import compose, event_from_json, event_to_json, flatten_event, is_private
from fedface.privacy.spending import (
    ENTRY_LIFETIME,
    Activity,
    charges,
    counted,
    counts_until,
    exceeded,
    fits_alone,
    note_activity,
    price_of,
    price_with,
    rounds_that_fit,
)
from fedface.privacy_units import Unit, unit_named

CACHED_REPLIES = 16  # of the latest runs; bytes of older ones are deleted
FREE_ATTEMPTS = 3  # computations that may begin on one entry before a reply is stored
FREE_RETRIES = 6  # computations of a run that may begin beside the first of each entry

_REPLIES = "CREATE TABLE replies (record INTEGER PRIMARY KEY, run TEXT NOT NULL, body BLOB NOT NULL)"
_EXCHANGES = (
    "CREATE TABLE exchanges (run TEXT NOT NULL, round INTEGER NOT NULL, exchange TEXT NOT NULL, "
    "request BLOB NOT NULL, answer BLOB NOT NULL, PRIMARY KEY (run, round, exchange))"
)
_WORK = "CREATE TABLE work (run TEXT PRIMARY KEY, seconds REAL NOT NULL)"


class LateRelease(PolicyRefusal):
    """What was computed in an earlier period does not fit the one in which it is asked for."""


@dataclass(frozen=True, kw_only=True)
class LedgerSnapshot:
    """A verified ledger at one moment."""

    chain: tuple[Record, ...] = ()  # oldest first
    records: tuple[LedgerRecord, ...] = ()  # the decoded content of each

    @property
    def head(self) -> str:
        """Digest of the newest record."""
        return self.chain[-1].digest if self.chain else GENESIS

    @property
    def entries(self) -> list[LedgerEntry]:
        """Every recorded release."""
        return [record for record in self.records if isinstance(record, LedgerEntry)]

    @property
    def charges(self) -> list[Charge]:
        """What counts for life: whole runs, and releases that are not part of a recorded run."""
        return charges(self.records)

    @property
    def transmissions(self) -> list[Transmission]:
        """Everything that left."""
        return [record for record in self.records if isinstance(record, Transmission)]

    @property
    def log(self) -> list[Transmission | Withdrawal]:
        """What left, and the owner's withdrawals, in order."""
        return [record for record in self.records if isinstance(record, Transmission | Withdrawal)]

    @property
    def withdrawals(self) -> dict[str, str]:
        """The runs that the owner has withdrawn from, and when first, UTC, ISO 8601."""
        when: dict[str, str] = {}
        for record in self.records:
            if isinstance(record, Withdrawal):
                when.setdefault(record.run, record.written)
        return when

    def export(self) -> list[dict[str, object]]:
        """All records as they are chained, their content as JSON values; hash_chain.Record says what is digested."""
        return [{**record._asdict(), "content": json.loads(record.content)} for record in self.chain]


class Ledger:
    """One session on the ledger of one photo library. Safe to use from several threads and processes at once.

    Times are the device's own clock, which is trusted: set forward, it lets entries leave a budget's period early,
    as if the days had passed. Set back, it frees nothing: no record is dated before the one above it, and a period
    that counts back from an earlier now holds more entries, not fewer.
    """

    def __init__(self, chain: Chain, now: Clock) -> None:
        self._chain = chain
        self._now = now
        self._decoded: dict[str, LedgerRecord] = {}  # by digest, hence never stale
        # The chain's verified records, of which the first `_count` are in the lists and mappings below.
        self._indexed: list[Record] = []
        self._count = 0
        self._charges: list[Charge] = []  # for life: runs, and releases that none of them covers
        self._covered: dict[int, list[Record]] = {}  # the releases of a run, by its number
        self._activity: Activity = {}

    @staticmethod
    def open(path: Path | str, witness: Path | None = None, *, now: Clock = utc_now) -> Ledger:
        """Open and verify the ledger at `path`, or create one where there is neither a ledger nor a trace of one.

        Args:
            path: The file; readable by its owner alone, as is its folder if this call created it.
            witness: A folder elsewhere for a second copy of the chain's head, see `Chain.open`.
            now: The clock, which must know its time zone.

        Raises:
            LedgerError: The file is damaged, of another format, was rolled back or replaced, or has gone while its head
                remains; or its witness is missing.
        """
        return Ledger(
            Chain.open(Path(path), witness=witness, now=now, tables=[_REPLIES, _EXCHANGES, _WORK]), now
        )

    def close(self) -> None:
        """End the session and close the file."""
        self._chain.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> LedgerSnapshot:
        """Everything, verified.

        Raises:
            LedgerError: The file was altered, shortened, rolled back or damaged.
        """
        with self._chain.read_transaction() as page:
            return LedgerSnapshot(
                chain=tuple(page.records), records=tuple(self._decode(record) for record in page.records)
            )

    def entries(self) -> list[LedgerEntry]:
        """Every recorded release, oldest first, verified."""
        with self._chain.read_transaction() as page:
            return self._all_entries(page)

    def has_withdrawn(self, run: str) -> bool:
        """Whether the owner has withdrawn from a run."""
        with self._chain.read_transaction() as page:
            return self._withdrawn(page, run)

    def is_recorded(self, run: str, round: int) -> bool:
        """Whether a release of this round was recorded, with a stored reply or without."""
        with self._chain.read_transaction() as page:
            return bool(self._entries_of(page, run, round))

    def spent(self, delta: float, *, unit: Unit = "photo") -> Epsilon:
        """The cost of everything recorded, for one unit, priced anew.

        Args:
            delta: Where epsilon is read.
            unit: The privacy unit; runs with another one are converted, see adjacency.py.
        """
        with self._chain.read_transaction() as page:
            self._index(page)
            charged = list(self._charges)
        return price_of(charged, delta=delta, unit=unit)

    def spent_against(self, budget: Budget) -> Epsilon:
        """What counts against a budget now."""
        return price_of(self._charged(budget), delta=budget.delta, unit=budget.unit)

    def price(self, event: Event, budget: Budget, *, run_unit: Unit) -> tuple[Epsilon, Epsilon, Epsilon]:
        """What one more event, of a run with `run_unit`, would cost against a budget: alone, so far, and together."""
        return price_with(self._charged(budget), event, budget, run_unit=run_unit)

    def check_budget(
        self, event: Event, budgets: Sequence[Budget], *, run_unit: Unit
    ) -> BudgetExceeded | None:
        """Whether everything recorded and one more event stay within every budget.

        Args:
            event: What would be released.
            budgets: What the owner allows, at least one.
            run_unit: The privacy unit of the event's run.

        Returns:
            None if every budget holds; otherwise the first that does not.

        Raises:
            LedgerError: A record cannot be priced.
        """
        found = (exceeded(self._charged(budget), event, budget, run_unit=run_unit) for budget in budgets)
        return next((short for short in found if short is not None), None)

    def check_round(self, planned: PlannedRound, budgets: Sequence[Budget]) -> BudgetExceeded | None:
        """Whether a round of a run may be recorded: whether its run fits for life, and the round into each period.

        Returns:
            None if every budget holds, or the round is recorded already; otherwise the first budget that does not.

        Raises:
            PolicyRefusal: The run was recorded with other releases, or has no such round.
            LedgerError: A record cannot be priced.
        """
        with self._chain.read_transaction() as page:
            self._check_counted(page, budgets)
            self._recorded_run(page, planned)
            if self._entries_of(page, planned.key, planned.round):
                return None
            return self._exceeded(page, planned, budgets, again=False)

    def _new_charge(self, page: Transaction, planned: PlannedRound, *, again: bool) -> Event:
        """The charge of a round for life: its run, itself alone if it is computed `again`, or nothing."""
        if self._recorded_run(page, planned) is None:
            return planned.releases.event()
        return compose([planned.dp.event(1)] if again else [])

    def _exceeded(
        self, page: Transaction, planned: PlannedRound, budgets: Sequence[Budget], *, again: bool
    ) -> BudgetExceeded | None:
        """The first budget that a round exceeds, with what it adds for life, and to each period.

        A recorded run is still refused where its owner has lowered the budget since.
        """
        unit = planned.releases.unit
        new = self._new_charge(page, planned, again=again)
        for budget in budgets:
            charged = self._charged_now(page, budget)
            event = new if budget.days is None else self._in_period(planned, charged, budget, again=again)
            short = exceeded(charged, event, budget, run_unit=unit)
            if short is not None:
                return short
        return None

    def _in_period(
        self, planned: PlannedRound, charged: Sequence[Charge], budget: Budget, *, again: bool
    ) -> Event:
        """The charge of a round in a period: its whole run, once, if that fits the period; otherwise itself alone."""
        whole = planned.releases.event()
        if again or not fits_alone(whole, planned.releases.unit, budget):
            return planned.dp.event(1)
        there = any(isinstance(charge, RecordedRun) and charge.run == planned.run for charge in charged)
        return compose([] if there else [whole])

    def began_within(self, period: timedelta, now: datetime) -> bool:
        """Whether the last computation began less than a period ago, by the clock at both times.

        One in the future counts if it is nearer than the period: the clock may have been set back since. A clock that
        was far ahead must not stop a device until then.
        """
        with self._chain.read_transaction() as page:
            latest = next((record for record in reversed(page.records) if record.kind == Attempt.KIND), None)
        if latest is None:
            return False
        attempt = self._decode(latest)
        assert isinstance(attempt, Attempt)
        return abs(in_utc(now) - in_utc(datetime.fromisoformat(attempt.clock))) < period

    def rounds_that_fit(self, dp: DPParameters, budget: Budget) -> int:
        """How many rounds of a new run a budget has room for now: as one run, or one by one in a period."""
        return rounds_that_fit(self._charged(budget), dp, budget)

    @property
    def clock(self) -> Clock:
        """By which records are dated."""
        return self._now

    def _time(self) -> datetime:
        """Now, in whole seconds, as records are dated."""
        return in_utc(self._now()).replace(microsecond=0)

    def record(
        self, event: Event, *, run: str, round: int, metadata: Mapping[str, str] | None = None
    ) -> LedgerEntry:
        """Record a release outside a planned run before it is computed; on disk when this returns.

        No budget is checked. A round whose reply is stored is not recorded again: its bytes are resent. A round
        without a stored reply is not recorded again either, until `FREE_ATTEMPTS` of its computations were begun: a
        reply is stored before it is sent, so none has left the device, but the failure may have been observed. A round
        whose stored bytes were deleted is recorded once more: fresh noise on the same photos is a second release.

        Args:
            event: What will be released.
            run: Which run requests it. A round that releases two things needs two names: "r7", "r7/evaluation".
            round: Which round, >= 0.
            metadata: What identifies the release, such as the model's hash; "unit" is the privacy unit of its run,
                a photo if there is none.

        Raises:
            LedgerError: The ledger is damaged, or this round has a reply for another event or metadata.
            ValueError: The round is negative, or the unit unknown.
        """
        with self._chain.write_transaction() as page:
            covering = self._covering_entry(page, event, run, round, metadata or {})
            return covering or self._append_entry(page, event, run, round, metadata or {})

    def record_round(
        self, planned: PlannedRound, budgets: Sequence[Budget], *, metadata: Mapping[str, str] | None = None
    ) -> LedgerEntry:
        """Record a round of a run if every budget then holds: check and record in one transaction.

        With the first round the whole run is recorded, which covers later rounds. A round that is computed again, with
        fresh noise, is a release beside the run, charged by itself. An entry without a reply within `ENTRY_LIFETIME`
        no longer counts in a period, so that periods are checked again before it is computed.

        Args:
            planned: The round, and everything that its run releases.
            budgets: What the owner allows, at least one.
            metadata: As for `record`; "unit" follows from the run.

        Raises:
            PolicyRefusal: A budget would be exceeded, the run was recorded with other releases, or has no such round.
            LedgerError: As for `record`.
            ValueError: No budget at all was given.
        """
        metadata = {**(metadata or {}), "unit": planned.releases.unit}
        if not budgets:
            raise ValueError("a release needs at least one limit, got none")
        event, key, round = planned.dp.event(1), planned.key, planned.round
        with self._chain.write_transaction() as page:
            self._check_counted(page, budgets)
            run = self._recorded_run(page, planned)
            covering = self._covering_entry(page, event, key, round, metadata)
            if covering is not None and not self._has_expired(covering):
                return covering
            again = covering is None and bool(self._entries_of(page, key, round))
            short = self._exceeded(page, planned, budgets, again=again)
            if short is not None:
                raise PolicyRefusal(
                    f"round {round} of {key} requests {short.describe()}",
                    advice="Ask the owner of this device for a larger budget, or stop here.",
                )
            if covering is not None:
                return covering
            number = None if run is None else run.number
            if number is None:
                content = {
                    "run": planned.run,
                    "unit": planned.releases.unit,
                    "event": event_to_json(planned.releases.event()),
                    "counted": _counted(budgets),
                    "rounds": planned.rounds(),
                    "events": planned.events(),
                }
                number = page.append(RecordedRun.KIND, content).number
            return self._append_entry(page, event, key, round, metadata, covered_by=None if again else number)

    def _has_expired(self, entry: LedgerEntry) -> bool:
        """Whether an entry has had no reply for longer than `ENTRY_LIFETIME`."""
        _, replied = latest = self._activity[entry.number]
        return not replied and self._time() > counts_until(latest)

    def _covering_entry(
        self, page: Transaction, event: Event, run: str, round: int, metadata: Mapping[str, str]
    ) -> LedgerEntry | None:
        """The entry that covers this release already, if any."""
        entries = self._entries_of(page, run, round)
        same = (event_to_json(event), dict(metadata))
        if (reply := self._cached_reply(page, run, round)) is not None:
            if (reply[0].event, reply[0].metadata) != same:
                raise LedgerError(f"round {round} of {run} has a reply already, for a different release")
            return reply[0]
        if not entries or (entries[-1].event, entries[-1].metadata) != same:
            return None
        last = entries[-1]
        used = self._stored_reply(page, [last]) is not None or self._is_used_up(page, last)
        return None if used else last

    def _append_entry(
        self,
        page: Transaction,
        event: Event,
        run: str,
        round: int,
        metadata: Mapping[str, str],
        *,
        covered_by: int | None = None,
    ) -> LedgerEntry:
        if round < 0:
            raise ValueError(f"round must be >= 0, got {round}")
        unit_named(metadata.get("unit", "photo"))  # an unknown unit could not be priced later
        content = {
            "run": run,
            "round": round,
            "attempt": len(self._entries_of(page, run, round)) + 1,
            "event": event_to_json(event),
            "metadata": dict(metadata),
        }
        entry = self._decode(page.append(LedgerEntry.KIND, content, entry=covered_by))
        assert isinstance(entry, LedgerEntry)
        return entry

    def record_attempt(self, run: str, round: int, *, attempt: int) -> None:
        """Record that a recorded release is computed now; on disk when this returns, then open the photos.

        Args:
            attempt: Of the entry that covers it, as `record` returned it.

        Raises:
            LedgerError: There is no such entry, it has its reply, or its computations are used up.
        """
        with self._chain.write_transaction() as page:
            entries = self._entries_of(page, run, round)
            if not 1 <= attempt <= len(entries):
                raise LedgerError(f"round {round} of {run} was never recorded; no photo may be opened for it")
            if self._stored_reply(page, entries[attempt - 1 :]) is not None:
                raise LedgerError(f"round {round} of {run} has a reply already; send the stored one")
            if self._is_used_up(page, entries[attempt - 1]):
                begun = _attempts(page, entries[attempt - 1])
                raise LedgerError(
                    f"round {round} of {run} was begun {begun} times without a reply, and no repetition is free any "
                    "more; the next request needs a new entry"
                )
            clock = self._time().isoformat(timespec="seconds")
            page.append(Attempt.KIND, {"clock": clock}, entry=entries[attempt - 1].number)

    def store_reply(self, run: str, round: int, body: bytes, *, attempt: int | None = None) -> None:
        """Store the reply to a recorded round; the run's reply before is deleted.

        Each entry covers one reply: of two computations that ran side by side, only the first is stored.

        Args:
            body: What may be sent once this returns.
            attempt: Of the entry that covers it, as `record` returned it; the latest if None.

        Raises:
            LedgerError: The round was never recorded, that entry, or a later one of the round, has a different reply
                already, or the reply comes later than `ENTRY_LIFETIME`.
        """
        with self._chain.write_transaction() as page:
            entries = self._entries_of(page, run, round)
            number = len(entries) if attempt is None else attempt
            if not 1 <= number <= len(entries):
                raise LedgerError(f"round {round} of {run} was never recorded; nothing may be sent")
            if self._stored_reply(page, entries[number - 1 :]) is not None:
                stored = self._cached_reply(page, run, round)
                if stored is None or stored[1] != body:
                    raise LedgerError(f"round {round} of {run} has a reply already; send the stored one")
                return
            if self._has_expired(entries[number - 1]):
                raise LedgerError(
                    f"round {round} of {run} was computed for more than {ENTRY_LIFETIME.days} day; nothing is sent"
                )
            reply = page.append(
                StoredReply.KIND, {"payload_digest": _sha256(body)}, entry=entries[number - 1].number
            )
            page.sql.execute("DELETE FROM replies WHERE run = ?", (run,))
            page.sql.execute("DELETE FROM exchanges WHERE run = ?", (run,))
            page.sql.execute("INSERT INTO replies VALUES (?, ?, ?)", (reply.number, run, body))
            # A server that names a new run each time must not fill the disk.
            page.sql.execute(
                "DELETE FROM replies WHERE record NOT IN (SELECT record FROM replies ORDER BY record DESC LIMIT ?)",
                (CACHED_REPLIES,),
            )
            page.sql.execute("DELETE FROM exchanges WHERE run NOT IN (SELECT run FROM replies)")

    def load_reply(self, run: str, round: int) -> bytes | None:
        """The stored reply to this round; None if there is none or its bytes were deleted since."""
        reply = self.load_release(run, round)
        return None if reply is None else reply[1]

    def load_release(self, run: str, round: int) -> tuple[LedgerEntry, bytes] | None:
        """The same with the release that it is the reply of."""
        with self._chain.read_transaction() as page:
            return self._cached_reply(page, run, round)

    def delete_replies(self, *runs: str) -> int:
        """Delete the stored bytes of some runs, or of all, and overwrite them on disk; entries stay.

        A round whose bytes were deleted is recorded anew if it is requested again.

        Returns:
            How many replies were deleted.
        """
        with self._chain.write_transaction() as page:
            where = f" WHERE run IN ({', '.join('?' * len(runs))})" if runs else ""
            page.sql.execute(f"DELETE FROM exchanges{where}", runs)
            return page.sql.execute(f"DELETE FROM replies{where}", runs).rowcount

    def exchanges(self, run: str, round: int) -> dict[str, tuple[bytes, bytes]]:
        """What was asked in each exchange of the sum of this round, and what was answered."""
        with self._chain.read_transaction() as page:
            rows = page.sql.execute(
                "SELECT exchange, request, answer FROM exchanges WHERE run = ? AND round = ?", (run, round)
            ).fetchall()
        return {exchange: (bytes(request), bytes(answer)) for exchange, request, answer in rows}

    def store_exchange(
        self,
        run: str,
        round: int,
        exchange: str,
        request: bytes,
        answer: bytes,
        *,
        closed: bytes | None = None,
    ) -> None:
        """Store an exchange of a sum; on disk when this returns, then answer it.

        Args:
            closed: Replaces the stored reply, which is overwritten on disk; None: it stays.

        Raises:
            LedgerError: It was asked and answered before, or there is no stored reply.
        """
        with self._chain.write_transaction() as page:
            stored = self._cached_reply(page, run, round)
            known = "SELECT 1 FROM exchanges WHERE run = ? AND round = ? AND exchange = ?"
            if stored is None or page.sql.execute(known, (run, round, exchange)).fetchone():
                raise LedgerError(
                    f"the exchange {exchange} of round {round} of {run} was answered before, or has no reply"
                )
            row = (run, round, exchange, request, answer)
            page.sql.execute("INSERT INTO exchanges VALUES (?, ?, ?, ?, ?)", row)
            if closed is not None and closed != stored[1]:
                content = {"payload_digest": _sha256(closed)}
                reply = page.append(StoredReply.KIND, content, entry=stored[0].number)
                page.sql.execute("DELETE FROM replies WHERE run = ?", (run,))
                page.sql.execute("INSERT INTO replies VALUES (?, ?, ?)", (reply.number, run, closed))

    def store_work_seconds(self, run: str, seconds: float) -> None:
        """Store how long a round of a run takes at most, as measured without photos; not part of the record."""
        with self._chain.write_transaction() as page:
            page.sql.execute("INSERT OR REPLACE INTO work VALUES (?, ?)", (run, seconds))

    def work_seconds(self, run: str) -> float | None:
        """The stored seconds; None if there are none."""
        with self._chain.read_transaction() as page:
            row = page.sql.execute("SELECT seconds FROM work WHERE run = ?", (run,)).fetchone()
        return None if row is None else float(row[0])

    def record_transmission(
        self, payload: bytes, info: TransmissionInfo, budgets: Sequence[Budget] = ()
    ) -> Transmission:
        """Record what is about to leave; send it once this has returned, within `ENTRY_LIFETIME`, and only then.

        A period counts an entry from when it last left. One that is so old that a period no longer counts it leaves
        only if it fits that period anew: a masked vector waits on the device until the server asks for it.

        Args:
            payload: Exactly what will be sent.
            info: For which round, where to, how protected, and which entry covers it.
            budgets: What the owner allows; only periods matter here.

        Returns:
            The record. The same bytes for the same round are a record again, which says that they were resent.

        Raises:
            LateRelease: A period has no room for an entry that it no longer counts; nothing may be sent.
            PolicyRefusal: The owner has withdrawn from this run, and this is not a refusal; nothing may be sent.
            LedgerError: The ledger cannot be trusted or written, or the entry does not cover this; nothing may be
                sent.
        """
        digest = _sha256(payload)
        with self._chain.write_transaction() as page:
            if info.kind != "refusal" and self._withdrawn(page, info.run):
                raise PolicyRefusal(
                    f"the owner of this device has withdrawn from {info.run}; nothing of it is sent"
                )
            if info.entry is not None:
                self._check_covered(page, info, digest)
                self._check_periods(page, info.entry, budgets)
            content = {
                **{key: value for key, value in asdict(info).items() if key != "entry"},
                "bytes": len(payload),
                "payload_digest": digest,
                "resent": self._was_sent(page, info, digest),
            }
            sent = self._decode(page.append(Transmission.KIND, content, entry=info.entry))
            assert isinstance(sent, Transmission)
            return sent

    def _was_sent(self, page: Transaction, info: TransmissionInfo, digest: str) -> bool:
        """Whether the same bytes left for the same round before."""
        same = (self._decode(record) for record in page.records if digest in record.content)
        return any(
            isinstance(sent, Transmission)
            and (sent.run, sent.round, sent.kind) == (info.run, info.round, info.kind)
            for sent in same
        )

    def _check_covered(self, page: Transaction, info: TransmissionInfo, digest: str) -> None:
        """Raises LedgerError unless the entry is of this round and this payload is its stored reply."""
        number = info.entry or 0
        entry = self._decode(page.records[number - 1]) if 1 <= number <= len(page.records) else None
        if not isinstance(entry, LedgerEntry) or entry.round != info.round or not entry.is_of(info.run):
            raise LedgerError(
                f"entry {info.entry} of the ledger does not cover round {info.round} of {info.run}"
            )
        reply = self._stored_reply(page, [entry])
        if reply is None or (reply.payload_digest != digest and not info.masked):
            raise LedgerError(f"entry {info.entry} of the ledger has another reply than this payload")

    def _check_periods(self, page: Transaction, number: int, budgets: Sequence[Budget]) -> None:
        """Raises LateRelease if the release of an entry may not leave now.

        Where a period does not count it any more, it must fit anew; where it is counted and has never left, what is
        counted must fit, since the owner may have changed the periods. Releases without noise have no price.
        """
        entry = self._decode(page.records[number - 1])
        assert isinstance(entry, LedgerEntry)
        if not is_private(event_from_json(entry.event)):
            return
        run = next((run for run in self._runs(page) if run.number == entry.covered_by), None)
        for budget in budgets:
            if budget.days is None:
                continue
            charged = self._charged_now(page, budget)
            if not any(charge.number in (entry.number, entry.covered_by) for charge in charged):
                whole = run is not None and fits_alone(event_from_json(run.event), run.unit, budget)
                charge: Charge = run if run is not None and whole else entry
                event, unit = event_from_json(charge.event), charge.unit
            elif self._has_left(page, number):
                continue
            else:
                event, unit = compose([]), entry.unit
            short = exceeded(charged, event, budget, run_unit=unit)
            if short is not None:
                late = (
                    "was computed in an earlier period; to send it now"
                    if flatten_event(event)
                    else "waits with others, and the owner's periods have become smaller; it"
                )
                raise LateRelease(
                    f"round {entry.round} of {entry.run} {late} requests {short.describe()}",
                    advice="Try again later.",
                )

    def check_may_leave(self, entry: LedgerEntry, budgets: Sequence[Budget]) -> None:
        """Raises LateRelease if the release of an entry does not fit the owner's periods now; nothing is recorded."""
        with self._chain.read_transaction() as page:
            self._check_periods(page, entry.number, budgets)

    def has_left(self, entry: LedgerEntry) -> bool:
        """Whether the release of an entry was recorded as sent."""
        with self._chain.read_transaction() as page:
            return self._has_left(page, entry.number)

    def _has_left(self, page: Transaction, number: int) -> bool:
        later = page.records[number:]
        return any(record.kind == Transmission.KIND and record.entry == number for record in later)

    def withdraw(self, run: str, reason: str = "") -> Withdrawal:
        """Leave a run for good; once this has returned, nothing but refusals is recorded for it, hence sent."""
        with self._chain.write_transaction() as page:
            withdrawal = self._decode(page.append(Withdrawal.KIND, {"run": run, "reason": reason}))
            assert isinstance(withdrawal, Withdrawal)
            return withdrawal

    def _decode(self, record: Record) -> LedgerRecord:
        if record.digest not in self._decoded:
            self._decoded[record.digest] = decode(record)
        return self._decoded[record.digest]

    def _index(self, page: Transaction) -> None:
        """Sort the records that are new since the last call; releases that a run covers are not decoded."""
        if self._indexed is not page.records:
            self._indexed, self._count = page.records, 0
            self._charges, self._covered, self._activity = [], {}, {}
        for record in page.records[self._count :]:
            kind, entry = record.kind, record.entry
            note_activity(self._activity, kind, record.number, entry, record.written)
            if kind == LedgerEntry.KIND and entry is not None:
                self._covered.setdefault(entry, []).append(record)
            elif kind in (RecordedRun.KIND, LedgerEntry.KIND):
                charge = self._decode(record)
                assert isinstance(charge, RecordedRun | LedgerEntry)
                self._charges.append(charge)
        self._count = len(page.records)

    def _runs(self, page: Transaction) -> list[RecordedRun]:
        self._index(page)
        return [charge for charge in self._charges if isinstance(charge, RecordedRun)]

    def _all_entries(self, page: Transaction, run: str | None = None) -> list[LedgerEntry]:
        """Every release, oldest first; with `run`, only those with this name."""
        numbers = [known.number for known in self._runs(page) if run is None or known.is_of(run_name(run))]
        covered = (self._decode(record) for number in numbers for record in self._covered.get(number, []))
        entries = [entry for entry in (*self._charges, *covered) if isinstance(entry, LedgerEntry)]
        return sorted((e for e in entries if run in (None, e.run)), key=lambda entry: entry.number)

    def _charged(self, budget: Budget) -> list[Charge]:
        with self._chain.read_transaction() as page:
            return self._charged_now(page, budget)

    def _charged_now(self, page: Transaction, budget: Budget) -> list[Charge]:
        """What counts against a budget now; a period depends on every release, also of runs."""
        runs = self._runs(page)
        records: list[Charge] = self._charges if budget.days is None else [*runs, *self._all_entries(page)]
        return counted(records, budget, self._time(), self._activity)

    def _recorded_run(self, page: Transaction, planned: PlannedRound) -> RecordedRun | None:
        """The record of a round's run, if there is one.

        Raises:
            PolicyRefusal: It was recorded with other releases.
        """
        recorded = next((run for run in self._runs(page) if run.run == planned.run), None)
        if recorded is not None and not recorded.is_plan_of(planned):
            raise PolicyRefusal(
                f"{planned.run} was recorded with other noise, rates or rounds than it requests now",
                advice="A change is a new run: start it under another name.",
            )
        return recorded

    def _check_counted(self, page: Transaction, budgets: Sequence[Budget]) -> None:
        """Raises LedgerError where budgets count another unit or delta than the first run was recorded with.

        Otherwise a delta of 1e-2 would admit what 1e-5 refuses.
        """
        first = next(iter(self._runs(page)), None)
        if first is not None and budgets and first.counted != _counted(budgets):
            raise LedgerError(
                f"the policy counts {_counted(budgets)}; this ledger counts {first.counted} since {first.written}, "
                "and both stay the same for the life of a library. Write the old ones into the policy"
            )

    def _withdrawn(self, page: Transaction, run: str) -> bool:
        found = (self._decode(record) for record in page.records if record.kind == Withdrawal.KIND)
        return any(isinstance(record, Withdrawal) and record.run == run for record in found)

    def _entries_of(self, page: Transaction, run: str, round: int) -> list[LedgerEntry]:
        """Every attempt at a round, oldest first."""
        return [entry for entry in self._all_entries(page, run) if entry.round == round]

    def _stored_reply(self, page: Transaction, entries: Sequence[LedgerEntry]) -> StoredReply | None:
        """The latest stored reply of some entries."""
        numbers = {entry.number for entry in entries}
        first = min(numbers, default=len(page.records))
        for record in reversed(page.records[first:]):
            if record.kind == StoredReply.KIND and record.entry in numbers:
                reply = self._decode(record)
                return reply if isinstance(reply, StoredReply) else None
        return None

    def _cached_reply(self, page: Transaction, run: str, round: int) -> tuple[LedgerEntry, bytes] | None:
        """The entry of the latest reply to a round, and its bytes; None if there are none."""
        entries = self._entries_of(page, run, round)
        reply = self._stored_reply(page, entries)
        if reply is None:
            return None
        row = page.sql.execute("SELECT body FROM replies WHERE record = ?", (reply.number,)).fetchone()
        if row is None:
            return None
        if _sha256(row[0]) != reply.payload_digest:
            raise LedgerError(
                f"the ledger {self._chain.path} was altered: the reply to round {round} of {run} is another"
            )
        return next(entry for entry in entries if entry.number == reply.entry), bytes(row[0])

    def _is_used_up(self, page: Transaction, entry: LedgerEntry) -> bool:
        """Whether no further computation may begin on an entry without a reply."""
        begun = _attempts(page, entry)
        return begun >= FREE_ATTEMPTS or (begun > 0 and self._retries(page, entry.run) >= FREE_RETRIES)

    def _retries(self, page: Transaction, run: str) -> int:
        """How many computations of a run, training and evaluation, were begun beside the first of each entry."""
        name = run_name(run)
        keys = (name, metrics_ledger_key(name))
        entries = {entry.number for key in keys for entry in self._all_entries(page, key)}
        begun = [
            record.entry for record in page.records if record.kind == Attempt.KIND and record.entry in entries
        ]
        return len(begun) - len(set(begun))


def _attempts(page: Transaction, entry: LedgerEntry) -> int:
    """How many computations were begun on one entry."""
    later = page.records[entry.number :]
    return sum(record.kind == Attempt.KIND and record.entry == entry.number for record in later)


def _counted(budgets: Sequence[Budget]) -> str:
    """The unit and delta of an owner's budgets, which share them."""
    return f"per {budgets[0].unit} at delta {budgets[0].delta!r}"


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
