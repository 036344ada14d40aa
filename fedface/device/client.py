"""One device: its photos, its policy, its ledger, and how it answers a task.

The privacy guarantee depends on the order: the policy is asked, the release is recorded on disk, and only then is a
photo read. The reply is stored before it is sent, and sent again, never computed again, when the same round is asked
once more. Before anything leaves, the ledger records what, to whom, how large, how protected and at what price.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedface.aggregation.homomorphic import HomomorphicKeys, make_device
from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainConfig,
)
from fedface.codec import encode
from fedface.device.local_metrics import check_request, compute_local_metrics
from fedface.errors import FederationError, PolicyRefusal, PrivacyError, WeightsError
from fedface.messages.messages import (
    DecryptResult,
    DecryptTask,
    EvaluateResult,
    EvaluateTask,
    Refusal,
    Reply,
    Task,
    TrainResult,
    TrainTask,
    protection_of,
    vector_bytes,
)
from fedface.models.checkpoint import model_from_vectors, weights_hash
from fedface.models.model import Architecture, Model
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import LedgerEntry, TransmissionInfo, TransmissionKind
from fedface.privacy.participation_conditions import ConditionsNotMet
from fedface.privacy.plan import DPParameters
from fedface.privacy.policy import EVALUATION, DevicePolicy, Purpose
from fedface.randomness import Streams
from fedface.tensor_types import Vector
from fedface.training.training_methods import common_streams, noise_source, prepare_round

log = logging.getLogger("fedface.device")

FAILED = b"failed"  # stored in place of a payload for a round that broke


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device is made of; the photos are read when a round needs them, not before."""

    name: str  # the public name in logs and reports
    photos: Callable[[int], DeviceDataset]  # size in pixels -> all aligned faces, and which belong together
    policy: DevicePolicy
    state: Path  # folder of the ledger and the shared key, readable by the owner alone
    # Raises ConditionsNotMet, before a booking, while photos cannot be read.
    ready: Callable[[], None] = lambda: None
    server: str = "the coordinator"  # to whom replies go, in the owner's words
    witness: Path | None = None  # folder elsewhere that stores the head of the ledger

    @property
    def ledger_path(self) -> Path:
        """What these photos have paid, what left, and what its owner decided, for all runs."""
        return self.state / "ledger.sqlite"

    @property
    def key_path(self) -> Path:
        """The key that the devices of a run share, and the server does not have."""
        return self.state / "sum.key"

    def ledger(self) -> Ledger:
        """A session on the ledger, verified. Raises LedgerError."""
        return Ledger.open(self.ledger_path, witness=self.witness)


def handle_task(task: Task, device: Device) -> Reply:
    """Answer one task, or refuse it; the answer is recorded in the ledger when this returns.

    Raises:
        WeightsError: The weights do not fit the networks of the task, or are not those that it names.
        AggregationError: The shared key is missing, or a sum is not of this run's kind.
        FederationError: The sum of another round was to be opened.
        PrivacyError: The ledger cannot be trusted, the task contradicts itself, or this round of this run was
            answered for other weights or terms. Nothing is sent.
    """
    with device.ledger() as ledger:
        return _handle(task, device, ledger)


def _handle(task: Task, device: Device, ledger: Ledger) -> Reply:
    if ledger.has_withdrawn(task.run):
        return _recorded(_withdrawn(device), task, device, ledger, entry=None)
    reply: Reply
    entry: LedgerEntry | None = None
    try:
        match task:
            case TrainTask():
                reply, entry = _train(task, device, ledger)
            case EvaluateTask():
                reply, entry = _evaluate(task, device, ledger)
            case DecryptTask():
                reply = _reveal(task, device, ledger)
    except PolicyRefusal as refusal:
        if isinstance(refusal, ConditionsNotMet):
            log.warning("%s", refusal.private)  # what the owner may know, and the server need not
        reply = Refusal(device=device.name, reason=str(refusal))
    try:
        return _recorded(reply, task, device, ledger, entry)
    except PolicyRefusal:  # its owner withdrew while it was computed: the stored reply is deleted as well
        if not isinstance(task, DecryptTask):
            ledger.delete_replies(task.ledger_key)
        return _recorded(_withdrawn(device), task, device, ledger, entry=None)


def _withdrawn(device: Device) -> Refusal:
    return Refusal(device=device.name, reason="its owner has left this run", withdrawn=True)


def _recorded(reply: Reply, task: Task, device: Device, ledger: Ledger, entry: LedgerEntry | None) -> Reply:
    """The reply, once the ledger has its transmission on disk."""
    kind: TransmissionKind
    match reply:
        case TrainResult(payload=payload):
            kind, protection = "update", protection_of(task)
        case EvaluateResult(payload=payload):
            kind, protection = "metrics", protection_of(task)
        case DecryptResult(total=total):
            payload = vector_bytes(total)
            of_metrics = isinstance(task, DecryptTask) and task.sum_of == "metrics"
            kind = "metrics sum" if of_metrics else "update sum"
            protection = "the sum over several devices, not one of them"
        case Refusal(reason=reason):
            kind, payload, protection = "refusal", reason.encode(), "nothing of a photo is in it"
    info = TransmissionInfo(
        run=task.run,
        round=task.round,
        kind=kind,
        receiver=device.server,
        protection=protection,
        entry=None if entry is None else entry.number,
        reason=reply.reason if isinstance(reply, Refusal) else "",
    )
    ledger.record_transmission(payload, info)
    return reply


def _train(task: TrainTask, device: Device, ledger: Ledger) -> tuple[Reply, LedgerEntry | None]:
    agreed = task.config
    if agreed.training.schedule() != agreed.dp.schedule:
        raise PrivacyError("the task's training schedule and its privacy terms differ; nothing was computed")
    work = _ReleaseTransaction(
        task=task,
        device=device,
        ledger=ledger,
        terms=agreed.dp,
        aggregation=agreed.aggregation,
        agreement=agreed.agreement,
        objective=agreed.training.objective,
        metadata={
            "training": agreed.training.kind,
            "recipe": _recipe(encode(agreed.training), encode(agreed.architecture), agreed.holdout_fraction),
        },
    )
    if (stored := work.stored_reply()) is not None:
        return stored
    model = _asked_model(task, agreed.architecture)
    begun = prepare_round(model, agreed.training, agreed.dp, common_streams(task.seed, task.round))
    streams = Streams(task.seed).child(f"{device.name}/{task.round}")

    def compute(own: DeviceDataset) -> Vector:
        mine, _ = own.split(agreed.holdout_fraction, agreed.dp.unit)
        if agreed.dp.unit == "library" and len(mine) == 0:
            # The neighbour of a library is an empty one, and what an empty one adds to the sum is nothing.
            return torch.zeros_like(begun.ranges())
        update = begun.update(
            mine.images,
            rng=noise_source(agreed.dp, streams),
            streams=streams,
            units=mine.units(agreed.dp.unit),
        )
        return _clip_for_library(update / begun.ranges(), agreed.dp)

    payload, seconds, entry = work.release(compute, model.size)
    return TrainResult(device=device.name, payload=payload, seconds_protect=seconds), entry


def _evaluate(task: EvaluateTask, device: Device, ledger: Ledger) -> tuple[Reply, LedgerEntry | None]:
    asked = task.request
    work = _ReleaseTransaction(
        task=task,
        device=device,
        ledger=ledger,
        terms=asked.dp,
        aggregation=asked.aggregation,
        agreement=asked.agreement,
        objective=EVALUATION,
        metadata={
            "method": asked.method.kind,
            "recipe": _recipe(
                encode(asked.method),
                encode(asked.downscale),
                encode(asked.metrics),
                encode(asked.architecture),
                asked.holdout_fraction,
            ),
        },
    )
    if (stored := work.stored_reply()) is not None:
        return stored
    model = _asked_model(task, asked.architecture)
    check_request(asked, model)
    ranges = asked.ranges()

    def compute(own: DeviceDataset) -> Vector:
        mine = own.split(asked.holdout_fraction, asked.dp.unit)[1] if asked.holdout_fraction > 0 else own
        rng = noise_source(asked.dp, Streams(task.seed).child(f"{device.name}/figures/{task.round}"))
        told = compute_local_metrics(model, mine, asked, seed=task.seed, rng=rng)
        return _clip_for_library(told / ranges, asked.dp)

    payload, seconds, entry = work.release(compute, model.size)
    return EvaluateResult(device=device.name, payload=payload, seconds_protect=seconds), entry


@dataclass(frozen=True, kw_only=True)
class _ReleaseTransaction:
    """One release on its way: admitted, booked, computed, protected, kept."""

    task: TrainTask | EvaluateTask
    device: Device
    ledger: Ledger
    terms: DPParameters
    aggregation: AggregationConfig
    agreement: AggregationParameters
    objective: str
    metadata: dict[str, str]

    def _all_metadata(self) -> dict[str, str]:
        return {
            "model": self.task.model,
            "protocol": self.aggregation.kind,
            "objective": self.objective,
            **self.metadata,
        }

    def stored_reply(self) -> tuple[Reply, LedgerEntry | None] | None:
        """The answer that was given before, byte by byte; otherwise None, and the policy has admitted the work.

        Raises:
            PolicyRefusal: With what was asked, what is spent and what is allowed.
            PrivacyError: A promise that this kind of sum cannot keep.
            LedgerError: The kept bytes answer another release: a new run under an old name.
        """
        task, device, ledger = self.task, self.device, self.ledger
        if self.terms.unit == "library" and not isinstance(self.aggregation, PlainConfig):
            raise PrivacyError(
                "the privacy unit library needs plain sums: rounding to a grid makes a clipped vector longer, and the "
                "server cannot add noise to a sum that it cannot read; nothing was computed"
            )
        # What the owner allows today holds for stored replies too, but for the price, which was paid.
        purpose = Purpose(task.cohort, self.aggregation.kind, self.objective)
        device.policy.check_static(self.terms, purpose)
        stored = ledger.load_reply(task.ledger_key, task.round)
        if stored is not None:
            # Books nothing, and fails if the stored reply answers another release.
            entry = device.policy.record(
                self.terms, ledger, run=task.ledger_key, round=task.round, metadata=self._all_metadata()
            )
            if stored == FAILED:
                closed = "this round failed on this device and is closed"
                return Refusal(device=device.name, reason=closed), None
            answer = TrainResult if isinstance(task, TrainTask) else EvaluateResult
            return answer(device=device.name, payload=stored, seconds_protect=0.0), entry
        device.policy.admit(self.terms, purpose, ledger, run=task.ledger_key, round=task.round)
        device.ready()
        return None

    def release(
        self, compute: Callable[[DeviceDataset], Vector], size: int
    ) -> tuple[bytes, float, LedgerEntry]:
        """Book, compute and keep: the payload, the seconds that protecting it took, and what paid for it.

        Whatever goes wrong once photos are opened, the answer is that of a device without photos: noise alone. An
        error, its kind or a missing reply could depend on what a photo shows, which no epsilon accounts for. An error
        on one photo alone is caught where it is read or scored and costs that photo; what is left, such as memory,
        silences the whole device, and that is in no epsilon.

        Args:
            compute: Own faces -> the vector (d,) that is summed, in public ranges.
            size: Side of the faces in pixels.
        """
        task, device, ledger = self.task, self.device, self.ledger
        sums = make_device(self.aggregation, self.agreement, _key(self.aggregation, device))
        # Book before reading a photo: a crash from here on may waste budget, never overspend it.
        entry = device.policy.record(
            self.terms, ledger, run=task.ledger_key, round=task.round, metadata=self._all_metadata()
        )
        ledger.record_attempt(task.ledger_key, task.round, attempt=entry.attempt)
        try:
            vector: Vector | None = None
            try:
                vector = compute(device.photos(size))
            except Exception:
                # As text: a kept traceback would hold on to the photos.
                log.error("this round is answered with noise alone\n%s", traceback.format_exc())
            if vector is None:  # out of the handler, which holds on to the photos
                vector = compute(DeviceDataset.independent(torch.zeros(0, 3, size, size)))
            started = time.perf_counter()
            payload = sums.protect(vector, task.round).to_bytes()
            seconds = time.perf_counter() - started
        except Exception:
            # Without photos it went wrong as well, so that this says nothing of them; it is not tried again.
            ledger.store_reply(task.ledger_key, task.round, FAILED, attempt=entry.attempt)
            raise
        ledger.store_reply(task.ledger_key, task.round, payload, attempt=entry.attempt)
        return payload, seconds, entry


def _asked_model(task: TrainTask | EvaluateTask, shape: Architecture) -> Model:
    """The model that the task is about, if its weights are those that it names; raises WeightsError."""
    model = model_from_vectors(shape, task.weights, task.buffers)
    # The ledger remembers weights by their hash, which is the server's word until it is computed here.
    if (found := weights_hash(*model.modules())) != task.model:
        raise WeightsError(
            f"the task says that its weights are {task.model:.16}, they are {found}; nothing was booked or computed"
        )
    return model


def _clip_for_library(update: Vector, terms: DPParameters) -> Vector:
    """The update, clipped where the privacy unit is a library; otherwise as it is."""
    mechanism = terms.central_mechanism()
    return update if mechanism is None else mechanism.clip(update)


def _recipe(*parts: object) -> str:
    """SHA-256 over every number that decides what is computed."""
    said = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


def _reveal(task: DecryptTask, device: Device, ledger: Ledger) -> Reply:
    device.policy.check_decryption(task.aggregation.kind)
    if not ledger.is_recorded(task.ledger_key, task.round):
        return Refusal(
            device=device.name,
            reason=f"this device has no part in round {task.round} of {task.run}, so it opens no sum of it",
        )
    config = task.aggregation
    if isinstance(config, HomomorphicConfig):
        # How few updates a sum may hold is the owner's word, whatever the server's task says.
        fewest = max(config.min_devices, device.policy.min_cohort_size)
        config = replace(config, min_devices=fewest)
    sums = make_device(config, task.agreement, _key(config, device))
    total = Payload.from_bytes(task.total)
    if total.round != task.round:
        raise FederationError(f"wanted the sum of round {task.round}, got one of round {total.round}")
    return DecryptResult(device=device.name, total=sums.reveal(total))


def _key(config: AggregationConfig, device: Device) -> HomomorphicKeys | None:
    match config:
        case PlainConfig():
            return None
        case HomomorphicConfig():
            return HomomorphicKeys.load(device.key_path)
