"""Which photos were taken together: the privacy unit "occasion", so that one birthday counts once and not forty times.

Whether two photos are linked depends on these two alone; an occasion is a connected component of the links. Hence the
property that privacy per occasion needs: without all photos of one occasion, every other occasion is unchanged. One
photo more can merge occasions, never split them. How well this works on real photos: docs/occasions.md.
Source of the fingerprint: N. Krawetz (2013), "Kind of like that": the difference hash, here in two directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from fedface.photos.capture_date import Precision
from fedface.validation import Above, In, checked

FINGERPRINT_BITS = 128
MIN_CONTRAST_BITS = 1.0  # grey levels of 255; a smaller step from cell to cell may be noise
# Rises and falls; above half of `max_fingerprint_distance`, so that two spots in the dark are not one picture.
MIN_CLEAR_STEPS = 6
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601
EARTH_KM = 6371.0
ROWS, COLUMNS = 64, 8192  # pairs that are compared at once; the block stays in the processor's cache
HOUR = 3_600_000_000  # microseconds
MAX_PENDING = 2_000_000  # links in memory before they are merged, 16 bytes each
BEGINNING = datetime(1970, 1, 1)
# Between which hours after `taken` a photo was taken. Local time is at most 14 hours ahead of UTC, 12 behind.
TAKEN_WITHIN: dict[Precision, tuple[int, int]] = {"exact": (0, 0), "day": (0, 24), "utc": (-12, 14)}


@dataclass(frozen=True, kw_only=True)
@checked
class OccasionRule:
    """When two photos count as taken together. Every larger number merges more, and protects more."""

    # Linked if both are dated and possibly no further apart than this ...
    gap_hours: Annotated[float, In("(0, 8760]")] = 4.0
    radius_km: Annotated[float, Above(0)] = 5.0  # ... unless both are placed, and further apart than this
    # Linked whatever the date if no more of the 128 bits of their fingerprints differ.
    max_fingerprint_distance: Annotated[int, In(f"[0, {FINGERPRINT_BITS}]")] = 10
    # Links all undated photos of one folder, and one whose date cannot be read with all of its folder; or none.
    undated: Literal["by-folder", "alone"] = "by-folder"


DEFAULT_RULE = OccasionRule()


@dataclass(frozen=True, kw_only=True)
class PhotoSignature:
    """What links a photo to others."""

    folder: Path
    taken: datetime | None = None  # local time of the camera, without a zone
    place: tuple[float, float] | None = None  # latitude and longitude in degrees
    fingerprint: bytes | None = None  # of `fingerprint`
    date_precision: Precision = "exact"  # of `taken`; a photo without an exact date counts as without a place
    content: bytes = b""  # hash of the file; empty: not known


def fingerprint(pixels: np.ndarray) -> bytes | None:
    """Whether brightness rises or falls between neighbouring cells of a coarse grid, one bit each.

    A copy that was saved again, smaller or worse, keeps nearly all bits; a cropped, turned or mirrored one does not.

    Args:
        pixels: The whole upright photo, uint8, shape (h, w, 3).

    Returns:
        16 bytes: 64 steps to the right in a grid of 8 x 9 cells, then 64 steps down in one of 9 x 8. `None` if
        too few steps are clear both up and down: a lens cap, a wall and a plain sky look like all their kind.
    """
    light = pixels.astype(np.float32)
    steps = np.concatenate([np.diff(_means(light, 8, 9), axis=1), np.diff(_means(light, 9, 8), axis=0)])
    rising, falling = (
        np.count_nonzero(steps > MIN_CONTRAST_BITS),
        np.count_nonzero(steps < -MIN_CONTRAST_BITS),
    )
    if min(rising, falling) < MIN_CLEAR_STEPS:
        return None
    return np.packbits(steps > 0).tobytes()


def _means(light: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The mean brightness of each cell of a grid over the whole picture (h, w, 3), shape (rows, columns)."""
    height, width = light.shape[:2]
    # Not `@`, which would start threads, and on a busy machine wait for them longer than it computes.
    strips = np.einsum("rh,hwc->rwc", _shares(height, rows), light) @ LUMA
    return np.asarray(np.einsum("rw,cw->rc", strips, _shares(width, columns)))


@lru_cache(maxsize=64)
def _shares(pixels: int, cells: int) -> np.ndarray:
    """What each pixel counts in each cell's mean, shape (cells, pixels): cells share the pixels that they cut."""
    edges = np.linspace(0, pixels, cells + 1)[:, None]
    place = np.arange(pixels)
    covered = np.minimum(edges[1:], place + 1) - np.maximum(edges[:-1], place)
    return (covered.clip(min=0) * (cells / pixels)).astype(np.float32)


def group(signatures: Sequence[PhotoSignature], rule: OccasionRule = DEFAULT_RULE) -> np.ndarray:
    """Which occasion each photo belongs to.

    Guarantees:
        * Two photos are linked or not by these two alone; occasions are the connected components of all links.
        * So: leave out a whole occasion, and the others stay as they were. Add photos, and occasions only merge.

    Args:
        signatures: The photos of one library, n of them, in any order.
        rule: When two of them are linked.

    Returns:
        int64, shape (n,): occasions are numbered from 0 in the order of their first photo.
    """
    groups = _Groups(len(signatures))
    _link_by_time(groups, signatures, rule)
    _link_copies(groups, signatures)
    _link_by_likeness(groups, signatures, rule.max_fingerprint_distance)
    if rule.undated == "by-folder":
        _link_by_folder(groups, signatures)
    return numbered(groups.merged())


def numbered(labels: np.ndarray) -> np.ndarray:
    """Equal labels, shape (n,), become equal numbers 0, 1, 2, ... in the order of their first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


class _Groups:
    """Groups of linked photos so far. Links come in arrays; those within a group are discarded."""

    def __init__(self, count: int) -> None:
        self._of = np.arange(count)
        self._links: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending = 0

    def link(self, left: np.ndarray, right: np.ndarray) -> None:
        """Put each left[i] with right[i]."""
        news = self._of[left] != self._of[right]
        self._links.append((self._of[left[news]], self._of[right[news]]))
        self._pending += int(np.count_nonzero(news))
        if self._pending > MAX_PENDING:
            self.merged()

    def all_linked(self, left: np.ndarray, right: np.ndarray) -> bool:
        """Whether all of these are in one group already, so that links among them add nothing."""
        one = self._of[left[0]]
        return bool((self._of[left] == one).all() and (self._of[right] == one).all())

    def merged(self) -> np.ndarray:
        """The group of each photo after all links, numbers below n."""
        if self._pending > 0:
            left, right = (np.concatenate(ends) for ends in zip(*self._links, strict=True))
            size, ones = len(self._of), np.ones(len(left), dtype=np.int8)
            graph = coo_array((ones, (left, right)), shape=(size, size))
            self._of = connected_components(graph, directed=False)[1][self._of]
        self._links, self._pending = [], 0
        return self._of


def _link_by_time(groups: _Groups, signatures: Sequence[PhotoSignature], rule: OccasionRule) -> None:
    """Link photos that are both dated, at most the gap apart, and not known to be further apart than the radius."""
    dated = []
    for index, signature in enumerate(signatures):
        if signature.taken is not None:
            # Whole microseconds: where a sum of floats is rounded must not decide who is together.
            since = (signature.taken - BEGINNING) // timedelta(microseconds=1)
            first, last = (since + hours * HOUR for hours in TAKEN_WITHIN[signature.date_precision])
            dated.append((first, last, index))
    dated.sort()
    time, latest, number = np.array(dated, dtype=np.int64).reshape(-1, 3).T
    gap = round(rule.gap_hours * HOUR)
    placed = time == latest
    placed &= np.array([signatures[photo].place is not None for photo in number], dtype=bool)
    _link_windows(groups, number, time, time[~placed] - gap, latest[~placed] + gap)
    points = np.array([_point(signatures[photo].place or (0.0, 0.0)) for photo in number[placed]])
    points = points.reshape(-1, 3)
    _link_neighbours(groups, number[placed], time[placed], gap, points, rule.radius_km)


def _link_windows(
    groups: _Groups, number: np.ndarray, time: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> None:
    """A photo without a place is linked to all within its window of sorted times: each window is one run.

    Two windows that meet hold the earlier end of one of their photos at least, so times stand for whole spans.
    """
    first = np.searchsorted(time, begins, side="left")
    last = np.searchsorted(time, ends, side="right") - 1
    covers = np.zeros(len(time) + 1, dtype=np.int64)
    np.add.at(covers, first, 1)
    np.add.at(covers, last, -1)
    follows = np.flatnonzero(covers.cumsum()[: max(0, len(time) - 1)] > 0)  # linked to the next in time
    groups.link(number[follows], number[follows + 1])


def _point(place: tuple[float, float]) -> tuple[float, float, float]:
    """A place on the unit sphere. By `math`: an array's functions may round by where a number stands in it."""
    latitude, longitude = math.radians(place[0]), math.radians(place[1])
    around = math.cos(latitude)
    return around * math.cos(longitude), around * math.sin(longitude), math.sin(latitude)


def _link_neighbours(
    groups: _Groups, number: np.ndarray, time: np.ndarray, gap: int, points: np.ndarray, radius_km: float
) -> None:
    """Placed photos within the gap and within reach, the latter by the chord between points on the sphere."""
    angle = radius_km / EARTH_KM
    chord = 2.0 * math.sin(angle / 2.0) if angle < math.pi else math.inf
    for rows, columns in _blocks(len(time), np.searchsorted(time, time + gap, side="right")):
        if groups.all_linked(number[rows], number[columns]):
            continue
        soon = np.abs(time[rows, None] - time[None, columns]) <= gap
        near = cdist(points[rows], points[columns], "sqeuclidean") <= chord**2
        left, right = _pairs(soon & near)
        groups.link(number[left + rows.start], number[right + columns.start])


def _blocks(count: int, ends: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that cover every pair i <= j < ends[i], a block at a time; `ends` never falls."""
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        for column in range(start, int(ends[stop - 1]), COLUMNS):
            yield slice(start, stop), slice(column, min(column + COLUMNS, int(ends[stop - 1])))


def _pairs(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each true cell, several times as fast as `np.nonzero` of two dimensions."""
    return np.divmod(np.flatnonzero(block), block.shape[1])


def _link_by_likeness(groups: _Groups, signatures: Sequence[PhotoSignature], alike: int) -> None:
    """Fingerprints of which at most `alike` bits differ; every pair is compared."""
    marked = [number for number, signature in enumerate(signatures) if signature.fingerprint is not None]
    if not marked:
        return
    bits = np.frombuffer(
        b"".join(signatures[number].fingerprint or b"" for number in marked), dtype=np.uint64
    )
    distinct, first, which = np.unique(bits.reshape(-1, 2), axis=0, return_index=True, return_inverse=True)
    groups.link(np.array(marked), np.array(marked)[first[which.reshape(-1)]])
    number = np.array(marked)[first]
    across, down = np.ascontiguousarray(distinct.T)
    for rows, columns in _blocks(len(number), np.full(len(number), len(number))):
        if groups.all_linked(number[rows], number[columns]):
            continue
        apart = np.bitwise_count(across[rows, None] ^ across[None, columns])
        left, right = _pairs(apart <= alike)  # few, and only these need the other half
        more = np.bitwise_count(down[rows][left] ^ down[columns][right])
        close = apart[left, right] + more <= alike
        groups.link(number[left[close] + rows.start], number[right[close] + columns.start])


def _link_copies(groups: _Groups, signatures: Sequence[PhotoSignature]) -> None:
    """Files of equal bytes are one photo, wherever they lie and whatever they show."""
    first: dict[bytes, int] = {}
    known = [number for number, signature in enumerate(signatures) if signature.content]
    anchors = [first.setdefault(signatures[number].content, number) for number in known]
    groups.link(np.array(known, dtype=np.int64), np.array(anchors, dtype=np.int64))


def _link_by_folder(groups: _Groups, signatures: Sequence[PhotoSignature]) -> None:
    """Link all undated photos of a folder, and all photos of a folder with one whose date cannot be read."""
    first = {
        one.folder: number for number, one in enumerate(signatures) if one.date_precision == "unreadable"
    }
    unknown = set(first)
    linked = [number for number, one in enumerate(signatures) if one.taken is None or one.folder in unknown]
    anchors = [first.setdefault(signatures[number].folder, number) for number in linked]
    groups.link(np.array(linked, dtype=np.int64), np.array(anchors, dtype=np.int64))
