"""One device's photos as training sees them: aligned faces, one a photo, cut out of the files on demand.

Called by `training`, `federation.device` and the command line. The only reader of the photo folder besides
the scan that made its index (`scan_library`).
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import align, alignment_side
from fedface.photos.image_io import read_photo
from fedface.photos.occasions import DEFAULT_RULE, Occasion, OccasionRule, PhotoSignature, group, occasion
from fedface.photos.photo_index import (
    FileStamp,
    PhotoIndex,
    PhotoRecord,
    all_read,
    default_cache,
    latest_detector,
    record_of,
    records,
)
from fedface.photos.scan import EmptyLibrary, checked_folder
from fedface.tensor_types import Images, KeptImages, in_floats

MAX_REASONS = 20


@dataclass(frozen=True, kw_only=True)
class LibrarySummary:
    """A library in numbers. All of them are about its owner: they stay on the device."""

    photos: int  # pictures that were read
    with_face: int  # of these; each gives one crop, its largest face
    without_face: int
    faces: int
    refused: dict[str, int]  # pictures that cannot be used: reason -> count, the commonest reasons first
    other: int  # files that are no pictures
    dated: int
    earliest: datetime | None
    latest: datetime | None
    placed: int
    places: int  # distinct, rounded to a tenth of a degree (about 11 km)
    occasions: int  # by the usual rule; those with a face alone, which are what a promise can count


@dataclass(frozen=True, kw_only=True)
class ScanRow:
    """One line of the table that `fedface photos scan` prints."""

    file: str  # printable; bytes that are no UTF-8 appear as "?"
    kind: str
    size: str  # "4032 x 3024"
    taken: str
    place: str  # rounded to a hundredth of a degree (about 1 km)
    faces: int
    reason: str


class PhotoLibrary:
    """The photos of one folder that hold a face large enough, in the order of their paths.

    Index i is the largest face of the i-th such photo. Crops stay in memory once cut, 3 * size^2 bytes each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cache: Path | None = None,
        detector: str | None = None,
        smallest: float = 32.0,
        folders: Sequence[Path] = (),
        exclude_folders: Sequence[Path] = (),
    ) -> None:
        """Open the index that `scan_library` wrote.

        Args:
            folder: The photo library.
            cache: The index file; by default `default_cache(folder)`.
            detector: The name of the detector whose faces to use; by default the latest scan's.
            smallest: Leave out photos whose largest face gives a crop of fewer pixels a side than this.
            folders: Only what lies in or below these, relative to `folder`; none named: everything.
            exclude_folders: Nothing that lies in or below these, whatever `folders` says; capitals do not matter.

        Raises:
            EmptyLibrary: It holds no face.
            LibraryError: The folder is missing or was not scanned, or a folder named is not one inside it.
        """
        only, barred = [_inner(name) for name in folders], [_folded(_inner(name)) for name in exclude_folders]
        self.folder = checked_folder(folder)
        self._index = PhotoIndex(cache or default_cache(self.folder))
        self._crops: dict[int, tuple[Tensor, Tensor]] = {}
        with self._index.reading() as connection:
            chosen = detector or latest_detector(connection)
            if chosen is None:
                raise LibraryError(f"{folder} has not been scanned; run `fedface photos scan` on it first")
            query = (
                "SELECT rowid, path FROM photo WHERE detector = ? AND face_count > 0 AND face_side >= ?"
                " ORDER BY path"
            )
            numbers = (
                number
                for number, name in connection.execute(query, (chosen, smallest))
                if _may_be_used(Path(os.fsdecode(name)), only, barred)
            )
            self._rows = np.fromiter(numbers, dtype=np.int64)
        self.detector = chosen
        if len(self._rows) == 0:
            where = f"the folders of {folder} that may be used" if only or barred else str(folder)
            raise EmptyLibrary(f"no face was found in {where}; `fedface photos scan` says why, file by file")

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> PhotoRecord:
        """What is known of the photo behind one index: date, place, camera, faces."""
        with self._index.reading() as connection:
            return record_of(connection, int(self._rows[index]))

    def images(self, index: int | Sequence[int] | Tensor, size: int) -> Images:
        """As `kept_images`, in floats: float32, shape (n, 3, size, size), sRGB in [0, 1]."""
        return in_floats(self.kept_images(index, size))

    def kept_images(self, index: int | Sequence[int] | Tensor, size: int) -> KeptImages:
        """Aligned faces, read from the files the first time and from memory after that.

        A file is decoded in this process only after a child has decoded the very same one (`isolation`).

        Args:
            index: One or more numbers in 0..len-1.
            size: Side of the crops in pixels.

        Returns:
            uint8, shape (n, 3, size, size), sRGB in 0 to 255.

        Raises:
            LibraryError: A photo was changed, moved or removed since the scan.
        """
        wanted = torch.as_tensor(index, dtype=torch.int64).reshape(-1)
        if size not in self._crops:
            crops = torch.empty((len(self), 3, size, size), dtype=torch.uint8)
            self._crops[size] = (crops, torch.zeros(len(self), dtype=torch.bool))
        crops, present = self._crops[size]
        missing = sorted({number for number in wanted.tolist() if not present[number]})
        if missing:
            with self._index.reading() as connection:
                for number in missing:
                    record = record_of(connection, int(self._rows[number]))
                    crops[number] = torch.from_numpy(self._crop(record, size)).permute(2, 0, 1)
                    present[number] = True
        return crops[wanted]

    def _crop(self, record: PhotoRecord, size: int) -> np.ndarray:
        if not record.faces or record.width is None or record.height is None:
            raise LibraryError(f"{record.path} has lost its face in a later scan; open the library again")
        path, face = self.folder / record.path, record.faces[0]
        # Twice the pixels that the crop needs: a JPEG then decodes at a fraction of its size.
        share = min(1.0, 2.0 * size / alignment_side(face.landmarks))
        enough = max(64, math.ceil(max(record.width, record.height) * share))
        try:
            if FileStamp.of(os.stat(path)) != record.state:
                raise LibraryError(f"{record.path} has changed since the scan; scan the folder again")
            photo = read_photo(path, longest_side=enough)
        except (OSError, PhotoError) as cause:
            raise LibraryError(f"{record.path} cannot be read any more ({cause}); scan again") from cause
        return align(photo.pixels, face.scaled(photo.pixels.shape[1] / record.width).landmarks, size)

    def photo_labels(self) -> np.ndarray:
        """A lasting number for each photo, int64 (n,), >= 0: from its path alone, whatever else there is."""
        own, paths, _ = self._all_read()
        return np.array([_label(paths[place]) for place in own], dtype=np.int64)

    def occasion_labels(self, rule: OccasionRule = DEFAULT_RULE) -> np.ndarray:
        """The smallest label of a photo in the occasion of each photo, int64 (n,).

        The occasion is that of the whole folder: photos that are not in this library, because they hold no face
        or lie elsewhere, link others all the same, and may lend an occasion their label.
        """
        own, paths, shots = self._all_read()
        groups = group(shots, rule)
        smallest = np.full(len(paths), np.iinfo(np.int64).max)
        np.minimum.at(smallest, groups, np.array([_label(path) for path in paths], dtype=np.int64))
        return np.asarray(smallest[groups[own]])

    def occasions(self, rule: OccasionRule = DEFAULT_RULE) -> list[Occasion]:
        """The occasions of the whole folder, each with the photos of it that are in this library.

        Returns:
            In the order of their first photo; every index is in exactly one. Dates are those of these photos.
        """
        own, _, shots = self._all_read()
        members: dict[int, list[int]] = {}
        for index, number in enumerate(group(shots, rule)[own].tolist()):
            members.setdefault(number, []).append(index)
        return [occasion(indices, [shots[own[index]] for index in indices]) for indices in members.values()]

    def _all_read(self) -> tuple[np.ndarray, list[Path], list[PhotoSignature]]:
        """Every photo of the folder that was read, by path; and where among them those of this library stand."""
        with self._index.reading() as connection:
            rows, paths, shots = all_read(connection, self.detector)
        order = np.argsort(rows)
        own = order[np.searchsorted(rows[order], self._rows).clip(max=len(rows) - 1)]
        if not np.array_equal(rows[own], self._rows):
            raise LibraryError(f"{self.folder} has lost photos since it was opened; open the library again")
        return own, paths, shots

    def split(self, holdout_fraction: float, seed: int) -> tuple[PhotoLibrary, PhotoLibrary]:
        """Two libraries: to train on, and to hold out.

        A photo's side depends on the seed and its own path alone: photos that are added later move no other.

        Args:
            holdout_fraction: The chance of each photo to be held out, in (0, 1).
            seed: >= 0.
        """
        if not 0 < holdout_fraction < 1:
            raise ValueError(f"holdout_fraction must lie in (0, 1), got {holdout_fraction}")
        with self._index.reading() as connection:
            paths = (record_of(connection, int(row)).path for row in self._rows)
            digests = [hashlib.sha256(b"%d/" % seed + os.fsencode(path)).digest()[:8] for path in paths]
        held = np.array([int.from_bytes(digest, "big") < holdout_fraction * 2**64 for digest in digests])
        return self._part(self._rows[~held]), self._part(self._rows[held])

    def _part(self, rows: np.ndarray) -> PhotoLibrary:
        part = copy.copy(self)
        part._rows, part._crops = rows, {}
        return part

    def summary(self) -> LibrarySummary:
        """The whole folder in numbers, photos without a face and refused files included."""
        return summary(self.folder, cache=self._index.path, detector=self.detector)


def _label(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") >> 1


def _names(path: Path) -> tuple[str, ...]:
    """The names on the way to a file, accents as part of their letter: some systems write two signs for "ü"."""
    return tuple(unicodedata.normalize("NFC", name) for name in path.parts)


def _inner(folder: Path) -> tuple[str, ...]:
    """The names on the way to a folder inside the library.

    Raises:
        LibraryError: It does not stay inside.
    """
    if folder.is_absolute() or ".." in folder.parts or folder.parts[:1] == ("~",):
        raise LibraryError(f"{folder}: wanted a folder inside the library, relative to it and without ..")
    return _names(folder)


def _folded(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.casefold() for name in names)


def _may_be_used(path: Path, only: Sequence[tuple[str, ...]], barred: Sequence[tuple[str, ...]]) -> bool:
    """By whole names on the way, so that `anna` says nothing about `annabel`."""
    names = _names(path)
    return (not only or any(names[: len(way)] == way for way in only)) and not any(
        _folded(names[: len(way)]) == way for way in barred
    )


def summary(folder: Path, *, cache: Path | None = None, detector: str | None = None) -> LibrarySummary:
    """A scanned folder in numbers; unlike `PhotoLibrary` it also describes one without any face."""
    index = PhotoIndex(cache or default_cache(checked_folder(folder)))
    with index.reading() as connection:
        chosen = (detector or latest_detector(connection) or "",)
        photos, with_face, faces, dated, earliest, latest, placed, places = connection.execute(
            "SELECT count(*), coalesce(sum(face_count > 0), 0), coalesce(sum(face_count), 0), count(taken),"
            " min(taken), max(taken), count(latitude),"
            " count(DISTINCT round(latitude, 1) || ' ' || round(longitude, 1))"
            " FROM photo WHERE detector = ? AND status = 'read'",
            chosen,
        ).fetchone()
        refused = connection.execute(
            "SELECT reason, count(*) FROM photo WHERE detector = ? AND status = 'refused'"
            f" GROUP BY reason ORDER BY count(*) DESC, reason LIMIT {MAX_REASONS}",
            chosen,
        ).fetchall()
        counts = "SELECT status, count(*) FROM photo WHERE detector = ? GROUP BY status"
        by_status = dict(connection.execute(counts, chosen).fetchall())
        rows, _, shots = all_read(connection, chosen[0])
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
        refused=reasons,
        other=by_status.get("other", 0),
        dated=dated,
        earliest=datetime.fromisoformat(earliest) if earliest else None,
        latest=datetime.fromisoformat(latest) if latest else None,
        placed=placed,
        places=places,
        occasions=len(np.unique(group(shots)[shows_faces])),
    )


def scan_table(folder: Path, *, cache: Path | None = None, detector: str | None = None) -> Iterator[ScanRow]:
    """The lines of `fedface photos scan` by path, one at a time; what is no picture is left out."""
    index = PhotoIndex(cache or default_cache(checked_folder(folder)))
    with index.reading() as connection:
        for record in records(connection, detector or latest_detector(connection) or ""):
            if record.status != "other":
                yield _row(record)


def _row(record: PhotoRecord) -> ScanRow:
    name = os.fsencode(record.path).decode("utf-8", errors="replace").replace("\ufffd", "?")
    return ScanRow(
        file="".join(letter if letter.isprintable() else "?" for letter in name),
        kind=record.kind or "",
        size=f"{record.width} x {record.height}" if record.width else "",
        taken=record.taken.strftime("%Y-%m-%d %H:%M") if record.taken else "",
        place=f"{record.place[0]:.2f}, {record.place[1]:.2f}" if record.place else "",
        faces=len(record.faces),
        reason=record.reason,
    )
