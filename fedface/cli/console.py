"""What every command shares: where it prints, its bars, its common options, and how an error ends.

Called from the other files of fedface/cli. Results go to standard output, stages and errors to standard error.
"""

from __future__ import annotations

import errno
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedface.errors import FedfaceError
from fedface.text import sanitize_text

# A pipe has no width of its own; eighty columns would fold every table.
# Names of files, photos and weights may be a stranger's: brackets and colons in them are words, not markup.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
notes = Console(stderr=True, markup=False, emoji=False)
LONGEST = 4000  # characters of an error, or of one cell, that reach a terminal
IN_ONE_GO = 2.0  # seconds within which several Ctrl-C are one
# Without markup, typer still escapes "[required]" for it where it finds rich, and prints a backslash.
typer.core.HAS_RICH = False

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DetectorOption = Annotated[
    Path | None, typer.Option(help="A YuNet .onnx file; the embedded detector otherwise.")
]


class ProgressBars:
    """Progress bars on the terminal, plain lines elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: int | None = None
        self._live = progress.console.is_terminal

    def stage(self, name: str, steps: int) -> None:
        """A stage begins."""
        self._finish()
        name = sanitize_text(name, LONGEST)  # a photo's name is a stranger's
        if not self._live:
            self._progress.console.print(f"{name} ...", highlight=False)
        self._task = int(self._progress.add_task(name, total=steps))

    def advance(self, done: int) -> None:
        """A stage moves."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)  # type: ignore[arg-type]

    def message(self, sentence: str) -> None:
        """A line that stays."""
        self._progress.console.print(sentence, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)  # type: ignore[arg-type]
            self._task = None


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Bars on standard error, gone when the command is done."""
    described = TextColumn("{task.description}", markup=False)
    columns = (described, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Results that somebody keeps in a file must not follow the bars to standard error.
    aloud = sys.stdout.isatty()
    with Progress(*columns, console=notes, transient=True, redirect_stdout=aloud) as progress:
        yield ProgressBars(progress)


def cell(value: object) -> str:
    """A value as the text of one cell of a table."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(part)}" for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(cell(part) for part in value)
    return sanitize_text(str(value), LONGEST)


def one_line(words: str) -> str:
    """Words that a terminal can show: line breaks become spaces, what else is not printable a question mark."""
    return sanitize_text(re.sub(r"\s*[\r\n]\s*", " ", words).strip(), LONGEST)


def warn(words: str) -> None:
    """One line on standard error, beside a result."""
    notes.print(f"fedface: warning: {one_line(words)}", highlight=False, soft_wrap=True)


def call(app: typer.Typer) -> None:
    """Run a command line; our own errors become one sentence and exit code 2."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    with _one_interrupt():
        _call(app)


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Several Ctrl-C in quick succession are one: the second would break into what ends the command after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0
    patience = threading.Timer(IN_ONE_GO, _say_stopping)
    patience.daemon = True

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            patience.start()
            raise KeyboardInterrupt
        ending(number, frame)

    def ending(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - first > IN_ONE_GO:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        patience.cancel()
        # From here to the end of the process a late Ctrl-C ends it at once, without a traceback.
        signal.signal(signal.SIGINT, ending if first else before)


def _call(app: typer.Typer) -> None:
    try:
        app()
    except FedfaceError as error:
        notes.print(f"fedface: {one_line(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        # A disk that is full or a path that cannot be: what has no file to name may be a bug, and stays one.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        reason = f"{error.filename or 'the disk'}: {error.strerror}"
        notes.print(f"fedface: {one_line(reason)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except SystemExit as end:
        # Typer turns an interrupt into this code, without a word.
        if end.code == 130:
            _say_interrupted()
        raise


def _say_stopping() -> None:
    notes.print(
        "stopping: what is being computed ends first, which can take a minute; Ctrl-C again ends it at once, and loses "
        "nothing that was finished",
        highlight=False,
        soft_wrap=True,
    )


def _say_interrupted() -> None:
    notes.print(
        "interrupted; what was finished is kept: continue a run with --resume and the same options as before, photos "
        "by the same command with the same options",
        highlight=False,
        soft_wrap=True,
    )
