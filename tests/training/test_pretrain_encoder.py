"""Pretraining of the encoder: dark faces are frequent in its training data, and training improves it."""

from __future__ import annotations

import math

import pytest
import torch

from fedface.models.checkpoint import weights_hash
from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams
from fedface.synthetic.faces import NORMALS, ToneMix, faces_from_normals
from fedface.training.pretrain_encoder import (
    EncoderPretrainConfig,
    build_tone_pool,
    pretrain_encoder,
    tone_latents,
    wide_latents,
)
from fedface.training.pretrain_gan import pair_loss

STREAMS = Streams(51)
SMALL = LatentEncoderConfig(size=16, latent_width=64, channel_base=128, channel_max=12)


def generator() -> StyleGAN2:
    """A generator of 16 px with random weights, always the same."""
    shape = StyleGAN2Config(
        size=16, channel_base=64, channel_max=8, latent_width=64, style_width=16, mapping_layers=2
    )
    return StyleGAN2(shape, STREAMS.generator("generator"))


def ignore(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    """No report."""


def test_half_of_the_synthetic_training_faces_are_dark_and_dark_tones_are_uniform() -> None:
    """20,000 latents: share 1/2, dark tones uniform on Monk 6 to 10, within five standard errors."""
    config = EncoderPretrainConfig(light_fraction=0.85, dark_fraction=0.5)
    latents = tone_latents(20_000, config, STREAMS.generator("latents"))
    assert torch.allclose(latents.norm(dim=1), torch.full((20_000,), math.sqrt(64)), rtol=1e-4)
    tones = faces_from_normals(latents[:, :NORMALS], ToneMix(light_fraction=0.85)).tone
    dark = tones > 5.5
    assert abs(float(dark.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    assert abs(float((tones[dark] > 8).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(10_000) + 0.01


def test_generated_training_faces_have_a_larger_variance() -> None:
    """On the sphere, with components beyond three more often than for normal ones."""
    wide = wide_latents(4000, 64, 0.5, STREAMS.generator("wide"))
    plain = wide_latents(4000, 64, 0.0, STREAMS.generator("wide"))
    assert torch.allclose(wide.norm(dim=1), torch.full((4000,), 8.0), rtol=1e-4)
    assert int((wide.abs() > 3).sum()) > 3 * int((plain.abs() > 3).sum())


def test_training_improves_the_encoder_and_leaves_the_generator() -> None:
    """After 60 steps reconstructions are closer to the input than those of an untrained encoder."""
    made_from = generator()
    before = weights_hash(made_from)
    config = EncoderPretrainConfig(steps=60, batch=16, pool=0, encoder=SMALL, latent_std=0.0)
    taught = pretrain_encoder(made_from, config, ignore)
    untaught = LatentEncoder(SMALL, STREAMS.generator("untaught"))
    with torch.no_grad():
        shown = made_from.sample(64, STREAMS.generator("shown"))
        losses = [
            float(pair_loss(made_from.synthesize(made_from.map(encoder(shown))), shown))
            for encoder in (taught, untaught)
        ]
    assert losses[0] < 0.8 * losses[1]
    assert weights_hash(made_from) == before


def test_the_pool_pairs_each_latent_with_its_own_face() -> None:
    """Through a camera and clean: similar, not equal, and deterministic."""
    config = EncoderPretrainConfig(pool=6, encoder=LatentEncoderConfig(size=32))
    one, two = build_tone_pool(config, ignore), build_tone_pool(config, ignore)
    assert torch.equal(one.clean, two.clean) and torch.equal(one.seen, two.seen)
    away = (one.clean.float() - one.seen.float()).abs().mean()
    assert 0 < float(away) < 10


def test_an_encoder_of_another_size_is_refused() -> None:
    """The sentence names both."""
    with pytest.raises(ValueError, match="32 px"):
        pretrain_encoder(generator(), EncoderPretrainConfig(pool=0), ignore)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"dark_fraction": 1.0}, "dark_fraction must lie in"),
        ({"latent_std": -1.0}, "latent_std must lie in"),
        ({"learning_rate": 0.0}, "learning_rate must lie in"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_name(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderPretrainConfig(**change)  # type: ignore[arg-type]
