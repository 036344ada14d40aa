"""What a device stores, where, and whether it is intact; reading never creates a ledger.

A device that works opens, and creates, its ledger itself (device/client.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedface.config import read
from fedface.device.client import Device
from fedface.device.config import DeviceConfig, registered_indexes
from fedface.errors import ConfigError, FederationError, LedgerError
from fedface.messages.messages import metrics_ledger_key
from fedface.photos.device_dataset import DeviceDataset
from fedface.photos.photo_index import default_cache
from fedface.privacy.hash_chain import FORMAT, GENESIS, Head, head_path, witness_path
from fedface.privacy.ledger import Ledger, LedgerSnapshot
from fedface.privacy.spending import price_of
from fedface.privacy_units import Unit

MIN_SQLITE_BYTES = 512  # SQLite takes a smaller file for empty, and would create a ledger over it


@dataclass(frozen=True, kw_only=True)
class LedgerFiles:
    """The files of one ledger, and whether they are there."""

    path: Path
    witness: Path | None  # the folder that its owner names or, failing that, its head

    @staticmethod
    def at(path: Path, witness: Path | None = None) -> LedgerFiles:
        """The ledger at a path; reads its head alone."""
        if witness is None:
            try:
                head = Head.of_file(head_path(path))
            except LedgerError:  # an error for whoever reads the ledger, none for whoever erases it
                head = None
            witness = None if head is None or head.witness is None else Path(head.witness)
        return LedgerFiles(path=path, witness=witness)

    @property
    def head(self) -> Path:
        """The file beside it that stores the digest of its newest record."""
        return head_path(self.path)

    @property
    def witness_file(self) -> Path | None:
        """The file that its witness stores, if it has one."""
        return None if self.witness is None else witness_path(self.path, self.witness)

    @property
    def witnessed(self) -> bool:
        """Whether the witness's file is there."""
        return self.witness_file is not None and self.witness_file.exists()

    def open_existing(self) -> Ledger | None:
        """A session, verified; None where there is neither a ledger nor a trace of a used one.

        Raises:
            LedgerError: It is damaged, was rolled back, or has gone while its head or its witness remembers it.
            ConfigError: There is a file that is no ledger.
        """
        heads = [head for place in (self.head, self.witness_file) if place and (head := Head.of_file(place))]
        if not self.path.is_file():
            if all(head.digest == GENESIS for head in heads):
                return None
        elif self.path.stat().st_size < MIN_SQLITE_BYTES and not heads:
            raise ConfigError(f"{self.path}: no ledger here, only {self.path.stat().st_size} bytes")
        # A ledger without a witness would begin one in a folder that is named to it; reading must not do that.
        named = self.witnessed or any(head.witness for head in heads)
        return Ledger.open(self.path, self.witness if named else None)

    def read(self) -> LedgerSnapshot:
        """Everything, verified; an empty snapshot where there is no ledger. Raises as `open_existing`."""
        ledger = self.open_existing()
        if ledger is None:
            return LedgerSnapshot()
        with ledger:
            return ledger.read()

    def verify(self) -> LedgerSnapshot:
        """Everything, verified.

        Raises:
            ConfigError: There is no ledger.
            LedgerError: It is damaged, was rolled back, or has gone.
        """
        snapshot = self.read()
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no ledger here; nothing was booked yet")
        return snapshot


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What one device stores; constructing it creates, opens and scans nothing."""

    device: Device  # to be asked for its files and its policy, not for photos
    photos: Path  # the folder of photos, which may have gone
    ledger: LedgerFiles

    @property
    def index(self) -> Path:
        """What scans found in the photos: dates, places, faces' positions."""
        return default_cache(self.photos)

    @property
    def indexes(self) -> list[Path]:
        """That index, and those of the folders where this device's photos lay before they were moved."""
        return list(dict.fromkeys([self.index, *registered_indexes(self.device.state)]))


def known_runs(snapshot: LedgerSnapshot) -> list[str]:
    """Every run that ever asked, by name."""
    suffix = metrics_ledger_key("")
    booked = {entry.run.removesuffix(suffix) for entry in snapshot.entries}
    return sorted(booked | {record.run for record in snapshot.log})


def device_state(path: Path) -> DeviceState:
    """What the device of an owner's file stores. Raises ConfigError if the file cannot be read."""
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
    """What a device stores whose photos lie in this folder."""
    return DeviceState(
        device=device, photos=photos, ledger=LedgerFiles.at(device.ledger_path, device.witness)
    )


def _unread(size: int) -> DeviceDataset:
    raise FederationError("whoever reads a device's ledger does not read its photos")


def export(snapshot: LedgerSnapshot, *, delta: float, unit: Unit, now: datetime) -> str:
    """A ledger as JSON text, with its head and what everything costs together."""
    exported = {
        "created": now.isoformat(timespec="seconds"),
        "format": FORMAT,
        "head": snapshot.head,
        "records": snapshot.export(),
        "spent": price_of(snapshot.entries, delta=delta, unit=unit).to_record(),
    }
    return json.dumps(exported, indent=1, ensure_ascii=False) + "\n"


def write_new(path: Path, text: str) -> None:
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
