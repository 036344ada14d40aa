"""How far a run on remote devices is: lines for the operator's display, and a file in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from fedface.atomic_io import replace_text
from fedface.codec import dumps
from fedface.text import sanitize_text

MARK = "fedface: "  # begins our lines among those that Flower logs of a run
FILE = "progress.json"
LONGEST = 2000  # characters of a line


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The present stage of a run."""

    version: ClassVar[int] = 1

    stage: str  # such as "round 2 of 6: devices train"
    steps: int  # of the stage, such as the devices that were asked; 0: unknown
    done: int
    since: str  # when the stage began: ISO 8601, UTC


class ReportedProgress:
    """A ProgressListener that prints a line for each stage and writes each step to the run's folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` exists."""
        self._file = folder / FILE
        self._stage, self._steps, self._since = "", 0, ""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins."""
        self._stage, self._steps = name, steps
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self.advance(0)
        self.message(name)

    def advance(self, done: int) -> None:
        """Not printed: a log has no progress bar."""
        progress = RunProgress(stage=self._stage, steps=self._steps, done=done, since=self._since)
        replace_text(self._file, dumps(progress))

    def message(self, sentence: str) -> None:
        """One line, whatever devices wrote into it."""
        print(f"{MARK}{sanitize_text(sentence, LONGEST)}", flush=True)
