"""What a device sends whose sums get their noise in shares: the clipped sum alone, whatever the server chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fedface.models.lora import Adaptation, Full
from fedface.privacy.plan import MAX_EXPECTED_BATCH_SIZE, DPParameters
from fedface.randomness import SecretNoise
from fedface.tensor_types import Vector
from fedface.training.dp_momentum_sgd import MomentumSettings, descent, descent_ranges, dp_sgd_update
from fedface.training.flow import FlowTrainingConfig
from fedface.training.per_example_gradients import PerExampleProblem
from fedface.training.upsampler import UpsamplerTrainingConfig

WEIGHTS = 1000


class Mean(nn.Module):
    """The gradient of every weight is the mean of the photo."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WEIGHTS))

    def forward(self, photos: Tensor) -> Tensor:
        return (photos.flatten(1).mean(1, keepdim=True) * self.weight).sum(1)


@dataclass
class Settings(MomentumSettings):
    """Without the bounds of the configurations."""

    lr: float
    expected_batch_size: int
    lr_noise_threshold: float = 0.5
    momentum: float = 0.0
    rounds: int = 1
    steps_per_round: int = 1
    sampling_rate: float = 1.0
    clip_norm: float = 1.0
    adapt: Adaptation = Full()


@pytest.fixture
def flushed() -> Iterator[None]:
    """As on a device, where numbers below 1e-38 would take longer."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def settings(lr: float, batch: int) -> tuple[Settings, DPParameters]:
    chosen = Settings(lr, batch)
    dp = DPParameters(schedule=chosen.schedule(), noise_multiplier=1.0, noise="distributed", honest_devices=1)
    return chosen, dp


def sent(photos: int, lr: float, batch: int) -> Vector:
    """What is rounded to integers and noised."""
    chosen, dp = settings(lr, batch)
    problem = PerExampleProblem(Mean(), lambda net, seen: net(seen), microbatch=16)
    update = dp_sgd_update(problem, torch.ones(photos, 3, 2, 2), dp, chosen, rng=SecretNoise())
    return update / descent_ranges(problem.network, chosen, dp)


@pytest.mark.usefixtures("flushed")
@pytest.mark.parametrize(
    ("lr", "batch"),
    [(2e-38, 1), (1e-29, MAX_EXPECTED_BATCH_SIZE), (1e-6, MAX_EXPECTED_BATCH_SIZE), (999.0, 1)],
)
def test_one_photo_more_moves_what_is_noised_by_the_clip_norm_whatever_the_learning_rate(
    lr: float, batch: int
) -> None:
    """Scaled by 2e-38, every number is below the smallest float32 until the nineteenth photo lifts them all above it.

    Exactly: sums are float64, so that 21 equal photos are 21 times one; float32 would lose a millionth of a clip norm.
    """
    vectors = [sent(count, lr, batch) for count in range(16, 22)]
    moves = [float((more - one).double().norm()) for one, more in zip(vectors, vectors[1:], strict=False)]
    assert 0.99999 < min(moves) and max(moves) <= 1.0
    torch.testing.assert_close(vectors[-1], 21 * sent(1, lr, batch).double(), rtol=1e-12, atol=0)


def test_the_server_descends_by_the_learning_rate_over_the_batch() -> None:
    """Five photos of clip norm 1 with lr 0.2 and 4 photos expected; what has its noise is not changed again."""
    chosen, dp = settings(0.2, 4)
    change = descent(sent(5, 0.2, 4), chosen, dp)
    torch.testing.assert_close(float(change.norm()), 5 * 0.2 / 4, rtol=1e-5, atol=0)
    assert (change < 0).all()
    local = replace(dp, noise="local", honest_devices=0)
    assert descent(change, chosen, local) is change


@pytest.mark.parametrize("config", [FlowTrainingConfig, UpsamplerTrainingConfig])
def test_a_learning_rate_that_no_weight_would_notice_is_refused(
    config: type[FlowTrainingConfig] | type[UpsamplerTrainingConfig],
) -> None:
    assert config(lr=1e-6).lr == 1e-6
    with pytest.raises(ValueError, match=r"lr must lie in \[1e-6, 1000\), got 2e-38"):
        config(lr=2e-38)
