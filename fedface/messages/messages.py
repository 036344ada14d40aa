"""Messages between server and device: tasks, and replies to them. On the wire each is a JSON header and named blobs.

Nothing here is executable and nothing is trusted: the receiver checks every part again (messages/parsing.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import numpy as np
import torch

from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    Exchange,
    HomomorphicConfig,
    MaskedConfig,
    PlainConfig,
    SumContext,
    SumOf,
)
from fedface.audits.dp_metrics import LocalMetricsConfig, ranges
from fedface.codec import encode
from fedface.models.model import Architecture
from fedface.privacy.ledger_records import metrics_ledger_key
from fedface.privacy.plan import DPParameters, RunReleases
from fedface.tensor_types import Vector
from fedface.training.training_methods import Training
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.methods import Method
from fedface.validation import AtLeast, In, checked

VERSION = 5  # the one version of the wire format


@dataclass(frozen=True)
class Message:
    """The form of every task and reply on the wire."""

    header: str  # JSON text
    blobs: Mapping[str, bytes]


class _ShortText:
    """1 to 200 printable characters."""

    def problem(self, value: str) -> str:
        """Empty for such a text."""
        fits = 0 < len(value) <= 200 and value.isprintable()
        return "" if fits else "must be 1 to 200 printable characters"


class _NoSlash:
    """No slash, which separates a run's name from a suffix in the ledger."""

    def problem(self, value: str) -> str:
        """Empty for a text without a slash."""
        return "must be a name without a slash" if "/" in value else ""


Name = Annotated[str, _ShortText()]
RunName = Annotated[str, _ShortText(), _NoSlash()]
Count = Annotated[int, AtLeast(1)]
Seed = Annotated[int, AtLeast(0)]


@dataclass(frozen=True, kw_only=True)
@checked
class RoundConfig:
    """Everything public that a device needs to compute one update. There is no epsilon: devices compute their own."""

    dp: DPParameters
    training: Training
    architecture: Architecture
    aggregation: AggregationConfig
    agreement: AggregationParameters
    holdout_fraction: Annotated[float, In("[0, 1)")] = 0.0  # fraction of the units that is not trained on


@dataclass(frozen=True, kw_only=True)
@checked
class EvaluationRequest:
    """Everything public that a device needs to evaluate one model on its own photos."""

    dp: DPParameters
    architecture: Architecture
    method: Method  # how degraded photos are upsampled
    downscale: Degradation
    metrics: LocalMetricsConfig
    aggregation: AggregationConfig
    agreement: AggregationParameters
    # Fraction of the units that is evaluated; 0 means all of them, because no unit was used for training.
    holdout_fraction: Annotated[float, In("[0, 1)")] = 0.0

    def ranges(self) -> Vector:
        """Public bounds of the numbers that a device sends, shape (d,), all > 0."""
        if self.dp.sends_sums:
            return torch.ones(self.metrics.width)
        return ranges(self.metrics, clip_norm=self.dp.schedule.clip_norm)


@dataclass(frozen=True, kw_only=True)
@checked
class TrainTask:
    """Fine-tune these weights for one round and send the protected update."""

    kind: ClassVar[str] = "train"

    run: RunName  # the same in every round
    round: Count  # from 1
    cohort: Count  # how many devices get the task, according to the server
    seed: Seed  # of reproducible streams: latents of generated images, low-rank directions
    config: RoundConfig
    # Of the metrics that the same run requests; None: it requests none
    evaluation_dp: DPParameters | None = None
    weights: Vector  # of all networks of the model, flat (d,)
    buffers: Vector  # noise maps and mean style, flat; empty for a flow
    model: Name  # hash of the weights, for the ledger

    def __post_init__(self) -> None:
        _ = self.releases

    @property
    def ledger_key(self) -> str:
        """The name under which the ledger records it."""
        return self.run

    @property
    def releases(self) -> RunReleases:
        """Everything that the run releases, the same in each of its tasks."""
        return RunReleases(training=self.config.dp, evaluation=self.evaluation_dp)


@dataclass(frozen=True, kw_only=True)
@checked
class EvaluateTask:
    """Evaluate this model on the device's own photos and send the protected sums of metrics."""

    kind: ClassVar[str] = "evaluate"

    run: RunName
    round: Count  # which evaluation of the run, from 1
    cohort: Count
    seed: Seed  # where searches start; the same for every photo
    request: EvaluationRequest
    training_dp: DPParameters | None = None  # of the training of the same run; None: it only evaluates
    weights: Vector
    buffers: Vector
    model: Name  # hash of the weights, for the ledger

    def __post_init__(self) -> None:
        _ = self.releases

    @property
    def ledger_key(self) -> str:
        """The name under which the ledger records it; a run's metrics are separate releases."""
        return metrics_ledger_key(self.run)

    @property
    def releases(self) -> RunReleases:
        """Everything that the run releases, the same in each of its tasks."""
        return RunReleases(training=self.training_dp, evaluation=self.request.dp)


@dataclass(frozen=True, kw_only=True)
@checked
class ExchangeTask:
    """One exchange of a sum that this device has a part in, see `aggregation/sums.py`."""

    kind: ClassVar[str] = "exchange"

    run: RunName
    round: Count
    aggregation: AggregationConfig
    agreement: AggregationParameters
    exchange: Exchange
    content: bytes  # what is asked, a payload
    sum_of: SumOf = "updates"

    @property
    def ledger_key(self) -> str:
        """The name under which the ledger recorded this device's part of the sum."""
        return self.run if self.sum_of == "updates" else metrics_ledger_key(self.run)


Task = TrainTask | EvaluateTask | ExchangeTask


@dataclass(frozen=True, kw_only=True)
@checked
class TrainResult:
    """A protected update."""

    kind: ClassVar[str] = "train-result"

    device: Name  # the name under which the device is listed
    payload: bytes
    seconds_protect: Annotated[float, In("[0, 1e9)")]


@dataclass(frozen=True, kw_only=True)
@checked
class EvaluateResult:
    """Protected sums of metrics."""

    kind: ClassVar[str] = "evaluate-result"

    device: Name
    payload: bytes
    seconds_protect: Annotated[float, In("[0, 1e9)")]


@dataclass(frozen=True, kw_only=True)
@checked
class ExchangeResult:
    """The answer to one exchange of a sum."""

    kind: ClassVar[str] = "exchange-result"

    device: Name
    content: bytes  # a decrypted sum as `vector_bytes`, or a payload


@dataclass(frozen=True, kw_only=True)
@checked
class Refusal:
    """A refusal by the device's policy, which is a normal reply."""

    kind: ClassVar[str] = "refusal"

    device: Name
    reason: str
    withdrawn: bool = False  # the owner has withdrawn from this run; the server must delete the device's name


Reply = TrainResult | EvaluateResult | ExchangeResult | Refusal


@dataclass(frozen=True)
class Failure:
    """No usable reply from a device, with the reason; the device is left out of the round and named."""

    reason: str


def to_message(content: Task | Reply) -> Message:
    """Encode a task or a reply: bytes and vectors as blobs, everything else in the header."""
    blobs: dict[str, bytes] = {}
    for field in fields(content):
        match getattr(content, field.name):
            case bytes() as written:
                blobs[field.name] = written
            case torch.Tensor() as vector:
                blobs[field.name] = vector_bytes(vector)
    return Message(json.dumps({"version": VERSION} | encode(content, leave_out=blobs)), blobs)


def sum_context(task: TrainTask | EvaluateTask) -> SumContext:
    """What the sum of the replies to a task is of: the same for every device that was asked the same."""
    asked = task.config if isinstance(task, TrainTask) else task.request
    public = (
        encode(asked),
        encode(task.releases),
        task.seed,
        hashlib.sha256(vector_bytes(task.buffers)).hexdigest(),
    )
    return SumContext(
        run=task.run,
        round=task.round,
        sum_of="updates" if isinstance(task, TrainTask) else "metrics",
        model=task.model,
        terms=hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest(),
        cohort=task.cohort,
    )


def protection_of(task: Task) -> str:
    """How the reply to a task is protected, for the device's owner."""
    match task:
        case TrainTask(config=config) | EvaluateTask(request=config):
            dp, aggregation = config.dp, config.aggregation
        case ExchangeTask():
            return ""
    if not dp.is_private:
        noise = "no noise"
    elif dp.noise == "central":
        noise = (
            f"clipped to a bounded L2 norm; the server adds the noise (multiplier {dp.noise_multiplier:.3g})"
        )
    elif dp.noise == "distributed":
        noise = (
            f"a share of the noise added here (multiplier {dp.noise_multiplier:.3g} in a sum where "
            f"{dp.honest_devices} devices add theirs), a privacy guarantee per {dp.unit}"
        )
    else:
        noise = f"noise added here (multiplier {dp.noise_multiplier:.3g}), a privacy guarantee per {dp.unit}"
    match aggregation:
        case PlainConfig():
            return f"{noise}; not encrypted: the server sees it"
        case HomomorphicConfig():
            return f"{noise}; masked and encrypted, only the sum over devices can be read"
        case MaskedConfig():
            return f"{noise}; masked, only the sum over devices can be read"


def vector_bytes(vector: Vector) -> bytes:
    """Little-endian float32."""
    return vector.detach().cpu().numpy().astype("<f4").tobytes()


def vector_from(written: bytes) -> Vector:
    """Inverse of `vector_bytes`; ValueError if the length is wrong or a number is not finite."""
    if not written or len(written) % 4:
        raise ValueError(f"a vector needs 4 bytes for each number, got {len(written)} bytes")
    vector = torch.from_numpy(np.frombuffer(written, dtype="<f4").astype(np.float32))
    if not torch.isfinite(vector).all():
        raise ValueError("a vector has numbers that are not finite")
    return vector
