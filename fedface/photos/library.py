"""One device's photos as training sees them: aligned faces, one a photo.

The crops are those that the scan stored. A crop of another size is cut out of the file, decoded in the sandbox.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from fedface.errors import LibraryError, PhotoError
from fedface.photos.capture_date import Precision
from fedface.photos.occasions import DEFAULT_RULE, OccasionRule, PhotoSignature, group
from fedface.photos.photo_index import (
    FileStamp,
    PhotoIndex,
    PhotoRecord,
    all_read,
    default_cache,
    latest_detector,
    record_of,
    records,
    stored_crop,
)
from fedface.photos.sandboxed_decoder import SandboxedDecoder
from fedface.photos.scan import EmptyLibrary, checked_folder
from fedface.photos.training_crops import PhotoSelection, decode_side, training_crop

MAX_REASONS = 20


@dataclass(frozen=True, kw_only=True)
class LibrarySummary:
    """A library in numbers. All of them are about its owner: they stay on the device."""

    photos: int  # pictures that were read; files of equal bytes are one photo
    with_face: int  # of these; each gives one crop, its largest face
    without_face: int
    faces: int
    copies: int  # further files of the same photos
    refused: dict[str, int]  # pictures that cannot be used: reason -> count, the commonest reasons first
    made_by_fedface: int  # pictures that fedface wrote, which are not photos
    other: int  # files that are not pictures
    dated: int
    unreadable_dates: int  # photos with a date that names no day: they count with all of their folder
    earliest: datetime | None
    latest: datetime | None
    placed: int
    places: int  # distinct, rounded to a tenth of a degree (about 11 km)
    occasions: int  # by the usual rule; those with a face alone, which are the units of a guarantee


@dataclass(frozen=True, kw_only=True)
class ScanRow:
    """One line of the table that `fedface photos scan` prints."""

    file: str  # printable; bytes that are not UTF-8 appear as "?"
    kind: str
    size: str  # "4032 x 3024"
    taken: str
    place: str  # rounded to a hundredth of a degree (about 1 km)
    faces: int
    reason: str


class PhotoLibrary:
    """The photos of one folder that hold a face large enough, in the order of their paths.

    Index i is the largest face of the i-th such photo. Of files with equal bytes the first is the photo.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cache: Path | None = None,
        detector: str | None = None,
        selection: PhotoSelection | None = None,
    ) -> None:
        """Open the index that `scan_library` wrote.

        Args:
            cache: The index file; by default `default_cache(folder)`.
            detector: The name of the detector whose faces to use; by default the latest scan's.
            selection: Which photos to use; by default all of them.

        Raises:
            EmptyLibrary: It holds no face.
            LibraryError: The folder is missing or was not scanned.
        """
        selection = selection or PhotoSelection()
        self.folder = checked_folder(folder)
        self._index = PhotoIndex(cache or default_cache(self.folder))
        with self._index.reading() as connection:
            chosen = detector or latest_detector(connection)
            if chosen is None:
                raise LibraryError(f"{folder} has not been scanned; run `fedface photos scan` on it first")
            query = (
                "SELECT number, path, content FROM photo WHERE detector = ? AND face_count > 0 AND face_side >= ?"
                " ORDER BY path"
            )
            first: dict[int, int] = {}  # two photos with one label would count as one unit twice
            for number, name, content in connection.execute(query, (chosen, selection.min_face_side)):
                if selection.allows(Path(os.fsdecode(name))):
                    first.setdefault(_label(content), number)
            self._rows = np.array(list(first.values()), dtype=np.int64)
        self.detector = chosen
        if len(self._rows) == 0:
            limited = selection.folders or selection.exclude_folders
            where = f"the folders of {folder} that may be used" if limited else str(folder)
            raise EmptyLibrary(f"no face was found in {where}; `fedface photos scan` says why, file by file")

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> PhotoRecord:
        """What is known of the photo behind one index: date, place, camera, faces."""
        with self._index.reading() as connection:
            return record_of(connection, int(self._rows[index]))

    def crops(self, size: int) -> Iterator[np.ndarray | LibraryError]:
        """Each photo's aligned face, uint8 (size, size, 3), in sRGB; or why it cannot be used, such as a changed file.

        A crop that the scan did not store at this size is cut out of the file, decoded in the sandbox.
        """
        with SandboxedDecoder() as decoder, self._index.reading() as connection:
            for number in self._rows.tolist():
                try:
                    yield self._crop(connection, number, size, decoder)
                except LibraryError as error:
                    yield error

    def _crop(
        self, connection: sqlite3.Connection, number: int, size: int, decoder: SandboxedDecoder
    ) -> np.ndarray:
        record = record_of(connection, number)
        path = self.folder / record.path
        try:
            if FileStamp.of(os.stat(path)) != record.state:
                raise LibraryError(f"{record.path} has changed since the scan; scan the folder again")
        except OSError as cause:
            raise LibraryError(f"{record.path} cannot be read any more ({cause}); scan again") from cause
        if (stored := stored_crop(connection, number, size)) is not None:
            return stored
        photo = decoder.read(path, longest_side=decode_side(record, size))
        if isinstance(photo, PhotoError):
            raise LibraryError(f"{record.path} cannot be read any more ({photo}); scan again") from photo
        try:
            return training_crop(record, photo, size)
        except Exception as cause:
            # One broad net: whatever one photo breaks must cost that photo, not silence the others.
            raise LibraryError(f"{record.path}: its face cannot be cut out ({cause!r})") from cause

    def photo_labels(self) -> np.ndarray:
        """A stable number for each photo, int64 (n,), >= 0: a hash of its file, wherever it lies."""
        own, signatures = self._all_read()
        return np.array([_label(signatures[place].content) for place in own], dtype=np.int64)

    def occasion_labels(self, rule: OccasionRule = DEFAULT_RULE) -> np.ndarray:
        """The smallest label of a photo in the occasion of each photo, int64 (n,).

        The occasion is that of the whole folder: photos that are not in this library, because they hold no face
        or lie elsewhere, still link others, and may give an occasion its label.
        """
        own, signatures = self._all_read()
        groups = group(signatures, rule)
        smallest = np.full(len(signatures), np.iinfo(np.int64).max)
        np.minimum.at(smallest, groups, np.array([_label(one.content) for one in signatures], dtype=np.int64))
        return np.asarray(smallest[groups[own]])

    def _all_read(self) -> tuple[np.ndarray, list[PhotoSignature]]:
        """Every photo of the folder that was read, by path; and where among them those of this library stand."""
        with self._index.reading() as connection:
            rows, _, signatures = all_read(connection, self.detector)
        order = np.argsort(rows)
        own = order[np.searchsorted(rows[order], self._rows).clip(max=len(rows) - 1)]
        if not np.array_equal(rows[own], self._rows):
            raise LibraryError(f"{self.folder} has lost photos since it was opened; open the library again")
        return own, signatures


def _label(content: bytes) -> int:
    return int.from_bytes(content[:8], "big") >> 1


def summary(folder: Path, *, cache: Path | None = None, detector: str | None = None) -> LibrarySummary:
    """A scanned folder in numbers; unlike `PhotoLibrary` it also describes one without any face."""
    index = PhotoIndex(cache or default_cache(checked_folder(folder)))
    with index.reading() as connection:
        chosen = (detector or latest_detector(connection) or "",)
        photos, with_face, faces, dated, unreadable, earliest, latest, placed, places = connection.execute(
            "SELECT count(*), coalesce(sum(face_count > 0), 0), coalesce(sum(face_count), 0), count(taken),"
            " coalesce(sum(date_precision = 'unreadable'), 0), min(taken), max(taken), count(latitude),"
            " count(DISTINCT round(latitude, 1) || ' ' || round(longitude, 1))"
            " FROM (SELECT * FROM photo WHERE detector = ? AND status = 'read' GROUP BY content)",
            chosen,
        ).fetchone()
        refused = connection.execute(
            "SELECT reason, count(*) FROM photo WHERE detector = ? AND status = 'refused'"
            f" GROUP BY reason ORDER BY count(*) DESC, reason LIMIT {MAX_REASONS}",
            chosen,
        ).fetchall()
        counts = "SELECT status, count(*) FROM photo WHERE detector = ? GROUP BY status"
        by_status = dict(connection.execute(counts, chosen).fetchall())
        rows, _, signatures = all_read(connection, chosen[0])
        seen = connection.execute("SELECT rowid FROM photo WHERE detector = ? AND face_count > 0", chosen)
        shows_faces = np.isin(rows, np.array([row[0] for row in seen], dtype=np.int64))
    reasons = dict(refused)
    if (rest := by_status.get("refused", 0) - sum(reasons.values())) > 0:
        reasons["other reasons"] = rest
    return LibrarySummary(
        photos=photos,
        with_face=with_face,
        without_face=photos - with_face,
        faces=faces,
        copies=by_status.get("read", 0) - photos,
        refused=reasons,
        made_by_fedface=by_status.get("own", 0),
        other=by_status.get("other", 0),
        dated=dated,
        unreadable_dates=unreadable,
        earliest=datetime.fromisoformat(earliest) if earliest else None,
        latest=datetime.fromisoformat(latest) if latest else None,
        placed=placed,
        places=places,
        occasions=len(np.unique(group(signatures)[shows_faces])),
    )


def scan_table(folder: Path, *, cache: Path | None = None, detector: str | None = None) -> Iterator[ScanRow]:
    """The lines of `fedface photos scan` by path, one at a time; files that are not pictures are left out."""
    index = PhotoIndex(cache or default_cache(checked_folder(folder)))
    first: dict[bytes, str] = {}
    with index.reading() as connection:
        for record in records(connection, detector or latest_detector(connection) or ""):
            if record.status in ("read", "refused"):
                row = _row(record)
                original = first.setdefault(record.content, row.file)
                copied = record.status == "read" and original != row.file
                yield replace(row, reason=f"a copy of {original}") if copied else row


_TAKEN: dict[Precision, str] = {"exact": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "utc": "%Y-%m-%d %H:%M UTC"}


def _row(record: PhotoRecord) -> ScanRow:
    metadata = record.metadata
    unreadable = "unreadable" if metadata.date_precision == "unreadable" else ""
    name = os.fsencode(record.path).decode("utf-8", errors="replace").replace("\ufffd", "?")
    return ScanRow(
        file="".join(letter if letter.isprintable() else "?" for letter in name),
        kind=record.kind or "",
        size=f"{record.width} x {record.height}" if record.width else "",
        taken=metadata.taken.strftime(_TAKEN[metadata.date_precision]) if metadata.taken else unreadable,
        place=f"{metadata.place[0]:.2f}, {metadata.place[1]:.2f}" if metadata.place else "",
        faces=len(record.faces),
        reason=record.reason,
    )
