"""One round of teaching an upsampler on one device's photos, every step of it private.

Called from training/training_methods for a style encoder (pSp, Richardson et al. 2021, arXiv:2008.00951) and for a
super-resolution network. The lesson of one photo: shrink it as the recipe says, answer with the network, and compare
with the photo itself. Nothing else of the photo is used, so that the loss of photo i depends on photo i alone and
each step is a Poisson-sampled Gaussian sum (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; training/dp_sgd).

Of the style encoder's two networks the generator stands still: devices teach only where to look in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.lora import Adaptation, Full, attach, flatten_trainable
from fedface.models.model import Model, UpsamplerArchitecture, build_model
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Images, KeptImages, Vector
from fedface.training.dp_momentum_sgd import check_descent, descent_ranges, dp_sgd_steps, scale_lr_for_noise
from fedface.training.dp_sgd import Network, check_per_example_gradients
from fedface.training.per_example_gradients import PerExampleLoss
from fedface.training.pretrain_gan import pair_losses
from fedface.upsampling.degradation import BicubicPulse, Degradation, format_degradation
from fedface.upsampling.upsampler import squared_difference

_AT_ONCE = 2**25  # numbers that the answers of one microbatch keep in memory
_MOST_NUMBERS = 2**27  # of one photo: about half a gigabyte, and its gradient several times that


@dataclass(frozen=True, kw_only=True)
class UpsamplerTrainingConfig:
    """How devices teach an upsampler; every number is public and the same on all devices."""

    kind: ClassVar[str] = "upsampler-training"

    rounds: int = 5  # rounds of the run, >= 1
    steps_per_round: int = 8  # private steps a device takes in one round, >= 1
    sampling_rate: float = 0.08  # q: chance of a photo to join a step, in (0, 1]
    expected_batch_size: int = 32  # public divisor of each step's sum, >= 1
    clip_norm: float = 0.3  # longest gradient one photo can have, > 0; about the usual length
    downscale: Degradation = field(default_factory=lambda: BicubicPulse(4))  # what the network learns to undo
    consistency_weight: float = 10.0  # of the squared difference after the downscale, >= 0
    lr: float = 1.0  # step of gradient descent, > 0
    lr_noise_threshold: float = 0.5  # noise multiplier beyond which the rate falls as 1 / noise
    momentum: float = 0.9  # share of the last step that a device repeats in the next of the round, in [0, 1)
    server_lr: float = 1.0  # how much of the mean update the server applies, in (0, 4]
    adapt: Adaptation = field(default_factory=Full)  # which weights learn: all, or low-rank changes
    learner: Literal["style-encoder", "super-resolution"] = "style-encoder"  # which network answers photos

    def __post_init__(self) -> None:
        self.schedule()
        if self.downscale.spread > 0:
            raise ValueError(
                f"downscale must add no noise while devices teach, got {format_degradation(self.downscale)}; "
                "noise belongs under upsampling, or into a method's spread"
            )
        if not 0 <= self.consistency_weight <= 1e4:
            raise ValueError(f"consistency_weight must lie in [0, 10000], got {self.consistency_weight}")
        check_descent(
            lr=self.lr,
            lr_noise_threshold=self.lr_noise_threshold,
            momentum=self.momentum,
            server_lr=self.server_lr,
        )

    def schedule(self) -> Schedule:
        """What of this costs privacy."""
        return Schedule(
            rounds=self.rounds,
            steps_per_round=self.steps_per_round,
            sampling_rate=self.sampling_rate,
            expected_batch_size=self.expected_batch_size,
            clip_norm=self.clip_norm,
        )


def reconstruction_loss(downscale: Degradation, consistency_weight: float) -> PerExampleLoss:
    """The loss of one photo: (network, photos (n, 3, s, s)) -> (n,).

    The answer against the photo, L1 on pixels and on their differences at three sizes; and the answer's own
    downscale against what the network was shown, for an upsampler must not invent other pixels than it was given.
    """

    def lesson(network: Network, photos: Images) -> Tensor:
        low = downscale.apply(photos).clamp(0.0, 1.0)
        made = network(low)
        return pair_losses(made, photos) + consistency_weight * squared_difference(downscale.apply(made), low)

    return lesson


def train_upsampler_round(
    model: Model,
    photos: KeptImages,
    config: UpsamplerTrainingConfig,
    terms: DPParameters,
    *,
    rng: SecretNoise | torch.Generator,
    units: Tensor | None = None,
) -> Vector:
    """The change of the network's trained weights that one round on these photos makes.

    Guarantees:
        * Photos enter only through `private_gradient`, `terms.schedule.steps_per_round` times.
        * `model` itself stays as it is, and so does the generator of a style encoder.

    Args:
        model: The round's weights, with what learns marked by `mark_upsampler`.
        photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
        config: Rates; its schedule is not used, the terms are.
        terms: What was agreed and booked.
        rng: SecretNoise for a promise; a replayable stream only where nothing is promised.
        units: Which unit each photo belongs to, int64 (n,); None: each its own.

    Returns:
        Weights after minus weights before, in the order of their names, shape (d,).

    Raises:
        PrivacyError: The network mixes photos, or a promised round was given replayable chance.
    """
    numbers = check_trainable(model.architecture, config)
    network = copy.deepcopy(model.upsampler)
    before = flatten_trainable(network)
    dp_sgd_steps(
        network,
        photos,
        reconstruction_loss(config.downscale, config.consistency_weight),
        terms,
        lr=scale_lr_for_noise(config.lr, config.lr_noise_threshold, terms),
        momentum=config.momentum,
        rng=rng,
        units=units,
        microbatch=max(1, min(16, _AT_ONCE // numbers)),
    )
    return flatten_trainable(network) - before


def upsampler_ranges(model: Model, config: UpsamplerTrainingConfig) -> Vector:
    """Public bounds on how far each trained weight moves in one round, see `descent_ranges`, shape (d,)."""
    return descent_ranges(
        model.upsampler,
        steps=config.steps_per_round,
        lr=config.lr,
        momentum=config.momentum,
        clip_norm=config.clip_norm,
    )


def mark_upsampler(model: Model, adapt: Adaptation, rng: torch.Generator) -> None:
    """Mark in place which weights learn: of the one network that answers photos, never of the generator."""
    for module in model.modules():
        module.requires_grad_(False)
    attach(model.modules()[-1], adapt, rng)  # the style encoder, or the only network


@lru_cache(maxsize=8)
def check_trainable(shape: UpsamplerArchitecture, config: UpsamplerTrainingConfig) -> int:
    """Refuse what no device should begin with, once per process; it hangs on the form alone and reads no photo.

    A device asks before it books: a network that mixes photos, a lesson that cannot be computed, and one that takes
    so much memory that whether a step succeeds could tell how many photos joined it.

    Returns:
        How many numbers the answer to one photo keeps in memory, >= 1.

    Raises:
        ConfigError: The lesson cannot be computed for this shape, or takes more memory than devices give.
        PrivacyError: The network mixes photos.
    """
    with torch.device("meta"):
        planned = build_model(shape)
        numbers = _numbers_kept(planned.upsampler, shape.max_input_size)
    if numbers > _MOST_NUMBERS:
        raise ConfigError(
            f"training: one photo would keep {numbers:,} numbers in memory, devices allow {_MOST_NUMBERS:,}; "
            "name a smaller network"
        )
    try:
        _check(shape, config)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ConfigError(f"training: this lesson cannot be computed for this network ({error})") from error
    return numbers


def _numbers_kept(network: nn.Module, side: int) -> int:
    """Outputs of all layers for one photo, counted without memory."""
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network(torch.zeros(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return max(1, total)


def _check(shape: UpsamplerArchitecture, config: UpsamplerTrainingConfig) -> None:
    """Compare per-photo gradients with one-photo gradients on random pictures."""
    streams = Streams(0)
    model = build_model(shape, streams.generator("weights"))
    mark_upsampler(model, config.adapt, streams.generator("adapters"))
    rng = streams.generator("moved")
    with torch.no_grad():
        for weight in model.upsampler.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.02)
    pictures = torch.rand(2, 3, model.size, model.size, generator=rng)
    check_per_example_gradients(
        model.upsampler, reconstruction_loss(config.downscale, config.consistency_weight), pictures
    )
