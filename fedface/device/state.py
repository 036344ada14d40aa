"""What a device keeps, where, and whether it adds up; looking at a ledger or a journal never begins one.

Called by `fedface ledger` and `fedface device`, and by leaving.py. A device that works opens its books itself
(device/client.py), and begins them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fedface.config import read
from fedface.device.client import Device
from fedface.device.config import DeviceConfig, registered_indexes
from fedface.errors import ConfigError, FederationError, LedgerError
from fedface.messages.messages import metrics_ledger_key
from fedface.photos.device_dataset import DeviceDataset
from fedface.photos.photo_index import default_cache
from fedface.privacy import ledger, transmission_log
from fedface.privacy.hash_chain import ChainSchema, Head
from fedface.privacy.ledger import Entry, Ledger
from fedface.privacy.spending import line_record, payments, price_of
from fedface.privacy.transmission_log import Transmission, TransmissionLog, Withdrawal
from fedface.privacy_units import Unit

Store = TypeVar("Store", Ledger, TransmissionLog)
Line = TypeVar("Line")

MIN_SQLITE_BYTES = (
    512  # bytes of an SQLite file; it takes a smaller one for empty, and would begin a book over it
)


@dataclass(frozen=True, kw_only=True)
class ChainFiles:
    """The files of one chained book, and whether they are there."""

    form: ChainSchema
    path: Path
    witness: Path | None  # the folder that its owner names or, failing that, its head

    @staticmethod
    def at(path: Path, form: ChainSchema, witness: Path | None) -> ChainFiles:
        """The book at a path; reads its head alone."""
        if witness is None:
            try:
                head = Head.of_file(_head_of(path))
            except LedgerError:  # whoever looks is told; whoever erases need not be
                head = None
            witness = None if head is None or head.witness is None else Path(head.witness)
        return ChainFiles(form=form, path=path, witness=witness)

    @property
    def head(self) -> Path:
        """The file beside it that remembers its newest line."""
        return _head_of(self.path)

    @property
    def seen_by(self) -> Path | None:
        """The file that its witness keeps, if it has one; named as in privacy/hash_chain.py."""
        if self.witness is None:
            return None
        name = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        return self.witness.resolve() / f"{self.form.noun}-{name:.32}.head"

    @property
    def witnessed(self) -> bool:
        """Whether a witness remembers it."""
        return self.seen_by is not None and self.seen_by.exists()

    def digest(self) -> str:
        """Of its newest line, as its head remembers; right after the book was verified, that is the truth."""
        head = Head.of_file(self.head)
        return self.form.genesis if head is None else head.digest

    def open_existing(self, opened: Callable[[Path, Path | None], Store]) -> Store | None:
        """The book, verified; None where there is neither a book nor a trace of a used one.

        Raises:
            LedgerError: It is damaged, was rolled back, or has gone while its head or its witness remembers it.
            ConfigError: There is a file that is no book.
        """
        heads = [head for place in (self.head, self.seen_by) if place and (head := Head.of_file(place))]
        if not self.path.is_file():
            if all(head.digest == self.form.genesis for head in heads):
                return None
        elif self.path.stat().st_size < MIN_SQLITE_BYTES and not heads:
            size = self.path.stat().st_size
            raise ConfigError(f"{self.path}: no {self.form.noun} here, only {size} bytes")
        # Named to a book that has no witness yet, a folder would become one: that is no part of looking.
        named = self.witnessed or any(head.witness for head in heads)
        return opened(self.path, self.witness if named else None)


def _head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What one device keeps; made without making, opening or scanning anything."""

    device: Device  # to be asked for its files and its policy, not for photos
    photos: Path  # the folder of photos, which may have gone
    ledger: ChainFiles
    journal: ChainFiles

    @property
    def index(self) -> Path:
        """What scans found in the photos: dates, places, faces' positions."""
        return default_cache(self.photos)

    @property
    def indexes(self) -> list[Path]:
        """That index, and those of the folders where this device's photos lay before they were moved."""
        return list(dict.fromkeys([self.index, *registered_indexes(self.device.state)]))

    def entries(self) -> list[Entry]:
        """The whole ledger, verified; empty where there is none."""
        read = entries_of(self.ledger)
        return [] if read is None else read[0]

    def transmissions(self) -> list[Transmission | Withdrawal] | None:
        """The whole journal, verified; None where there is none."""
        read = transmissions_of(self.journal)
        return None if read is None else read[0]

    def runs(self) -> list[str]:
        """Every run that ever asked, as far as ledger and journal know, by name."""
        suffix = metrics_ledger_key("")
        booked = {entry.run.removesuffix(suffix) for entry in self.entries()}
        return sorted(booked | {line.run for line in self.transmissions() or ()})


def device_state(path: Path) -> DeviceState:
    """What the device of an owner's file keeps. Raises ConfigError if the file cannot be read."""
    config = read(path, DeviceConfig)
    home = path.resolve().parent
    device = Device(
        name=config.name,
        photos=_unread,
        policy=config.policy,
        state=home / config.state.expanduser(),
        server=config.server,
        witness=home / config.witness.expanduser() if config.witness else None,
    )
    return state_of_device(device, home / config.photos.expanduser())


def state_of_device(device: Device, photos: Path) -> DeviceState:
    """What a device keeps whose photos lie in this folder."""
    return DeviceState(
        device=device,
        photos=photos,
        ledger=ChainFiles.at(device.ledger_path, ledger.FORM, device.witness),
        journal=ChainFiles.at(device.journal_path, transmission_log.FORM, device.witness),
    )


def _unread(size: int) -> DeviceDataset:
    raise FederationError("who looks at a device's books does not read its photos")


def entries_of(kept: ChainFiles) -> tuple[list[Entry], str] | None:
    """A ledger's entries and its head's digest, verified; None where there is none."""
    return _steady(
        kept, lambda: None if (book := kept.open_existing(Ledger.open)) is None else book.entries()
    )


def transmissions_of(kept: ChainFiles) -> tuple[list[Transmission | Withdrawal], str] | None:
    """A journal's lines and its head's digest, verified; None where there is none."""
    return _steady(
        kept, lambda: None if (book := kept.open_existing(TransmissionLog.open)) is None else book.records()
    )


def _steady(kept: ChainFiles, read_all: Callable[[], list[Line] | None]) -> tuple[list[Line], str] | None:
    """Lines and head of one moment, while a device may be writing; verified, so that the head is the truth."""
    while True:
        before = kept.digest()
        lines = read_all()
        if lines is None:
            return None
        if kept.digest() == before:
            return lines, before


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One book that adds up."""

    noun: str
    path: Path
    count: int  # of its lines
    head: str  # digest of the newest line
    witness: Path | None  # the file elsewhere that agrees; None: none was begun


@dataclass(frozen=True, kw_only=True)
class VerifiedState:
    """A ledger and the journal beside it, verified, each alone and against each other."""

    entries: list[Entry]
    lines: list[Transmission | Withdrawal] | None  # None: there is no journal
    verified: tuple[Verified, ...]  # the ledger, then the journal if there is one


def verify(ledger: ChainFiles, journal: ChainFiles) -> VerifiedState:
    """Check a ledger, the journal beside it, and that each payload was paid for; no journal is no error.

    Raises:
        ConfigError: There is no ledger.
        LedgerError: One is damaged, or they contradict each other.
    """
    # The journal first: what it names is in the ledger before it is in the journal.
    left, paid = transmissions_of(journal), entries_of(ledger)
    if paid is None:
        raise ConfigError(f"{ledger.path}: no ledger here; nothing was booked yet")
    payments([] if left is None else left[0], paid[0])
    verified = [_verified(ledger, len(paid[0]), paid[1])]
    if left is not None:
        verified.append(_verified(journal, len(left[0]), left[1]))
    return VerifiedState(entries=paid[0], lines=None if left is None else left[0], verified=tuple(verified))


def _verified(kept: ChainFiles, count: int, head: str) -> Verified:
    witness = kept.seen_by if kept.witnessed else None
    return Verified(noun=kept.form.noun, path=kept.path, count=count, head=head, witness=witness)


def export(books: VerifiedState, *, delta: float, unit: Unit, now: datetime) -> str:
    """Ledger and journal as JSON text, with their heads and what everything costs together."""
    heads = {book.noun: book.head for book in books.verified}
    lines = None if books.lines is None else [line_record(line) for line in books.lines]
    told: dict[str, Any] = {
        "made": now.isoformat(timespec="seconds"),
        "entries": [asdict(entry) for entry in books.entries],  # as they are chained
        "decoded": [
            {"number": entry.number, "event": json.loads(entry.event), "metadata": json.loads(entry.metadata)}
            for entry in books.entries
        ],
        "head": heads["ledger"],
        "spent": price_of(books.entries, delta=delta, unit=unit).to_record(),
        "journal": None if lines is None else {"lines": lines, "head": heads["journal"]},
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def write_alone(path: Path, text: str) -> None:
    """Write a new file that its owner alone can read; on disk when this returns.

    Raises:
        ConfigError: There is a file already.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: is there already, and is not overwritten; name another file") from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
