"""The ledger loses no confirmed record, spends nothing twice, and detects every change."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import dp_accounting as dp
import pytest
from priced import DELTA, EVENT, SIGMA, cost_of, one_sum, record_run
from pytest import approx

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.renyi_filter import filter_epsilon


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "private" / "ledger.db")


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "private" / "ledger.db"


def tamper(path: Path, *statements: str) -> None:
    """Change the file as its owner could, past the triggers."""
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER records_no_update")
    database.execute("DROP TRIGGER records_no_delete")
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


def test_a_new_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.entries() == [] and ledger.spent(DELTA).upper == 0.0


def test_four_recorded_releases_cost_as_much_as_one_with_half_the_noise_by_the_filter(ledger: Ledger) -> None:
    """Rényi divergences add up: four Gaussian releases have that of one with half the noise."""
    event = dp.GaussianDpEvent(SIGMA)
    for round in range(4):
        ledger.record(event, run="r", round=round)
    half = dp.GaussianDpEvent(SIGMA / 2)
    assert ledger.spent(DELTA).upper == approx(filter_epsilon([(half, 1)], DELTA), abs=1e-9)
    assert ledger.spent(DELTA).upper > epsilon_of(half, DELTA).upper
    alone, so_far, together = ledger.price(event, Budget(epsilon=9, delta=DELTA), run_unit="photo")
    assert alone == epsilon_of(event, DELTA) and so_far == ledger.spent(DELTA)
    assert together.upper > ledger.spent(DELTA).upper
    assert len(ledger.read().export()) == 4


def test_a_record_survives_closing_and_opening(ledger: Ledger, tmp_path: Path) -> None:
    entry = ledger.record(EVENT, run="r", round=0, metadata={"model": "abc"})
    again = Ledger.open(file_of(tmp_path))
    assert again.entries() == [entry]
    assert again.is_recorded("r", 0) and not again.is_recorded("r", 1) and not again.is_recorded("s", 0)


def test_a_round_with_a_reply_is_recorded_once_and_gives_the_same_bytes(
    ledger: Ledger, tmp_path: Path
) -> None:
    first = ledger.record(EVENT, run="r", round=0)
    ledger.store_reply("r", 0, b"payload")
    again = Ledger.open(file_of(tmp_path))
    assert again.record(EVENT, run="r", round=0) == first
    assert again.load_reply("r", 0) == b"payload"
    assert len(again.entries()) == 1


def test_a_round_without_a_reply_is_recorded_once(ledger: Ledger) -> None:
    """A reply is stored before it is sent: without one nothing left, and there is nothing more to record."""
    limit = Budget(epsilon=cost_of(1), delta=DELTA)
    first = record_run(ledger, [limit])
    assert record_run(ledger, [limit]) == first
    assert len(ledger.entries()) == 1


def test_a_round_without_a_reply_is_recorded_again_for_another_release(ledger: Ledger) -> None:
    """The record of one model does not cover another."""
    ledger.record(EVENT, run="r", round=0, metadata={"model": "abc"})
    second = ledger.record(EVENT, run="r", round=0, metadata={"model": "xyz"})
    assert second.attempt == 2 and len(ledger.entries()) == 2


def test_a_round_whose_sent_reply_was_deleted_is_recorded_again(ledger: Ledger) -> None:
    """New noise on the same photos is a second release, in any order of rounds."""
    for round in (7, 5):
        ledger.record(EVENT, run="r", round=round)
        ledger.store_reply("r", round, bytes([round]))
    assert ledger.load_reply("r", 7) is None
    second = ledger.record(EVENT, run="r", round=7)
    assert second.attempt == 2 and len(ledger.entries()) == 3
    ledger.store_reply("r", 7, b"fresh")
    assert ledger.load_reply("r", 7) == b"fresh"


def test_one_record_covers_one_of_two_concurrent_replies(ledger: Ledger) -> None:
    """The slower of two computations, under the costly record, is not sent under the cheap one recorded since."""
    costly = ledger.record(EVENT, run="r", round=7)
    ledger.store_reply("r", 7, b"first", attempt=costly.attempt)
    ledger.record(EVENT, run="r", round=8)
    ledger.store_reply("r", 8, b"next")
    assert ledger.record(EVENT, run="r", round=7, metadata={"model": "xyz"}).attempt == 2
    with pytest.raises(LedgerError, match="has a reply already"):
        ledger.store_reply("r", 7, b"second", attempt=costly.attempt)
    ledger.store_reply("r", 7, b"paid", attempt=2)
    assert ledger.load_reply("r", 7) == b"paid"


def test_a_run_with_more_rounds_than_recorded_is_another_run(ledger: Ledger) -> None:
    """Each round releases the same, so that only their number tells the two apart."""
    record_run(ledger, [Budget(epsilon=9.0, delta=DELTA)], terms=one_sum(rounds=2))
    with pytest.raises(PolicyRefusal, match="other noise, rates or rounds"):
        record_run(ledger, [Budget(epsilon=9.0, delta=DELTA)], round=2, terms=one_sum(rounds=3))


def test_a_round_with_a_reply_cannot_be_reused_for_another_task(ledger: Ledger) -> None:
    ledger.record(EVENT, run="r", round=0, metadata={"model": "abc"})
    ledger.store_reply("r", 0, b"payload")
    with pytest.raises(LedgerError, match="different release"):
        ledger.record(dp.GaussianDpEvent(1.0), run="r", round=0, metadata={"model": "abc"})
    with pytest.raises(LedgerError, match="different release"):
        ledger.record(EVENT, run="r", round=0, metadata={"model": "xyz"})
    with pytest.raises(LedgerError, match="has a reply already"):
        ledger.store_reply("r", 0, b"another payload")


def test_a_reply_needs_a_record(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never recorded"):
        ledger.store_reply("r", 0, b"payload")


def test_only_the_last_reply_of_a_run_is_stored(ledger: Ledger) -> None:
    for round in range(2):
        ledger.record(EVENT, run="r", round=round)
        ledger.store_reply("r", round, bytes([round]))
    assert ledger.load_reply("r", 0) is None and ledger.load_reply("r", 1) == b"\x01"


def test_an_unknown_unit_is_not_recorded(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="unit must be one of"):
        ledger.record(EVENT, run="r", round=0, metadata={"unit": "pixel"})
    assert ledger.entries() == []


def test_deleted_replies_leave_no_bytes_and_are_recorded_again(ledger: Ledger, tmp_path: Path) -> None:
    body = b"forty bytes of an update, easy to find.."
    for run in ("r", "s"):
        ledger.record(EVENT, run=run, round=0)
        ledger.store_reply(run, 0, run.encode() + body)
    assert ledger.delete_replies("r") == 1
    assert ledger.load_reply("r", 0) is None and ledger.load_reply("s", 0) == b"s" + body
    assert len(ledger.entries()) == 2
    assert ledger.record(EVENT, run="r", round=0).attempt == 2
    assert ledger.delete_replies() == 1 and ledger.delete_replies() == 0
    assert body not in file_of(tmp_path).read_bytes()


def test_a_file_rolled_back_to_before_its_reply_is_detected(ledger: Ledger, tmp_path: Path) -> None:
    """Its chain is intact, but it would compute again, with new noise, what was already sent."""
    ledger.record(EVENT, run="r", round=0)
    between = file_of(tmp_path).read_bytes()
    ledger.store_reply("r", 0, b"payload")
    file_of(tmp_path).write_bytes(between)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(file_of(tmp_path))


def test_a_file_of_another_format_is_refused_in_one_sentence(ledger: Ledger, tmp_path: Path) -> None:
    """Also by a session that was open when the file was replaced."""
    ledger.record(EVENT, run="r", round=0)
    database = sqlite3.connect(file_of(tmp_path))
    database.execute("PRAGMA user_version = 7")
    database.commit()
    database.close()
    for attempt in (lambda: Ledger.open(file_of(tmp_path)), ledger.entries):
        with pytest.raises(
            LedgerError, match="has format 7; this version of fedface reads ledgers of format 6 alone"
        ):
            attempt()


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY)")
    database.commit()
    database.close()
    with pytest.raises(LedgerError, match="is another kind of file"):
        Ledger.open(path)


def test_rows_cannot_be_changed_or_removed_by_sql(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(EVENT, run="r", round=0)
    database = sqlite3.connect(file_of(tmp_path))
    for statement in ("UPDATE records SET content = '{}'", "DELETE FROM records"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            database.execute(statement)
    database.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET content = '{}' WHERE number = 2",
        "UPDATE records SET written = 'yesterday' WHERE number = 1",
        "UPDATE records SET kind = 'other' WHERE number = 3",
        "DELETE FROM records WHERE number = 1",
        "DELETE FROM records WHERE number = 3",
        "DELETE FROM records",
    ],
)
def test_a_modified_file_is_not_opened(ledger: Ledger, tmp_path: Path, statement: str) -> None:
    for round in range(3):
        ledger.record(EVENT, run="r", round=round)
    tamper(file_of(tmp_path), statement)
    with pytest.raises(LedgerError):
        Ledger.open(file_of(tmp_path))
    with pytest.raises(LedgerError):
        ledger.record(EVENT, run="r", round=3)


def test_an_older_copy_of_the_file_is_detected(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(EVENT, run="r", round=0)
    older = file_of(tmp_path).read_bytes()
    ledger.record(EVENT, run="r", round=1)
    file_of(tmp_path).write_bytes(older)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(file_of(tmp_path))


def test_a_deleted_ledger_does_not_give_a_new_budget(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(EVENT, run="r", round=0)
    file_of(tmp_path).unlink()
    with pytest.raises(LedgerError, match="has gone"):
        Ledger.open(file_of(tmp_path))
    file_of(tmp_path).touch()
    with pytest.raises(LedgerError, match="emptied"):
        Ledger.open(file_of(tmp_path))


def test_a_ledger_without_its_head_is_not_trusted(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(EVENT, run="r", round=0)
    file_of(tmp_path).with_name("ledger.db.head").unlink()
    with pytest.raises(LedgerError, match="restore both"):
        Ledger.open(file_of(tmp_path))


def test_random_bytes_are_not_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    file_of(tmp_path).write_bytes(os.urandom(5000))
    with pytest.raises(LedgerError):
        Ledger.open(file_of(tmp_path))


def test_only_the_owner_can_read_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(EVENT, run="r", round=0)
    for path in (file_of(tmp_path), file_of(tmp_path).with_name("ledger.db.head")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(tmp_path).parent.stat().st_mode) == 0o700
