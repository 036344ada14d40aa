"""Answers the ClientApp tasks of a SuperNode with the installed fedface; no code of an app bundle is ever run.

Flower's own executor unpacks the bundle of each run and imports it: whoever may start a run executes code on every
device. With `flower-supernode --isolation process` another program may take the tasks. This one claims ClientApp tasks
alone, never unpacks, installs or imports a bundle, and stays in one process, so that torch is loaded once. The device
is the owner's file alone: the node config, and the run config that comes with a bundle, are not read.

This file is the only one that uses Flower's internals for that; tests/transport/test_executor.py checks them for each
supported version.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from fedface.errors import ConfigError
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

Answer = Callable[[FlowerMessage, Context], FlowerMessage]


def installed_app(device_file: Path) -> Answer:
    """The installed ClientApp for the device of an owner's file, whatever the context of a message says.

    What trains is loaded with the first message and then stays: a waiting device does without its 300 MB.
    """

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        from fedface.transport.client import client_app, configured_device  # noqa: PLC0415  see above

        return client_app(lambda _: configured_device(device_file))(message, context)

    return answer


class Executor:
    """Takes the tasks of one SuperNode, one at a time, in this thread."""

    def __init__(self, address: str, secret: bytes, answer: Answer) -> None:
        """`address`, HOST:PORT, and `secret` of the SuperNode's runtime endpoint, which is on this machine."""
        self._address, self._answer = address, answer
        auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
        self._tasks = _client(address, RuntimeVersionHttpInterceptor(component_name="fedface"), auth)

    def run(self, *, running: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Answer tasks while `running()` is true; `report` gets one sentence for each."""
        while running():
            if not self.answer_one(report):
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
        client = _client(self._address, RuntimeTokenHttpInterceptor(found.token))
        try:
            report(self._answer_task(client))
        except Exception as error:
            # One task that cannot be fetched or answered must not end the device.
            log.warning("a task could not be answered: %s", error)
            push_task_output(client, None, SubStatus.FAILED, "the device could not answer")
        finally:
            client.close()
        return True

    def _answer_task(self, client: RuntimeHttpClient) -> str:
        started = time.monotonic()
        heartbeat = HeartbeatSender(lambda: _beat(client))
        heartbeat.start()
        try:
            message, context, _, _ = pull_task_input(client)  # the bundle, the last of the four, stays unread
            try:
                reply = self._answer(message, context)
            except Exception as error:
                # Flower's ClientApp raises for messages of an unknown kind; the text may name files of the owner.
                from fedface.transport.wire import DEVICE_ERROR  # noqa: PLC0415  loads torch, as `answer` did

                log.exception("this device could not answer")
                reason = f"the device stopped with {type(error).__name__}; see its own log"
                reply = FlowerMessage(Error(DEVICE_ERROR, reason), reply_to=message)
            push_message(client, reply, context)
            # Without the context: nothing that a message changed in it is stored for the next.
            push_task_output(client, None, SubStatus.COMPLETED, "")
        finally:
            heartbeat.stop()
        metadata = message.metadata
        request = sanitize_text(f"{metadata.message_type} request of round {metadata.group_id or '?'}", 80)
        outcome = " with an error" if reply.has_error() else ""
        return f"{request}: answered{outcome} in {time.monotonic() - started:.0f} s"


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
