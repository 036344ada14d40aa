"""Pretraining of the bundled encoder, on a generator's own samples and on synthetic faces; no photo is used.

The loss is the mean squared distance to the latent that the image was generated from, whose weight decays because a
coordinate that is not visible in the image costs one unit whatever is estimated, plus the pairwise loss of the image
that the frozen generator makes of the estimate.

An encoder trained on the generator's own samples alone, with few dark faces, would be least accurate on dark faces,
which a prior refitted from it would inherit. So half of the synthetic faces are dark, and all coordinates of generated
faces are sampled wider than the generator's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam

from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.stylegan_layers import unit_mean_square
from fedface.randomness import Streams
from fedface.synthetic.faces import NORMALS, ToneMix
from fedface.tensor_types import Images, Latents
from fedface.training.pretrain_gan import (
    Progress,
    SyntheticPool,
    cosine_decay,
    pair_loss,
    render_pool,
    take_step,
    update_ema,
)
from fedface.validation import AtLeast, In, NonNegativeInt, PositiveInt, checked


@dataclass(frozen=True, kw_only=True)
@checked
class EncoderPretrainConfig:
    """Hyperparameters of pretraining; the defaults are those of the bundled encoder."""

    seed: int = 7
    steps: PositiveInt = 4000
    batch: Annotated[int, AtLeast(2)] = 32
    learning_rate: Annotated[float, In("(0, 1)")] = 4e-3
    pool: NonNegativeInt = 12_000  # synthetic faces; 0 if latents are not the normals of synthetic faces
    # Of the generator's training data: the tone's dark quantile
    light_fraction: Annotated[float, In("(0, 1)")] = 0.85
    dark_fraction: Annotated[float, In("(0, 1)")] = 0.5  # fraction of dark faces among synthetic ones
    # Generated faces: coordinates are scaled by exp(this * normal)
    latent_std: Annotated[float, In("[0, 10]")] = 0.5
    # Of the distance of latents at the end; ten times at the start
    latent_weight: Annotated[float, In("[0, 10]")] = 0.1
    encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)


def wide_latents(count: int, width: int, log_std: float, rng: torch.Generator) -> Latents:
    """Latents (count, width) on the sphere whose coordinates have heavier tails than a normal's."""
    scale = torch.exp(log_std * torch.randn(count, width, generator=rng))
    return unit_mean_square(torch.randn(count, width, generator=rng) * scale)


def tone_latents(count: int, config: EncoderPretrainConfig, rng: torch.Generator) -> Latents:
    """Latents (count, z) on the sphere, a fraction `dark_fraction` of them of dark faces.

    The first coordinate is a quantile of the tone: below `light_fraction` the faces are light. Uniform inside each
    range, so that the darkest skin is as frequent as any other.
    """
    dark = torch.rand(count, generator=rng) < config.dark_fraction
    place = torch.rand(count, generator=rng) * 0.998 + 0.001
    share = config.light_fraction
    quantile = torch.where(dark, share + (1 - share) * place, share * place)
    tone = torch.special.ndtri(quantile)
    others = unit_mean_square(torch.randn(count, config.encoder.latent_width - 1, generator=rng))
    rest = (config.encoder.latent_width - tone.square()) / (config.encoder.latent_width - 1)
    return torch.cat([tone[:, None], others * rest.sqrt()[:, None]], dim=1)


def build_tone_pool(config: EncoderPretrainConfig, report: Progress) -> SyntheticPool:
    """Synthetic faces with their latents, `dark_fraction` of them dark."""
    streams = Streams(config.seed).child("encoder")
    tones = ToneMix(light_fraction=config.light_fraction)
    latents = tone_latents(config.pool, config, streams.generator("pool"))
    camera = streams.generator("camera")
    return render_pool(latents, latents[:, :NORMALS], tones, config.encoder.size, camera, report)


@dataclass(frozen=True)
class _Batch:
    photos: Images  # the encoder's input
    target: Images  # of the generated image
    latents: Latents  # target of the encoder


def pretrain_encoder(generator: StyleGAN2, config: EncoderPretrainConfig, report: Progress) -> LatentEncoder:
    """An encoder that estimates the latents of a generator's images, its weights averaged over the last steps.

    Args:
        generator: Not changed; its latents must be the normals of synthetic faces (as the bundled one's are) unless
            `config.pool` is 0.
        config: Hyperparameters.
        report: Called with the stage, the step, the number of steps and the losses.

    Raises:
        ValueError: Size or latent width of generator and encoder differ.
    """
    architecture = config.encoder
    if (generator.size, generator.latent_width) != (architecture.size, architecture.latent_width):
        raise ValueError(
            f"the encoder is for {architecture.size} px and {architecture.latent_width} coordinates, "
            f"the generator makes {generator.size} px from {generator.latent_width}"
        )
    streams = Streams(config.seed).child("encoder")
    frozen = copy.deepcopy(generator).requires_grad_(False)
    pool = build_tone_pool(config, report) if config.pool else None
    encoder = LatentEncoder(architecture, streams.generator("weights"))
    averaged = copy.deepcopy(encoder)
    rng = streams.generator("faces")
    optimiser = Adam(encoder.parameters(), config.learning_rate, betas=(0.9, 0.99))
    for step in range(config.steps):
        cosine_decay(optimiser, config.learning_rate, step, config.steps)
        batch = _sample_batch(frozen, pool, config, rng)
        estimated = encoder(batch.photos)
        with torch.autocast("cpu", torch.bfloat16):
            generated = frozen.synthesize(frozen.map(estimated))
        latent_loss = functional.mse_loss(estimated, batch.latents)
        image_loss = pair_loss(generated.float(), batch.target)
        weight = config.latent_weight * (1.0 + 9.0 * (1.0 - step / config.steps) ** 2)
        take_step(optimiser, image_loss + weight * latent_loss)
        update_ema(averaged, encoder, step, 0.998)
        if step % 50 == 0:
            report("encoder", step, config.steps, {"image": image_loss.item(), "latent": latent_loss.item()})
    return averaged


def _sample_batch(
    generator: StyleGAN2, pool: SyntheticPool | None, config: EncoderPretrainConfig, rng: torch.Generator
) -> _Batch:
    """Half a batch of synthetic faces with camera noise, the rest generated."""
    synthetic = 0 if pool is None else config.batch // 2
    latents = wide_latents(config.batch - synthetic, generator.latent_width, config.latent_std, rng)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        generated: Tensor = generator.synthesize(generator.map(latents)).float().clamp(0.0, 1.0)
    if pool is None:
        return _Batch(generated, generated, latents)
    chosen = torch.randint(len(pool.latents), (synthetic,), generator=rng)
    return _Batch(
        photos=torch.cat([pool.seen[chosen].float() / 255.0, generated]),
        target=torch.cat([pool.clean[chosen].float() / 255.0, generated]),
        latents=torch.cat([pool.latents[chosen], latents]),
    )
