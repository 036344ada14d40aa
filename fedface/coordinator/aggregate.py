"""Secure aggregation at the server: request protected vectors, check each reply, sum them, and reveal the sum.

The same for updates and metrics. Each payload is added to the sum as it arrives, and none is stored. Of a device the
server learns only its name, its replies or refusals, and the time taken; only with plain sums does it see each vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedface.aggregation.payload import Payload, PlainConfig, SumOf
from fedface.aggregation.protocols import server_sum
from fedface.aggregation.sums import Request, ServerSum, SumResult
from fedface.atomic_io import replace_bytes
from fedface.errors import AggregationError, FederationError
from fedface.experiment import Experiment
from fedface.messages.cohort import Cohort
from fedface.messages.messages import (
    EvaluateResult,
    EvaluateTask,
    ExchangeResult,
    ExchangeTask,
    Failure,
    Refusal,
    Reply,
    TrainResult,
    TrainTask,
    sum_context,
)
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise
from fedface.reports.run_record import RefusalRecord
from fedface.tensor_types import Vector

COHORT = ".cohort"  # how a file ends that has the number of devices that a sum was begun with


@dataclass(frozen=True, kw_only=True)
class SumListener:
    """What a run does while a sum is made."""

    progress: Callable[[int], None]  # with the number of replies so far, of each exchange
    revealing: Callable[[int], None]  # with how many members are asked first, when the sum needs exchanges
    # With a member whose owner has withdrawn, and its name, as soon as that arrives.
    withdrawn: Callable[[Mapping[int, str]], None]
    given_up: Callable[[str], None]  # with the reason why the sum cannot be revealed
    folder: Path | None = None  # where sums that are under way are stored

    def file(self, sum_of: SumOf, round: int) -> Path | None:
        """The file of the sum of a round."""
        return None if self.folder is None else self.folder / f"{sum_of}-{round:03d}.sum"

    def cohort(self, sum_of: SumOf, round: int, members: int) -> int:
        """How many devices a sum was first requested from, which their keys are signed for; `members` if it is new."""
        if (sum_file := self.file(sum_of, round)) is None:
            return members
        path = sum_file.with_suffix(COHORT)
        if path.exists():
            return int(path.read_text(encoding="utf-8"))
        path.parent.mkdir(exist_ok=True, mode=0o700)
        replace_bytes(path, str(members).encode())
        return members

    def forget(self, sum_of: SumOf, round: int) -> None:
        """Delete the files of a sum whose result is stored."""
        if (path := self.file(sum_of, round)) is not None:
            path.unlink(missing_ok=True)
            path.with_suffix(COHORT).unlink(missing_ok=True)
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()


@dataclass(frozen=True, kw_only=True)
class RoundSum:
    """One sum over devices, and what it cost."""

    members: tuple[int, ...]  # whose vectors are in the sum
    devices: tuple[str, ...]  # their names, in the same order
    refusals: tuple[RefusalRecord, ...]
    dropped: tuple[RefusalRecord, ...]
    withdrawn: Mapping[int, str]  # members whose owners have withdrawn, and their names
    total: Vector | None  # in public ranges, (d,); None: the sum was given up
    count: int  # how many vectors are in it; at least as many as members
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
    listener: SumListener,
) -> RoundSum:
    """Send every member the task, sum the usable replies, and reveal the sum.

    A sum that was begun before and cannot be revealed this time either is given up: devices that have a part in it do
    not come back, or spoil it, and each answers for it once. Others cannot take their place.

    Args:
        experiment: Gives the aggregation protocol and min_responses.
        length: d, how many numbers a vector has.

    Raises:
        FederationError: Too few usable replies, or the sum could not be revealed for the first time. The run can be
            resumed.
    """
    started = time.perf_counter()
    context = sum_context(task)
    if not isinstance(experiment.aggregation, PlainConfig):
        task = replace(task, cohort=listener.cohort(context.sum_of, task.round, len(members)))
        context = sum_context(task)
    asked = task.config if isinstance(task, TrainTask) else task.request
    stored = listener.file(context.sum_of, task.round)
    begun = stored is not None and stored.exists()
    try:
        server = server_sum(
            experiment.aggregation,
            experiment.agreement,
            context,
            length,
            dp=asked.dp,
            stored=stored,
            fewest=experiment.min_responses,
        )
    except AggregationError as error:
        raise FederationError(f"round {task.round}: {error}") from error
    arrivals = _Arrivals(
        server=server, expected=TrainResult if isinstance(task, TrainTask) else EvaluateResult
    )
    for done, (member, reply) in enumerate(cohort.ask(dict.fromkeys(members, task)), start=1):
        if isinstance(reply, Refusal) and reply.withdrawn:
            arrivals.withdrawn[member] = reply.device
            listener.withdrawn({member: reply.device})
        arrivals.add(member, reply)
        listener.progress(done)
    arrivals.close()
    combined = time.perf_counter()
    revealing = _Revealing(
        experiment=experiment, cohort=cohort, task=task, sum_of=context.sum_of, listener=listener
    )
    try:
        if len(arrivals.devices) < experiment.min_responses:
            reasons = "; ".join(f"{r.device}: {r.reason}" for r in (*arrivals.refusals, *arrivals.dropped))
            raise FederationError(
                f"round {task.round}: {len(arrivals.devices)} of {len(members)} devices gave a usable reply, "
                f"{experiment.min_responses} are needed ({reasons or 'no reasons given'}). "
                "Nothing was applied; fix the cause and resume the run"
            )
        revealed = revealing.reveal(server)
    except FederationError as error:
        if not begun:
            again = "; resume to try again, once more" if stored is not None and stored.exists() else ""
            raise FederationError(f"{error}{again}") from error
        listener.given_up(str(error))
        revealed = SumResult(total=torch.zeros(length), members=frozenset(), count=0)
    finished = time.perf_counter()
    return RoundSum(
        members=tuple(sorted(revealed.members)),
        devices=tuple(arrivals.devices[member] for member in sorted(revealed.members)),
        refusals=arrivals.refusals,
        dropped=(
            *arrivals.dropped,
            *(
                RefusalRecord(
                    device=name, reason=revealing.reasons.get(member, "its vector is not in the sum")
                )
                for member, name in sorted(arrivals.devices.items())
                if member not in revealed.members
            ),
        ),
        withdrawn=arrivals.withdrawn,
        total=revealed.total if revealed.count else None,
        count=revealed.count,
        bytes_up=arrivals.bytes_up + revealing.bytes_up,
        bytes_reveal=revealing.bytes,
        seconds=finished - started,
        seconds_protect=arrivals.seconds_protect,
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
class _Arrivals:
    """The replies of one round, each checked and summed as it arrives.

    None is stored: memory is needed for one sum and one reply, however many devices there are.
    """

    server: ServerSum
    expected: type[TrainResult] | type[EvaluateResult]
    devices: dict[int, str] = field(default_factory=dict)  # the names of those whose replies are usable
    withdrawn: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    seconds: float = 0.0  # of checking and summing
    seconds_protect: float = 0.0
    _refusals: dict[int, RefusalRecord] = field(default_factory=dict)
    _dropped: dict[int, RefusalRecord] = field(default_factory=dict)

    def add(self, member: int, reply: Reply | Failure) -> None:
        """Add one member's reply to the sum, or note why it is left out."""
        name = f"device {member}"
        match reply:
            case Refusal(device=device, reason=reason):
                self._refusals[member] = RefusalRecord(device=device, reason=reason)
            case TrainResult() | EvaluateResult() if isinstance(reply, self.expected):
                started = time.perf_counter()
                try:
                    self.server.accept(member, Payload.from_bytes(reply.payload), reply.device)
                except AggregationError as error:
                    self._dropped[member] = RefusalRecord(device=reply.device, reason=str(error))
                else:
                    self.devices[member] = reply.device
                    self.bytes_up += len(reply.payload)
                    self.seconds_protect = max(self.seconds_protect, reply.seconds_protect)
                self.seconds += time.perf_counter() - started
            case Failure(reason=reason):
                self._dropped[member] = RefusalRecord(device=name, reason=reason)
            case _:
                self._dropped[member] = RefusalRecord(device=name, reason="replied to another task")

    def close(self) -> None:
        """Leave out what cannot be in the sum after all."""
        for member, reason in self.server.close().items():
            self._dropped[member] = RefusalRecord(device=self.devices.pop(member), reason=reason)

    @property
    def refusals(self) -> tuple[RefusalRecord, ...]:
        """By member."""
        return tuple(self._refusals[member] for member in sorted(self._refusals))

    @property
    def dropped(self) -> tuple[RefusalRecord, ...]:
        """By member."""
        return tuple(self._dropped[member] for member in sorted(self._dropped))


@dataclass(kw_only=True)
class _Revealing:
    """The exchanges that reveal a sum."""

    experiment: Experiment
    cohort: Cohort
    task: TrainTask | EvaluateTask
    sum_of: SumOf
    listener: SumListener
    reasons: dict[int, str] = field(default_factory=dict)  # why members did not take part in one
    bytes_up: int = 0  # of masked vectors
    bytes: int = 0  # of all else, both ways

    def reveal(self, server: ServerSum) -> SumResult:
        """The sum, after all exchanges. Raises FederationError if it cannot be revealed."""
        try:
            for number, request in enumerate(server.exchanges()):
                if number == 0:
                    self.listener.revealing(len(request.contents))
                self._ask(request)
            return server.result()
        except AggregationError as error:
            given = "; ".join(f"device {member}: {reason}" for member, reason in sorted(self.reasons.items()))
            raise FederationError(
                f"round {self.task.round}: {error} ({given or 'no reasons given'})"
            ) from error

    def _ask(self, request: Request) -> None:
        """Ask one exchange of its members."""
        tasks = {  # one object for all that are asked the same
            content: ExchangeTask(
                run=self.task.run,
                round=self.task.round,
                aggregation=self.experiment.aggregation,
                agreement=self.experiment.agreement,
                exchange=request.exchange,
                content=content,
                sum_of=self.sum_of,
            )
            for content in set(request.contents.values())
        }
        self.bytes += sum(map(len, request.contents.values()))
        asked = {member: tasks[content] for member, content in request.contents.items()}
        for done, (member, reply) in enumerate(self.cohort.ask(asked), start=1):
            self.listener.progress(done)
            match reply:
                case ExchangeResult(content=content):
                    if request.exchange == "masked":
                        self.bytes_up += len(content)
                    else:
                        self.bytes += len(content)
                    try:
                        request.receive(member, content)
                    except AggregationError as error:
                        self.reasons[member] = str(error)
                case Refusal(reason=reason) | Failure(reason=reason):
                    self.reasons[member] = reason
                case _:
                    self.reasons[member] = "replied to another task"
