"""The process that answers tasks: started for the first, and ended when none has come for a while.

A device waits far longer than it works. What trains needs 300 to 600 MB, which are given back with the process.
"""

from __future__ import annotations

import logging
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.app import Message as FlowerMessage

from fedface.errors import FederationError
from fedface.platforms import PROCESSES, lower_priority
from fedface.sandbox import end_with_parent
from fedface.transport.executor import answer_task, installed_app

WARM_SECONDS = 600.0  # how long a worker waits for the next task: the time between the rounds of a run


class WorkerProcess:
    """A worker for the tasks of one SuperNode; a context manager that ends it on leaving."""

    def __init__(self, address: str, device_file: Path) -> None:
        """`address`, HOST:PORT, of the SuperNode's runtime endpoint."""
        self._address, self._device_file = address, device_file
        self._process: Any = None
        self._tasks: Connection | None = None
        self._last_task = 0.0

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start the process, if there is none; it gets the restrictions of this one (fedface/sandbox.py)."""
        if self._process is not None:
            return
        self._tasks, its_end = PROCESSES.Pipe()
        self._process = PROCESSES.Process(
            target=_work, args=(its_end, self._address, self._device_file), name="fedface worker"
        )
        self._process.start()
        its_end.close()

    def answer(self, token: str) -> str:
        """Let the process answer the task of a token; returns its sentence. Raises FederationError if it ends."""
        assert self._tasks is not None
        try:
            self._tasks.send(token)
            sentence = str(self._tasks.recv())
        except (EOFError, OSError) as error:
            process = self._process
            self._end()
            raise FederationError(
                f"the process that answers tasks ended with exit code {process.exitcode}"
            ) from error
        self._last_task = time.monotonic()
        return sentence

    def rest(self) -> None:
        """End the process if its last task was answered long ago."""
        if self._process is not None and time.monotonic() - self._last_task > WARM_SECONDS:
            self._end()

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


def _work(tasks: Connection, address: str, device_file: Path) -> None:
    """The process: answer the task of each token, until no more can come."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the process that started this one, and ends it
    lower_priority()
    log_to_stderr()
    installed = installed_app(device_file)

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        from fedface.transport.client import flush_denormals  # noqa: PLC0415  as in installed_app

        flush_denormals()
        return installed(message, context)

    try:
        while True:
            tasks.send(answer_task(address, tasks.recv(), answer))
    except (EOFError, OSError):
        return
