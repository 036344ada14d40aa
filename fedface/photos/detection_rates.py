"""How many faces a detector finds, group by group: the first place where a photo library becomes unfair."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedface.errors import LibraryError, PhotoError
from fedface.measurements import Interval, rate_interval
from fedface.photos.face_alignment import Detector
from fedface.photos.labelled_faces import first_per_group, labelled_sets, name_problems

log = logging.getLogger("fedface.photos")

GREY = 128
ALL = "all"
LABELS = ("race", "gender")  # columns of a labelled set; photos are balanced over all their combinations


@dataclass(frozen=True, kw_only=True)
class DetectionRate:
    """Photos of one group in which a detector found at least one face."""

    detector: str
    group: str  # ALL is every group together
    found: int
    count: int
    seconds: float  # of the processor per photo, detection alone

    @property
    def interval(self) -> Interval:
        return rate_interval(self.found, self.count)


def measure_detection(path: Path, detector: Detector, *, per_cell: int | None = None) -> list[DetectionRate]:
    """Rates by each of LABELS in turn, and last of all photos, over equally many photos of each crossed group.

    Args:
        path: A labelled set (see `labelled_sets`).
        per_cell: Only the first so many photos of each combination of labels.

    Raises:
        LibraryError: No set has such columns.
    """
    found: Counter[tuple[int, str]] = Counter()  # by the label's place and the group
    count: Counter[tuple[int, str]] = Counter()
    seconds: defaultdict[tuple[int, str], float] = defaultdict(float)
    for groups, pixels in padded_faces(path, LABELS, per_group=per_cell):
        started = time.process_time()
        try:
            hit = bool(detector.find(pixels))
        except Exception as error:
            # One broad net: the photo counts as one in which no face was found, and the others are measured.
            log.warning("%s failed on a photo of the group %s (%r)", detector.name, ", ".join(groups), error)
            hit = False
        spent = time.process_time() - started
        for key in enumerate((*groups, ALL)):
            found[key] += hit
            count[key] += 1
            seconds[key] += spent
    return [
        DetectionRate(
            detector=detector.name,
            group=key[1],
            found=found[key],
            count=count[key],
            seconds=seconds[key] / count[key],
        )
        for key in sorted(count)
    ]


def padded_faces(
    path: Path, labels: Sequence[str], *, per_group: int | None = None
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The pictures of a labelled set with their labels, each in the middle of a grey picture twice as large.

    Such sets are cut so tightly that detectors, which expect a head with room around it, would miss faces for
    that reason alone. All rows count, those whose CSV has no landmarks included; pictures that cannot be read are named
    in the log and left out.

    Args:
        path: A labelled set (see `labelled_sets`).
        labels: The columns that make the groups, crossed.
        per_group: Only the first so many of each group.

    Raises:
        LibraryError: No set has such columns.
    """
    taken: Counter[tuple[str, ...]] = Counter()
    sets = [faces for faces in labelled_sets(path) if all(name in faces.rows[0].labels for name in labels)]
    if not sets:
        raise LibraryError(f"no labelled faces with the columns {', '.join(labels)} at {path}")
    for faces in sets:
        problems = [*faces.problems]
        groups = [tuple(row.labels[name] for name in labels) for row in faces.rows]
        chosen = first_per_group(groups, per_group, taken)
        for at, pixels in zip(chosen, faces.pixels([faces.rows[at] for at in chosen]), strict=True):
            if isinstance(pixels, PhotoError):
                problems.append(f"{faces.rows[at].where}: {faces.rows[at].file}: {pixels}; left out")
            else:
                yield groups[at], padded(pixels)
        name_problems(problems)


def padded(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 (h, w, 3), in the middle of a grey one of twice its width and height."""
    height, width = pixels.shape[:2]
    return np.pad(
        pixels,
        ((height // 2, height - height // 2), (width // 2, width - width // 2), (0, 0)),
        constant_values=GREY,
    )
