"""DP-SGD with momentum on one device, for the methods whose network reads photos alone.

Each step is one `private_gradient` (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1). Learning rate and heavy-ball
momentum (Polyak 1964) read noised gradients alone, so that they are post-processing (Dwork and Roth 2014, Proposition
2.1) and cost no privacy. Adam is not used: its first step is the sign of the gradient, under noise a full step in a
random direction on every weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedface.models.lora import flatten_trainable
from fedface.privacy.plan import DPParameters
from fedface.tensor_types import StoredImages, Vector
from fedface.training.dp_sgd import SampledMechanism, private_gradient
from fedface.training.per_example_gradients import PerExampleProblem, with_deterministic_microbatch
from fedface.training.training_round import DPSGDSettings
from fedface.training.unit_clipping import NoiseSource


class MomentumSettings(DPSGDSettings):
    """What the configurations share whose whole training is DP-SGD with momentum."""

    lr: float  # > 0
    lr_noise_threshold: float  # noise multiplier above which lr falls as 1 / noise
    momentum: float  # fraction of the last step that is repeated in the next, in [0, 1)


def dp_sgd_update(
    problem: PerExampleProblem,
    photos: StoredImages,
    dp: DPParameters,
    config: MomentumSettings,
    *,
    rng: NoiseSource,
    units: Tensor | None = None,
) -> Vector:
    """The change of the trained weights by `dp.schedule.steps_per_round` private steps, shape (d,).

    Where noise is added to the sum over devices, it is exactly -lr times the one step's sum without noise.

    Photos enter only through `private_gradient`, once per step.

    Args:
        problem: With the device's own copy of the network, which is changed.
        photos: All photos of the device, (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        dp: Schedule and noise, as recorded in the ledger.
        config: Learning rate, lowered for the noise, and momentum.
        rng: SecretNoise for a private round; a replayable stream only without privacy.
        units: Which unit each photo belongs to, int64 (n,); None: each its own.
    """
    sampled = SampledMechanism.of(dp, rng)
    problem = with_deterministic_microbatch(problem, photos.shape[1:])
    lr = _scale_lr_for_noise(config, dp)
    before, weights = flatten_trainable(problem.network), problem.weights()
    velocity = [torch.zeros_like(weight) for weight in weights]
    for _ in range(dp.schedule.steps_per_round):
        gradients = private_gradient(
            problem, photos, sampled, expected_batch_size=dp.schedule.expected_batch_size, units=units
        )
        with torch.no_grad():
            for weight, moving, gradient in zip(weights, velocity, gradients, strict=True):
                if dp.sends_sums:  # a difference of weights would round what has no noise yet
                    weight.copy_(gradient).mul_(-lr)
                else:
                    weight.sub_(moving.mul_(config.momentum).add_(gradient), alpha=lr)
    after = flatten_trainable(problem.network)
    return after if dp.sends_sums else after - before


def _scale_lr_for_noise(config: MomentumSettings, dp: DPParameters) -> float:
    """The learning rate, lowered as 1 / noise where the device's noise multiplier is above the threshold."""
    noise = dp.noise_multiplier if dp.noise == "local" else 0.0
    return config.lr * min(1.0, config.lr_noise_threshold / max(noise, 1e-9))


def descent_ranges(network: nn.Module, config: MomentumSettings, dp: DPParameters) -> Vector:
    """Public bounds on how far each trained weight moves in one round, for quantisation, shape (d,), all > 0.

    Where a device sends its step's sum, what one unit of that sum moves a weight by.

    As many photos as expected, all pulling at one weight, move it by lr * clip norm in a step, which momentum
    repeats in the steps that follow; twice that leaves room for noise and for larger batches. A weight that moves
    further is clamped.
    """
    momentum, schedule = config.momentum, config.schedule()
    if dp.sends_sums:
        per_unit = config.lr / dp.schedule.expected_batch_size
        return torch.full_like(flatten_trainable(network), per_unit)
    repeated = sum(
        (1.0 - momentum ** (step + 1)) / (1.0 - momentum) for step in range(schedule.steps_per_round)
    )
    return torch.full_like(flatten_trainable(network), 2.0 * repeated * config.lr * schedule.clip_norm)
