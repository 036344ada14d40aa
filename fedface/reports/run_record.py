"""The JSON record of a run: everything needed to check or repeat it.

The record holds the plan and the audits' own results. Every number carries its count and interval, every epsilon its
delta, unit and bounds, every measurement the hash of the weights it measured. What could not be measured is a
`NotMeasured` with the reason, never NaN or null.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from fedface.atomic_io import replace_text
from fedface.audits.bias import BiasReport, ToneHistogram
from fedface.audits.gradient_inversion import AttackScores, CandidateIdentification
from fedface.codec import dumps, load
from fedface.errors import RunError
from fedface.measurements import Epsilon, Measurement, NotMeasured
from fedface.platforms import usable_cores
from fedface.privacy.plan import Plan
from fedface.reports.device_metrics_record import WITHDRAWN, DeviceMetricsRecord, WithdrawalRecord

FILE = "run.json"
PACKAGES = ("fedface", "torch", "flwr", "opacus", "tenseal", "dp-accounting", "numpy", "scikit-image")
HASH = re.compile(r"[0-9a-f]{8,64}")


def check_hash(digest: str) -> None:
    """Raises ValueError unless a hash is 8 to 64 hexadecimal digits."""
    if not HASH.fullmatch(digest):
        raise ValueError(f"weights_hash must be 8 to 64 hex digits, got {digest!r}")


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """The coordinator's machine."""

    cores: int  # that this process may use
    memory_gib: float

    @staticmethod
    def here() -> MachineRecord:
        memory = psutil.virtual_memory().total
        return MachineRecord(cores=usable_cores(), memory_gib=round(memory / 2**30, 1))


def installed_versions() -> dict[str, str]:
    """The installed versions of packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """One device: public facts only. How many photos a real device holds is private."""

    id: str
    description: str  # such as "synthetic faces, mostly dark"
    photos: int | NotMeasured  # known for simulated libraries only


@dataclass(frozen=True, kw_only=True)
class RefusalRecord:
    """A device that was not in the sum of a round, and why: a refusal or a failure."""

    device: str
    reason: str  # a sentence


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round: participants, traffic, privacy loss, and the metrics afterwards."""

    round: int  # from 1
    participants: tuple[str, ...]
    refusals: tuple[RefusalRecord, ...]
    dropped: tuple[RefusalRecord, ...]
    epsilon: Epsilon | NotMeasured  # spent up to and including this round
    bytes_up: int  # updates, all devices together
    bytes_down: int  # weights, all devices together
    bytes_reveal: int  # the sum to one device and back, if it is encrypted
    seconds: float
    seconds_protect: float
    seconds_combine: float
    seconds_reveal: float
    weights_hash: str
    metrics: dict[str, Measurement]  # "distance", "monk", "dark_fraction", ...

    def __post_init__(self) -> None:
        check_hash(self.weights_hash)

    def without(self, name: str) -> RoundRecord:
        """The same round without the name of a device that withdrew."""
        return replace(
            self,
            participants=tuple(WITHDRAWN if device == name else device for device in self.participants),
            refusals=tuple(replace(r, device=WITHDRAWN) if r.device == name else r for r in self.refusals),
            dropped=tuple(replace(r, device=WITHDRAWN) if r.device == name else r for r in self.dropped),
        )


@dataclass(frozen=True, kw_only=True)
class BiasRecord:
    """The metrics of one set of weights for the groups of a probe."""

    kind: ClassVar[str] = "bias"

    weights_hash: str
    probe: str  # which photos, as text
    report: BiasReport

    def __post_init__(self) -> None:
        check_hash(self.weights_hash)


@dataclass(frozen=True, kw_only=True)
class ToneRecord:
    """The skin tones of some faces: like the devices', or generated before and after the run."""

    source: Literal["devices", "before", "after"]
    histogram: ToneHistogram


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """What an attack recovered from a device's update, compared with guessing."""

    weights_hash: str  # of the network that was attacked
    scores: AttackScores
    identification: CandidateIdentification
    pictures: tuple[str, ...]  # names in RunRecord.pictures

    def __post_init__(self) -> None:
        check_hash(self.weights_hash)


@dataclass(frozen=True, kw_only=True)
class AggregationRecord:
    protocol: str
    sees: str  # who can read one device's update
    bytes_per_device: int  # up, one round
    seconds_device: float  # processor time of one device
    seconds_server: float  # of the server, for all devices
    max_error: float  # largest difference from the plain sum, in weight units
    count: int  # devices


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    file: str  # a plain file name ending in .png or .jpg
    section: Literal["faces", "attacks", "more"]
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or Path(self.file).suffix not in (".png", ".jpg"):
            raise ValueError(f"file must be a plain name ending in .png or .jpg, got {self.file!r}")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run.

    Raises:
        ValueError: Times without UTC, or an attack that names a picture that is not there.
    """

    version: ClassVar[int] = 2

    name: str
    question: str
    started: str  # ISO 8601, UTC
    finished: str
    command: str  # reproduces the run
    versions: dict[str, str]
    machine: MachineRecord
    experiment: dict[str, Any]  # the whole YAML
    plan: Plan
    planned_epsilon: Epsilon | NotMeasured  # of all rounds and evaluations
    base_hash: str  # of the weights before
    final_hash: str  # of the weights after
    devices: tuple[DeviceRecord, ...]
    metrics_before: dict[str, Measurement]  # the probe on the base weights: round 0 of every curve
    rounds: tuple[RoundRecord, ...]
    bias_before: BiasRecord | NotMeasured
    bias_after: BiasRecord | NotMeasured
    tones: tuple[ToneRecord, ...]
    attacks: tuple[AttackRecord, ...]
    aggregation: tuple[AggregationRecord, ...]
    pictures: dict[str, PictureRecord]
    notes: tuple[str, ...]  # limitations of this run
    withdrawals: tuple[WithdrawalRecord, ...]  # devices whose owners withdrew, without their names
    device_metrics: tuple[DeviceMetricsRecord, ...]  # measured by the devices on their own photos
    reference: dict[str, BiasRecord]  # baseline methods on the same probe, by title

    def __post_init__(self) -> None:
        for name in ("started", "finished"):
            moment = datetime.fromisoformat(getattr(self, name))
            if moment.utcoffset() != timedelta(0):
                raise ValueError(f"{name} must be a time in UTC, got {getattr(self, name)!r}")
        for digest in (self.base_hash, self.final_hash):
            check_hash(digest)
        for attack in self.attacks:
            for picture in attack.pictures:
                if picture not in self.pictures:
                    raise ValueError(f"attacks name the picture {picture!r}, which is not among the pictures")


def write(record: RunRecord, folder: Path) -> Path:
    """Write `run.json` into a run's folder, atomically."""
    path = folder / FILE
    replace_text(path, dumps(record))
    return path


def read(folder: Path) -> RunRecord:
    """The record of the run in `folder`.

    Raises:
        RunError: It does not exist or cannot be read.
    """
    path = folder / FILE
    try:
        return load(RunRecord, path)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no record of a run here; expected the folder of a finished run") from error
