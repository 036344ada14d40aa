"""The process that answers tasks starts with the first, stays for the next, ends when none comes for a while, and stops
while its owner's conditions do not hold.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from fedface.errors import FederationError
from fedface.privacy.ledger import Ledger
from fedface.privacy.participation_conditions import ParticipationConditions
from fedface.transport import worker
from fedface.transport.worker import WorkerProcess

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Device:
    """A worker whose tasks are of this file; its process is forked, so that it has the changes too."""

    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def paused(self) -> Path:
        """The file that pauses it."""
        return self.folder / "paused"

    @property
    def steps(self) -> int:
        """How many bytes the task has written."""
        place = self.folder / "steps"
        return place.stat().st_size if place.exists() else 0

    def worker(self) -> WorkerProcess:
        """Its worker, which has not started."""
        return WorkerProcess(
            "127.0.0.1:1",
            self.folder / "device.yaml",
            ledger=self.folder / "ledger.sqlite",
            paused=self.paused,
            report=self.said.append,
        )

    def answer_task(self, address: str, token: str, app: object) -> str:
        """In place of Flower's: the token says what happens."""
        if token == "fail":
            os._exit(7)
        end = time.monotonic() + 60
        while token == "work" and self.steps < 200 and time.monotonic() < end:
            with (self.folder / "steps").open("ab") as out:
                out.write(b".")
            time.sleep(0.01)
        ledger = Ledger.open(self.folder / "ledger.sqlite") if token == "record" else None
        while ledger is not None and time.monotonic() < end and not (self.folder / "enough").exists():
            with ledger._chain.read_transaction():
                time.sleep(1.5)  # as long as it takes to price a run
            time.sleep(0.2)
        return f"{token} by {os.getpid()}"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """One without conditions, which is stopped for a tenth of a second at least."""
    one = Device(tmp_path)
    monkeypatch.setattr(worker, "answer_task", one.answer_task)
    monkeypatch.setattr(worker, "_conditions", lambda path: ParticipationConditions())
    monkeypatch.setattr(worker, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(worker, "MIN_STOP_SECONDS", 0.1)
    return one


@pytest.fixture
def process(device: Device) -> Iterator[WorkerProcess]:
    """Its worker."""
    with device.worker() as one:
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


def test_a_process_that_ends_as_it_is_stopped_is_named(
    device: Device, process: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between two looks at it."""

    def gone(number: int) -> None:
        raise psutil.NoSuchProcess(number)

    process.start()
    monkeypatch.setattr(worker.psutil, "Process", gone)
    threading.Thread(target=lambda: wait_for(lambda: device.steps > 20) or device.paused.touch()).start()
    with pytest.raises(FederationError, match="the process that answers tasks ended"):
        process.answer("work")


def test_no_process_stays_behind(process: WorkerProcess) -> None:
    """Not even one that is stopped."""
    number = answer(process)
    os.kill(number, signal.SIGSTOP)
    process.__exit__()
    assert not psutil.pid_exists(number)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_stopped_process_ends_when_its_device_is_killed(tmp_path: Path) -> None:
    """No process would continue it."""
    script = """
import time
from pathlib import Path
from fedface.transport.worker import WorkerProcess
worker = WorkerProcess("", Path("device.yaml"), ledger=Path("none"), paused=Path("none"), report=print)
worker.start()
print(worker._process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(number, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE)


def test_other_programs_go_first(process: WorkerProcess) -> None:
    """A person at the machine does not notice that it works."""
    assert psutil.Process(answer(process)).nice() >= min(psutil.Process().nice() + 10, 19)


TINY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from fedface.transport import worker

class Tasks:  # the connection to the device's process, and Flower's of one task
    def recv(self): return "token"
    def send(self, counts):
        if counts is not None:  # there is no device file, and no conditions in it
            print(*counts)
            raise EOFError

def answer_task(address, token, answer):
    import torch
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    reply = answer(Message(RecordDict({"a": ConfigRecord({"b": 1})}), dst_node_id=1, message_type="train"), None)
    assert reply.has_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.isfinite(torch.ones(5_000_000)).all()  # as the first vector of a message is checked, in all threads
    results = torch.full((5_000_000,), 2e-38) * 0.25
    return [int((results.view(torch.int32) != 0).sum()), threads]

worker.answer_task = answer_task
worker._work(Tasks(), SimpleNamespace(value=0.0), "127.0.0.1:1", Path("device.yaml"))
"""


def test_tiny_numbers_take_no_longer_in_any_thread(tmp_path: Path) -> None:
    """A network on which only some photos give denormal numbers would show by its time which photos took part."""
    done = subprocess.run(
        [sys.executable, "-c", TINY], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["0", "1"], done.stderr


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pause_stops_the_work_and_its_end_continues_it(device: Device, process: WorkerProcess) -> None:
    """Within a second, and the worker learns for how long."""
    process.start()
    owner = threading.Thread(target=lambda: pause_for_a_second(device))
    owner.start()
    assert process.answer("work").startswith("work by")
    owner.join()
    assert device.said == ["stopped: this device is paused by its owner", "continued"]
    assert device.steps == 200
    assert 1.0 <= process._stopped_seconds.value < 30


def pause_for_a_second(device: Device) -> None:
    """As `fedface device pause` and `resume` do; nothing happens meanwhile."""
    wait_for(lambda: device.steps > 20)
    device.paused.touch()
    wait_for(lambda: bool(device.said))
    before = device.steps
    time.sleep(1.0)
    assert device.steps == before
    device.paused.unlink()


def test_a_device_that_was_paused_before_answers(device: Device, process: WorkerProcess) -> None:
    """With its refusal, which takes no work."""
    device.paused.touch()
    assert answer(process, "work") and not device.said


def test_a_stopped_worker_holds_no_lock_of_the_ledger(device: Device, process: WorkerProcess) -> None:
    """Its owner can read the log and leave a run meanwhile, though the worker is in long transactions."""
    Ledger.open(device.folder / "ledger.sqlite")
    process.start()
    opened = []

    def owner() -> None:
        time.sleep(0.5)
        for number in range(1, 4):
            device.paused.touch()
            wait_for(lambda number=number: len(device.said) == 2 * number - 1)  # type: ignore[misc]
            started = time.monotonic()
            assert not Ledger.open(device.folder / "ledger.sqlite").entries()
            opened.append(time.monotonic() - started)
            device.paused.unlink()
            wait_for(lambda number=number: len(device.said) == 2 * number)  # type: ignore[misc]
        (device.folder / "enough").touch()

    thread = threading.Thread(target=owner)
    thread.start()
    process.answer("record")
    thread.join()
    assert len(opened) == 3 and max(opened) < 5


def test_a_stopped_worker_ends_with_its_device(device: Device) -> None:
    """Ctrl-C during a pause leaves no process behind."""
    with device.worker() as process:
        process.start()
        number = process._process.pid
        threading.Thread(target=lambda: wait_for(lambda: device.steps > 20) or device.paused.touch()).start()

        def interrupt(text: str) -> None:
            raise KeyboardInterrupt

        process._report = interrupt
        with pytest.raises(KeyboardInterrupt):
            process.answer("work")
        assert psutil.Process(number).status() == psutil.STATUS_STOPPED
    assert not psutil.pid_exists(number)
