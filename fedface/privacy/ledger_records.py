"""What the records of a device's ledger say: releases booked, computations begun, answers, transmissions, withdrawals.

privacy/hash_chain.py stores each as a kind, the number of the release it belongs to, and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal, get_args

from fedface.errors import LedgerError
from fedface.privacy.hash_chain import Record, in_utc
from fedface.privacy_units import Unit, unit_named

TransmissionKind = Literal["update", "metrics", "update sum", "metrics sum", "refusal"]


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One booked release."""

    KIND: ClassVar = "release"

    number: int  # of its record: 1, 2, 3, ... among all records of the ledger
    written: str  # UTC, ISO 8601
    digest: str  # of its record
    run: str  # which run asked
    round: int  # which of its rounds, >= 0
    attempt: int  # 1, or more if the round was answered before and is computed anew
    event: str  # what was released, see accounting.event_to_json
    metadata: dict[str, str]  # whatever identifies the release (model hash, clip norm, unit)

    @property
    def time(self) -> datetime:
        """When it was written."""
        return in_utc(datetime.fromisoformat(self.written))

    def is_of(self, run: str) -> bool:
        """Whether a run asked for it: what it asks beside its updates is booked under its name and a slash."""
        return self.run == run or self.run.startswith(f"{run}/")

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
    """A computation was begun on a booking."""

    KIND: ClassVar = "attempt"

    number: int
    written: str
    entry: int  # number of the LedgerEntry that pays for it


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A computation was answered; its bytes may be stored, see Ledger.load_reply."""

    KIND: ClassVar = "answer"

    number: int
    written: str
    entry: int  # number of the LedgerEntry that paid for it
    payload_digest: str  # SHA-256 of the bytes


@dataclass(frozen=True, kw_only=True)
class TransmissionInfo:
    """What is known of a payload before it is sent."""

    run: str  # which run asked
    round: int  # which of its rounds, >= 0
    kind: TransmissionKind
    receiver: str  # where it goes: the server's address
    protection: str  # noise, encryption and unit, in words for the owner
    entry: int | None = None  # number of the LedgerEntry that paid; None where it contains nothing of a photo
    reason: str = ""  # why a refusal was given

    def __post_init__(self) -> None:
        if self.kind not in get_args(TransmissionKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(TransmissionKind))}, got {self.kind!r}"
            )
        if self.kind in ("update", "metrics") and self.entry is None:
            raise ValueError(f"{self.kind} of round {self.round} of {self.run} has no entry that paid for it")
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


LedgerRecord = LedgerEntry | Attempt | Answer | Transmission | Withdrawal

_BELONGING = {kind.KIND: kind for kind in (Attempt, Answer, Transmission)}  # to an entry


_parse = json.JSONDecoder().raw_decode  # less work than json.loads, for thousands of records


def decode(record: Record) -> LedgerRecord:
    """What a record says.

    Raises:
        LedgerError: It is of an unknown kind, or lacks something.
    """
    try:
        fields: dict[str, Any] = _parse(record.content)[0]
        if record.kind == LedgerEntry.KIND:
            return LedgerEntry(number=record.number, written=record.written, digest=record.digest, **fields)
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
