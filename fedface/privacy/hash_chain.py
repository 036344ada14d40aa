"""An append-only, hash-chained table in one SQLite file, whose newest digest is also stored beside it and elsewhere.

Each record holds the digest of the one before. The newest digest, the head, is written to a file beside the
database after each record, and to the folder of a witness if there is one: another disk, or the user's state folder.

A `Chain` is one session: one connection, and one pass over all digests. Each transaction then checks that the file at
the path is still the same, that no other connection has committed since (otherwise all digests are checked again), and
that the chain contains what both heads name.

Detects modified, deleted, inserted or reordered records; the file emptied, missing, or rolled back to a copy
while its head remains. With a witness also: file and head rolled back together, the whole folder rolled back or
missing, and a copy of the folder used at another path (the witness knows a chain by its path).
Not detected: file and head rolled back together, without a witness; file, head and witness all rolled back to one
moment; file and head rolled back to before the witness existed, if the witness is missing as well. The digests have
no key: anyone who may write file, head and witness can also forge a history.

Source: SQLite with a rollback journal and synchronous=EXTRA (https://sqlite.org/pragma.html); chained entries:
Schneier and Kelsey (1999), Secure audit logs to support computer forensics.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from fedface.errors import LedgerError
from fedface.platforms import sync_folder

LOCK_TIMEOUT = 60.0  # seconds to wait for another process that is writing
APPLICATION_ID = 0x46466C67  # "FFlg", in the header of the SQLite file
FORMAT = 6  # version of the file's tables and of what its records contain
GENESIS = hashlib.sha256(f"fedface ledger {FORMAT}".encode()).hexdigest()  # the parent of the first record

_APPEND_ONLY = "BEGIN SELECT RAISE(ABORT, 'append only'); END"
_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE records (number INTEGER PRIMARY KEY AUTOINCREMENT, written TEXT NOT NULL, kind TEXT NOT NULL, "
    "entry INTEGER, content TEXT NOT NULL, digest TEXT NOT NULL UNIQUE)",
    f"CREATE TRIGGER records_no_update BEFORE UPDATE ON records {_APPEND_ONLY}",
    f"CREATE TRIGGER records_no_delete BEFORE DELETE ON records {_APPEND_ONLY}",
)

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The device's own clock."""
    return datetime.now(UTC)


def in_utc(time: datetime) -> datetime:
    """The same moment in UTC; refuses a time without a zone."""
    if time.tzinfo is None:
        raise ValueError(f"a time must know its zone, got {time.isoformat()}")
    return time.astimezone(UTC)


class Record(NamedTuple):
    """One record of a chain."""

    number: int  # 1, 2, 3, ...
    written: str  # UTC, ISO 8601; never before the record above
    kind: str  # which type `content` describes
    entry: int | None  # number of the record that this one belongs to, or is covered by
    content: str  # JSON, hence without a control character
    digest: str  # SHA-256 of all of the above and of the digest of the record before

    @staticmethod
    def digest_of(number: int, written: str, kind: str, entry: int | None, content: str, parent: str) -> str:
        """The digest of a record with these values; `parent` is the digest of the record before."""
        return hashlib.sha256(
            f"{number}\0{written}\0{kind}\0{entry}\0{content}\0{parent}".encode()
        ).hexdigest()

    @property
    def time(self) -> datetime:
        """When it was written."""
        try:
            return in_utc(datetime.fromisoformat(self.written))
        except ValueError as error:
            raise LedgerError(f"record {self.number} has no date: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Head:
    """The content of a head file or of a witness file."""

    digest: str  # of the newest record
    witness: str | None = None  # the folder of the witness, once there is one

    def to_text(self) -> str:
        """The file's content."""
        return f"{self.digest}\n{json.dumps({'witness': self.witness})}\n"

    @staticmethod
    def of_file(path: Path) -> Head | None:
        """What a file contains; None if there is no file.

        Raises:
            LedgerError: The file is empty, torn or not a head.
        """
        if not path.exists():
            return None
        first, _, second = path.read_text(encoding="ascii", errors="replace").strip().partition("\n")
        try:
            head = Head(digest=first, witness=json.loads(second).get("witness") if second else None)
        except (ValueError, AttributeError) as error:
            raise LedgerError(f"{path} is damaged; restore it from a backup") from error
        if not re.fullmatch("[0-9a-f]{64}", head.digest) or not isinstance(head.witness, str | None):
            raise LedgerError(f"{path} is damaged: it contains no digest; restore it from a backup")
        return head

    def write(self, path: Path) -> None:
        """Replace a file in one step; it and its name are on disk when this returns."""
        draft = path.with_name(f"{path.name}.draft")
        draft.unlink(missing_ok=True)  # of a process that was killed: its rights are not taken over
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(self.to_text())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)


@contextmanager
def without_transactions(path: Path, seconds: float) -> Iterator[bool]:
    """Keep all processes out of transactions of the chain at `path` until the block ends.

    Args:
        path: Its file; there may be none.
        seconds: How long to wait for the end of a transaction.

    Yields:
        False if a process is still in one.
    """
    place = f"{path.absolute().as_uri()}?mode=rw"
    try:
        connection = sqlite3.connect(place, uri=True, timeout=seconds, isolation_level=None)
    except sqlite3.Error:  # there is none, or it cannot be opened
        yield True
        return
    with closing(connection) as sql:
        try:
            sql.execute("BEGIN IMMEDIATE")
            free = True
        except sqlite3.Error as error:
            free = "locked" not in str(error)  # in a damaged file no transaction can begin
        yield free  # closing ends the transaction


def head_path(path: Path) -> Path:
    """The file beside a chain that stores its head."""
    return path.with_name(f"{path.name}.head")


def witness_path(path: Path, folder: Path) -> Path:
    """The file in a witness's folder that stores the head of the chain at `path`."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return folder.resolve() / f"ledger-{name:.32}.head"


class Transaction:
    """A locked chain: its verified records, and `append` for the next."""

    def __init__(self, sql: sqlite3.Connection, records: list[Record], now: Clock) -> None:
        self.sql = sql  # for the tables beside the chain
        self.records = records  # oldest first
        self._now = now

    def append(self, kind: str, content: object, *, entry: int | None = None) -> Record:
        """Add a record, dated now, or as the one above if the clock went back since."""
        written, parent = in_utc(self._now()).replace(microsecond=0), GENESIS
        if self.records:
            written, parent = max(written, self.records[-1].time), self.records[-1].digest
        values = (
            len(self.records) + 1,
            written.isoformat(timespec="seconds"),
            kind,
            entry,
            json.dumps(content, sort_keys=True, separators=(",", ":")),
        )
        record = Record(*values, Record.digest_of(*values, parent))
        self.sql.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", record)
        self.records.append(record)
        return record


class Chain:
    """One session on the chain at a path. Safe to use from several threads and processes at once; fails closed.

    In a folder that cannot be written, such as one on a read-only disk, the chain is verified and read; a write fails.
    """

    def __init__(self, path: Path, witness: Path | None, now: Clock) -> None:
        self.path = path
        self._head_path = head_path(path)
        self._witness = None if witness is None else witness.resolve()
        self._now = now
        self._read_only = path.exists() and not os.access(
            path.parent, os.W_OK
        )  # a disk that cannot be written
        self._lock = threading.RLock()
        self._sql: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the file that is connected to
        self._data_version: int | None = None  # SQLite's, when the records were verified; None: they were not
        self._records: list[Record] = []
        self._digests: set[str] = set()

    @staticmethod
    def open(
        path: Path, *, witness: Path | None = None, now: Clock = utc_now, tables: Sequence[str] = ()
    ) -> Chain:
        """Open and verify the chain at `path`, or create one where there is neither a chain nor a trace of one.

        Once a witness exists, the head names its folder, and the chain is not used without it, no matter who opens
        it: named again or not, it must be there and agree. It is created only where the head names none yet. To
        move a witness, copy its file; to give one up, remove the second line of the head.

        Args:
            path: The file; it and its head become readable by their owner alone, as does a folder created for them.
            witness: A folder outside the chain's own, which several chains may share; None for the one that the
                head names, if it names one.
            tables: SQL of tables in the same file, unchained, for a new file.

        Raises:
            LedgerError: The chain is damaged, of another format, was rolled back or replaced, or is missing while a
                head remains; its witness is missing; or the witness would lie in the chain's own folder.
        """
        chain = Chain(path, witness, now)
        if chain._witness is not None and chain._witness.is_relative_to(path.resolve().parent):
            raise LedgerError(
                f"a witness in {witness} would be rolled back together with {path}; name another folder"
            )
        try:
            chain._open(tables)
        except OSError as error:
            raise LedgerError(f"cannot open the ledger {path}: {error}") from error
        return chain

    def close(self) -> None:
        """End the session; a later transaction begins another."""
        with self._lock:
            if self._sql is not None:
                self._sql.close()
            self._sql = self._data_version = None

    def __del__(self) -> None:
        if self._sql is not None:
            self._sql.close()

    @contextmanager
    def read_transaction(self) -> Iterator[Transaction]:
        """The verified chain, locked until the block ends."""
        with self._transaction() as transaction:
            yield transaction

    @contextmanager
    def write_transaction(self) -> Iterator[Transaction]:
        """The same, to be written; on disk with its heads once the block has ended without an exception."""
        with self._lock:
            with self._transaction() as transaction:
                yield transaction
            self._write_heads()

    def _open(self, tables: Sequence[str]) -> None:
        witness = self._witness_path()
        places = [self._head_path] if witness is None else [self._head_path, witness]
        heads = {place: head for place in places if (head := Head.of_file(place)) is not None}
        used = [place for place, head in heads.items() if head.digest != GENESIS]
        if not self.path.exists() and used:
            names = " and ".join(str(place) for place in used)
            raise LedgerError(
                f"the ledger {self.path} has gone but {names} remembers it; restore it, or treat these photos as spent"
            )
        if self._read_only:
            with self._locked() as sql:
                self._verify(sql)
            return
        _make_folder(self.path.parent)
        with self._locked("rwc") as sql:
            os.chmod(self.path, 0o600)  # never open the file here: closing it would drop other threads' locks
            if sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                if used:
                    raise LedgerError(f"the ledger {self.path} was emptied; restore it from a backup")
                for statement in (*_SCHEMA, *tables):
                    sql.execute(statement)
            self._verify_records(sql)
            self._compare(self._head_path)
            if witness is not None and witness.exists():
                self._compare(witness)
            elif witness is not None:
                self._begin_witness(witness)
        self._write_heads()

    def _begin_witness(self, witness: Path) -> None:
        head = Head.of_file(self._head_path)
        named = None if head is None else head.witness
        if named is not None:
            raise LedgerError(self._no_witness(witness, named))
        _make_folder(witness.parent)
        self._head().write(witness)

    def _no_witness(self, missing: Path, named: str) -> str:
        return (
            f"the ledger {self.path} has a witness in {named}, but {missing} is missing. Connect its "
            "disk, or restore the file from where it was. If it is lost for good, see first that no entry is "
            f"missing, then remove the second line of {self._head_path} and name a witness again"
        )

    def _witness_path(self) -> Path | None:
        """The file of this chain's witness, as named when it was opened, otherwise by the head."""
        folder = self._witness
        if folder is None:
            head = Head.of_file(self._head_path)
            if head is None or head.witness is None:
                return None
            folder = Path(head.witness)
        return witness_path(self.path, folder)

    def _connect(self, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
        """The session's connection; another one, with nothing verified yet, if another file lies at the path."""
        inode = None
        if self.path.exists():
            status = os.stat(self.path)
            inode = status.st_dev, status.st_ino
        if self._sql is not None and inode == self._inode:
            return self._sql
        self.close()
        sql = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'ro' if self._read_only else mode}",
            uri=True,
            timeout=LOCK_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            sql.execute("PRAGMA journal_mode = DELETE")
            sql.execute("PRAGMA synchronous = EXTRA")
            sql.execute("PRAGMA fullfsync = 1")
            sql.execute("PRAGMA secure_delete = 1")  # a reply that is deleted is overwritten
            status = os.stat(self.path)
        except BaseException:
            sql.close()
            raise
        self._sql, self._inode = sql, (status.st_dev, status.st_ino)
        return sql

    @contextmanager
    def _locked(self, mode: Literal["rw", "rwc"] = "rw") -> Iterator[sqlite3.Connection]:
        """One writer at a time; committed and on disk when the block ends without an exception."""
        with self._lock:
            try:
                sql = self._connect(mode)
                sql.execute("BEGIN" if self._read_only else "BEGIN IMMEDIATE")
                try:
                    yield sql
                    version, self._data_version = self._data_version, None  # cut short here: verify anew
                    sql.execute("COMMIT")
                    self._data_version = version
                except BaseException:
                    if sql.in_transaction:
                        sql.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, OSError) as error:
                self._data_version = None
                if _is_full(error):
                    raise LedgerError(
                        f"the ledger {self.path} cannot be written, because the disk is full ({error}); make room: "
                        "nothing is sent until then"
                    ) from error
                raise LedgerError(f"the ledger {self.path} is damaged or locked: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        with self._locked() as sql:
            self._verify(sql)
            before = len(self._records)
            try:
                yield Transaction(sql, self._records, self._now)
            except BaseException:
                self._records = self._records[:before]  # another list: an index of the old one is discarded
                raise
            self._digests.update(record.digest for record in self._records[before:])

    def _verify(self, sql: sqlite3.Connection) -> None:
        """Check the records, unless no other connection has written since they were checked; then both heads."""
        if sql.execute("PRAGMA data_version").fetchone()[0] != self._data_version:
            self._verify_records(sql)
        self._compare(self._head_path)
        witness = self._witness_path()
        if witness is not None:
            if not witness.exists():
                raise LedgerError(self._no_witness(witness, str(witness.parent)))
            self._compare(witness)

    def _verify_records(self, sql: sqlite3.Connection) -> None:
        """Read all records, and check the format, and each record against its own digest and its parent's."""
        self._data_version = None
        found = tuple(
            sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if found != (APPLICATION_ID, FORMAT):
            version = f"has format {found[1]}" if found[0] == APPLICATION_ID else "is another kind of file"
            raise LedgerError(
                f"the ledger {self.path} {version}; this version of fedface reads ledgers of format {FORMAT} alone. "
                "Use the version that wrote it, or treat these photos as spent"
            )
        columns = ", ".join(Record._fields)
        records = [Record(*row) for row in sql.execute(f"SELECT {columns} FROM records ORDER BY number")]
        parent = GENESIS
        for place, (number, written, kind, entry, content, digest) in enumerate(records, 1):
            if number != place or digest != Record.digest_of(number, written, kind, entry, content, parent):
                raise LedgerError(f"the ledger {self.path} was altered: record {place} does not add up")
            parent = digest
        last = sql.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        if (last[0] if last else 0) != len(records):
            raise LedgerError(f"the ledger {self.path} has lost records; {len(records)} remain")
        self._records = records
        self._digests = {GENESIS, *(record.digest for record in records)}
        self._data_version = sql.execute("PRAGMA data_version").fetchone()[0]

    def _compare(self, place: Path) -> None:
        """Check that the chain contains what a head file names."""
        head = Head.of_file(place)
        if head is None:
            if self._records:
                raise LedgerError(f"the ledger {self.path} has lost {place.name}; restore both files")
        elif head.digest not in self._digests:
            raise LedgerError(
                f"the ledger {self.path} was rolled back or replaced: it lacks what {place} remembers of it. "
                "Restore the newest copy, or treat these photos as spent"
            )

    def _write_heads(self) -> None:
        """Store the head beside the file and at the witness, so that an older copy of the file is detected.

        Written after the record is on disk: a crash between leaves an older head, which the chain contains; a head
        that the chain lacks can only mean that the chain was rolled back.
        """
        with self._locked() as sql:  # holds the lock, so that the newest head is the one that stays
            self._verify(sql)
            head, witness = self._head(), self._witness_path()
            for place in (witness, self._head_path):
                if place is not None and Head.of_file(place) != head:
                    head.write(place)

    def _head(self) -> Head:
        witness = self._witness_path()
        return Head(
            digest=self._records[-1].digest if self._records else GENESIS,
            witness=None if witness is None else str(witness.parent),
        )


def _is_full(error: sqlite3.Error | OSError) -> bool:
    """Whether a write failed for lack of space, on the disk of the chain or of its witness."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, for their owner alone, on disk when this returns."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True, mode=0o700)
        sync_folder(place.parent)
