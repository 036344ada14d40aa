"""The only door to Flower: our messages in its records, our devices in its ClientApp, our cohort on its Grid.

Called by clients/app.py and server/app.py, and by the command line for runs in one process. The same
ClientApp answers in three places: in this process (`InProcessGrid`, which still turns every message into
bytes and back), in Ray's actors, and on a SuperNode at somebody's home.

An error's text may name a photo or a folder of the owner, so only errors about the task itself travel in
their own words; of all others the server learns that there was one, and the owner reads it in the log.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

# Before Flower and Ray are imported: no telemetry, no look for updates.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, RecordDict, UserConfig
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedface.coordinator.cohort import OnReply
from fedface.device.client import Device, handle_task
from fedface.device.config import load_device
from fedface.errors import FederationError, FedfaceError, WeightsError
from fedface.experiment import Experiment, RemoteDevices
from fedface.messages.messages import (
    DecryptResult,
    DecryptTask,
    EvaluateResult,
    EvaluateTask,
    Failure,
    Message,
    Refusal,
    Reply,
    Task,
    TrainResult,
    TrainTask,
)
from fedface.messages.parsing import read_reply, read_task
from fedface.simulation.devices import simulated_device
from fedface.transport.run_config import devices_folder, read_run_config

log = logging.getLogger("fedface.device")

STYPE = "fedface.bytes"
HEADER, BLOBS = "fedface", "blobs"  # the two records of a message
LONGEST_HEADER = 1 << 20  # characters; ours have about two thousand
LONGEST_REASON = 500  # characters of an error that are kept
DEVICE_ERROR = 500  # Flower keeps codes below 100 for itself
SERVER_NODE = 1  # Flower's name for the server's end of a message
RUN = 1  # a grid in one process has one run


def to_record(message: Message) -> RecordDict:
    """One of our messages as Flower carries it: the header as text, each blob as an array of bytes.

    A ConfigRecord could hold the blobs as well, and is thirty times slower at it.
    """
    arrays = {
        name: Array(dtype="uint8", shape=(), stype=STYPE, data=bytes(blob))
        for name, blob in message.blobs.items()
    }
    return RecordDict({HEADER: ConfigRecord({"header": message.header}), BLOBS: ArrayRecord(arrays)})


def from_record(record: RecordDict) -> Message:
    """What `to_record` made.

    Raises:
        FederationError: It is something else; nothing of it was executed or unpacked.
    """
    header, blobs = record.get(HEADER), record.get(BLOBS)
    if len(record) != 2 or not isinstance(header, ConfigRecord) or not isinstance(blobs, ArrayRecord):
        raise FederationError(
            f"wanted the records {HEADER} and {BLOBS}, got {', '.join(record)[:200] or 'none'}"
        )
    text = header.get("header")
    if not isinstance(text, str) or len(header) != 1 or len(text) > LONGEST_HEADER:
        raise FederationError(f"wanted one header of at most {LONGEST_HEADER} characters")
    for name, array in blobs.items():
        if array.stype != STYPE or tuple(array.shape) != ():
            raise FederationError(
                f"wanted bytes under {name[:80]!r}, got an array of type {array.stype[:80]!r}"
            )
    return Message(text, {name: array.data for name, array in blobs.items()})


def client_app(device_for: Callable[[Context], Device]) -> ClientApp:
    """The app that answers for one device or many; `device_for` says which one a message is meant for."""
    app = ClientApp()

    @app.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    @app.evaluate()
    def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    @app.query("reveal")
    def reveal(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    return app


def _answer(
    message: FlowerMessage, context: Context, device_for: Callable[[Context], Device]
) -> FlowerMessage:
    try:
        task = read_task(from_record(message.content))
        reply = handle_task(task, device_for(context))
        return FlowerMessage(to_record(reply.message()), reply_to=message)
    except (FederationError, WeightsError) as error:
        log.warning("%s", error)
        return FlowerMessage(Error(DEVICE_ERROR, str(error)[:LONGEST_REASON]), reply_to=message)
    except Exception as error:
        # The one broad net: Flower would send the text of whatever gets past it to the server.
        if isinstance(error, FedfaceError):
            log.warning("this device could not answer: %s", error)
        else:
            log.exception("this device could not answer")
        reason = f"the device stopped with {type(error).__name__}; its own log says why"
        return FlowerMessage(Error(DEVICE_ERROR, reason), reply_to=message)


def device_of(context: Context, *, home: Path) -> Device:
    """Which device a message is meant for.

    A node that its owner gave a device file is that device, whatever the run's config says. Only a node
    without one, a simulation's, stands for a pretended device of the experiment.

    Args:
        home: The app's folder, where relative experiments lie.

    Raises:
        ConfigError: The device file or the run's config cannot be read.
        FederationError: The node is neither.
    """
    own = context.node_config.get("device")
    if own is not None:
        return load_device(Path(str(own)))
    number = context.node_config.get("partition-id")
    if not isinstance(number, int):
        raise FederationError(
            "this node says neither which device it is nor which part of a simulation; start it with "
            "--node-config \"device='/path/to/device.yaml'\""
        )
    order = read_run_config(context.run_config, home)
    return simulated_device(order.experiment, number, devices_folder(order.folder))


class InProcessGrid(Grid):
    """A Grid without Flower's server: the ClientApp answers in this process, one device to a core.

    One thread for each device beats two threads in each convolution: small networks leave a second idle.
    Every message and reply is turned into bytes and back, so that no two devices ever share an object.
    """

    def __init__(self, app: ClientApp, count: int, config: UserConfig) -> None:
        """Nodes 1 to `count`, whose partitions count from 0; `config` is the run's."""
        self._app = app
        self._run = Run.create_empty(RUN)
        self._waiting: dict[str, FlowerMessage] = {}
        self._cores = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self._contexts = {
            node: Context(
                RUN, node, {"partition-id": node - 1, "num-partitions": count}, RecordDict(), config
            )
            for node in range(1, count + 1)
        }
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """The run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> FlowerMessage:
        """A message from the server."""
        return FlowerMessage(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, which are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Keep messages until their replies are asked for; messages to nobody get no name and are lost."""
        names = []
        for message in messages:
            if message.metadata.dst_node_id in self._contexts:
                message.metadata.__dict__["_message_id"] = name = str(uuid4())
                self._waiting[name] = message
                names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """Let as many devices answer side by side as there are cores, those that were asked first."""
        wanted = set(message_ids)
        turn = [name for name in self._waiting if name in wanted][: self._cores]
        asked = [self._waiting.pop(name) for name in turn]
        with ThreadPoolExecutor(self._cores) as pool:
            return list(pool.map(self._answered, asked))

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """Every reply, in the order of the messages."""
        return [reply for name in self.push_messages(messages) for reply in self.pull_messages([name])]

    def _answered(self, message: FlowerMessage) -> FlowerMessage:
        asked = _through_bytes(message)
        try:
            reply = self._app(asked, self._contexts[asked.metadata.dst_node_id])
        except Exception as error:  # as Flower's own runtimes do
            reply = FlowerMessage(Error(DEVICE_ERROR, f"{type(error).__name__}: {error}"), reply_to=asked)
        return _through_bytes(reply)


def _through_bytes(message: FlowerMessage) -> FlowerMessage:
    return message_from_proto(WireMessage.FromString(message_to_proto(message).SerializeToString()))


class GridCohort:
    """Devices behind a Grid; implements `cohort.Cohort`. Numbers count from 0 in the order of coming."""

    def __init__(self, grid: Grid, *, come_within: float = 600.0, answer_within: float = 3600.0) -> None:
        """How long to wait, in seconds, for devices to come and for one round's answers."""
        self._grid = grid
        self._come_within = come_within
        self._answer_within = answer_within
        self._nodes: list[int] = []  # number -> Flower's name of the node

    def members(self, wanted: int) -> Sequence[int]:
        """The numbers of the devices that are there, ascending; waits until there are `wanted`.

        Raises:
            FederationError: They did not come in time.
        """
        wait = _Wait(self._come_within)
        while len(there := sorted(self._grid.get_node_ids())) < wanted:
            if wait.over():
                raise FederationError(
                    f"wanted {wanted} devices, {len(there)} came within {self._come_within:.0f} s; start the "
                    f"others, or give a simulation as many: --federation-config 'num-supernodes={wanted}'"
                )
        self._nodes += [node for node in there if node not in self._nodes]
        return sorted(self._nodes.index(node) for node in there)

    def ask(self, task: Task, members: Sequence[int], heard: OnReply) -> Mapping[int, Reply | Failure]:
        """Send one task to some devices and gather what comes back; one entry per member, none missing."""
        kind, _ = _expected(task)
        record = to_record(task.message())
        answers: dict[int, Reply | Failure] = {}
        waiting: dict[str, int] = {}
        for number in members:
            ttl = None if math.isinf(self._answer_within) else self._answer_within
            message = FlowerMessage(record, self._nodes[number], kind, ttl=ttl, group_id=str(task.round))
            # One at a time: Flower leaves a message that it could not deliver out of its answer, unnamed.
            names = [name for name in self._grid.push_messages([message]) if name]
            if names:
                waiting[names[0]] = number
            else:
                answers[number] = Failure("the device is no longer connected")
        wait = _Wait(self._answer_within)
        while waiting:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                number = waiting.get(reply.metadata.reply_to_message_id, -1)
                stranger = reply.has_content() and reply.metadata.src_node_id != self._nodes[number]
                if number < 0 or stranger:
                    continue
                del waiting[reply.metadata.reply_to_message_id]
                answers[number] = _read(reply, task)
                heard(number)
            if not replies and wait.over():
                break
        late = Failure(f"no answer within {self._answer_within:.0f} s")
        return {number: answers.get(number, late) for number in members}


class _Wait:
    """Sleeps between two looks, longer and longer up to two seconds, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = 0.05

    def over(self) -> bool:
        left = self._until - time.monotonic()
        time.sleep(max(0.0, min(self._pause, left)))
        self._pause = min(1.5 * self._pause, 2.0)
        return left <= 0


def _expected(task: Task) -> tuple[str, type[TrainResult] | type[EvaluateResult] | type[DecryptResult]]:
    """Flower's kind of message for a task, and our kind of answer to it."""
    match task:
        case TrainTask():
            return "train", TrainResult
        case EvaluateTask():
            return "evaluate", EvaluateResult
        case DecryptTask():
            return "query.reveal", DecryptResult


def _read(reply: FlowerMessage, task: Task) -> Reply | Failure:
    if reply.has_error():
        reason = reply.error.reason or f"Flower's error {reply.error.code}"
        return Failure("".join(letter if letter.isprintable() else " " for letter in reason[:LONGEST_REASON]))
    try:
        answer = read_reply(from_record(reply.content))
    except FederationError as error:
        return Failure(str(error))
    _, wanted = _expected(task)
    if isinstance(answer, (wanted, Refusal)):
        return answer
    return Failure(f"wanted the answer {wanted.__name__.lower()}, got {type(answer).__name__.lower()}")


def in_process_cohort(experiment: Experiment, folder: Path) -> GridCohort:
    """All pretended devices of an experiment in this process; `folder` is the one given to `prepare`.

    Raises:
        FederationError: The experiment waits for real devices.
    """
    if isinstance(experiment.devices, RemoteDevices):
        raise FederationError(
            "this experiment waits for real devices; start a SuperLink and `flwr run` it (server/README.md)"
        )

    def device_for(context: Context) -> Device:
        return simulated_device(experiment, int(context.node_config["partition-id"]), folder)

    grid = InProcessGrid(client_app(device_for), experiment.devices.count, {})
    return GridCohort(grid, answer_within=math.inf)
