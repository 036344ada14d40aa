"""A booking pays for three computations that were killed, and for no fourth."""

from __future__ import annotations

import os
import sqlite3
from multiprocessing import get_context
from pathlib import Path

import dp_accounting as dp
import pytest

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import FREE_ATTEMPTS, Ledger

DELTA = 1e-5
EVENT = dp.GaussianDpEvent(4.0)
ROOM = Budget(epsilon=1e4, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger.open(path)


def limit_for(rounds: int) -> Budget:
    """Exactly so many rounds, with room for one rounding."""
    cost = epsilon_of(dp.SelfComposedDpEvent(EVENT, rounds), DELTA).upper
    return Budget(epsilon=cost + 1e-6, delta=DELTA)


def killed(ledger: Ledger, limit: Budget = ROOM) -> int:
    """Book and begin round 0 as a device does, and never answer; the attempt that paid."""
    entry = ledger.record_within_budget(EVENT, [limit], run="r", round=0)
    ledger.record_attempt("r", 0, attempt=entry.attempt)
    return entry.attempt


def test_three_killed_computations_are_free_and_the_next_three_are_booked_as_one_more(path: Path) -> None:
    """Also if the device is started anew each time."""
    assert FREE_ATTEMPTS == 3
    assert [killed(Ledger.open(path)) for _ in range(7)] == [1, 1, 1, 2, 2, 2, 3]
    ledger = Ledger.open(path)
    assert [entry.attempt for entry in ledger.entries()] == [1, 2, 3] and ledger.rounds_recorded("r") == 1
    assert ledger.spent(DELTA) == epsilon_of(dp.SelfComposedDpEvent(EVENT, 3), DELTA)


def test_without_limits_the_fourth_computation_is_booked_too(ledger: Ledger) -> None:
    """`book` and `record_within_budget` agree on what is paid."""
    attempts = []
    for _ in range(4):
        attempts.append(ledger.record(EVENT, run="r", round=0).attempt)
        ledger.record_attempt("r", 0, attempt=attempts[-1])
    assert attempts == [1, 1, 1, 2]


def test_repetitions_stop_where_the_budget_ends(ledger: Ledger) -> None:
    """Room for two bookings: six computations, however often the device is asked."""
    assert [killed(ledger, limit_for(2)) for _ in range(6)] == [1, 1, 1, 2, 2, 2]
    for _ in range(2):
        with pytest.raises(PolicyRefusal, match="is already spent"):
            killed(ledger, limit_for(2))
    assert len(ledger.entries()) == 2


def _computing(path: Path) -> None:
    killed(Ledger.open(path))
    os._exit(9)  # as the system kills: no exception, nothing tidied up


def test_a_process_that_was_killed_has_left_its_count(path: Path) -> None:
    """What was begun is on disk before a photo is opened."""
    for _ in range(4):
        process = get_context("fork").Process(target=_computing, args=(path,))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == 9
    assert [entry.attempt for entry in Ledger.open(path).entries()] == [1, 2]


def test_asking_without_beginning_is_free(ledger: Ledger) -> None:
    """A device that stops before it opens a photo has looked at none."""
    for _ in range(9):
        assert ledger.record(EVENT, run="r", round=0).attempt == 1


@pytest.mark.parametrize("tries", [1, 3])
def test_a_round_that_was_answered_at_last_is_resent(ledger: Ledger, tries: int) -> None:
    """The first or the last of its computations answered: nothing more is booked or begun."""
    for _ in range(tries):
        attempt = killed(ledger)
    ledger.store_reply("r", 0, b"payload", attempt=attempt)
    for _ in range(5):
        assert ledger.record_within_budget(EVENT, [limit_for(1)], run="r", round=0).attempt == 1
        assert ledger.load_reply("r", 0) == b"payload"
    with pytest.raises(LedgerError, match="answered already"):
        ledger.record_attempt("r", 0, attempt=1)
    assert len(ledger.entries()) == 1


def test_a_new_booking_has_computations_of_its_own_and_one_answer(ledger: Ledger) -> None:
    """The fourth computation's answer is kept under the second booking."""
    for _ in range(4):
        attempt = killed(ledger)
    ledger.store_reply("r", 0, b"payload", attempt=attempt)
    assert ledger.load_reply("r", 0) == b"payload"
    with pytest.raises(LedgerError, match="answered already"):
        ledger.store_reply("r", 0, b"late", attempt=1)


def test_rounds_and_runs_are_counted_apart(ledger: Ledger) -> None:
    for run, round in (("r", 0), ("r", 1), ("s", 0), ("r/metrics", 0)):
        for _ in range(3):
            entry = ledger.record_within_budget(EVENT, [ROOM], run=run, round=round)
            ledger.record_attempt(run, round, attempt=entry.attempt)
    assert len(ledger.entries()) == 4


def test_what_was_never_booked_is_not_begun(ledger: Ledger) -> None:
    ledger.record(EVENT, run="r", round=0)
    for round, attempt in ((1, 1), (0, 2), (0, 0)):
        with pytest.raises(LedgerError, match="never booked"):
            ledger.record_attempt("r", round, attempt=attempt)


def test_four_side_by_side_on_one_booking_are_three(ledger: Ledger) -> None:
    """All have booked before the first begins; the one too many asks again and pays."""
    attempts = [ledger.record(EVENT, run="r", round=0).attempt for _ in range(4)]
    for attempt in attempts[:3]:
        ledger.record_attempt("r", 0, attempt=attempt)
    with pytest.raises(LedgerError, match="ask once more, and it is booked anew"):
        ledger.record_attempt("r", 0, attempt=attempts[3])
    assert killed(ledger) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE kind = 'attempt'",
        "DELETE FROM records WHERE number = 4",
        "UPDATE records SET entry = 2 WHERE number = 4",
        'UPDATE records SET content = \'{"run":"s"}\' WHERE number = 3',
        "UPDATE records SET kind = 'answer' WHERE number = 4",
        "DROP TABLE records",
    ],
)
def test_an_altered_count_is_noticed(ledger: Ledger, path: Path, statement: str) -> None:
    """Whoever opens the file or asks for one more."""
    for _ in range(3):
        killed(ledger)
    book = sqlite3.connect(path)
    if not statement.startswith("DROP"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            book.execute(statement)
        book.execute("DROP TRIGGER records_no_update")
        book.execute("DROP TRIGGER records_no_delete")
    book.execute(statement)
    book.commit()
    book.close()
    with pytest.raises(LedgerError):
        Ledger.open(path).read()
    with pytest.raises(LedgerError):
        killed(ledger)


def test_a_file_put_back_to_before_it_was_begun_is_noticed(ledger: Ledger, path: Path) -> None:
    """Its chain is whole and nothing was answered, but it would begin for free once more."""
    ledger.record(EVENT, run="r", round=0)
    before = path.read_bytes()
    for _ in range(3):
        killed(ledger)
    path.write_bytes(before)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(path)
