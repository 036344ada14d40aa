"""The pretraining of the base checkpoint, at a hundredth of its size."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import pytest
import torch
from tiny import DISCRIMINATOR, GENERATOR
from torch import Tensor, nn

from fedface.models.checkpoint import weights_hash
from fedface.models.discriminator import Discriminator
from fedface.models.model import GanArchitecture, build_model
from fedface.randomness import Streams
from fedface.synthetic.faces import NORMALS
from fedface.training.pretrain_gan import (
    GanPretrainConfig,
    GanPretraining,
    make_pool,
    pair_loss,
    pretrain_gan,
    r1_penalty,
)

SMALL = GanPretrainConfig(
    seed=3,
    pool=64,
    paired_steps=40,
    adversarial_steps=9,
    batch=8,
    generator=GENERATOR,
    discriminator=DISCRIMINATOR,
)


def silent(name: str, done: int, of: int, metrics: dict[str, float]) -> None:
    """Discards progress."""


def test_the_pair_loss_of_a_constant_shift_is_three_times_its_size() -> None:
    """A constant difference of 0.1 counts at three scales, and differences of neighbours do not see it."""
    faces = torch.rand(2, 3, 16, 16, generator=Streams(1).generator("faces"))
    assert float(pair_loss(faces, faces)) == 0.0
    assert float(pair_loss(faces + 0.1, faces)) == pytest.approx(0.3, abs=1e-5)


def test_an_edge_costs_more_than_the_same_difference_spread_out() -> None:
    """Stripes of one pixel: L1 of 0.5 at full size, plus 1 for the neighbours; both vanish at half size."""
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1.0
    assert float(pair_loss(stripes, torch.full_like(stripes, 0.5))) == pytest.approx(0.5 + 1.0, abs=1e-5)


class Weighing(nn.Module):
    """A discriminator whose logit is three times the sum of the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return 3.0 * images.sum(dim=(1, 2, 3))


def test_r1_is_half_the_squared_slope() -> None:
    """A slope of 3 at each of 3 * 4 * 4 pixels: 9 * 48 / 2."""
    assert float(r1_penalty(cast(Discriminator, Weighing()), torch.rand(5, 3, 4, 4))) == pytest.approx(216.0)


def test_a_pool_is_determined_by_its_seed() -> None:
    """Latents with their faces, clean and through cameras, as bytes."""
    pool, again, other = (make_pool(replace(SMALL, seed=seed), silent) for seed in (3, 3, 4))
    assert pool.latents.shape == (64, 64) and pool.clean.shape == pool.seen.shape == (64, 3, 16, 16)
    assert pool.clean.dtype == pool.seen.dtype == torch.uint8
    assert torch.equal(pool.clean, again.clean) and torch.equal(pool.seen, again.seen)
    assert not torch.equal(pool.clean, other.clean)
    assert 0 < float((pool.clean.float() - pool.seen.float()).abs().mean()) < 64


def test_the_face_depends_only_on_its_own_latent_components() -> None:
    """The norm of a latent and its remaining components change nothing."""
    from fedface.synthetic.faces import ToneMix, faces_from_normals, render

    config = SMALL
    pool = make_pool(config, silent)
    scaled = pool.latents * torch.rsqrt(pool.latents.square().mean(dim=1, keepdim=True) + 1e-8)
    faces = faces_from_normals(scaled[:5, :NORMALS], ToneMix(light_fraction=config.light_fraction))
    sampled = (render(faces, 16).clamp(0, 1) * 255).round().to(torch.uint8)
    # 500 faces are rendered at once there and 5 here, so that a pixel may round the other way.
    assert int((sampled.int() - pool.clean[:5].int()).abs().max()) <= 1


def test_a_pair_is_a_latent_with_its_own_face() -> None:
    """Each image of a batch is the pool's image of its latent."""
    pool = make_pool(SMALL, silent)
    latents, faces = pool.pairs(6, Streams(1).generator("x"))
    for latent, face in zip(latents, faces, strict=True):
        (place,) = torch.nonzero((pool.latents == latent).all(dim=1))
        assert torch.equal((face * 255).round().to(torch.uint8), pool.clean[place][0])
    assert 0 <= float(faces.min()) and float(faces.max()) <= 1


def test_the_first_stage_improves_the_regression() -> None:
    """The averaged generator reproduces its latents' faces better than the untrained one."""
    training = GanPretraining(replace(SMALL, paired_steps=80), make_pool(SMALL, silent))
    start = copy.deepcopy(training.gan).generator
    training.pairs(silent)
    latents, faces = training.pool.pairs(32, Streams(2).generator("look"))
    with torch.no_grad():
        before, after = (
            float(pair_loss(network.synthesize(network.map(latents)), faces))
            for network in (start, training.averaged.generator)
        )
    assert after < 0.8 * before


def test_pretraining_gives_a_checkpoint_with_notes() -> None:
    """Both stages, a mean style, notes; the same for the same seed, for any global seed."""
    heard: list[str] = []

    def report(name: str, done: int, of: int, metrics: dict[str, float]) -> None:
        heard.append(name)

    short = replace(SMALL, paired_steps=4, adversarial_steps=9)
    gan = pretrain_gan(short, report)
    torch.rand(3)
    assert weights_hash(*gan.modules()) == weights_hash(*pretrain_gan(short, silent).modules())
    assert list(dict.fromkeys(heard)) == ["rendering", "pairs", "adversaries"]
    assert gan.notes["images_seen"] == (4 + 9) * 8 and gan.notes["recipe"]["seed"] == 3
    assert float(gan.generator.mapping.w_avg.abs().max()) > 0
    architecture = GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR)
    untrained = build_model(architecture, Streams(3).generator("weights"))
    assert weights_hash(gan.discriminator) != weights_hash(untrained.discriminator)
    assert all(bool(torch.isfinite(weight).all()) for weight in gan.generator.parameters())
