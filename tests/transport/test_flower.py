"""The Flower transport: messages arrive unchanged, hostile ones are refused, both apps run without a network."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.app import device_of
from fedface.aggregation.payload import AggregationParameters, PlainConfig
from fedface.atomic_io import locked_folder
from fedface.coordinator.run import initialize_run
from fedface.device.device import Device
from fedface.errors import ConfigError, FederationError, LibraryError
from fedface.experiment import devices_folder, read_experiment
from fedface.messages.messages import (
    ExchangeResult,
    ExchangeTask,
    Failure,
    Message,
    Refusal,
    TrainResult,
    to_message,
)
from fedface.models.checkpoint import save_model
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.model import GanArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.randomness import Streams
from fedface.simulation.in_process import InProcessGrid, in_process_cohort
from fedface.transport.client import client_app
from fedface.transport.run_config import read_run_config
from fedface.transport.server import GridCohort
from fedface.transport.wire import from_record, to_record

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
question: does it run?
name: tiny
privacy: {kind: no-privacy}
devices: {kind: synthetic-devices, light_fractions: [0.9, 0.1], photos_per_device: 12}
probe: {kind: synthetic-probe, per_group: 2}
training: {kind: gan-training, rounds: 1, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: 4,
  fake_batch_size: 4}
aggregation: {kind: homomorphic}
upsampling: {method: {kind: pulse, steps: 2}}
attack: {photos: 2, iterations: 1, candidates: 2, trials: 2}
base: base.safetensors
"""

REVEAL = ExchangeTask(
    run="r",
    round=1,
    aggregation=PlainConfig(),
    agreement=AggregationParameters(value_range=1.0, max_devices=2),
    exchange="decrypt",
    content=b"sum",
)
OPENED = ExchangeResult(device="d", content=b"sum")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A YAML file of two devices with networks of some thousand weights."""
    architecture = GanArchitecture(
        generator=StyleGAN2Config(
            size=16, latent_width=8, style_width=8, mapping_layers=1, channel_base=64, channel_max=8
        ),
        discriminator=DiscriminatorConfig(size=16, channel_base=64, channel_max=8),
    )
    save_model(tmp_path / "base.safetensors", build_model(architecture, Streams(1).generator("pretrain")))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("base.safetensors", str(tmp_path / "base.safetensors")))
    return path


def context(node: dict[str, str | int | float | bool], run: dict[str, str | int | float | bool]) -> Context:
    """Flower's context of a ClientApp."""
    return Context(1, 2, node, RecordDict(), run)


@settings(max_examples=30, deadline=None)
@given(
    st.text(max_size=200),
    st.dictionaries(st.text(min_size=1, max_size=9), st.binary(max_size=300), max_size=3),
)
def test_a_message_is_unchanged_by_a_round_trip(header: str, blobs: dict[str, bytes]) -> None:
    """from_record after to_record is the identity."""
    assert from_record(to_record(Message(header, blobs))) == Message(header, blobs)


GOOD = to_record(Message("{}", {"a": b"1"}))


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"fedface": GOOD["fedface"]}),
        RecordDict({"fedface": GOOD["blobs"], "blobs": GOOD["fedface"]}),
        RecordDict({**GOOD, "more": MetricRecord({"a": 1})}),
        RecordDict({**GOOD, "fedface": ConfigRecord({"header": b"{}"})}),
        RecordDict({**GOOD, "fedface": ConfigRecord({"header": "{}", "more": 1})}),
        RecordDict({**GOOD, "fedface": ConfigRecord({"header": "x" * (1 << 20) + "x"})}),
        RecordDict({**GOOD, "blobs": ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"1234")})}),
        RecordDict({**GOOD, "blobs": ArrayRecord({"a": Array("uint8", (9,), "fedface.bytes", b"1")})}),
    ],
)
def test_a_record_of_another_kind_is_refused(record: RecordDict) -> None:
    """Only records of `to_record` are accepted."""
    with pytest.raises(FederationError, match="expected"):
        from_record(record)


def test_devices_in_one_process_share_no_object() -> None:
    """Changes that the first device makes to its message do not affect the second."""
    app, seen = ClientApp(), []

    @app.query("exchange")
    def decrypt(message: FlowerMessage, _: Context) -> FlowerMessage:
        seen.append(message.content["blobs"]["content"].data)
        message.content["blobs"]["content"].data = b"spoiled"
        return FlowerMessage(to_record(to_message(OPENED)), reply_to=message)

    cohort = GridCohort(InProcessGrid(app, 2, {}))
    answers = dict(cohort.ask(dict.fromkeys(cohort.members(2), REVEAL)))
    assert seen == [b"sum", b"sum"]
    assert all(isinstance(answer, ExchangeResult) for answer in answers.values())


def broken(error: Exception) -> GridCohort:
    """A cohort of one device that fails in a given way."""

    def device_for(_: Context) -> Device:
        raise error

    return GridCohort(InProcessGrid(client_app(device_for), 1, {}))


def test_an_error_about_the_task_is_sent_with_its_text() -> None:
    """The coordinator can report the cause."""
    cohort = broken(FederationError("expected an apple, got a pear"))
    answers = dict(cohort.ask(dict.fromkeys(cohort.members(1), REVEAL)))
    (fault,) = answers.values()
    assert isinstance(fault, Failure) and fault.reason.startswith("expected an apple, got a pear (node ")


@pytest.mark.parametrize("error", [LibraryError("/home/me/beach.jpg has changed"), ValueError("beach.jpg")])
def test_an_error_about_photos_is_sent_without_its_text(error: Exception) -> None:
    """The name of a photo is private."""
    cohort = broken(error)
    fault = dict(cohort.ask(dict.fromkeys(cohort.members(1), REVEAL)))[0]
    assert isinstance(fault, Failure)
    assert type(error).__name__ in fault.reason and "beach" not in fault.reason


class ScriptedGrid(InProcessGrid):
    """A grid with given replies and nodes."""

    def __init__(self, nodes: list[int], script: Iterator[list[tuple[int, int, RecordDict | Error]]]) -> None:
        super().__init__(ClientApp(), 0, {})
        self.nodes, self.script, self.pushed = nodes, script, []  # type: ignore[var-annotated]

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        names = []
        for message in messages:
            if message.metadata.dst_node_id >= 0:
                message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
                self.pushed.append(message)
                names.append(message.metadata.message_id)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        replies = []
        for asked, sender, result in next(self.script, []):
            reply = FlowerMessage(result, reply_to=self.pushed[asked])
            reply.metadata.__dict__["_src_node_id"] = sender
            replies.append(reply)
        return replies


def test_duplicate_and_foreign_replies_are_ignored() -> None:
    """One reply per member, the first from the node that was asked."""
    mine, late = (to_record(to_message(Refusal(device=name, reason="no"))) for name in ("mine", "late"))
    script = iter([[(0, 99, late), (0, 7, mine), (0, 7, late)], [(1, 8, Error(5, "gone"))]])
    cohort = GridCohort(ScriptedGrid([8, 7], script))
    answers = list(cohort.ask(dict.fromkeys(cohort.members(2), REVEAL)))
    assert answers == [(0, Refusal(device="mine", reason="no")), (1, Failure("gone (node 8)"))]


def test_every_member_has_an_entry_even_without_a_usable_reply() -> None:
    """Late, unreachable, answering another task, unreadable: each is a failure with its reason."""
    trained = to_record(to_message(TrainResult(device="d", payload=b"p", seconds_protect=0.0)))
    script = iter([[(0, 1, trained), (1, 2, RecordDict())]])
    cohort = GridCohort(ScriptedGrid([-1, 1, 2, 3], script), answer_within=0.2)
    answers = dict(cohort.ask(dict.fromkeys(cohort.members(4), REVEAL)))
    reasons = [answer.reason for _, answer in sorted(answers.items()) if isinstance(answer, Failure)]
    words = (
        "no longer connected (node -1)",
        "expected a ExchangeResult, got a TrainResult",
        "expected the records",
        "no answer within 0 s (node 3)",
    )
    assert len(reasons) == 4
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_too_few_devices_are_reported_with_both_numbers() -> None:
    """After the timeout."""
    heard: list[str] = []
    cohort = GridCohort(ScriptedGrid([1, 2], iter([])), come_within=0.1, report=heard.append)
    with pytest.raises(FederationError, match="expected 3 devices, 2 connected within"):
        cohort.members(3)
    assert heard == ["waiting for 3 devices; 2 are connected"]


def test_a_device_keeps_its_number_while_others_come_and_go() -> None:
    """Reports name devices by number."""
    grid = ScriptedGrid([50, 60], iter([]))
    cohort = GridCohort(grid)
    assert cohort.members(2) == [0, 1]
    grid.nodes = [10, 60]
    assert cohort.members(2) == [1, 2]


def test_the_bundles_app_answers_for_no_real_device(tmp_path: Path) -> None:
    """A SuperNode in Flower's default mode, which would run any code of a server."""
    with pytest.raises(FederationError, match="fedface device start"):
        device_of(context({"device": str(tmp_path / "device.yaml")}, {"experiment": "tiny.yaml"}))


def test_a_run_config_is_read_like_the_command_line(recipe: Path, tmp_path: Path) -> None:
    """Experiments are in the app; changes override them; a finished run gets a new folder."""
    config = {
        "experiment": "tiny.yaml",
        "folder": str(tmp_path / "runs"),
        "changes": '{"training.rounds": 3}',
    }
    order = read_run_config(config, recipe.parent)
    assert order.experiment == read_experiment(recipe, changes={"training.rounds": "3"})
    assert order.folder == tmp_path / "runs" / "tiny"
    order.folder.mkdir(parents=True)
    assert read_run_config(config, recipe.parent).folder == order.folder
    (order.folder / "run.json").write_text("{}")
    assert read_run_config(config, recipe.parent).folder == tmp_path / "runs" / "tiny-2"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "experiment: expected the path"),
        ({"experiment": 3}, "experiment: expected a text"),
        ({"experiment": "tiny.yaml", "folder": "runs"}, "folder: expected an absolute path"),
        ({"experiment": "tiny.yaml", "photos": "../photos"}, "photos: expected an absolute path"),
        ({"experiment": "tiny.yaml", "changes": "{"}, "changes: not valid JSON"),
        ({"experiment": "tiny.yaml", "changes": "[1]"}, "changes: expected keys and values"),
    ],
)
def test_a_wrong_run_config_is_reported_by_key(
    recipe: Path, config: dict[str, str | int | float | bool], words: str
) -> None:
    """Each error names the entry."""
    with pytest.raises(ConfigError, match=words):
        read_run_config(config, recipe.parent)


def test_each_simulated_device_answers_under_its_own_name(recipe: Path, tmp_path: Path) -> None:
    """Partition i of a simulation is simulated device i, with its ledger."""
    config: dict[str, str | int | float | bool] = {
        "experiment": str(recipe),
        "folder": str(tmp_path / "runs"),
    }
    for number in range(2):
        device = device_of(context({"partition-id": number}, config))
        assert device.name == f"device-{number:02d}"
        assert device.state == devices_folder(tmp_path / "runs" / "tiny") / device.name


def test_an_experiment_for_remote_devices_does_not_run_in_one_process(recipe: Path, tmp_path: Path) -> None:
    """There are no remote devices to wait for."""
    real = read_experiment(recipe, changes={"devices": "{kind: remote-devices, at_least: 2}"})
    with pytest.raises(FederationError, match="remote devices"):
        in_process_cohort(real, tmp_path)


def test_both_apps_run_an_experiment_to_its_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that Flower loads, without its network; sums are encrypted."""
    monkeypatch.syspath_prepend(str(ROOT))
    from clients.app import app as clients_app
    from server.app import app as server_app

    config: dict[str, str | int | float | bool] = {
        "experiment": str(recipe),
        "folder": str(tmp_path / "runs"),
    }
    server_app(InProcessGrid(clients_app, 2, config), context({}, config))
    record = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert record["rounds"][0]["participants"] == ["device-00", "device-01"]
    assert record["base_hash"] != record["final_hash"]
    assert (tmp_path / "runs" / "tiny" / "report.html").stat().st_size > 1000


def test_an_interrupted_run_continues(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A started folder without a report is continued."""
    monkeypatch.syspath_prepend(str(ROOT))
    from clients.app import app as clients_app
    from server.app import app as server_app

    config: dict[str, str | int | float | bool] = {
        "experiment": str(recipe),
        "folder": str(tmp_path / "runs"),
    }
    order = read_run_config(config, tmp_path)
    with locked_folder(order.folder, "run"):
        initialize_run(order.experiment, order.folder)
    started = json.loads((order.folder / "state.json").read_text())
    server_app(InProcessGrid(clients_app, 2, config), context({}, config))
    after = json.loads((order.folder / "state.json").read_text())
    assert after["started"] == started["started"] and len(after["rounds"]) == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_devices_work_at_a_time_as_there_are_workers(workers: int) -> None:
    """Each device waits for the others that may work beside it; no more than that many ever do."""
    together, most, lock = threading.Barrier(workers), [0, 0], threading.Lock()
    app = ClientApp()

    @app.query("exchange")
    def decrypt(message: FlowerMessage, _: Context) -> FlowerMessage:
        with lock:
            most[0] += 1
            most[1] = max(most)
        together.wait(20)
        with lock:
            most[0] -= 1
        return FlowerMessage(to_record(to_message(OPENED)), reply_to=message)

    cohort = GridCohort(InProcessGrid(app, 6, {}, workers))
    replies = list(cohort.ask(dict.fromkeys(cohort.members(6), REVEAL)))
    assert [number for number, _ in replies] == list(range(6))
    assert all(isinstance(reply, ExchangeResult) for _, reply in replies) and most[1] == workers


def test_a_request_that_was_given_up_does_not_hold_up_the_next() -> None:
    """The server raised after the first reply; its next request gets all replies."""
    app = ClientApp()

    @app.query("exchange")
    def decrypt(message: FlowerMessage, _: Context) -> FlowerMessage:
        return FlowerMessage(to_record(to_message(OPENED)), reply_to=message)

    cohort = GridCohort(InProcessGrid(app, 3, {}, 2))
    assert next(cohort.ask(dict.fromkeys(cohort.members(3), REVEAL)))[0] == 0
    assert [number for number, _ in cohort.ask(dict.fromkeys(cohort.members(3), REVEAL))] == [0, 1, 2]
