"""A real device: its owner's file says where the photos and the ledger are, and what is allowed.

Nothing in this file ever comes from the server, and nothing of it is sent there but the device's chosen name.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedface.atomic_io import replace_text
from fedface.config import keys_of, read
from fedface.device.client import Device
from fedface.errors import ConfigError, LibraryError
from fedface.photos.detectors import EmbeddedDetector, YuNetDetector
from fedface.photos.device_dataset import DeviceDataset
from fedface.photos.library import PhotoLibrary
from fedface.photos.occasions import OccasionRule
from fedface.photos.photo_index import PhotoIndex, default_cache
from fedface.photos.scan import EmptyLibrary, scan_library
from fedface.photos.training_crops import PhotoSelection
from fedface.privacy.participation_conditions import ConditionsNotMet
from fedface.privacy.policy import DevicePolicy

log = logging.getLogger("fedface.device")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """A device file, such as clients/device.example.yaml. Relative paths count from the file's own folder."""

    name: str  # the name by which reports list this device; the server sees it
    photos: Path  # folder of the photos; read, never written
    state: Path  # folder of the ledger and the shared key; nobody else may look into it
    policy: DevicePolicy
    detector: Path | None = None  # a YuNet file; without one the embedded detector looks for faces
    occasions: OccasionRule = field(default_factory=OccasionRule)  # which photos count as taken together
    server: str = "the coordinator"  # to whom this device is connected, in the owner's words, for the ledger
    witness: Path | None = (
        None  # folder on another disk that remembers the state, so that an old copy is noticed
    )

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= 80 and self.name.isprintable()):
            raise ValueError(f"name must be a text of 1 to 80 printable characters, got {self.name!r:.90}")


def load_device(path: Path) -> Device:
    """The device that an owner's file describes, read afresh each time, so that a stricter policy holds at once.

    The photos are scanned whenever a round needs them; only what is new or changed since the last scan is
    read. Scan a large folder by hand beforehand (`fedface photos scan`), with the same detector.

    Raises:
        ConfigError: As for `read_device_config`.
    """
    config = read_device_config(path)
    home = path.resolve().parent
    folder, state = home / config.photos.expanduser(), home / config.state.expanduser()
    for lost in missing_policy_folders(config.policy, folder):
        log.warning("%s: policy.%s", path, lost.describe())
    if not state.exists():
        log.warning(
            "%s: a new state folder is made at %s; what these photos have spent before, if this file or its folder "
            "was moved, is not known there",
            path,
            state,
        )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    detector = home / config.detector.expanduser() if config.detector else None

    index = PhotoIndex(default_cache(folder))

    def ready() -> None:
        if index.is_busy():
            raise ConditionsNotMet(
                f"the photos in {folder} are being scanned; a round would be paid for and see none of them"
            )

    def photos(size: int) -> DeviceDataset:
        register_index(state, index.path)
        return _faces(folder, detector, config, size)

    return Device(
        name=config.name,
        photos=photos,
        ready=ready,
        policy=config.policy,
        state=state,
        server=config.server,
        witness=home / config.witness.expanduser() if config.witness else None,
    )


def read_device_config(path: Path) -> DeviceConfig:
    """What a device file says, if its device can work; nothing is made, and no photo is opened.

    A folder that `exclude_folders` names and that is not there may have been deleted, and excludes nothing. But if a
    folder of nearly that name is there, its photos were hardly meant to be used: then nothing is answered.

    Raises:
        ConfigError: The file cannot be read, there is no folder of photos, others may look into the state, the
            policy's `folders` are none that there are, or it bars a folder whose name seems mistyped.
    """
    config = read(path, DeviceConfig)
    home = path.resolve().parent
    folder, state = home / config.photos.expanduser(), home / config.state.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{path}: photos: wanted a folder, there is none at {folder}")
    if is_accessible_to_others(state):
        raise ConfigError(f"{path}: state: others may look into {state}; run chmod 700 on it")
    lost = missing_policy_folders(config.policy, folder)
    mistyped = next((one for one in lost if one.key == "exclude_folders" and one.near is not None), None)
    only = [one for one in lost if one.key == "folders"]
    if mistyped is not None:
        raise ConfigError(
            f"{path}: policy.{mistyped.describe()} Mend the line, or take it out if that folder has gone"
        )
    if only and len(only) == len(config.policy.folders):
        raise ConfigError(f"{path}: policy.{only[0].describe()} No photo may be used")
    return config


def is_accessible_to_others(place: Path) -> bool:
    """Whether others than its owner may read or write a file or a folder, as far as its mode says."""
    return os.name == "posix" and place.exists() and bool(place.stat().st_mode & 0o077)


@dataclass(frozen=True, kw_only=True)
class MissingFolder:
    """A folder that a policy names and that is not among the photos."""

    key: Literal["folders", "exclude_folders"]
    folder: Path
    photos: Path
    near: Path | None  # the folder that may have been meant

    def describe(self) -> str:
        """`exclude_folders: there is no folder Privat in ...; did you mean Private?`"""
        meant = "." if self.near is None else f"; did you mean {self.near.as_posix()}?"
        return f"{self.key}: there is no folder {self.folder.as_posix()} in {self.photos}{meant}"


def missing_policy_folders(policy: DevicePolicy, photos: Path) -> list[MissingFolder]:
    """The folders that a policy names and that are not there, compared as the library compares them."""
    named: list[tuple[Literal["folders", "exclude_folders"], Path]] = [
        *(("folders", folder) for folder in policy.folders),
        *(("exclude_folders", folder) for folder in policy.exclude_folders),
    ]
    lost = []
    for key, folder in named:
        places = [photos]
        for part in folder.parts:
            inside = [place for above in places for place in _inside(above)]
            places = [place for place in inside if _alike(place.name, part, key)]
            if not places:
                near = _near(part, [place for place in inside if place.is_dir()])
                lost.append(
                    MissingFolder(
                        key=key, folder=folder, photos=photos, near=near and near.relative_to(photos)
                    )
                )
                break
    return lost


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a file, or a folder that cannot be read: nothing in it can be used
        return []


def _alike(name: str, wanted: str, key: str) -> bool:
    """As photos/library.py: accents in either writing; capitals matter in `folders` alone."""
    one, other = (unicodedata.normalize("NFC", word) for word in (name, wanted))
    return one == other if key == "folders" else one.casefold() == other.casefold()


def _near(wanted: str, folders: Sequence[Path]) -> Path | None:
    """The folder whose name is a slip away. Another number is another folder: 2019 is no slip for 2018."""

    def digits(word: str) -> str:
        return "".join(filter(str.isdigit, word))

    names = {folder.name.casefold(): folder for folder in folders if digits(folder.name) == digits(wanted)}
    found = difflib.get_close_matches(wanted.casefold(), names, n=1, cutoff=0.8)
    return names[found[0]] if found else None


INDEX_REGISTRY = "indexes.json"  # in the state folder: where indexes of this device's photos lie
KINDS = {
    "device": ("name", "photos", "state", "policy"),
    "policy": ("max_epsilon", "delta"),
    "experiment": ("question", "promise"),
}  # the keys by which an owner's files, and the recipes that owners look at, are told apart


def check_kind(path: Path, wanted: Literal["device", "policy", "experiment"]) -> None:
    """Return unless a file is plainly of another kind; what else may be wrong with it is said by who reads it.

    Raises:
        ConfigError: It is a file of another kind, or no YAML.
    """
    keys = keys_of(path)
    held = {kind: sum(key in keys for key in own) / len(own) for kind, own in KINDS.items()}
    most = max(held, key=lambda kind: held[kind])
    if most != wanted and held[wanted] < held[most] and held[most] >= 0.5:
        *others, last = KINDS[wanted]
        article = "an" if most == "experiment" else "a"
        other = "an" if wanted == "experiment" else "a"
        raise ConfigError(
            f"{path}: this is {article} {most} file; {other} {wanted} file has {', '.join(others)} and {last}"
        )


def _faces(folder: Path, detector: Path | None, config: DeviceConfig, size: int) -> DeviceDataset:
    """All faces that can be cut out, none if there are none.

    Without a face the answer is noise alone, and a photo that has just gone is left out: a device that failed
    instead would tell the server by it, without noise, that the folder is empty or that a photo changed.
    """
    finder = EmbeddedDetector() if detector is None else YuNetDetector(detector)
    policy = config.policy
    selection = PhotoSelection(folders=tuple(policy.folders), exclude_folders=tuple(policy.exclude_folders))
    try:
        scan_library(folder, detector=finder, crop_size=size, selection=selection)
        library = PhotoLibrary(folder, detector=finder.name, selection=selection)
    except EmptyLibrary as error:
        log.warning("%s; this round is answered with noise alone", error)
        return DeviceDataset.independent(torch.zeros(0, 3, size, size))
    images = torch.empty((len(library), 3, size, size), dtype=torch.uint8)
    usable = []
    for number, crop in enumerate(library.crops(size)):
        if isinstance(crop, LibraryError):
            log.warning("%s; it is left out of this round", crop)
        else:
            images[number] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            usable.append(number)
    return DeviceDataset(
        images=images if len(usable) == len(library) else images[usable],
        photos=torch.from_numpy(library.photo_labels())[usable],
        occasions=torch.from_numpy(library.occasion_labels(config.occasions))[usable],
    )


def register_index(state: Path, index: Path) -> None:
    """Remember where an index of this device's photos lies: it is named by their folder, which may be moved."""
    known = registered_indexes(state)
    if index not in known:
        replace_text(state / INDEX_REGISTRY, json.dumps([str(path) for path in (*known, index)]))


def registered_indexes(state: Path) -> list[Path]:
    """Every index that was remembered; none where the note cannot be read."""
    try:
        told = json.loads((state / INDEX_REGISTRY).read_text(encoding="utf-8"))
        return [Path(path) for path in told if isinstance(path, str)] if isinstance(told, list) else []
    except (OSError, ValueError):
        return []
