"""Runs with distributed noise: the server reads a noised sum, and a recipe that cannot have it is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from pytest import approx
from tiny import SilentProgress, evaluate_task, started, tiny_way

from fedface.coordinator import rounds
from fedface.coordinator.aggregate import RoundSum, SumListener, collect_and_sum
from fedface.coordinator.rounds import participants, run_rounds
from fedface.coordinator.run_state import RunState
from fedface.errors import ConfigError
from fedface.experiment import Experiment, devices_folder
from fedface.privacy.ledger import Ledger
from fedface.simulation.devices import prepare
from fedface.simulation.in_process import in_process_cohort

THREE = {
    "devices": "{kind: synthetic-devices, light_fractions: [0.9, 0.5, 0.1], photos_per_device: 8}",
    "aggregation": "{kind: masked, min_devices: 3, dropout_share: 0}",
    "min_responses": "3",
}
DROPOUT = "{kind: masked, min_devices: 3, dropout_share: 0.34}"  # the graph of three then has room for one
ONE_STEP = "{kind: flow-training, rounds: 1, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: 8}"


def target(**changes: object) -> str:
    terms = {"epsilon": 0.1, "delta": 1e-3, "noise": "distributed", "honest_fraction": 0.67} | changes
    return f"{{kind: privacy-target, {', '.join(f'{key}: {value}' for key, value in terms.items())}}}"


def total_of(experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RoundSum:
    """The one sum of a run."""
    sums: list[RoundSum] = []

    def collect(*arguments: object, **named: object) -> RoundSum:
        sums.append(collect_and_sum(*arguments, **named))  # type: ignore[arg-type]
        return sums[-1]

    monkeypatch.setattr(rounds, "collect_and_sum", collect)
    folder = started(experiment, folder)
    cohort = in_process_cohort(experiment, devices_folder(folder))
    run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), None, SilentProgress())
    (entry,) = Ledger.open(devices_folder(folder) / "device-00" / "ledger.sqlite").entries()
    assert (entry.metadata["noise"], entry.metadata["honest_devices"]) == ("distributed", "2")
    return sums[0]


@pytest.mark.parametrize("unit", ["library", "photo"])
def test_the_sum_has_the_noise_of_three_shares_of_which_two_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """Variance sigma^2 clip^2 3 / 2 on every number; beside it the updates are small."""
    changes = {**THREE, "privacy": target(unit=unit), "update_clip_norm": "0.5", "training": ONE_STEP}
    experiment = tiny_way(tmp_path / "recipe", "flow", changes)
    plan = experiment.plan()
    clip = 0.5 if unit == "library" else plan.schedule.clip_norm
    found = total_of(experiment, tmp_path / "run", monkeypatch)
    assert found.count == 3 and plan.honest_devices == 2
    assert float(found.total.std()) == approx(plan.noise_multiplier * clip * math.sqrt(1.5), rel=0.05)


def test_the_sum_of_metrics_has_the_noise_of_all_shares(tmp_path: Path) -> None:
    """As that of updates; no device has a photo among the hundredth that is evaluated."""
    held_out = "{holdout_fraction: 0.01}"
    changes = {**THREE, "privacy": target(), "training": ONE_STEP, "evaluation": held_out}
    experiment = tiny_way(tmp_path / "recipe", "flow", changes)
    prepare(experiment, tmp_path / "devices")
    cohort = in_process_cohort(experiment, tmp_path / "devices")
    task = replace(evaluate_task(experiment), cohort=3)
    dp, length = task.request.dp, len(task.request.ranges())
    listener = SumListener(
        progress=lambda done: None,
        revealing=lambda count: None,
        withdrawn=lambda names: None,
        given_up=lambda why: None,
    )
    members = participants(experiment, cohort, 1, set())
    found = collect_and_sum(experiment, cohort, members, task, length, listener)
    assert found.count == 3 and found.total is not None
    expected = dp.noise_multiplier * dp.schedule.clip_norm * math.sqrt(1.5)
    assert float(found.total.std()) == approx(expected, rel=6 / math.sqrt(2 * length))


@pytest.mark.parametrize(
    ("way", "changes", "words"),
    [
        ("flow", {"aggregation": "{kind: plain}"}, "aggregation: must be masked with distributed noise"),
        ("flow", {"training": "{kind: flow-training, steps_per_round: 2}"}, "steps_per_round must be 1"),
        (
            "flow",
            {"privacy": target(honest_fraction=1), "aggregation": DROPOUT},
            "noise of only 2 honest ones",
        ),
        ("full", {"training": "{kind: gan-training, steps_per_round: 1}"}, "this training needs local noise"),
    ],
)
def test_what_cannot_have_distributed_noise_is_refused_in_the_experiment(
    tmp_path: Path, way: str, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_way(tmp_path, way, {**THREE, "privacy": target(), "training": ONE_STEP, **changes})
