"""What a device's ledger records: runs and their releases, computations, replies, transmissions, withdrawals.

privacy/hash_chain.py stores each as a kind, the number of the release it belongs to, and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal, get_args

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.hash_chain import Record, in_utc
from fedface.privacy.plan import DPParameters, RunReleases
from fedface.privacy.releases import event_to_json
from fedface.privacy_units import Unit, unit_named

_METRICS = "/metrics"  # follows a run's name, which has no slash


def metrics_ledger_key(run: str) -> str:
    """The ledger's name for what a run evaluates beside its updates."""
    return run + _METRICS


def run_name(key: str) -> str:
    """The run's name in a name of the ledger."""
    return key.removesuffix(_METRICS)


def is_run_name(key: str) -> bool:
    """Whether a name in the ledger is that of a run, not of its evaluations."""
    return not key.endswith(_METRICS)


# An exchange of a sum has keys, shares of masks and signatures.
TransmissionKind = Literal["update", "metrics", "update sum", "metrics sum", "exchange", "refusal"]


@dataclass(frozen=True, kw_only=True)
class PlannedRound:
    """One round of a run, and everything that the run releases."""

    key: str  # the ledger's name: the run's, or `metrics_ledger_key` of it
    round: int  # from 1
    releases: RunReleases

    @property
    def run(self) -> str:
        """The run's name."""
        return run_name(self.key)

    @property
    def dp(self) -> DPParameters:
        """The DP parameters of the round.

        Raises:
            PolicyRefusal: The run has no such round.
        """
        dp = self.releases.training if self.key == self.run else self.releases.evaluation
        if dp is None or not 1 <= self.round <= dp.schedule.rounds:
            raise PolicyRefusal(
                f"this is round {self.round} of {self.key}, which announces {dp.schedule.rounds if dp else 0}"
            )
        return dp

    def rounds(self) -> dict[str, int]:
        """How many rounds of each kind the run has, by the ledger's name."""
        return {key: dp.schedule.rounds for key, dp in self._parts()}

    def events(self) -> dict[str, str]:
        """What one round of each kind releases, by the ledger's name."""
        return {key: event_to_json(dp.event(1)) for key, dp in self._parts()}

    def _parts(self) -> list[tuple[str, DPParameters]]:
        named = (self.run, self.releases.training), (metrics_ledger_key(self.run), self.releases.evaluation)
        return [(key, dp) for key, dp in named if dp is not None]


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run, recorded as a whole with its first release: its cost does not depend on its later requests."""

    KIND: ClassVar = "run"

    number: int  # of its record
    written: str  # UTC, ISO 8601
    run: str
    unit: Unit
    event: str  # what the whole run releases, see releases.event_to_json
    counted: str  # the unit and delta of the owner's budgets, which stay the same for the life of the ledger
    rounds: dict[str, int]  # of each kind, see PlannedRound
    events: dict[str, str]  # of one round of each kind

    @property
    def time(self) -> datetime:
        """When it was written."""
        return in_utc(datetime.fromisoformat(self.written))

    def is_of(self, run: str) -> bool:
        """Whether it is that run."""
        return self.run == run

    def is_plan_of(self, planned: PlannedRound) -> bool:
        """Whether a round is one of this run as it was recorded."""
        requested = planned.releases.unit, planned.rounds(), planned.events()
        return (self.unit, self.rounds, self.events) == requested


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One recorded release."""

    KIND: ClassVar = "release"

    number: int  # of its record: 1, 2, 3, ... among all records of the ledger
    written: str  # UTC, ISO 8601
    digest: str  # of its record
    run: str  # which run requested it
    round: int  # which of its rounds, >= 0
    attempt: int  # 1, or more if the round is computed anew
    event: str  # what was released, see releases.event_to_json
    metadata: dict[str, str]  # whatever identifies the release (model hash, clip norm, unit)
    covered_by: int | None  # number of the RecordedRun that covers it; None: it is charged by itself

    @property
    def time(self) -> datetime:
        """When it was written."""
        return in_utc(datetime.fromisoformat(self.written))

    @property
    def run_name(self) -> str:
        """The run's name: its metrics are recorded under that and a suffix."""
        return run_name(self.run)

    def is_of(self, run: str) -> bool:
        """Whether it is of a run."""
        return self.run_name == run

    @property
    def unit(self) -> Unit:
        """The privacy unit of its run; a photo where the metadata name none.

        Raises:
            LedgerError: The metadata name a unit that we do not know.
        """
        try:
            return unit_named(self.metadata.get("unit", "photo"))
        except ValueError as error:
            raise LedgerError(f"entry {self.number} of the ledger: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A computation was begun on an entry."""

    KIND: ClassVar = "attempt"

    number: int
    written: str
    entry: int  # number of the LedgerEntry that covers it
    clock: str  # UTC, ISO 8601: what the clock said, which `written` follows only forward


@dataclass(frozen=True, kw_only=True)
class StoredReply:
    """The reply of a computation was stored; see Ledger.load_reply for its bytes."""

    KIND: ClassVar = "reply"

    number: int
    written: str
    entry: int  # number of the LedgerEntry that covers it
    payload_digest: str  # SHA-256 of the bytes


@dataclass(frozen=True, kw_only=True)
class TransmissionInfo:
    """What is known of a payload before it is sent."""

    run: str  # which run requested it
    round: int  # which of its rounds, >= 0
    kind: TransmissionKind
    receiver: str  # where it goes: the server's address
    protection: str  # noise, encryption and unit, in words for the owner
    # Number of the LedgerEntry that covers it; None where it contains nothing of a photo
    entry: int | None = None
    reason: str = ""  # why a refusal was given
    masked: bool = False  # the entry's reply was not sent as it is stored, but under masks

    def __post_init__(self) -> None:
        if self.kind not in get_args(TransmissionKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(TransmissionKind))}, got {self.kind!r}"
            )
        if self.kind in ("update", "metrics") and self.entry is None:
            raise ValueError(f"{self.kind} of round {self.round} of {self.run} has no entry that covers it")
        if self.round < 0:
            raise ValueError(f"round must be >= 0, got {self.round}")


@dataclass(frozen=True, kw_only=True)
class Transmission(TransmissionInfo):
    """One payload that left, or was about to."""

    KIND: ClassVar = "transmission"

    number: int
    written: str
    bytes: int  # how many
    payload_digest: str  # SHA-256 of exactly what left
    resent: bool  # whether the same bytes left before


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """The owner has withdrawn from a run: from here on only refusals are sent to it."""

    KIND: ClassVar = "withdrawal"

    number: int
    written: str
    run: str
    reason: str  # in the owner's words, which stay on the device


Charge = RecordedRun | LedgerEntry  # for life: a whole run, or a release that is not part of a recorded run
LedgerRecord = RecordedRun | LedgerEntry | Attempt | StoredReply | Transmission | Withdrawal

_BELONGING = {kind.KIND: kind for kind in (Attempt, StoredReply, Transmission)}  # to an entry


_parse = json.JSONDecoder().raw_decode  # less work than json.loads, for thousands of records


def decode(record: Record) -> LedgerRecord:
    """The content of a record.

    Raises:
        LedgerError: It is of an unknown kind, or lacks something.
    """
    try:
        fields: dict[str, Any] = _parse(record.content)[0]
        if record.kind == LedgerEntry.KIND:
            return LedgerEntry(
                number=record.number,
                written=record.written,
                digest=record.digest,
                covered_by=record.entry,
                **fields,
            )
        if record.kind == RecordedRun.KIND:
            return RecordedRun(number=record.number, written=record.written, **fields)
        if record.kind == Withdrawal.KIND:
            return Withdrawal(number=record.number, written=record.written, **fields)
        if record.kind in _BELONGING:
            of_kind: Callable[..., LedgerRecord] = _BELONGING[record.kind]
            return of_kind(number=record.number, written=record.written, entry=record.entry, **fields)
    except (ValueError, TypeError) as error:
        raise LedgerError(f"record {record.number} of the ledger cannot be read: {error}") from error
    raise LedgerError(
        f"record {record.number} of the ledger is of an unknown kind {record.kind!r}; update fedface"
    )
