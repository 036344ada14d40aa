"""A device that works on tasks. Importing it loads none of the code that trains, encrypts or evaluates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.atomic_io import create_bytes
from fedface.device.config import (
    KEY_FILE,
    LEDGER_FILE,
    PAUSED_FILE,
    PLANS_FOLDER,
    SIGNING_KEY_FILE,
    DeviceConfig,
    check_state_folder,
    missing_policy_folders,
    read_device_config,
    register_index,
)
from fedface.errors import AggregationError, LibraryError
from fedface.messages.run_plan import AdmittedPlans
from fedface.photos.detectors import EmbeddedDetector, YuNetDetector
from fedface.photos.device_dataset import DeviceDataset
from fedface.photos.library import PhotoLibrary
from fedface.photos.photo_index import PhotoIndex, default_cache
from fedface.photos.scan import EmptyLibrary, scan_library
from fedface.photos.training_crops import PhotoSelection
from fedface.privacy.ledger import Ledger
from fedface.privacy.participation_conditions import ConditionsNotMet
from fedface.privacy.policy import DevicePolicy

log = logging.getLogger("fedface.device")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's settings and files; photos are read when a round needs them, not before."""

    name: str  # the public name in logs and reports
    photos: Callable[[int], DeviceDataset]  # size in pixels -> all aligned faces with their privacy units
    policy: DevicePolicy
    state: Path  # folder of the ledger and the keys, readable by the owner alone
    # Raises ConditionsNotMet while photos cannot be read; called before a release is recorded.
    ready: Callable[[], None] = lambda: None
    server: str = "the coordinator"  # the receiver of replies, as the owner calls it
    witness: Path | None = None  # folder elsewhere that stores the head of the ledger
    answer_seconds: float = 0.0  # replies leave at multiples of this time; 0, for simulated devices: at once
    max_photos: int = 500  # replies take as long as those of a library of this size
    # How long this process has been stopped in all, since the owner's conditions did not hold.
    stopped_seconds: Callable[[], float] = lambda: 0.0
    plans: AdmittedPlans | None = None  # the run plans that it answers; None: all that the policy allows

    @property
    def ledger_path(self) -> Path:
        """The record of privacy losses, transmissions and withdrawals for all runs."""
        return self.state / LEDGER_FILE

    @property
    def key_path(self) -> Path:
        """The key that the devices of a run share and the server does not have."""
        return self.state / KEY_FILE

    def signing_key(self) -> Ed25519PrivateKey:
        """The key with which this device signs its part in masked sums; generated where there is none.

        Raises:
            AggregationError: The file is not such a key.
        """
        path = self.state / SIGNING_KEY_FILE
        if not path.exists():
            create_bytes(path, Ed25519PrivateKey.generate().private_bytes_raw())
        try:
            return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        except ValueError as error:
            raise AggregationError(
                f"{path}: expected a private key of 32 bytes; restore or delete it"
            ) from error

    def check_not_paused(self) -> None:
        """Raise ConditionsNotMet while the owner has paused this device."""
        if (self.state / PAUSED_FILE).exists():
            raise ConditionsNotMet("this device is paused by its owner")

    def ledger(self) -> Ledger:
        """A verified session on the ledger. Raises LedgerError."""
        return Ledger.open(self.ledger_path, witness=self.witness)


def load_device(path: Path) -> Device:
    """The device that an owner's file describes. The file is read for every task, so that a stricter policy applies at
    once.

    Photos are scanned when a round needs them; only new or changed files are read. Scan a large folder beforehand
    (`fedface photos scan`), with the same detector.

    Raises:
        ConfigError: As for `read_device_config`, or there is no state folder: a disk that is not mounted must not begin
            a new ledger.
    """
    config = read_device_config(path)
    folder, state = config.photos, config.state
    for lost in missing_policy_folders(config.policy, folder):
        log.warning("%s: policy.%s", path, lost.describe())
    check_state_folder(path, state)
    index = PhotoIndex(default_cache(folder))

    def ready() -> None:
        if index.is_busy():
            raise ConditionsNotMet(
                f"the photos in {folder} are being scanned; a round now would cost epsilon and use none of them"
            )

    def photos(size: int) -> DeviceDataset:
        register_index(state, index.path)
        return _faces(config, size)

    return Device(
        name=config.name,
        photos=photos,
        ready=ready,
        policy=config.policy,
        state=state,
        server=config.server,
        witness=config.witness,
        answer_seconds=config.answer_seconds,
        max_photos=config.max_photos,
        plans=admitted_plans(config),
    )


def admitted_plans(config: DeviceConfig) -> AdmittedPlans | None:
    """The run plans that the owner has admitted; None: every plan."""
    if config.operator is None:
        return None
    return AdmittedPlans(folder=config.state / PLANS_FOLDER, operator=bytes.fromhex(config.operator))


def _faces(config: DeviceConfig, size: int) -> DeviceDataset:
    """All face crops of the photos; empty if there are none.

    Without a face the reply is noise alone, and a photo that was just deleted is left out. An error instead would
    reveal to the server, without noise, that the folder is empty or that a photo changed.
    """
    finder = EmbeddedDetector() if config.detector is None else YuNetDetector(config.detector)
    policy = config.policy
    selection = PhotoSelection(folders=tuple(policy.folders), exclude_folders=tuple(policy.exclude_folders))
    try:
        scan_library(config.photos, detector=finder, crop_size=size, selection=selection)
        library = PhotoLibrary(config.photos, detector=finder.name, selection=selection)
    except EmptyLibrary as error:
        log.warning("%s; the reply to this round is noise alone", error)
        return DeviceDataset.independent(torch.zeros(0, 3, size, size))
    if len(library) > config.max_photos:  # nothing may depend on the number, except the work
        log.warning(
            "%d photos with a face are more than max_photos (%d): a reply that takes longer shows that; "
            "raise it in the device file",
            len(library),
            config.max_photos,
        )
    images = torch.empty((len(library), 3, size, size), dtype=torch.uint8)
    usable = []
    for number, crop in enumerate(library.crops(size)):
        if isinstance(crop, LibraryError):
            log.warning("%s; skipped in this round", crop)
        else:
            images[number] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            usable.append(number)
    return DeviceDataset(
        images=images if len(usable) == len(library) else images[usable],
        photos=torch.from_numpy(library.photo_labels())[usable],
        occasions=torch.from_numpy(library.occasion_labels(config.occasions))[usable],
    )
