"""The files of a device, and whether they are intact; reading never creates a ledger.

A running device opens, and creates, its ledger itself (device/client.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedface.device.config import (
    KEY_FILE,
    LEDGER_FILE,
    DeviceConfig,
    read_device_file,
    registered_indexes,
)
from fedface.errors import ConfigError, LedgerError
from fedface.photos.photo_index import default_cache
from fedface.privacy.hash_chain import FORMAT, GENESIS, Head, head_path, witness_path
from fedface.privacy.ledger import Ledger, LedgerSnapshot
from fedface.privacy.ledger_records import metrics_ledger_key
from fedface.privacy.spending import price_of
from fedface.privacy_units import Unit

MIN_SQLITE_BYTES = 512  # SQLite treats a smaller file as empty and would overwrite it


@dataclass(frozen=True, kw_only=True)
class LedgerFiles:
    """The files of one ledger, and whether they exist."""

    path: Path
    witness: Path | None  # the folder in the device file or, if none, in the ledger's head

    @staticmethod
    def at(path: Path, witness: Path | None = None) -> LedgerFiles:
        """The ledger at a path; only its head is read."""
        if witness is None:
            try:
                head = Head.of_file(head_path(path))
            except LedgerError:  # readers of the ledger report it; erasing must work regardless
                head = None
            witness = None if head is None or head.witness is None else Path(head.witness)
        return LedgerFiles(path=path, witness=witness)

    @property
    def head(self) -> Path:
        """The file with the digest of its newest record."""
        return head_path(self.path)

    @property
    def witness_file(self) -> Path | None:
        """The witness file, if there is a witness."""
        return None if self.witness is None else witness_path(self.path, self.witness)

    @property
    def witnessed(self) -> bool:
        """Whether the witness file exists."""
        return self.witness_file is not None and self.witness_file.exists()

    def open(self) -> Ledger:
        """A verified session; creates the ledger, and its witness, where there is no trace of one."""
        return Ledger.open(self.path, self.witness)

    def open_existing(self) -> Ledger | None:
        """A verified session; None if there is no ledger and no trace of one.

        Raises:
            LedgerError: It is damaged or rolled back, or missing although its head or witness exists.
            ConfigError: The file is not a ledger.
        """
        heads = [head for place in (self.head, self.witness_file) if place and (head := Head.of_file(place))]
        if not self.path.is_file():
            if all(head.digest == GENESIS for head in heads):
                return None
        elif self.path.stat().st_size < MIN_SQLITE_BYTES and not heads:
            raise ConfigError(f"{self.path}: no ledger here, only {self.path.stat().st_size} bytes")
        # Opening with a new witness folder would create a witness; reading must not.
        named = self.witnessed or any(head.witness for head in heads)
        return Ledger.open(self.path, self.witness if named else None)

    def read(self) -> LedgerSnapshot:
        """All records, verified; an empty snapshot if there is no ledger. Raises like `open_existing`."""
        ledger = self.open_existing()
        if ledger is None:
            return LedgerSnapshot()
        with ledger:
            return ledger.read()

    def verify(self) -> LedgerSnapshot:
        """All records, verified.

        Raises:
            ConfigError: There is no ledger.
            LedgerError: It is damaged, rolled back or missing.
        """
        snapshot = self.read()
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no ledger here; nothing was recorded yet")
        return snapshot


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """The files of one device; constructing it creates, opens and scans nothing."""

    config: DeviceConfig  # with absolute paths; its folders may not exist any more
    ledger: LedgerFiles

    @property
    def key_path(self) -> Path:
        """The key of homomorphic sums, if there is one."""
        return self.config.state / KEY_FILE

    @property
    def index(self) -> Path:
        """The photo index: dates, places, face positions, crops."""
        return default_cache(self.config.photos)

    @property
    def indexes(self) -> list[Path]:
        """All indexes, including those of folders where the photos were before they were moved."""
        return list(dict.fromkeys([self.index, *registered_indexes(self.config.state)]))


def known_runs(snapshot: LedgerSnapshot) -> list[str]:
    """The names of all runs that sent a task."""
    suffix = metrics_ledger_key("")
    recorded = {entry.run.removesuffix(suffix) for entry in snapshot.entries}
    return sorted(recorded | {record.run for record in snapshot.log})


def device_state(path: Path) -> DeviceState:
    """The state of the device in an owner's file. Raises ConfigError if the file cannot be read."""
    config = read_device_file(path)
    return DeviceState(config=config, ledger=LedgerFiles.at(config.state / LEDGER_FILE, config.witness))


def export(snapshot: LedgerSnapshot, *, delta: float, unit: Unit, now: datetime) -> str:
    """A ledger as JSON text, with its head and its total cost."""
    exported = {
        "created": now.isoformat(timespec="seconds"),
        "format": FORMAT,
        "head": snapshot.head,
        "records": snapshot.export(),
        "spent": price_of(snapshot.charges, delta=delta, unit=unit).to_record(),
    }
    return json.dumps(exported, indent=1) + "\n"
