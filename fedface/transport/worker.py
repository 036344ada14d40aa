"""The process that answers tasks: started for the first, and ended when none has come for a while.

A device waits far longer than it works. What trains needs 300 to 600 MB, which are given back with the process.

While it works, this process checks the owner's conditions. Where they do not hold any more, the worker is stopped
(SIGSTOP) until they do: nothing is lost, nothing leaves, and the SuperNode still gets heartbeats. It learns for how
long, so that its replies leave at public times all the same (device/reply_time.py), and it is never stopped in a
transaction of the ledger, so that the owner's commands can open it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from fedface.errors import ConfigError, FederationError
from fedface.platforms import PROCESSES, fix_allocator_thresholds, lower_priority
from fedface.privacy.hash_chain import without_transactions
from fedface.privacy.participation_conditions import (
    ConditionsNotMet,
    EnvironmentOfWork,
    ParticipationConditions,
)
from fedface.sandbox import end_with_parent
from fedface.transport.executor import answer_task, installed_app

WARM_SECONDS = 600.0  # how long a worker waits for the next task: the time between the rounds of a run
CHECK_SECONDS = 1.0  # between checks of the owner's conditions
MIN_STOP_SECONDS = 10.0  # a load near its limit must not stop and continue the worker every second
END_SECONDS = 5.0  # for a process that has closed its connection to end, and to have an exit code
LEDGER_SECONDS = 1.0  # to wait for the end of a transaction; one that prices a run can take longer


class WorkerProcess:
    """A worker for the tasks of one SuperNode; a context manager that ends it on leaving."""

    def __init__(
        self, address: str, device_file: Path, *, ledger: Path, paused: Path, report: Callable[[str], None]
    ) -> None:
        """
        Args:
            address: HOST:PORT of the SuperNode's runtime endpoint.
            device_file: The owner's file.
            ledger: The device's ledger.
            paused: The file that exists while the device is paused.
            report: Gets a sentence when the worker is stopped and when it continues.
        """
        self._address, self._device_file = address, device_file
        self._ledger, self._paused, self._report = ledger, paused, report
        self._process: Any = None
        self._tasks: Connection | None = None
        self._last_task = 0.0
        # How long the process has been stopped in all. Shared memory needs a file for a moment, so it is created here,
        # before this process is restricted.
        self._stopped_seconds = PROCESSES.RawValue("d", 0.0)
        self._conditions: ParticipationConditions | None = None  # for the task that is being answered
        self._environment = EnvironmentOfWork()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start the process, if there is none; it gets the restrictions of this one (fedface/sandbox.py)."""
        if self._process is not None:
            return
        self._tasks, its_end = PROCESSES.Pipe()
        self._stopped_seconds.value = 0.0
        self._process = PROCESSES.Process(
            target=_work,
            args=(its_end, self._stopped_seconds, self._address, self._device_file),
            name="fedface worker",
        )
        self._process.start()
        its_end.close()

    def answer(self, token: str) -> str:
        """Let the process answer the task of a token; returns its sentence. Raises FederationError if it ends."""
        assert self._tasks is not None
        self._conditions, self._environment = None, EnvironmentOfWork()
        held = False
        try:
            self._tasks.send(token)
            while True:
                if self._tasks.poll(CHECK_SECONDS):
                    received = self._tasks.recv()
                    if isinstance(received, str):
                        self._last_task = time.monotonic()
                        return received
                    self._conditions = received
                # Where the conditions do not hold from the beginning, the device refuses the task, which takes no work.
                if (why := self._why_not()) is None:
                    held = self._conditions is not None
                elif held:
                    self._stop(why)
        except (EOFError, OSError, psutil.NoSuchProcess) as error:
            process = self._process
            process.join(END_SECONDS)
            self._end()
            raise FederationError(
                f"the process that answers tasks ended with exit code {process.exitcode}"
            ) from error

    def rest(self) -> None:
        """End the process if its last task was answered long ago."""
        if self._process is not None and time.monotonic() - self._last_task > WARM_SECONDS:
            self._end()

    def _why_not(self) -> str | None:
        """Why this device may not work now; None if it may, as far as its conditions are known yet."""
        if self._paused.exists():
            return "this device is paused by its owner"
        try:
            if self._conditions is not None:
                self._conditions.check(self._environment)
        except ConditionsNotMet as reason:
            return reason.private
        return None

    def _stop(self, why: str) -> None:
        """Stop the process, and return when it has been continued; at once if it is in a transaction of the ledger."""
        process = psutil.Process(self._process.pid)
        with without_transactions(self._ledger, LEDGER_SECONDS) as free:
            if not free:
                return
            process.suspend()
            began = time.monotonic()
            # Until the signal has arrived, which waits for a disk that the process waits for.
            while process.status() != psutil.STATUS_STOPPED and time.monotonic() - began < LEDGER_SECONDS:
                time.sleep(0.001)
        self._report(f"stopped: {why}")
        while time.monotonic() - began < MIN_STOP_SECONDS or self._why_not() is not None:
            if not self._process.is_alive():
                raise EOFError
            time.sleep(CHECK_SECONDS)
        self._stopped_seconds.value += time.monotonic() - began
        process.resume()
        self._report("continued")

    def _end(self) -> None:
        """Whatever it does: what a task has recorded is on the disk, and what it has not is not needed."""
        process, self._process = self._process, None
        if process is not None and self._tasks is not None:
            self._tasks.close()
            process.kill()
            process.join()


def log_to_stderr() -> None:
    """Warnings of this process, as plain lines."""
    log = logging.getLogger("fedface")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False


def _work(tasks: Connection, stopped_seconds: Any, address: str, device_file: Path) -> None:
    """The process: answer the task of each token, after the conditions for it, until no more can come."""
    end_with_parent(at_once=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process, which then ends this one
    lower_priority()
    fix_allocator_thresholds()
    log_to_stderr()
    installed = installed_app(device_file, lambda: float(stopped_seconds.value))

    def answer(*given: Any) -> Any:
        from fedface.transport.client import prepare_torch  # noqa: PLC0415  as in installed_app

        prepare_torch()
        return installed(*given)

    try:
        while True:
            token = tasks.recv()
            tasks.send(_conditions(device_file))
            tasks.send(answer_task(address, token, answer))
    except (EOFError, OSError):
        return


def _conditions(device_file: Path) -> ParticipationConditions | None:
    """Those of the owner's policy; None if the file cannot be read, which the answer to the task reports."""
    from fedface.device.config import read_device_file  # noqa: PLC0415  a waiting device does without

    try:
        return read_device_file(device_file).policy.conditions
    except ConfigError:
        return None
