"""How the shipped upsamplers learn: from drawn faces that are shrunk and compared with themselves, no photo involved.

Called from `fedface pretrain style-encoder` and `fedface pretrain super-resolution`. The faces are those that the embedded generator learned
from, 85 light ones in 100: what is missing in these photos is missing in the answers, which is what devices may mend.
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
from fedface.training.pretrain_gan import Progress, render_faces, update_ema, warmup_cosine
from fedface.training.upsampler import reconstruction_loss
from fedface.upsampling.degradation import Area, BicubicPulse, Degradation
from fedface.validation import AtLeast, In, checked

L = TypeVar("L", StyleEncoder, SuperResolutionNetwork)

EMA_DECAY = 0.998  # how much of the averaged weights a late step keeps


@dataclass(frozen=True, kw_only=True)
@checked
class UpsamplerPretrainConfig:
    """How an upsampler is made; the defaults are the shipped ones'."""

    seed: int = 7
    steps: Annotated[int, AtLeast(1)] = 4000
    batch: Annotated[int, AtLeast(2)] = 32
    learning_rate: Annotated[float, In("(0, 1)")] = 3e-3
    # Drawn faces, made once and learned from many times, mirrored half of the time.
    pool: Annotated[int, AtLeast(2)] = 20_000
    light_fraction: Annotated[float, In("[0, 1]")] = 0.85  # share of faces with light skin, Monk 1 to 5
    # What it learns to undo, one of them in each step.
    downscales: tuple[Degradation, ...] = (
        BicubicPulse(2), BicubicPulse(4), BicubicPulse(8), Area(2), Area(4), Area(8),
    )  # fmt: skip
    consistency_weight: float = 10.0  # see training/upsampler

    def __post_init__(self) -> None:
        if not self.downscales:
            raise ValueError("downscales must name at least one, got none")


def pretrain_style_encoder(
    generator: StyleGAN2, config: UpsamplerPretrainConfig, shape: StyleEncoderNetworkConfig, report: Progress
) -> Model:
    """Teach a style encoder for a generator that stands still.

    Args:
        generator: Stays as it is.
        config: The recipe.
        shape: Of the encoder; it must tell the generator's styles.
        report: Called with the stage, the step, the number of steps and the losses.

    Returns:
        Generator and encoder, its weights averaged over the last steps.
    """
    streams = Streams(config.seed).child("styles")
    encoder = StyleEncoder(shape, streams.generator("weights"))
    with torch.no_grad():
        encoder.mean_style.copy_(generator.mapping.w_avg)
        encoder.out.weight.mul_(0.1)  # start near the mean face
    frozen = copy.deepcopy(generator).requires_grad_(False)

    def network(low: Tensor) -> Tensor:
        styles = encoder(low)
        with torch.autocast("cpu", torch.bfloat16):
            return frozen.synthesize(styles).float()

    averaged, notes = _learn(encoder, network, generator.size, config, streams, report)
    told = {"made_by": "fedface pretrain style-encoder", "generator": weights_hash(generator), **notes}
    architecture = StyleEncoderArchitecture(generator=generator.config, encoder=shape)
    return Model(architecture, {"generator": generator, "encoder": averaged}, told)


def pretrain_super_resolution(
    config: UpsamplerPretrainConfig, shape: SuperResolutionNetworkConfig, report: Progress
) -> Model:
    """Teach a super-resolution network; arguments and result as for `pretrain_style_encoder`."""
    streams = Streams(config.seed).child("resolver")
    resolver = SuperResolutionNetwork(shape, streams.generator("weights"))
    averaged, notes = _learn(resolver, resolver, shape.size, config, streams, report)
    notes = {"made_by": "fedface pretrain super-resolution", **notes}
    return Model(SuperResolutionArchitecture(network=shape), {"network": averaged}, notes)


def _learn(
    learner: L,
    network: Callable[[Tensor], Tensor],
    size: int,
    config: UpsamplerPretrainConfig,
    streams: Streams,
    report: Progress,
) -> tuple[L, dict[str, Any]]:
    """Regression by Adam; the averaged learner, and how it was made."""
    started = time.monotonic()
    pool = render_faces(config.pool, config.light_fraction, size, streams, report)
    rng = streams.generator("faces")
    averaged = copy.deepcopy(learner)
    lessons = [reconstruction_loss(downscale, config.consistency_weight) for downscale in config.downscales]
    optimiser = Adam(learner.parameters(), config.learning_rate, betas=(0.9, 0.99))
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step, config.steps)
        chosen = torch.randint(len(pool), (config.batch,), generator=rng)
        photos = pool[chosen].float() / 255.0
        half = config.batch // 2
        lesson = lessons[int(torch.randint(len(lessons), (), generator=rng))]
        loss = lesson(network, torch.cat([photos[:half], photos[half:].flip(-1)])).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        update_ema(averaged, learner, step, EMA_DECAY)
        if step % 50 == 0:
            report("upsampler", step, config.steps, {"loss": loss.item()})
    return averaged, {
        "recipe": encode(config),
        "images_seen": config.steps * config.batch,
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
    }
