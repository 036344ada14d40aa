"""Pretraining of the bundled GAN on synthetic faces alone; no photo is used.

1. Paired: a latent's coordinates are the normals of a synthetic face's parameters, so that every latent has a known
   image and the generator learns by regression (L1 on pixels at three scales).
2. Adversarial: the non-saturating loss with R1 (Mescheder et al. 2018, arXiv:1801.04406; Karras et al. 2020,
   arXiv:1912.04958) against synthetic faces with camera noise, with the paired loss at a small weight.

The moving average of the weights has a warm-up, without which it would retain the initial weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from fedface.models.checkpoint import estimate_mean_style
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.model import GanArchitecture, Model, build_model
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.models.stylegan_layers import unit_mean_square
from fedface.randomness import Streams
from fedface.synthetic.faces import NORMALS, ToneMix, faces_from_normals, render, sample_faces
from fedface.tensor_types import Images, Latents


@dataclass(frozen=True, kw_only=True)
class GanPretrainConfig:
    """Hyperparameters of pretraining; the defaults are those of the bundled checkpoint."""

    seed: int = 7
    light_fraction: float = 0.85  # share of faces with light skin, Monk 1 to 5
    pool: int = 40_000  # synthetic faces, rendered once and used many times
    paired_steps: int = 4500
    adversarial_steps: int = 1500
    batch: int = 32
    learning_rate: float = 6e-3
    mapping_speed: float = 50.0  # learning rate of the mapping in the first stage, times learning_rate
    r1_weight: float = 1.0  # times |gradient|^2 / 2 on synthetic faces
    pair_weight: float = 2.0  # of the paired loss in the second stage
    generator: StyleGAN2Config = field(default_factory=lambda: StyleGAN2Config(style_width=128))
    discriminator: DiscriminatorConfig = field(default_factory=lambda: DiscriminatorConfig(channel_max=48))


Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class SyntheticPool:
    """Latents with their faces, stored as bytes to save memory."""

    latents: Tensor  # (n, z) float32
    clean: Tensor  # (n, 3, s, s) uint8, without camera noise
    seen: Tensor  # (n, 3, s, s) uint8, the same faces with camera noise

    def pairs(self, batch: int, rng: torch.Generator) -> tuple[Latents, Images]:
        """A batch of latents with their clean images."""
        chosen = torch.randint(len(self.latents), (batch,), generator=rng)
        return self.latents[chosen], self.clean[chosen].float() / 255.0

    def photos(self, batch: int, rng: torch.Generator) -> Images:
        """A batch of images with camera noise."""
        chosen = torch.randint(len(self.latents), (batch,), generator=rng)
        return self.seen[chosen].float() / 255.0


def make_pool(config: GanPretrainConfig, report: Progress) -> SyntheticPool:
    """Render the faces of random latents.

    The first `NORMALS` coordinates of a latent, normalised to unit mean square as in the mapping network, are the
    normals of the face's parameters.
    """
    streams = Streams(config.seed)
    tones = ToneMix(light_fraction=config.light_fraction)
    latents = torch.randn(config.pool, config.generator.latent_width, generator=streams.generator("pool"))
    camera = streams.generator("camera")
    normals = unit_mean_square(latents)[:, :NORMALS]
    return render_pool(latents, normals, tones, config.generator.size, camera, report)


def render_pool(
    latents: Tensor, normals: Tensor, tones: ToneMix, size: int, camera: torch.Generator, report: Progress
) -> SyntheticPool:
    """Latents (n, z) with the faces of these normals (n, NORMALS), without and with the camera's noise."""
    clean, seen = [], []
    for done in range(0, len(normals), 500):
        faces = faces_from_normals(normals[done : done + 500], tones)
        clean.append(_bytes(render(faces, size)))
        seen.append(_bytes(render(faces, size, noise=camera)))
        report("rendering", done, len(normals), {})
    return SyntheticPool(latents, torch.cat(clean), torch.cat(seen))


def _bytes(images: Images) -> Tensor:
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def render_faces(count: int, light_fraction: float, size: int, streams: Streams, report: Progress) -> Tensor:
    """Synthetic faces with camera noise, (count, 3, size, size) uint8."""
    tones = ToneMix(light_fraction=light_fraction)
    rng, camera = streams.generator("pool"), streams.generator("camera")
    parts = []
    for done in range(0, count, 500):
        faces = sample_faces(min(500, count - done), tones, rng)
        parts.append(_bytes(render(faces, size, noise=camera)))
        report("rendering", done, count, {})
    return torch.cat(parts)


def update_ema(averaged: nn.Module, current: nn.Module, step: int, decay: float) -> None:
    """Move averaged weights towards the current ones; the decay is lower in the first steps."""
    decay = min(decay, (step + 1) / (step + 10))
    with torch.no_grad():
        for average, weight in zip(averaged.parameters(), current.parameters(), strict=True):
            average.lerp_(weight, 1.0 - decay)


def take_step(optimiser: Adam, loss: Tensor) -> None:
    """One step down the gradient of a loss."""
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()


def training_notes(made_by: str, recipe: Any, images_seen: int, started: float) -> dict[str, Any]:
    """How a checkpoint was trained; `started` is the value of time.monotonic() at the start."""
    return {
        "made_by": made_by,
        "recipe": recipe,
        "images_seen": images_seen,
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
    }


def warmup_cosine(step: int, steps: int) -> float:
    """The learning rate's multiplier: a warm-up of a hundred steps, then a cosine decay to a fiftieth."""
    decay = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / 100) * decay


def pair_losses(generated: Images, target: Images) -> Tensor:
    """L1 on pixels plus L1 on differences of neighbouring pixels, at full, half and quarter size, per image: (n,)."""
    loss = generated.new_zeros(len(generated))
    for _ in range(3):
        loss = loss + (generated - target).abs().mean(dim=(1, 2, 3))
        for axis in (2, 3):
            loss = loss + (generated.diff(dim=axis) - target.diff(dim=axis)).abs().mean(dim=(1, 2, 3))
        generated, target = functional.avg_pool2d(generated, 2), functional.avg_pool2d(target, 2)
    return loss


def pair_loss(generated: Images, target: Images) -> Tensor:
    """The mean of `pair_losses`, a scalar."""
    return pair_losses(generated, target).mean()


def r1_penalty(discriminator: Discriminator, photos: Images) -> Tensor:
    """Half the mean squared L2 norm of the logit's gradient at the photos."""
    photos = photos.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(photos).sum(), photos, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2.0


class GanPretraining:
    """The state of one pretraining; `finish` gives the averaged networks at any moment."""

    def __init__(self, config: GanPretrainConfig, pool: SyntheticPool) -> None:
        self.config = config
        self.pool = pool
        self.streams = Streams(config.seed)
        architecture = GanArchitecture(generator=config.generator, discriminator=config.discriminator)
        self.gan = build_model(architecture, self.streams.generator("weights"))
        self.averaged = copy.deepcopy(self.gan)
        self.rng = self.streams.generator("faces")
        self.images = 0
        self.started = time.monotonic()

    def _latents(self) -> Tensor:
        return torch.randn(self.config.batch, self.config.generator.latent_width, generator=self.rng)

    def _average(self, step: int) -> None:
        update_ema(self.averaged.generator, self.gan.generator, step, 0.999)

    def _generate(self, generator: StyleGAN2, latents: Latents) -> Images:
        with torch.autocast("cpu", torch.bfloat16):
            generated = generator.synthesize(generator.map(latents))
        return generated.float()

    def pairs(self, report: Progress) -> None:
        """Stage 1: regression on pairs, cosine learning rate."""
        generator, steps = self.gan.network(StyleGAN2), self.config.paired_steps
        rate = self.config.learning_rate
        # The mapping's stored weights are a hundred times too large for Adam's steps.
        optimiser = Adam(
            [
                {"params": list(generator.mapping.parameters()), "scale": self.config.mapping_speed},
                {"params": list(generator.synthesis.parameters()), "scale": 1.0},
            ],
            rate,
            (0.9, 0.99),
        )
        for step in range(steps):
            cosine_decay(optimiser, rate, step, steps)
            latents, faces = self.pool.pairs(self.config.batch, self.rng)
            loss = pair_loss(self._generate(generator, latents), faces)
            take_step(optimiser, loss)
            self._average(step)
            self.images += self.config.batch
            if step % 50 == 0:
                report("pairs", step, steps, {"l1": loss.item()})

    def adversaries(self, report: Progress) -> None:
        """Stage 2: discriminator and generator against each other, R1 at every eighth step."""
        config, generator, discriminator = self.config, self.gan.network(StyleGAN2), self.gan.discriminator
        generator.load_state_dict(self.averaged.generator.state_dict())
        rate = config.learning_rate / 6
        g_optimiser = Adam(generator.parameters(), rate, (0.0, 0.99))
        d_optimiser = Adam(discriminator.parameters(), rate, (0.0, 0.99))
        for step in range(config.adversarial_steps):
            cosine_decay(g_optimiser, rate, step, config.adversarial_steps)
            photos = self.pool.photos(config.batch, self.rng)
            with torch.no_grad():
                fakes = self._generate(generator, self._latents())
            loss = (
                functional.softplus(-discriminator(photos)).mean()
                + functional.softplus(discriminator(fakes)).mean()
            )
            if step % 8 == 0:
                loss = loss + 8 * config.r1_weight * r1_penalty(discriminator, photos)
            take_step(d_optimiser, loss)
            latents, faces = self.pool.pairs(config.batch, self.rng)
            generated = self._generate(generator, latents)
            pairs = pair_loss(generated, faces)
            total = functional.softplus(-discriminator(generated)).mean() + config.pair_weight * pairs
            take_step(g_optimiser, total)
            # The average's decay continues from the first stage: it hardly follows while the discriminator is new.
            self._average(self.config.paired_steps + step)
            self.images += config.batch
            if step % 50 == 0:
                losses = {"discriminator": loss.item(), "l1": pairs.item()}
                report("adversaries", step, config.adversarial_steps, losses)

    def finish(self) -> Model:
        """The averaged generator and the discriminator, with notes on how they were trained."""
        self.averaged.discriminator.load_state_dict(self.gan.discriminator.state_dict())
        estimate_mean_style(self.averaged.network(StyleGAN2), self.streams.generator("mean style"))
        notes = training_notes("fedface pretrain gan", asdict(self.config), self.images, self.started)
        return replace(self.averaged, notes=notes)


def cosine_decay(optimiser: Adam, rate: float, step: int, steps: int) -> None:
    """Set the learning rate of a step, see `warmup_cosine`."""
    for group in optimiser.param_groups:
        group["lr"] = rate * warmup_cosine(step, steps) * group.get("scale", 1.0)


def pretrain_gan(config: GanPretrainConfig, report: Progress) -> Model:
    """Both stages, one after the other."""
    training = GanPretraining(config, make_pool(config, report))
    training.pairs(report)
    training.adversaries(report)
    return training.finish()
