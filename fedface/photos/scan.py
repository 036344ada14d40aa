"""Walks a folder of photos, reads what is new or changed, finds the faces, and writes the index.

Called by the command line and by a device at start-up. Nothing in the folder is changed, links are not
followed, what is no regular file is not opened, and memory does not grow with the number of files. An
interrupted scan loses nothing that was read; a killed one at most two seconds.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import Detector
from fedface.photos.image_io import Photo, PhotoUnreadable, is_picture
from fedface.photos.occasions import fingerprint
from fedface.photos.photo_index import FileStamp, PhotoIndex, PhotoRecord, ScanWriter, default_cache
from fedface.photos.sandboxed_decoder import Limits, SandboxedDecoder

DETECTION_SIDE = 800  # pixels; no detector here looks at more
SAVE_EVERY = 2.0  # seconds
DEEPEST = 100  # folders in folders
NO_STATE = FileStamp(bytes=0, changed=0)


class EmptyLibrary(LibraryError):
    """A folder that can be read and holds nothing of use: no file, or no face."""


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What one scan did; also what the progress callback sees on the way."""

    files: int = 0  # regular files met, hidden ones apart
    reused: int = 0  # known from an earlier scan and unchanged
    read: int = 0  # photos decoded now
    refused: int = 0  # pictures that could not be used, found now
    other: int = 0  # files that are no pictures, found now
    faces: int = 0  # found now
    gone: int = 0  # known before and no longer there
    seconds: float = 0.0
    latest: Path | None = None  # the file just dealt with


def scan_library(
    folder: Path,
    *,
    detector: Detector,
    cache: Path | None = None,
    progress: Callable[[ScanReport], None] | None = None,
    limits: Limits | None = None,
) -> ScanReport:
    """Bring the index of a folder up to date.

    Args:
        folder: The photo library; read, never written.
        detector: Finds the faces; its name is part of the index's key.
        cache: The index file, outside the folder; by default `default_cache(folder)`.
        progress: Called after each file with the counts so far.
        limits: What one photo may cost the child process that decodes it.

    Raises:
        EmptyLibrary: The folder holds no files.
        LibraryError: The folder is missing, or the index cannot be written.
    """
    root = checked_folder(folder)
    index = PhotoIndex(cache or default_cache(root))
    if index.path.resolve().is_relative_to(root):
        raise LibraryError(f"the index {index.path} would lie among the photos; put it outside {folder}")
    child = SandboxedDecoder(longest_side=DETECTION_SIDE, limits=limits)
    with index.writing(detector.name) as book, child as reader:
        scan = _Scan(root, detector, book, progress)
        for path, photo in reader.read_all(scan.unread()):
            scan.note(path, photo)
        if scan.files == 0:
            raise EmptyLibrary(f"no files in {folder}; give the folder that holds the photos")
        return scan.report(gone=book.finish())


def checked_folder(folder: Path) -> Path:
    """The folder's real path, if there is such a folder.

    Raises:
        LibraryError: There is none.
    """
    if not folder.is_dir():
        raise LibraryError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    return folder.resolve()


@dataclass(frozen=True)
class _Found:
    """Something met on the walk: a regular file, or a folder that cannot be opened."""

    path: Path
    state: FileStamp
    reason: str = ""


def _walk(folder: Path, depth: int = 0) -> Iterator[_Found]:
    """Regular files below a folder, depth first; open folders are the only thing kept in memory."""
    if depth > DEEPEST:
        yield _Found(folder, NO_STATE, f"nested deeper than {DEEPEST} folders")
        return
    try:
        entries = os.scandir(folder)
    except OSError as cause:
        yield _Found(folder, NO_STATE, f"folder cannot be opened: {cause.strerror or cause}")
        return
    with entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue  # thumbnails, resource forks and other clutter that its owner never sees
            path = Path(entry.path)
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as cause:
                yield _Found(path, NO_STATE, f"cannot be looked at: {cause.strerror}")
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(path, depth + 1)
            elif stat.S_ISREG(status.st_mode):
                yield _Found(path, FileStamp.of(status))


class _Scan:
    """The counts of a running scan, and the state of the one or two files that are being decoded."""

    def __init__(
        self, root: Path, detector: Detector, book: ScanWriter, progress: Callable[[ScanReport], None] | None
    ) -> None:
        self._root, self._detector, self._book, self._progress = root, detector, book, progress
        self._states: dict[Path, FileStamp] = {}
        self._started = self._saved = time.monotonic()
        self.files = self._reused = self._read = self._refused = self._other = self._faces = 0

    def unread(self) -> Iterator[Path]:
        """The files that have to be decoded; all others are dealt with on the way."""
        for found in _walk(self._root):
            self.files += 1
            name = found.path.relative_to(self._root)
            if found.reason:
                self._refused += 1
                self._write(PhotoRecord(path=name, state=found.state, status="refused", reason=found.reason))
            elif self._book.still_holds(name, found.state):
                self._reused += 1
                self._tell(name)
            elif is_picture(found.path):
                self._states[found.path] = found.state
                yield found.path
            else:
                self._other += 1
                self._write(PhotoRecord(path=name, state=found.state, status="other"))

    def note(self, path: Path, photo: Photo | PhotoError) -> None:
        """Find the faces of a decoded photo and record it, or record why it was refused."""
        name, state = path.relative_to(self._root), self._states.pop(path)
        if isinstance(photo, PhotoError):
            self._refused += 1
            # Without its state the file counts as changed, and the next scan tries it again.
            state = NO_STATE if isinstance(photo, PhotoUnreadable) else state
            self._write(PhotoRecord(path=name, state=state, status="refused", reason=str(photo)))
            return
        try:
            found = self._detector.find(photo.pixels)
        except Exception as error:
            # One broad net: a picture on which a detector breaks must not end the scan of all others.
            self._refused += 1
            reason = f"the face detector broke on it ({type(error).__name__})"
            self._write(PhotoRecord(path=name, state=state, status="refused", reason=reason))
            return
        faces = tuple(face.scaled(photo.width / photo.pixels.shape[1]) for face in found)
        self._read += 1
        self._faces += len(faces)
        self._write(
            PhotoRecord(
                path=name,
                state=state,
                status="read",
                kind=photo.kind,
                width=photo.width,
                height=photo.height,
                taken=photo.taken,
                place=photo.place,
                camera=photo.camera,
                fingerprint=fingerprint(photo.pixels),
                faces=faces,
            )
        )

    def report(self, *, gone: int = 0, latest: Path | None = None) -> ScanReport:
        return ScanReport(
            files=self.files,
            reused=self._reused,
            read=self._read,
            refused=self._refused,
            other=self._other,
            faces=self._faces,
            gone=gone,
            seconds=time.monotonic() - self._started,
            latest=latest,
        )

    def _write(self, record: PhotoRecord) -> None:
        self._book.record(record)
        now = time.monotonic()
        if now - self._saved > SAVE_EVERY:
            self._book.save()
            self._saved = now
        self._tell(record.path)

    def _tell(self, name: Path) -> None:
        if self._progress is not None:
            self._progress(self.report(latest=name))
