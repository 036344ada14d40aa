"""One search in a background thread: its progress can be read while it runs, and it can be stopped.

An upsampler calls back after each step; a stopped search is interrupted in that call, so stopping takes one step and
upsamplers do not have to support it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import TypeVar

from torch import Tensor

from fedface.errors import FedfaceError
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot, Upsampled, Upsampler
from fedface.web.image_encoding import shown

T = TypeVar("T")
Make = Callable[[Progress, StepCallback], Upsampler]


@dataclass(frozen=True)
class Finished:
    upsampled: Upsampled  # (1, f) faces
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """The user pressed stop, closed the page, or uploaded another photo."""


@dataclass(frozen=True)
class Failed:
    sentence: str


@dataclass(frozen=True)
class Seen:
    """One face at the search's latest step."""

    number: int  # 0 to f - 1
    picture: Tensor  # (3, h, w)
    consistency_error: float


@dataclass(frozen=True)
class SearchProgress:
    """The changes since the last call."""

    share: float  # of the work, 0 to 1
    step: int  # of the faces that are still searched; 0 before the first
    steps: int
    faces: tuple[Seen, ...]  # those that changed


class _Break(Exception):
    """Interrupts an upsampler."""


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start a call in a thread of its own, which ends with the process, unlike those of a pool."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # raised by `result`
            future.set_exception(error)

    Thread(target=run, name="fedface web call", daemon=True).start()
    return future


class BackgroundSearch:
    """One search, started at once. Thread-safe."""

    def __init__(self, make: Make, low: LowImages, faces: int, truth: Images) -> None:
        """Build an upsampler and search `faces` faces for one photo.

        Args:
            make: Builds the upsampler, given its callbacks; runs in the search's thread.
            low: (1, 3, side, side), the pixels to fit.
            faces: How many, >= 1.
            truth: (1, 3, size, size), the original face, for the contact sheet.
        """
        self.low, self.truth = low, truth
        self._make, self._faces = make, faces
        self._stop, self._lock = Event(), Lock()
        self._share, self._step, self._steps = 0.0, 0, 0
        self._fresh: dict[int, Seen] = {}
        self.outcome: Finished | Stopped | Failed | None = None  # how it ended; None while it runs
        self._thread = Thread(target=self._run, name="fedface web search", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Interrupt at the next step; a finished search is not changed."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Wait until the search has ended, at most for this time."""
        self._thread.join(seconds)

    def progress(self) -> SearchProgress:
        """The faces that changed since the last call, and the progress."""
        with self._lock:
            faces, self._fresh = tuple(self._fresh.values()), {}
            return SearchProgress(self._share, self._step, self._steps, faces)

    def _run(self) -> None:
        # The outcome if a bug ends this thread; its traceback goes to the terminal.
        outcome: Finished | Stopped | Failed = Failed("The search failed; see the terminal.")
        started = time.monotonic()
        try:
            upsampled = self._make(self._progress, self._watch).upsample(
                self.low, faces_per_photo=self._faces
            )
            outcome = Finished(upsampled, time.monotonic() - started)
        except _Break:
            outcome = Stopped()
        except (FedfaceError, ValueError) as error:
            outcome = Failed(str(error))
        finally:
            self.outcome = Stopped() if self._stop.is_set() else outcome

    def _progress(self, done: int, of: int) -> None:
        self._break_if_stopped()
        self._share = min(1.0, done / max(1, of))

    def _watch(self, snapshot: StepSnapshot) -> None:
        self._break_if_stopped()
        pictures = shown(snapshot.images)
        with self._lock:
            self._step, self._steps = snapshot.step, snapshot.steps
            for face, picture, consistency_error in zip(
                snapshot.faces.tolist(), pictures, snapshot.consistency_error.tolist(), strict=True
            ):
                self._fresh[face] = Seen(face, picture, consistency_error)

    def _break_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Break
