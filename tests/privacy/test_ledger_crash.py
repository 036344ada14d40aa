"""Concurrent processes never overspend; a killed process loses no confirmed record."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from priced import DELTA, EVENT, cost_of, record_run

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.budget import Budget
from fedface.privacy.hash_chain import Chain
from fedface.privacy.ledger import Ledger


def budget_for(runs: int, days: float | None = None) -> Budget:
    """A budget for exactly this many runs of one round."""
    return Budget(epsilon=cost_of(runs), delta=DELTA, days=days)


def record_all(path: Path, witness: Path, run: str, limits: list[Budget], result: Connection) -> None:
    """Record runs of one round until the budget is used up, and send each digest once it was returned."""
    ledger = Ledger.open(path, witness)
    for round in range(100_000):
        try:
            entry = record_run(ledger, limits, run=f"{run} {round}")
        except PolicyRefusal:
            break
        result.send(entry.digest)
    result.send("refused")
    result.close()


def recorder(folder: Path, run: str, *limits: Budget) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    heard, result = context.Pipe(duplex=False)
    process = context.Process(
        target=record_all, args=(folder / "state" / "ledger.db", folder / "disk", run, list(limits), result)
    )
    process.start()
    result.close()
    return process, heard


def rest_of(heard: Connection) -> list[str]:
    lines: list[str] = []
    try:
        while True:
            lines.append(heard.recv())
    except EOFError:
        return lines


def test_two_processes_cannot_overspend_one_budget(tmp_path: Path) -> None:
    """A budget for exactly four runs, and two processes that record as many as they can."""
    both = [recorder(tmp_path, run, budget_for(4)) for run in ("a", "b")]
    result = [rest_of(heard) for _, heard in both]
    for process, _ in both:
        process.join(timeout=30)
    assert [lines[-1] for lines in result] == ["refused", "refused"]
    entries = Ledger.open(tmp_path / "state" / "ledger.db").entries()
    assert {entry.digest for entry in entries} == {line for lines in result for line in lines[:-1]}
    assert len(entries) == 4


def test_three_processes_cannot_overspend_the_tighter_of_two_budgets(tmp_path: Path) -> None:
    """Nine runs for life, five in any week, all requested at once."""
    all_three = [recorder(tmp_path, run, budget_for(9), budget_for(5, days=7)) for run in ("a", "b", "c")]
    result = [rest_of(heard) for _, heard in all_three]
    for process, _ in all_three:
        process.join(timeout=30)
    assert sum(len(lines) - 1 for lines in result) == 5
    assert len(Ledger.open(tmp_path / "state" / "ledger.db").entries()) == 5


def test_kill_9_at_any_moment_loses_no_confirmed_record(tmp_path: Path) -> None:
    """Twelve times in a row on one ledger with a witness; a crash may waste one record, never lose one."""
    path, witness = tmp_path / "state" / "ledger.db", tmp_path / "disk"
    moments = random.Random(7)
    returned: list[str] = []
    for life in range(12):
        process, heard = recorder(tmp_path, f"r{life}", Budget(epsilon=1e4, delta=DELTA))
        result = [heard.recv() for _ in range(2)]
        time.sleep(moments.uniform(0.0, 0.03))
        process.kill()
        result += rest_of(heard)
        process.join(timeout=10)
        returned += result
        ledger = Ledger.open(path, witness)
        recorded = [entry.digest for entry in ledger.entries()]
        assert [digest for digest in recorded if digest in set(returned)] == returned
        assert len(recorded) - len(returned) <= life + 1
    assert (
        ledger.record(EVENT, run="after", round=0).number == 2 * len(recorded) + 1
    )  # each a run and its round


def test_a_rolled_back_state_folder_is_detected_by_the_witness(tmp_path: Path) -> None:
    path, witness = tmp_path / "state" / "ledger.db", tmp_path / "disk"
    ledger = Ledger.open(path, witness)
    ledger.record(EVENT, run="r", round=0)
    shutil.copytree(path.parent, tmp_path / "backup")
    ledger.record(EVENT, run="r", round=1)
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "backup", path.parent)
    for attempt in (lambda: Ledger.open(path, witness), lambda: Ledger.open(path), ledger.entries):
        with pytest.raises(LedgerError, match="rolled back"):
            attempt()


# Ends with 1 if the file is locked.
TRY_TO_WRITE = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=0.1, isolation_level=None)
try:
    database.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError:
    sys.exit(1)
"""


def test_opening_in_one_thread_keeps_the_lock_that_another_holds(tmp_path: Path) -> None:
    """Closing a file releases every lock that its process has on it (POSIX), so only SQLite may open it."""
    path = tmp_path / "ledger.db"
    Ledger.open(path)
    with Chain.open(path).write_transaction():
        opener = threading.Thread(target=Ledger.open, args=(path,))
        opener.start()
        time.sleep(0.3)
        other = subprocess.run([sys.executable, "-c", TRY_TO_WRITE, str(path)], timeout=60)
        assert other.returncode == 1
    opener.join(timeout=60)
    assert not opener.is_alive()
