"""A device: its photos, policy and ledger, and how it answers a task.

The privacy guarantee depends on the order: the policy decides, the release is recorded on disk, and only then is a
photo read. The reply is stored before it is sent. If the same round is requested again, the stored reply is sent again
and nothing is computed. Before anything leaves, the ledger records its content, receiver, size, protection and cost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, get_args

import torch

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    Exchange,
    HomomorphicConfig,
    MaskSettings,
    OwnerTerms,
    PlainConfig,
    SumContext,
    purpose_of,
)
from fedface.aggregation.protocols import DeviceKeys, device_sum
from fedface.aggregation.sums import DeviceSum
from fedface.atomic_io import one_at_a_time
from fedface.codec import encode
from fedface.device.device import Device
from fedface.device.local_metrics import check_request, compute_local_metrics
from fedface.device.reply_time import EXCHANGE_SECONDS, MARGIN, ReplyTime, photos_per_step, reading_seconds
from fedface.errors import (
    AggregationError,
    ConfigError,
    LedgerError,
    PolicyRefusal,
    PrivacyError,
    WeightsError,
)
from fedface.messages.messages import (
    EvaluateResult,
    EvaluateTask,
    ExchangeResult,
    ExchangeTask,
    Refusal,
    Reply,
    Task,
    TrainResult,
    TrainTask,
    protection_of,
    sum_context,
)
from fedface.models.checkpoint import model_from_vectors, weights_hash
from fedface.models.model import Architecture, Model
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.clip_and_noise import clip_l2
from fedface.privacy.ledger import LateRelease, Ledger
from fedface.privacy.ledger_records import LedgerEntry, TransmissionInfo, TransmissionKind
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.participation_conditions import ConditionsNotMet
from fedface.privacy.plan import DPParameters
from fedface.privacy.policy import EVALUATION
from fedface.privacy.spending import ENTRY_LIFETIME
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Vector
from fedface.training.dp_sgd import check_mechanism, check_shares
from fedface.training.training_methods import common_streams, noise_source, prepare_round

log = logging.getLogger("fedface.device")

Computation = Callable[[DeviceDataset], Vector]  # faces -> the vector (d,) to be summed, in public ranges


class ComputationFactory(Protocol):
    """The computation of a round under some DP parameters."""

    def __call__(self, dp: DPParameters, *, rehearsal: bool = False) -> Computation:
        """In a rehearsal every failure is an error: a photo that fails sooner would make it too short."""


MASKED = "masked: only the sum over several devices can be read"
FAILED = b"failed"  # stored in place of a payload for a round that failed


def handle_task(task: Task, device: Device) -> Reply:
    """Answer one task, or refuse it; the answer is recorded in the ledger when this returns.

    It returns at the time at which the answer may leave (device/reply_time.py). A device does one task at a time.

    Raises:
        WeightsError: The weights do not fit the networks of the task, or are not those that it names.
        AggregationError: The key for encryption is missing, or a sum is not of this run's kind.
        PrivacyError: The ledger cannot be trusted, the task contradicts itself, or this round of this run was
            answered for other weights or terms. Nothing is sent.
    """
    if not device.state.is_dir():
        raise LedgerError(
            f"there is no state folder {device.state}: mount or restore it; nothing was computed"
        )
    with one_at_a_time(device.state):
        slot = device.answer_seconds
        if isinstance(task, ExchangeTask):
            slot = min(slot, EXCHANGE_SECONDS)
        leaves = ReplyTime(slot, device.stopped_seconds)
        try:
            with device.ledger() as ledger:
                reply, clock = _handle(task, device, ledger, leaves), ledger.clock
                recorded = clock()
        finally:
            leaves.wait()
        if clock() - recorded > ENTRY_LIFETIME:
            raise LedgerError("the device slept for more than a day before it could reply; nothing was sent")
        return reply


def _handle(task: Task, device: Device, ledger: Ledger, leaves: ReplyTime) -> Reply:
    if ledger.has_withdrawn(task.run):
        return _recorded(_withdrawn(device), task, device, ledger, entry=None)
    reply: Reply
    entry: LedgerEntry | None = None
    try:
        if device.plans is not None:
            device.plans.check(task)
        device.check_not_paused()
        match task:
            case TrainTask():
                reply, entry = _train(task, device, ledger, leaves)
            case EvaluateTask():
                reply, entry = _evaluate(task, device, ledger, leaves)
            case ExchangeTask():
                reply, entry = _exchange(task, device, ledger)
    except PolicyRefusal as refusal:
        if isinstance(refusal, ConditionsNotMet):
            # The owner's log has the full reason, the server's copy does not.
            log.warning("%s", refusal.private)
        reply = Refusal(device=device.name, reason=str(refusal))
    try:
        return _recorded(reply, task, device, ledger, entry)
    except LateRelease as late:
        return _recorded(Refusal(device=device.name, reason=str(late)), task, device, ledger, entry=None)
    except PolicyRefusal:  # the owner withdrew during the computation: delete the stored reply too
        if not isinstance(task, ExchangeTask):
            ledger.delete_replies(task.ledger_key)
        return _recorded(_withdrawn(device), task, device, ledger, entry=None)


def _withdrawn(device: Device) -> Refusal:
    return Refusal(device=device.name, reason="its owner has left this run", withdrawn=True)


def _recorded(reply: Reply, task: Task, device: Device, ledger: Ledger, entry: LedgerEntry | None) -> Reply:
    """The reply, after its transmission was recorded on disk."""
    kind: TransmissionKind
    nothing = "contains nothing about a photo"
    match reply:
        case TrainResult(payload=payload) | EvaluateResult(payload=payload) if entry is None:
            kind, protection = "exchange", nothing  # keys, before a masked vector
        case TrainResult(payload=payload):
            kind, protection = "update", protection_of(task)
        case EvaluateResult(payload=payload):
            kind, protection = "metrics", protection_of(task)
        case ExchangeResult(content=payload):
            assert isinstance(task, ExchangeTask)
            updates = task.sum_of == "updates"
            if task.exchange == "decrypt":
                kind = "update sum" if updates else "metrics sum"
                protection = "the sum over several devices, not one of them"
            elif entry is not None:
                kind, protection = "update" if updates else "metrics", MASKED
            else:
                kind, protection = "exchange", nothing
        case Refusal(reason=reason):
            kind, payload, protection = "refusal", reason.encode(), nothing
    info = TransmissionInfo(
        run=task.run,
        round=task.round,
        kind=kind,
        receiver=device.server,
        protection=protection,
        entry=None if entry is None else entry.number,
        reason=reply.reason if isinstance(reply, Refusal) else "",
        masked=isinstance(reply, ExchangeResult) and entry is not None,
    )
    ledger.record_transmission(payload, info, device.policy.budgets)
    return reply


def _train(
    task: TrainTask, device: Device, ledger: Ledger, leaves: ReplyTime
) -> tuple[Reply, LedgerEntry | None]:
    agreed = task.config
    if agreed.training.schedule() != agreed.dp.schedule:
        raise PrivacyError(
            "the task's training schedule differs from its DP parameters; nothing was computed"
        )
    work = _ReleaseTransaction(
        task=task,
        device=device,
        ledger=ledger,
        leaves=leaves,
        terms=agreed.dp,
        aggregation=agreed.aggregation,
        agreement=agreed.agreement,
        objective=agreed.training.objective,
        holdout_fraction=agreed.holdout_fraction,
        metadata={
            "training": agreed.training.kind,
            "recipe": _recipe(encode(agreed.training), encode(agreed.architecture), agreed.holdout_fraction),
        },
    )
    if (stored := work.stored_reply()) is not None:
        return stored
    model = _asked_model(task, agreed.architecture)
    streams = Streams(task.seed).child(f"{device.name}/{task.round}")

    def computation(dp: DPParameters, *, rehearsal: bool = False) -> Computation:
        begun = prepare_round(model, agreed.training, dp, common_streams(task.seed, task.round))

        def compute(own: DeviceDataset) -> Vector:
            if dp.unit == "library" and len(own) == 0:
                # The neighbour of a library is an empty library, whose contribution to the sum is zero.
                return torch.zeros_like(begun.ranges())
            update = begun.update(
                own.images, rng=noise_source(dp, streams), streams=streams, units=own.units(dp.unit)
            )
            return _clip_for_library(update / begun.ranges(), dp)

        return compute

    payload, seconds, entry = work.release(computation, model.size)
    return TrainResult(device=device.name, payload=payload, seconds_protect=_reported(seconds, device)), entry


def _evaluate(
    task: EvaluateTask, device: Device, ledger: Ledger, leaves: ReplyTime
) -> tuple[Reply, LedgerEntry | None]:
    asked = task.request
    work = _ReleaseTransaction(
        task=task,
        device=device,
        ledger=ledger,
        leaves=leaves,
        terms=asked.dp,
        aggregation=asked.aggregation,
        agreement=asked.agreement,
        objective=EVALUATION,
        holdout_fraction=asked.holdout_fraction,
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

    def computation(dp: DPParameters, *, rehearsal: bool = False) -> Computation:
        def compute(own: DeviceDataset) -> Vector:
            rng = noise_source(dp, Streams(task.seed).child(f"{device.name}/metrics/{task.round}"))
            metrics = compute_local_metrics(
                model, own, replace(asked, dp=dp), seed=task.seed, rng=rng, skip_failures=not rehearsal
            )
            return _clip_for_library(metrics / ranges, dp)

        return compute

    payload, seconds, entry = work.release(computation, model.size)
    return EvaluateResult(
        device=device.name, payload=payload, seconds_protect=_reported(seconds, device)
    ), entry


@dataclass(frozen=True, kw_only=True)
class _ReleaseTransaction:
    """One release: admitted by the policy, recorded, computed, protected, stored."""

    task: TrainTask | EvaluateTask
    device: Device
    ledger: Ledger
    leaves: ReplyTime
    terms: DPParameters
    aggregation: AggregationConfig
    agreement: AggregationParameters
    objective: str
    holdout_fraction: float
    metadata: dict[str, str]

    def _all_metadata(self) -> dict[str, str]:
        return {
            "model": self.task.model,
            "protocol": self.aggregation.kind,
            "sums": _recipe(encode(self.aggregation), encode(self.agreement)),
            "objective": self.objective,
            **self.metadata,
        }

    def stored_reply(self) -> tuple[Reply, LedgerEntry | None] | None:
        """The stored reply of an earlier request; None if there is none and the policy admits the release.

        Raises:
            PolicyRefusal: With what is requested, spent and allowed.
            PrivacyError: This kind of sum cannot give the guarantee.
            LedgerError: The stored reply is of another release: a new run with an old name.
        """
        task, device, ledger = self.task, self.device, self.ledger
        if self.terms.noise == "central" and not isinstance(self.aggregation, PlainConfig):
            raise PrivacyError(
                "central noise needs plain sums: rounding to a grid can increase the norm of a clipped vector, and the "
                "server cannot add noise to an encrypted sum; nothing was computed"
            )
        if self.terms.noise == "distributed" and self.aggregation.kind != "masked":
            raise PrivacyError(
                "distributed noise needs masked sums: a single update has too little noise to be seen by anyone, got "
                f"{self.aggregation.kind} sums; nothing was computed"
            )
        # Today's policy applies to stored replies too, except for the budgets, which were charged before.
        purpose = purpose_of(self.aggregation, task.cohort, self.objective)
        device.policy.check_static(self.terms, purpose)
        stored = ledger.load_reply(task.ledger_key, task.round)
        if stored is not None:
            # Records nothing new, and fails if the stored reply is of another release.
            entry = device.policy.record(
                task.releases, ledger, run=task.ledger_key, round=task.round, metadata=self._all_metadata()
            )
            # A reply that was stored before the power failed leaves no sooner than one that is computed again.
            self.leaves.begin_work(ledger.work_seconds(self._announced_key) or 0.0)
            if stored == FAILED:
                closed = "this round failed on this device and is closed"
                return Refusal(device=device.name, reason=closed), None
            answer = TrainResult if isinstance(task, TrainTask) else EvaluateResult
            payload, covering = self._opening(stored, entry)
            return answer(device=device.name, payload=payload, seconds_protect=0.0), covering
        device.policy.admit(task.releases, purpose, ledger, run=task.ledger_key, round=task.round)
        device.ready()
        if isinstance(mechanism := self.terms.mechanism(), GaussianSum):
            check_mechanism(mechanism, SecretNoise())
        if self.terms.noise == "distributed":
            check_shares(self.terms)
        return None

    @cached_property
    def _sums(self) -> DeviceSum:
        context = sum_context(self.task)
        return _device_sum(self.aggregation, self.agreement, self.device, context=context, dp=self.terms)

    def _opening(self, stored: bytes, entry: LedgerEntry) -> tuple[bytes, LedgerEntry | None]:
        """What is sent first, and the entry that covers it: none where the vector itself follows later, masked."""
        return self._sums.opening(stored), None if isinstance(self.aggregation, MaskSettings) else entry

    def release(self, computation: ComputationFactory, size: int) -> tuple[bytes, float, LedgerEntry | None]:
        """Record, compute and store; returns what is sent, the seconds of `protect`, and the entry that covers it.

        After photos are opened, every error is answered as by a device without photos: with noise alone. An error, its
        type or a missing reply could depend on a photo's content, which no epsilon accounts for. An error on a single
        photo is caught where it is read or scored, and that photo is skipped. An error of the whole computation, such
        as running out of memory, silences the whole device; that is in no epsilon.

        Args:
            computation: DP parameters -> a function from faces (n, 3, size, size) to the vector (d,) to be summed, in
                public ranges.
            size: Side of the faces in pixels.
        """
        task, device, ledger = self.task, self.device, self.ledger
        compute = computation(self.terms)
        sums = self._sums
        announced = self._announced(computation, sums, size)
        # Record before reading a photo: a crash from here on may waste budget but never overspend it.
        entry = device.policy.record(
            task.releases, ledger, run=task.ledger_key, round=task.round, metadata=self._all_metadata()
        )
        ledger.record_attempt(task.ledger_key, task.round, attempt=entry.attempt)
        if announced > 0:
            ledger.store_work_seconds(self._announced_key, announced)
            self.leaves.begin_work(announced)
        try:
            vector: Vector | None = None
            try:
                vector = compute(self._chosen(device.photos(size)))
            except Exception:
                # As text: a stored traceback would keep the photos in memory.
                log.error("this round is answered with noise alone\n%s", traceback.format_exc())
            if vector is None:  # outside the handler, which keeps the photos in memory
                vector = compute(_grey_images(0, size))
            started = time.perf_counter()
            payload = sums.protect(vector, task.round).to_bytes()
            seconds = time.perf_counter() - started
        except Exception:
            # It also failed without photos, so the error reveals nothing about them; it is not retried.
            ledger.store_reply(task.ledger_key, task.round, FAILED, attempt=entry.attempt)
            raise
        finally:
            if (used := self.leaves.overran()) is not None:
                log.warning("this round took longer than announced; replies of this run leave later")
                ledger.store_work_seconds(task.ledger_key, used)
        ledger.store_reply(task.ledger_key, task.round, payload, attempt=entry.attempt)
        sent, covering = self._opening(payload, entry)
        return sent, seconds, covering

    def _chosen(self, own: DeviceDataset) -> DeviceDataset:
        """The faces that this release may use: for training those that are not held out, else those that are."""
        if isinstance(self.task, EvaluateTask) and self.holdout_fraction == 0:
            return own
        training, held_out = own.split(self.holdout_fraction, self.terms.unit)
        return held_out if isinstance(self.task, EvaluateTask) else training

    def _announced(self, computation: ComputationFactory, sums: DeviceSum, size: int) -> float:
        """The seconds after which this reply leaves, from one step on grey images; 0 where no time matters.

        Each round is rehearsed with its own weights: they may decide how fast a network is. Faces of `max_photos`
        photos are in memory twice meanwhile, as those that are held out or cannot be read make necessary.

        Raises:
            ConfigError: The round fails on grey images or takes too long, which shows nothing of a photo; nothing was
                recorded.
        """
        if self.device.answer_seconds <= 0 or not self.terms.is_private:
            return 0.0
        schedule = self.terms.schedule
        fraction = self.holdout_fraction if isinstance(self.task, EvaluateTask) else 0.0
        count = photos_per_step(
            self.device.max_photos,
            schedule.sampling_rate * (fraction or 1.0),
            steps=schedule.steps_per_round,
            in_units=self.terms.unit == "occasion",
        )
        log.info("rehearsing a step on %d grey images, to know how long this round takes", count)
        one_step = replace(self.terms, schedule=replace(schedule, sampling_rate=1.0, steps_per_round=1))
        try:
            grey = _grey_images(2 * self.device.max_photos, size)
            if schedule.steps_per_round > 1:  # what is done once in a process is not counted for each step
                computation(one_step, rehearsal=True)(grey.select(torch.arange(1)))
            started = self.leaves.timer()
            vector = computation(one_step, rehearsal=True)(grey.select(torch.arange(count)))
            computed = self.leaves.timer()
            sums.protect(vector, self.task.round).to_bytes()
        except (RuntimeError, ValueError, MemoryError) as error:
            raise ConfigError(f"this round fails already on {count} grey images: {error}") from error
        protected = self.leaves.timer() - computed
        work = schedule.steps_per_round * (computed - started) + protected
        seconds = MARGIN * work + reading_seconds(self.device.max_photos, size)
        if seconds > ENTRY_LIFETIME.total_seconds() / 2:
            most = ENTRY_LIFETIME.total_seconds() / 7200
            raise ConfigError(
                f"this round takes {seconds / 3600:.0f} hours, at most {most:.0f} are allowed: nothing was recorded"
            )
        return max(seconds, self.ledger.work_seconds(self.task.ledger_key) or 0.0)

    @property
    def _announced_key(self) -> str:
        """Under which the announced seconds of this round are stored; no name of a run has a line break."""
        return f"{self.task.ledger_key}\n{self.task.round}"


def _grey_images(count: int, size: int) -> DeviceDataset:
    """A library of grey images."""
    return DeviceDataset.independent(torch.full((count, 3, size, size), 127, dtype=torch.uint8))


def _reported(seconds: float, device: Device) -> float:
    """A duration as the server sees it: none, since it may depend on the photos, except in a simulation."""
    return 0.0 if device.answer_seconds > 0 else seconds


def _asked_model(task: TrainTask | EvaluateTask, shape: Architecture) -> Model:
    """The task's model. Raises WeightsError if its weights do not have the hash that the task states."""
    model = model_from_vectors(shape, task.weights, task.buffers)
    # The ledger records the hash of the weights, which must not be trusted until it is computed here.
    if (found := weights_hash(*model.modules())) != task.model:
        raise WeightsError(
            f"the task states weights {task.model:.16}, but they are {found}; nothing was recorded or computed"
        )
    return model


def _clip_for_library(update: Vector, terms: DPParameters) -> Vector:
    """The update, clipped if the privacy unit is a library."""
    mechanism = terms.sum_mechanism()
    return update if mechanism is None else clip_l2(update, mechanism.clip_norm)


def _recipe(*parts: object) -> str:
    """SHA-256 over all parameters that determine what is computed."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _exchange(task: ExchangeTask, device: Device, ledger: Ledger) -> tuple[Reply, LedgerEntry | None]:
    """The answer to one exchange of a sum, and the entry that covers it if it contains this device's vector.

    Two answers could reveal the difference of two sums: each exchange of a round is answered for one request, with the
    settings that the round began with, and the answer is stored before it leaves. What follows the vector is answered
    only once that has left, and the vector leaves only under the policy that it was computed under, within its periods.
    """
    device.policy.check_exchange(task.aggregation.kind)
    key = task.ledger_key
    release = ledger.load_release(key, task.round)
    if release is None or release[1] == FAILED:
        reason = f"this device has no part in the sum of round {task.round} of {task.run}, or none any more"
        return Refusal(device=device.name, reason=reason), None
    entry, stored = release
    if entry.metadata.get("sums") != _recipe(encode(task.aggregation), encode(task.agreement)):
        raise PolicyRefusal(
            f"the sum of round {task.round} of {task.run} is asked for with other settings than agreed"
        )
    sums = _device_sum(task.aggregation, task.agreement, device)
    sums.check_terms(stored)
    if task.exchange == "masked":
        ledger.check_may_leave(entry, device.policy.budgets)
    elif task.exchange != "shares" and not ledger.has_left(entry):
        raise PolicyRefusal(f"this device's vector is not in the sum of round {task.round} of {task.run}")
    known = ledger.exchanges(key, task.round)
    if task.exchange in known:
        request, answer = known[task.exchange]
        if request != task.content:
            raise PolicyRefusal(
                f"the sum of round {task.round} of {task.run} was asked for with other devices before; it is answered "
                "once"
            )
        if not answer:
            raise PolicyRefusal(f"this device could not decrypt the sum of round {task.round} of {task.run}")
    else:
        requests = {name: known[name][0] for name in get_args(Exchange) if name in known}
        try:
            answer = sums.answer(task.exchange, {**requests, task.exchange: task.content}, stored)
        except AggregationError:
            if task.exchange == "decrypt":  # a server must not learn about a key from many attempts
                ledger.store_exchange(key, task.round, task.exchange, task.content, b"")
            raise
        closed = sums.closed(stored) if task.exchange == "reveal" else None
        ledger.store_exchange(key, task.round, task.exchange, task.content, answer, closed=closed)
    covering = entry if task.exchange == "masked" else None
    return ExchangeResult(device=device.name, content=answer), covering


def _device_sum(
    config: AggregationConfig,
    agreement: AggregationParameters,
    device: Device,
    *,
    context: SumContext | None = None,
    dp: DPParameters | None = None,
) -> DeviceSum:
    """The owner's policy sets a lower bound on the updates in a sum, independent of the server's task."""
    keys = DeviceKeys()
    if isinstance(config, MaskSettings):
        encryption = HomomorphicKeys.load(device.key_path) if isinstance(config, HomomorphicConfig) else None
        keys = DeviceKeys(signing=device.signing_key(), encryption=encryption)
    owner = OwnerTerms(smallest_cohort=device.policy.min_cohort_size, digest=device.policy.terms_digest)
    return device_sum(config, agreement, keys, context, owner=owner, dp=dp)
