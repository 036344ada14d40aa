"""Sixteen ways in which a run is disturbed: it goes on or ends with one sentence, and no budget is spent twice.

Devices answer in one process through Flower's bytes, with their own ledgers and masked sums. After each story every
ledger has one entry for each round, costs what the plan announced, and at most one update left for a round. Other
tests show:

    server killed               stories/test_main_job (kill -9), coordinator/test_rounds (before the record)
    device killed               stories/test_promises (power cuts), privacy/test_ledger_crash, test_ledger_attempts
    closed laptop, clock set    device/test_reply_time (when replies leave), privacy/test_ledger_budgets (periods)
    unplugged state folder      device/test_client, stories/test_promises
    full disk                   tests/test_overwriting, test_files (no half file), test_environments (the sentence)
    one state on two devices    stories/test_promises (two runs at once), privacy/test_hash_chain (a copied folder)
    one key on two devices      stories/test_one_key (two SuperNodes: the second is refused)
    lossy link                  transport/test_flower (duplicate, late and foreign replies), transport/test_executor
    hostile replies             coordinator/test_rounds (noise, cut, shorter, NaN, huge, a sum, another key)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Error
from flwr.app import Message as FlowerMessage
from tiny import SilentProgress, started, tiny_experiment, tiny_gan

from fedface.aggregation.masked import EXCHANGES
from fedface.aggregation.payload import Payload
from fedface.aggregation.plain import PlainAggregation
from fedface.coordinator.device_evaluation import evaluate_on_devices
from fedface.coordinator.rounds import participants, run_rounds
from fedface.coordinator.run_state import RunState, weights_path
from fedface.device.client import handle_task
from fedface.device.device import Device, load_device
from fedface.errors import FederationError, LedgerError
from fedface.experiment import Experiment, devices_folder
from fedface.measurements import Epsilon
from fedface.messages.messages import (
    ExchangeResult,
    ExchangeTask,
    Refusal,
    Task,
    TrainResult,
    to_message,
)
from fedface.messages.parsing import read_reply, read_task
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.hash_chain import Head, Transaction
from fedface.privacy.ledger import Ledger
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.spending import ENTRY_LIFETIME
from fedface.simulation.devices import simulated_device
from fedface.simulation.in_process import InProcessGrid
from fedface.transport.client import client_app
from fedface.transport.server import GridCohort
from fedface.transport.wire import DEVICE_ERROR, from_record, to_record

DELTA = 1e-3  # of the tiny experiment
CHANGES = {
    "aggregation": "{kind: masked}",
    "privacy": "{kind: privacy-target, epsilon: 1, delta: 1e-3}",  # more noise is priced sooner
    "devices.photos_per_device": "6",
    "devices.light_fractions": "[0.9, 0.5, 0.1]",
    "training.expected_batch_size": "2",
    "training.fake_batch_size": "2",
    "training.steps_per_round": "1",
    "evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.5, metrics: {min_group_size: 2}}",
    "upsampling": "{method: {kind: pulse, steps: 2, mapping_samples: 64}}",
}
PHOTOS = DeviceDataset.independent(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
TWO_ROUNDS = [("run", 1), ("run", 2)]
ALL = ("device-00", "device-01", "device-02")
OTHERS = ("device-00", "device-02")

Answer = Callable[[FlowerMessage, Context], FlowerMessage]


class Killed(BaseException):
    """The end of a process, which nothing in it catches."""


def killed(*_: object, **__: object) -> None:
    """Ends the process instead of doing its work."""
    raise Killed


class Progress(SilentProgress):
    """Collects what the operator reads."""

    def __init__(self) -> None:
        self.text = ""

    def message(self, sentence: str) -> None:
        self.text += f"{sentence}\n"


def answers(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
    """A link that changes nothing."""
    return answer(message, context)


@dataclass
class Run:
    """Two rounds and an evaluation on three devices; a test may change a device, and its link to the server."""

    experiment: Experiment
    folder: Path
    change: Callable[[int, Device], Device] = lambda number, device: device
    link: Callable[[FlowerMessage, Context, Answer], FlowerMessage] = answers
    progress: Progress = field(default_factory=Progress)

    def device(self, number: int) -> Device:
        """A device, from 0, with eight photos and its own ledger."""
        device = simulated_device(self.experiment, number, devices_folder(self.folder))
        return self.change(number, replace(device, photos=lambda size: PHOTOS))

    def cohort(self) -> GridCohort:
        """The devices as a server sees them; a device that is killed does not answer."""
        app = client_app(lambda context: self.device(int(context.node_config["partition-id"])))

        def linked(message: FlowerMessage, context: Context) -> FlowerMessage:
            try:
                return self.link(message, context, app)
            except Killed:
                return FlowerMessage(Error(DEVICE_ERROR, "it is gone"), reply_to=message)

        return GridCohort(InProcessGrid(linked, self.experiment.devices.count, {}))  # type: ignore[arg-type]

    def rounds(self) -> RunState:
        """The rounds that are not on disk yet, by a server that has just started."""
        plan, state = self.experiment.plan(), RunState.read(self.folder)
        return run_rounds(self.experiment, plan, self.cohort(), state, None, self.progress)

    def first_round(self) -> RunState:
        """Round 1 alone: the server is killed before the next."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(
                "fedface.coordinator.rounds.participants",
                lambda *given: participants(*given) if given[2] == 1 else killed(),
            )
            self.rounds()
        return RunState.read(self.folder)

    def first_task(self) -> Task:
        """The task of round 1, which reaches no device."""
        seen = []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(FederationError, match="it is gone"):
            patch.setattr(self, "link", lambda message, *_: seen.append(message) or killed())
            self.rounds()
        return read_task(from_record(seen[0].content))

    def evaluate(self) -> RunState:
        """The evaluation before training, by a server that has just started."""
        plan, state = self.experiment.plan(), RunState.read(self.folder)
        models = [("before", tiny_gan())]
        return evaluate_on_devices(self.experiment, plan, self.cohort(), models, state, self.progress, set())

    def check_ledger(self, number: int, expected: list[tuple[str, int]]) -> None:
        """A ledger has these releases once, costs as much as planned, and sent one payload for each round."""
        with self.device(number).ledger() as ledger:
            snapshot, spent = ledger.read(), ledger.spent(DELTA)
        assert [(entry.run, entry.round, entry.attempt) for entry in snapshot.entries] == [
            (name, round, 1) for name, round in expected
        ]
        assert spent == planned(self.experiment)
        sent = {(one.kind, one.round): set() for one in snapshot.transmissions}  # type: ignore[var-annotated]
        for one in snapshot.transmissions:
            sent[one.kind, one.round].add(one.payload_digest)
        for (kind, round), digests in sent.items():
            sums = [each for _, each in expected].count(round)
            assert kind == "refusal" or len(digests) <= (4 * sums if kind == "exchange" else 1)

    def check_all_ledgers(self) -> None:
        """Each has two rounds."""
        for number in range(3):
            self.check_ledger(number, TWO_ROUNDS)


def planned(experiment: Experiment) -> Epsilon:
    """What the whole run costs one photo, without any device."""
    return epsilon_of(experiment.plan().total_event(), DELTA)


def who(state: RunState) -> list[tuple[str, ...]]:
    """The participants of each round."""
    return [record.participants for record in state.rounds]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two of three devices must answer; the budget of each is spent with this run."""
    return tiny_experiment(tmp_path_factory.mktemp("recipe"), CHANGES)


@pytest.fixture
def run(experiment: Experiment, tmp_path: Path) -> Run:
    """Before its first round."""
    return Run(experiment, started(experiment, tmp_path / "run"))


def test_a_server_killed_between_replies_and_storing_gets_the_same_replies_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sum is applied, before the round's record and before its checkpoint; then it resumes."""
    for where in ("rounds.noised_sum", "run_state.RunState.with_round", "rounds.save_model"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"fedface.coordinator.{where}", killed)
            run.rounds()
    (interrupted,) = RunState.read(run.folder).rounds
    assert not weights_path(run.folder, 1).exists()
    state = run.rounds()
    assert state.rounds[0].weights_hash == interrupted.weights_hash
    assert who(state) == [ALL, ALL]
    run.check_all_ledgers()


@pytest.mark.usefixtures("quick_detection")
def test_a_server_restarted_during_an_evaluation_gets_the_same_metrics_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had not stored them; then the run goes on."""
    seen = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunState, "with_device_metrics", lambda _, record: seen.append(record) or killed())
        run.evaluate()
    (record,) = run.evaluate().device_metrics
    assert [before.estimates for before in seen] == [record.estimates]
    assert who(run.rounds()) == [ALL, ALL]
    for number in range(3):
        run.check_ledger(number, [("run/metrics", 1), *TWO_ROUNDS])


def test_a_device_killed_in_each_phase_of_a_round_answers_when_it_is_asked_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the record, after it, while photos are read, before the reply is stored, before it is sent, on its way."""
    for owner, name in (
        (DevicePolicy, "record"),
        (Ledger, "record_attempt"),
        (DeviceDataset, "split"),
        (Ledger, "store_reply"),
        (Ledger, "record_transmission"),
    ):
        with monkeypatch.context() as patch, pytest.raises(FederationError, match="0 of 3 .* it is gone"):
            patch.setattr(owner, name, killed)
            run.rounds()
    run.link = lambda message, context, answer: answer(message, context) and killed()  # type: ignore[return-value]
    with pytest.raises(FederationError, match="0 of 3 .* it is gone"):
        run.rounds()
    run.link = answers
    assert who(run.rounds()) == [ALL, ALL]
    run.check_all_ledgers()


def test_devices_killed_in_each_exchange_answer_it_when_the_server_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before it stores its answer, one before it sends that, one on its way: nothing is computed again."""
    four = tiny_experiment(tmp_path / "recipe", {**CHANGES, "training.rounds": "4"})
    run, own = Run(four, started(four, tmp_path / "run")), Device.ledger
    deadly = {ALL[0]: "store_exchange", ALL[1]: "record_transmission", ALL[2]: ""}
    dying, done = dict[str, str](), set[tuple[int, int]]()

    def ledger(self: Device) -> Ledger:
        found = own(self)
        if name := dying.pop(self.name, ""):
            setattr(found, name, killed)
        return found

    def link(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        task, number = read_task(from_record(message.content)), int(context.node_config["partition-id"])
        exchange = isinstance(task, ExchangeTask) and task.exchange
        if exchange != EXCHANGES[task.round - 1] or (task.round, number) in done:
            return answer(message, context)
        done.add((task.round, number))
        dying[ALL[number]] = deadly[ALL[number]]
        return answer(message, context) and killed()  # type: ignore[return-value]

    monkeypatch.setattr(Device, "ledger", ledger)
    run.link = link
    for number in range(1, 5):
        with pytest.raises(FederationError, match=f"round {number}: .* resume to try again, once more"):
            run.rounds()
    assert who(run.rounds()) == [ALL] * 4
    for number in range(3):
        run.check_ledger(number, [("run", round) for round in range(1, 5)])


def test_a_sum_that_cannot_be_revealed_twice_is_given_up_and_the_run_goes_on(
    run: Run, quick_detection: None
) -> None:
    """Of metrics, since all devices are gone; of updates, since one sends what no sum can be: no one sees which."""

    def gone(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        reply, task = answer(message, context), read_task(from_record(message.content))
        return killed() if isinstance(task, ExchangeTask) and task.exchange == "reveal" else reply  # type: ignore[return-value]

    def hostile(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        task, reply = read_task(from_record(message.content)), answer(message, context)
        found = read_reply(from_record(reply.content))
        if (
            context.node_config["partition-id"] != 1
            or task.round != 1
            or not isinstance(found, ExchangeResult)
        ):
            return reply
        if task.exchange == "masked":  # type: ignore[union-attr]
            vector, *rest = (sent := Payload.from_bytes(found.content)).parts
            huge = (np.frombuffer(vector, "<u4") + np.uint32(1 << 31)).astype("<u4").tobytes()
            found = replace(found, content=replace(sent, parts=(huge, *rest)).to_bytes())
        return FlowerMessage(to_record(to_message(found)), reply_to=message)

    run.link = gone
    with pytest.raises(FederationError, match="resume to try again, once more"):
        run.evaluate()
    (record,) = run.evaluate().device_metrics
    assert "these metrics are given up, and the report lacks them" in run.progress.text
    assert "nothing was measured: the sum of the devices' metrics could not" in record.estimates.headline()
    run.link = hostile
    with pytest.raises(FederationError, match="resume to try again, once more"):
        run.rounds()
    assert who(run.rounds()) == [(), ALL]
    assert "the round is given up, and the model stays as it is" in run.progress.text
    for number in range(3):
        run.check_ledger(number, [("run/metrics", 1), *TWO_ROUNDS])


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, timedelta]:
    """How far the clocks of devices are ahead."""
    ahead: dict[str, timedelta] = {}

    def ledger(self: Device) -> Ledger:
        def now() -> datetime:
            return datetime.now(UTC) + ahead.get(self.name, timedelta())

        return Ledger.open(self.ledger_path, witness=self.witness, now=now)

    monkeypatch.setattr(Device, "ledger", ledger)
    return ahead


def test_a_laptop_closed_for_a_day_misses_a_round_and_takes_part_in_the_next(
    run: Run, clocks: dict[str, timedelta], caplog: pytest.LogCaptureFixture
) -> None:
    """It does not send what it computed a day ago; the same round, if it is asked again, costs nothing more."""

    def closed(size: int) -> DeviceDataset:
        clocks["device-01"] = ENTRY_LIFETIME + timedelta(hours=1)
        return PHOTOS

    task = run.first_task()
    run.change = lambda number, device: replace(device, photos=closed) if number == 1 else device
    assert who(run.first_round()) == [OTHERS]
    assert "was computed for more than 1 day; nothing is sent" in caplog.text
    run.change = lambda number, device: device
    assert isinstance(handle_task(task, run.device(1)), TrainResult)
    assert who(run.rounds()) == [OTHERS, ALL]
    run.check_all_ledgers()


def test_an_unplugged_photo_folder_costs_nothing_before_a_round_and_that_round_during_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Missing when the request comes: an error, nothing recorded. Gone while it is read: noise alone, as priced,
    and no part in a masked sum until it is back.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "index"))
    photos, away, owner = tmp_path / "photos", tmp_path / "away", tmp_path / "device.yaml"
    owner.write_text(
        f"name: device-01\nphotos: {photos}\nstate: {devices_folder(run.folder) / 'device-01'}\n"
        "answer_seconds: 0\npolicy: {max_epsilon: 8, delta: 1e-3, protocols: [masked], min_cohort_size: 2}\n"
    )

    def change(number: int, device: Device) -> Device:
        if number != 1:
            return device
        real = load_device(owner)

        def unplugged(size: int) -> DeviceDataset:
            photos.rename(away)
            return real.photos(size)

        return replace(real, photos=unplugged)

    run.change = change
    state = run.first_round()
    assert who(state) == [OTHERS] and "stopped with ConfigError" in state.rounds[0].dropped[0].reason
    photos.mkdir()
    state = run.rounds()
    assert who(state) == [OTHERS, OTHERS] and "ConfigError" in state.rounds[1].dropped[0].reason
    assert away.is_dir() and not photos.exists()
    run.change = lambda number, device: device
    run.check_ledger(0, TWO_ROUNDS)
    run.check_ledger(1, TWO_ROUNDS[1:])


def test_a_full_disk_of_a_device_is_one_sentence_and_no_second_release(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each record of a round, and before each copy of the ledger's head: with room again the device answers."""
    append, write, task, device = Transaction.append, Head.write, run.first_task(), run.device(0)
    records: Iterator[bool] = iter(())
    heads: Iterator[bool] = iter(())

    def full_file(self: Transaction, *given: object, **more: object) -> object:
        if next(records, False):
            self.sql.execute(
                "PRAGMA max_page_count = 1"
            )  # no more than there are: SQLite's own error follows
            self.sql.execute("INSERT INTO replies VALUES (0, '', zeroblob(1000000))")
        return append(self, *given, **more)  # type: ignore[arg-type]

    def full_folder(self: Head, path: Path) -> None:
        if next(heads, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(self, path)

    monkeypatch.setattr(Transaction, "append", full_file)
    monkeypatch.setattr(Head, "write", full_folder)
    # The first, second ... record or head of each attempt: a new file, the run, its release (twice), a computation
    # (twice), the reply (twice), what is sent (twice). An attempt after a missing head begins with that head.
    for kind, number in ("h1", "r1", "r2", "h1", "r1", "h1", "r2", "h2", "r1", "h1"):
        fault = iter([False] * (int(number) - 1) + [True])
        records, heads = (fault, iter(())) if kind == "r" else (iter(()), fault)
        with pytest.raises(LedgerError, match="because the disk is full .* make room: nothing is sent"):
            handle_task(task, device)
        assert next(fault, None) is None
    with device.ledger() as ledger:
        assert [one.kind for one in ledger.read().transmissions] == ["exchange"]
    assert who(run.rounds()) == [ALL, ALL]
    run.check_all_ledgers()


def test_a_full_disk_of_the_server_ends_the_run_by_the_name_of_a_file(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record, then the checkpoint of a round: the command line prints the file and the reason. The run resumes."""
    move = os.replace
    for name in ("state.json", "001.safetensors"):

        def full(source: Path, target: Path, name: str = name) -> None:
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
            move(source, target)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
            patch.setattr("fedface.atomic_io.os.replace", full)
            run.rounds()
        assert Path(error.value.filename).name == name
        assert not list(run.folder.rglob("*.draft"))
    assert who(run.rounds()) == [ALL, ALL]
    run.check_all_ledgers()


def test_a_clock_moved_back_and_forward_frees_no_budget_for_life(
    run: Run, clocks: dict[str, timedelta]
) -> None:
    """A year ahead in the first round, a year behind in the second; then another run is refused at any date."""
    clocks["device-01"] = timedelta(days=366)
    task = run.first_task()
    assert who(run.first_round()) == [ALL]
    clocks["device-01"] = timedelta(days=-366)
    assert who(run.rounds()) == [ALL, ALL]
    run.check_all_ledgers()
    for days in (-366, 0, 366, 20_000):
        clocks["device-01"] = timedelta(days=days)
        refusal = handle_task(replace(task, run="another"), run.device(1))
        assert isinstance(refusal, Refusal) and "already spent" in refusal.reason


def test_two_devices_with_one_name_are_two_devices_and_the_operator_reads_it(run: Run) -> None:
    """Each has its ledger, its noise and its part in the sum."""
    run.change = lambda number, device: replace(device, name="device-00") if number == 1 else device
    assert who(run.rounds()) == [("device-00", "device-00", "device-02")] * 2
    assert "several devices are named device-00" in run.progress.text
    run.check_all_ledgers()


def test_one_state_folder_on_two_devices_is_one_update_and_one_entry(run: Run) -> None:
    """Both send the stored reply, and a sum of several devices counts it once."""
    state = run.device(0).state
    run.change = lambda number, device: (
        replace(device, name="device-00", state=state) if number == 1 else device
    )
    rounds = run.rounds()
    assert who(rounds) == [OTHERS, OTHERS]
    assert all("give each its own state folder" in record.dropped[0].reason for record in rounds.rounds)
    run.check_ledger(0, TWO_ROUNDS)
    run.check_ledger(2, TWO_ROUNDS)


def test_one_key_on_two_devices_is_one_member_and_each_ledger_has_what_it_sent(run: Run) -> None:
    """Flower knows a key, so either may get a request: here the first round reaches one, the second the other, which
    then has no part in the first. A request that reaches both costs each its own release, and one reply is counted.
    """
    other = run.folder.with_name("other") / "state"

    def change(number: int, device: Device) -> Device:
        return replace(device, state=other) if number == 1 and second else device

    other.mkdir(parents=True, mode=0o700)
    second, run.change = False, change
    assert who(run.first_round()) == [ALL]
    second = True
    state = run.rounds()
    assert who(state) == [ALL, ALL] and not state.rounds[1].dropped
    run.check_ledger(1, [("run", 2)])
    second = False
    run.check_ledger(1, [("run", 1)])
    for number in (0, 2):
        run.check_ledger(number, TWO_ROUNDS)


def test_a_link_that_repeats_requests_and_loses_replies_costs_nothing(run: Run) -> None:
    """Each request arrives twice, and each first reply is lost: the run is resumed once for each round."""
    arrived: set[tuple[int, str]] = set()

    def lossy(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        replies = [answer(message, context) for _ in range(2)]
        key = context.node_id, message.metadata.group_id
        if key not in arrived:
            arrived.add(key)
            killed()
        return replies[1]

    run.link = lossy
    for done in (0, 1):
        with pytest.raises(FederationError, match=f"round {done + 1}: 0 of 3 devices .* resume the run"):
            run.rounds()
        assert len(RunState.read(run.folder).rounds) == done
    assert who(run.rounds()) == [ALL, ALL]
    run.check_all_ledgers()
    with run.device(0).ledger() as ledger:
        sent = [one for one in ledger.read().transmissions if one.round == 1]
    assert [one.resent for one in sent if one.kind == "update"] == [False, True]
    assert [one.resent for one in sent].count(False) == 5  # keys, and an answer in each exchange


def test_hostile_and_replayed_masked_replies_are_dropped_by_name_and_cost_no_one_anything(run: Run) -> None:
    """A vector that is too short in the first round, and that round's keys again in the second."""
    keys = []

    def hostile(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        reply = read_reply(from_record((answered := answer(message, context)).content))
        if context.node_config["partition-id"] != 1:
            return answered
        if isinstance(reply, TrainResult):
            keys.append(reply.payload)
            reply = replace(reply, payload=keys[0])
        elif read_task(from_record(message.content)).exchange == "masked":  # type: ignore[union-attr]
            vector, *rest = (sent := Payload.from_bytes(reply.content)).parts  # type: ignore[union-attr]
            reply = replace(reply, content=replace(sent, parts=(vector[4:], *rest)).to_bytes())  # type: ignore[type-var, call-arg]
        return FlowerMessage(to_record(to_message(reply)), reply_to=message)

    run.link = hostile
    state = run.rounds()
    assert who(state) == [OTHERS, OTHERS]
    assert "masked numbers, got" in state.rounds[0].dropped[0].reason
    assert "expected a message of the exchange 'keys' of round 2" in state.rounds[1].dropped[0].reason
    run.check_all_ledgers()


def test_hostile_and_replayed_plain_replies_are_dropped_by_name_and_cost_no_one_anything(
    tmp_path: Path,
) -> None:
    """An update of 1e30 in the first round, and that round's true reply again in the second."""
    plain = tiny_experiment(tmp_path / "recipe", {**CHANGES, "aggregation": "{kind: plain}"})
    run, replies = Run(plain, started(plain, tmp_path / "run")), []

    def hostile(message: FlowerMessage, context: Context, answer: Answer) -> FlowerMessage:
        reply = answer(message, context)
        if context.node_config["partition-id"] != 1:
            return reply
        replies.append(reply.content)
        if len(replies) == 2:
            return FlowerMessage(replies[0], reply_to=message)
        honest = read_reply(from_record(reply.content))
        assert isinstance(honest, TrainResult)
        length = Payload.from_bytes(honest.payload).length
        huge = PlainAggregation(max_devices=3).protect(torch.full((length,), 1e30), 1)
        return FlowerMessage(
            to_record(to_message(replace(honest, payload=huge.to_bytes()))), reply_to=message
        )

    run.link = hostile
    state = run.rounds()
    assert who(state) == [OTHERS, OTHERS]
    assert [
        "1e+30" in state.rounds[0].dropped[0].reason,
        "of round 1" in state.rounds[1].dropped[0].reason,
    ] == [
        True,
        True,
    ]
    run.check_all_ledgers()
