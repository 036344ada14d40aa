"""A signed run plan: a device answers what its owner admitted, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny import first_device, tiny_experiment, tiny_gan, train_task

from fedface.coordinator.requests import run_plan
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.errors import ConfigError
from fedface.experiment import Experiment
from fedface.messages.messages import DecryptTask, Refusal, TrainResult, TrainTask
from fedface.messages.run_plan import AdmittedPlans, SignedPlan
from fedface.privacy.ledger import Ledger

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = OPERATOR.public_key().public_bytes_raw()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rounds under epsilon 8."""
    return tiny_experiment(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def signed(experiment: Experiment) -> SignedPlan:
    """Its plan."""
    return run_plan(experiment).signed(OPERATOR)


@pytest.fixture(scope="module")
def task(experiment: Experiment) -> TrainTask:
    """Its first round."""
    return train_task(experiment, tiny_gan())


@pytest.fixture
def device(experiment: Experiment, tmp_path: Path, signed: SignedPlan) -> Device:
    """A device whose owner has admitted the plan."""
    plans = AdmittedPlans(folder=tmp_path / "plans", operator=PUBLIC)
    plans.folder.mkdir()
    plans.path(signed.hash).write_bytes(signed.to_bytes())
    return replace(first_device(experiment, tmp_path), plans=plans)


def test_a_request_of_an_admitted_plan_is_answered(device: Device, task: TrainTask) -> None:
    """Its weights, round and seed are no part of the plan."""
    assert isinstance(handle_task(task, device), TrainResult)


def test_a_request_that_differs_from_the_plan_is_refused_before_it_is_recorded(
    device: Device, task: TrainTask
) -> None:
    """Even with more noise, which costs less: what the owner read is what runs."""
    dp = replace(task.config.dp, noise_multiplier=3.0)
    answer = handle_task(replace(task, config=replace(task.config, dp=dp)), device)
    assert isinstance(answer, Refusal)
    assert answer.reason.endswith("differs from tiny in dp.noise_multiplier. Send the owner the plan's hash.")
    assert Ledger.open(device.ledger_path).entries() == []


def test_an_unplanned_evaluation_is_refused(device: Device, task: TrainTask, experiment: Experiment) -> None:
    """A plan of training alone admits no metrics, and no training beside them."""
    evaluated = replace(task, evaluation_dp=task.config.dp)
    assert device.plans is not None
    (plan,) = device.plans.read().values()
    assert plan.difference(evaluated).startswith("releases.evaluation")
    assert plan.difference(task) == ""


def test_a_sum_is_decrypted_only_with_the_plans_aggregation(device: Device, task: TrainTask) -> None:
    """The smallest sum that may be opened is in the plan."""
    assert device.plans is not None
    (plan,) = device.plans.read().values()
    opening = DecryptTask(
        run=task.run,
        round=1,
        aggregation=task.config.aggregation,
        agreement=task.config.agreement,
        total=b"sum",
    )
    assert plan.difference(opening) == ""
    more = replace(opening, agreement=replace(opening.agreement, max_devices=99))
    assert plan.difference(more) == "agreement.max_devices"
    assert plan.difference(replace(opening, sum_of="metrics")) == "metrics"


def test_without_an_admitted_plan_everything_is_refused(device: Device, task: TrainTask) -> None:
    assert device.plans is not None
    empty = replace(device, plans=replace(device.plans, folder=device.state / "none"))
    assert isinstance(answer := handle_task(task, empty), Refusal) and "no run plan" in answer.reason


def test_the_hash_is_that_of_the_signed_bytes_and_the_same_for_the_same_experiment(
    experiment: Experiment, signed: SignedPlan
) -> None:
    """What an invitation names can be computed again from the experiment file."""
    again = run_plan(experiment).signed(Ed25519PrivateKey.generate())
    assert again.hash == signed.hash
    assert SignedPlan.from_bytes(signed.to_bytes(), PUBLIC) == signed
    assert json.loads(signed.content)["version"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.replace(b'"rounds":2', b'"rounds":9'),
        lambda file: b"00" * 64 + file[128:],
        lambda file: file[128:],
        lambda file: b"",
        lambda file: file + b" " * (1 << 20),
        lambda file: b"\xff" + file,
    ],
)
def test_a_changed_plan_is_rejected(signed: SignedPlan, change: Callable[[bytes], bytes]) -> None:
    """Changed, unsigned, empty, endless, or not text."""
    with pytest.raises(ConfigError, match="signed"):
        SignedPlan.from_bytes(change(signed.to_bytes()), PUBLIC)


def test_a_plan_under_another_name_is_not_admitted(device: Device, signed: SignedPlan) -> None:
    """A process that can write to the state folder cannot replace what the owner admitted by an older plan."""
    assert device.plans is not None
    device.plans.path(signed.hash).rename(device.plans.path("0" * 64))
    with pytest.raises(ConfigError, match="its owner has not admitted it"):
        device.plans.read()
