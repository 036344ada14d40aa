"""Pretraining of the bundled upsamplers on synthetic faces, downscaled and compared with themselves; no photo is used.

The faces have the tone mix of the bundled generator's training data, 85 light ones in 100: what is underrepresented
in them is upsampled worse, which training on devices may correct.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Adam

from fedface.codec import encode
from fedface.models.checkpoint import weights_hash
from fedface.models.model import Model, StyleEncoderArchitecture, SuperResolutionArchitecture
from fedface.models.style_encoder import StyleEncoder, StyleEncoderNetworkConfig
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.super_resolution import SuperResolutionNetwork, SuperResolutionNetworkConfig
from fedface.randomness import Streams
from fedface.training.pretrain_gan import (
    Progress,
    cosine_decay,
    render_faces,
    take_step,
    training_notes,
    update_ema,
)
from fedface.training.upsampler import reconstruction_loss
from fedface.upsampling.degradation import Area, BicubicPulse, Degradation
from fedface.validation import AtLeast, Fraction, In, PositiveInt, checked

L = TypeVar("L", StyleEncoder, SuperResolutionNetwork)

EMA_DECAY = 0.998  # of the moving average of weights in late steps


@dataclass(frozen=True, kw_only=True)
@checked
class UpsamplerPretrainConfig:
    """Hyperparameters of pretraining; the defaults are those of the bundled upsamplers."""

    seed: int = 7
    steps: PositiveInt = 4000
    batch: Annotated[int, AtLeast(2)] = 32
    learning_rate: Annotated[float, In("(0, 1)")] = 3e-3
    # Synthetic faces, rendered once, used many times, half of them mirrored.
    pool: Annotated[int, AtLeast(2)] = 20_000
    light_fraction: Fraction = 0.85  # fraction of faces with light skin, Monk 1 to 5
    # What the network learns to invert, one of them in each step.
    downscales: tuple[Degradation, ...] = (
        BicubicPulse(2), BicubicPulse(4), BicubicPulse(8), Area(2), Area(4), Area(8),
    )  # fmt: skip
    consistency_weight: float = 10.0  # see training/upsampler

    def __post_init__(self) -> None:
        if not self.downscales:
            raise ValueError("downscales must name at least one, got none")


def pretrain_style_encoder(
    generator: StyleGAN2,
    config: UpsamplerPretrainConfig,
    architecture: StyleEncoderNetworkConfig,
    report: Progress,
) -> Model:
    """A frozen generator and a style encoder for it, whose weights are averaged over the last steps.

    Args:
        generator: Not changed.
        config: Hyperparameters.
        architecture: Of the encoder; it must output the generator's styles.
        report: Called with the stage, the step, the number of steps and the losses.
    """
    streams = Streams(config.seed).child("styles")
    encoder = StyleEncoder(architecture, streams.generator("weights"))
    with torch.no_grad():
        encoder.mean_style.copy_(generator.mapping.w_avg)
        encoder.out.weight.mul_(0.1)  # start near the mean face
    frozen = copy.deepcopy(generator).requires_grad_(False)

    def network(low: Tensor) -> Tensor:
        styles = encoder(low)
        with torch.autocast("cpu", torch.bfloat16):
            return frozen.synthesize(styles).float()

    averaged, notes = _learn(encoder, network, generator.size, config, streams, report, "style-encoder")
    notes["generator"] = weights_hash(generator)
    model_architecture = StyleEncoderArchitecture(generator=generator.config, encoder=architecture)
    return Model(model_architecture, {"generator": generator, "encoder": averaged}, notes)


def pretrain_super_resolution(
    config: UpsamplerPretrainConfig, architecture: SuperResolutionNetworkConfig, report: Progress
) -> Model:
    """Train a super-resolution network; arguments and result as for `pretrain_style_encoder`."""
    streams = Streams(config.seed).child("resolver")
    network = SuperResolutionNetwork(architecture, streams.generator("weights"))
    averaged, notes = _learn(network, network, architecture.size, config, streams, report, "super-resolution")
    return Model(SuperResolutionArchitecture(network=architecture), {"network": averaged}, notes)


def _learn(
    learner: L,
    network: Callable[[Tensor], Tensor],
    size: int,
    config: UpsamplerPretrainConfig,
    streams: Streams,
    report: Progress,
    command: str,
) -> tuple[L, dict[str, Any]]:
    """Regression with Adam; returns the averaged network and notes on how it was trained."""
    started = time.monotonic()
    pool = render_faces(config.pool, config.light_fraction, size, streams, report)
    rng = streams.generator("faces")
    averaged = copy.deepcopy(learner)
    losses = [reconstruction_loss(downscale, config.consistency_weight) for downscale in config.downscales]
    optimiser = Adam(learner.parameters(), config.learning_rate, betas=(0.9, 0.99))
    for step in range(config.steps):
        cosine_decay(optimiser, config.learning_rate, step, config.steps)
        chosen = torch.randint(len(pool), (config.batch,), generator=rng)
        photos = pool[chosen].float() / 255.0
        half = config.batch // 2
        loss_of = losses[int(torch.randint(len(losses), (), generator=rng))]
        loss = loss_of(network, torch.cat([photos[:half], photos[half:].flip(-1)])).mean()
        take_step(optimiser, loss)
        update_ema(averaged, learner, step, EMA_DECAY)
        if step % 50 == 0:
            report("upsampler", step, config.steps, {"loss": loss.item()})
    return averaged, training_notes(
        f"fedface pretrain {command}", encode(config), config.steps * config.batch, started
    )
