"""The process that answers tasks starts with the first, stays for the next, and ends when none comes for a while."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedface.errors import FederationError
from fedface.transport import worker
from fedface.transport.worker import WorkerProcess


def answer_task(address: str, token: str, answer: object) -> str:
    """In place of Flower's: `token` says what happens."""
    if token == "fail":
        os._exit(7)
    return f"{token} by {os.getpid()}"


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A worker whose tasks are of this file; its process is forked, so that it has the change too."""
    monkeypatch.setattr(worker, "answer_task", answer_task)
    with WorkerProcess("127.0.0.1:1", tmp_path / "device.yaml") as one:
        yield one


def answer(process: WorkerProcess, token: str = "done") -> int:
    """The number of the process that answered."""
    process.start()
    words, _, number = process.answer(token).partition(" by ")
    assert words == token
    return int(number)


def test_one_process_answers_until_no_task_comes(
    process: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is then given back; the next task starts another."""
    first = answer(process)
    process.rest()
    assert answer(process) == first != os.getpid()
    monkeypatch.setattr(worker, "WARM_SECONDS", 0.0)
    process.rest()
    assert not psutil.pid_exists(first)
    process.rest()
    assert answer(process) != first


def test_a_process_that_ends_is_named_and_replaced(process: WorkerProcess) -> None:
    """Such as one that was killed because the memory was full."""
    process.start()
    with pytest.raises(FederationError, match="ended with exit code 7"):
        process.answer("fail")
    killed = answer(process)
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.1)
    process.start()
    with pytest.raises(FederationError, match="ended with exit code -9"):
        process.answer("done")
    assert answer(process) != killed


def test_no_process_stays_behind(process: WorkerProcess) -> None:
    """Not even one that is stopped."""
    number = answer(process)
    os.kill(number, signal.SIGSTOP)
    process.__exit__()
    assert not psutil.pid_exists(number)


def test_other_programs_go_first(process: WorkerProcess) -> None:
    """A person at the machine does not notice that it works."""
    assert psutil.Process(answer(process)).nice() >= min(psutil.Process().nice() + 10, 19)
