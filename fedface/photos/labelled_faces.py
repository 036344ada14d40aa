"""Public, labelled faces for audits and simulations: a folder or a zip of pictures, and a CSV of labels.

A set is `NAME/` or `NAME.zip` beside `NAME.csv`, whose columns are `file`, labels, and five landmarks re_ le_ nose_ rm_
lm_ (x, y, pixels). Rows without landmarks are counted by group and reported: ignoring them would bias every audit. A
row that cannot be used is named in the log and costs itself alone: one with impossible landmarks counts as without any.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import logging
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import align, alignment_side, alignment_square, landmarks_in_crop
from fedface.photos.image_io import MAX_BYTES, read_photo, read_photo_bytes
from fedface.tensor_types import Images

log = logging.getLogger("fedface.photos")

POINTS = ("re", "le", "nose", "rm", "lm")  # re is the eye at image left
COORDINATES = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")
MAX_COORDINATE = 100_000.0  # pixels; no picture that is read is wider
MAX_NAMED = 5  # problems of one set that are named; the others are counted
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, RuntimeError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class LabelledFace:
    file: str
    landmarks: np.ndarray | None  # shape (5, 2) in the order of `faces.Face`; None: no face was found
    labels: Mapping[str, str]  # every other column, as text; "unknown" where the row has none
    where: str  # "faces.csv:10"


@dataclass(frozen=True)
class FaceTable:
    """One labelled set of pictures; rows are read at once, pictures on request."""

    name: str
    pictures: Path  # a folder or a zip
    rows: tuple[LabelledFace, ...]
    problems: tuple[str, ...]  # rows that could not be used as they are

    def pixels(self, rows: Sequence[LabelledFace]) -> Iterator[np.ndarray | PhotoError]:
        """The whole pictures, uint8 (h, w, 3), in the order of `rows`; an unreadable one is its reason."""
        if self.pictures.is_dir():
            for row in rows:
                try:
                    yield read_photo(self.pictures / row.file).pixels
                except PhotoError as refusal:
                    yield refusal
            return
        try:
            archive = zipfile.ZipFile(self.pictures)
        except ZIP_ERRORS as cause:
            yield from (PhotoError(f"{self.pictures.name} cannot be opened: {cause}") for _ in rows)
            return
        with archive:
            for row in rows:
                try:
                    yield read_photo_bytes(_member(archive, row.file)).pixels
                except PhotoError as refusal:
                    yield refusal


@dataclass(frozen=True, kw_only=True)
class LabelledFaces:
    """Aligned faces with a group each. `missed` and `unreadable` count the others."""

    images: Images  # float32, shape (n, 3, size, size), sRGB in [0, 1]
    landmarks: torch.Tensor  # float32, shape (n, 5, 2), x and y in pixels of the crop
    groups: tuple[str, ...]  # n of them
    files: tuple[str, ...]  # "set/file", n of them
    missed: Mapping[str, int]  # group -> faces left out for want of landmarks
    unreadable: Mapping[str, int]  # group -> faces left out because the file is broken

    def __len__(self) -> int:
        return len(self.groups)

    def select(self, index: Sequence[int] | np.ndarray) -> LabelledFaces:
        """Some of the faces, in the given order; the counts of faces left out stay those of the whole."""
        numbers = [int(number) for number in index]
        return replace(
            self,
            images=self.images[numbers],
            landmarks=self.landmarks[numbers],
            groups=tuple(self.groups[number] for number in numbers),
            files=tuple(self.files[number] for number in numbers),
        )


def labelled_sets(path: Path) -> list[FaceTable]:
    """The labelled sets that a path means, by name; an empty list means a plain folder of photos.

    Args:
        path: A set's folder, its zip, its CSV, or a folder that holds such sets.

    Raises:
        LibraryError: The path is missing, or a CSV is not in the format above.
    """
    if not path.exists():
        raise LibraryError(f"there is no {path}")
    if path.is_file() and path.suffix not in (".zip", ".csv"):
        raise LibraryError(f"{path} is neither a folder, nor a zip of faces beside its CSV")
    own = path.with_suffix(".csv") if path.is_file() else path.with_name(path.name + ".csv")
    if own.is_file():
        pictures = _pictures(own)
        if pictures is None:
            raise LibraryError(f"{own} has no pictures: expected {own.stem}/ or {own.stem}.zip beside it")
        return [_read_set(own, pictures)]
    if path.is_file():
        raise LibraryError(f"{path} has no labels: expected {own} beside it")
    found = [(table, _pictures(table)) for table in sorted(path.glob("*.csv"))]
    return [_read_set(table, pictures) for table, pictures in found if pictures is not None]


def read_face_folder(
    path: Path, *, size: int, label: str = "race", per_group: int | None = None
) -> LabelledFaces:
    """Read labelled faces and align each with FFHQ's crop, by the landmarks of the CSV.

    Args:
        path: As for `labelled_sets`; of several sets, all that have the label are read, by name.
        size: Side of the crops in pixels.
        label: The column that says a face's group.
        per_group: Read only the first so many of each group, those without landmarks included.

    Raises:
        LibraryError: No set has this label, or no face is left.
    """
    sets = labelled_sets(path)
    labelled = [faces for faces in sets if faces.rows and label in faces.rows[0].labels]
    if not labelled:
        known = sorted({name for faces in sets for row in faces.rows[:1] for name in row.labels})
        raise LibraryError(
            f"no labelled faces with a column {label!r} at {path}"
            + (f"; the columns are {', '.join(known)}" if known else ": no CSV beside a folder or zip")
        )
    taken: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    crops: list[torch.Tensor] = []
    points: list[np.ndarray] = []
    read: list[tuple[str, LabelledFace]] = []
    problems: list[str] = []
    for faces in labelled:
        problems += faces.problems
        groups = [row.labels[label] for row in faces.rows]
        rows = [faces.rows[at] for at in first_per_group(groups, per_group, taken)]
        missed.update(row.labels[label] for row in rows if row.landmarks is None)
        rows = [row for row in rows if row.landmarks is not None]
        for row, pixels in zip(rows, faces.pixels(rows), strict=True):
            assert row.landmarks is not None
            try:
                if isinstance(pixels, PhotoError):
                    raise pixels
                crop = align(pixels, row.landmarks, size)
            except (PhotoError, ValueError) as error:
                unreadable[row.labels[label]] += 1
                problems.append(f"{row.where}: {row.file}: {error}; left out")
                continue
            crops.append(torch.from_numpy(crop).permute(2, 0, 1))
            points.append(landmarks_in_crop(row.landmarks, size))
            read.append((faces.name, row))
    if not crops:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise LibraryError(f"none of the faces at {path} has landmarks and a readable picture{first}")
    name_problems(problems)
    return LabelledFaces(
        images=torch.stack(crops).float() / 255.0,
        landmarks=torch.from_numpy(np.stack(points)).float(),
        groups=tuple(row.labels[label] for _, row in read),
        files=tuple(f"{name}/{row.file}" for name, row in read),
        missed=dict(missed),
        unreadable=dict(unreadable),
    )


def first_per_group(
    groups: Sequence[Hashable], count: int | None, taken: Counter[Any] | None = None
) -> list[int]:
    """The positions of the first `count` members of each group, in order; all of them if it is None.

    Args:
        groups: The group of each member.
        count: How many of each group.
        taken: Members of each group that were met before; those in `groups` are added.
    """
    taken = Counter() if taken is None else taken
    first = []
    for position, group in enumerate(groups):
        taken[group] += 1
        if count is None or taken[group] <= count:
            first.append(position)
    return first


def _pictures(table: Path) -> Path | None:
    """The folder or zip beside a CSV."""
    if table.with_suffix("").is_dir():
        return table.with_suffix("")
    return table.with_suffix(".zip") if table.with_suffix(".zip").is_file() else None


def _read_set(table: Path, pictures: Path) -> FaceTable:
    rows: list[LabelledFace] = []
    problems: list[str] = []
    try:
        if table.stat().st_size > MAX_BYTES:
            raise LibraryError(f"{table} is larger than {MAX_BYTES // 1_000_000} MB")
        with table.open(encoding=_encoding(table), errors="replace") as file:
            columns = _cells(file.readline())
            absent = [column for column in ("file", *COORDINATES) if column not in columns]
            if absent:
                expected = ", ".join(("file", *COORDINATES))
                raise LibraryError(f"{table} lacks the column {absent[0]!r}; expected {expected}")
            # Line by line: a quotation mark that is never closed costs its own row.
            for number, line in enumerate(file, start=2):
                if line.strip():
                    cells = _cells(line)
                    row = dict(itertools.zip_longest(columns, cells[: len(columns)], fillvalue=""))
                    problem = _read_row(f"{table}:{number}", row, rows)
                    if not problem and len(cells) < len(columns):
                        problem = f"{len(cells)} cells instead of {len(columns)}"
                    problems += [f"{table}:{number}: {problem}"] if problem else []
    except OSError as cause:
        raise LibraryError(f"{table} cannot be read: {cause}") from cause
    if not rows:
        raise LibraryError(problems[0] if problems else f"{table} has no rows")
    name = pictures.stem if pictures.is_file() else pictures.name
    return FaceTable(name, pictures, tuple(rows), tuple(problems))


def _encoding(table: Path) -> str:
    """UTF-8, or the encoding of the byte-order mark."""
    with table.open("rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return "utf-16" if marked else "utf-8-sig"


def _cells(line: str) -> list[str]:
    """The cells of one line; none if it is not CSV."""
    try:
        return next(csv.reader([line.rstrip("\r\n")]), [])
    except csv.Error:
        return []


def _read_row(where: str, row: dict[str, str], rows: list[LabelledFace]) -> str:
    """Append the face of a row; returns the problem with it, or an empty text."""
    file = row["file"]
    if not file or Path(file).name != file or not file.isprintable():
        return f"file must be a plain name, got {file[:100]!r}; the row is left out"
    landmarks, problem = None, ""
    try:
        landmarks = _landmarks([row[column].strip() for column in COORDINATES])
    except ValueError as error:
        problem = f"{error}; the face counts as without landmarks"
    others = [name for name in row if name and name not in ("file", *COORDINATES)]
    rows.append(LabelledFace(file, landmarks, {name: row[name] or "unknown" for name in others}, where))
    return problem


def _landmarks(texts: Sequence[str]) -> np.ndarray | None:
    """Five points, shape (5, 2), or None where the row has none.

    Raises:
        ValueError: They cannot be those of a face.
    """
    if not any(texts):
        return None
    given = f"got {', '.join(texts)[:100]}"
    try:
        points = np.array([float(text) for text in texts]).reshape(5, 2)
    except ValueError as cause:
        raise ValueError(f"landmarks must be numbers, {given}") from cause
    if not np.isfinite(points).all():
        raise ValueError(f"landmarks must be finite, {given}")
    if np.abs(points).max() > MAX_COORDINATE:
        raise ValueError(f"landmarks must lie within {MAX_COORDINATE:.0f} pixels, {given}")
    if alignment_side(points) < 2.0:
        raise ValueError(f"eyes and mouth must be a pixel apart, {given}")
    alignment_square(points)
    return points


def name_problems(problems: Sequence[str]) -> None:
    """Name the first problems in the log, and count the others."""
    for problem in problems[:MAX_NAMED]:
        log.warning("%s", problem)
    if len(problems) > MAX_NAMED:
        log.warning("and %d more rows like these", len(problems) - MAX_NAMED)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        member = archive.getinfo(name)
        if member.file_size > MAX_BYTES:
            raise PhotoError(f"larger than {MAX_BYTES // 1_000_000} MB")
        return archive.read(member)
    except KeyError as cause:
        raise PhotoError("not in the zip") from cause
    except ZIP_ERRORS as cause:
        raise PhotoError(f"broken in the zip: {cause}") from cause
