"""The ledger loses nothing that it returned, sells nothing twice, and notices every change."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import dp_accounting as dp
import pytest
from pytest import approx

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger
from fedface.privacy.limits import Limit

DELTA = 1e-5
EVENT = dp.GaussianDpEvent(4.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "private" / "ledger.db")


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "private" / "ledger.db"


def tamper(path: Path, *statements: str) -> None:
    """Change the file as its owner could, past the triggers."""
    book = sqlite3.connect(path)
    book.execute("DROP TRIGGER entries_stay")
    book.execute("DROP TRIGGER entries_remain")
    for statement in statements:
        book.execute(statement)
    book.commit()
    book.close()


def test_a_new_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.entries() == [] and ledger.spent(DELTA).upper == 0.0


def test_four_booked_rounds_cost_as_much_as_one_with_half_the_noise(ledger: Ledger) -> None:
    for round in range(4):
        ledger.book(EVENT, run="r", round=round)
    assert ledger.spent(DELTA).upper == approx(epsilon_of(dp.GaussianDpEvent(2.0), DELTA).upper, abs=1e-9)
    assert ledger.would_spend(EVENT, DELTA).upper > ledger.spent(DELTA).upper
    assert ledger.rounds_booked("r") == 4 and len(ledger.export()) == 4


def test_a_booking_survives_closing_and_opening(ledger: Ledger, tmp_path: Path) -> None:
    entry = ledger.book(EVENT, run="r", round=0, marks={"model": "abc"})
    again = Ledger.open(file_of(tmp_path))
    assert again.entries() == [entry]
    assert again.already("r", 0) and not again.already("r", 1) and not again.already("s", 0)


def test_an_answered_round_is_booked_once_and_gives_the_same_bytes(ledger: Ledger, tmp_path: Path) -> None:
    first = ledger.book(EVENT, run="r", round=0)
    ledger.store_reply("r", 0, b"payload")
    again = Ledger.open(file_of(tmp_path))
    assert again.book(EVENT, run="r", round=0) == first
    assert again.stored_reply("r", 0) == b"payload"
    assert len(again.entries()) == 1


def test_a_round_that_was_never_answered_is_booked_once(ledger: Ledger) -> None:
    """A reply is kept before it is sent, so what has none never left: no release, nothing more to pay."""
    first = ledger.book(EVENT, run="r", round=0)
    assert ledger.book(EVENT, run="r", round=0) == first
    budget = epsilon_of(EVENT, DELTA).upper + 1e-6
    assert ledger.book_within(EVENT, [Limit(epsilon=budget, delta=DELTA)], run="r", round=0) == first
    assert len(ledger.entries()) == 1


def test_a_round_that_was_never_answered_is_booked_anew_for_another_release(ledger: Ledger) -> None:
    """The booking of one model does not pay for another."""
    ledger.book(EVENT, run="r", round=0, marks={"model": "abc"})
    second = ledger.book(EVENT, run="r", round=0, marks={"model": "xyz"})
    assert second.attempt == 2 and len(ledger.entries()) == 2


def test_a_round_whose_reply_was_sent_and_dropped_is_booked_again(ledger: Ledger) -> None:
    """Fresh noise on the same photos is a second release, in whatever order rounds are asked."""
    for round in (7, 5):
        ledger.book(EVENT, run="r", round=round)
        ledger.store_reply("r", round, bytes([round]))
    assert ledger.stored_reply("r", 7) is None
    second = ledger.book(EVENT, run="r", round=7)
    assert second.attempt == 2 and len(ledger.entries()) == 3 and ledger.rounds_booked("r") == 2
    ledger.store_reply("r", 7, b"fresh")
    assert ledger.stored_reply("r", 7) == b"fresh"


def test_one_booking_pays_for_one_answer_of_two_computed_side_by_side(ledger: Ledger) -> None:
    """The slower of two computations under the dear booking is not sent on the cheap one that came since."""
    dear = ledger.book(EVENT, run="r", round=7)
    ledger.store_reply("r", 7, b"first", attempt=dear.attempt)
    ledger.book(EVENT, run="r", round=8)
    ledger.store_reply("r", 8, b"next")
    assert ledger.book(EVENT, run="r", round=7, marks={"model": "xyz"}).attempt == 2
    with pytest.raises(LedgerError, match="answered already"):
        ledger.store_reply("r", 7, b"second", attempt=dear.attempt)
    ledger.store_reply("r", 7, b"paid", attempt=2)
    assert ledger.stored_reply("r", 7) == b"paid"


def test_an_answered_round_cannot_be_asked_for_something_else(ledger: Ledger) -> None:
    ledger.book(EVENT, run="r", round=0, marks={"model": "abc"})
    ledger.store_reply("r", 0, b"payload")
    with pytest.raises(LedgerError, match="different release"):
        ledger.book(dp.GaussianDpEvent(1.0), run="r", round=0, marks={"model": "abc"})
    with pytest.raises(LedgerError, match="different release"):
        ledger.book(EVENT, run="r", round=0, marks={"model": "xyz"})
    with pytest.raises(LedgerError, match="answered already"):
        ledger.store_reply("r", 0, b"another payload")


def test_a_reply_needs_a_booking(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never booked"):
        ledger.store_reply("r", 0, b"payload")


def test_only_the_last_reply_of_a_run_is_kept(ledger: Ledger) -> None:
    for round in range(2):
        ledger.book(EVENT, run="r", round=round)
        ledger.store_reply("r", round, bytes([round]))
    assert ledger.stored_reply("r", 0) is None and ledger.stored_reply("r", 1) == b"\x01"


def test_a_budget_holds_and_the_refusal_says_asked_spent_and_allowed(ledger: Ledger) -> None:
    budget = epsilon_of(dp.GaussianDpEvent(2.0), DELTA).upper + 1e-6
    for round in range(4):
        ledger.book_within(EVENT, [Limit(epsilon=budget, delta=DELTA)], run="r", round=round)
    with pytest.raises(PolicyRefusal) as refusal:
        ledger.book_within(EVENT, [Limit(epsilon=budget, delta=DELTA)], run="r", round=4)
    asked = epsilon_of(EVENT, DELTA).upper
    for figure in (f"asks for epsilon {asked:.3f}", f"{budget:.3f} of", f"of {budget:g}"):
        assert figure in str(refusal.value)
    assert len(ledger.entries()) == 4


def test_rows_cannot_be_changed_or_removed_by_sql(ledger: Ledger, tmp_path: Path) -> None:
    ledger.book(EVENT, run="r", round=0)
    book = sqlite3.connect(file_of(tmp_path))
    for statement in ("UPDATE entries SET event = '[]'", "DELETE FROM entries"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            book.execute(statement)
    book.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET event = '[]' WHERE number = 2",
        "UPDATE entries SET written = 'yesterday' WHERE number = 1",
        "UPDATE entries SET round = 7 WHERE number = 3",
        "DELETE FROM entries WHERE number = 1",
        "DELETE FROM entries WHERE number = 3",
        "DELETE FROM entries",
    ],
)
def test_an_altered_file_is_not_opened(ledger: Ledger, tmp_path: Path, statement: str) -> None:
    for round in range(3):
        ledger.book(EVENT, run="r", round=round)
    tamper(file_of(tmp_path), statement)
    with pytest.raises(LedgerError):
        Ledger.open(file_of(tmp_path))
    with pytest.raises(LedgerError):
        ledger.book(EVENT, run="r", round=3)


def test_an_older_copy_of_the_file_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.book(EVENT, run="r", round=0)
    older = file_of(tmp_path).read_bytes()
    ledger.book(EVENT, run="r", round=1)
    file_of(tmp_path).write_bytes(older)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(file_of(tmp_path))


def test_a_deleted_ledger_does_not_give_a_new_budget(ledger: Ledger, tmp_path: Path) -> None:
    ledger.book(EVENT, run="r", round=0)
    file_of(tmp_path).unlink()
    with pytest.raises(LedgerError, match="has gone"):
        Ledger.open(file_of(tmp_path))
    file_of(tmp_path).touch()
    with pytest.raises(LedgerError, match="emptied"):
        Ledger.open(file_of(tmp_path))


def test_a_ledger_without_its_head_is_not_trusted(ledger: Ledger, tmp_path: Path) -> None:
    ledger.book(EVENT, run="r", round=0)
    file_of(tmp_path).with_name("ledger.db.head").unlink()
    with pytest.raises(LedgerError, match="restore both"):
        Ledger.open(file_of(tmp_path))


def test_rubbish_is_not_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    file_of(tmp_path).write_bytes(os.urandom(5000))
    with pytest.raises(LedgerError):
        Ledger.open(file_of(tmp_path))


def test_only_the_owner_can_read_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    ledger.book(EVENT, run="r", round=0)
    for path in (file_of(tmp_path), file_of(tmp_path).with_name("ledger.db.head")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(tmp_path).parent.stat().st_mode) == 0o700


def book_all(path: Path, run: str, budget: float, said: Connection) -> None:
    """Book rounds until the budget is used up, and say each digest once it was returned."""
    ledger = Ledger.open(path)
    for round in range(100_000):
        try:
            entry = ledger.book_within(EVENT, [Limit(epsilon=budget, delta=DELTA)], run=run, round=round)
        except PolicyRefusal:
            break
        said.send(entry.digest)
    said.send("refused")
    said.close()


def booker(path: Path, run: str, budget: float) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=book_all, args=(path, run, budget, said))
    process.start()
    said.close()
    return process, heard


def rest_of(heard: Connection) -> list[str]:
    lines: list[str] = []
    try:
        while True:
            lines.append(heard.recv())
    except EOFError:
        return lines


def test_two_processes_cannot_overspend_one_budget(tmp_path: Path) -> None:
    """A budget for exactly four rounds, and two processes that want as many as they can get."""
    budget = epsilon_of(dp.GaussianDpEvent(2.0), DELTA).upper + 1e-6
    both = [booker(tmp_path / "ledger.db", run, budget) for run in ("a", "b")]
    said = [rest_of(heard) for _, heard in both]
    for process, _ in both:
        process.join(timeout=30)
    assert [lines[-1] for lines in said] == ["refused", "refused"]
    entries = Ledger.open(tmp_path / "ledger.db").entries()
    assert {entry.digest for entry in entries} == {line for lines in said for line in lines[:-1]}
    assert len(entries) == 4


@pytest.mark.parametrize("moment", [0.0, 0.004, 0.011, 0.023])
def test_kill_9_loses_no_booking_that_was_returned(tmp_path: Path, moment: float) -> None:
    process, heard = booker(tmp_path / "ledger.db", "r", 1e4)
    returned = [heard.recv() for _ in range(3)]
    time.sleep(moment)
    process.kill()
    returned += rest_of(heard)
    process.join(timeout=10)
    ledger = Ledger.open(tmp_path / "ledger.db")
    booked = [entry.digest for entry in ledger.entries()]
    assert booked[: len(returned)] == returned
    assert len(booked) - len(returned) <= 1
    assert ledger.book(EVENT, run="after", round=0).number == len(booked) + 1
