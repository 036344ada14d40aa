"""The journal says everything that left, before it leaves, and lets nothing leave of a run that its owner has left."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import sqlite3
import stat
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.transmission_log import Transmission, TransmissionKind, TransmissionLog, Withdrawal

UPDATE: dict[str, Any] = {
    "run": "r",
    "round": 1,
    "what": "update",
    "receiver": "server.example:9092",
    "protection": "noise multiplier 1, encrypted",
    "entry": 1,
}
REFUSAL: dict[str, Any] = {
    **UPDATE,
    "what": "refusal",
    "protection": "nothing of a photo is in it",
    "entry": None,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def journal(path: Path, tmp_path: Path) -> TransmissionLog:
    return TransmissionLog.open(path, tmp_path / "disk")


def test_a_new_journal_is_empty(journal: TransmissionLog) -> None:
    assert journal.transmissions() == [] and journal.withdrawals() == {} and journal.export() == []


def test_a_line_says_what_left_to_whom_how_large_how_protected_and_who_paid(
    journal: TransmissionLog, path: Path
) -> None:
    noted = journal.record_transmission(b"payload", **UPDATE, words="the first round")
    (sent,) = TransmissionLog.open(path).transmissions()
    assert sent == noted and sent.number == 1
    assert (sent.run, sent.round, sent.kind, sent.receiver) == ("r", 1, "update", "server.example:9092")
    assert (sent.bytes, sent.digest_of_payload) == (7, hashlib.sha256(b"payload").hexdigest())
    assert (sent.entry, sent.protection) == (1, "noise multiplier 1, encrypted")
    assert sent.reason == "the first round"


def test_the_same_bytes_are_a_line_again_and_called_so(journal: TransmissionLog) -> None:
    for words in ("", "asked twice", ""):
        journal.record_transmission(b"payload", **UPDATE, words=words)
    journal.record_transmission(b"payload", **{**UPDATE, "round": 2})
    assert [line.reason for line in journal.transmissions()] == [
        "",
        "sent again: asked twice",
        "sent again",
        "",
    ]


def test_a_refusal_needs_no_entry_and_an_update_does(journal: TransmissionLog) -> None:
    journal.record_transmission(b"no", **REFUSAL)
    journal.record_transmission(b"sum", **{**REFUSAL, "what": "opened sum"})
    for what in ("update", "figures"):
        with pytest.raises(ValueError, match="without a ledger entry"):
            journal.record_transmission(b"payload", **{**REFUSAL, "what": what})
    assert [line.kind for line in journal.transmissions()] == ["refusal", "opened sum"]


@pytest.mark.parametrize("change", [{"what": "photo"}, {"round": -1}])
def test_what_is_out_of_bounds_is_not_noted(journal: TransmissionLog, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        journal.record_transmission(b"payload", **{**UPDATE, **change})
    assert journal.records() == []


def test_nothing_but_refusals_of_a_run_is_noted_once_its_owner_has_left_it(journal: TransmissionLog) -> None:
    journal.record_transmission(b"payload", **UPDATE)
    left = journal.withdraw("r", "I do not like what it is for")
    kinds: tuple[TransmissionKind, ...] = ("update", "figures", "opened sum")
    for what in kinds:
        with pytest.raises(PolicyRefusal, match="has left r"):
            journal.record_transmission(b"more", **{**UPDATE, "what": what})
    journal.record_transmission(b"no", **REFUSAL)
    journal.record_transmission(b"other run", **{**UPDATE, "run": "s"})
    assert journal.has_withdrawn("r") and not journal.has_withdrawn("s")
    assert journal.withdrawals() == {"r": left.time_text}
    assert [line.run for line in journal.transmissions()] == ["r", "r", "s"]


def test_leaving_twice_keeps_the_first_time(journal: TransmissionLog) -> None:
    first = journal.withdraw("r", "why")
    journal.withdraw("r", "still why")
    assert journal.withdrawals() == {"r": first.time_text}
    assert [line.reason for line in journal.records() if isinstance(line, Withdrawal)] == ["why", "still why"]


def test_both_kinds_of_lines_are_one_chain_and_exported_in_order(journal: TransmissionLog) -> None:
    journal.record_transmission(b"payload", **UPDATE)
    journal.withdraw("r", "why")
    journal.record_transmission(b"no", **REFUSAL)
    assert [(row["number"], row["line"]) for row in journal.export()] == [
        (1, "sent"),
        (2, "withdrawn"),
        (3, "sent"),
    ]
    assert [type(line) for line in journal.records()] == [Transmission, Withdrawal, Transmission]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM lines WHERE kind = 'withdrawn'",
        "UPDATE lines SET said = replace(said, '\"r\"', '\"s\"') WHERE number = 2",
        "DELETE FROM lines",
    ],
)
def test_a_withdrawal_cannot_be_taken_out(journal: TransmissionLog, path: Path, statement: str) -> None:
    """A device that forgot it would send again; one that cannot read its journal sends nothing."""
    journal.record_transmission(b"payload", **UPDATE)
    journal.withdraw("r", "why")
    book = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        book.execute(statement)
    for trigger in ("lines_stay", "lines_remain"):
        book.execute(f"DROP TRIGGER {trigger}")
    book.execute(statement)
    book.commit()
    book.close()
    for attempt in (
        journal.verify,
        lambda: TransmissionLog.open(path),
        lambda: journal.record_transmission(b"more", **UPDATE),
    ):
        with pytest.raises(LedgerError, match="journal"):
            attempt()


def test_a_withdrawal_survives_the_state_folder_put_back(
    journal: TransmissionLog, path: Path, tmp_path: Path
) -> None:
    journal.record_transmission(b"payload", **UPDATE)
    shutil.copytree(path.parent, tmp_path / "backup")
    journal.withdraw("r", "why")
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "backup", path.parent)
    with pytest.raises(LedgerError, match="the journal .* was rolled back"):
        TransmissionLog.open(path, tmp_path / "disk")


def test_a_ledger_is_no_journal(path: Path) -> None:
    from fedface.privacy.ledger import Ledger

    Ledger.open(path)
    with pytest.raises(LedgerError):
        TransmissionLog.open(path)


def test_only_the_owner_can_read_the_journal(journal: TransmissionLog, path: Path) -> None:
    journal.record_transmission(b"payload", **UPDATE)
    for file in (path, path.with_name("journal.sqlite.head")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def send_all(path: Path, witness: Path, wire: Connection) -> None:
    """Note each payload, and only then put it on the wire."""
    journal = TransmissionLog.open(path, witness)
    for round in range(100_000):
        payload = f"payload {round}".encode()
        journal.record_transmission(payload, **{**UPDATE, "round": round})
        wire.send(payload)


@pytest.mark.parametrize("moment", [0.0, 0.007, 0.019])
def test_kill_9_leaves_nothing_on_the_wire_that_the_journal_lacks(
    path: Path, tmp_path: Path, moment: float
) -> None:
    context = multiprocessing.get_context("fork")
    heard, wire = context.Pipe(duplex=False)
    process = context.Process(target=send_all, args=(path, tmp_path / "disk", wire))
    process.start()
    wire.close()
    arrived = [heard.recv() for _ in range(3)]
    time.sleep(moment)
    process.kill()
    try:
        while True:
            arrived.append(heard.recv())
    except EOFError:
        process.join(timeout=10)
    noted = [line.digest_of_payload for line in TransmissionLog.open(path, tmp_path / "disk").transmissions()]
    assert noted[: len(arrived)] == [hashlib.sha256(payload).hexdigest() for payload in arrived]
    assert len(noted) - len(arrived) <= 1
