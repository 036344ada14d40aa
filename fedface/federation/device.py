"""One device: its photos, its policy, its ledger, and how it answers a task.

Called by federation/flower.py for every message that reaches a device. The order is the promise: the policy
is asked, the release is booked on disk, only then is a photo read; what was computed is kept before it is
sent, and sent again, never computed again, when the same round is asked once more.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedface.aggregation.encrypted import EncryptedKeys, make_device
from fedface.aggregation.protocol import AggregationConfig, EncryptedConfig, Payload, PlainConfig
from fedface.config import kind_of, plain
from fedface.errors import FederationError, PolicyRefusal, PrivacyError, WeightsError
from fedface.federation.task import Agreed, Refusal, Reply, Revealed, RevealTask, Task, Trained, TrainTask
from fedface.models.weights import filled, weights_hash
from fedface.privacy.ledger import Ledger
from fedface.privacy.policy import DevicePolicy
from fedface.randomness import Streams
from fedface.shapes import Images
from fedface.training.ways import begin_round, chance_for, common_streams, objective_of

FAILED = b"failed"  # kept in place of a payload for a round that broke


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device is made of; the photos are read when a round needs them, not before."""

    name: str  # the public name in logs and reports
    photos: Callable[[int], Images]  # size in pixels -> all aligned faces (n, 3, size, size)
    policy: DevicePolicy
    state: Path  # folder of the ledger and the shared key, readable by the owner alone

    @property
    def ledger_path(self) -> Path:
        """The ledger of this library, for all runs."""
        return self.state / "ledger.sqlite"

    @property
    def key_path(self) -> Path:
        """The key that the devices of a run share, and the server does not have."""
        return self.state / "sum.key"


def serve(task: Task, device: Device) -> Reply:
    """Answer one task, or say no.

    Raises:
        WeightsError: The weights do not fit the networks of the task, or are not those that it names.
        AggregationError: The shared key is missing, or a sum is not of this run's kind.
        FederationError: The sum of another round was to be opened.
        PrivacyError: The ledger cannot be trusted, the task contradicts itself, or this round of this run was
            answered for other weights or terms. Nothing is sent.
    """
    try:
        match task:
            case TrainTask():
                return _train(task, device)
            case RevealTask():
                return _reveal(task, device)
    except PolicyRefusal as refusal:
        return Refusal(device=device.name, reason=str(refusal))


def _train(task: TrainTask, device: Device) -> Reply:
    agreed = task.agreed
    if agreed.training.schedule() != agreed.terms.schedule:
        raise PrivacyError("the task's training schedule and its privacy terms differ; nothing was computed")
    ledger = Ledger.open(device.ledger_path)
    marks = {
        "model": task.model,
        "unit": "photo",
        "clip_norm": repr(agreed.terms.schedule.clip_norm),
        "expected_batch": str(agreed.terms.schedule.expected_batch),
        "sampler": "poisson",
        "protocol": agreed.aggregation.kind,
        "training": kind_of(type(agreed.training)),
        "recipe": _recipe(agreed),
    }
    kept = ledger.stored_reply(task.run, task.round)
    if kept is not None:
        # Books nothing, and fails if the kept bytes answer another release: a new run under an old name.
        device.policy.book(agreed.terms, ledger, run=task.run, round=task.round, marks=marks)
        if kept == FAILED:
            return Refusal(device=device.name, reason="this round failed on this device and is closed")
        return Trained(device=device.name, payload=kept, seconds_protect=0.0)
    device.policy.admit(
        agreed.terms,
        task.cohort,
        agreed.aggregation.kind,
        objective_of(agreed.training),
        ledger,
        run=task.run,
        round=task.round,
    )
    model = filled(agreed.shape, task.weights, task.buffers)
    # The ledger remembers weights by their hash, which is the server's word until it is computed here.
    if (found := weights_hash(*model.modules())) != task.model:
        raise WeightsError(
            f"the task says that its weights are {task.model:.16}, they are {found}; nothing was booked or computed"
        )
    work = begin_round(model, agreed.training, agreed.terms, common_streams(task.seed, task.round))
    sums = make_device(agreed.aggregation, agreed.agreement, _key(agreed.aggregation, device))
    streams = Streams(task.seed).child(f"{device.name}/{task.round}")
    # Book before reading a photo: a crash from here on may waste budget, never overspend it.
    entry = device.policy.book(agreed.terms, ledger, run=task.run, round=task.round, marks=marks)
    try:
        photos = device.photos(model.size)
        update = work.update(photos, chance=chance_for(agreed.terms, streams), streams=streams)
        started = time.perf_counter()
        payload = sums.protect(update / work.ranges(), task.round).to_bytes()
        seconds = time.perf_counter() - started
    except Exception:
        # The one broad net: that it failed may tell something of the photos, so it is never tried again.
        ledger.store_reply(task.run, task.round, FAILED, attempt=entry.attempt)
        raise
    ledger.store_reply(task.run, task.round, payload, attempt=entry.attempt)
    return Trained(device=device.name, payload=payload, seconds_protect=seconds)


def _recipe(agreed: Agreed) -> str:
    """SHA-256 over every number of the training and of the model's shape."""
    said = json.dumps([plain(agreed.training), plain(agreed.shape)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


def _reveal(task: RevealTask, device: Device) -> Reply:
    if not Ledger.open(device.ledger_path).already(task.run, task.round):
        return Refusal(
            device=device.name,
            reason=f"this device has no part in round {task.round} of {task.run}, so it opens no sum of it",
        )
    config = task.aggregation
    if isinstance(config, EncryptedConfig):
        # How few updates a sum may hold is the owner's word, whatever the server's task says.
        fewest = max(config.fewest_devices, device.policy.smallest_cohort)
        config = replace(config, fewest_devices=fewest)
    sums = make_device(config, task.agreement, _key(config, device))
    total = Payload.from_bytes(task.total)
    if total.round != task.round:
        raise FederationError(f"wanted the sum of round {task.round}, got one of round {total.round}")
    return Revealed(device=device.name, total=sums.reveal(total))


def _key(config: AggregationConfig, device: Device) -> EncryptedKeys | None:
    match config:
        case PlainConfig():
            return None
        case EncryptedConfig():
            return EncryptedKeys.load(device.key_path)
