"""DP-SGD with momentum on one device, for the methods whose network reads photos alone.

Each step is one `private_gradient` (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1). Learning rate and heavy-ball
momentum (Polyak 1964) read noised gradients alone, so that they are post-processing (Dwork and Roth 2014, Proposition
2.1) and cost no privacy. Adam is not used: its first step is the sign of the gradient, under noise a full step in a
random direction on every weight.

Where noise is added to the sum over devices, a device sends the clipped sum of its one step, and the server applies
the learning rate and the batch size: there is no noise yet on the device, and scaling by numbers that a server chooses
rounds and, below 1e-38, sets to zero. One unit more, which lifts a sum above such a limit, would move it by far more
than its own vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedface.models.lora import flatten_trainable
from fedface.privacy.plan import DPParameters
from fedface.tensor_types import StoredImages, Vector
from fedface.training.dp_sgd import SampledMechanism, private_gradient, private_step_sum
from fedface.training.per_example_gradients import (
    PerExampleProblem,
    trainable_parameters,
    with_deterministic_microbatch,
)
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

    Where noise is added to the sum over devices, it is the one step's sum of clipped gradients, float64, neither
    divided by the batch size nor multiplied by the learning rate, see `descent`.

    Photos enter only through `private_step_sum`, once per step.

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
    if dp.sends_sums:
        total = private_step_sum(problem, photos, sampled, units=units)
        trained = trainable_parameters(problem.network)
        parts = torch.split(total, [weight.numel() for weight in trained.values()])
        by_name = dict(zip(trained, parts, strict=True))
        return torch.cat([by_name[name] for name in sorted(by_name)])  # as `flatten_trainable` orders weights
    lr = _scale_lr_for_noise(config, dp)
    before, weights = flatten_trainable(problem.network), problem.weights()
    velocity = [torch.zeros_like(weight) for weight in weights]
    for _ in range(dp.schedule.steps_per_round):
        gradients = private_gradient(
            problem, photos, sampled, expected_batch_size=dp.schedule.expected_batch_size, units=units
        )
        with torch.no_grad():
            for weight, moving, gradient in zip(weights, velocity, gradients, strict=True):
                weight.sub_(moving.mul_(config.momentum).add_(gradient), alpha=lr)
    return flatten_trainable(problem.network) - before


def descent(total: Vector, config: MomentumSettings, dp: DPParameters) -> Vector:
    """The change of the trained weights that a sum over devices of `dp_sgd_update` stands for, shape (d,).

    Post-processing: what arrives here has its noise.
    """
    return total * (-config.lr / dp.schedule.expected_batch_size) if dp.sends_sums else total


def _scale_lr_for_noise(config: MomentumSettings, dp: DPParameters) -> float:
    """The learning rate, lowered as 1 / noise where the device's noise multiplier is above the threshold."""
    noise = dp.noise_multiplier if dp.noise == "local" else 0.0
    return config.lr * min(1.0, config.lr_noise_threshold / max(noise, 1e-9))


def descent_ranges(network: nn.Module, config: MomentumSettings, dp: DPParameters) -> Vector:
    """Public bounds on how far each trained weight moves in one round, for quantisation, shape (d,), all > 0.

    Where a device sends its step's sum, ones: the sum is sent as it is.

    As many photos as expected, all pulling at one weight, move it by lr * clip norm in a step, which momentum
    repeats in the steps that follow; twice that leaves room for noise and for larger batches. A weight that moves
    further is clamped.
    """
    momentum, schedule = config.momentum, config.schedule()
    if dp.sends_sums:
        return torch.ones_like(flatten_trainable(network))
    repeated = sum(
        (1.0 - momentum ** (step + 1)) / (1.0 - momentum) for step in range(schedule.steps_per_round)
    )
    return torch.full_like(flatten_trainable(network), 2.0 * repeated * config.lr * schedule.clip_norm)
