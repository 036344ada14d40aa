"""The process that answers tasks starts with the first, stays for the next, and ends when none comes for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedface.errors import FederationError
from fedface.transport import worker
from fedface.transport.worker import WorkerProcess

ROOT = Path(__file__).resolve().parents[2]


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


TINY = """
import sys
from pathlib import Path
from fedface.transport import worker

class Tasks:  # the connection to the device's process, and Flower's of one task
    def recv(self): return "token"
    def send(self, counts):
        print(*counts)
        raise EOFError

def answer_task(address, token, answer):
    import torch
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity
    torch.set_num_threads(4)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    reply = answer(Message(RecordDict({"a": ConfigRecord({"b": 1})}), dst_node_id=1, message_type="train"), None)
    assert reply.has_error()
    torch.isfinite(torch.ones(5_000_000)).all()  # as the first vector of a message is checked, in all threads
    results = torch.full((5_000_000,), 2e-38) * 0.25
    return [int((results.view(torch.int32) != 0).sum()), torch.get_num_threads()]

worker.answer_task = answer_task
worker._work(Tasks(), "127.0.0.1:1", Path("device.yaml"))
"""


def test_tiny_numbers_take_no_longer_in_any_thread(tmp_path: Path) -> None:
    """A network on which only some photos give denormal numbers would show by its time which photos took part."""
    done = subprocess.run(
        [sys.executable, "-c", TINY], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["0", "4"], done.stderr
