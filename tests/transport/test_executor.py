"""Whoever can start a run can send any code in its bundle. A device runs none of it and answers with its installed
fedface. The SuperNode's runtime endpoint is Flower's own, on a port of this machine; only its server is missing.

These tests are also the contract with Flower's internals: the last one runs them with the other supported version.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import uvicorn
from command_line import caller
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_task_output
from flwr.supernode.start_client_internal import _pull_and_store_message
from hostile_bundle import project
from tiny import NO_PRIVACY, tiny_experiment, tiny_gan, train_task

from fedface.errors import FederationError
from fedface.messages.messages import Refusal, to_message
from fedface.messages.parsing import read_reply
from fedface.transport.executor import (
    ACQUIRE,
    INSTALLED,
    SUPPORTED,
    Answer,
    Executor,
    answer_task,
    installed_app,
    received_or_dropped,
)
from fedface.transport.wire import from_record, to_record

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"a secret of this device"
NODE = 7
PROJECT = (
    project("evil/*.py", server="evil.client:app", client="evil.client:app")
    + """
[tool.flwr.app.config]
device = "/elsewhere/device.yaml"
allow_no_dp = true
"""
)
HOSTILE = """
import pathlib
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
pathlib.Path(MARKER).write_text("this code ran on the device")
app = ClientApp()
@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""
DEVICE = """
name: kitchen
photos: photos
state: state
answer_seconds: 0
policy: {max_epsilon: 8, delta: 1e-3, protocols: [plain], min_cohort_size: 1}
"""


@dataclass
class Node:
    """A SuperNode without its server: tasks are added as if the server had sent them."""

    factory: NodeStateFactory
    address: str

    @property
    def state(self):  # type: ignore[no-untyped-def]
        """Flower's record of runs, messages and tasks."""
        return self.factory.state()

    def add_task(self, message: FlowerMessage, marker: Path, task_type: str = TaskType.CLIENT_APP) -> int:
        """A task of a new run whose bundle writes `marker` when it is imported; returns the task's number."""
        run_id = message.metadata.run_id
        files = {
            "pyproject.toml": PROJECT.encode(),
            "LICENSE": b"none",
            "evil/__init__.py": b"",
            "evil/client.py": HOSTILE.replace("MARKER", repr(str(marker))).encode(),
        }
        content = build_fab_from_files(files)[0]
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        run = replace(Run.create_empty(run_id), fab_id="mallory/hostile", fab_version="1.0.0",
                      fab_hash=fab.hash_str, series_id=run_id)  # fmt: skip
        widened: dict[str, str | int | float | bool] = {
            "device": "/elsewhere/device.yaml", "experiment": "/elsewhere.yaml", "folder": "/elsewhere",
            "policy.allow_no_dp": True, "allow_no_dp": True, "state": "/elsewhere", "photos": "/",
        }  # fmt: skip
        context = Context(run_id, NODE, widened, RecordDict(), widened, run_id)
        self.state.set_run_series_context(run_id, context)
        self.state.store_run(run)
        self.state.store_fab(fab)
        task = self.state.create_task(task_type=task_type, run_id=run_id, fab_hash=fab.hash_str)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.object_store.preregister(run_id, get_object_tree(message))
        for name, part in get_all_nested_objects(message).items():
            self.state.object_store.put(name, part.deflate())
        self.state.store_message(message)
        return int(task)

    def reply(self, run_id: int) -> FlowerMessage | None:
        """The reply to a run's message, which the SuperNode would send to its server."""
        found = self.state.get_messages_legacy(run_ids=[run_id], is_reply=True)
        return found[0] if found else None

    def result(self, run_id: int) -> RecordDict:
        """The content of that reply, without Flower's store: only its own parts are put together."""
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        reply = self.reply(run_id)
        assert reply is not None and not reply.has_error(), reply and reply.error
        tree = self.state.object_store.get_object_tree(reply.metadata.message_id)
        contents, waiting = {}, [tree]
        while waiting:
            part = waiting.pop()
            contents[part.object_id] = self.state.object_store.get(part.object_id)
            waiting += part.children
        whole = inflate_object_from_contents(reply.metadata.message_id, contents)
        assert isinstance(whole, FlowerMessage)
        return whole.content

    def status(self, task: int) -> tuple[str, str]:
        """Status and sub-status of a task."""
        (found,) = self.state.get_tasks(task_ids=[task])
        return found.status.status, found.status.sub_status


@dataclass
class Here:
    """A worker in this process."""

    node: Node
    app: Answer

    def start(self) -> None:
        """It is ready."""

    def answer(self, token: str) -> str:
        """As the worker of a device does in its own process."""
        return answer_task(self.node.address, token, self.app)

    def rest(self) -> None:
        """It stays."""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Flower's runtime endpoint, protected by SECRET."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    factory.state().set_node_id(NODE)
    app = create_app(state_factory=factory, superexec_auth_secret=SECRET)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Node(factory, f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def device_file(tmp_path: Path) -> Path:
    """An owner's file, with a policy that does not allow runs without noise."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "device.yaml").write_text(DEVICE)
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "device.yaml"


@pytest.fixture(scope="module")
def request_to_train(tmp_path_factory: pytest.TempPathFactory) -> RecordDict:
    """An honest request, of a run without noise, which the policy of `device_file` does not allow."""
    experiment = tiny_experiment(tmp_path_factory.mktemp("recipe"), {"privacy": NO_PRIVACY})
    return to_record(to_message(train_task(experiment, tiny_gan())))


def message_of(content: RecordDict, run_id: int, kind: str = "train") -> FlowerMessage:
    """A server's message of a run to this node."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
    return FlowerMessage(content, NODE, kind)


def test_a_hostile_bundle_runs_nothing_and_its_message_is_answered_by_the_installed_fedface(
    node: Node, device_file: Path, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """With Flower's own executor the same bundle does run its code, so that this test cannot become empty. The device
    and its policy are those of the owner's file, whatever node config and run config say.
    """
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    task = node.add_task(message_of(request_to_train, 1), ours)
    said: list[str] = []
    assert Executor(node.address, SECRET, Here(node, installed_app(device_file))).answer_one(said.append)
    assert not ours.exists()
    reply = read_reply(from_record(node.result(1)))
    assert isinstance(reply, Refusal) and reply.device == "kitchen"
    assert "noise" in reply.reason
    assert node.status(task) == (Status.FINISHED, SubStatus.COMPLETED)
    assert said[0].startswith("train request of round ?: answered in ")

    node.add_task(message_of(request_to_train, 2), stock)
    (tmp_path / "secret").write_bytes(SECRET)
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    executor = subprocess.Popen(
        [bin_folder / "flower-superexec", "--insecure", "--runtime-api-address", node.address,
         "--superexec-auth-secret-file", tmp_path / "secret"],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not stock.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert stock.exists()
    finally:
        executor.terminate()
        executor.wait(20)


def test_one_process_answers_every_task_and_an_unknown_kind_ends_nothing(
    node: Node, device_file: Path, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """An unknown message is answered with an error that names nothing of the device."""
    executor = Executor(node.address, SECRET, Here(node, installed_app(device_file)))
    for run, kind in ((3, "query.format_disk"), (4, "train")):
        node.add_task(message_of(request_to_train, run, kind), tmp_path / "marker")
    running = iter([True, True, False])
    executor.run(running=lambda: next(running), report=lambda text: None)
    unknown = node.reply(3)
    assert unknown is not None and unknown.has_error()
    assert "see its own log" in unknown.error.reason and "format_disk" not in unknown.error.reason
    assert isinstance(read_reply(from_record(node.result(4))), Refusal)
    assert not (tmp_path / "marker").exists()


def test_only_client_tasks_are_claimed(
    node: Node, device_file: Path, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """Flower has other kinds of tasks, which also run code of the bundle."""
    executor = Executor(node.address, SECRET, Here(node, installed_app(device_file)))
    for number, kind in enumerate(set(TaskType) - {TaskType.CLIENT_APP}, start=10):
        if kind in (TaskType.AGENT_APP, TaskType.SERVER_APP):
            task = node.add_task(message_of(request_to_train, number), tmp_path / "marker", kind)
            assert not executor.answer_one(lambda text: None)
            assert node.status(task)[0] == Status.PENDING
    assert not (tmp_path / "marker").exists()


def test_another_program_of_this_machine_cannot_take_a_task(
    node: Node, device_file: Path, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """Without the secret of this start."""
    task = node.add_task(message_of(request_to_train, 20), tmp_path / "marker")
    assert not Executor(node.address, b"guessed", Here(node, installed_app(device_file))).answer_one(
        lambda text: None
    )
    assert node.status(task)[0] == Status.PENDING
    assert Executor(node.address, SECRET, Here(node, installed_app(device_file))).answer_one(
        lambda text: None
    )


class Replay:
    """Sends each request a second time, as somebody who has recorded it would."""

    def __init__(self) -> None:
        self.second: list[int] = []

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """The first response goes to the caller."""
        first = call_next(context)
        self.second.append(call_next(context).status_code)
        return first


def test_a_replayed_request_and_the_token_of_a_finished_task_are_refused(
    node: Node, device_file: Path, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """What a program of this machine may have recorded is of no use to it."""
    for run in (40, 41):
        node.add_task(message_of(request_to_train, run), tmp_path / "marker")
    replay = Replay()
    signed = SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods=frozenset({ACQUIRE}))
    client = RuntimeHttpClient.from_server_address(node.address, True, None, [signed, replay])
    token = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
    assert replay.second == [401]

    once = RuntimeHttpClient.from_server_address(
        node.address, True, None, [RuntimeTokenHttpInterceptor(token)]
    )
    pull_task_input(once)
    push_task_output(once, None, SubStatus.COMPLETED, "")
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        pull_task_input(once)
    assert Executor(node.address, SECRET, Here(node, installed_app(device_file))).answer_one(
        lambda text: None
    )


def test_a_task_that_fails_to_arrive_ends_neither_the_device_nor_the_next_task(
    node: Node, request_to_train: RecordDict, tmp_path: Path
) -> None:
    """Here its message is gone; the app is never asked."""

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        raise FederationError("asked")

    task = node.add_task(message_of(request_to_train, 30), tmp_path / "marker")
    node.state.delete_messages(
        message_ids=[each.metadata.message_id for each in node.state.get_messages_legacy(run_ids=[30])]
    )
    assert Executor(node.address, SECRET, Here(node, answer)).answer_one(lambda text: None)
    assert node.status(task) == (Status.FINISHED, SubStatus.FAILED)


@pytest.mark.parametrize("late", ["pull_object", "confirm_message_received"])
def test_a_message_whose_run_ends_while_it_arrives_leaves_no_task(
    node: Node, request_to_train: RecordDict, tmp_path: Path, late: str
) -> None:
    """Flower's own function leaves its task, after which a SuperNode holds back the answers to the next run."""
    for receive, tasks in ((_pull_and_store_message, 1), (received_or_dropped(_pull_and_store_message), 0)):
        run_id = 40 + 2 * tasks + (late == "pull_object")
        known = node.add_task(message_of(request_to_train, run_id), tmp_path / "marker")
        node.state.finish_task(known, sub_status=SubStatus.FAILED, details="")
        message = message_of(request_to_train, run_id, "evaluate")
        message.metadata.__dict__["_message_id"] = message.object_id
        parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}

        def ended(*_: object) -> bytes:
            raise RunNotRunningException

        calls = {
            "pull_object": lambda _, name, parts=parts: parts[name],
            "confirm_message_received": lambda *_: None,
        }
        received = (message, get_object_tree(message))
        assert (
            receive(
                state=node.state, object_store=node.state.object_store, node_config={},
                receive=lambda received=received: received, get_run=None, get_fab=None, trusted_entities=None,
                **{**calls, late: ended},
            )
            is None
        )  # fmt: skip
        assert len(node.state.get_tasks(run_ids=[run_id], statuses=[Status.PENDING])) == tasks
        assert len(node.state.get_messages_legacy(run_ids=[run_id], is_reply=False)) == 1 + tasks


def test_a_task_stays_claimed_while_its_worker_is_stopped(
    node: Node, request_to_train: RecordDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeats are those of the process that waits."""
    beats = threading.Event()
    acknowledge = type(node.state).acknowledge_task_heartbeat

    def counted(self: object, task: int) -> bool:
        beats.set()
        return bool(acknowledge(self, task))

    class Stopped(Here):
        def answer(self, token: str) -> str:
            return f"a heartbeat: {beats.wait(30)}"

    monkeypatch.setattr(type(node.state), "acknowledge_task_heartbeat", counted)
    node.add_task(message_of(request_to_train, 50), tmp_path / "marker")
    said: list[str] = []
    assert Executor(node.address, SECRET, Stopped(node, lambda *_: None)).answer_one(said.append)  # type: ignore[arg-type, return-value]
    assert said == ["a heartbeat: True"]


def test_the_server_hears_of_a_worker_that_was_killed(
    node: Node, request_to_train: RecordDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The SuperNode itself sends an error once the heartbeats have stopped, here a minute later at once."""

    class Killed(Here):
        def answer(self, token: str) -> str:
            pull_task_input(
                RuntimeHttpClient.from_server_address(
                    node.address, True, None, [RuntimeTokenHttpInterceptor(token)]
                )
            )
            raise FederationError("the process that answers tasks ended with exit code -9")

    while Executor(node.address, SECRET, Here(node, lambda *_: None)).answer_one(lambda text: None):  # type: ignore[arg-type, return-value]
        pass  # of the tests above
    task = node.add_task(message_of(request_to_train, 60), tmp_path / "marker")
    assert Executor(node.address, SECRET, Killed(node, lambda *_: None)).answer_one(lambda text: None)  # type: ignore[arg-type, return-value]
    assert "ended with exit code -9" in caplog.text and node.reply(60) is None
    node.state.task_token_store[task].active_until -= timedelta(minutes=2)
    assert node.status(task)[0] == Status.FINISHED
    reply = node.reply(60)
    assert reply is not None and reply.has_error()


def test_another_version_of_flower_is_refused(
    device_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit code 2, before anything starts: nothing fails open."""
    assert INSTALLED.rpartition(".")[0] in SUPPORTED
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.43.0")
    for module in ("fedface.transport.executor", "fedface.cli.device_start"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    sentence = caller(monkeypatch, capsys)("device", "start", device_file).sentence
    assert "Flower 1.41 or 1.42, and 1.43.0 is installed" in sentence and "pip install" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("version", SUPPORTED)
def test_every_supported_version_passes_this_file(version: str, tmp_path: Path) -> None:
    """Each from its own folder, with the installed dependencies; skipped where it cannot be fetched."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path,
        f"flwr=={version}.*",
    ]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"flwr {version} cannot be fetched here")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    check = f"from fedface.transport.executor import ACQUIRE, INSTALLED as i; assert i.startswith('{version}.'), i"
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": path}, check=True)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=True,
    )  # fmt: skip
