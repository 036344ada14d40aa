"""Private steps of plain descent with momentum on one device: what every way shares whose network sees photos alone.

Called from training/flow.py and training/upsampler.py. Each step is one `private_gradient` (DP-SGD, Abadi et al.
2016, arXiv:1607.00133, Algorithm 1). Rate and heavy-ball momentum (Polyak 1964) read noised gradients alone, so that
they are post-processing (Dwork and Roth 2014, Proposition 2.1) and cost nothing. There is no Adam: its first step is
the sign of the gradient, under noise a full step in a random direction on every weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedface.models.lora import flatten_trainable
from fedface.privacy.plan import DPParameters
from fedface.tensor_types import KeptImages, Vector
from fedface.training.dp_sgd import private_gradient
from fedface.training.per_example_gradients import (
    Draw,
    PerExampleLoss,
    deterministic_microbatch,
    trainable_parameters,
)
from fedface.training.unit_clipping import NoiseSource


def check_descent(*, lr: float, lr_noise_threshold: float, momentum: float, server_lr: float) -> None:
    """Raises ValueError with name, bound and value unless the settings of a descent lie within their bounds."""
    if not 0 < lr < 1000:
        raise ValueError(f"lr must lie in (0, 1000), got {lr}")
    if not 0 < lr_noise_threshold <= 1000:
        raise ValueError(f"lr_noise_threshold must lie in (0, 1000], got {lr_noise_threshold}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not 0 < server_lr <= 4:
        raise ValueError(f"server_lr must lie in (0, 4], got {server_lr}")


def dp_sgd_steps(
    network: nn.Module,
    photos: KeptImages,
    loss: PerExampleLoss,
    terms: DPParameters,
    *,
    lr: float,
    momentum: float,
    rng: NoiseSource,
    units: Tensor | None = None,
    draw: Draw | None = None,
    scales: Sequence[Tensor] | None = None,
    microbatch: int = 16,
) -> None:
    """Change a network in place by the agreed number of private steps.

    Guarantees:
        * Photos enter only through `private_gradient`, `terms.schedule.steps_per_round` times.

    Args:
        network: The device's own copy; its trained weights move.
        photos: All photos of the device, (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        loss: One loss per photo; see `private_gradient`.
        terms: What was agreed and booked.
        rate: Step of descent, > 0, see `scale_lr_for_noise`.
        momentum: Share of the last step that is repeated in the next, in [0, 1).
        rng: SecretNoise for a promise; a replayable stream only where nothing is promised.
        units: Which unit each photo belongs to, int64 (n,); None: each its own.
        draw: Gives the loss's own draws.
        scales: Public factors of the gradient, one tensor per trained weight.
        microbatch: Photos whose gradients are in memory together.
    """
    schedule, mechanism = terms.schedule, terms.mechanism()
    microbatch = deterministic_microbatch(network, loss, photos.shape[1:], microbatch, draw=draw)
    pace = [torch.zeros_like(weight) for weight in trainable_parameters(network).values()]
    for _ in range(schedule.steps_per_round):
        gradients = private_gradient(
            network,
            photos,
            loss,
            mechanism=mechanism,
            expected_batch_size=schedule.expected_batch_size,
            sampling_rate=schedule.sampling_rate,
            rng=rng,
            units=units,
            draw=draw,
            scales=scales,
            microbatch=microbatch,
        )
        with torch.no_grad():
            for weight, moved, gradient in zip(
                trainable_parameters(network).values(), pace, gradients, strict=True
            ):
                weight.sub_(moved.mul_(momentum).add_(gradient), alpha=lr)


def scale_lr_for_noise(lr: float, lr_noise_threshold: float, terms: DPParameters) -> float:
    """The rate, lowered as 1 / noise where the agreed noise multiplier is beyond `lr_noise_threshold`."""
    noise = terms.noise_multiplier if terms.noise_at == "device" else 0.0
    return lr * min(1.0, lr_noise_threshold / max(noise, 1e-9))


def descent_ranges(network: nn.Module, *, steps: int, lr: float, momentum: float, clip_norm: float) -> Vector:
    """Public bounds on how far each trained weight moves in one round, for quantisation, shape (d,), all > 0.

    As many photos as expected, all pulling at one weight, move it by rate * clip norm in a step, which momentum
    repeats in the steps that follow; twice that leaves room for noise and for larger draws. A weight that moves
    further is clamped.
    """
    repeated = sum((1.0 - momentum ** (step + 1)) / (1.0 - momentum) for step in range(steps))
    return torch.full_like(flatten_trainable(network), 2.0 * repeated * lr * clip_norm)
