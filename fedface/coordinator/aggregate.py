"""Secure aggregation at the server: request protected vectors, check each reply, sum them, decrypt the sum.

The same for updates and metrics. Each payload is added to the sum as it arrives, and none is stored. Of a device the
server learns only its name, its reply or refusal, and the time taken; only with plain sums does it see each payload.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedface.aggregation.homomorphic import make_server
from fedface.aggregation.payload import Aggregation, Payload, PlainConfig
from fedface.aggregation.plain import PlainAggregation
from fedface.errors import AggregationError, FederationError
from fedface.experiment import Experiment
from fedface.messages.cohort import Cohort
from fedface.messages.messages import (
    DecryptResult,
    DecryptTask,
    EvaluateResult,
    EvaluateTask,
    Failure,
    Refusal,
    Reply,
    TrainResult,
    TrainTask,
)
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise
from fedface.reports.run_record import RefusalRecord
from fedface.tensor_types import Vector

Result = TrainResult | EvaluateResult

LARGEST = 1e3  # public ranges; encrypted numbers are limited to 1


@dataclass(frozen=True, kw_only=True)
class RoundSum:
    """One sum over devices, and what it cost."""

    members: tuple[int, ...]  # whose vectors are in the sum
    devices: tuple[str, ...]  # their names, in the same order
    refusals: tuple[RefusalRecord, ...]
    dropped: tuple[RefusalRecord, ...]
    withdrawn: Mapping[int, str]  # members whose owners have withdrawn, and their names
    total: Vector  # decrypted, in public ranges, (d,)
    count: int  # how many vectors are in it
    bytes_up: int
    bytes_reveal: int
    seconds: float
    seconds_protect: float
    seconds_combine: float
    seconds_reveal: float


def collect_and_sum(
    experiment: Experiment,
    cohort: Cohort,
    members: Sequence[int],
    task: TrainTask | EvaluateTask,
    length: int,
    on_progress: Callable[[int], None],
    on_withdrawal: Callable[[Mapping[int, str]], None],
) -> RoundSum:
    """Send every member the task, sum the usable replies, and have the sum decrypted.

    Args:
        experiment: Gives the aggregation protocol and min_responses.
        length: d, how many numbers a reply holds.
        on_withdrawal: Called with the member whose owner has withdrawn, and its name, as soon as that arrives.

    Raises:
        FederationError: Too few usable replies, or no device could decrypt the sum.
    """
    started = time.perf_counter()
    server = make_server(experiment.aggregation, experiment.agreement)
    arrivals = _Arrivals(server, task, length)
    for done, (member, reply) in enumerate(cohort.ask(task, members), start=1):
        if isinstance(reply, Refusal) and reply.withdrawn:
            arrivals.withdrawn[member] = reply.device
            on_withdrawal({member: reply.device})
        arrivals.add(member, reply)
        on_progress(done)
    summed, refusals, dropped = arrivals.result()
    if summed is None or len(summed.devices) < experiment.min_responses:
        reasons = "; ".join(f"{r.device}: {r.reason}" for r in (*refusals, *dropped))
        raise FederationError(
            f"round {task.round}: {0 if summed is None else len(summed.devices)} of {len(members)} devices gave a "
            f"usable reply, {experiment.min_responses} are needed ({reasons or 'no reasons given'}). "
            "Nothing was applied; fix the cause and resume the run."
        )
    combined = time.perf_counter()
    ordered = dict(sorted(summed.devices.items()))
    decrypted = _decrypt(experiment, cohort, server, summed.total, list(ordered), task)
    finished = time.perf_counter()
    encrypted = not isinstance(experiment.aggregation, PlainConfig)
    return RoundSum(
        members=tuple(ordered),
        devices=tuple(ordered.values()),
        refusals=refusals,
        dropped=dropped,
        withdrawn=arrivals.withdrawn,
        total=decrypted,
        count=summed.total.count,
        bytes_up=summed.bytes_up,
        bytes_reveal=summed.total.nbytes + 4 * length if encrypted else 0,
        seconds=finished - started,
        seconds_protect=summed.seconds_protect,
        seconds_combine=arrivals.seconds,
        seconds_reveal=finished - combined,
    )


def noised_sum(total: Vector, dp: DPParameters) -> Vector:
    """A sum, with the server's noise added once if noise is central.

    The Gaussian mechanism on a sum of vectors that each device has clipped to `dp.update_clip_norm` (McMahan et al.
    2018, arXiv:1710.06963), before anything is computed from the sum.

    Args:
        total: In public ranges, (d,).
        dp: The round's parameters.
    """
    mechanism = dp.sum_mechanism()
    if mechanism is None or dp.noise != "central":
        return total
    return add_noise(total, mechanism, SecretNoise())


@dataclass(kw_only=True)
class _KeySum:
    """The sum of the updates that are encrypted with one key, or not at all."""

    total: Payload
    devices: dict[int, str]  # member -> its name
    bytes_up: int
    seconds_protect: float


class _Arrivals:
    """The replies of one round, each checked and summed as it arrives.

    None is stored: memory is needed for one sum and one reply, however many devices there are.
    """

    def __init__(self, server: Aggregation, task: TrainTask | EvaluateTask, length: int) -> None:
        self.withdrawn: dict[int, str] = {}
        self.seconds = 0.0  # of checking and summing
        self._server, self._round, self._length = server, task.round, length
        self._expected = TrainResult if isinstance(task, TrainTask) else EvaluateResult
        self._sums: dict[str, _KeySum] = {}  # by the public name of the key
        self._seen: set[tuple[str, bytes]] = set()
        self._refusals: dict[int, RefusalRecord] = {}
        self._dropped: dict[int, RefusalRecord] = {}

    def add(self, member: int, reply: Reply | Failure) -> None:
        """Add one member's reply to the sum, or note why it is left out."""
        name = f"device {member}"
        match reply:
            case Refusal(device=device, reason=reason):
                self._refusals[member] = RefusalRecord(device=device, reason=reason)
            case TrainResult() | EvaluateResult() if isinstance(reply, self._expected):
                started = time.perf_counter()
                try:
                    self._sum(member, reply)
                except AggregationError as error:
                    self._dropped[member] = RefusalRecord(device=reply.device, reason=str(error))
                self.seconds += time.perf_counter() - started
            case Failure(reason=reason):
                self._dropped[member] = RefusalRecord(device=name, reason=reason)
            case _:
                self._dropped[member] = RefusalRecord(device=name, reason="replied to another task")

    def _sum(self, member: int, reply: Result) -> None:
        """Raises AggregationError, and leaves the sums as they were, for a payload that cannot be added."""
        payload = _checked(reply.payload, self._server, self._round, self._length)
        key = str(payload.header.get("key", ""))
        # One update must count once. Two programs with one state folder send one stored reply; no two ciphertexts are
        # equal unless one is a copy; without encryption two devices of other names may send the same numbers.
        content = "" if key else reply.device, hashlib.sha256(b"".join(payload.parts[:1])).digest()
        if content in self._seen:
            raise AggregationError(
                "another device sent the same bytes: if two programs use one state folder, stop one"
            )
        known = self._sums.get(key)
        if known is None:
            known = self._sums[key] = _KeySum(
                total=self._server.combine([payload]), devices={}, bytes_up=0, seconds_protect=0.0
            )
        else:
            known.total = self._server.combine([known.total, payload])
        self._seen.add(content)
        known.devices[member] = reply.device
        known.bytes_up += len(reply.payload)
        known.seconds_protect = max(known.seconds_protect, reply.seconds_protect)

    def result(self) -> tuple[_KeySum | None, tuple[RefusalRecord, ...], tuple[RefusalRecord, ...]]:
        """The sum under the key that most devices use, if there is any; refusals; and what was dropped."""
        most = max(self._sums, key=lambda key: len(self._sums[key].devices), default="")
        reason = f"its update is encrypted with another key than most devices' ({most}); give it a copy of that key"
        others = {
            member: RefusalRecord(device=device, reason=reason)
            for key, known in self._sums.items()
            if key != most
            for member, device in known.devices.items()
        }
        return self._sums.get(most), _in_order(self._refusals), _in_order(self._dropped | others)


def _in_order(records: Mapping[int, RefusalRecord]) -> tuple[RefusalRecord, ...]:
    return tuple(records[member] for member in sorted(records))


def _checked(written: bytes, server: Aggregation, number: int, length: int) -> Payload:
    """The payload, if it is one vector of this round and length, in its range. Raises AggregationError."""
    payload = Payload.from_bytes(written)
    if (payload.round, payload.length, payload.count) != (number, length, 1):
        raise AggregationError(
            f"expected one update of round {number} with {length} weights, got {payload.count} of round "
            f"{payload.round} with {payload.length}"
        )
    if isinstance(server, PlainAggregation):
        largest = float(server.reveal(payload).abs().max())
        if largest > LARGEST:
            raise AggregationError(
                f"expected numbers of about one public range, {LARGEST:.0f} at most, got {largest:.3g}"
            )
    return payload


def _decrypt(
    experiment: Experiment, cohort: Cohort, server: Aggregation, total: Payload, members: list[int],
    task: TrainTask | EvaluateTask,
) -> Vector:  # fmt: skip
    """The sum, read by the server if it was never encrypted, otherwise decrypted by the first device that can."""
    if isinstance(experiment.aggregation, PlainConfig):
        return server.reveal(total)
    decrypt = DecryptTask(
        sum_of="updates" if isinstance(task, TrainTask) else "metrics",
        run=task.run,
        round=task.round,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        total=total.to_bytes(),
    )
    reasons = []
    for member in members:
        match dict(cohort.ask(decrypt, [member]))[member]:
            case DecryptResult(total=vector) if vector.shape == (total.length,) and bool(
                torch.isfinite(vector).all()
            ):
                return vector
            case Refusal(reason=reason) | Failure(reason=reason):
                reasons.append(f"device {member}: {reason}")
            case _:
                reasons.append(f"device {member}: decrypted something else")
    raise FederationError(
        f"round {task.round}: no device decrypted the sum ({'; '.join(reasons)}); resume to try again"
    )
