"""Public, labelled faces for audits and simulations: a folder or a zip of pictures, and a CSV of labels.

A set is `NAME/` or `NAME.zip`
beside `NAME.csv`, whose columns are `file`, labels, and five landmarks re_ le_ nose_ rm_ lm_ (x, y, pixels).
Rows without landmarks are counted by group and reported: ignoring them would bias every audit.
"""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import align, landmarks_in_crop
from fedface.photos.image_io import MAX_BYTES, read_photo, read_photo_bytes
from fedface.tensor_types import Images

POINTS = ("re", "le", "nose", "rm", "lm")  # re is the eye at image left
COORDINATES = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")


@dataclass(frozen=True)
class LabelledFace:
    """One row of a set's CSV."""

    file: str
    landmarks: np.ndarray | None  # shape (5, 2) in the order of `faces.Face`; None: no face was found
    labels: Mapping[str, str]  # every other column, as text


@dataclass(frozen=True)
class FaceTable:
    """One labelled set of pictures; rows are read at once, pictures when asked for."""

    name: str
    pictures: Path  # a folder or a zip
    rows: tuple[LabelledFace, ...]

    def pixels(self, rows: Sequence[LabelledFace]) -> Iterator[np.ndarray | PhotoError]:
        """The whole pictures, uint8 (h, w, 3), in the order of `rows`; an unreadable one is its reason."""
        if self.pictures.is_dir():
            for row in rows:
                try:
                    yield read_photo(self.pictures / row.file).pixels
                except PhotoError as refusal:
                    yield refusal
            return
        with zipfile.ZipFile(self.pictures) as archive:
            for row in rows:
                try:
                    yield read_photo_bytes(_member(archive, row.file)).pixels
                except PhotoError as refusal:
                    yield refusal


@dataclass(frozen=True, kw_only=True)
class LabelledFaces:
    """Aligned faces with a group each. What it cannot show is in `missed` and `unreadable`."""

    images: Images  # float32, shape (n, 3, size, size), sRGB in [0, 1]
    landmarks: torch.Tensor  # float32, shape (n, 5, 2), x and y in pixels of the crop
    groups: tuple[str, ...]  # n of them
    label: str  # what the groups are: a column of the CSV, such as "race"
    files: tuple[str, ...]  # "set/file", n of them
    attributes: tuple[Mapping[str, str], ...]  # all labels of each face
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
            attributes=tuple(self.attributes[number] for number in numbers),
        )

    def by(self, label: str) -> LabelledFaces:
        """The same faces grouped by another label; the faces left out are then counted as group "unknown"."""
        if any(label not in labels for labels in self.attributes):
            raise LibraryError(f"not every face of the probe has a label {label!r}")
        return replace(
            self,
            label=label,
            groups=tuple(labels[label] for labels in self.attributes),
            missed={"unknown": sum(self.missed.values())} if self.missed else {},
            unreadable={"unknown": sum(self.unreadable.values())} if self.unreadable else {},
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
            raise LibraryError(f"{own} has no pictures: wanted {own.stem}/ or {own.stem}.zip beside it")
        return [_read_set(own, pictures)]
    if path.is_file():
        raise LibraryError(f"{path} has no labels: wanted {own} beside it")
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
    kept: list[tuple[str, LabelledFace]] = []
    for faces in labelled:
        rows = []
        for row in faces.rows:
            group = row.labels[label]
            taken[group] += 1
            if per_group is None or taken[group] <= per_group:
                rows.append(row)
        missed.update(row.labels[label] for row in rows if row.landmarks is None)
        rows = [row for row in rows if row.landmarks is not None]
        for row, pixels in zip(rows, faces.pixels(rows), strict=True):
            if isinstance(pixels, PhotoError) or row.landmarks is None:
                unreadable[row.labels[label]] += 1
                continue
            crops.append(torch.from_numpy(align(pixels, row.landmarks, size)).permute(2, 0, 1))
            points.append(landmarks_in_crop(row.landmarks, size))
            kept.append((faces.name, row))
    if not crops:
        raise LibraryError(f"none of the faces at {path} has landmarks and a readable picture")
    return LabelledFaces(
        images=torch.stack(crops).float() / 255.0,
        landmarks=torch.from_numpy(np.stack(points)).float(),
        groups=tuple(row.labels[label] for _, row in kept),
        label=label,
        files=tuple(f"{name}/{row.file}" for name, row in kept),
        attributes=tuple(row.labels for _, row in kept),
        missed=dict(missed),
        unreadable=dict(unreadable),
    )


def _pictures(table: Path) -> Path | None:
    """The folder or zip beside a CSV."""
    if table.with_suffix("").is_dir():
        return table.with_suffix("")
    return table.with_suffix(".zip") if table.with_suffix(".zip").is_file() else None


def _read_set(table: Path, pictures: Path) -> FaceTable:
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            wanted = ("file", *COORDINATES)
            absent = [column for column in wanted if column not in (reader.fieldnames or ())]
            if absent:
                raise LibraryError(f"{table} lacks the column {absent[0]!r}; wanted {', '.join(wanted)}")
            rows = tuple(_row(table, number, row) for number, row in enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise LibraryError(f"{table} cannot be read: {cause}") from cause
    if not rows:
        raise LibraryError(f"{table} has no rows")
    return FaceTable(pictures.stem if pictures.is_file() else pictures.name, pictures, rows)


def _row(table: Path, line: int, row: dict[str, str]) -> LabelledFace:
    file = row["file"]
    if Path(file).name != file:
        raise LibraryError(f"{table}:{line}: file must be a plain name, got {file!r}")
    numbers = [row[column] or "" for column in COORDINATES]
    landmarks = None
    if all(numbers):
        try:
            landmarks = np.array([float(number) for number in numbers]).reshape(5, 2)
        except ValueError as cause:
            raise LibraryError(f"{table}:{line}: landmarks must be numbers, got {numbers}") from cause
        if not np.isfinite(landmarks).all():
            raise LibraryError(f"{table}:{line}: landmarks must be finite, got {numbers}")
    labels = {name: text or "" for name, text in row.items() if name and name not in ("file", *COORDINATES)}
    return LabelledFace(file, landmarks, labels)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        member = archive.getinfo(name)
        if member.file_size > MAX_BYTES:
            raise PhotoError(f"larger than {MAX_BYTES // 1_000_000} MB")
        return archive.read(member)
    except KeyError as cause:
        raise PhotoError("not in the zip") from cause
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as cause:
        raise PhotoError(f"broken in the zip: {cause}") from cause
