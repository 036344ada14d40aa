"""A simulation in one process: Flower's ClientApp runs for every simulated device, without Flower's server."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, RecordDict, UserConfig
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedface.device.device import Device
from fedface.errors import FederationError
from fedface.experiment import Experiment, RemoteDevices
from fedface.platforms import usable_cores
from fedface.simulation.devices import prepare, simulated_device
from fedface.transport.client import client_app
from fedface.transport.server import GridCohort
from fedface.transport.wire import DEVICE_ERROR

SERVER_NODE = 1  # Flower's node id of the server
RUN = 1  # a grid in one process has one run


class InProcessGrid(Grid):
    """A Grid without Flower's server: the ClientApp runs in this process, `workers` devices at a time.

    One thread per device is faster than two per convolution, because small networks cannot use the second. Every
    message and reply is serialised and parsed, so that devices never share an object.
    """

    def __init__(self, app: ClientApp, count: int, config: UserConfig, workers: int | None = None) -> None:
        """Nodes 1 to `count`, with partitions numbered from 0.

        Args:
            config: The run config.
            workers: How many devices work at a time, >= 1; None: one per core.
        """
        self._app = app
        self._run = Run.create_empty(RUN)
        self._waiting: dict[str, FlowerMessage] = {}
        self._running: dict[str, Future[FlowerMessage]] = {}
        self._workers = usable_cores() if workers is None else workers
        self._pool = ThreadPoolExecutor(self._workers)
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
        """The nodes, which are always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Store messages until their replies are pulled; a message to an unknown node gets no id and is lost."""
        names = []
        for message in messages:
            if message.metadata.dst_node_id in self._contexts:
                message.metadata.__dict__["_message_id"] = name = str(uuid4())
                self._waiting[name] = message
                names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The next reply, in the order of the messages; meanwhile the devices of the next messages work.

        So no more replies wait than there are workers.
        """
        ids = set(message_ids)
        # What an earlier request that was given up began may still run; its reply is dropped.
        self._running = {name: work for name, work in self._running.items() if name in ids or not work.done()}
        self._begin(ids)
        turn = next((name for name in self._running if name in ids), None)
        if turn is None:
            return []
        reply = self._running.pop(turn).result()
        self._begin(ids)
        return [reply]

    def _begin(self, ids: Collection[str]) -> None:
        free = max(0, self._workers - len(self._running))
        for name in [name for name in self._waiting if name in ids][:free]:
            self._running[name] = self._pool.submit(self._reply_to, self._waiting.pop(name))

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """Every reply, in the order of the messages."""
        return [reply for name in self.push_messages(messages) for reply in self.pull_messages([name])]

    def _reply_to(self, message: FlowerMessage) -> FlowerMessage:
        received = _through_wire(message)
        try:
            reply = self._app(received, self._contexts[received.metadata.dst_node_id])
        except Exception as error:  # as Flower's own runtimes do
            reply = FlowerMessage(Error(DEVICE_ERROR, f"{type(error).__name__}: {error}"), reply_to=received)
        return _through_wire(reply)


def _through_wire(message: FlowerMessage) -> FlowerMessage:
    return message_from_proto(WireMessage.FromString(message_to_proto(message).SerializeToString()))


def in_process_cohort(experiment: Experiment, folder: Path, workers: int | None = None) -> GridCohort:
    """All simulated devices of an experiment in this process, prepared in `folder`.

    Args:
        workers: How many of them work at a time, >= 1; None: one per core.

    Raises:
        FederationError: The experiment needs remote devices.
    """
    if isinstance(experiment.devices, RemoteDevices):
        raise FederationError(
            "this experiment needs remote devices; start it with `fedface server run` (docs/fifty-devices.md)"
        )
    prepare(experiment, folder)

    def device_for(context: Context) -> Device:
        return simulated_device(experiment, int(context.node_config["partition-id"]), folder)

    grid = InProcessGrid(client_app(device_for), experiment.devices.count, {}, workers)
    return GridCohort(grid, answer_within=math.inf)
