"""One round of adversarial fine-tuning on one device's photos, private where it reads them.

The discriminator is the only network that sees photos, so its real half is the private step (DP-SGD: Abadi et al.
2016, arXiv:1607.00133). Its fake half and the generator's steps depend on photos only through the noised
discriminator: they are post-processing (Dwork and Roth 2014, Proposition 2.1) and cost no privacy.

Both halves of the discriminator's gradient are clipped alike. If only the real half were, the balance between real
and fake would shift with the clip norm, and the discriminator would learn the shift instead of the faces.
R1 on photos and adaptive augmentation read photos outside the guarantee and are left out; the penalty on generated
images (R2 of Mescheder et al. 2018, arXiv:1801.04406) needs no photo and takes their place.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from fedface.errors import ConfigError, PrivacyError
from fedface.models.checkpoint import estimate_mean_style
from fedface.models.discriminator import Discriminator
from fedface.models.lora import Adaptation, Full, flatten_trainable
from fedface.models.model import Architecture, GanArchitecture, Model
from fedface.models.stylegan2 import StyleGAN2
from fedface.privacy.plan import DPParameters
from fedface.randomness import Streams
from fedface.tensor_types import Images, Latents, StoredImages, Vector
from fedface.training.dp_sgd import SampledMechanism, check_per_example_gradients, private_gradient
from fedface.training.per_example_gradients import (
    Network,
    PerExampleProblem,
    differentiable_gradient,
    per_example_gradients,
    trainable_parameters,
    with_deterministic_microbatch,
)
from fedface.training.training_round import (
    DPSGDSettings,
    Objective,
    PerExampleRelease,
    apply_mean_update,
    check_architecture,
    guaranteed_units,
    mark_trainable,
)
from fedface.training.unit_clipping import NoiseSource, clipped_sum
from fedface.validation import In, checked

MAX_FAKES = 4096  # generated images in a step, and generator steps after each of the discriminator's
MAX_FAKES_PER_ROUND = 1_000_000  # a hostile task must not keep a device busy for days
GAN_NEEDS_LOCAL_NOISE = (
    "the generator learns from the discriminator on the device, before noise could be added to a sum: per photo or "
    "occasion this training needs local noise"
)


@dataclass(frozen=True, kw_only=True)
@checked
class GanTrainingConfig(DPSGDSettings):
    """How devices fine-tune generator and discriminator; every number is public and the same on all devices."""

    kind: ClassVar[str] = "gan-training"
    objective: ClassVar[Objective] = "generator"

    rounds: int = 6  # rounds of the run, >= 1
    steps_per_round: int = 4  # discriminator steps a device takes in one round, >= 1
    sampling_rate: float = 0.1  # q: probability of a photo to join a step, in (0, 1]
    expected_batch_size: int = 40  # public divisor of each step's sum, >= 1
    clip_norm: float = 1.0  # largest L2 norm of one image's gradient, > 0
    discriminator_lr: Annotated[float, In("(0, 100)")] = 3.0  # of plain gradient descent on the discriminator
    generator_lr: Annotated[float, In("(0, 100)")] = 4e-4  # of Adam on the generator
    generator_steps: Annotated[int, In(f"[1, {MAX_FAKES}]")] = 1  # after each discriminator step
    fake_batch_size: Annotated[int, In(f"[2, {MAX_FAKES}]")] = 32  # generated images in a step
    r2_weight: Annotated[float, In("[0, 10000)")] = 0.5  # times |gradient of the logit at fakes|^2 / 2
    server_lr: Annotated[float, In("(0, 4]")] = 1.0  # times the mean update, on the server
    adapt: Adaptation = field(default_factory=Full)  # which weights are trained: all, or low-rank changes

    def __post_init__(self) -> None:
        self.schedule()
        fakes = self.steps_per_round * (self.generator_steps + 1) * self.fake_batch_size
        if fakes > MAX_FAKES_PER_ROUND:
            raise ValueError(
                "steps_per_round * (generator_steps + 1) * fake_batch_size must be at most "
                f"{MAX_FAKES_PER_ROUND:,} generated images in a round, got {fakes:,}"
            )

    def check(self, architecture: Architecture) -> None:
        """Raises ConfigError unless a model of this architecture can be trained this way."""
        check_architecture(architecture, GanArchitecture)
        if isinstance(architecture, GanArchitecture) and (
            architecture.discriminator.minibatch_group or architecture.discriminator.classes
        ):
            raise ConfigError(
                "training: this discriminator looks at several images at once or needs their classes; devices train "
                "discriminators without minibatch statistics and classes, so that each photo's influence is separate"
            )

    def prepare(self, model: Model, dp: DPParameters, rng: torch.Generator) -> GanRound:
        """A round on a copy of the model; `rng` draws the public directions of low-rank changes.

        Raises:
            PrivacyError: Noise is added to the sum over devices alone, but the generator learns from a step before.
        """
        if dp.sends_sums:
            raise PrivacyError(f"{GAN_NEEDS_LOCAL_NOISE}; nothing was computed")
        return GanRound(mark_trainable(model, self.adapt, rng), self, dp)


def d_loss_real(network: Network, photos: Images) -> Tensor:
    """Non-saturating discriminator loss of real images, one per photo: softplus(-logit), shape (n,)."""
    return functional.softplus(-network(photos))


def d_loss_fake(network: Network, fakes: Images) -> Tensor:
    """Non-saturating discriminator loss of generated images, one each: softplus(logit), shape (n,)."""
    return functional.softplus(network(fakes))


@dataclass(frozen=True)
class GanRound:
    """One round of adversarial training, see `TrainingRound`."""

    model: Model
    config: GanTrainingConfig
    dp: DPParameters

    def update(
        self, photos: StoredImages, *, rng: NoiseSource, streams: Streams, units: Tensor | None = None
    ) -> Vector:
        """Trained weights after minus before, generator then discriminator, shape (d,); see `TrainingRound`."""
        model, config = copy.deepcopy(self.model), self.config
        generator, discriminator = model.network(StyleGAN2), model.discriminator
        before = flatten_trainable(*model.modules())
        schedule, sampled = self.dp.schedule, SampledMechanism.of(self.dp, rng)
        latents = streams.generator("latents")
        real = PerExampleProblem(discriminator, d_loss_real, recipe=(model.architecture, config))
        # The check needs two images and must not read private ones: generated ones have the right shape.
        check_per_example_gradients(real, _generate(generator, _draw(generator, 2, latents)))
        real = with_deterministic_microbatch(real, photos.shape[1:])
        optimiser = Adam(trainable_parameters(generator).values(), config.generator_lr, betas=(0.0, 0.9))
        for _ in range(schedule.steps_per_round):
            real_gradient = private_gradient(
                real,
                photos,
                sampled,
                expected_batch_size=schedule.expected_batch_size,
                units=guaranteed_units(self.dp, units),
            )
            fakes = _generate(generator, _draw(generator, config.fake_batch_size, latents))
            fake_gradient = clipped_sum(
                per_example_gradients(PerExampleProblem(discriminator, d_loss_fake), fakes),
                schedule.clip_norm,
            )
            penalty = _r2_gradient(discriminator, fakes, config.r2_weight)
            penalty = clipped_sum([part[None] for part in penalty], schedule.clip_norm)
            _descend(
                discriminator,
                [
                    r + f / config.fake_batch_size + p
                    for r, f, p in zip(real_gradient, fake_gradient, penalty, strict=True)
                ],
                config.discriminator_lr,
            )
            for _ in range(config.generator_steps):
                styles = generator.map(_draw(generator, config.fake_batch_size, latents))
                loss = functional.softplus(-discriminator(generator.synthesize(styles))).mean()
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
        return flatten_trainable(*model.modules()) - before

    def ranges(self) -> Vector:
        """Public bounds on how far each weight moves in one round, shape (d,), all > 0.

        Updates are divided by these before they are summed and multiplied after, so that the small steps of the
        generator are not lost beside the large ones of the discriminator. A weight that moves further, as rare noise
        may make it, is clamped.

        Adam without momentum moves a weight by at most lr / sqrt(1 - 0.9) a step; the three clipped parts of the
        discriminator's gradient (photos, fakes, R2) by at most three times lr * clip norm.
        """
        config, (generator, discriminator) = self.config, self.model.modules()
        g_range = config.steps_per_round * config.generator_steps * config.generator_lr * math.sqrt(10.0)
        d_range = config.steps_per_round * config.discriminator_lr * 3.0 * config.clip_norm
        return torch.cat(
            [
                torch.full_like(flatten_trainable(generator), g_range),
                torch.full_like(flatten_trainable(discriminator), d_range),
            ]
        )

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """The gradient of the discriminator's loss of a real photo."""
        discriminator = self.model.discriminator
        return differentiable_gradient(
            discriminator, lambda photos: d_loss_real(discriminator, photos).mean()
        )

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The mean update applied, and the mean style estimated anew."""
        after = apply_mean_update(self.model, total, devices, self.config.server_lr)
        estimate_mean_style(after.network(StyleGAN2), rng)
        return after


def _draw(generator: StyleGAN2, count: int, rng: torch.Generator) -> Latents:
    return torch.randn(count, generator.latent_width, generator=rng)


def _generate(generator: StyleGAN2, latents: Latents) -> Images:
    with torch.no_grad():
        return generator.synthesize(generator.map(latents))


def _r2_gradient(discriminator: Discriminator, fakes: Images, weight: float) -> list[Tensor]:
    """The gradient of weight / 2 times the mean squared norm of the logit's gradient at generated images."""
    weights = list(trainable_parameters(discriminator).values())
    if weight == 0:
        return [torch.zeros_like(w) for w in weights]
    fakes = fakes.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(fakes).sum(), fakes, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3)).mean() * (weight / 2.0)
    gradients = torch.autograd.grad(penalty, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _descend(module: nn.Module, gradients: list[Tensor], lr: float) -> None:
    with torch.no_grad():
        for weight, gradient in zip(trainable_parameters(module).values(), gradients, strict=True):
            weight.sub_(gradient, alpha=lr)
