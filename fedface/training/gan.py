"""One round of adversarial fine-tuning on one device's photos, private where it touches them.

Called from device/client.py. The discriminator is the only network that sees photos, so its real half is the
private step (DP-SGD, Theorem: Abadi et al. 2016, arXiv:1607.00133, with the Poisson-sampled Gaussian priced
by the plan). Its fake half and the generator's steps touch photos only through the noised discriminator: they are
post-processing (Dwork and Roth 2014, Proposition 2.1) and cost nothing.

Both halves of the discriminator's gradient are clipped alike. If only the real half were, the balance between
"photo" and "made" would tilt with the clip norm, and the discriminator would learn the tilt instead of the faces.
R1 on photos and adaptive augmentation read photos outside the promise and are left out; the penalty on made
pictures (R2 of Mescheder et al. 2018, arXiv:1801.04406) needs no photo and takes their place.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from fedface.models.discriminator import Discriminator
from fedface.models.lora import Adaptation, Full, flatten_trainable
from fedface.models.model import Model
from fedface.models.stylegan2 import StyleGAN2
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Images, KeptImages, Latents, Vector
from fedface.training.dp_sgd import check_per_example_gradients, per_example_gradients, private_gradient
from fedface.training.per_example_gradients import deterministic_microbatch, trainable_parameters
from fedface.training.unit_clipping import clipped_sum

_PHOTOS_AT_ONCE = 16  # whose gradients are in memory together
MAX_FAKES = 4096  # made pictures in a step, and generator steps after each of the discriminator's
MAX_FAKES_PER_ROUND = 1_000_000  # a stranger's task must not keep a device busy for days


@dataclass(frozen=True, kw_only=True)
class GanTrainingConfig:
    """How devices fine-tune generator and discriminator; every number is public and the same on all devices."""

    kind: ClassVar[str] = "gan-training"

    rounds: int = 6  # rounds of the run, >= 1
    steps_per_round: int = 4  # discriminator steps a device takes in one round, >= 1
    sampling_rate: float = 0.1  # q: chance of a photo to join a step, in (0, 1]
    expected_batch_size: int = 40  # public divisor of each step's sum, >= 1
    clip_norm: float = 1.0  # longest gradient one picture can have, > 0
    discriminator_lr: float = 3.0  # step of plain gradient descent on the discriminator, > 0
    generator_lr: float = 4e-4  # Adam's step on the generator, > 0
    generator_steps: int = 1  # generator steps after each discriminator step, >= 1
    fake_batch_size: int = 32  # made pictures in a step, >= 2
    r2_weight: float = 0.5  # times |gradient of the logit at made pictures|^2 / 2, >= 0
    server_lr: float = 1.0  # how much of the mean update the server applies, in (0, 4]
    adapt: Adaptation = field(default_factory=Full)  # which weights learn: all, or low-rank changes

    def __post_init__(self) -> None:
        self.schedule()
        for name, least in (("generator_steps", 1), ("fake_batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) > MAX_FAKES:
                raise ValueError(f"{name} must be at most {MAX_FAKES}, got {getattr(self, name)}")
        made = self.steps_per_round * (self.generator_steps + 1) * self.fake_batch_size
        if made > MAX_FAKES_PER_ROUND:
            raise ValueError(
                f"steps_per_round * (generator_steps + 1) * fake_batch_size must be at most {MAX_FAKES_PER_ROUND:,} made "
                f"pictures in a round, got {made:,}"
            )
        for name in ("discriminator_lr", "generator_lr"):
            if not 0 < getattr(self, name) < 100:
                raise ValueError(f"{name} must lie in (0, 100), got {getattr(self, name)}")
        if not 0 <= self.r2_weight < 1e4:
            raise ValueError(f"r2_weight must lie in [0, 10000), got {self.r2_weight}")
        if not 0 < self.server_lr <= 4:
            raise ValueError(f"server_lr must lie in (0, 4], got {self.server_lr}")

    def schedule(self) -> Schedule:
        """What of this costs privacy."""
        return Schedule(
            rounds=self.rounds,
            steps_per_round=self.steps_per_round,
            sampling_rate=self.sampling_rate,
            expected_batch_size=self.expected_batch_size,
            clip_norm=self.clip_norm,
        )

    def ranges(self, generator_weights: int, discriminator_weights: int) -> Vector:
        """Public bounds on how far each weight moves in one round, for quantisation, shape (d,), all > 0.

        Updates are divided by these before they are summed and multiplied after, so that the small steps of
        the generator are not lost beside the large ones of the discriminator. A weight that moves further, as rare
        noise may make it, is clamped.

        Adam without momentum moves a weight by at most rate / sqrt(1 - 0.9) a step; the three clipped parts
        of the discriminator's gradient (photos, made pictures, R2) by at most three times rate * clip norm.
        """
        made = self.steps_per_round * self.generator_steps * self.generator_lr * math.sqrt(10.0)
        judged = self.steps_per_round * self.discriminator_lr * 3.0 * self.clip_norm
        return torch.cat(
            [torch.full((generator_weights,), made), torch.full((discriminator_weights,), judged)]
        )


def gan_ranges(gan: Model, config: GanTrainingConfig) -> Vector:
    """The public range of every trained weight of these networks, in the order of the flat vector, shape (d,)."""
    counts = [sum(p.numel() for p in trainable_parameters(module).values()) for module in gan.modules()]
    return config.ranges(counts[0], counts[1])


class Network(Protocol):
    """What a loss calls: pictures (n, 3, s, s) -> logits (n,)."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


def d_loss_real(network: Network, photos: Images) -> Tensor:
    """Non-saturating discriminator loss of real pictures, one per photo: softplus(-logit), shape (n,)."""
    return functional.softplus(-network(photos))


def d_loss_fake(network: Network, made: Images) -> Tensor:
    """Non-saturating discriminator loss of made pictures, one each: softplus(logit), shape (n,)."""
    return functional.softplus(network(made))


def train_gan_round(
    gan: Model,
    photos: KeptImages,
    config: GanTrainingConfig,
    terms: DPParameters,
    *,
    rng: SecretNoise | torch.Generator,
    streams: Streams,
    units: Tensor | None = None,
) -> Vector:
    """The change of all trained weights that one round on these photos makes.

    Guarantees:
        * Photos enter only through `private_gradient`, `terms.schedule.steps_per_round` times.
        * `gan` itself stays as it is.

    Args:
        gan: The round's weights, with adapters attached where they are what learns.
        photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
        config: Rates and batches; its schedule is not used, the terms are.
        terms: What was agreed and booked.
        rng: SecretNoise for a promise; a replayable stream only where nothing is promised.
        streams: Latents of made pictures, replayable.
        units: Which unit each photo belongs to, int64 (n,); None: each its own.

    Returns:
        Weights after minus weights before, generator then discriminator, shape (d,).

    Raises:
        PrivacyError: The discriminator mixes photos, or a promised round was given replayable chance.
    """
    mine = copy.deepcopy(gan)
    generator, discriminator = mine.network(StyleGAN2), mine.discriminator
    before = flatten_trainable(*mine.modules())
    schedule, mechanism = terms.schedule, terms.mechanism()
    latents = streams.generator("latents")
    # The check needs two pictures and must not read private ones: made pictures have the right shape.
    check_per_example_gradients(discriminator, d_loss_real, _make(generator, _draw(generator, 2, latents)))
    microbatch = deterministic_microbatch(discriminator, d_loss_real, photos.shape[1:], _PHOTOS_AT_ONCE)
    optimiser = Adam(trainable_parameters(generator).values(), config.generator_lr, betas=(0.0, 0.9))
    for _ in range(schedule.steps_per_round):
        on_photos = private_gradient(
            discriminator,
            photos,
            d_loss_real,
            mechanism=mechanism,
            expected_batch_size=schedule.expected_batch_size,
            sampling_rate=schedule.sampling_rate,
            rng=rng,
            units=units,
            microbatch=microbatch,
        )
        made = _make(generator, _draw(generator, config.fake_batch_size, latents))
        on_made = clipped_sum(per_example_gradients(discriminator, d_loss_fake, made), schedule.clip_norm)
        gentle = _r2_gradient(discriminator, made, config.r2_weight)
        gentle = clipped_sum([part[None] for part in gentle], schedule.clip_norm)
        _descend(
            discriminator,
            [p + m / config.fake_batch_size + g for p, m, g in zip(on_photos, on_made, gentle, strict=True)],
            config.discriminator_lr,
        )
        for _ in range(config.generator_steps):
            styles = generator.map(_draw(generator, config.fake_batch_size, latents))
            loss = functional.softplus(-discriminator(generator.synthesize(styles))).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    return flatten_trainable(*mine.modules()) - before


def _draw(generator: StyleGAN2, count: int, latents: torch.Generator) -> Latents:
    return torch.randn(count, generator.latent_width, generator=latents)


def _make(generator: StyleGAN2, latents: Latents) -> Images:
    with torch.no_grad():
        return generator.synthesize(generator.map(latents))


def _r2_gradient(discriminator: Discriminator, made: Images, weight: float) -> list[Tensor]:
    """The gradient of weight / 2 times the mean squared length of the logit's gradient at made pictures."""
    weights = list(trainable_parameters(discriminator).values())
    if weight == 0:
        return [torch.zeros_like(w) for w in weights]
    seen = made.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(seen).sum(), seen, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3)).mean() * (weight / 2.0)
    gradients = torch.autograd.grad(penalty, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _descend(module: nn.Module, gradients: list[Tensor], rate: float) -> None:
    with torch.no_grad():
        for weight, gradient in zip(trainable_parameters(module).values(), gradients, strict=True):
            weight.sub_(gradient, alpha=rate)
