"""The index of a photo library: the results of scans, in an SQLite file outside the photo folder.

One row a file and detector, keyed by relative path, and valid while the file's size and time of change stay. A row may
have one crop for training, so that no photo is decoded again for each round; it is deleted with its row, and
overwritten. The index holds faces, places and dates of its owner, so only the owner may read it (mode 0600). Paths are
stored as bytes: a name need not be UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from fedface.errors import LibraryError
from fedface.photos.exif import ExifMetadata
from fedface.photos.face_alignment import Face, alignment_side
from fedface.photos.occasions import PhotoSignature

Status = Literal["read", "refused", "own", "other"]
VERSION = 5  # raise it when decoding or detection changes, and every file is read again
APPLICATION_ID = 0x46466978  # "FFix", in the header of the SQLite file
JOURNAL = bytes.fromhex("d9d505f920a163d7")  # how SQLite's journals begin, once they are on the disk
BUSY_SECONDS = 10.0  # for another scan to end
MAX_FACES = 100  # stored for one photo, the largest

_TABLES = """
CREATE TABLE IF NOT EXISTS photo (
    number INTEGER PRIMARY KEY,
    path BLOB NOT NULL, detector TEXT NOT NULL, bytes INTEGER NOT NULL, changed INTEGER NOT NULL,
    scan INTEGER NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, kind TEXT, width INTEGER,
    height INTEGER, taken TEXT, latitude REAL, longitude REAL, camera TEXT, fingerprint BLOB,
    face_count INTEGER NOT NULL, face_side REAL NOT NULL, faces TEXT NOT NULL,
    date_precision TEXT NOT NULL, content BLOB NOT NULL,
    UNIQUE (path, detector));
CREATE TABLE IF NOT EXISTS crop (
    photo INTEGER PRIMARY KEY REFERENCES photo ON DELETE CASCADE, size INTEGER NOT NULL, pixels BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS scan (
    number INTEGER PRIMARY KEY, detector TEXT NOT NULL, finished INTEGER NOT NULL);
"""
_FIELDS = (
    "path", "detector", "bytes", "changed", "scan", "status", "reason", "kind", "width", "height", "taken",
    "latitude", "longitude", "camera", "fingerprint", "face_count", "face_side", "faces", "date_precision",
    "content",
)  # fmt: skip
# Not INSERT OR REPLACE: that would give the row a new number, by which open libraries know their photos.
_WRITE = (
    f"INSERT INTO photo ({', '.join(_FIELDS)}) VALUES ({', '.join('?' * len(_FIELDS))})"
    f" ON CONFLICT DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _FIELDS[2:])}"
    " RETURNING number"
)


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """Size and time of change: a file whose stamp is the same counts as unchanged."""

    bytes: int
    changed: int  # nanoseconds since 1970

    @staticmethod
    def of(status: os.stat_result) -> FileStamp:
        """From `os.stat` or a directory entry; a time that the index cannot hold becomes the nearest that it can."""
        return FileStamp(bytes=status.st_size, changed=min(max(status.st_mtime_ns, -(2**63)), 2**63 - 1))


@dataclass(frozen=True, kw_only=True)
class PhotoRecord:
    """One file of a library."""

    path: Path  # relative to the library's folder
    state: FileStamp
    status: Status  # read · refused (a picture that cannot be used) · own (a picture made by fedface) · other
    reason: str = ""  # why it was refused
    kind: str | None = None
    width: int | None = None  # pixels, upright
    height: int | None = None
    metadata: ExifMetadata = ExifMetadata()
    fingerprint: bytes | None = None  # None also for a picture that shows nothing clear
    faces: tuple[Face, ...] = ()  # largest first, in pixels of the whole upright photo
    content: bytes = b""  # SHA-256 of the file's bytes, of photos that were read


def default_cache(folder: Path) -> Path:
    """Where the index of a folder lies by default: in the platform's folder for the state of programs."""
    try:
        if sys.platform == "darwin":
            state = Path.home() / "Library" / "Application Support"
        else:
            state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as error:
        raise LibraryError(
            "this user has no home folder for the index of the photos; set HOME or XDG_STATE_HOME"
        ) from error
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return state / "fedface" / "libraries" / f"{name}.sqlite"


class PhotoIndex:
    """One index file, opened for each reading and for each scan."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_busy(self) -> bool:
        """Whether a scan is writing it, and still is after BUSY_SECONDS."""
        if not self.path.is_file():
            return False
        try:
            place = f"{self.path.resolve().as_uri()}?mode=rw"
            with closing(
                sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            ) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
        except sqlite3.Error:
            return False  # not an index, which `reading` explains
        return False

    @contextmanager
    def writing(self, detector: str) -> Iterator[ScanWriter]:
        """The writer of one scan; its records are committed however the scan ends.

        Raises:
            LibraryError: The file is not an index, or another scan is writing it.
        """
        try:
            if self.path.is_file() and self.path.stat().st_size and not self._is_ours():
                raise LibraryError(
                    f"{self.path}: exists and is not an index of fedface; it stays as it is, name another"
                )
            self._check_journal()
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            os.close(descriptor)
            os.chmod(self.path, 0o600)
        except OSError as cause:
            raise LibraryError(
                f"the index {self.path} cannot be written: {cause.strerror or cause}"
            ) from cause
        with self._explained(), closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA secure_delete = ON")  # a deleted photo's crop is overwritten
            connection.execute("PRAGMA foreign_keys = ON")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != VERSION:
                connection.executescript(
                    "DROP TABLE IF EXISTS crop; DROP TABLE IF EXISTS photo; DROP TABLE IF EXISTS scan;"
                )
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.executescript(_TABLES)
            try:
                yield ScanWriter(connection, detector)
            finally:
                connection.commit()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection.

        Raises:
            LibraryError: There is no index yet, or the file is not one of ours.
        """
        if not self.path.is_file():
            raise LibraryError("this folder has not been scanned; run `fedface photos scan` on it first")
        with (
            self._explained(),
            closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)) as connection,
        ):
            connection.row_factory = sqlite3.Row
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                raise LibraryError(
                    f"the index {self.path} is of another version of fedface; run `fedface photos scan` again"
                )
            yield connection

    def _is_ours(self) -> bool:
        """By the application id in the header of an SQLite file (https://sqlite.org/fileformat.html)."""
        with self.path.open("rb") as file:
            header = file.read(72)
        return header.startswith(b"SQLite format 3\0") and header[68:] == APPLICATION_ID.to_bytes(4, "big")

    def _check_journal(self) -> None:
        """Raise LibraryError if a foreign file has the name of one of SQLite's own, which it would delete."""
        place = self.path.resolve()
        for ending in ("-journal", "-wal", "-shm"):
            beside = place.with_name(place.name + ending)
            if beside.exists() and (ending != "-journal" or _is_foreign_journal(beside)):
                raise LibraryError(
                    f"{self.path}: the index would replace {beside.name}, which fedface did not write; name another"
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as cause:
            raise LibraryError(
                f"the index {self.path} cannot be used ({cause}); if no other scan is running, delete it"
            ) from cause


def _is_foreign_journal(path: Path) -> bool:
    """Whether a file cannot be SQLite's journal of a scan that runs or was killed; it may end meanwhile."""
    try:
        with path.open("rb") as file:
            return file.read(len(JOURNAL)) not in (JOURNAL, bytes(len(JOURNAL)), b"")
    except FileNotFoundError:
        return False


class ScanWriter:
    """The writing side of one scan with one detector."""

    def __init__(self, connection: sqlite3.Connection, detector: str) -> None:
        self._connection = connection
        self._detector = detector
        new = "INSERT INTO scan (detector, finished) VALUES (?, 0)"
        self._scan = connection.execute(new, (detector,)).lastrowid
        connection.commit()

    def still_holds(self, path: Path, state: FileStamp) -> bool:
        """Whether the file was read before and has not changed since; if so, its row stays."""
        change = self._connection.execute(
            "UPDATE photo SET scan = ? WHERE path = ? AND detector = ? AND bytes = ? AND changed = ?",
            (self._scan, os.fsencode(path), self._detector, state.bytes, state.changed),
        )
        return change.rowcount == 1

    def record(self, photo: PhotoRecord) -> None:
        """Write or replace a file's row; its crop, which belongs to the earlier file, is deleted."""
        metadata = photo.metadata
        latitude, longitude = metadata.place or (None, None)
        faces = photo.faces[:MAX_FACES]
        numbers = [[*face.box, *face.landmarks.reshape(-1), face.score] for face in faces]
        written = self._connection.execute(
            _WRITE,
            (
                os.fsencode(photo.path), self._detector, photo.state.bytes, photo.state.changed, self._scan,
                photo.status, photo.reason, photo.kind, photo.width, photo.height,
                metadata.taken.isoformat() if metadata.taken else None, latitude, longitude, metadata.camera,
                photo.fingerprint, len(faces), alignment_side(faces[0].landmarks) if faces else 0.0,
                json.dumps(numbers), metadata.date_precision, photo.content,
            ),
        )  # fmt: skip
        self._connection.execute("DELETE FROM crop WHERE photo = ?", written.fetchone())

    def without_crop(self, path: Path, size: int, min_face_side: float) -> PhotoRecord | None:
        """The record of a photo whose largest face is large enough, if no crop of that size is stored for it."""
        row = self._connection.execute(
            "SELECT * FROM photo WHERE path = ? AND detector = ? AND face_count > 0 AND face_side >= ?"
            " AND NOT EXISTS (SELECT * FROM crop WHERE crop.photo = photo.number AND crop.size = ?)",
            (os.fsencode(path), self._detector, min_face_side, size),
        ).fetchone()
        return None if row is None else _record(row)

    def store_crop(self, path: Path, crop: np.ndarray) -> None:
        """Store the crop of a recorded photo, uint8 (s, s, 3), in place of any other of it."""
        self._connection.execute(
            "INSERT OR REPLACE INTO crop SELECT number, ?, ? FROM photo WHERE path = ? AND detector = ?",
            (len(crop), crop.tobytes(), os.fsencode(path), self._detector),
        )

    def delete_crop(self, path: Path) -> None:
        self._connection.execute(
            "DELETE FROM crop WHERE photo IN (SELECT number FROM photo WHERE path = ? AND detector = ?)",
            (os.fsencode(path), self._detector),
        )

    def save(self) -> None:
        """Commit the records so far."""
        self._connection.commit()

    def finish(self) -> int:
        """Delete the rows of files that this scan did not meet; returns how many."""
        key = (self._detector, self._scan)
        gone = self._connection.execute("DELETE FROM photo WHERE detector = ? AND scan <> ?", key).rowcount
        self._connection.execute("DELETE FROM scan WHERE detector = ? AND number <> ?", key)
        self._connection.execute("UPDATE scan SET finished = 1 WHERE number = ?", (self._scan,))
        self._connection.commit()
        return gone


def latest_detector(connection: sqlite3.Connection) -> str | None:
    """The detector of the latest finished scan, or of the latest begun if none was finished."""
    query = "SELECT detector FROM scan ORDER BY finished DESC, number DESC LIMIT 1"
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def records(connection: sqlite3.Connection, detector: str) -> Iterator[PhotoRecord]:
    """All files in the order of their paths, one at a time."""
    query = "SELECT * FROM photo WHERE detector = ? ORDER BY path"
    return (_record(row) for row in connection.execute(query, (detector,)))


def all_read(
    connection: sqlite3.Connection, detector: str
) -> tuple[np.ndarray, list[Path], list[PhotoSignature]]:
    """All photos that could be decoded, with a face or without, by path: row number, path, signature."""
    query = "SELECT * FROM photo WHERE detector = ? AND status = 'read' ORDER BY path"
    rows, paths, signatures = [], [], []
    for row in connection.execute(query, (detector,)):
        rows.append(row["number"])
        paths.append(Path(os.fsdecode(row["path"])))
        metadata = _metadata(row)
        signature = PhotoSignature(
            folder=paths[-1].parent, taken=metadata.taken, place=metadata.place, fingerprint=row["fingerprint"],
            date_precision=metadata.date_precision, content=row["content"],
        )  # fmt: skip
        signatures.append(signature)
    return np.array(rows, dtype=np.int64), paths, signatures


def record_of(connection: sqlite3.Connection, row_number: int) -> PhotoRecord:
    """One file by its row number."""
    row = connection.execute("SELECT * FROM photo WHERE number = ?", (row_number,)).fetchone()
    if row is None:
        raise LibraryError("a photo was removed from the library since it was opened; open the library again")
    return _record(row)


def stored_crop(connection: sqlite3.Connection, row_number: int, size: int) -> np.ndarray | None:
    """The stored crop of a photo, uint8 (size, size, 3); None if there is none of that size."""
    query = "SELECT pixels FROM crop WHERE photo = ? AND size = ?"
    row = connection.execute(query, (row_number, size)).fetchone()
    return None if row is None else np.frombuffer(row[0], dtype=np.uint8).reshape(size, size, 3)


_SAME = ("status", "reason", "kind", "width", "height", "fingerprint", "content")


def _record(row: sqlite3.Row) -> PhotoRecord:
    return PhotoRecord(
        path=Path(os.fsdecode(row["path"])),
        state=FileStamp(bytes=row["bytes"], changed=row["changed"]),
        metadata=_metadata(row),
        faces=tuple(_face(numbers) for numbers in json.loads(row["faces"])),
        **{name: row[name] for name in _SAME},
    )


def _metadata(row: sqlite3.Row) -> ExifMetadata:
    return ExifMetadata(
        taken=datetime.fromisoformat(row["taken"]) if row["taken"] else None,
        place=None if row["latitude"] is None else (row["latitude"], row["longitude"]),
        camera=row["camera"],
        date_precision=row["date_precision"],
    )


def _face(numbers: list[float]) -> Face:
    left, top, right, bottom = numbers[:4]
    return Face((left, top, right, bottom), np.array(numbers[4:14]).reshape(5, 2), numbers[14])
