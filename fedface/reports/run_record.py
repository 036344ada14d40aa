"""The JSON record of a run: everything a reader needs to believe it, doubt it or repeat it.

Written by the coordinator, read by reports.page, reports.card and whoever compares runs. The fields are plain
numbers and words, so that a record can be filled from `dataclasses.asdict` of what the audits return. Every
number carries its count and interval, every epsilon its delta, unit and bounds, every measurement the hash of
the weights it measured. What could not be measured is a `NotMeasured` with the reason, never NaN or null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedface.atomic_io import replace_text
from fedface.codec import dumps, load
from fedface.errors import RunError
from fedface.measurements import Epsilon, Measurement, NotMeasured
from fedface.reports.device_metrics_record import WITHDRAWN, DeviceMetricsRecord, WithdrawalRecord

FILE = "run.json"
HASH = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The promise made before the run, and the mechanism that keeps it."""

    kind: ClassVar[str] = "plan"

    guarantee: str  # in words
    unit: str
    target_epsilon: float
    epsilon: Epsilon  # of the whole plan
    noise_multiplier: float  # sigma, in units of the clip norm
    sampling_rate: float  # q: the chance of a unit to be in one step
    rounds: int
    steps_per_round: int
    clip_norm: float
    expected_batch_size: float
    adjacency: str  # such as "add or remove one"
    adjacency_text: str  # a sentence: which two worlds nobody can tell apart
    covers: str = field(default_factory=str)  # what one promise covers, in words
    noise_at: Literal["device", "server"] = field(default_factory=lambda: "device")  # who adds the noise
    update_clip_norm: float = field(default_factory=float)  # of whole updates; 0 where devices add the noise
    metrics_noise_multiplier: tuple[float, ...] = field(
        default_factory=tuple
    )  # noise multipliers of what devices tell besides


@dataclass(frozen=True, kw_only=True)
class NoPrivacyRecord:
    """A run without a privacy promise, and why."""

    kind: ClassVar[str] = "no-privacy"

    no_privacy: str


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """The machine of the coordinator, no more than matters for speed."""

    cores: int
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """One device: public facts only. How many photos a real device holds is private."""

    id: str
    description: str  # such as "drawn faces, mostly dark"
    photos: int | NotMeasured  # known for drawn libraries only


@dataclass(frozen=True, kw_only=True)
class RefusalRecord:
    """A device that did not count in one round, and why (its own "no", or a fault)."""

    device: str
    reason: str  # a sentence


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round: who answered, what crossed, what it cost, and what the probe saw afterwards."""

    round: int  # from 1
    answered: tuple[str, ...]
    refusals: tuple[RefusalRecord, ...]
    dropped: tuple[RefusalRecord, ...]
    epsilon: Epsilon | NotMeasured  # spent up to and with this round
    bytes_up: int  # updates, all devices together
    bytes_down: int  # weights, all devices together
    bytes_reveal: int  # the sum to one device and back, where the server cannot open it
    seconds: float
    seconds_protect: float
    seconds_combine: float
    seconds_reveal: float
    weights_hash: str
    metrics: dict[str, Measurement]  # "distance", "monk", "dark_fraction", ...

    def __post_init__(self) -> None:
        _check_hash(self.weights_hash)

    def without(self, name: str) -> RoundRecord:
        """The same round without a device's name: its owner has left the run."""
        return replace(
            self,
            answered=tuple(WITHDRAWN if device == name else device for device in self.answered),
            refusals=tuple(replace(r, device=WITHDRAWN) if r.device == name else r for r in self.refusals),
            dropped=tuple(replace(r, device=WITHDRAWN) if r.device == name else r for r in self.dropped),
        )


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """How one group is served."""

    group: str
    count: int  # photos
    metrics: dict[str, Measurement]  # by measure, named as in audits.bias.MEASURES


@dataclass(frozen=True, kw_only=True)
class GapRecord:
    """How much worse the worst served group is than the best served one, by one measure."""

    worst: str
    best: str
    difference: Measurement  # worst minus best, its interval good for all pairs of groups at once


@dataclass(frozen=True, kw_only=True)
class BiasRecord:
    """Whom one set of weights serves worse, on which probe."""

    kind: ClassVar[str] = "bias"

    weights_hash: str
    probe: str  # which photos, in words
    photos: int
    faces_per_photo: int
    overall: dict[str, Measurement]  # by measure
    groups: tuple[GroupRecord, ...]  # light to dark
    gaps: dict[str, GapRecord]  # by measure
    sentences: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_hash(self.weights_hash)


@dataclass(frozen=True, kw_only=True)
class ToneRecord:
    """A histogram of skin tone: the devices' true mix, or of samples before and after."""

    source: Literal["devices", "before", "after"]
    label: str
    groups: tuple[str, ...]  # light to dark
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.counts):
            raise ValueError(f"counts must match groups, got {len(self.counts)} for {len(self.groups)}")


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """What one attack got out of a device's update, beside what guessing gets."""

    threat: str  # who sees what
    defense: str  # "no DP" or "DP sigma=1.0"
    weights_hash: str  # of the network that was attacked
    attack: str  # which attack and its budget
    psnr: Measurement  # dB, recovered against true
    ssim: Measurement
    baseline_psnr: Measurement  # the best guess without the update
    baseline_ssim: Measurement
    gain: Measurement  # dB: recovered minus guess, photo by photo
    gallery: Measurement  # share of updates whose photo was named among the candidates
    gallery_size: int  # chance is 1 / gallery_size
    gallery_ceiling: float  # what no attack can beat, from the mechanism's event; 1 without noise
    pictures: tuple[str, ...]  # names in RunRecord.pictures
    sentence: str
    not_tested: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_hash(self.weights_hash)


@dataclass(frozen=True, kw_only=True)
class AggregationRecord:
    """What one way of summing updates costs."""

    protocol: str
    sees: str  # who can read one device's update
    bytes_per_device: int  # up, one round
    seconds_protect: float  # on one device
    seconds_combine: float
    seconds_reveal: float
    max_error: float  # largest difference from the plain sum, in weight units
    count: int  # repetitions measured


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """A picture in the run's folder."""

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
    command: str  # what reruns it
    versions: dict[str, str]
    machine: MachineRecord
    experiment: dict[str, Any]  # the whole YAML
    plan: PlanRecord | NoPrivacyRecord
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
    notes: tuple[str, ...]  # what this run cannot show
    withdrawals: tuple[WithdrawalRecord, ...] = field(
        default_factory=tuple
    )  # devices whose owners left, without their names
    device_metrics: tuple[DeviceMetricsRecord, ...] = field(
        default_factory=tuple
    )  # figures from the devices' own photos
    reference: dict[str, BiasRecord] = field(
        default_factory=dict
    )  # simple methods on the same probe, by title

    def __post_init__(self) -> None:
        for name in ("started", "finished"):
            moment = datetime.fromisoformat(getattr(self, name))
            if moment.utcoffset() != timedelta(0):
                raise ValueError(f"{name} must be a time in UTC, got {getattr(self, name)!r}")
        for digest in (self.base_hash, self.final_hash):
            _check_hash(digest)
        for attack in self.attacks:
            for picture in attack.pictures:
                if picture not in self.pictures:
                    raise ValueError(f"attacks name the picture {picture!r}, which is not among the pictures")


def write(record: RunRecord, folder: Path) -> Path:
    """Write `run.json` into a run's folder in one step, so that a reader never sees half of it."""
    path = folder / FILE
    replace_text(path, dumps(record))
    return path


def read(folder: Path) -> RunRecord:
    """The record of the run in `folder`.

    Raises:
        RunError: There is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        return load(RunRecord, path)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no record of a run here; expected the folder of a finished run") from error


def _check_hash(digest: str) -> None:
    if not HASH.fullmatch(digest):
        raise ValueError(f"weights_hash must be 8 to 64 hex digits, got {digest!r}")
