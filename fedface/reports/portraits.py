"""A file or a folder of photos -> a sheet for every face, with a record of what was done and of who was left out.

Called by `fedface upsample`. Photos are decoded in a child process with limits, as in a scan, and never written. A
folder's work can be interrupted: sheets that lie there already are not made again, and those of other settings are
never mixed with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedface.audits.bias import ToneHistogram
from fedface.errors import ConfigError, LibraryError, PhotoError
from fedface.photos.faces import Detector
from fedface.photos.isolation import IsolatedReader
from fedface.photos.pixels import Photo, is_picture
from fedface.photos.subjects import LONGEST_SIDE, Subject, subjects_of, whole_picture
from fedface.reports.portrait import Painters, Portrait, portrait_sheet, show
from fedface.upsampling.degrade import Degradation
from fedface.upsampling.methods import name_of

RECORD = "faces.json"


class Watcher(Protocol):
    """Who is told how far it is."""

    def stage(self, name: str, steps: int) -> None:
        """A photo begins that takes `steps` steps."""
        ...

    def say(self, sentence: str) -> None:
        """Something worth a line."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of every photo."""

    degradation: Degradation
    size: int  # of the faces in pixels
    faces: int  # for each method that has more than one answer
    most_people: int  # faces of one photo, the largest first
    look: Literal["for faces", "at the whole"] = "for faces"  # whole: the picture is an aligned face as it is


@dataclass(frozen=True, kw_only=True)
class Made:
    """One sheet."""

    photo: str
    person: int  # from 1, the largest face first
    people: int  # faces in the photo; 0: the picture was taken as a face
    turned: int  # degrees counterclockwise by which the photo had to be turned
    side: float  # of the face's crop in pixels of the photo
    sheet: Path
    portrait: Portrait

    def plain(self) -> dict[str, Any]:
        """For JSON: what was found, and each method's misfits."""
        answers = [
            {
                "method": name_of(answer.method),
                "misfit": [round(value, 7) for value in answer.made.misfit[0].tolist()],
                "fits": answer.made.converged[0].tolist(),
                "seconds": round(answer.seconds, 3),
            }
            for answer in self.portrait.answers
        ]
        return {
            "photo": self.photo, "person": self.person, "people": self.people, "turned": self.turned,
            "crop_pixels": round(self.side, 1), "sheet": self.sheet.name, "answers": answers,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A photo without a sheet, and why."""

    photo: str
    reason: str


def pictures_in(folder: Path) -> list[Path]:
    """Every picture below a folder by name, hidden files left out.

    Raises:
        LibraryError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise LibraryError(f"there is no photo or folder {folder}")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place) / name for name in sorted(files) if not name.startswith(".")]
    pictures = [path for path in found if is_picture(path)]
    if not pictures:
        raise LibraryError(f"{folder}: no picture in this folder ({len(found)} other files)")
    return pictures


def make_sheets(
    photos: Sequence[Path],
    place: Callable[[Path, int], Path],
    wanted: Wanted,
    painters: Painters,
    detector: Callable[[], Detector],
    tones: ToneHistogram | None,
    watcher: Watcher,
) -> Iterator[tuple[Made, ...] | LeftOut]:
    """The sheets of each photo, one for every face, or why there is none; written before the next photo is begun.

    Args:
        photos: Files.
        place: Where the sheet of a photo and of the person of this number goes.
        wanted: What is asked of each.
        painters: The methods.
        detector: Makes the detector when it is first needed.
        tones: Of what the generator draws; None leaves them out.
        watcher: Who is told about each photo.
    """
    smallest = wanted.degradation.low_side(wanted.size)
    with IsolatedReader(longest_side=LONGEST_SIDE) as reader:
        for path, photo in reader.read_all(photos):
            watcher.stage(path.name, 1000)
            try:
                people = _people(path, photo, detector, wanted, smallest)
            except (PhotoError, LibraryError) as error:
                yield LeftOut(photo=str(path), reason=str(error).removeprefix(f"{path}: "))
                continue
            made = []
            for subject in people[: wanted.most_people]:
                shown = show(subject, wanted.degradation, size=wanted.size)
                portrait = painters.portray(shown, faces=wanted.faces)
                sheet = place(path, subject.number)
                draft = sheet.with_name(sheet.name + ".draft")
                draft.write_bytes(portrait_sheet(portrait, tones))
                draft.replace(sheet)
                made.append(Made(
                    photo=str(path), person=subject.number, people=subject.people, turned=subject.turned,
                    side=subject.side, sheet=sheet, portrait=portrait,
                ))  # fmt: skip
            yield tuple(made)


def _people(
    path: Path, photo: Photo | PhotoError, detector: Callable[[], Detector], wanted: Wanted, smallest: int
) -> tuple[Subject, ...]:
    if isinstance(photo, PhotoError):
        raise photo
    if wanted.look == "at the whole":
        return (whole_picture(photo, wanted.size, name=str(path)),)
    return subjects_of(photo, detector, wanted.size, smallest=smallest, name=str(path))


class SheetFolder:
    """A folder of sheets with the record of what was asked and found, so that work goes on where it ended."""

    def __init__(self, folder: Path, photos: Path, settings: Mapping[str, Any]) -> None:
        """Open or begin one.

        Raises:
            ConfigError: It holds sheets of other photos or settings, or a record that cannot be read.
        """
        self.folder, self._photos = folder, photos
        self._asked = {"photos": str(photos.resolve()), **settings}
        self._found: list[dict[str, Any]] = []
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file; name a folder for the sheets")
        path = folder / RECORD
        if path.exists():
            self._found = self._read(path)
        folder.mkdir(parents=True, exist_ok=True)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            asked, found = dict(kept["asked"]), [dict(entry) for entry in kept["found"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: damaged ({error}); choose another folder with --out") from error
        if asked != json.loads(json.dumps(self._asked)):
            raise ConfigError(
                f"{self.folder}: holds sheets of other photos or settings (see {RECORD} there); "
                "choose another folder with --out"
            )
        return found

    @property
    def found(self) -> tuple[dict[str, Any], ...]:
        """Everything so far, sheets and photos left out."""
        return tuple(self._found)

    def left(self, photos: Sequence[Path]) -> list[Path]:
        """The photos that have neither their sheet nor a reason why not."""
        done = {
            entry["photo"] for entry in self._found
            if "sheet" not in entry or (self.folder / entry["sheet"]).exists()
        }  # fmt: skip
        self._found = [entry for entry in self._found if entry["photo"] in done]
        return [path for path in photos if str(path) not in done]

    def place(self, path: Path, person: int) -> Path:
        """Where a sheet goes: the photo's place below its folder, in words."""
        name = "_".join(path.relative_to(self._photos).parts)
        return self.folder / f"{name}{'' if person == 1 else f'-{person}'}.png"

    def keep(self, result: tuple[Made, ...] | LeftOut) -> None:
        """Remember all that came of one photo, on the disk on return."""
        match result:
            case LeftOut(photo=photo, reason=reason):
                self._found.append({"photo": photo, "left_out": reason})
            case _:
                self._found += [made.plain() for made in result]
        path = self.folder / RECORD
        draft = path.with_name(path.name + ".draft")
        draft.write_text(json.dumps({"asked": self._asked, "found": self._found}, indent=1), encoding="utf-8")
        draft.replace(path)
