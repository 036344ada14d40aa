"""Answers the ClientApp tasks of a SuperNode with the installed fedface; no code of an app bundle is ever run.

Flower's own executor unpacks the bundle of each run and imports it: whoever may start a run executes code on every
device. With `flower-supernode --isolation process` another program may take the tasks. This one claims ClientApp tasks
alone and never unpacks, installs or imports a bundle. It waits without what trains: a worker (transport/worker.py)
answers a claimed task. The device is the owner's file alone: the node config, and the run config that comes with a
bundle, are not read.

This file is the only one that uses Flower's internals for that; tests/transport/test_executor.py checks them for each
supported version.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Protocol

from fedface.errors import ConfigError, FederationError
from fedface.text import sanitize_text

SUPPORTED = ("1.41", "1.42")
INSTALLED = version("flwr")
UNSUPPORTED = (
    f"a device runs with Flower {' or '.join(SUPPORTED)}, and {INSTALLED} is installed, with which it is not tested "
    f"that no code of a server is run; install a supported one: pip install 'flwr=={SUPPORTED[-1]}.*'"
)
try:
    from flwr.app import Context, Error
    from flwr.app import Message as FlowerMessage
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.run import RunNotRunningException
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
except ImportError as error:
    raise ConfigError(UNSUPPORTED) from error
if not INSTALLED.startswith(tuple(f"{each}." for each in SUPPORTED)):
    raise ConfigError(UNSUPPORTED)

log = logging.getLogger("fedface.device")

POLL_SECONDS = 1.0  # between questions for a task; Flower's own executor asks as often
ACQUIRE = (
    "/flwr.proto.Runtime/AcquireTask"  # the one method that the secret protects; others need a task's token
)

SUPERNODE = "flower-supernode"  # Flower's command

Answer = Callable[[FlowerMessage, Context], FlowerMessage]


class Worker(Protocol):
    """What answers claimed tasks."""

    def start(self) -> None:
        """Be ready for a task; called before the process that claimed it has other threads."""

    def answer(self, token: str) -> str:
        """Answer the task of this token; returns a sentence for the owner. Raises FederationError."""

    def rest(self) -> None:
        """There is no task at the moment."""


def run_supernode(arguments: Sequence[str]) -> None:
    """Run Flower's SuperNode in this process, as its command does."""
    from flwr.supernode import start_client_internal as supernode  # noqa: PLC0415  the executor does without it

    supernode._pull_and_store_message = received_or_dropped(supernode._pull_and_store_message)
    (program,) = entry_points(group="console_scripts", name=SUPERNODE)
    sys.argv = [SUPERNODE, *arguments]
    program.load()()


def received_or_dropped(receive: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's function that receives one message of the server, which then drops one whose run ends meanwhile.

    A SuperNode sends one answer after each message that it received. Of such a message Flower 1.41 and 1.42 keep the
    task and do not count it as received, because the end of a run is not an `Exception` there; from its answer on,
    each answer would wait for the next message.
    """

    def ordinary(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except RunNotRunningException as error:
                raise FederationError("the run has ended") from error

        return called

    def received(*, pull_object: Callable, confirm_message_received: Callable, **others: Any) -> int | None:
        return receive(
            pull_object=ordinary(pull_object),
            confirm_message_received=ordinary(confirm_message_received),
            **others,
        )

    return received


def installed_app(device_file: Path, stopped_seconds: Callable[[], float] = lambda: 0.0) -> Answer:
    """The installed ClientApp for the device of an owner's file, whatever the context of a message says.

    `stopped_seconds`: as in fedface.device.device.Device.

    What trains is loaded with the first message and then stays: a waiting device does without its 300 MB.
    """

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        from fedface.device.device import load_device  # noqa: PLC0415  see above
        from fedface.transport.client import client_app  # noqa: PLC0415

        return client_app(lambda _: replace(load_device(device_file), stopped_seconds=stopped_seconds))(
            message, context
        )

    return answer


class Executor:
    """Claims the tasks of one SuperNode, one at a time, for a worker."""

    def __init__(self, address: str, secret: bytes, worker: Worker) -> None:
        """`address`, HOST:PORT, and `secret` of the SuperNode's runtime endpoint, which is on this machine."""
        self._address, self._worker = address, worker
        auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
        self._tasks = _client(address, RuntimeVersionHttpInterceptor(component_name="fedface"), auth)

    def run(self, *, running: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Answer tasks while `running()` is true; `report` gets one sentence for each."""
        while running():
            if not self.answer_one(report):
                self._worker.rest()
                time.sleep(POLL_SECONDS)

    def answer_one(self, report: Callable[[str], None]) -> bool:
        """Claim the oldest waiting ClientApp task and answer it; False if there is none, or the endpoint is silent."""
        try:
            found = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except Exception as error:
            # Of Flower's HTTP client: the SuperNode is busy, or has ended, which `running` sees.
            log.warning("the SuperNode's runtime endpoint does not answer: %s", error)
            return False
        if not found.HasField("task") or not found.token or found.task.type != TaskType.CLIENT_APP:
            return False
        self._worker.start()
        with _heartbeats(self._address, found.token):
            try:
                report(self._worker.answer(found.token))
            except FederationError as error:
                # The SuperNode itself sends an error to the server once the heartbeats have stopped.
                log.warning("a task could not be answered: %s", error)
        return True


def answer_task(address: str, token: str, answer: Answer) -> str:
    """Answer one claimed task of the SuperNode at `address`; returns a sentence for the owner."""
    started = time.monotonic()
    client = _client(address, RuntimeTokenHttpInterceptor(token))
    try:
        message, context, _, _ = pull_task_input(client)  # the bundle, the last of the four, stays unread
        try:
            reply = answer(message, context)
        except Exception as error:
            # Flower's ClientApp raises for messages of an unknown kind; the text may name files of the owner.
            from fedface.transport.wire import DEVICE_ERROR  # noqa: PLC0415  loads torch, as `answer` did

            log.exception("this device could not answer")
            reason = f"the device stopped with {type(error).__name__}; see its own log"
            reply = FlowerMessage(Error(DEVICE_ERROR, reason), reply_to=message)
        push_message(client, reply, context)
        # Without the context: nothing that a message changed in it is stored for the next.
        push_task_output(client, None, SubStatus.COMPLETED, "")
    except Exception as error:
        # One task that cannot be fetched or answered must not end the device.
        push_task_output(client, None, SubStatus.FAILED, "the device could not answer")
        return f"a task could not be answered: {sanitize_text(str(error), 200)}"
    finally:
        client.close()
    metadata = message.metadata
    request = sanitize_text(f"{metadata.message_type} request of round {metadata.group_id or '?'}", 80)
    outcome = " with an error" if reply.has_error() else ""
    return f"{request}: answered{outcome} in {time.monotonic() - started:.0f} s"


@contextmanager
def _heartbeats(address: str, token: str) -> Iterator[None]:
    """Report that a claimed task is being worked on, in a thread, until the block ends."""
    client = _client(address, RuntimeTokenHttpInterceptor(token))
    heartbeat = HeartbeatSender(lambda: _beat(client))
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.stop()
        client.close()


def _client(address: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    # Flower's own retries interrupt the process when a token has expired, so there are none here.
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=interceptors
    )


def _beat(client: RuntimeHttpClient) -> bool:
    """Report that the task is being worked on. Flower's own function interrupts the process when it is refused."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except Exception:  # of Flower's HTTP client; the sender tries again
        return False
    return True
