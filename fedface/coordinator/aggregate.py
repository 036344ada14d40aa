"""What the server does with protected vectors, of whatever kind: ask, check each answer, name who gave none, sum, open.

Called by rounds.py (updates) and evaluation.py (figures). The server never looks into a single payload, keeps none
once they are summed, and learns nothing of a device but its name, its "yes" or "no", and the time it took.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedface.aggregation.homomorphic import make_server
from fedface.aggregation.payload import Aggregation, Payload, PlainConfig
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
    TrainResult,
    TrainTask,
)
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise
from fedface.reports.run_record import RefusalRecord
from fedface.tensor_types import Vector

Answer = TrainResult | EvaluateResult


@dataclass(frozen=True, kw_only=True)
class RoundSum:
    """One sum over devices, and what it cost."""

    members: tuple[int, ...]  # whose vectors are in the sum
    devices: tuple[str, ...]  # their names, in the same order
    refusals: tuple[RefusalRecord, ...]
    dropped: tuple[RefusalRecord, ...]
    left: Mapping[int, str]  # members whose owners have left the run, and the names they go by
    total: Vector  # opened, in public ranges, (d,)
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
    step: Callable[[int], None],
    gone: Callable[[Mapping[int, str]], None],
) -> RoundSum:
    """Ask every member, sum the usable answers, and have the sum opened.

    Args:
        experiment: Says how sums are protected and how few answers are too few.
        cohort: Who carries messages.
        members: Whom to ask.
        task: What.
        length: d, how many numbers an answer holds.
        step: Told how many have answered.
        gone: Told which members' owners have left, and under which names, before anything else can fail.

    Raises:
        FederationError: Too few usable answers, or nobody could open the sum.
    """
    started = time.perf_counter()
    heard: set[int] = set()

    def hear(member: int) -> None:
        heard.add(member)
        step(len(heard))

    answers = cohort.ask(task, members, hear)
    server = make_server(experiment.aggregation, experiment.agreement)
    wanted = TrainResult if isinstance(task, TrainTask) else EvaluateResult
    left = {
        member: answer.device
        for member, answer in answers.items()
        if isinstance(answer, Refusal) and answer.withdrawn
    }
    if left:
        gone(left)
    usable, refusals, dropped = _sorted_answers(answers, server, task.round, length, wanted)
    if len(usable) < experiment.min_responses:
        reasons = "; ".join(f"{r.device}: {r.reason}" for r in (*refusals, *dropped))
        raise FederationError(
            f"round {task.round}: {len(usable)} of {len(members)} devices gave a usable answer, "
            f"{experiment.min_responses} are needed ({reasons or 'no reasons given'}). "
            "Nothing was applied; mend the cause and resume the run."
        )
    combining = time.perf_counter()
    total = server.combine([payload for _, payload in usable.values()])
    combined = time.perf_counter()
    opened = _open_sum(experiment, cohort, server, total, list(usable), task)
    revealed = time.perf_counter()
    hidden = not isinstance(experiment.aggregation, PlainConfig)
    return RoundSum(
        members=tuple(usable),
        devices=tuple(answer.device for answer, _ in usable.values()),
        refusals=tuple(refusals),
        dropped=tuple(dropped),
        left=left,
        total=opened,
        count=total.count,
        bytes_up=sum(len(answer.payload) for answer, _ in usable.values()),
        bytes_reveal=total.nbytes + 4 * length if hidden else 0,
        seconds=revealed - started,
        seconds_protect=max(answer.seconds_protect for answer, _ in usable.values()),
        seconds_combine=combined - combining,
        seconds_reveal=revealed - combined,
    )


def noised_sum(total: Vector, terms: DPParameters) -> Vector:
    """The sum of a round or a question, noised once where that is the server's part: the promise per library.

    The Gaussian mechanism on a sum of vectors that each device has cut to `terms.update_clip_norm` (McMahan et al. 2018,
    arXiv:1710.06963); before anything is made of the sum.

    Args:
        total: In public ranges, (d,).
        terms: What was agreed.
    """
    at_server = terms.central_mechanism()
    return total if at_server is None else at_server.noise(total, SecretNoise())


def _sorted_answers(
    answers: Mapping[int, Any], server: Aggregation, number: int, length: int, wanted: type[Answer]
) -> tuple[dict[int, tuple[Answer, Payload]], list[RefusalRecord], list[RefusalRecord]]:
    """Usable answers by member, refusals, and what was dropped; every device is named."""
    usable: dict[int, tuple[Answer, Payload]] = {}
    refusals, dropped = [], []
    for member, answer in sorted(answers.items()):
        name = f"device {member}"
        match answer:
            case Refusal(device=device, reason=reason):
                refusals.append(RefusalRecord(device=device, reason=reason))
            case TrainResult() | EvaluateResult() if isinstance(answer, wanted):
                try:
                    usable[member] = (answer, _checked(answer.payload, server, number, length))
                except AggregationError as error:
                    dropped.append(RefusalRecord(device=answer.device, reason=str(error)))
            case Failure(reason=reason):
                dropped.append(RefusalRecord(device=name, reason=reason))
            case _:
                dropped.append(RefusalRecord(device=name, reason="answered another question"))
    strangers = _under_another_key(usable)
    dropped += [
        RefusalRecord(device=usable.pop(member)[0].device, reason=why) for member, why in strangers.items()
    ]
    return usable, refusals, dropped


def _under_another_key(usable: Mapping[int, tuple[Answer, Payload]]) -> dict[int, str]:
    """Members whose update cannot be added to the others', and why: the key that most devices hold decides."""
    keys = {member: str(payload.header.get("key", "")) for member, (_, payload) in usable.items()}
    if len(set(keys.values())) < 2:
        return {}
    most = Counter(keys.values()).most_common(1)[0][0]
    why = f"its update is under another key than {most}, which most devices hold; give it a copy of that key"
    return {member: why for member, key in keys.items() if key != most}


def _checked(written: bytes, server: Aggregation, number: int, length: int) -> Payload:
    """One update of this round and size, that the server can add. Raises AggregationError."""
    payload = Payload.from_bytes(written)
    if (payload.round, payload.length, payload.count) != (number, length, 1):
        raise AggregationError(
            f"wanted one update of round {number} with {length} weights, got {payload.count} of round "
            f"{payload.round} with {payload.length}"
        )
    server.combine([payload])
    return payload


def _open_sum(
    experiment: Experiment, cohort: Cohort, server: Aggregation, total: Payload, members: list[int],
    task: TrainTask | EvaluateTask,
) -> Vector:  # fmt: skip
    """The sum, opened by the server if it was never hidden, otherwise by the first device that can."""
    if isinstance(experiment.aggregation, PlainConfig):
        opened = server.reveal(total)
        if not bool(torch.isfinite(opened).all()):
            raise FederationError(
                f"round {task.round}: the sum of the answers is not finite; nothing was applied"
            )
        return opened
    reveal = DecryptTask(
        sum_of="updates" if isinstance(task, TrainTask) else "metrics",
        run=task.run,
        round=task.round,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        total=total.to_bytes(),
    )
    reasons = []
    for member in members:
        answer = cohort.ask(reveal, [member], lambda done: None)[member]
        match answer:
            case DecryptResult(total=vector) if vector.shape == (total.length,) and bool(
                torch.isfinite(vector).all()
            ):
                return vector
            case Refusal(reason=reason) | Failure(reason=reason):
                reasons.append(f"device {member}: {reason}")
            case _:
                reasons.append(f"device {member}: opened something else")
    raise FederationError(
        f"round {task.round}: no device opened the sum ({'; '.join(reasons)}); resume to try again"
    )
