"""What a scan found, in an SQLite file outside the photo folder, so that no photo is read twice for nothing.

Called by `scan` (writes) and `library` (reads). One row a file and detector, keyed by relative path; a row
holds while the file's size and time of change hold. The file tells where and when its owner was, so only the
owner may read it. Paths are kept as bytes: a name need not be UTF-8.
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
from fedface.photos.face_alignment import Face, alignment_side
from fedface.photos.occasions import PhotoSignature

Status = Literal["read", "refused", "other"]
VERSION = 2  # raise it when reading or detection changes, and every file is read again
MAX_FACES = 100  # kept for one photo, the largest

_TABLES = """
CREATE TABLE IF NOT EXISTS photo (
    path BLOB NOT NULL, detector TEXT NOT NULL, bytes INTEGER NOT NULL, changed INTEGER NOT NULL,
    scan INTEGER NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, kind TEXT, width INTEGER,
    height INTEGER, taken TEXT, latitude REAL, longitude REAL, camera TEXT, fingerprint BLOB,
    face_count INTEGER NOT NULL, face_side REAL NOT NULL, faces TEXT NOT NULL,
    PRIMARY KEY (path, detector));
CREATE TABLE IF NOT EXISTS scan (
    number INTEGER PRIMARY KEY, detector TEXT NOT NULL, finished INTEGER NOT NULL);
"""
_COLUMNS = (
    "path, bytes, changed, status, reason, kind, width, height, taken, latitude, longitude, camera, fingerprint,"
    " faces"
)


_FIELDS = (
    "path", "detector", "bytes", "changed", "scan", "status", "reason", "kind", "width", "height", "taken",
    "latitude", "longitude", "camera", "fingerprint", "face_count", "face_side", "faces",
)  # fmt: skip
# Not INSERT OR REPLACE: that would give the row a new number, by which open libraries know their photos.
_WRITE = (
    f"INSERT INTO photo ({', '.join(_FIELDS)}) VALUES ({', '.join('?' * len(_FIELDS))})"
    f" ON CONFLICT DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _FIELDS[2:])}"
)


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """What tells a file from its earlier self without reading it."""

    bytes: int
    changed: int  # nanoseconds since 1970

    @staticmethod
    def of(status: os.stat_result) -> FileStamp:
        """From `os.stat` or a directory entry."""
        return FileStamp(bytes=status.st_size, changed=status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class PhotoRecord:
    """What is known of one file of a library."""

    path: Path  # relative to the library's folder
    state: FileStamp
    status: Status  # read · refused (a picture that cannot be used) · other (no picture)
    reason: str = ""  # why it was refused
    kind: str | None = None
    width: int | None = None  # pixels, upright
    height: int | None = None
    taken: datetime | None = None
    place: tuple[float, float] | None = None  # latitude and longitude in degrees
    camera: str | None = None
    fingerprint: bytes | None = None  # None also for a picture that shows nothing clear
    faces: tuple[Face, ...] = ()  # largest first, in pixels of the whole upright photo


def default_cache(folder: Path) -> Path:
    """Where the index of a folder lives unless told otherwise: the platform's place for a program's state."""
    home = Path.home()
    if sys.platform == "darwin":
        state = home / "Library" / "Application Support"
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return state / "fedface" / "libraries" / f"{name}.sqlite"


class PhotoIndex:
    """One index file. Reading opens and closes it each time; a scan holds it open in `writing`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_busy(self, patience: float = 10.0) -> bool:
        """Whether a scan is writing it, and goes on for so many seconds."""
        if not self.path.is_file():
            return False
        try:
            place = f"{self.path.resolve().as_uri()}?mode=rw"
            with closing(
                sqlite3.connect(place, uri=True, timeout=patience, isolation_level=None)
            ) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
        except sqlite3.Error:
            return False  # no index at all, which reading says better
        return False

    @contextmanager
    def writing(self, detector: str) -> Iterator[ScanWriter]:
        """A scan's book, committed on the way out, however the scan ends.

        Raises:
            LibraryError: The file is no index, or another scan is writing it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as cause:
            raise LibraryError(
                f"the index {self.path} cannot be written: {cause.strerror or cause}"
            ) from cause
        with self._explained(), closing(sqlite3.connect(self.path, timeout=10.0)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != VERSION:
                connection.executescript("DROP TABLE IF EXISTS photo; DROP TABLE IF EXISTS scan;")
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
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                raise LibraryError("the scan is of another version; run `fedface photos scan` again")
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as cause:
            raise LibraryError(
                f"the index {self.path} cannot be used ({cause}); if no other scan is running, delete it"
            ) from cause


class ScanWriter:
    """The writing side of one scan with one detector."""

    def __init__(self, connection: sqlite3.Connection, detector: str) -> None:
        self._connection = connection
        self._detector = detector
        row = ("INSERT INTO scan (detector, finished) VALUES (?, 0)", (detector,))
        self._scan = connection.execute(*row).lastrowid
        connection.commit()

    def still_holds(self, path: Path, state: FileStamp) -> bool:
        """Whether the file was read before and has not changed since; notes that it still exists."""
        change = self._connection.execute(
            "UPDATE photo SET scan = ? WHERE path = ? AND detector = ? AND bytes = ? AND changed = ?",
            (self._scan, os.fsencode(path), self._detector, state.bytes, state.changed),
        )
        return change.rowcount == 1

    def record(self, photo: PhotoRecord) -> None:
        """Write or replace what is known of a file."""
        latitude, longitude = photo.place or (None, None)
        faces = photo.faces[:MAX_FACES]
        numbers = [[*face.box, *face.landmarks.reshape(-1), face.score] for face in faces]
        self._connection.execute(
            _WRITE,
            (
                os.fsencode(photo.path), self._detector, photo.state.bytes, photo.state.changed, self._scan,
                photo.status, photo.reason, photo.kind, photo.width, photo.height,
                photo.taken.isoformat() if photo.taken else None, latitude, longitude, photo.camera,
                photo.fingerprint, len(faces), alignment_side(faces[0].landmarks) if faces else 0.0,
                json.dumps(numbers),
            ),
        )  # fmt: skip

    def save(self) -> None:
        """Make what was recorded so far survive an interruption."""
        self._connection.commit()

    def finish(self) -> int:
        """Forget the files that this scan did not meet; returns how many."""
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
    query = f"SELECT {_COLUMNS} FROM photo WHERE detector = ? ORDER BY path"
    return (_record(row) for row in connection.execute(query, (detector,)))


def all_read(
    connection: sqlite3.Connection, detector: str
) -> tuple[np.ndarray, list[Path], list[PhotoSignature]]:
    """All photos that could be read, with a face or without, by path: row number, path, what groups them."""
    query = (
        "SELECT rowid, path, taken, latitude, longitude, fingerprint FROM photo"
        " WHERE detector = ? AND status = 'read' ORDER BY path"
    )
    rows, paths, shots = [], [], []
    for row, name, taken, latitude, longitude, fingerprint in connection.execute(query, (detector,)):
        path = Path(os.fsdecode(name))
        shot = PhotoSignature(
            folder=path.parent,
            taken=datetime.fromisoformat(taken) if taken else None,
            place=None if latitude is None else (latitude, longitude),
            fingerprint=fingerprint,
        )
        rows.append(row)
        paths.append(path)
        shots.append(shot)
    return np.array(rows, dtype=np.int64), paths, shots


def record_of(connection: sqlite3.Connection, row_number: int) -> PhotoRecord:
    """One file by its row number."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM photo WHERE rowid = ?", (row_number,)).fetchone()
    if row is None:
        raise LibraryError("a photo has left the library since it was opened; open the library again")
    return _record(row)


def _record(row: tuple) -> PhotoRecord:
    (
        path, size, changed, status, reason, kind, width, height, taken, latitude, longitude, camera, fingerprint,
        faces,
    ) = row  # fmt: skip
    return PhotoRecord(
        path=Path(os.fsdecode(path)),
        state=FileStamp(bytes=size, changed=changed),
        status=status,
        reason=reason,
        kind=kind,
        width=width,
        height=height,
        taken=datetime.fromisoformat(taken) if taken else None,
        place=None if latitude is None else (latitude, longitude),
        camera=camera,
        fingerprint=fingerprint,
        faces=tuple(_face(numbers) for numbers in json.loads(faces)),
    )


def _face(numbers: list[float]) -> Face:
    left, top, right, bottom = numbers[:4]
    return Face((left, top, right, bottom), np.array(numbers[4:14]).reshape(5, 2), numbers[14])
