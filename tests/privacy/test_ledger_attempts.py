"""One record covers three interrupted computations, and not a fourth."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from priced import DELTA, EVENT, cost_of, one_sum, record_run

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import FREE_ATTEMPTS, FREE_RETRIES, Ledger
from fedface.privacy.renyi_filter import filter_epsilon

ROOM = Budget(epsilon=1e4, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger.open(path)


def limit_for(runs: int) -> Budget:
    """A budget for exactly this many runs of one round."""
    return Budget(epsilon=cost_of(runs), delta=DELTA)


def killed(ledger: Ledger, limit: Budget = ROOM) -> int:
    """Record and begin round 1 as a device does, without a reply; returns the attempt's record."""
    entry = record_run(ledger, [limit], run="r", round=1)
    ledger.record_attempt("r", 1, attempt=entry.attempt)
    return entry.attempt


def test_three_killed_computations_are_free_and_the_next_three_are_one_more_record(path: Path) -> None:
    """Also if the device is restarted each time."""
    assert FREE_ATTEMPTS == 3
    assert [killed(Ledger.open(path)) for _ in range(7)] == [1, 1, 1, 2, 2, 2, 3]
    ledger = Ledger.open(path)
    assert [entry.attempt for entry in ledger.entries()] == [1, 2, 3]
    assert ledger.spent(DELTA).upper == filter_epsilon([(EVENT, 3)], DELTA)


def test_without_budgets_the_fourth_computation_is_recorded_too(ledger: Ledger) -> None:
    """`record` and `record_within_budget` agree."""
    attempts = []
    for _ in range(4):
        attempts.append(ledger.record(EVENT, run="r", round=1).attempt)
        ledger.record_attempt("r", 1, attempt=attempts[-1])
    assert attempts == [1, 1, 1, 2]


def test_repetitions_stop_where_the_budget_ends(ledger: Ledger) -> None:
    """A budget for two records: six computations, however often the device is asked."""
    assert [killed(ledger, limit_for(2)) for _ in range(6)] == [1, 1, 1, 2, 2, 2]
    for _ in range(2):
        with pytest.raises(PolicyRefusal, match="is already spent"):
            killed(ledger, limit_for(2))
    assert len(ledger.entries()) == 2


def test_a_repetition_beyond_the_free_ones_is_charged_to_a_period_too(ledger: Ledger) -> None:
    """A period that has room for the run once has none for a second reply, however much is left for life."""
    week = replace(limit_for(1), days=7)
    for _ in range(FREE_ATTEMPTS):
        entry = record_run(ledger, [ROOM, week], run="r", round=1)
        ledger.record_attempt("r", 1, attempt=entry.attempt)
    with pytest.raises(PolicyRefusal, match="7 days"):
        record_run(ledger, [ROOM, week], run="r", round=1)
    assert len(ledger.entries()) == 1


def _computing(path: Path) -> None:
    killed(Ledger.open(path))
    os._exit(9)  # as the system kills: no exception, nothing tidied up


def test_a_killed_process_has_recorded_its_attempt(path: Path) -> None:
    """An attempt is on disk before a photo is opened."""
    for _ in range(4):
        process = get_context("fork").Process(target=_computing, args=(path,))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == 9
    assert [entry.attempt for entry in Ledger.open(path).entries()] == [1, 2]


def test_a_request_without_an_attempt_is_free(ledger: Ledger) -> None:
    """A device that stops before it opens a photo has read none."""
    for _ in range(9):
        assert ledger.record(EVENT, run="r", round=1).attempt == 1


@pytest.mark.parametrize("tries", [1, 3])
def test_a_round_with_a_reply_after_interruptions_is_resent(ledger: Ledger, tries: int) -> None:
    """The first or the last of its computations replied: nothing more is recorded."""
    for _ in range(tries):
        attempt = killed(ledger)
    ledger.store_reply("r", 1, b"payload", attempt=attempt)
    for _ in range(5):
        assert record_run(ledger, [limit_for(1)], run="r", round=1).attempt == 1
        assert ledger.load_reply("r", 1) == b"payload"
    with pytest.raises(LedgerError, match="has a reply already"):
        ledger.record_attempt("r", 1, attempt=1)
    assert len(ledger.entries()) == 1


def test_a_new_record_has_its_own_attempts_and_one_reply(ledger: Ledger) -> None:
    """The fourth computation's reply is stored under the second record."""
    for _ in range(4):
        attempt = killed(ledger)
    ledger.store_reply("r", 1, b"payload", attempt=attempt)
    assert ledger.load_reply("r", 1) == b"payload"
    with pytest.raises(LedgerError, match="has a reply already"):
        ledger.store_reply("r", 1, b"late", attempt=1)


def test_rounds_and_runs_are_counted_separately(ledger: Ledger) -> None:
    for run, round in (("r", 1), ("r", 2), ("s", 1), ("t/metrics", 1)):
        for _ in range(3):
            entry = record_run(ledger, [ROOM], run=run, round=round, terms=one_sum(rounds=2))
            ledger.record_attempt(run, round, attempt=entry.attempt)
    assert len(ledger.entries()) == 4


def test_six_repetitions_are_free_in_a_whole_run(ledger: Ledger) -> None:
    """Whoever kills a computation in each of many rounds pays for it: a kill may depend on the photos."""
    assert FREE_RETRIES == 6
    many = one_sum(rounds=9)
    attempts = []
    for round in range(1, 8):
        for _ in range(2):
            entry = record_run(ledger, [ROOM], run="r", round=round, terms=many)
            ledger.record_attempt("r", round, attempt=entry.attempt)
        attempts.append(entry.attempt)
    assert attempts == [1, 1, 1, 1, 1, 1, 2]
    for _ in range(2):  # its evaluations are part of it
        entry = ledger.record(EVENT, run="r/metrics", round=1)
        ledger.record_attempt("r/metrics", 1, attempt=entry.attempt)
    assert entry.attempt == 2
    assert record_run(ledger, [ROOM], run="other", round=1).attempt == 1


def test_an_attempt_needs_a_record(ledger: Ledger) -> None:
    ledger.record(EVENT, run="r", round=1)
    for round, attempt in ((2, 1), (1, 2), (1, 0)):
        with pytest.raises(LedgerError, match="never recorded"):
            ledger.record_attempt("r", round, attempt=attempt)


def test_of_four_concurrent_attempts_on_one_record_three_are_admitted(ledger: Ledger) -> None:
    """All have a record before the first begins; the fourth is recorded again."""
    attempts = [ledger.record(EVENT, run="r", round=1).attempt for _ in range(4)]
    for attempt in attempts[:3]:
        ledger.record_attempt("r", 1, attempt=attempt)
    with pytest.raises(LedgerError, match="the next request needs a new entry"):
        ledger.record_attempt("r", 1, attempt=attempts[3])
    assert killed(ledger) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE kind = 'attempt'",
        "DELETE FROM records WHERE number = 4",
        "UPDATE records SET entry = 3 WHERE number = 4",
        'UPDATE records SET content = \'{"run":"s"}\' WHERE number = 3',
        "UPDATE records SET kind = 'reply' WHERE number = 4",
        "DROP TABLE records",
    ],
)
def test_a_modified_count_is_detected(ledger: Ledger, path: Path, statement: str) -> None:
    """On opening the file, and at the next attempt."""
    for _ in range(3):
        killed(ledger)
    database = sqlite3.connect(path)
    if not statement.startswith("DROP"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            database.execute(statement)
        database.execute("DROP TRIGGER records_no_update")
        database.execute("DROP TRIGGER records_no_delete")
    database.execute(statement)
    database.commit()
    database.close()
    with pytest.raises(LedgerError):
        Ledger.open(path).read()
    with pytest.raises(LedgerError):
        killed(ledger)


def test_a_file_rolled_back_to_before_an_attempt_is_detected(ledger: Ledger, path: Path) -> None:
    """Its chain is intact and nothing was sent, but the attempt would be free once more."""
    ledger.record(EVENT, run="r", round=1)
    before = path.read_bytes()
    for _ in range(3):
        killed(ledger)
    path.write_bytes(before)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger.open(path)
