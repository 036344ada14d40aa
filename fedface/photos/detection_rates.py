"""How many faces a detector finds, group by group: the first place where a photo library becomes unfair."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from fedface.errors import LibraryError, PhotoError
from fedface.measurements import Interval, rate_interval
from fedface.photos.face_alignment import Detector
from fedface.photos.labelled_faces import first_per_group, labelled_sets, name_problems

log = logging.getLogger("fedface.photos")

GREY = 128
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class DetectionRate:
    """Photos of one group in which a detector found at least one face."""

    detector: str
    group: str  # ALL is every group together
    found: int
    count: int
    seconds: float  # of the processor per photo, detection alone

    def plus(self, other: DetectionRate) -> DetectionRate:
        """With the photos of another rate of the same detector."""
        count = self.count + other.count
        seconds = (self.seconds * self.count + other.seconds * other.count) / count
        return replace(self, found=self.found + other.found, count=count, seconds=seconds)

    @property
    def interval(self) -> Interval:
        """The rate with its interval."""
        return rate_interval(self.found, self.count)


def detection_rates(photos: Iterable[tuple[str, np.ndarray]], detector: Detector) -> list[DetectionRate]:
    """Count the photos of each group in which the detector finds a face.

    Args:
        photos: Group and upright sRGB pixels, uint8 (h, w, 3), of photos that each show a face.

    Returns:
        One rate a group, in the order of names, and last the one of all photos together.
    """
    found: Counter[str] = Counter()
    count: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for group, pixels in photos:
        started = time.process_time()
        try:
            hit = bool(detector.find(pixels))
        except Exception as error:
            # One broad net: the photo counts as one in which no face was found, and the others are measured.
            log.warning("%s failed on a photo of the group %s (%r)", detector.name, group, error)
            hit = False
        spent = time.process_time() - started
        for name in (group, ALL):
            found[name] += hit
            count[name] += 1
            seconds[name] += spent
    return [
        DetectionRate(
            detector=detector.name,
            group=group,
            found=found[group],
            count=count[group],
            seconds=seconds[group] / count[group],
        )
        for group in [*sorted(set(count) - {ALL}), *([ALL] if count else [])]
    ]


def pooled(rates: Sequence[DetectionRate], group_of: Callable[[str], str]) -> list[DetectionRate]:
    """Rates of coarser groups: those of one detector's groups for which `group_of` gives the same name."""
    sums: dict[str, DetectionRate] = {}
    for rate in rates:
        if rate.group != ALL:
            name = group_of(rate.group)
            sums[name] = replace(rate, group=name) if name not in sums else sums[name].plus(rate)
    return [sums[name] for name in sorted(sums)]


def measure_detection(
    path: Path, detector: Detector, *, labels: Sequence[str] = ("race", "gender"), per_cell: int | None = None
) -> list[DetectionRate]:
    """Rates by each label in turn, and last of all photos, over equally many photos of each crossed group.

    Args:
        path: A labelled set (see `labelled_sets`).
        labels: Columns of the set; the photos are balanced over all their combinations.
        per_cell: Only the first so many photos of each combination.

    Raises:
        LibraryError: No set has such columns.
    """
    cells = detection_rates(padded_faces(path, label="+".join(labels), per_group=per_cell), detector)
    by_label = [pooled(cells, partial(_label_at, place)) for place in range(len(labels))]
    return [*chain(*by_label), *(cell for cell in cells if cell.group == ALL)]


def _label_at(place: int, cell: str) -> str:
    return cell.split(", ")[place]


def padded_faces(path: Path, *, label: str, per_group: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """The pictures of a labelled set, each in the middle of a grey picture twice as large.

    Such sets are cut so tightly that detectors, which expect a head with room around it, would miss faces for
    that reason alone. All rows count, those whose CSV has no landmarks included; pictures that cannot be read are named
    in the log and left out.

    Args:
        path: A labelled set (see `labelled_sets`).
        label: The column that says the group; several columns joined by "+" make crossed groups.
        per_group: Only the first so many of each group.

    Raises:
        LibraryError: No set has such columns.
    """
    columns = label.split("+")
    taken: Counter[str] = Counter()
    sets = [faces for faces in labelled_sets(path) if all(name in faces.rows[0].labels for name in columns)]
    if not sets:
        raise LibraryError(f"no labelled faces with the columns {', '.join(columns)} at {path}")
    for faces in sets:
        problems = [*faces.problems]
        groups = [", ".join(row.labels[name] for name in columns) for row in faces.rows]
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
    canvas = np.full((2 * height, 2 * width, 3), GREY, dtype=np.uint8)
    top, left = height // 2, width // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
