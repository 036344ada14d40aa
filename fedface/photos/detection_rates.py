"""How many faces a detector finds, group by group: the first place where a photo library becomes unfair.

Source of the interval: Wilson (1927), doi:10.1080/01621459.1927.10502953.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import Detector
from fedface.photos.labelled_faces import labelled_sets, name_problems

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

    @property
    def rate(self) -> float:
        """In [0, 1]."""
        return self.found / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the rate."""
        return wilson(self.found, self.count)


def wilson(found: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share: lower and upper end in [0, 1], for `found` of `count` >= 1 photos."""
    if not 0 <= found <= count or count < 1:
        raise ValueError(f"expected 0 <= found <= count and count >= 1, got {found} of {count}")
    share, spread = found / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def detection_rates(photos: Iterable[tuple[str, np.ndarray]], detector: Detector) -> list[DetectionRate]:
    """Count the photos of each group in which the detector finds a face.

    Args:
        photos: Group and upright sRGB pixels, uint8 (h, w, 3), of photos that each show a face.
        detector: Any detector.

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
    members: defaultdict[str, list[DetectionRate]] = defaultdict(list)
    for rate in rates:
        if rate.group != ALL:
            members[group_of(rate.group)].append(rate)
    return [_sum(name, members[name]) for name in sorted(members)]


def _sum(name: str, parts: Sequence[DetectionRate]) -> DetectionRate:
    count = sum(part.count for part in parts)
    return DetectionRate(
        detector=parts[0].detector,
        group=name,
        found=sum(part.found for part in parts),
        count=count,
        seconds=sum(part.seconds * part.count for part in parts) / count,
    )


def measure_detection(
    path: Path, detector: Detector, *, labels: Sequence[str] = ("race", "gender"), per_cell: int | None = None
) -> list[DetectionRate]:
    """Rates by each label in turn, and last of all photos, over equally many photos of each crossed group.

    Args:
        path: A labelled set (see `labelled_sets`).
        detector: Any detector.
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
        chosen = []
        for row in faces.rows:
            group = ", ".join(row.labels[name] for name in columns)
            taken[group] += 1
            if per_group is None or taken[group] <= per_group:
                chosen.append((group, row))
        for (group, row), pixels in zip(chosen, faces.pixels([row for _, row in chosen]), strict=True):
            if isinstance(pixels, PhotoError):
                problems.append(f"{row.where}: {row.file}: {pixels}; left out")
            else:
                yield group, padded(pixels)
        name_problems(problems)


def padded(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 (h, w, 3), in the middle of a grey one of twice its width and height."""
    height, width = pixels.shape[:2]
    canvas = np.full((2 * height, 2 * width, 3), GREY, dtype=np.uint8)
    top, left = height // 2, width // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
