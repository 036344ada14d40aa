"""How the shipped encoder learns: from a generator's own samples and from drawn faces, no photo involved.

Called from `fedface pretrain encoder`. The encoder sees a picture and names a latent; it is judged by

1. the latent that the picture was made from (their mean squared distance; a number that cannot be seen in the
   picture costs one unit whatever is guessed, so this loss fades), and
2. the picture that the frozen generator makes from the named latent (the same loss that taught the generator).

The generator's own latents hold few dark faces where it learned from few, and an encoder that learned from
them alone would read dark faces worst: what it misreads, the prior refitted from it makes. So the number of the
latent that is a drawn face's tone is drawn such that half of the faces are dark, with drawn faces as input,
and all numbers of made faces are drawn wider than the generator's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam

from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig, on_sphere
from fedface.models.stylegan2 import StyleGAN2
from fedface.randomness import Streams
from fedface.synthetic.faces import NORMALS, ToneMix, faces_from_normals, render
from fedface.tensor_types import Images, Latents
from fedface.training.pretrain_gan import Progress, SyntheticPool, pair_loss, update_ema, warmup_cosine
from fedface.validation import AtLeast, In, checked


@dataclass(frozen=True, kw_only=True)
@checked
class EncoderPretrainConfig:
    """How an encoder is made; the defaults are the shipped one's, for the embedded base."""

    seed: int = 7
    steps: Annotated[int, AtLeast(1)] = 4000
    batch: Annotated[int, AtLeast(2)] = 32
    learning_rate: Annotated[float, In("(0, 1)")] = 4e-3
    # Drawn faces; 0 for a generator whose latents are not the normals of drawn faces.
    pool: Annotated[int, AtLeast(0)] = 12_000
    # Of the generator's own training: where on the tone's number the dark begins.
    light_fraction: Annotated[float, In("(0, 1)")] = 0.85
    # Share of dark faces that the encoder sees among drawn ones.
    dark_fraction: Annotated[float, In("(0, 1)")] = 0.5
    # Made faces: each number of a latent is scaled by exp(spread * normal).
    latent_std: Annotated[float, In("[0, 10]")] = 0.5
    # Of the distance of latents, at the end; ten times that at the start.
    latent_weight: Annotated[float, In("[0, 10]")] = 0.1
    encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)


def wide_latents(count: int, width: int, spread: float, rng: torch.Generator) -> Latents:
    """Latents (count, width) on the sphere whose single numbers stray further than a normal's."""
    stretch = torch.exp(spread * torch.randn(count, width, generator=rng))
    return on_sphere(torch.randn(count, width, generator=rng) * stretch)


def tone_latents(count: int, config: EncoderPretrainConfig, rng: torch.Generator) -> Latents:
    """Latents (count, z) on the sphere, of whose first numbers `dark_fraction` mean dark skin.

    The first number is a quantile of the tone: below `light_fraction` the faces are light. Uniform inside each
    range, so that the darkest skin is as frequent as any other.
    """
    dark = torch.rand(count, generator=rng) < config.dark_fraction
    place = torch.rand(count, generator=rng) * 0.998 + 0.001
    share = config.light_fraction
    quantile = torch.where(dark, share + (1 - share) * place, share * place)
    tone = torch.special.ndtri(quantile)
    others = on_sphere(torch.randn(count, config.encoder.latent_width - 1, generator=rng))
    rest = (config.encoder.latent_width - tone.square()) / (config.encoder.latent_width - 1)
    return torch.cat([tone[:, None], others * rest.sqrt()[:, None]], dim=1)


def build_tone_pool(config: EncoderPretrainConfig, report: Progress) -> SyntheticPool:
    """Drawn faces with their latents, half of them dark whatever the generator's own training held."""
    streams = Streams(config.seed).child("encoder")
    tones = ToneMix(light_fraction=config.light_fraction)
    latents = tone_latents(config.pool, config, streams.generator("pool"))
    camera = streams.generator("camera")
    clean, seen = [], []
    for done in range(0, config.pool, 500):
        faces = faces_from_normals(latents[done : done + 500, :NORMALS], tones)
        clean.append((render(faces, config.encoder.size) * 255.0).round().to(torch.uint8))
        seen.append((render(faces, config.encoder.size, noise=camera) * 255.0).round().to(torch.uint8))
        report("drawing", done, config.pool, {})
    return SyntheticPool(latents, torch.cat(clean), torch.cat(seen))


@dataclass(frozen=True)
class _Lesson:
    """What the encoder sees, and what it should have named and had made."""

    photos: Images
    wanted: Images
    latents: Latents


def pretrain_encoder(generator: StyleGAN2, config: EncoderPretrainConfig, report: Progress) -> LatentEncoder:
    """Teach an encoder the latents of a generator's pictures.

    Args:
        generator: Stays as it is. Any generator of the config's size and latent width; its latents must be the
            normals of drawn faces (as the embedded base's are) unless `config.pool` is 0.
        config: The recipe.
        report: Called with the stage, the step, the number of steps and the losses.

    Returns:
        The encoder, its weights averaged over the last steps.

    Raises:
        ValueError: Size or latent width of generator and encoder differ.
    """
    shape = config.encoder
    if (generator.size, generator.latent_width) != (shape.size, shape.latent_width):
        raise ValueError(
            f"the encoder is for {shape.size} px and {shape.latent_width} numbers, "
            f"the generator makes {generator.size} px from {generator.latent_width}"
        )
    streams = Streams(config.seed).child("encoder")
    frozen = copy.deepcopy(generator).requires_grad_(False)
    pool = build_tone_pool(config, report) if config.pool else None
    encoder = LatentEncoder(shape, streams.generator("weights"))
    averaged = copy.deepcopy(encoder)
    rng = streams.generator("faces")
    optimiser = Adam(encoder.parameters(), config.learning_rate, betas=(0.9, 0.99))
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step, config.steps)
        lesson = _lesson(frozen, pool, config, rng)
        named = encoder(lesson.photos)
        with torch.autocast("cpu", torch.bfloat16):
            made = frozen.synthesize(frozen.map(named))
        missed = functional.mse_loss(named, lesson.latents)
        unlike = pair_loss(made.float(), lesson.wanted)
        weight = config.latent_weight * (1.0 + 9.0 * (1.0 - step / config.steps) ** 2)
        optimiser.zero_grad()
        torch.autograd.backward(unlike + weight * missed)
        optimiser.step()
        update_ema(averaged, encoder, step, 0.998)
        if step % 50 == 0:
            report("encoder", step, config.steps, {"picture": unlike.item(), "latent": missed.item()})
    return averaged


def _lesson(
    generator: StyleGAN2, pool: SyntheticPool | None, config: EncoderPretrainConfig, rng: torch.Generator
) -> _Lesson:
    """Half a batch of drawn faces through cameras, the rest made by the generator."""
    drawn = 0 if pool is None else config.batch // 2
    latents = wide_latents(config.batch - drawn, generator.latent_width, config.latent_std, rng)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made: Tensor = generator.synthesize(generator.map(latents)).float().clamp(0.0, 1.0)
    if pool is None:
        return _Lesson(made, made, latents)
    chosen = torch.randint(len(pool.latents), (drawn,), generator=rng)
    return _Lesson(
        photos=torch.cat([pool.seen[chosen].float() / 255.0, made]),
        wanted=torch.cat([pool.clean[chosen].float() / 255.0, made]),
        latents=torch.cat([pool.latents[chosen], latents]),
    )
