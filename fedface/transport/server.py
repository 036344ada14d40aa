"""The server's side of Flower: the devices of a Grid as a `Cohort`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedface.errors import FederationError
from fedface.messages.messages import (
    EvaluateResult,
    EvaluateTask,
    ExchangeResult,
    ExchangeTask,
    Failure,
    Refusal,
    Reply,
    Task,
    TrainResult,
    TrainTask,
    to_message,
)
from fedface.messages.parsing import read_reply
from fedface.transport.wire import EVALUATE, EXCHANGE, MAX_REASON, TRAIN, from_record, to_record


class GridCohort:
    """The devices of a Grid. They are numbered from 0 in the order in which they connected."""

    def __init__(
        self,
        grid: Grid,
        *,
        come_within: float = 600.0,
        answer_within: float = 3600.0,
        report: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Timeouts in seconds for devices to connect and for the replies of one round.

        `report` gets a sentence when devices are waited for.
        """
        self._report = report
        self._grid = grid
        self._come_within = come_within
        self._answer_within = answer_within
        self._nodes: list[int] = []  # number -> Flower's id of the node

    def members(self, count: int) -> Sequence[int]:
        """The numbers of the connected devices, ascending; waits until at least `count` are connected.

        Raises:
            FederationError: They did not connect in time.
        """
        wait, before = _Wait(self._come_within), -1
        while len(nodes := sorted(self._grid.get_node_ids())) < count:
            if len(nodes) != before:
                self._report(f"waiting for {count} devices; {len(nodes)} are connected")
                before = len(nodes)
            if wait.over():
                raise FederationError(
                    f"expected {count} devices, {len(nodes)} connected within {self._come_within:.0f} s; start the "
                    "others, or lower at_least, and continue the run (in a simulation: "
                    f"--federation-config 'num-supernodes={count}')"
                )
        self._nodes += [node for node in nodes if node not in self._nodes]
        return sorted(self._nodes.index(node) for node in nodes)

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        """Send tasks of one kind to devices; their numbers and replies as they arrive, one per task, none missing."""
        waiting: dict[str, int] = {}
        records: dict[int, RecordDict] = {}  # of equal tasks one, by identity
        for number, task in tasks.items():
            kind, _ = _expected(task)
            if id(task) not in records:
                records[id(task)] = to_record(to_message(task))
            record = records[id(task)]
            ttl = None if math.isinf(self._answer_within) else self._answer_within
            message = FlowerMessage(record, self._nodes[number], kind, ttl=ttl, group_id=str(task.round))
            # One at a time: Flower omits undeliverable messages from its result.
            names = [name for name in self._grid.push_messages([message]) if name]
            if names:
                waiting[names[0]] = number
            else:
                yield number, self._failure(number, "the device is no longer connected")
        wait = _Wait(self._answer_within)
        while waiting:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                number = waiting.get(reply.metadata.reply_to_message_id, -1)
                from_another = reply.has_content() and reply.metadata.src_node_id != self._nodes[number]
                if number < 0 or from_another:
                    continue
                del waiting[reply.metadata.reply_to_message_id]
                answer = _read(reply, tasks[number])
                yield number, self._failure(number, answer.reason) if isinstance(answer, Failure) else answer
            if not replies and wait.over():
                break
        for number in waiting.values():
            yield number, self._failure(number, f"no answer within {self._answer_within:.0f} s")

    def _failure(self, number: int, reason: str) -> Failure:
        """With the node, by which an operator knows the device."""
        return Failure(f"{reason} (node {self._nodes[number]})")


class _Wait:
    """Exponential backoff between polls, at most two seconds, until the timeout."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = 0.05

    def over(self) -> bool:
        left = self._until - time.monotonic()
        time.sleep(max(0.0, min(self._pause, left)))
        self._pause = min(1.5 * self._pause, 2.0)
        return left <= 0


def _expected(task: Task) -> tuple[str, type[TrainResult] | type[EvaluateResult] | type[ExchangeResult]]:
    """Flower's message type for a task, and the type of its result."""
    match task:
        case TrainTask():
            return TRAIN, TrainResult
        case EvaluateTask():
            return EVALUATE, EvaluateResult
        case ExchangeTask():
            return EXCHANGE, ExchangeResult


def _read(reply: FlowerMessage, task: Task) -> Reply | Failure:
    if reply.has_error():
        reason = reply.error.reason or f"Flower's error {reply.error.code}"
        return Failure("".join(letter if letter.isprintable() else " " for letter in reason[:MAX_REASON]))
    try:
        answer = read_reply(from_record(reply.content))
    except FederationError as error:
        return Failure(str(error))
    _, expected = _expected(task)
    if isinstance(answer, (expected, Refusal)):
        return answer
    return Failure(f"expected a {expected.__name__}, got a {type(answer).__name__}")
