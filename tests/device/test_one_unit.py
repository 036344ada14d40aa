"""Through the door of a device, in each training method and in evaluation: one unit's contribution, coins and noise.

Every check fails for a bug that was planted where no other test noticed it: units that are not passed on, a doubled
sampling rate, an evaluation whose noise follows from the task, a library's metrics that are not clipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import WAYS, evaluate_task, first_device, tiny_experiment, tiny_way, train_task

from fedface.aggregation.payload import Payload
from fedface.aggregation.plain import PlainAggregation
from fedface.device.client import handle_task
from fedface.messages.messages import EvaluateResult, TrainResult
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.mechanism import GaussianSum
from fedface.randomness import SecretNoise
from fedface.training import dp_sgd

OCCASION = {"privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: occasion}"}
EVALUATION = {
    "evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.5, metrics: {min_group_size: 2}}",
    "upsampling": "{method: {kind: pulse, steps: 2, mapping_samples: 64}}",
    "devices.photos_per_device": "6",
}


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The L2 norm of each sum to which noise is added, in clip norms."""
    seen: list[float] = []

    def spy(total: torch.Tensor, mechanism: GaussianSum, secret: SecretNoise) -> torch.Tensor:
        seen.append(float(total.double().norm()) / mechanism.clip_norm)
        return add_noise(total, mechanism, secret)

    monkeypatch.setattr(dp_sgd, "add_noise", spy)
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_an_occasion_of_many_photos_moves_each_sum_by_one_clip_norm(
    tmp_path: Path, way: str, sums: list[float]
) -> None:
    """24 photos, each of which would fill a clip norm alone, are one unit."""
    experiment = tiny_way(tmp_path / "recipe", way, OCCASION)
    device = first_device(experiment, tmp_path / "devices")
    images = device.photos(16).images
    one = replace(device, photos=lambda size: DeviceDataset.by_occasion(images, len(images)))
    assert isinstance(handle_task(train_task(experiment, experiment.start()), one), TrainResult)
    assert 0 < max(sums) <= 1 + 1e-4


@pytest.mark.parametrize("way", [way for way in WAYS if way != "prior"])
def test_units_join_with_the_probability_that_is_priced(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coins of every step have the schedule's sampling rate."""
    rates: list[float] = []
    sample = dp_sgd.sample_photos

    def spy(units: torch.Tensor, rate: float, rng: object) -> torch.Tensor:
        rates.append(rate)
        return sample(units, rate, rng)  # type: ignore[arg-type]

    monkeypatch.setattr(dp_sgd, "sample_photos", spy)
    experiment = tiny_way(tmp_path / "recipe", way, {"training.sampling_rate": "0.25"})
    task = train_task(experiment, experiment.start())
    assert isinstance(handle_task(task, first_device(experiment, tmp_path / "devices")), TrainResult)
    assert set(rates) == {0.25} and len(rates) == task.config.dp.schedule.steps_per_round


def test_noise_of_an_evaluation_does_not_follow_from_the_task(tmp_path: Path) -> None:
    """The same task, name and photos on two fresh devices give different bytes."""
    experiment = tiny_experiment(tmp_path / "recipe", EVALUATION)
    payloads = []
    for state in ("one", "two"):
        reply = handle_task(evaluate_task(experiment), first_device(experiment, tmp_path / state))
        assert isinstance(reply, EvaluateResult), reply
        payloads.append(reply.payload)
    assert payloads[0] != payloads[1]


def test_the_metrics_of_a_library_are_clipped_as_a_whole(tmp_path: Path) -> None:
    """Their norm is at most update_clip_norm, in public ranges."""
    changes = {
        **EVALUATION,
        "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: central}",
    }
    experiment = tiny_experiment(tmp_path / "recipe", changes)
    task = evaluate_task(experiment)
    request = replace(task.request, dp=replace(task.request.dp, update_clip_norm=0.01))
    device = first_device(experiment, tmp_path / "devices")
    reply = handle_task(replace(task, request=request), device)
    assert isinstance(reply, EvaluateResult), reply
    total = PlainAggregation(max_devices=2).reveal(Payload.from_bytes(reply.payload))
    assert 0 < float(total.norm()) <= 0.01 * (1 + 1e-3)
