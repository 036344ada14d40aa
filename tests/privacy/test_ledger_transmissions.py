"""The ledger records every transmission before it is sent, and sends nothing for a run after a withdrawal."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import sqlite3
import stat
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from priced import DELTA, EVENT, cost_of, record_run

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.budget import Budget
from fedface.privacy.hash_chain import Chain
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import Transmission, TransmissionInfo, TransmissionKind, Withdrawal

UPDATE = TransmissionInfo(
    run="r",
    round=1,
    kind="update",
    receiver="server.example:9092",
    protection="noise multiplier 1, encrypted",
    entry=1,
)
REFUSAL = replace(UPDATE, kind="refusal", protection="contains nothing about a photo", entry=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path, tmp_path: Path) -> Ledger:
    return Ledger.open(path, tmp_path / "disk")


def answered(ledger: Ledger, payload: bytes = b"payload", run: str = "r", round: int = 1) -> TransmissionInfo:
    """The transmission of `UPDATE` for a round that was recorded and answered with this payload."""
    entry = ledger.record(EVENT, run=run, round=round)
    ledger.store_reply(run, round, payload)
    return replace(UPDATE, run=run, round=round, entry=entry.number)


def test_a_new_ledger_has_no_transmissions(ledger: Ledger) -> None:
    snapshot = ledger.read()
    assert snapshot.transmissions == [] and snapshot.withdrawals == {} and snapshot.export() == []


def test_a_record_has_content_receiver_size_protection_and_entry(ledger: Ledger, path: Path) -> None:
    recorded = ledger.record_transmission(b"payload", answered(ledger))
    (sent,) = Ledger.open(path).read().transmissions
    assert sent == recorded and not sent.resent
    assert (sent.run, sent.round, sent.kind, sent.receiver) == ("r", 1, "update", "server.example:9092")
    assert (sent.bytes, sent.payload_digest) == (7, hashlib.sha256(b"payload").hexdigest())
    assert (sent.entry, sent.protection) == (1, "noise multiplier 1, encrypted")


def test_resent_bytes_are_recorded_again_as_resent(ledger: Ledger) -> None:
    update = answered(ledger)
    for reason in ("", "asked twice", ""):
        ledger.record_transmission(b"payload", replace(update, reason=reason))
    ledger.record_transmission(b"payload", answered(ledger, round=2))
    assert [(sent.resent, sent.reason) for sent in ledger.read().transmissions] == [
        (False, ""),
        (True, "asked twice"),
        (True, ""),
        (False, ""),
    ]


def test_a_refusal_needs_no_entry_and_an_update_does(ledger: Ledger) -> None:
    ledger.record_transmission(b"no", REFUSAL)
    ledger.record_transmission(b"sum", replace(REFUSAL, kind="update sum"))
    kinds: tuple[TransmissionKind, ...] = ("update", "metrics")
    for kind in kinds:
        with pytest.raises(ValueError, match="has no entry that covers it"):
            replace(REFUSAL, kind=kind)
    assert [sent.kind for sent in ledger.read().transmissions] == ["refusal", "update sum"]


@pytest.mark.parametrize("change", [{"kind": "photo"}, {"round": -1}])
def test_records_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(UPDATE, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entry": 7}, "entry 7 of the ledger does not cover round 1 of r"),
        ({"entry": 2}, "entry 2 of the ledger does not cover"),  # the record of the reply
        ({"round": 2}, "does not cover round 2 of r"),
        ({"run": "s"}, "does not cover round 1 of s"),
    ],
)
def test_a_transmission_needs_its_own_entry(ledger: Ledger, change: dict[str, Any], words: str) -> None:
    """Not that of another round or run, and not a missing one."""
    update = answered(ledger)
    with pytest.raises(LedgerError, match=words):
        ledger.record_transmission(b"payload", replace(update, **change))
    assert ledger.read().transmissions == []


def test_an_entry_covers_only_the_stored_reply(ledger: Ledger) -> None:
    """Neither before there is one, nor for different bytes."""
    entry = ledger.record(EVENT, run="r", round=1)
    update = replace(UPDATE, entry=entry.number)
    with pytest.raises(LedgerError, match="has another reply than this payload"):
        ledger.record_transmission(b"payload", update)
    ledger.store_reply("r", 1, b"payload")
    with pytest.raises(LedgerError, match="has another reply than this payload"):
        ledger.record_transmission(b"another", update)
    assert ledger.record_transmission(b"payload", update).number == 3


def test_after_a_withdrawal_only_refusals_are_recorded(ledger: Ledger) -> None:
    update = answered(ledger)
    ledger.record_transmission(b"payload", update)
    left = ledger.withdraw("r", "I do not like what it is for")
    kinds: tuple[TransmissionKind, ...] = ("update", "metrics", "update sum", "metrics sum")
    for kind in kinds:
        with pytest.raises(PolicyRefusal, match="has withdrawn from r"):
            ledger.record_transmission(b"payload", replace(update, kind=kind))
    ledger.record_transmission(b"no", REFUSAL)
    ledger.record_transmission(b"other run", answered(ledger, b"other run", run="s"))
    assert ledger.has_withdrawn("r") and not ledger.has_withdrawn("s")
    snapshot = ledger.read()
    assert snapshot.withdrawals == {"r": left.written}
    assert [sent.run for sent in snapshot.transmissions] == ["r", "r", "s"]


def test_a_second_withdrawal_does_not_change_the_time_of_the_first(ledger: Ledger) -> None:
    first = ledger.withdraw("r", "why")
    ledger.withdraw("r", "still why")
    snapshot = ledger.read()
    assert snapshot.withdrawals == {"r": first.written}
    assert [record.reason for record in snapshot.log if isinstance(record, Withdrawal)] == [
        "why",
        "still why",
    ]


def test_all_kinds_of_records_are_one_chain_and_exported_in_order(ledger: Ledger) -> None:
    update = answered(ledger)
    ledger.record_attempt("s", 1, attempt=ledger.record(EVENT, run="s", round=1).attempt)
    ledger.record_transmission(b"payload", update)
    ledger.withdraw("r", "why")
    ledger.record_transmission(b"no", REFUSAL)
    snapshot = ledger.read()
    kinds = ["release", "reply", "release", "attempt", "transmission", "withdrawal", "transmission"]
    assert [(row["number"], row["kind"]) for row in snapshot.export()] == list(enumerate(kinds, start=1))
    assert [type(record) for record in snapshot.log] == [Transmission, Withdrawal, Transmission]
    assert snapshot.head == snapshot.chain[-1].digest


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE kind = 'withdrawal'",
        "UPDATE records SET content = replace(content, '\"r\"', '\"s\"') WHERE kind = 'withdrawal'",
        "DELETE FROM records",
    ],
)
def test_a_withdrawal_cannot_be_removed(ledger: Ledger, path: Path, statement: str) -> None:
    """A device that cannot verify its ledger sends nothing."""
    update = answered(ledger)
    ledger.record_transmission(b"payload", update)
    ledger.withdraw("r", "why")
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        database.execute(statement)
    for trigger in ("records_no_update", "records_no_delete"):
        database.execute(f"DROP TRIGGER {trigger}")
    database.execute(statement)
    database.commit()
    database.close()
    for attempt in (
        ledger.read,
        lambda: Ledger.open(path),
        lambda: ledger.record_transmission(b"payload", update),
    ):
        with pytest.raises(LedgerError, match="ledger"):
            attempt()


def test_a_withdrawal_survives_the_state_folder_rolled_back(
    ledger: Ledger, path: Path, tmp_path: Path
) -> None:
    ledger.record_transmission(b"payload", answered(ledger))
    shutil.copytree(path.parent, tmp_path / "backup")
    ledger.withdraw("r", "why")
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "backup", path.parent)
    with pytest.raises(LedgerError, match="the ledger .* was rolled back"):
        Ledger.open(path, tmp_path / "disk")


def test_only_the_owner_can_read_the_transmissions(ledger: Ledger, path: Path) -> None:
    ledger.record_transmission(b"payload", answered(ledger))
    for file in (path, path.with_name("ledger.sqlite.head")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_replaced_stored_reply_is_not_sent(ledger: Ledger, path: Path) -> None:
    """Replies are stored outside the chain, which has their digests."""
    answered(ledger)
    database = sqlite3.connect(path)
    database.execute("UPDATE replies SET body = x'00'")
    database.commit()
    database.close()
    with pytest.raises(LedgerError, match="the reply to round 1 of r is another"):
        ledger.load_reply("r", 1)


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of records in each verification."""
    passes: list[int] = []
    verify = Chain._verify_records

    def counted(self: Chain, sql: sqlite3.Connection) -> None:
        verify(self, sql)
        passes.append(len(self._records))

    monkeypatch.setattr(Chain, "_verify_records", counted)
    return passes


def test_a_session_verifies_once_and_again_only_when_another_has_written(
    ledger: Ledger, path: Path, verifications: list[int]
) -> None:
    """Another process's record is verified before anything else is written."""
    answered(ledger)
    with Ledger.open(path) as session:
        update = answered(session, round=2)
        session.record_transmission(b"payload", update)
        session.entries()
        assert verifications == [2]
        ledger.withdraw("r", "now")
        assert verifications == [2, 5]
        with pytest.raises(PolicyRefusal, match="has withdrawn from r"):
            session.record_transmission(b"payload", update)
        assert verifications == [2, 5, 6]


def send_all(path: Path, witness: Path, wire: Connection) -> None:
    """Record each payload, and only then put it on the wire."""
    ledger = Ledger.open(path, witness)
    for round in range(100_000):
        payload = f"payload {round}".encode()
        ledger.record_transmission(payload, answered(ledger, payload, round=round))
        wire.send(payload)


@pytest.mark.parametrize("moment", [0.0, 0.007, 0.019])
def test_kill_9_leaves_nothing_on_the_wire_that_the_ledger_lacks(
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
    recorded = [sent.payload_digest for sent in Ledger.open(path, tmp_path / "disk").read().transmissions]
    assert recorded[: len(arrived)] == [hashlib.sha256(payload).hexdigest() for payload in arrived]
    assert len(recorded) - len(arrived) <= 1


def test_a_record_of_another_process_counts_before_the_next_one(ledger: Ledger, path: Path) -> None:
    """A session that was verified before it does not use the older total."""
    one = Budget(epsilon=cost_of(1), delta=DELTA)
    record_run(Ledger.open(path), [one], run="a", round=1)
    with pytest.raises(PolicyRefusal, match="is already spent"):
        record_run(ledger, [one], run="b", round=1)
