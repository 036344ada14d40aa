"""One search in a background thread: its progress can be read while it runs, and it can be stopped.

An upsampler calls back after each step; a stopped search is interrupted in that call, so stopping takes one step and
upsamplers do not have to support it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

from torch import Tensor

from fedface.errors import FedfaceError
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot, Upsampled, Upsampler
from fedface.web.image_encoding import shown

Make = Callable[[Progress, StepCallback], Upsampler]


@dataclass(frozen=True)
class Finished:
    """The search came to its end."""

    made: Upsampled  # (1, f) faces
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """Somebody pressed stop, closed the page, or dropped another photo."""


@dataclass(frozen=True)
class Failed:
    """The search could not be done."""

    sentence: str


@dataclass(frozen=True)
class Seen:
    """One face as the search last showed it."""

    number: int  # 0 to f - 1
    picture: Tensor  # (3, h, w)
    consistency_error: float


@dataclass(frozen=True)
class SearchProgress:
    """What changed since somebody last looked."""

    share: float  # of the work, 0 to 1
    step: int  # of the faces that are still searched; 0 before the first
    steps: int
    faces: tuple[Seen, ...]  # those that changed


class _Break(Exception):
    """Leaves an upsampler in the middle of its work."""


class BackgroundSearch:
    """One search, started at once. Any thread may look at it or stop it."""

    def __init__(self, make: Make, low: LowImages, faces: int, truth: Images) -> None:
        """Make an upsampler and search `faces` faces for one photo.

        Args:
            make: Makes the upsampler, given what it should call back; runs in the search's thread.
            low: (1, 3, side, side), the pixels to fit.
            faces: How many, >= 1.
            truth: (1, 3, size, size), the face that the pixels came from; kept for the sheet.
        """
        self.low, self.truth = low, truth
        self._make, self._faces = make, faces
        self._stop, self._lock = Event(), Lock()
        self._share, self._step, self._steps = 0.0, 0, 0
        self._fresh: dict[int, Seen] = {}
        self._outcome: Finished | Stopped | Failed | None = None
        self._thread = Thread(target=self._run, name="fedface web search", daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> Finished | Stopped | Failed | None:
        """How it ended; None while it runs."""
        return self._outcome

    def stop(self) -> None:
        """Break off at the next step; a search that has ended stays as it is."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Until the search has ended, or so long at most."""
        self._thread.join(seconds)

    def progress(self) -> SearchProgress:
        """The faces that changed since the last call, and how far the work is."""
        with self._lock:
            faces, self._fresh = tuple(self._fresh.values()), {}
            return SearchProgress(self._share, self._step, self._steps, faces)

    def _run(self) -> None:
        # What stays if this thread dies of a bug; its traceback goes to the terminal.
        outcome: Finished | Stopped | Failed = Failed("The search broke off; the terminal says why.")
        started = time.monotonic()
        try:
            made = self._make(self._progress, self._watch).upsample(self.low, faces_per_photo=self._faces)
            outcome = Finished(made, time.monotonic() - started)
        except _Break:
            outcome = Stopped()
        except (FedfaceError, ValueError) as error:
            outcome = Failed(str(error))
        finally:
            self._outcome = Stopped() if self._stop.is_set() else outcome

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
