"""One round of one way of learning, the same on the device and on the server.

Called from device/client.py (`update`), rounds.py (`apply`) and findings.py (`released`). The closed choice of
ways is `Training`; each has its own count of numbers sent, its own noise and its own public ranges:

* `gan-training`, all weights or low-rank changes: the discriminator sees photos, the generator learns from the discriminator;
* `flow-training`, all weights or low-rank changes: a rectified flow, one network that sees photos;
* `prior-training`: the generator is frozen; devices send noised sums of their photos' latents, once;
* `upsampler-training`, all weights or low-rank changes: a style encoder or a super-resolution network learns to undo
  a known downscale of the photos.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.checkpoint import estimate_mean_style
from fedface.models.latent_encoder import LatentEncoder
from fedface.models.lora import Lora, assign_trainable, attach, flatten_trainable, merge
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    UpsamplerArchitecture,
)
from fedface.models.rectified_flow import RectifiedFlow
from fedface.models.stylegan2 import StyleGAN2
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Images, KeptImages, Vector
from fedface.training.flow import (
    FlowTrainingConfig,
    flow_ranges,
    loss_over_draws,
    times_and_noises,
    train_flow_round,
)
from fedface.training.gan import GanTrainingConfig, d_loss_real, gan_ranges, train_gan_round
from fedface.training.latent_prior import (
    PriorTrainingConfig,
    fit_latent_prior,
    photo_vectors,
    prior_ranges,
    train_prior_round,
)
from fedface.training.per_example_gradients import trainable_parameters
from fedface.training.upsampler import (
    UpsamplerTrainingConfig,
    check_trainable,
    mark_upsampler,
    reconstruction_loss,
    train_upsampler_round,
    upsampler_ranges,
)

Training = GanTrainingConfig | FlowTrainingConfig | PriorTrainingConfig | UpsamplerTrainingConfig
PerExampleRelease = Callable[[Images], Vector]


def check_fits(model: Model, training: Training) -> None:
    """Raises ConfigError unless a model can learn in this way."""
    expected = _architecture_for(training)
    architecture = model.architecture
    if isinstance(architecture, GanArchitecture) and (
        architecture.discriminator.minibatch_group or architecture.discriminator.classes
    ):
        raise ConfigError(
            "training: this discriminator looks at several pictures at once or wants their classes; devices train discriminators "
            "without minibatch statistics and classes only, so that each photo's influence is its own"
        )
    if (
        isinstance(architecture, GanArchitecture | EncoderArchitecture | StyleEncoderArchitecture)
        and architecture.generator.classes
    ):
        raise ConfigError(
            "training: this generator makes pictures of a class that is named, and no device sends the classes of its "
            "photos; name a checkpoint whose generator has no classes as base"
        )
    if not isinstance(architecture, expected):
        raise ConfigError(
            f"training: this way of learning needs {expected.description}; name such a checkpoint as base"
        )
    if isinstance(training, UpsamplerTrainingConfig) and isinstance(architecture, UpsamplerArchitecture):
        try:
            low = training.downscale.low_side(model.size)
        except ValueError as error:
            raise ConfigError(
                f"training.downscale does not go with faces of {model.size} pixels: {error}"
            ) from error
        if low >= model.size:
            raise ConfigError(
                f"training.downscale leaves faces at {low} pixels: an upsampler learns from photos that are smaller"
            )
        if low > architecture.max_input_size:
            raise ConfigError(
                f"training.downscale makes photos of {low} pixels from faces of {model.size}, and this network reads "
                f"photos of {architecture.max_input_size} at most; name another downscale or another base"
            )


def _architecture_for(training: Training) -> type[Architecture]:
    match training:
        case GanTrainingConfig():
            return GanArchitecture
        case FlowTrainingConfig():
            return FlowArchitecture
        case PriorTrainingConfig():
            return EncoderArchitecture
        case UpsamplerTrainingConfig(learner="style-encoder"):
            return StyleEncoderArchitecture
        case UpsamplerTrainingConfig():
            return SuperResolutionArchitecture
        case _:
            assert_never(training)


def prepare_round(model: Model, training: Training, dp: DPParameters, common: Streams) -> TrainingRound:
    """Mark what learns in a copy of a model: all weights, or low-rank changes in public random directions.

    Args:
        model: The weights before the round; they stay as they are.
        training: The way.
        terms: What was agreed and booked.
        common: Public streams of this round, the same on every device and on the server.

    Raises:
        ConfigError: The model cannot learn in this way.
    """
    check_fits(model, training)
    if isinstance(training, PriorTrainingConfig):
        return TrainingRound(model, training, dp)
    marked = copy.deepcopy(model)
    rng = common.generator("adapter")
    if isinstance(training, UpsamplerTrainingConfig) and isinstance(
        marked.architecture, UpsamplerArchitecture
    ):
        check_trainable(marked.architecture, training)
        mark_upsampler(marked, training.adapt, rng)
        return TrainingRound(marked, training, dp)
    for module in marked.modules():
        attach(module, training.adapt, rng)
    return TrainingRound(marked, training, dp)


def common_streams(seed: int, round: int) -> Streams:
    """The public streams of one round, which every device and the server derive alike from the task's seed."""
    return Streams(seed).child(f"common/{round}")


def noise_source(terms: DPParameters, streams: Streams) -> SecretNoise | torch.Generator:
    """Where noise and coins come from: nobody's to replay under a promise, the device's own stream without one."""
    return SecretNoise() if terms.is_private else streams.generator("no promise")


def objective_of(training: Training) -> str:
    """What photos help to train, in the word of a device's policy."""
    return "upsampler" if isinstance(training, UpsamplerTrainingConfig) else "generator"


def describe_method(training: Training) -> str:
    """What a device sends, in words that follow a number."""
    match training:
        case (
            GanTrainingConfig(adapt=Lora(rank=rank))
            | FlowTrainingConfig(adapt=Lora(rank=rank))
            | UpsamplerTrainingConfig(adapt=Lora(rank=rank))
        ):
            return f"changes of low-rank weights (rank {rank})"
        case GanTrainingConfig() | FlowTrainingConfig() | UpsamplerTrainingConfig():
            return "weight changes"
        case PriorTrainingConfig():
            return "sums over photos (a count, and moments of latents)"
        case _:
            assert_never(training)


@dataclass(frozen=True)
class TrainingRound:
    """A model with what learns in it marked, the recipe, and the terms. Made by `prepare_round`."""

    model: Model
    training: Training
    dp: DPParameters

    def update(
        self,
        photos: KeptImages,
        *,
        rng: SecretNoise | torch.Generator,
        streams: Streams,
        units: Tensor | None = None,
    ) -> Vector:
        """What a device sends, before it is divided by `ranges` and protected, shape (d,).

        Args:
            photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
            rng: SecretNoise for a promise; a replayable stream only where nothing is promised.
            streams: The device's own replayable streams, for made pictures and times.
            units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.
        """
        if self.dp.unit != "occasion":
            units = None  # each photo by itself; per library the whole update is one vector, whatever the steps are
        match self.training:
            case GanTrainingConfig() as gan:
                return train_gan_round(
                    self.model, photos, gan, self.dp, rng=rng, streams=streams, units=units
                )
            case FlowTrainingConfig() as config:
                flow = self.model.network(RectifiedFlow)
                return train_flow_round(flow, photos, config, self.dp, rng=rng, streams=streams, units=units)
            case PriorTrainingConfig() as prior:
                encoder = self.model.network(LatentEncoder)
                return train_prior_round(encoder, photos, prior, self.dp, rng=rng, units=units)
            case UpsamplerTrainingConfig() as upsampler:
                return train_upsampler_round(self.model, photos, upsampler, self.dp, rng=rng, units=units)
            case _:
                assert_never(self.training)

    def ranges(self) -> Vector:
        """Public bounds of the numbers that `update` sends, shape (d,), all > 0; beyond them they are clamped."""
        match self.training:
            case GanTrainingConfig() as config:
                return gan_ranges(self.model, config)
            case FlowTrainingConfig() as flow:
                return flow_ranges(self.model.network(RectifiedFlow), flow)
            case PriorTrainingConfig() as prior:
                return prior_ranges(self.model.network(LatentEncoder), prior)
            case UpsamplerTrainingConfig() as upsampler:
                return upsampler_ranges(self.model, upsampler)
            case _:
                assert_never(self.training)

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """What one step releases of one photo, before clipping and noise, differentiable in the photo; for audits.

        The attacker is granted what is drawn beside the photo: a flow's times and noises, which on a device are
        secret. Several photos give the mean.

        Args:
            streams: Where those draws come from.
        """
        match self.training:
            case GanTrainingConfig():
                discriminator = self.model.discriminator
                return gradient_of(discriminator, lambda photos: d_loss_real(discriminator, photos).mean())
            case FlowTrainingConfig() as config:
                flow = self.model.network(RectifiedFlow)
                rows = times_and_noises(
                    1, config.noise_draws, flow.size, config.max_time, streams.numpy("draws of one photo")
                )
                return gradient_of(
                    flow,
                    lambda photos: loss_over_draws(flow, photos, rows.expand(len(photos), -1, -1)).mean(),
                )
            case PriorTrainingConfig() as prior:
                encoder = self.model.network(LatentEncoder)
                return lambda photos: photo_vectors(encoder(photos), prior).mean(dim=0)
            case UpsamplerTrainingConfig() as upsampler:
                network = self.model.upsampler
                loss = reconstruction_loss(upsampler.downscale, upsampler.consistency_weight)
                return gradient_of(network, lambda photos: loss(network, photos).mean())
            case _:
                assert_never(self.training)

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The model after this round, from the sum of the devices' updates. Post-processing: costs nothing.

        Args:
            total: The sum of `update` over the devices that answered, shape (d,).
            devices: How many answered, >= 1.
            rng: Replayable draws for the mean style.
        """
        if isinstance(self.training, PriorTrainingConfig):
            generator, encoder = self.model.network(StyleGAN2), self.model.network(LatentEncoder)
            refitted = fit_latent_prior(generator, total, devices, self.training, self.dp, encoder=encoder)
            estimate_mean_style(refitted, rng)
            architecture = EncoderArchitecture(generator=refitted.config, encoder=encoder.config)
            return Model(architecture, {"generator": refitted, "encoder": encoder}, self.model.notes)
        after = copy.deepcopy(self.model)
        start = flatten_trainable(*after.modules())
        assign_trainable(start + self.training.server_lr * total / devices, *after.modules())
        for module in after.modules():
            merge(module)
        if isinstance(self.training, GanTrainingConfig):
            estimate_mean_style(after.network(StyleGAN2), rng)
        return after


def gradient_of(module: nn.Module, loss: Callable[[Images], Tensor]) -> PerExampleRelease:
    """The gradient of a loss of photos over the weights that learn, (d,), differentiable in the photos."""
    weights = list(trainable_parameters(module).values())

    def gradient(photos: Images) -> Vector:
        parts = torch.autograd.grad(loss(photos), weights, create_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    return gradient
