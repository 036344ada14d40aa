"""What crosses between server and device: tasks going out, replies coming back, each a header and some bytes.

Called by device/client.py (answers), coordinator.py (asks) and flower.py (carries). Nothing here is
executable and nothing is trusted: whoever reads a message checks it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from fedface.aggregation.payload import AggregationConfig, AggregationParameters, HomomorphicConfig
from fedface.audits.dp_metrics import LocalMetricsConfig, ranges
from fedface.config import plain
from fedface.models.model import Architecture
from fedface.privacy.plan import DPParameters
from fedface.tensor_types import Vector
from fedface.training.training_methods import Training
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.methods import Method

VERSION = 3  # 3: units of a promise, and figures from devices


@dataclass(frozen=True)
class Message:
    """The neutral form of every task and reply: a JSON header, and named blobs."""

    header: str  # JSON text
    blobs: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """Everything public that a device must know to compute one update; carries no epsilon on purpose."""

    dp: DPParameters
    training: Training
    architecture: Architecture  # of the model: which family, and how large
    aggregation: AggregationConfig
    agreement: AggregationParameters
    holdout_fraction: float = 0.0  # share of the units that no update is computed from, in [0, 1)

    def __post_init__(self) -> None:
        _check_share(self.holdout_fraction)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Everything public that a device must know to score one model on its own photos; no epsilon here either."""

    dp: DPParameters
    architecture: Architecture
    method: Method  # how photos that were shrunk are made large again
    downscale: Degradation
    metrics: LocalMetricsConfig
    aggregation: AggregationConfig
    agreement: AggregationParameters
    holdout_fraction: float = (
        0.0  # share of the units that are asked; 0: all, since nothing was trained on them
    )

    def __post_init__(self) -> None:
        _check_share(self.holdout_fraction)

    def ranges(self) -> Vector:
        """Public bounds of the numbers that a device sends, shape (d,), all > 0."""
        return ranges(self.metrics, clip_norm=self.dp.schedule.clip_norm)


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Fine-tune these weights for one round and send the protected change."""

    run: str  # name of the run, the same in every round
    round: int  # from 1
    cohort: int  # how many devices are asked, as the server says
    seed: int  # of replayable streams: latents of made pictures, directions of low-rank changes
    config: RoundConfig
    weights: Vector  # of all networks of the model, flat (d,)
    buffers: Vector  # noise maps and mean style, flat; a flow has none
    model: str  # hash of the weights, for the ledger

    @property
    def ledger_key(self) -> str:
        """Under which name the ledger books it."""
        return self.run

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "train", "version": VERSION, "run": self.run, "round": self.round, "cohort": self.cohort,
            "seed": self.seed, "model": self.model, "dp": self.config.dp.to_record(),
            "training": plain(self.config.training), "architecture": plain(self.config.architecture),
            "aggregation": plain(self.config.aggregation), "agreement": plain(self.config.agreement),
            "holdout_fraction": self.config.holdout_fraction,
        }  # fmt: skip
        return Message(
            json.dumps(header), {"weights": vector_bytes(self.weights), "buffers": vector_bytes(self.buffers)}
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Score this model on photos of your own and send the protected sums of figures."""

    run: str
    round: int  # which question of the run, from 1
    cohort: int
    seed: int  # where searches start; the same for every photo
    request: EvaluationRequest
    weights: Vector
    buffers: Vector
    model: str  # hash of the weights, for the ledger

    @property
    def ledger_key(self) -> str:
        """Under which name the ledger books it: a run's figures are releases beside its updates."""
        return metrics_ledger_key(self.run)

    def message(self) -> Message:
        """For the wire."""
        asked = self.request
        header = {
            "what": "evaluate", "version": VERSION, "run": self.run, "round": self.round, "cohort": self.cohort,
            "seed": self.seed, "model": self.model, "dp": asked.dp.to_record(), "architecture": plain(asked.architecture),
            "method": plain(asked.method), "downscale": plain(asked.downscale), "metrics": plain(asked.metrics),
            "aggregation": plain(asked.aggregation), "agreement": plain(asked.agreement),
            "holdout_fraction": asked.holdout_fraction,
        }  # fmt: skip
        return Message(
            json.dumps(header), {"weights": vector_bytes(self.weights), "buffers": vector_bytes(self.buffers)}
        )


@dataclass(frozen=True, kw_only=True)
class DecryptTask:
    """Open this sum: only a device that holds the key can. The sum is public once opened."""

    run: str
    round: int
    aggregation: AggregationConfig
    agreement: AggregationParameters
    total: bytes  # a payload
    count: Literal["updates", "figures"] = "updates"

    @property
    def book(self) -> str:
        """Under which name the ledger booked this device's part in the sum."""
        return self.run if self.count == "updates" else metrics_ledger_key(self.run)

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "reveal", "version": VERSION, "run": self.run, "round": self.round, "of": self.count,
            "aggregation": plain(self.aggregation), "agreement": plain(self.agreement),
        }  # fmt: skip
        return Message(json.dumps(header), {"total": self.total})


Task = TrainTask | EvaluateTask | DecryptTask


def metrics_ledger_key(run: str) -> str:
    """The ledger's name for what a run asked beside its updates."""
    return f"{run}/figures"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A protected update."""

    device: str  # the name under which the device wants to be listed
    payload: bytes
    seconds_protect: float

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "trained",
            "version": VERSION,
            "device": self.device,
            "seconds": self.seconds_protect,
        }
        return Message(json.dumps(header), {"payload": self.payload})


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Protected sums of figures."""

    device: str
    payload: bytes
    seconds_protect: float

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "scored",
            "version": VERSION,
            "device": self.device,
            "seconds": self.seconds_protect,
        }
        return Message(json.dumps(header), {"payload": self.payload})


@dataclass(frozen=True, kw_only=True)
class DecryptResult:
    """An opened sum."""

    device: str
    total: Vector

    def message(self) -> Message:
        """For the wire."""
        header = {"what": "revealed", "version": VERSION, "device": self.device}
        return Message(json.dumps(header), {"total": vector_bytes(self.total)})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A device's "no", a normal reply."""

    device: str
    reason: str
    withdrawn: bool = False  # the owner has left this run, and the server is to forget the device

    def message(self) -> Message:
        """For the wire."""
        return Message(json.dumps({"what": "refusal", "version": VERSION, **asdict(self)}), {})


Reply = TrainResult | EvaluateResult | DecryptResult | Refusal


@dataclass(frozen=True)
class Failure:
    """No usable reply from a device, and why: it is dropped for the round and named."""

    reason: str


def protection_of(task: Task) -> str:
    """How what leaves is protected, in words for the owner."""
    match task:
        case TrainTask(config=agreed):
            terms, aggregation = agreed.dp, agreed.aggregation
        case EvaluateTask(request=question):
            terms, aggregation = question.dp, question.aggregation
        case DecryptTask():
            return ""
    if not terms.is_private:
        noise = "NO noise"
    elif terms.noise_at == "server":
        noise = (
            f"cut to a bounded length; the server adds the noise (multiplier {terms.noise_multiplier:.3g})"
        )
    else:
        noise = f"noise added here (multiplier {terms.noise_multiplier:.3g}), a promise per {terms.unit}"
    hidden = isinstance(aggregation, HomomorphicConfig)
    return f"{noise}; " + (
        "encrypted, only the sum over devices is opened" if hidden else "not encrypted: the server sees it"
    )


def vector_bytes(vector: Vector) -> bytes:
    """Little-endian float32."""
    return vector.detach().cpu().numpy().astype("<f4").tobytes()


def vector_from(written: bytes) -> Vector:
    """What `vector_bytes` wrote; ValueError where the length does not fit or a number is not finite."""
    if not written or len(written) % 4:
        raise ValueError(f"a vector needs 4 bytes for each number, got {len(written)} bytes")
    vector = torch.from_numpy(np.frombuffer(written, dtype="<f4").astype(np.float32))
    if not torch.isfinite(vector).all():
        raise ValueError("a vector holds numbers that are not finite")
    return vector


def _check_share(holdout_fraction: float) -> None:
    if not 0 <= holdout_fraction < 1:
        raise ValueError(f"holdout_fraction must lie in [0, 1), got {holdout_fraction}")
