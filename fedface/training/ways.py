"""One round of one way of learning, the same on the device and on the server.

Called from federation/device.py (`update`), rounds.py (`apply`) and findings.py (`released`). The closed choice of
ways is `Training`; each has its own count of numbers sent, its own noise and its own public ranges:

* `gan-training`, all weights or low-rank changes: the critic sees photos, the generator learns from the critic;
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
from fedface.models.adapters import Lora, attach, fill_trained, merge, trained_vector
from fedface.models.family import Encoded, Flow, Gan, Model, Resolved, Styled
from fedface.models.weights import remember_mean_style
from fedface.privacy.plan import Terms
from fedface.randomness import SecretNoise, Streams
from fedface.shapes import Images, KeptImages, Vector
from fedface.training.flow import (
    FlowTrainingConfig,
    flow_ranges,
    loss_over_draws,
    times_and_noises,
    train_flow_round,
)
from fedface.training.generator import GanTrainingConfig, loss_on_photos, ranges_of, train_round
from fedface.training.per_photo import trained
from fedface.training.prior import PriorTrainingConfig, photo_vectors, prior_ranges, refit, train_prior_round
from fedface.training.upsampler import (
    UpsamplerTrainingConfig,
    check_teachable,
    lesson_of,
    mark_upsampler,
    train_upsampler_round,
    upsampler_ranges,
)

Training = GanTrainingConfig | FlowTrainingConfig | PriorTrainingConfig | UpsamplerTrainingConfig
ReleaseOf = Callable[[Images], Vector]


def check_fits(model: Model, training: Training) -> None:
    """Raises ConfigError unless a model can learn in this way."""
    match training:
        case GanTrainingConfig():
            fits, wanted = isinstance(model, Gan), "a generator with its critic"
        case FlowTrainingConfig():
            fits, wanted = isinstance(model, Flow), "a rectified flow"
        case PriorTrainingConfig():
            fits, wanted = isinstance(model, Encoded), "a generator with an encoder"
        case UpsamplerTrainingConfig():
            fits = isinstance(model, Styled if training.learner == "style-encoder" else Resolved)
            wanted = f"a {training.learner} network".replace(
                "style-encoder network", "generator with a style encoder"
            )
        case _:
            assert_never(training)
    if isinstance(model, Gan) and (model.critic.config.minibatch_group or model.critic.config.classes):
        raise ConfigError(
            "training: this critic looks at several pictures at once or wants their classes; devices train critics "
            "without minibatch statistics and classes only, so that each photo's influence is its own"
        )
    if isinstance(model, Gan | Encoded | Styled) and model.generator.config.classes:
        raise ConfigError(
            "training: this generator makes pictures of a class that is named, and no device sends the classes of its "
            "photos; name a checkpoint whose generator has no classes as base"
        )
    if not fits:
        raise ConfigError(f"training: this way of learning needs {wanted}; name such a checkpoint as base")
    if isinstance(training, UpsamplerTrainingConfig) and isinstance(model, Styled | Resolved):
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
        if low > model.largest_low:
            raise ConfigError(
                f"training.downscale makes photos of {low} pixels from faces of {model.size}, and this network reads "
                f"photos of {model.largest_low} at most; name another downscale or another base"
            )


def begin_round(model: Model, training: Training, terms: Terms, common: Streams) -> Round:
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
        return Round(model, training, terms)
    marked = copy.deepcopy(model)
    chance = common.generator("adapter")
    if isinstance(training, UpsamplerTrainingConfig) and isinstance(marked, Styled | Resolved):
        check_teachable(marked.shape, training)
        mark_upsampler(marked, training.adapt, chance)
        return Round(marked, training, terms)
    for module in marked.modules():
        attach(module, training.adapt, chance)
    return Round(marked, training, terms)


def common_streams(seed: int, round: int) -> Streams:
    """The public streams of one round, which every device and the server derive alike from the task's seed."""
    return Streams(seed).child(f"common/{round}")


def chance_for(terms: Terms, streams: Streams) -> SecretNoise | torch.Generator:
    """Where noise and coins come from: nobody's to replay under a promise, the device's own stream without one."""
    return SecretNoise() if terms.promises else streams.generator("no promise")


def objective_of(training: Training) -> str:
    """What photos help to train, in the word of a device's policy."""
    return "upsampler" if isinstance(training, UpsamplerTrainingConfig) else "generator"


def words_of(training: Training) -> str:
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
class Round:
    """A model with what learns in it marked, the recipe, and the terms. Made by `begin_round`."""

    model: Model
    training: Training
    terms: Terms

    def update(
        self,
        photos: KeptImages,
        *,
        chance: SecretNoise | torch.Generator,
        streams: Streams,
        units: Tensor | None = None,
    ) -> Vector:
        """What a device sends, before it is divided by `ranges` and protected, shape (d,).

        Args:
            photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
            chance: SecretNoise for a promise; a replayable stream only where nothing is promised.
            streams: The device's own replayable streams, for made pictures and times.
            units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.
        """
        if self.terms.unit != "occasion":
            units = None  # each photo by itself; per library the whole update is one vector, whatever the steps are
        match self.training, self.model:
            case GanTrainingConfig() as config, Gan() as gan:
                return train_round(
                    gan, photos, config, self.terms, chance=chance, streams=streams, units=units
                )
            case FlowTrainingConfig() as config, Flow(generator=flow):
                return train_flow_round(
                    flow, photos, config, self.terms, chance=chance, streams=streams, units=units
                )
            case PriorTrainingConfig() as config, Encoded(encoder=encoder):
                return train_prior_round(encoder, photos, config, self.terms, chance=chance, units=units)
            case UpsamplerTrainingConfig() as config, (Styled() | Resolved()) as model:
                return train_upsampler_round(model, photos, config, self.terms, chance=chance, units=units)
            case _:
                raise ConfigError("training: this way of learning does not go with this model")

    def ranges(self) -> Vector:
        """Public bounds of the numbers that `update` sends, shape (d,), all > 0; beyond them they are clamped."""
        match self.training, self.model:
            case GanTrainingConfig() as config, Gan() as gan:
                return ranges_of(gan, config)
            case FlowTrainingConfig() as config, Flow(generator=flow):
                return flow_ranges(flow, config)
            case PriorTrainingConfig() as config, Encoded(encoder=encoder):
                return prior_ranges(encoder, config)
            case UpsamplerTrainingConfig() as config, (Styled() | Resolved()) as model:
                return upsampler_ranges(model, config)
            case _:
                raise ConfigError("training: this way of learning does not go with this model")

    def released(self, streams: Streams) -> ReleaseOf:
        """What one step releases of one photo, before clipping and noise, differentiable in the photo; for audits.

        The attacker is granted what is drawn beside the photo: a flow's times and noises, which on a device are
        secret. Several photos give the mean.

        Args:
            streams: Where those draws come from.
        """
        match self.training, self.model:
            case GanTrainingConfig(), Gan(critic=critic):
                return gradient_of(critic, lambda photos: loss_on_photos(critic, photos).mean())
            case FlowTrainingConfig() as config, Flow(generator=flow):
                rows = times_and_noises(
                    1, config.noise_draws, flow.size, config.latest, streams.numpy("draws of one photo")
                )
                return gradient_of(
                    flow,
                    lambda photos: loss_over_draws(flow, photos, rows.expand(len(photos), -1, -1)).mean(),
                )
            case PriorTrainingConfig() as prior, Encoded(encoder=encoder):
                return lambda photos: photo_vectors(encoder(photos), prior).mean(dim=0)
            case UpsamplerTrainingConfig() as config, (Styled() | Resolved()) as model:
                network, lesson = model.upsampler, lesson_of(config.downscale, config.fit_weight)
                return gradient_of(network, lambda photos: lesson(network, photos).mean())
            case _:
                raise ConfigError("training: this way of learning does not go with this model")

    def apply(self, total: Vector, devices: int, chance: torch.Generator) -> Model:
        """The model after this round, from the sum of the devices' updates. Post-processing: costs nothing.

        Args:
            total: The sum of `update` over the devices that answered, shape (d,).
            devices: How many answered, >= 1.
            chance: Replayable draws for the mean style.
        """
        match self.training, self.model:
            case PriorTrainingConfig() as config, Encoded() as encoded:
                fresh = refit(encoded.generator, total, devices, config, self.terms, encoder=encoded.encoder)
                remember_mean_style(fresh, chance)
                return Encoded(fresh, encoded.encoder, encoded.notes)
            case (
                (GanTrainingConfig() | FlowTrainingConfig() | UpsamplerTrainingConfig()) as config,
                (Gan() | Flow() | Styled() | Resolved()) as model,
            ):
                moved = copy.deepcopy(model)
                start = trained_vector(*moved.modules())
                fill_trained(start + config.server_rate * total / devices, *moved.modules())
                for module in moved.modules():
                    merge(module)
                if isinstance(moved, Gan):
                    remember_mean_style(moved.generator, chance)
                return moved
            case _:
                raise ConfigError("training: this way of learning does not go with this model")


def gradient_of(module: nn.Module, loss: Callable[[Images], Tensor]) -> ReleaseOf:
    """The gradient of a loss of photos over the weights that learn, (d,), differentiable in the photos."""
    weights = list(trained(module).values())

    def gradient(photos: Images) -> Vector:
        parts = torch.autograd.grad(loss(photos), weights, create_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    return gradient
