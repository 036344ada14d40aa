"""Output of every command: tables, progress bars, warnings, and how an error or Ctrl-C ends the process.

Results go to standard output; progress and errors go to standard error.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import FrameType
from typing import Any, NoReturn

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedface.codec import encode
from fedface.errors import ConfigError, FedfaceError
from fedface.number_format import SPACE
from fedface.text import sanitize_text

if sys.stdout is None or sys.stderr is None:  # closed by the shell: `>&-`
    discarded = open(os.devnull, "w", encoding="utf-8")
    sys.stdout, sys.stderr = sys.stdout or discarded, sys.stderr or discarded
# A pipe has no width; rich's default of 80 columns would fold every table.
# Names of files, photos and weights may come from others: brackets and colons in them are text, not markup.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
notes = Console(stderr=True, markup=False, emoji=False)
LONGEST = 4000  # characters of an error, or of one cell, that reach a terminal
INTERRUPT_WINDOW = 2.0  # seconds within which several Ctrl-C count as one
EXTRAS = {"matplotlib": "reports", "fastapi": "web", "uvicorn": "web", "ray": "simulation", "cv2": "yunet"}
# Without markup, typer still escapes "[required]" for rich where rich is installed, and prints a backslash.
typer.core.HAS_RICH = False


def say(text: str | Table, style: str | None = None) -> None:
    """Print a table, or text on one line however long it is; what a terminal cannot print becomes a question mark."""
    is_text = isinstance(text, str)
    console.print(cell(text) if is_text else text, style=style, highlight=False, soft_wrap=is_text)


def note(text: str) -> None:
    """Print text on one line of standard error."""
    notes.print(text, highlight=False, soft_wrap=True)


def table_of(
    headings: Iterable[str], rows: Iterable[Iterable[object]] = (), *, title: str | None = None
) -> Table:
    """A table without a frame."""
    table = Table(*headings, box=None, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def facts_of(rows: Iterable[tuple[str, str]]) -> Table:
    """Rows of a heading and a sentence, without a frame."""
    table = Table.grid("heading", "sentence", padding=(0, 2, 0, 0))
    for heading, sentence in rows:
        table.add_row(heading, cell(sentence))
    return table


def print_json(value: Any) -> None:
    """Print plain data or a dataclass tree as JSON, in ASCII; infinite numbers as null, other values as text."""
    print(json.dumps(_finite(encode(value) if is_dataclass(value) else value), indent=1, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBars:
    """Progress bars on the terminal, plain lines elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: int | None = None
        self._live = progress.console.is_terminal

    def stage(self, name: str, steps: int) -> None:
        """Start the next stage; 0 steps: its length is unknown."""
        self._finish()
        name = cell(name)  # it may hold the name of another person's photo
        if not self._live:
            self._progress.console.print(f"{name} ...", highlight=False)
        self._task = int(self._progress.add_task(name, total=steps))

    def advance(self, done: int) -> None:
        """Set how many steps of the stage are done."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)  # type: ignore[arg-type]

    def message(self, sentence: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(cell(sentence), highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)  # type: ignore[arg-type]
            self._task = None


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Bars on standard error, removed at the end of the command."""
    described = TextColumn("{task.description}", markup=False)
    columns = (described, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Results that are redirected to a file must not follow the bars to standard error.
    on_terminal = sys.stdout.isatty()
    with Progress(*columns, console=notes, transient=True, redirect_stdout=on_terminal) as progress:
        yield ProgressBars(progress)


def cell(value: object) -> str:
    """A value as text on one line that a terminal can print."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(part)}" for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(cell(part) for part in value)
    return sanitize_text(str(value).replace(SPACE, " "), LONGEST)


def one_line(text: str) -> str:
    """Text without line breaks; other characters that a terminal cannot print become question marks."""
    return sanitize_text(re.sub(r"\s*[\r\n]\s*", " ", text).strip(), LONGEST)


def warn(text: str) -> None:
    """One line on standard error."""
    note(f"fedface: warning: {one_line(text)}")


def call(app: typer.Typer) -> None:
    """Run a command line; a FedfaceError is printed as one sentence, with exit code 2."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    codecs.register_error("fedface", _nearest_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fedface")
    with _one_interrupt():
        _call(app)


def _nearest_letters(error: UnicodeError) -> tuple[str, int]:
    """For a terminal that shows ASCII or Latin-1 alone: é as e, a narrow space as a space, others as "?"."""
    assert isinstance(error, UnicodeEncodeError)
    letters = unicodedata.normalize("NFKD", error.object[error.start : error.end])
    return "".join(letter for letter in letters if letter.isascii()) or "?", error.end


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Treat several Ctrl-C in quick succession as one: a second one would interrupt the cleanup after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0
    notice = threading.Timer(INTERRUPT_WINDOW, _say_stopping)
    notice.daemon = True

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            notice.start()
            raise KeyboardInterrupt
        ending(number, frame)

    def ending(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - first > INTERRUPT_WINDOW:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        notice.cancel()
        # From here to the end of the process a late Ctrl-C ends it at once, without a traceback.
        signal.signal(signal.SIGINT, ending if first else before)


def _call(app: typer.Typer) -> None:
    try:
        for number, argument in enumerate(sys.argv[1:], start=1):
            # Such as --out "$UNSET", which would mean this folder.
            if not argument or re.fullmatch("--[a-z-]+=", argument):
                raise ConfigError(
                    f"argument {number} of the command is empty; give it a value or leave it out"
                )
        try:
            app()
        finally:
            sys.stdout.flush()
    except FedfaceError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'fedface[{extra}]'")
    except BrokenPipeError:  # its reader has seen enough: `| head`
        _discard_output()
        sys.exit(1)
    except OSError as error:
        # A full disk or an impossible path. An OSError that names no file may be a bug, and keeps its traceback.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        if error.filename is None:
            _discard_output()
        _fail(f"{error.filename or 'the disk'}: {error.strerror}")
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except SystemExit as end:
        # Typer turns an interrupt into this exit code and prints nothing.
        if end.code == 130:
            _say_interrupted()
        raise


def _discard_output() -> None:
    """Discard further output, so that Python does not try to flush it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(reason: str) -> NoReturn:
    note(f"fedface: {one_line(reason)}")
    sys.exit(2)


def _say_stopping() -> None:
    note(
        "stopping, which can take a minute; press Ctrl-C again to stop at once. "
        "Finished work is not lost either way."
    )


def _say_interrupted() -> None:
    note(
        "interrupted; finished work is stored. Continue a run with --resume and the same options; repeat a command on "
        "photos with the same options."
    )
