"""A real device: its owner's file says where the photos and the ledger are, and what is allowed.

Called by flower.py for a node that was started with a device file. Nothing in this file ever comes from the
server, and nothing of it is sent there but the device's chosen name.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedface.config import read
from fedface.errors import ConfigError, LibraryError
from fedface.federation.device import Device
from fedface.photos.detectors import EmbeddedDetector, YuNetDetector
from fedface.photos.library import PhotoLibrary
from fedface.photos.occasions import OccasionRule
from fedface.photos.own import OwnFaces
from fedface.photos.scan import EmptyLibrary, scan_library
from fedface.privacy.policy import DevicePolicy
from fedface.shapes import Images

log = logging.getLogger("fedface.device")


@dataclass(frozen=True, kw_only=True)
class OwnerConfig:
    """A device file, such as clients/device.example.yaml. Relative paths count from the file's own folder."""

    name: str  # the name by which reports list this device; the server sees it
    photos: Path  # folder of the photos; read, never written
    state: Path  # folder of the ledger and the shared key; nobody else may look into it
    policy: DevicePolicy
    detector: Path | None = None  # a YuNet file; without one the embedded detector looks for faces
    occasions: OccasionRule = field(default_factory=OccasionRule)  # which photos count as taken together
    server: str = "the coordinator"  # to whom this device is connected, in the owner's words, for the journal
    witness: Path | None = (
        None  # folder on another disk that remembers the state, so that an old copy is noticed
    )

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= 80 and self.name.isprintable()):
            raise ValueError(f"name must be a text of 1 to 80 printable characters, got {self.name!r:.90}")


def owner_device(path: Path) -> Device:
    """The device that an owner's file describes, read afresh each time, so that a stricter policy holds at once.

    The photos are scanned whenever a round needs them; only what is new or changed since the last scan is
    read. Scan a large folder by hand beforehand (`fedface photos scan`), with the same detector.

    Raises:
        ConfigError: The file cannot be read, there is no folder of photos, or others may look into the state.
    """
    config = read(path, OwnerConfig)
    home = path.resolve().parent
    folder, state = home / config.photos.expanduser(), home / config.state.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{path}: photos: wanted a folder, there is none at {folder}")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and state.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: state: others may look into {state}; run chmod 700 on it")
    detector = home / config.detector.expanduser() if config.detector else None

    def photos(size: int) -> OwnFaces:
        return _faces(folder, detector, config, size)

    return Device(
        name=config.name,
        photos=photos,
        policy=config.policy,
        state=state,
        server=config.server,
        witness=home / config.witness.expanduser() if config.witness else None,
    )


def _faces(folder: Path, detector: Path | None, config: OwnerConfig, size: int) -> OwnFaces:
    """All faces that can be cut out, none if there are none.

    Without a face the answer is noise alone, and a photo that has just gone is left out: a device that failed
    instead would tell the server by it, without noise, that the folder is empty or that a photo changed.
    """
    finder = EmbeddedDetector() if detector is None else YuNetDetector(detector)
    try:
        scan_library(folder, detector=finder)
        library = PhotoLibrary(
            folder, detector=finder.name, folders=config.policy.folders, never=config.policy.never
        )
    except EmptyLibrary as error:
        log.warning("%s; this round is answered with noise alone", error)
        return OwnFaces.strangers(torch.zeros(0, 3, size, size))
    images = [_one_face(library, number, size) for number in range(len(library))]
    whole = [number for number, image in enumerate(images) if image is not None]
    return OwnFaces(
        images=torch.cat([torch.zeros(0, 3, size, size), *(image for image in images if image is not None)]),
        photos=torch.from_numpy(library.photo_labels())[whole],
        occasions=torch.from_numpy(library.occasion_labels(config.occasions))[whole],
    )


def _one_face(library: PhotoLibrary, number: int, size: int) -> Images | None:
    try:
        return library.images(number, size)
    except LibraryError as error:
        log.warning("%s; it is left out of this round", error)
        return None
