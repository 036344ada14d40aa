"""Runs with distributed noise: the server reads a noised sum, and a recipe that cannot have it is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pytest import approx
from tiny import SilentProgress, started, tiny_way

from fedface.coordinator import rounds
from fedface.coordinator.aggregate import RoundSum, collect_and_sum
from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run_state import RunState
from fedface.errors import ConfigError
from fedface.experiment import Experiment, devices_folder
from fedface.privacy.ledger import Ledger
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
