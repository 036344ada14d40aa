"""A hundred devices in one process, of which some are lost in each exchange of a masked sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tiny import NO_PRIVACY, SilentProgress, started, tiny_experiment, tiny_gan

from fedface.aggregation.masked import EXCHANGES
from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run_state import RunState, weights_path
from fedface.experiment import Experiment, devices_folder
from fedface.messages.cohort import Cohort
from fedface.messages.messages import ExchangeTask, Failure, Reply, Task
from fedface.models.checkpoint import flatten_parameters, load_model
from fedface.simulation.in_process import in_process_cohort
from fedface.tensor_types import Vector
from fedface.training.gan import GanRound

LOST = {"train": (3, 50), "shares": (7, 71), "masked": (0, 42), "survivors": (99, 12), "reveal": (5, 64)}
CHANGES = {
    "privacy": NO_PRIVACY,
    "devices": "{kind: synthetic-devices, light_fractions: [0.9, 0.1], devices_per_fraction: 50, photos_per_device: 2}",
    "training.rounds": "1",
    "training.steps_per_round": "1",
    "training.r2_weight": "0",
    "training.expected_batch_size": "1",
}


class Losing:
    """A cohort that loses devices for good, each from one exchange on."""

    def __init__(self, cohort: Cohort, lost: Mapping[str, tuple[int, ...]]) -> None:
        self.cohort, self.lost, self.gone = cohort, lost, set[int]()

    def members(self, count: int) -> list[int]:
        return list(self.cohort.members(count))

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        task = next(iter(tasks.values()))
        self.gone |= set(self.lost.get(task.exchange if isinstance(task, ExchangeTask) else "train", ()))
        for member in sorted(self.gone & set(tasks)):
            yield member, Failure("no answer")
        yield from self.cohort.ask({member: one for member, one in tasks.items() if member not in self.gone})


def model_after(
    experiment: Experiment, folder: Path, lost: Mapping[str, tuple[int, ...]]
) -> tuple[Vector, int]:
    """The weights after one round, and how many devices are in it."""
    cohort = Losing(in_process_cohort(experiment, devices_folder(folder)), lost)
    state = run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), None, SilentProgress())
    model = load_model(weights_path(folder, 1))
    return flatten_parameters(*model.modules()), len(state.rounds[0].participants)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_devices_with_dropouts_in_each_exchange_end_with_the_model_of_plain_sums(
    tmp_path: Path,
) -> None:
    """Ten are lost: six before their vectors arrive, four afterwards, whose vectors are in the sum."""
    masked = tiny_experiment(tmp_path / "masked", {**CHANGES, "aggregation": "{kind: masked}"})
    plain = tiny_experiment(tmp_path / "plain", {**CHANGES, "aggregation": "{kind: plain}"})
    found, count = model_after(masked, started(masked, tmp_path / "runs" / "masked"), LOST)
    before = tuple(member for name in ("train", *EXCHANGES[:2]) for member in LOST[name])
    expected, among = model_after(plain, started(plain, tmp_path / "runs" / "plain"), {"train": before})
    assert (count, among) == (94, 94)
    ranges = GanRound(tiny_gan(), plain.training, plain.plan().dp_parameters).ranges()
    rounding = torch.finfo(torch.float32).eps * expected.abs()
    assert bool(((found - expected).abs() <= 0.5001 * ranges / (2**15 - 1) + rounding).all())
    assert not torch.equal(expected, flatten_parameters(*tiny_gan().modules()))
