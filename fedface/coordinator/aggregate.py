"""Secure aggregation at the server: request protected vectors, check each reply, sum them, decrypt the sum.

The same for updates and metrics. The server stores no payload after summing, and learns of a device only its name, its
reply or refusal, and the time taken; only with plain sums does it see each payload.
"""

from __future__ import annotations

import time
from collections import Counter
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
        on_withdrawal: Called with the members whose owners have withdrawn, and their names, before anything can fail.

    Raises:
        FederationError: Too few usable replies, or no device could decrypt the sum.
    """
    started = time.perf_counter()
    replied: set[int] = set()

    def on_reply(member: int) -> None:
        replied.add(member)
        on_progress(len(replied))

    replies = cohort.ask(task, members, on_reply)
    server = make_server(experiment.aggregation, experiment.agreement)
    expected = TrainResult if isinstance(task, TrainTask) else EvaluateResult
    withdrawn = {
        member: reply.device
        for member, reply in replies.items()
        if isinstance(reply, Refusal) and reply.withdrawn
    }
    if withdrawn:
        on_withdrawal(withdrawn)
    usable, refusals, dropped = _sort_replies(replies, server, task.round, length, expected)
    if len(usable) < experiment.min_responses:
        reasons = "; ".join(f"{r.device}: {r.reason}" for r in (*refusals, *dropped))
        raise FederationError(
            f"round {task.round}: {len(usable)} of {len(members)} devices gave a usable reply, "
            f"{experiment.min_responses} are needed ({reasons or 'no reasons given'}). "
            "Nothing was applied; fix the cause and resume the run."
        )
    combining = time.perf_counter()
    total = server.combine([payload for _, payload in usable.values()])
    combined = time.perf_counter()
    decrypted = _decrypt(experiment, cohort, server, total, list(usable), task)
    finished = time.perf_counter()
    encrypted = not isinstance(experiment.aggregation, PlainConfig)
    return RoundSum(
        members=tuple(usable),
        devices=tuple(reply.device for reply, _ in usable.values()),
        refusals=tuple(refusals),
        dropped=tuple(dropped),
        withdrawn=withdrawn,
        total=decrypted,
        count=total.count,
        bytes_up=sum(len(reply.payload) for reply, _ in usable.values()),
        bytes_reveal=total.nbytes + 4 * length if encrypted else 0,
        seconds=finished - started,
        seconds_protect=max(reply.seconds_protect for reply, _ in usable.values()),
        seconds_combine=combined - combining,
        seconds_reveal=finished - combined,
    )


def noised_sum(total: Vector, dp: DPParameters) -> Vector:
    """A sum, with the server's noise added once if the privacy unit is a library.

    The Gaussian mechanism on a sum of vectors that each device has clipped to `dp.update_clip_norm` (McMahan et al.
    2018, arXiv:1710.06963), before anything is computed from the sum.

    Args:
        total: In public ranges, (d,).
        dp: The round's parameters.
    """
    central = dp.central_mechanism()
    return total if central is None else add_noise(total, central, SecretNoise())


def _sort_replies(
    replies: Mapping[int, Reply | Failure],
    server: Aggregation,
    number: int,
    length: int,
    expected: type[Result],
) -> tuple[dict[int, tuple[Result, Payload]], list[RefusalRecord], list[RefusalRecord]]:
    """Usable replies by member, refusals, and dropped replies; every device is named."""
    usable: dict[int, tuple[Result, Payload]] = {}
    refusals, dropped = [], []
    for member, reply in sorted(replies.items()):
        name = f"device {member}"
        match reply:
            case Refusal(device=device, reason=reason):
                refusals.append(RefusalRecord(device=device, reason=reason))
            case TrainResult() | EvaluateResult() if isinstance(reply, expected):
                try:
                    usable[member] = (reply, _checked(reply.payload, server, number, length))
                except AggregationError as error:
                    dropped.append(RefusalRecord(device=reply.device, reason=str(error)))
            case Failure(reason=reason):
                dropped.append(RefusalRecord(device=name, reason=reason))
            case _:
                dropped.append(RefusalRecord(device=name, reason="replied to another task"))
    for member, reason in (_repeated(usable) | _under_another_key(usable)).items():
        dropped.append(RefusalRecord(device=usable.pop(member)[0].device, reason=reason))
    return usable, refusals, dropped


def _repeated(usable: Mapping[int, tuple[Result, Payload]]) -> dict[int, str]:
    """Members that sent what another one of the same name sent, and the reason to report.

    Two programs with one state folder send one stored reply: it is one update, and a sum of several must not count it
    as two.
    """
    first: dict[tuple[str, bytes], int] = {}
    reason = "another device of this name sent the same bytes: two programs use one state folder; stop one"
    return {
        member: reason
        for member, (reply, _) in usable.items()
        if first.setdefault((reply.device, reply.payload), member) != member
    }


def _under_another_key(usable: Mapping[int, tuple[Result, Payload]]) -> dict[int, str]:
    """Members whose payload is encrypted with another key than most, and the reason to report."""
    keys = {member: str(payload.header.get("key", "")) for member, (_, payload) in usable.items()}
    if len(set(keys.values())) < 2:
        return {}
    most = Counter(keys.values()).most_common(1)[0][0]
    reason = (
        f"its update is encrypted with another key than most devices' ({most}); give it a copy of that key"
    )
    return {member: reason for member, key in keys.items() if key != most}


def _checked(written: bytes, server: Aggregation, number: int, length: int) -> Payload:
    """The payload, if it is one vector of this round and length that the server can add. Raises AggregationError."""
    payload = Payload.from_bytes(written)
    if (payload.round, payload.length, payload.count) != (number, length, 1):
        raise AggregationError(
            f"expected one update of round {number} with {length} weights, got {payload.count} of round "
            f"{payload.round} with {payload.length}"
        )
    server.combine([payload])
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
        match cohort.ask(decrypt, [member], lambda done: None)[member]:
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
