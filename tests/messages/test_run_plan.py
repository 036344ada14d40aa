"""A signed run plan: a device answers what its owner admitted, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny import WAYS, first_device, tiny_experiment, tiny_gan, train_task

from fedface.coordinator.device_evaluation import Evaluation
from fedface.coordinator.model_ranking import ranking_plan
from fedface.coordinator.requests import run_plan
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.errors import ConfigError, PolicyRefusal
from fedface.experiment import Experiment, for_ranking
from fedface.messages.messages import (
    EvaluateResult,
    EvaluateTask,
    ExchangeTask,
    Refusal,
    TrainResult,
    TrainTask,
)
from fedface.messages.run_plan import AdmittedPlans, SignedPlan
from fedface.models.model import Model, build_model
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.ledger import Ledger
from fedface.privacy.plan import DPParameters, RunReleases
from fedface.randomness import Streams

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


def test_requests_of_both_admitted_plans_of_one_name_are_answered(
    device: Device, task: TrainTask, signed: SignedPlan
) -> None:
    """An operator changed a run and published it again; what differs from both is refused with each difference."""
    assert device.plans is not None
    quiet, clipped = (
        replace(task, config=replace(task.config, dp=replace(task.config.dp, **change)))
        for change in ({"noise_multiplier": 3.0}, {"update_clip_norm": 0.5})
    )
    changed = replace(signed.plan, training=quiet.config).signed(OPERATOR)
    device.plans.path(changed.hash).write_bytes(changed.to_bytes())
    device.plans.check(task)
    device.plans.check(quiet)
    with pytest.raises(PolicyRefusal) as refusal:
        device.plans.check(clipped)
    assert str(refusal.value).count("it differs from tiny in dp.") == 2


def test_a_run_of_another_name_is_not_the_plans(device: Device, task: TrainTask) -> None:
    """A run that is started again has a number after its name."""
    answer = handle_task(replace(task, run="tiny-new"), device)
    assert isinstance(answer, Refusal) and "differs from tiny in name" in answer.reason
    assert isinstance(handle_task(replace(task, run="tiny-2"), device), TrainResult)


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
    opening = ExchangeTask(
        run=task.run,
        round=1,
        aggregation=task.config.aggregation,
        agreement=task.config.agreement,
        exchange="decrypt",
        content=b"sum",
    )
    assert plan.difference(opening) == ""
    more = replace(opening, agreement=replace(opening.agreement, max_devices=99))
    assert plan.difference(more) == "agreement.max_devices"
    assert plan.difference(replace(opening, sum_of="metrics")) == "metrics"


def test_a_device_that_admitted_a_ranking_evaluates_its_models_and_nothing_else(
    device: Device, task: TrainTask, tmp_path: Path
) -> None:
    """Two architectures in one ranking; not a third, not more models than were priced, and no training."""
    changes = {"privacy.epsilon": "60", "upsampling": "{method: {kind: pulse, steps: 1, mapping_samples: 8}}"}
    recipe = for_ranking(tiny_experiment(tmp_path, changes))
    base, other = tiny_gan(), tiny_gan("other")
    flow, stranger = (build_model(WAYS[way][1], Streams(5).generator(way)) for way in ("flow", "resolver"))
    plan = ranking_plan(recipe, [base, flow, other])
    assert plan.name == "tiny-ranking" and len(plan.evaluations) == 2  # the two GANs are evaluated alike
    assert plan == ranking_plan(recipe, [other, base, flow])  # nothing shows which model is which
    signed = plan.signed(OPERATOR)
    assert SignedPlan.from_bytes(signed.to_bytes(), PUBLIC) == signed
    dp = plan.evaluations[0].dp
    tasks = [ranking_task(recipe, dp, model) for model in (base, flow, other)]
    assert [plan.difference(each) for each in tasks] == ["", "", ""]
    assert plan.difference(ranking_task(recipe, dp, stranger))
    four = replace(dp, schedule=replace(dp.schedule, rounds=4))
    assert plan.difference(ranking_task(recipe, four, base)) == "dp.schedule.rounds"
    with pytest.raises(ValueError, match="architecture and method alone"):  # one would be shown, another paid
        replace(plan, evaluations=(plan.evaluations[0], replace(plan.evaluations[1], dp=four)))

    assert device.plans is not None
    (trained,) = device.plans.folder.iterdir()
    trained.unlink()
    device.plans.path(signed.hash).write_bytes(signed.to_bytes())
    two = DeviceDataset.independent(torch.rand(2, 3, 16, 16))
    policy = replace(device.policy, evaluation=True, max_epsilon=60.0)
    evaluating = replace(device, photos=lambda size: two, policy=policy)
    assert isinstance(handle_task(tasks[0], evaluating), EvaluateResult)
    assert isinstance(answer := handle_task(task, evaluating), Refusal) and "no run plan" in answer.reason


def ranking_task(recipe: Experiment, dp: DPParameters, model: Model) -> EvaluateTask:
    """The request to evaluate one of the models of a ranking."""
    assert recipe.evaluation is not None
    return Evaluation(
        run="tiny-ranking",
        number=1,
        name="secret",
        model=model,
        releases=RunReleases(evaluation=dp),
        config=recipe.evaluation.metrics,
        holdout_fraction=0.0,
    ).task(recipe, 2)


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
    assert json.loads(signed.content)["version"] == 2


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
