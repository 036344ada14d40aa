"""What left this device and what its owner decided about runs, in the order it happened: one chained file.

Called from device/client.py, which notes a reply before it is sent, and by the owner's commands. What was
noted may not have arrived; what arrived was noted. The file has the guarantees of privacy/hash_chain.py: nothing
in it changes, every reading verifies it and its head, and a line is on disk when its call returns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.hash_chain import Chain, ChainSchema, Clock, Record, Transaction, utc_now

TransmissionKind = Literal["update", "figures", "opened sum", "refusal"]
RESENT = "sent again"
OF_FIGURES = "of figures"  # said of an opened sum

FORM = ChainSchema(noun="journal", table="lines", columns=("kind TEXT NOT NULL", "said TEXT NOT NULL"))


@dataclass(frozen=True, kw_only=True)
class Transmission:
    """One reply that left, or was about to."""

    number: int  # 1, 2, 3, ... among all lines of the journal
    time_text: str  # UTC, ISO 8601
    run: str  # which run asked
    round: int  # which of its rounds
    kind: TransmissionKind
    receiver: str  # where it went: the server's address
    bytes: int  # how many
    protection: str  # noise, encryption and unit, in words for the owner
    digest_of_payload: str  # SHA-256 of exactly what left
    entry: int | None  # number of the ledger entry that paid; None where nothing of a photo is in it
    reason: str  # what else the owner should know; begins with "sent again" if the same bytes left before


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """The owner has left a run: nothing of it leaves from here on, except that this is said."""

    number: int  # among all lines of the journal
    time_text: str  # UTC, ISO 8601
    run: str
    reason: str  # in the owner's words, which stay on the device


class TransmissionLog:
    """The book of what left one device. Safe to use from several threads and processes at once."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    @staticmethod
    def open(path: Path | str, witness: Path | None = None, *, now: Clock = utc_now) -> TransmissionLog:
        """Open the journal at `path`, or begin one where there is neither a journal nor a trace of one.

        Args:
            path: The file; readable by its owner alone, as is its folder if this call made it.
            witness: A folder elsewhere for a second copy of the chain's head, see `Chain.open`.
            now: The clock, which must know its time zone.

        Raises:
            LedgerError: The file is damaged, was rolled back or replaced, or has gone while its head remains; or
                its witness is missing.
        """
        return TransmissionLog(Chain.open(Path(path), FORM, witness=witness, now=now))

    def record_transmission(
        self, payload: bytes, *, run: str, round: int, what: TransmissionKind, receiver: str, protection: str,
        entry: int | None, words: str = "",
    ) -> Transmission:  # fmt: skip
        """Write down what is about to leave; send it once this has returned, and only then.

        Args:
            payload: Exactly what will be sent.
            run: Which run asked.
            round: Which round, >= 0.
            what: An update, figures, the sum of several devices, or a refusal.
            receiver: Where it goes.
            protection: Noise, encryption and unit, in words for the owner.
            entry: Number of the ledger entry that paid; updates and figures need one.
            words: What else the owner should know, such as why it was refused.

        Returns:
            The line. The same bytes for the same round are a line again, whose words begin with "sent again".

        Raises:
            PolicyRefusal: The owner has left this run meanwhile, and this is no refusal; nothing may be sent.
            LedgerError: The journal cannot be trusted or written; nothing may be sent.
            ValueError: An update or figures without the entry that paid.
        """
        if what not in get_args(TransmissionKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(TransmissionKind))}, got {what!r}")
        if round < 0:
            raise ValueError(f"round must be >= 0, got {round}")
        if entry is None and what in ("update", "figures"):
            raise ValueError(f"{what} of round {round} of {run} left without a ledger entry that paid for it")
        digest = hashlib.sha256(payload).hexdigest()
        with self._chain.write_transaction() as page:
            before = _lines(page)
            if what != "refusal" and any(isinstance(line, Withdrawal) and line.run == run for line in before):
                raise PolicyRefusal(f"the owner of this device has left {run}; nothing of it is sent")
            same = (run, round, what, digest)
            if any(
                isinstance(line, Transmission)
                and (line.run, line.round, line.kind, line.digest_of_payload) == same
                for line in before
            ):
                words = f"{RESENT}: {words}" if words else RESENT
            said: Mapping[str, object] = {
                "run": run, "round": round, "kind": what, "receiver": receiver, "bytes": len(payload),
                "protection": protection, "digest_of_payload": digest, "entry": entry, "reason": words,
            }  # fmt: skip
            return cast(Transmission, _line(page.append("sent", _canonical(said))))

    def withdraw(self, run: str, why: str = "") -> Withdrawal:
        """Leave a run for good; once this has returned, nothing of it is noted, hence nothing leaves."""
        with self._chain.write_transaction() as page:
            said = {"run": run, "reason": why}
            return cast(Withdrawal, _line(page.append("withdrawn", _canonical(said))))

    def records(self) -> list[Transmission | Withdrawal]:
        """Everything, oldest first, verified."""
        with self._chain.read_transaction() as page:
            return _lines(page)

    def transmissions(self) -> list[Transmission]:
        """What left, oldest first."""
        return [line for line in self.records() if isinstance(line, Transmission)]

    def withdrawals(self) -> dict[str, str]:
        """The runs that the owner has left, and when first, UTC, ISO 8601."""
        when: dict[str, str] = {}
        for line in self.records():
            if isinstance(line, Withdrawal):
                when.setdefault(line.run, line.time_text)
        return when

    def has_withdrawn(self, run: str) -> bool:
        """Whether the owner has left a run."""
        return run in self.withdrawals()

    def export(self) -> list[dict[str, str | int | None]]:
        """All lines as plain dicts, for the owner to read or keep; "line" says which kind each is."""
        return [
            {"line": "sent" if isinstance(line, Transmission) else "withdrawn", **asdict(line)}
            for line in self.records()
        ]

    def verify(self) -> None:
        """Check every line, the chain and its heads.

        Raises:
            LedgerError: The file was altered, shortened, rolled back or damaged.
        """
        self.records()


def _lines(page: Transaction) -> list[Transmission | Withdrawal]:
    return [_line(line) for line in page.lines]


def _line(line: Record) -> Transmission | Withdrawal:
    kind, said = line.values
    try:
        fields: dict[str, Any] = json.loads(str(said))
        if kind == "sent":
            return Transmission(number=line.number, time_text=line.written, **fields)
        if kind == "withdrawn":
            return Withdrawal(number=line.number, time_text=line.written, **fields)
    except (ValueError, TypeError) as error:
        raise LedgerError(f"line {line.number} of the journal cannot be read: {error}") from error
    raise LedgerError(f"line {line.number} of the journal is of an unknown kind {kind!r}; update fedface")


def _canonical(said: Mapping[str, object]) -> str:
    return json.dumps(said, sort_keys=True, separators=(",", ":"))
