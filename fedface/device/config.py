"""A real device, described by its owner's file: photos, ledger and policy.

The server never changes this file and sees nothing of it but the device's chosen name.
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
from typing import Annotated, Literal

import numpy as np
import torch

from fedface.atomic_io import replace_text
from fedface.config import keys_of, local_path, read
from fedface.device.device import Device
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
from fedface.validation import In, checked

log = logging.getLogger("fedface.device")


@dataclass(frozen=True, kw_only=True)
@checked
class DeviceConfig:
    """A device file, such as clients/device.example.yaml. Relative paths are relative to the file's folder."""

    name: str  # the name by which reports list this device; the server sees it
    photos: Path  # folder of the photos; read, never written
    state: Path  # folder of the ledger and the shared key; must be private (mode 0700)
    policy: DevicePolicy
    detector: Path | None = None  # a YuNet file; None: the bundled detector
    occasions: OccasionRule = field(default_factory=OccasionRule)  # which photos count as taken together
    server: str = "the coordinator"  # the receiver of replies as the owner calls it, for the ledger
    witness: Path | None = (
        None  # folder on another disk with the head of the ledger, to detect a rolled-back copy
    )

    # Replies leave at multiples of this time after a request, in seconds, so that their time does not show how many
    # photos were computed on; 0: at once. Longer than the work on one round.
    answer_seconds: Annotated[float, In("[0, 3600]")] = 60.0

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= 80 and self.name.isprintable()):
            raise ValueError(f"name must be a text of 1 to 80 printable characters, got {self.name!r:.90}")


def load_device(path: Path) -> Device:
    """The device that an owner's file describes. The file is read for every task, so that a stricter policy applies at
    once.

    Photos are scanned when a round needs them; only new or changed files are read. Scan a large folder beforehand
    (`fedface photos scan`), with the same detector.

    Raises:
        ConfigError: As for `read_device_config`.
    """
    config = read_device_config(path)
    home = path.resolve().parent
    folder, state = local_path(config.photos, home), local_path(config.state, home)
    for lost in missing_policy_folders(config.policy, folder):
        log.warning("%s: policy.%s", path, lost.describe())
    if not state.exists():
        log.warning(
            "%s: creating a new state folder at %s; if this file or its folder was moved, earlier privacy losses of "
            "these photos are not recorded there",
            path,
            state,
        )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    detector = local_path(config.detector, home) if config.detector else None

    index = PhotoIndex(default_cache(folder))

    def ready() -> None:
        if index.is_busy():
            raise ConditionsNotMet(
                f"the photos in {folder} are being scanned; a round now would cost epsilon and use none of them"
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
        witness=local_path(config.witness, home) if config.witness else None,
        answer_seconds=config.answer_seconds,
    )


def read_device_config(path: Path) -> DeviceConfig:
    """Read and validate a device file; nothing is created and no photo is opened.

    A folder in `exclude_folders` that does not exist may have been deleted, and excludes nothing. But if a folder with
    a similar name exists, its photos were probably meant to be excluded: this is an error.

    Raises:
        ConfigError: The file cannot be read, the photo folder does not exist, the state folder is not private, none of
            the policy's `folders` exists, or an excluded folder's name seems mistyped.
    """
    config = read(path, DeviceConfig)
    home = path.resolve().parent
    folder, state = local_path(config.photos, home), local_path(config.state, home)
    if not folder.is_dir():
        raise ConfigError(f"{path}: photos: there is no folder {folder}")
    if is_accessible_to_others(state):
        raise ConfigError(f"{path}: state: other users can read {state}; run chmod 700 on it")
    lost = missing_policy_folders(config.policy, folder)
    mistyped = next((one for one in lost if one.key == "exclude_folders" and one.near is not None), None)
    only = [one for one in lost if one.key == "folders"]
    if mistyped is not None:
        raise ConfigError(
            f"{path}: policy.{mistyped.describe()} Correct the line, or remove it if that folder was deleted"
        )
    if only and len(only) == len(config.policy.folders):
        raise ConfigError(f"{path}: policy.{only[0].describe()} No photo may be used")
    return config


def is_accessible_to_others(place: Path) -> bool:
    """Whether the mode of a file or folder lets other users read or write it."""
    return os.name == "posix" and place.exists() and bool(place.stat().st_mode & 0o077)


@dataclass(frozen=True, kw_only=True)
class MissingFolder:
    """A folder in a policy that does not exist among the photos."""

    key: Literal["folders", "exclude_folders"]
    folder: Path
    photos: Path
    near: Path | None  # the folder that may have been meant

    def describe(self) -> str:
        """`exclude_folders: there is no folder Privat in ...; did you mean Private?`"""
        meant = "." if self.near is None else f"; did you mean {self.near.as_posix()}?"
        return f"{self.key}: there is no folder {self.folder.as_posix()} in {self.photos}{meant}"


def missing_policy_folders(policy: DevicePolicy, photos: Path) -> list[MissingFolder]:
    """The folders in a policy that do not exist, with names compared as by the library."""
    named: list[tuple[Literal["folders", "exclude_folders"], Path]] = [
        *(("folders", folder) for folder in policy.folders),
        *(("exclude_folders", folder) for folder in policy.exclude_folders),
    ]
    lost = []
    for key, folder in named:
        places = [photos]
        for part in folder.parts:
            inside = [place for above in places for place in _inside(above)]
            places = [place for place in inside if _same_name(place.name, part, key)]
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
    except OSError:  # a file, or an unreadable folder: its photos cannot be used
        return []


def _same_name(name: str, expected: str, key: str) -> bool:
    """As in photos/library.py: Unicode is normalised; case matters in `folders` only."""
    one, other = (unicodedata.normalize("NFC", word) for word in (name, expected))
    return one == other if key == "folders" else one.casefold() == other.casefold()


def _near(name: str, folders: Sequence[Path]) -> Path | None:
    """The folder with the most similar name and the same digits: 2019 is not a typo of 2018."""

    def digits(word: str) -> str:
        return "".join(filter(str.isdigit, word))

    names = {folder.name.casefold(): folder for folder in folders if digits(folder.name) == digits(name)}
    found = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.8)
    return names[found[0]] if found else None


INDEX_REGISTRY = "indexes.json"  # in the state folder: paths of the indexes of this device's photos
KINDS = {
    "device": ("name", "photos", "state", "policy"),
    "policy": ("max_epsilon", "delta"),
    "experiment": ("question", "privacy"),
}  # keys that distinguish the kinds of files


def check_kind(path: Path, expected: Literal["device", "policy", "experiment"]) -> None:
    """Check that a file is not clearly of another kind; its reader reports all other errors.

    Raises:
        ConfigError: It is a file of another kind, or not YAML.
    """
    keys = keys_of(path)
    held = {kind: sum(key in keys for key in own) / len(own) for kind, own in KINDS.items()}
    most = max(held, key=lambda kind: held[kind])
    if most != expected and held[expected] < held[most] and held[most] >= 0.5:
        *others, last = KINDS[expected]
        article = "an" if most == "experiment" else "a"
        other = "an" if expected == "experiment" else "a"
        raise ConfigError(
            f"{path}: this is {article} {most} file; {other} {expected} file has {', '.join(others)} and {last}"
        )


def _faces(folder: Path, detector: Path | None, config: DeviceConfig, size: int) -> DeviceDataset:
    """All face crops of the photos; empty if there are none.

    Without a face the reply is noise alone, and a photo that was just deleted is left out. An error instead would
    reveal to the server, without noise, that the folder is empty or that a photo changed.
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
            log.warning("%s; skipped in this round", crop)
        else:
            images[number] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            usable.append(number)
    return DeviceDataset(
        images=images if len(usable) == len(library) else images[usable],
        photos=torch.from_numpy(library.photo_labels())[usable],
        occasions=torch.from_numpy(library.occasion_labels(config.occasions))[usable],
    )


def register_index(state: Path, index: Path) -> None:
    """Record the path of an index of this device's photos: it is named after their folder, which may be moved."""
    known = registered_indexes(state)
    if index not in known:
        replace_text(state / INDEX_REGISTRY, json.dumps([str(path) for path in (*known, index)]))


def registered_indexes(state: Path) -> list[Path]:
    """All recorded indexes; empty if the registry cannot be read."""
    try:
        paths = json.loads((state / INDEX_REGISTRY).read_text(encoding="utf-8"))
        return [Path(path) for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
    except (OSError, ValueError):
        return []
