"""`fedface device status`, `pause` and `resume`: what they say of a device, and what a paused one answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result, caller
from tiny import answered_device, tiny_gan, train_task

from fedface.cli.child_processes import started
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.experiment import Experiment
from fedface.messages.messages import Refusal, TrainResult


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Device, Experiment]:
    """The file of a device that has answered one round of two, that device, and its run."""
    folder = tmp_path_factory.mktemp("device")
    device, experiment = answered_device(folder)
    return folder / "device.yaml", device, experiment


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `fedface device ...` in this process."""
    return caller(monkeypatch, capsys, "device")


def test_a_status_names_the_budget_with_its_delta_and_what_left_last(  # type: ignore[no-untyped-def]
    fedface, answered: tuple[Path, Device, Experiment]
) -> None:
    """In words and as JSON; the whole run is spent after its first round."""
    file, _, _ = answered
    shown = " ".join(fedface("status", file).out.split())
    assert f"a: not running; `fedface device start {file}` starts it" in shown
    assert "Spent so far: epsilon 7.9" in shown and "at delta 0.001 per photo. Allowed for life: 8" in shown
    assert "UTC: An update of a network's weights, for tiny, round 1" in shown
    record = json.loads(fedface("status", file, "--json").out)
    (budget,) = record["budgets"]
    assert 7 < budget["spent"]["upper"] <= 8 and budget["delta"] == 1e-3 and budget["unit"] == "photo"
    assert budget["remaining"] == pytest.approx(8 - budget["spent"]["upper"])
    assert (record["running"], record["connected"], record["paused"], record["plans"]) == (
        False,
        False,
        False,
        [],
    )
    assert record["last"]["kind"] == "update"


def test_a_paused_device_refuses_and_a_resumed_one_answers(  # type: ignore[no-untyped-def]
    fedface, answered: tuple[Path, Device, Experiment]
) -> None:
    """The server learns no more than "not now"; both commands may be repeated."""
    file, device, experiment = answered
    task = train_task(experiment, tiny_gan(), round=2)
    for _ in range(2):
        assert "every task is refused" in fedface("pause", file).out
    refused = handle_task(task, device)
    assert isinstance(refused, Refusal) and "does not take part now" in refused.reason
    assert "paused" not in refused.reason
    assert "paused" in fedface("status", file).out
    for _ in range(2):
        assert fedface("resume", file).out.startswith("Resumed")
    assert isinstance(handle_task(task, device), TrainResult)
    assert "paused" not in fedface("status", file).out


def test_a_running_device_is_connected_if_its_supernode_says_so(  # type: ignore[no-untyped-def]
    fedface, answered: tuple[Path, Device, Experiment]
) -> None:
    """By what it logged last; the log of a SuperNode that has ended counts for nothing."""
    file, device, _ = answered
    log = device.state / "supernode.log"
    lines = {
        "": False,
        "INFO : SuperNode ID: 7\n": True,
        "Connection attempt failed, retrying in 2 seconds\n": False,
        "Connection successful after 3 seconds\n": True,
    }
    with started(["sleep", "60"], log):
        for line, connected in lines.items():
            with log.open("a") as out:
                out.write(line)
            record = json.loads(fedface("status", file, "--json").out)
            assert (record["running"], record["connected"]) == (True, connected)
    assert not json.loads(fedface("status", file, "--json").out)["running"]


def test_a_condition_that_does_not_hold_is_named_to_the_owner(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "photos").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    file = tmp_path / "device.yaml"
    policy = "policy: {max_epsilon: 8, delta: 1e-6, max_load: 1e-9}"
    file.write_text(f"name: a\nphotos: photos\nstate: state\n{policy}\n")
    shown = fedface("status", file).out
    assert "takes no part: the load per core is" in shown and "nothing, ever" in shown
    assert [path.name for path in (tmp_path / "state").iterdir()] == []


@pytest.mark.parametrize("command", ["status", "pause", "resume"])
def test_a_state_folder_that_is_not_there_is_an_error(fedface, tmp_path: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    """A disk that is not mounted must not look like a device that has spent nothing."""
    (tmp_path / "photos").mkdir()
    file = tmp_path / "device.yaml"
    file.write_text("name: a\nphotos: photos\nstate: state\npolicy: {max_epsilon: 8, delta: 1e-6}\n")
    assert "there is no folder" in fedface(command, file).sentence


def test_the_device_of_a_join_needs_no_name(fedface, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """~/fedface/device.yaml is the default of each command."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        f"{tmp_path}/fedface/device.yaml: no such file; `fedface device join`" in fedface("status").sentence
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "fedface" / "state").mkdir(parents=True, mode=0o700)
    file = tmp_path / "fedface" / "device.yaml"
    file.write_text("name: a\nphotos: ../photos\nstate: state\npolicy: {max_epsilon: 8, delta: 1e-6}\n")
    assert fedface("pause").code == 0 and (file.parent / "state" / "paused").exists()
