"""`fedface device plans` and `admit`: a later run of the same operator, and what its owner is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Result, caller
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_server import OPERATOR, FakeServer, running
from tiny import tiny_experiment, tiny_gan, train_task

from fedface.coordinator.requests import run_plan
from fedface.device.client import handle_task
from fedface.device.device import load_device
from fedface.experiment import Experiment
from fedface.messages.messages import Refusal, TrainResult
from fedface.messages.run_plan import RunPlan


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rounds under epsilon 8 at delta 1e-3."""
    return tiny_experiment(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def plan(experiment: Experiment) -> RunPlan:
    """Of that run."""
    return run_plan(experiment)


@pytest.fixture
def server(certificates: Path, plan: RunPlan) -> Iterator[FakeServer]:
    """It runs until the end of the test."""
    with running(FakeServer(certificates, plan.signed(OPERATOR))) as fake:
        yield fake


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `fedface device ...` in this process."""
    return caller(monkeypatch, capsys, "device")


@pytest.fixture
def device(fedface, server: FakeServer, plan: RunPlan, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    """The file of a device that has joined by an invitation to that plan."""
    (tmp_path / "photos").mkdir()
    code = server.invite(plan.signed(OPERATOR).hash).code()
    assert (
        fedface(
            "join", code, tmp_path / "fedface", "--photos", tmp_path / "photos", "--yes", "--no-service"
        ).code
        == 0
    )
    file = tmp_path / "fedface" / "device.yaml"
    file.write_text(file.read_text().replace("# answer_seconds: 60", "answer_seconds: 0"))
    return file


def later(server: FakeServer, plan: RunPlan) -> str:
    """The hash of another plan, which the server has from now on."""
    signed = plan.signed(OPERATOR)
    server.plan = signed.to_bytes()
    return signed.hash


def cheap(plan: RunPlan) -> RunPlan:
    """A run with much more noise, under another name."""
    assert plan.training is not None
    dp = replace(plan.training.dp, noise_multiplier=50.0)
    return replace(plan, name="cheap", training=replace(plan.training, dp=dp))


def test_a_later_plan_is_admitted_with_its_cost(
    fedface, device: Path, server: FakeServer, plan: RunPlan
) -> None:  # type: ignore[no-untyped-def]
    """Once; then both are listed, each with delta, unit and bounds."""
    other = later(server, cheap(plan))
    admitted = fedface("admit", other, device, "--yes")
    assert admitted.code == 0 and "This run fits the policy." in admitted.out
    assert "admitted already" in fedface("admit", other, device, "--yes").out
    listed = json.loads(fedface("plans", device, "--json").out)
    assert sorted(each["run"] for each in listed) == ["cheap", "tiny"]
    assert all(each["fits"] and each["price"]["unit"] == "photo" for each in listed)
    assert "2 rounds of 2 steps on this device" in listed[0]["description"]["Training"]
    (costly,) = [each["price"]["upper"] for each in listed if each["run"] == "tiny"]
    assert costly > next(each["price"]["upper"] for each in listed if each["run"] == "cheap")
    shown = " ".join(fedface("plans", device).out.split())
    assert other[:12] in shown and "at delta 1e-6 per photo" in shown


def test_a_plan_that_does_not_fit_the_budget_is_not_admitted_unasked(  # type: ignore[no-untyped-def]
    fedface, device: Path, server: FakeServer, plan: RunPlan
) -> None:
    """Its owner would have to change the policy first."""
    assert plan.training is not None
    everyone = replace(plan.training.dp.schedule, sampling_rate=1.0)  # quick to price
    dp = replace(plan.training.dp, schedule=everyone, noise_multiplier=0.4)
    other = later(server, replace(plan, name="costly", training=replace(plan.training, dp=dp)))
    result = fedface("admit", other, device, "--yes")
    assert result.code == 2 and "would be refused: over 2 rounds this run requests epsilon" in result.err
    assert [each["run"] for each in json.loads(fedface("plans", device, "--json").out)] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.signed(Ed25519PrivateKey.generate()).to_bytes(), "is not signed by the operator"),
        (lambda plan: replace(plan, name="other").signed(OPERATOR).to_bytes(), "instead of"),
        (lambda plan: b"", "has no run plan"),
    ],
)
def test_another_plan_than_that_of_the_hash_is_not_admitted(  # type: ignore[no-untyped-def]
    fedface, device: Path, server: FakeServer, plan: RunPlan, change: Callable[[RunPlan], bytes], words: str
) -> None:
    other = later(server, cheap(plan))
    server.plan = change(cheap(plan))
    result = fedface("admit", other, device, "--yes")
    assert result.code == 2 and words in result.err
    assert len(list((device.parent / "state" / "plans").iterdir())) == 1


@pytest.mark.parametrize("text", ["../../device", "abc", "A" * 64])
def test_a_hash_names_no_other_file(fedface, device: Path, server: FakeServer, text: str) -> None:  # type: ignore[no-untyped-def]
    server.requests.clear()
    assert "64 hexadecimal digits" in fedface("admit", text, device, "--yes").sentence
    assert server.requests == []


def test_a_removed_plan_is_refused_and_can_be_admitted_again(  # type: ignore[no-untyped-def]
    fedface, device: Path, server: FakeServer, plan: RunPlan, experiment: Experiment
) -> None:
    """The run goes on where it was, without a second charge."""
    first, second = (train_task(experiment, tiny_gan(), round=round) for round in (1, 2))
    assert isinstance(handle_task(first, load_device(device)), TrainResult)
    assert "has begun here" in fedface("plans", device).out
    plan_hash = plan.signed(OPERATOR).hash
    assert "Removed" in fedface("plans", device, "--remove", plan_hash[:12]).out
    assert "No run plan is admitted" in fedface("plans", device).out
    assert isinstance(handle_task(second, load_device(device)), Refusal)
    assert "has begun here" in fedface("admit", plan_hash, device, "--yes").out
    assert isinstance(handle_task(second, load_device(device)), TrainResult)


def test_an_unknown_beginning_removes_nothing(fedface, device: Path) -> None:  # type: ignore[no-untyped-def]
    assert "no admitted run plan begins with zz" in fedface("plans", device, "--remove", "zz").sentence
    assert len(list((device.parent / "state" / "plans").iterdir())) == 1


def test_a_device_without_an_operator_has_no_plans(fedface, device: Path) -> None:  # type: ignore[no-untyped-def]
    lines = device.read_text().splitlines(keepends=True)
    device.write_text("".join(line for line in lines if not line.startswith("operator:")))
    assert "names no operator" in fedface("plans", device).sentence
