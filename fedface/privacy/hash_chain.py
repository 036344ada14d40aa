"""An append-only, hash-chained table on disk, whose head is remembered beside it and, if wanted, far from it.

Called from privacy/ledger.py (what was paid) and privacy/transmission_log.py (what left). Each line holds the digest of
the line before; the newest digest, the head, is written beside the file after each line, and once more into the
folder of a witness: another disk, or the home's own state folder. Every reading checks the chain and all heads.

Noticed: a line changed, removed, added past us or put elsewhere; the file emptied, gone, or put back from a copy
while its head stays. With a witness also: file and head put back together, the whole folder put back or gone,
and a copy of the folder at another place (a witness knows its chain by its path).
Not noticed: file and head put back together, if there is no witness; file, head and witness all put back to one
moment; file and head put back to before the witness was begun, if the witness is gone as well. The digests have
no key: whoever may write file, head and witness can also write a history that never was.

Source: SQLite with a rollback journal and synchronous=EXTRA (https://sqlite.org/pragma.html); chained entries:
Schneier and Kelsey (1999), Secure audit logs to support computer forensics.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedface.atomic_io import sync_folder
from fedface.errors import LedgerError

LOCK_TIMEOUT = 60.0  # seconds to wait for another process that is writing

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The owner's own clock."""
    return datetime.now(UTC)


def in_utc(time: datetime) -> datetime:
    """The same moment in UTC; refuses a time without a zone."""
    if time.tzinfo is None:
        raise ValueError(f"a time must know its zone, got {time.isoformat()}")
    return time.astimezone(UTC)


@dataclass(frozen=True, kw_only=True)
class ChainSchema:
    """What a chain is called, and what its lines say."""

    noun: str  # in errors: "ledger"
    table: str  # the table of its lines
    columns: tuple[str, ...]  # SQL definitions of what a line says, between its time and its parent
    rules: tuple[str, ...] = ()  # further SQL constraints on a line
    beside: tuple[str, ...] = ()  # SQL of tables that are kept in the same file, unchained
    counter_sql: str = "SELECT 0"  # SQL: a whole number that never falls while those tables are used rightly

    @property
    def genesis(self) -> str:
        """The parent of the first line."""
        return hashlib.sha256(f"fedface {self.noun} 1".encode()).hexdigest()

    def schema(self) -> list[str]:
        """The statements that begin a file."""
        table = self.table
        columns = (
            "number INTEGER PRIMARY KEY AUTOINCREMENT", "written TEXT NOT NULL", *self.columns,
            "parent TEXT NOT NULL", "digest TEXT NOT NULL UNIQUE", *self.rules,
        )  # fmt: skip
        stop = "BEGIN SELECT RAISE(ABORT, 'append only'); END"
        return [
            f"CREATE TABLE {table} ({', '.join(columns)})",
            f"CREATE TRIGGER {table}_stay BEFORE UPDATE ON {table} {stop}",
            f"CREATE TRIGGER {table}_remain BEFORE DELETE ON {table} {stop}",
            *self.beside,
        ]


@dataclass(frozen=True)
class Record:
    """One line of a chain."""

    number: int  # 1, 2, 3, ...
    written: str  # UTC, ISO 8601; never before the line above
    values: tuple[str | int, ...]  # what the chain's form has columns for
    parent: str  # digest of the line before
    digest: str  # SHA-256 of all of the above

    @staticmethod
    def chained(number: int, written: str, said: tuple[str | int, ...], parent: str) -> Record:
        """A line whose digest is computed from what it says."""
        text = json.dumps([number, written, *said, parent], separators=(",", ":"))
        return Record(number, written, said, parent, hashlib.sha256(text.encode()).hexdigest())

    @property
    def time(self) -> datetime:
        """When it was written."""
        try:
            return in_utc(datetime.fromisoformat(self.written))
        except ValueError as error:
            raise LedgerError(f"line {self.number} has no date: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a chain's head file or its witness remembers: one line, and a second since there are witnesses."""

    digest: str  # of the newest line
    counter: int = 0  # see Form.grows
    witness: str | None = None  # the folder of the witness, once one was begun

    def to_text(self) -> str:
        """The file's content."""
        return f"{self.digest}\n{json.dumps({'grown': self.counter, 'witness': self.witness})}\n"

    @staticmethod
    def of_file(path: Path) -> Head | None:
        """What a file remembers; None if there is no file.

        Raises:
            LedgerError: The file is empty, torn or no head at all.
        """
        if not path.exists():
            return None
        first, _, second = path.read_text(encoding="ascii", errors="replace").strip().partition("\n")
        try:
            more = json.loads(second) if second else {}
            head = Head(digest=first, counter=more.get("grown", 0), witness=more.get("witness"))
        except (ValueError, AttributeError) as error:
            raise LedgerError(f"{path} is damaged; restore it from a backup") from error
        if not (
            re.fullmatch("[0-9a-f]{64}", head.digest)
            and isinstance(head.counter, int)
            and isinstance(head.witness, str | None)
        ):
            raise LedgerError(f"{path} is damaged: it holds no digest; restore it from a backup")
        return head

    def write(self, path: Path) -> None:
        """Replace a file in one step; it and its name are on disk when this returns."""
        draft = path.with_name(f"{path.name}.draft")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(self.to_text())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)


class Transaction:
    """A chain while it is locked: its verified lines, and room for the next."""

    def __init__(self, form: ChainSchema, sql: sqlite3.Connection, lines: list[Record], now: Clock) -> None:
        self.sql = sql  # for the tables beside the chain
        self.lines = lines  # oldest first
        self._form = form
        self._now = now

    def append(self, *said: str | int) -> Record:
        """Add a line, dated now, or as the line above if the clock was put back since."""
        written = in_utc(self._now()).replace(microsecond=0)
        parent = self._form.genesis
        if self.lines:
            written, parent = max(written, self.lines[-1].time), self.lines[-1].digest
        line = Record.chained(len(self.lines) + 1, written.isoformat(timespec="seconds"), said, parent)
        row = (line.number, line.written, *line.values, line.parent, line.digest)
        self.sql.execute(f"INSERT INTO {self._form.table} VALUES ({', '.join('?' * len(row))})", row)
        self.lines.append(line)
        return line


class Chain:
    """One such table. Safe to use from several threads and processes at once; fails closed."""

    def __init__(self, path: Path, form: ChainSchema, witness: Path | None, now: Clock) -> None:
        self.path = path
        self._form = form
        self._head_path = path.with_name(path.name + ".head")
        self._witness = None if witness is None else witness.resolve()
        self._now = now

    @staticmethod
    def open(path: Path, form: ChainSchema, *, witness: Path | None = None, now: Clock = utc_now) -> Chain:
        """Open the chain at `path`, or begin one where there is neither a chain nor a trace of one.

        Once a witness was begun, the head names its folder, and the chain is not used without it, whoever opens
        it: named anew or not, it must be there and agree. It is begun only where the head names none yet. To
        move a witness, copy its file; to give one up, remove the second line of the head.

        Args:
            path: The file; it and its head become readable by their owner alone, as does a folder made for them.
            form: What its lines say.
            witness: A folder outside the chain's own, which several chains may share; None for the one that the
                head names, if it names one.
            now: The clock.

        Raises:
            LedgerError: The chain is damaged, was rolled back or replaced, or is missing while a head remains;
                its witness is missing; or the witness would lie in the chain's own folder.
        """
        chain = Chain(path, form, witness, now)
        if chain._witness is not None and chain._witness.is_relative_to(path.resolve().parent):
            raise LedgerError(
                f"a witness in {witness} would go back together with {path}; name another folder"
            )
        try:
            chain._begin()
        except OSError as error:
            raise LedgerError(f"cannot open the {form.noun} {path}: {error}") from error
        return chain

    @contextmanager
    def read_transaction(self) -> Iterator[Transaction]:
        """The verified chain, locked until the block ends."""
        with self._transaction() as sql:
            yield Transaction(self._form, sql, self._read(sql), self._now)

    @contextmanager
    def write_transaction(self) -> Iterator[Transaction]:
        """The same, to be written; on disk with its heads once the block has ended without an exception."""
        with self.read_transaction() as page:
            yield page
        self._remember()

    def _begin(self) -> None:
        witness = self._witness_path()
        places = [self._head_path] if witness is None else [self._head_path, witness]
        heads = {place: head for place in places if (head := Head.of_file(place)) is not None}
        what = f"the {self._form.noun} {self.path}"
        used = [place for place, head in heads.items() if head.digest != self._form.genesis]
        if not self.path.exists() and used:
            names = " and ".join(str(place) for place in used)
            raise LedgerError(
                f"{what} has gone but {names} remembers it; restore it, or treat these photos as spent"
            )
        _make_folder(self.path.parent)
        with self._transaction("rwc") as sql:
            os.chmod(self.path, 0o600)  # never open the file here: closing it would drop other threads' locks
            if sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                if used:
                    raise LedgerError(f"{what} was emptied; restore it from a backup")
                for statement in self._form.schema():
                    sql.execute(statement)
        if self._witness is not None and witness is not None:
            self._begin_witness(witness)
        self._remember()

    def _begin_witness(self, witness: Path) -> None:
        with self._transaction() as sql:
            if witness.exists():
                return
            lines = self._lines(sql)
            self._compare(sql, lines, self._head_path)
            before = Head.of_file(self._head_path)
            if before is not None and before.witness is not None:
                raise LedgerError(self._no_witness(witness, before.witness))
            _make_folder(witness.parent)
            self._head_of(sql, lines).write(witness)

    def _no_witness(self, missing: Path, named: str) -> str:
        return (
            f"the {self._form.noun} {self.path} has a witness in {named}, but {missing} is missing. Connect its "
            "disk, or restore the file from where it was. If it is lost for good, see first that no booking is "
            f"missing, then remove the second line of {self._head_path} and name a witness anew"
        )

    def _witness_path(self) -> Path | None:
        """The file of this chain's witness, as named by whoever opened it, otherwise by the head."""
        folder = self._witness
        if folder is None:
            head = Head.of_file(self._head_path)
            if head is None or head.witness is None:
                return None
            folder = Path(head.witness)
        name = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        return folder / f"{self._form.noun}-{name:.32}.head"

    @contextmanager
    def _transaction(self, mode: Literal["rw", "rwc"] = "rw") -> Iterator[sqlite3.Connection]:
        """One writer at a time; committed and on disk when the block ends without an exception."""
        what = f"the {self._form.noun} {self.path}"
        try:
            sql = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=LOCK_TIMEOUT,
                isolation_level=None,
            )
        except sqlite3.Error as error:
            raise LedgerError(f"cannot open {what}: {error}") from error
        try:
            sql.execute("PRAGMA journal_mode = DELETE")
            sql.execute("PRAGMA synchronous = EXTRA")
            sql.execute("PRAGMA fullfsync = 1")
            sql.execute("PRAGMA secure_delete = 1")  # a reply that is dropped is overwritten
            sql.execute("BEGIN IMMEDIATE")
            try:
                yield sql
            except BaseException:
                if sql.in_transaction:
                    sql.execute("ROLLBACK")
                raise
            sql.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"{what} is damaged or locked: {error}") from error
        finally:
            sql.close()

    def _remember(self) -> None:
        """Keep the head beside the file and at the witness, so that an older copy of the file is noticed.

        Written after the line is on disk: a crash between leaves an older head, which the chain contains; a head
        that the chain lacks can only mean that the chain was put back.
        """
        with self._transaction() as sql:  # holds the lock, so that the newest head is the one that stays
            lines = self._read(sql)
            head, witness = self._head_of(sql, lines), self._witness_path()
            if witness is not None:
                head.write(witness)
            head.write(self._head_path)

    def _head_of(self, sql: sqlite3.Connection, lines: list[Record]) -> Head:
        witness = self._witness_path()
        return Head(
            digest=lines[-1].digest if lines else self._form.genesis,
            counter=self._grown(sql),
            witness=None if witness is None else str(witness.parent),
        )

    def _grown(self, sql: sqlite3.Connection) -> int:
        return int(sql.execute(self._form.counter_sql).fetchone()[0])

    def _read(self, sql: sqlite3.Connection) -> list[Record]:
        """All lines, checked against each other and against every head."""
        lines = self._lines(sql)
        self._compare(sql, lines, self._head_path)
        witness = self._witness_path()
        if witness is not None:
            if not witness.exists():
                raise LedgerError(self._no_witness(witness, str(witness.parent)))
            self._compare(sql, lines, witness)
        return lines

    def _lines(self, sql: sqlite3.Connection) -> list[Record]:
        """All lines, oldest first, each checked against its own digest and its parent's."""
        what, table = f"the {self._form.noun} {self.path}", self._form.table
        columns = ", ".join(column.split()[0] for column in self._form.columns)
        rows = sql.execute(f"SELECT number, written, {columns}, parent, digest FROM {table} ORDER BY number")
        lines, parent = [], self._form.genesis
        for position, (number, written, *said, before, digest) in enumerate(rows, start=1):
            try:
                line = Record.chained(number, written, tuple(said), before)
            except TypeError as error:  # a blob
                raise LedgerError(f"{what} was altered: entry {position} holds no text") from error
            if line.digest != digest or before != parent or number != position:
                raise LedgerError(f"{what} was altered: entry {position} does not add up")
            lines.append(line)
            parent = digest
        last = sql.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
        if (last[0] if last else 0) != len(lines):
            raise LedgerError(f"{what} has lost entries; {len(lines)} remain")
        return lines

    def _compare(self, sql: sqlite3.Connection, lines: list[Record], place: Path) -> None:
        """Check that the chain holds what a head file knows of it."""
        what, head = f"the {self._form.noun} {self.path}", Head.of_file(place)
        if head is None:
            if lines:
                raise LedgerError(f"{what} has lost {place.name}; restore both files")
            return
        known = {self._form.genesis, *(line.digest for line in lines)}
        if head.digest not in known or head.counter > self._grown(sql):
            raise LedgerError(
                f"{what} was rolled back or replaced: it lacks what {place} remembers of it. "
                "Restore the newest copy, or treat these photos as spent"
            )


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, for their owner alone, on disk when this returns."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True, mode=0o700)
        sync_folder(place.parent)
