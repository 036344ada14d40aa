"""A contact sheet for every face in a photo or a folder, with a record of sheets and skipped photos.

Photos are decoded in the sandbox, as in a scan, and never written. An interrupted folder is resumed: existing sheets
are not rendered again, and sheets of different settings are never mixed in one folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedface.atomic_io import check_output, replace_text, write_output
from fedface.audits.bias import ToneHistogram
from fedface.errors import ConfigError, LibraryError, PhotoError
from fedface.inference.contact_sheet import ContactSheet, MethodRunner, contact_sheet, show
from fedface.photos.face_alignment import Detector
from fedface.photos.face_crops import LONGEST_SIDE, FaceCrop, face_crops, whole_image
from fedface.photos.image_io import PICTURE_MARK, Photo, classify_file
from fedface.photos.photo_files import OWN_PICTURES, describe_skipped, walk
from fedface.photos.sandboxed_decoder import SandboxedDecoder
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.methods import name_of

RECORD = "faces.json"


class SheetProgress(Protocol):
    """Receives the progress."""

    def stage(self, name: str, steps: int) -> None:
        """A photo begins that takes `steps` steps."""

    def message(self, sentence: str) -> None:
        """A message to print."""


@dataclass(frozen=True, kw_only=True)
class SheetSettings:
    """The settings for every photo."""

    degradation: Degradation
    size: int  # of the faces in pixels
    faces: int  # faces from each method that can generate several
    max_faces: int  # faces of one photo, the largest first
    # Whole: the picture is used as an aligned face
    detect: Literal["for faces", "at the whole"] = "for faces"


@dataclass(frozen=True, kw_only=True)
class SheetRecord:
    """One sheet."""

    photo: str
    person: int  # from 1, the largest face first
    people: int  # faces in the photo; 0: the picture was taken as a face
    rotation: int  # degrees by which the photo was rotated counterclockwise
    side: float  # of the face's crop in pixels of the photo
    sheet: Path
    content: ContactSheet

    def plain(self) -> dict[str, Any]:
        """For JSON: what was found, and each method's consistency errors."""
        outputs = [
            {
                "method": name_of(output.method),
                # A face that a network did not make has no consistency error.
                "consistency_error": [
                    round(value, 7) if value < math.inf else None
                    for value in output.upsampled.consistency_error[0].tolist()
                ],
                "fits": output.upsampled.converged[0].tolist(),
                "seconds": round(output.seconds, 3),
            }
            for output in self.content.outputs
        ]
        return {
            "person": self.person, "people": self.people, "rotation": self.rotation,
            "crop_pixels": round(self.side, 1), "sheet": self.sheet.name, "outputs": outputs,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SkippedPhoto:
    """A photo without a sheet, and why."""

    photo: str
    reason: str


def images_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Every picture below a folder by name, and how many files and folders were skipped by reason.

    Raises:
        LibraryError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise LibraryError(f"there is no photo or folder {folder}")
    skipped: Counter[str] = Counter()
    pictures = []
    for found in walk(folder, skipped):
        match "other" if found.status is None else classify_file(found.path):
            case "picture":
                pictures.append(found.path)
            case "made by fedface":
                skipped[OWN_PICTURES] += 1
            case "other":
                skipped[found.reason or "files that are not pictures"] += 1
    if not pictures:
        raise LibraryError(
            f"{folder}: no picture in this folder ({describe_skipped(skipped) or 'it is empty'})"
        )
    return sorted(pictures, key=lambda path: (path.parent.parts, path.name)), skipped


def check_sheet(path: Path, photos: Path) -> None:
    """Raises ConfigError unless a path is a PNG that is new or a contact sheet of the same photo."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: expected a name that ends in .png")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; expected the PNG to write")
    check_output(path, _mark_of(photos))


def _mark_of(photo: Path) -> str:
    """In every sheet of a photo, and in no other file."""
    return f"{PICTURE_MARK} sheet {hashlib.sha256(os.fsencode(photo.resolve())).hexdigest()[:16]}"


def run_pipeline(
    photos: Sequence[Path],
    place: Callable[[Path, int], Path],
    settings: SheetSettings,
    runner: MethodRunner,
    detector: Callable[[], Detector],
    tones: ToneHistogram | None,
    progress: SheetProgress,
) -> Iterator[tuple[Path, tuple[SheetRecord, ...] | SkippedPhoto]]:
    """Yield each photo with the records of its sheets, or why it was skipped; sheets are written before the next photo.

    Args:
        place: The path of the sheet for a photo and a person's number.
        detector: Loads the detector on first use.
        tones: Of the generator's samples; None omits them.
    """
    smallest = settings.degradation.low_side(settings.size)
    with SandboxedDecoder(longest_side=LONGEST_SIDE) as reader:
        for path, photo in reader.read_all(photos):
            progress.stage(path.name, 1000)
            try:
                people = _people(path, photo, detector, settings, smallest)
            except (PhotoError, LibraryError) as error:
                yield path, SkippedPhoto(photo=str(path), reason=str(error).removeprefix(f"{path}: "))
                continue
            people, sheets, mark = people[: settings.max_faces], [], _mark_of(path)
            try:
                for face in people:
                    check_sheet(place(path, face.number), path)
            except ConfigError as error:
                yield path, SkippedPhoto(photo=str(path), reason=str(error))
                continue
            for face in people:
                shown = show(face, settings.degradation, size=settings.size)
                content = runner.run(shown, faces=settings.faces)
                sheet = place(path, face.number)
                sheet.parent.mkdir(parents=True, exist_ok=True)
                write_output(sheet, contact_sheet(content, tones, software=mark.partition("\0")[2]), mark)
                sheets.append(SheetRecord(
                    photo=str(path), person=face.number, people=face.people, rotation=face.rotation,
                    side=face.side, sheet=sheet, content=content,
                ))  # fmt: skip
            yield path, tuple(sheets)


def _people(
    path: Path,
    photo: Photo | PhotoError,
    detector: Callable[[], Detector],
    settings: SheetSettings,
    smallest: int,
) -> tuple[FaceCrop, ...]:
    if isinstance(photo, PhotoError):
        raise photo
    if settings.detect == "at the whole":
        return (whole_image(photo, settings.size, name=str(path)),)
    return face_crops(photo, detector, settings.size, smallest=smallest, name=str(path))


class SheetFolder:
    """A folder of sheets with a record of settings and results, so that interrupted work continues.

    A photo is identified by its relative path, size and modification time: a replaced photo is processed again, and a
    deleted one is removed from the record.
    """

    def __init__(self, folder: Path, photos: Path, settings: Mapping[str, Any]) -> None:
        """Open or create the folder.

        Raises:
            ConfigError: It is the photos' own folder, holds sheets of other photos or settings, or a record that
                cannot be read.
        """
        if folder.resolve() == photos.resolve():
            raise ConfigError(f"{folder}: holds the photos; choose another folder for the sheets with --out")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file; choose a folder for the sheets")
        self.folder, self._photos = folder, photos
        self._settings = json.loads(json.dumps({"photos": str(photos.resolve()), **settings}))
        self._found: dict[str, dict[str, Any]] = {}
        if (folder / RECORD).exists():
            self._found = self._read(folder / RECORD)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            settings, found = (
                dict(stored["settings"]),
                {str(name): dict(entry) for name, entry in stored["photos"].items()},
            )
            for entry in found.values():
                list(entry["stamp"]), [str(sheet["sheet"]) for sheet in entry.get("sheets", ())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged ({error!r}); choose another folder with --out") from error
        if settings != self._settings:
            raise ConfigError(
                f"{self.folder}: holds sheets of other photos or settings (see {RECORD} there); "
                "choose another folder with --out"
            )
        return found

    @property
    def found(self) -> tuple[dict[str, Any], ...]:
        """The record of every photo: its sheets, or why it was skipped."""
        return tuple({"photo": name, **entry} for name, entry in self._found.items())

    def pending(self, photos: Sequence[Path]) -> list[Path]:
        """The photos without all their sheets that were not skipped."""
        known = {self._name(path): self._stamp(path) for path in photos}
        self._found = {
            name: entry for name, entry in self._found.items()
            if known.get(name) == list(entry["stamp"])
            and all((self.folder / sheet["sheet"]).exists() for sheet in entry.get("sheets", ()))
        }  # fmt: skip
        return [path for path in photos if self._name(path) not in self._found]

    def place(self, path: Path, person: int) -> Path:
        """The path of a sheet, which mirrors the photo's relative path."""
        inner = path.relative_to(self._photos)
        name = inner.name
        if len(os.fsencode(name)) > 200:
            name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
        return self.folder / inner.parent / f"{name}{'' if person == 1 else f'-{person}'}.png"

    def store(self, path: Path, result: tuple[SheetRecord, ...] | SkippedPhoto) -> None:
        """Store the result of one photo; on disk when this returns."""
        entry: dict[str, Any] = {"stamp": self._stamp(path)}
        match result:
            case SkippedPhoto(reason=reason):
                entry["skipped"] = reason
            case _:
                entry["sheets"] = [
                    sheets.plain() | {"sheet": sheets.sheet.relative_to(self.folder).as_posix()}
                    for sheets in result
                ]
        self._found[self._name(path)] = entry
        record = self.folder / RECORD
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._settings, "photos": self._found}
        replace_text(record, json.dumps(content, indent=1))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._photos).as_posix()

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        try:
            state = path.stat()
        except OSError:
            return []
        return [state.st_size, state.st_mtime_ns]
