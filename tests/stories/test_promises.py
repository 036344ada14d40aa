"""Privacy guarantees that hold on the device: used-up budgets, forged plans, rolled-back ledgers, concurrent runs and
power cuts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from processes import PROCESSES
from tiny import SilentProgress, first_device, started, tiny_experiment, tiny_gan, train_task

from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run_state import RunState
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.errors import LedgerError, PrivacyError
from fedface.experiment import Experiment, devices_folder, read_experiment
from fedface.messages.messages import Message, Refusal, TrainResult, TrainTask, to_message
from fedface.messages.parsing import read_task
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger
from fedface.privacy.plan import DPParameters
from fedface.simulation.devices import simulated_device
from fedface.simulation.in_process import in_process_cohort

DELTA = 1e-3  # of the tiny experiment


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rounds under epsilon 8."""
    return tiny_experiment(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def device(experiment: Experiment, tmp_path: Path) -> Device:
    """Its first device, with a fresh ledger and a witness elsewhere."""
    return replace(first_device(experiment, tmp_path / "devices"), witness=tmp_path / "elsewhere")


def ask(experiment: Experiment, run: str, round: int) -> TrainTask:
    """A round of a run of this name."""
    return train_task(experiment, tiny_gan(), run=run, round=round)


def unread(size: int) -> DeviceDataset:
    """Photos that must not be read."""
    raise AssertionError("a photo was read")


# The budget runs out.


def test_the_budget_is_used_up_and_the_next_run_continues_without_the_device(
    tmp_path: Path,
) -> None:
    """The device completes the first run and refuses the second with three numbers; the others continue."""
    recipe = tiny_experiment(tmp_path / "recipe", {"min_responses": "1"})
    states = []
    for name in ("first", "second"):
        folder = started(recipe, tmp_path / name)
        if name == "second":  # the same two devices, of which one has a fresh library and so a fresh ledger
            stored = devices_folder(tmp_path / "first") / "device-00"
            shutil.rmtree(devices_folder(folder) / "device-00")
            shutil.copytree(stored, devices_folder(folder) / "device-00")
        cohort = in_process_cohort(recipe, devices_folder(folder))
        states.append(
            run_rounds(recipe, recipe.plan(), cohort, RunState.read(folder), None, SilentProgress())
        )
    first, second = states
    assert [len(record.participants) for record in first.rounds] == [2, 2]
    assert [record.participants for record in second.rounds] == [("device-01",), ("device-01",)]
    reason = second.rounds[0].refusals[0].reason
    for words in ("requests epsilon", "of 8 ", "already spent", "delta 0.001", "per photo"):
        assert words in reason
    for run, number in (("first", "00"), ("second", "00"), ("second", "01")):
        ledger = Ledger.open(devices_folder(tmp_path / run) / f"device-{number}" / "ledger.sqlite")
        assert ledger.spent(DELTA).upper <= 8.0


# A plan is forged.


def forged(task: TrainTask, **changes: object) -> TrainTask:
    """The task as a server might change it on the wire."""
    message = to_message(task)
    header = json.loads(message.header)
    for key, value in changes.items():
        place = header
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    read = read_task(Message(json.dumps(header), message.blobs))
    assert isinstance(read, TrainTask)
    return read


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"config__dp__noise_multiplier": 0.01}, "requests epsilon"),  # a whisper of noise
        ({"config__dp__noise_multiplier": 0.0}, "requests epsilon inf"),
        ({"config__dp__schedule__rounds": 100_000, "config__training__rounds": 100_000}, "requests epsilon"),
        (
            {"config__dp__unit": "library", "config__dp__noise": "central"},
            "does not trust",
        ),  # "the server adds the noise"
        ({"cohort": 1}, "only among 2 or more"),
    ],
)
def test_a_forged_plan_has_the_cost_of_its_noise_and_is_refused(
    experiment: Experiment, device: Device, changes: dict[str, object], answer: str
) -> None:
    """No photo is read, nothing is recorded, and the refusal has the reason."""
    strict = replace(device, photos=unread, policy=replace(device.policy, min_cohort_size=2))
    reply = handle_task(forged(ask(experiment, "forged", 1), **changes), strict)
    assert isinstance(reply, Refusal) and answer in reply.reason
    assert strict.ledger().entries() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"config__dp__schedule__sampling_rate": 0.001},  # a cheap schedule, costly training
        {"config__training__sampling_rate": 1.0},
        {"config__training__clip_norm": 100.0},
        {"config__dp__schedule__steps_per_round": 1},
    ],
)
def test_a_plan_whose_parameters_and_schedule_differ_is_refused(
    experiment: Experiment, device: Device, changes: dict[str, object]
) -> None:
    with pytest.raises(PrivacyError, match="differs from its DP parameters; nothing was computed"):
        handle_task(forged(ask(experiment, "forged", 1), **changes), replace(device, photos=unread))
    assert device.ledger().entries() == []


def test_a_policy_per_occasion_refuses_a_guarantee_per_photo(experiment: Experiment, device: Device) -> None:
    strict = replace(device, photos=unread, policy=replace(device.policy, unit="occasion"))
    reply = handle_task(ask(experiment, "photos", 1), strict)
    assert isinstance(reply, Refusal) and "per photo" in reply.reason and "per occasion" in reply.reason


def test_a_run_of_the_same_name_with_other_parameters_is_refused(
    experiment: Experiment, device: Device
) -> None:
    """A run is what it was recorded as; a round is not computed again for other parameters under its old name."""
    handle_task(ask(experiment, "run", 1), device)
    rich = replace(device, policy=replace(device.policy, max_epsilon=1000.0))
    louder = DPParameters(schedule=experiment.training.schedule(), noise_multiplier=50.0)
    task = ask(experiment, "run", 1)
    reply = handle_task(replace(task, config=replace(task.config, dp=louder)), rich)
    assert isinstance(reply, Refusal) and "was recorded with other noise" in reply.reason


# A ledger is rolled back.


def test_a_rolled_back_ledger_stops_the_device(
    experiment: Experiment, device: Device, tmp_path: Path
) -> None:
    """An old copy of the file, or of the whole folder: the device computes nothing and sends nothing."""
    handle_task(ask(experiment, "run", 1), device)
    backup = shutil.copytree(device.state, tmp_path / "backup")
    handle_task(ask(experiment, "run", 2), device)
    later = shutil.copytree(device.state, tmp_path / "later")

    shutil.copy(backup / "ledger.sqlite", device.ledger_path)
    with pytest.raises(LedgerError, match="rolled back|older|lacks"):
        handle_task(ask(experiment, "another", 1), replace(device, photos=unread))

    shutil.rmtree(device.state)
    shutil.copytree(backup, device.state)
    with pytest.raises(LedgerError):
        handle_task(ask(experiment, "another", 1), replace(device, photos=unread))

    shutil.rmtree(device.state)
    with pytest.raises(LedgerError, match="no state folder"):
        handle_task(ask(experiment, "another", 1), replace(device, photos=unread))

    shutil.copytree(later, device.state, dirs_exist_ok=True)  # the newest copy is welcome
    reply = handle_task(ask(experiment, "another", 1), replace(device, photos=unread))
    assert isinstance(reply, Refusal) and "already spent" in reply.reason


# Two runs at once.


def test_two_runs_at_once_cannot_overspend(experiment: Experiment, device: Device) -> None:
    """Eight servers send tasks to one device in threads; the ledger stays within the budget, and everything sent is
    recorded.
    """
    tasks = [ask(experiment, f"run-{number}", round) for round in (1, 2) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda task: handle_task(task, device), tasks))
    sent = [reply for reply in replies if isinstance(reply, TrainResult)]
    ledger = device.ledger()
    assert ledger.spent(DELTA).upper <= device.policy.max_epsilon
    assert len(sent) == len(ledger.entries())
    assert 1 <= len(sent) <= 3  # two rounds cost epsilon 8, and so does nearly any third
    assert any(isinstance(reply, Refusal) for reply in replies)
    one_more = epsilon_of(experiment.plan().event(len(sent) + 1), DELTA).upper
    assert one_more > device.policy.max_epsilon


def _asks_in_a_process(recipe: Path, devices: Path, run: str, result: Path) -> None:
    experiment = read_experiment(recipe)
    device = simulated_device(experiment, 0, devices)
    for round in (1, 2):
        reply = handle_task(ask(experiment, run, round), device)
        with result.open("a") as file:
            file.write(f"{type(reply).__name__}\n")


def test_two_processes_at_once_cannot_overspend(tmp_path: Path) -> None:
    """As two SuperNodes on one library would."""
    experiment = tiny_experiment(tmp_path / "recipe")
    first_device(experiment, tmp_path / "devices")
    workers = [
        PROCESSES.Process(
            target=_asks_in_a_process,
            args=(
                tmp_path / "recipe" / "tiny.yaml",
                tmp_path / "devices",
                f"run-{number}",
                tmp_path / "printed",
            ),
        )
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    result = (tmp_path / "printed").read_text().split()
    ledger = Ledger.open(tmp_path / "devices" / "device-00" / "ledger.sqlite")
    assert len(result) == 4 and result.count("TrainResult") == len(ledger.entries()) >= 1
    assert ledger.spent(DELTA).upper <= 8.0


# Power cuts.


def _replies_without_end(recipe: Path, devices: Path, sent: Connection) -> None:
    torch.set_num_threads(1)
    experiment = tiny_experiment(recipe)
    device = first_device(experiment, devices)
    device = replace(device, policy=replace(device.policy, max_epsilon=1e6))
    sent.send("ready")
    for number in range(1000):
        reply = handle_task(ask(experiment, f"run-{number}", 1), device)
        assert isinstance(reply, TrainResult)
        sent.send((f"run-{number}", hashlib.sha256(reply.payload).hexdigest()))


@pytest.mark.skipif(os.name != "posix", reason="needs signals that nothing can catch")
def test_after_a_power_cut_at_any_moment_everything_sent_is_recorded(tmp_path: Path) -> None:
    """Killed three times while it replies: the ledger opens, contains all that left, and resends the same bytes."""
    recipe, devices = tmp_path / "recipe", tmp_path / "devices"
    left: dict[str, str] = {}
    for answers, delay in ((1, 0.05), (2, 0.3), (1, 0.15)):
        received, sent = PROCESSES.Pipe(duplex=False)
        worker = PROCESSES.Process(target=_replies_without_end, args=(recipe, devices, sent))
        worker.start()
        sent.close()
        assert received.recv() == "ready"
        replies = [received.recv() for _ in range(answers)]
        time.sleep(delay)
        worker.kill()
        with suppress(EOFError):  # what else was sent before the end
            while True:
                replies.append(received.recv())
        worker.join()
        for run, digest in replies:
            assert left.setdefault(run, digest) == digest  # asked again, the same bytes
    assert left
    experiment = tiny_experiment(recipe)
    device = first_device(experiment, devices)
    recorded = {entry.run for entry in device.ledger().entries()}
    noted = {sent.run: sent.payload_digest for sent in device.ledger().read().transmissions}
    assert set(left) <= recorded and left.items() <= noted.items()
    assert len(device.ledger().entries()) == len(recorded)  # no round was recorded twice
