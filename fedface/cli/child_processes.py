"""Programs that a command starts, watches and stops: their output goes to a file, and none is restarted silently."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from fedface.cli.console import one_line
from fedface.errors import FederationError
from fedface.platforms import PROCESSES, lock
from fedface.sandbox import end_with_parent

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0  # for a program to listen
STOP_SECONDS = 10.0  # for a program to end by itself


class FunctionProcess:
    """A process that runs a function, with the methods of subprocess.Popen that `Child` uses."""

    def __init__(self, process: Any) -> None:
        """`process`: a multiprocessing.Process that was started."""
        self._process = process
        self.terminate, self.kill = process.terminate, process.kill

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> None:
        """Return when it has ended. Raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if timeout is not None and self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)


class Child:
    """One program and the file of its output since this start."""

    def __init__(self, process: subprocess.Popen[bytes] | FunctionProcess, log: Path, name: str) -> None:
        self.name = name
        self._process, self._log = process, log

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """What it printed, without colours."""
        return re.sub(r"\x1b\[\d*m", "", self._log.read_text(encoding="utf-8", errors="replace"))

    def why_ended(self) -> str:
        """A sentence with its exit code, and the reason that it printed."""
        text = self.output()
        if (
            reason := re.search(r"Exit Code: .*?(?=\n\n|\Z)", text, re.DOTALL)
        ) is not None:  # Flower's programs
            text = reason[0]
        how = "did not start" if self.running else f"ended with exit code {self._process.poll()}"
        return f"{self.name} {how}: {one_line(text)[-600:]}"

    def wait_until(self, condition: Callable[[], bool], *, seconds: float | None = None) -> None:
        """Return when the condition holds. Raises FederationError if the program ends, or after so many seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        while not condition():
            if not self.running or (end is not None and time.monotonic() > end):
                raise FederationError(self.why_ended())
            time.sleep(0.2)

    def stop(self) -> None:
        """End it, and return when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def started(command: Sequence[str], log: Path, *, folder: Path | None = None) -> Iterator[Child]:
    """Start a program, which ends on leaving, and on Linux also when this process is killed.

    Args:
        command: The program and its arguments; one that is installed beside this Python is found.
        log: The file of its output, which is replaced.
        folder: Its working directory.

    Raises:
        FederationError: The program is not installed, or runs already with this log.
    """

    try:
        with _locked(log, command[0]) as out:
            # The program inherits the lock with the file and holds it until it ends, even if this process is killed.
            process = subprocess.Popen(
                [path_of(command[0]), *command[1:]], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder,
                # Ctrl-C is for this process, which then stops the others in order.
                start_new_session=True, preexec_fn=end_with_parent if os.name == "posix" else None,
            )  # fmt: skip
    except FileNotFoundError as error:
        raise FederationError(f"{command[0]} is not installed here") from error
    child = Child(process, log, command[0])
    try:
        yield child
    finally:
        child.stop()


@contextmanager
def started_function(
    function: Callable[..., None], *arguments: object, log: Path, name: str
) -> Iterator[Child]:
    """As `started`, for a function of a module. On Linux its process shares the memory of what is imported here."""
    with _locked(log, name):
        pass
    process = PROCESSES.Process(target=_run_function, args=(log, function, arguments), name=name)
    process.start()
    child = Child(FunctionProcess(process), log, name)
    try:
        yield child
    finally:
        child.stop()


def _run_function(log: Path, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    end_with_parent()
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab") as out:
        lock(out.fileno(), wait=True)  # until this process ends
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        function(*arguments)


@contextmanager
def _locked(log: Path, name: str) -> Iterator[BinaryIO]:
    """The empty file of a program's output. Raises FederationError if the program runs already."""
    with log.open("ab") as out:
        try:
            lock(out.fileno(), wait=False)
        except OSError as error:
            raise FederationError(f"{name} is running already and writes {log}; stop it first") from error
        out.truncate(0)
        yield out


def path_of(program: str) -> str:
    """The program that is installed beside this Python, or its name, for the search path."""
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else program


def listens(port: int) -> bool:
    """Whether a program of this machine listens on a TCP port."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which services are stopped, raises KeyboardInterrupt as Ctrl-C does."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
