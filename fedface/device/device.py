"""A device's configuration. Importing it loads none of the code that trains, encrypts or evaluates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.ledger import Ledger
from fedface.privacy.policy import DevicePolicy


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's configuration; photos are read when a round needs them, not before."""

    name: str  # the public name in logs and reports
    photos: Callable[[int], DeviceDataset]  # size in pixels -> all aligned faces with their privacy units
    policy: DevicePolicy
    state: Path  # folder of the ledger and the shared key, readable by the owner alone
    # Raises ConditionsNotMet while photos cannot be read; called before a release is recorded.
    ready: Callable[[], None] = lambda: None
    server: str = "the coordinator"  # the receiver of replies, as the owner calls it
    witness: Path | None = None  # folder elsewhere that stores the head of the ledger
    answer_seconds: float = 0.0  # replies leave at multiples of this time; 0, for simulated devices: at once

    @property
    def ledger_path(self) -> Path:
        """The record of privacy losses, transmissions and withdrawals for all runs."""
        return self.state / "ledger.sqlite"

    @property
    def key_path(self) -> Path:
        """The key that the devices of a run share and the server does not have."""
        return self.state / "sum.key"

    def ledger(self) -> Ledger:
        """A verified session on the ledger. Raises LedgerError."""
        return Ledger.open(self.ledger_path, witness=self.witness)
