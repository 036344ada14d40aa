"""The file in which an owner describes a device: photos, state folder and policy.

The server never changes this file and sees nothing of it but the device's chosen name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from fedface.atomic_io import replace_text
from fedface.config import keys_of, local_path, read
from fedface.errors import ConfigError, RangeError
from fedface.photos.occasions import OccasionRule
from fedface.privacy.policy import DevicePolicy
from fedface.validation import In, checked

EXAMPLE = Path(__file__).with_name("device.example.yaml")

# In the state folder:
LEDGER_FILE = "ledger.sqlite"  # the record of privacy losses, transmissions and withdrawals for all runs
SIGNING_KEY_FILE = "signing.key"  # signs this device's part in masked sums
KEY_FILE = "sum.key"  # with which devices encrypt and some decrypt, and which the server does not have
PLANS_FOLDER = "plans"  # the run plans that the owner has admitted
INDEX_REGISTRY = "indexes.json"  # paths of the indexes of this device's photos
PAUSED_FILE = "paused"  # while it exists, every task is refused


@dataclass(frozen=True, kw_only=True)
@checked
class DeviceConfig:
    """A device file, such as device.example.yaml in this folder. Relative paths are relative to the file's folder."""

    name: str  # the name by which reports list this device; the server sees it
    photos: Path  # folder of the photos; read, never written
    state: Path  # folder of the ledger and the keys; must be private (mode 0700)
    policy: DevicePolicy
    detector: Path | None = None  # a YuNet file; None: the bundled detector
    occasions: OccasionRule = field(default_factory=OccasionRule)  # which photos count as taken together
    server: str = "the coordinator"  # HOST:PORT of the server, or its name in the log of a simulated device
    certificate: Path = Path("ca.crt")  # of the authority that signed the server's certificate
    node_key: Path = Path("node")  # private key by which the server recognises this device
    # The operator's public key, 64 hexadecimal digits: only requests of admitted run plans that it signed are answered.
    # None: every request that the policy allows
    operator: str | None = None
    # Folder on another disk with the head of the ledger, to detect a rolled-back copy
    witness: Path | None = None

    # Replies leave at multiples of this time, in seconds, and take as long as those of a library of `max_photos`, so
    # that their time does not show how many photos were computed on (device/reply_time.py); 0: at once.
    answer_seconds: Annotated[float, In("[0, 3600]")] = 60.0
    max_photos: Annotated[int, In("[1, 1000000]")] = 500

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.operator is not None and re.fullmatch(r"[0-9a-f]{64}", self.operator) is None:
            raise ValueError(
                f"operator must be a public key of 64 hexadecimal digits, got {self.operator!r:.70}"
            )


def check_name(name: str) -> None:
    """Raises ConfigError unless a text can be the name of a device."""
    if not (0 < len(name) <= 80 and name.isprintable()):
        raise RangeError(f"name must be a text of 1 to 80 printable characters, got {name!r:.90}")


def filled_device_file(values: Mapping[str, str | float | bool | list[str]]) -> str:
    """The example of a device file, with its comments, with these values of its keys."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for key, value in values.items():
        found = re.search(rf"^( *)(?:# )?{key}:.*$", text, re.MULTILINE)
        assert found is not None, key
        line = f"{found[1]}{key}: {json.dumps(value, ensure_ascii=False)}"  # JSON is YAML
        text = text[: found.start()] + line + text[found.end() :]
    return text


def read_device_file(path: Path) -> DeviceConfig:
    """A device file with absolute paths; nothing that it names needs to exist.

    Raises:
        ConfigError: The file cannot be read.
    """
    config, home = read(path, DeviceConfig), path.resolve().parent
    return replace(
        config,
        photos=local_path(config.photos, home),
        state=local_path(config.state, home),
        detector=None if config.detector is None else local_path(config.detector, home),
        witness=None if config.witness is None else local_path(config.witness, home),
        certificate=local_path(config.certificate, home),
        node_key=local_path(config.node_key, home),
    )


def read_device_config(path: Path) -> DeviceConfig:
    """`read_device_file`, of a device that could work; nothing is created and no photo is opened.

    A folder in `exclude_folders` that does not exist may have been deleted, and excludes nothing. But if a folder with
    a similar name exists, its photos were probably meant to be excluded: this is an error.

    Raises:
        ConfigError: The file cannot be read, the photo folder does not exist, the state folder is not private, none of
            the policy's `folders` exists, or an excluded folder's name seems mistyped.
    """
    config = read_device_file(path)
    folder, state = config.photos, config.state
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


def check_state_folder(path: Path, state: Path) -> None:
    """Raises ConfigError if a device has no state folder: a disk that is not mounted must not begin a new ledger."""
    if not state.is_dir():
        raise ConfigError(
            f"{path}: state: there is no folder {state}. If this device has answered before, mount or restore it: it "
            f"records what these photos have paid. Otherwise create it: mkdir -m 700 {state}"
        )


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
