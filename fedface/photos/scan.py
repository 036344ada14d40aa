"""Walks a folder of photos, decodes what is new or changed, finds the faces, and writes the index.

Nothing in the folder is changed, links are not followed, only regular files are opened, and memory does not grow with
the number of files. An interrupted scan loses nothing that was read; a killed one at most two seconds. A device also
has the crops for training cut here, from the same decoded pixels.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import Detector
from fedface.photos.image_io import Photo, PhotoUnreadable, classify_file, content_hash, shrink
from fedface.photos.occasions import fingerprint
from fedface.photos.photo_files import FoundFile, walk
from fedface.photos.photo_index import FileStamp, PhotoIndex, PhotoRecord, ScanWriter, default_cache
from fedface.photos.sandboxed_decoder import SandboxedDecoder
from fedface.photos.training_crops import MAX_STORED_SIDE, PhotoSelection, decode_side, training_crop

log = logging.getLogger("fedface.photos")

DECODED_SIDE = 1000  # pixels at which photos are decoded: a 12-megapixel JPEG decodes fast at a quarter
DETECTION_SIDE = 800  # pixels; no detector here looks at more
SAVE_EVERY = 2.0  # seconds
NO_STATE = FileStamp(bytes=0, changed=0)


class EmptyLibrary(LibraryError):
    """A folder that can be read and holds no file, or no face."""


@dataclass(kw_only=True)
class ScanReport:
    """The counts of one scan, also given to the progress callback while they grow."""

    files: int = 0  # regular files met, hidden ones apart
    reused: int = 0  # known from an earlier scan and unchanged
    read: int = 0  # photos decoded now
    refused: int = 0  # pictures that could not be used, found now
    other: int = 0  # files that are not pictures, found now
    faces: int = 0  # found now
    gone: int = 0  # known before and no longer there
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> files and folders that were passed over


def scan_library(
    folder: Path,
    *,
    detector: Detector,
    cache: Path | None = None,
    progress: Callable[[ScanReport], None] | None = None,
    crop_size: int | None = None,
    selection: PhotoSelection | None = None,
) -> ScanReport:
    """Bring the index of a folder up to date.

    Args:
        folder: The photo library; read, never written.
        detector: Finds the faces; its name is part of the index's key.
        cache: The index file, outside the folder; by default `default_cache(folder)`.
        progress: Called after each file with the counts so far.
        crop_size: Store the largest face's crop of this side for each photo that `selection` allows, in place of
            crops of other sizes, and delete those of other photos. None, or a size above MAX_STORED_SIDE, stores and
            deletes none.
        selection: Which photos get a crop; by default all of them.

    Raises:
        EmptyLibrary: The folder holds no files.
        LibraryError: The folder is missing, or the index cannot be written.
    """
    root = checked_folder(folder)
    index = PhotoIndex(cache or default_cache(root))
    if index.path.resolve().is_relative_to(root):
        raise LibraryError(f"the index {index.path} would lie among the photos; put it outside {folder}")
    if crop_size is not None and crop_size > MAX_STORED_SIDE:
        crop_size = None
    with (
        index.writing(detector.name) as writer,
        SandboxedDecoder(longest_side=DECODED_SIDE) as decoder,
        SandboxedDecoder() as second_decoder,  # its child starts when a crop needs more than DECODED_SIDE
    ):
        cropper = None
        if crop_size is not None:
            cropper = _Cropper(root, writer, second_decoder, crop_size, selection or PhotoSelection())
        scan = _Scan(root, detector, writer, cropper, progress)
        for path, photo in decoder.read_all(scan.to_decode()):
            scan.record(path, photo)
        if scan.report.files == 0:
            raise EmptyLibrary(f"no files in {folder}; give the folder that holds the photos")
        return scan.finish()


def checked_folder(folder: Path) -> Path:
    """The folder's real path, if there is such a folder.

    Raises:
        LibraryError: There is none.
    """
    if not folder.is_dir():
        raise LibraryError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    return folder.resolve()


@dataclass(frozen=True)
class _Cropper:
    """Cuts and stores the crops of a scan."""

    root: Path
    writer: ScanWriter
    second_decoder: SandboxedDecoder
    size: int
    selection: PhotoSelection

    def missing(self, name: Path) -> PhotoRecord | None:
        """The record of an unchanged photo that may be used and has no crop; deletes a crop that may not be used."""
        if self.selection.allows(name):
            return self.writer.without_crop(name, self.size, self.selection.min_face_side)
        self.writer.delete_crop(name)
        return None

    def store(self, record: PhotoRecord, photo: Photo) -> None:
        """Cut and store the crop of a photo whose record was just written, if it may be used."""
        if self.missing(record.path) is None:
            return
        side = decode_side(record, self.size)
        if side > DECODED_SIDE:
            closer = self.second_decoder.read(self.root / record.path, longest_side=side)
            if isinstance(closer, PhotoError):
                return
            photo = closer
        try:
            crop = training_crop(record, photo, self.size)
        except Exception as error:
            # One broad net: a face that cannot be cut out must not end the scan. Training leaves it out, too.
            log.warning("%s: no crop can be cut out (%r)", record.path, error)
            return
        self.writer.store_crop(record.path, crop)


class _Scan:
    """The counts of a running scan, and the state of the one or two files that are being decoded."""

    def __init__(
        self,
        root: Path,
        detector: Detector,
        writer: ScanWriter,
        cropper: _Cropper | None,
        progress: Callable[[ScanReport], None] | None,
    ) -> None:
        self._root, self._detector, self._writer, self._progress = root, detector, writer, progress
        self._cropper = cropper
        self._skipped: Counter[str] = Counter()
        self._stamps: dict[Path, FileStamp] = {}
        self._uncropped: dict[Path, PhotoRecord] = {}
        self._started = self._saved = time.monotonic()
        self.report = ScanReport()

    def to_decode(self) -> Iterator[Path]:
        """The files that have to be decoded; all others are recorded on the way."""
        for found in walk(self._root, self._skipped):
            self.report.files += 1
            name = found.path.relative_to(self._root)
            try:
                needed = self._needs_decoding(found, name)
            except (ArithmeticError, TypeError, ValueError) as error:
                # One broad net: an odd file must cost that file, not the device's whole library.
                log.warning("%s: it cannot be examined (%r)", name, error)
                self._refuse(name, NO_STATE, f"it cannot be examined ({error!r})")
                continue
            if needed:
                yield found.path

    def _needs_decoding(self, found: FoundFile, name: Path) -> bool:
        """Whether a file has to be decoded; if not, it is recorded now."""
        if found.status is None:
            self._refuse(name, NO_STATE, found.reason)
            return False
        state = FileStamp.of(found.status)
        if self._writer.still_holds(name, state):
            self.report.reused += 1
            known = None if self._cropper is None else self._cropper.missing(name)
            if known is None:
                self._advance()
                return False
            self._uncropped[found.path] = known
            return True
        match classify_file(found.path):
            case "picture":
                self._stamps[found.path] = state
                return True
            case "made by fedface":
                self._write(PhotoRecord(path=name, state=state, status="own"))
            case "other":
                self.report.other += 1
                self._write(PhotoRecord(path=name, state=state, status="other"))
        return False

    def _refuse(self, name: Path, state: FileStamp, reason: str) -> None:
        self.report.refused += 1
        self._write(PhotoRecord(path=name, state=state, status="refused", reason=reason))

    def record(self, path: Path, photo: Photo | PhotoError) -> None:
        """Find the faces of a decoded photo and record it, or record why it was refused."""
        if (known := self._uncropped.pop(path, None)) is not None:
            if self._cropper is not None and isinstance(photo, Photo):
                self._cropper.store(known, photo)
            self._advance()
            return
        name, state = path.relative_to(self._root), self._stamps.pop(path)
        content = b""
        if not isinstance(photo, PhotoError):
            try:
                content = content_hash(path)
            except PhotoError as error:
                photo = error
        if isinstance(photo, PhotoError):
            # Without its stamp the file counts as changed, and the next scan tries it again.
            self._refuse(name, NO_STATE if isinstance(photo, PhotoUnreadable) else state, str(photo))
            return
        pixels = shrink(photo.pixels, DETECTION_SIDE)
        try:
            found = self._detector.find(pixels)
            faces = tuple(face.scaled(photo.width / pixels.shape[1]) for face in found)
            record = PhotoRecord(
                path=name,
                state=state,
                status="read",
                kind=photo.kind,
                width=photo.width,
                height=photo.height,
                metadata=photo.metadata,
                fingerprint=fingerprint(pixels),
                faces=faces,
                content=content,
            )
        except Exception as error:
            # One broad net: a picture on which a detector fails must not end the scan of all others.
            self._refuse(name, state, f"the face detector failed on it ({type(error).__name__})")
            return
        self.report.read += 1
        self.report.faces += len(faces)
        self._writer.record(record)
        if self._cropper is not None:
            self._cropper.store(record, photo)
        self._advance()

    def finish(self) -> ScanReport:
        """The counts, after deleting the rows of files that are no longer there."""
        self.report.gone = self._writer.finish()
        self.report.seconds = time.monotonic() - self._started
        self.report.skipped = dict(self._skipped)
        return self.report

    def _write(self, record: PhotoRecord) -> None:
        self._writer.record(record)
        self._advance()

    def _advance(self) -> None:
        """After each file: save the index now and then, and report the progress."""
        now = time.monotonic()
        if now - self._saved > SAVE_EVERY:
            self._writer.save()
            self._saved = now
        if self._progress is not None:
            self._progress(self.report)
