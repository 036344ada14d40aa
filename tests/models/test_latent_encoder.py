"""The encoder: one photo, one latent on the sphere, independent of the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from fedface.errors import ConfigError
from fedface.models.checkpoint import ENCODER_PATH, load_model, weights_hash
from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig
from fedface.models.stylegan_layers import unit_mean_square
from fedface.photos.skin_tone import measure_tone
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.tensor_types import Images

STREAMS = Streams(41)
SMALL = LatentEncoderConfig(size=16, latent_width=12, channel_base=64, channel_max=8)


def pictures(count: int) -> Images:
    """Noise images."""
    return torch.rand(count, 3, 16, 16, generator=STREAMS.generator("pictures"))


def test_every_latent_lies_on_the_sphere_of_the_mapping_network() -> None:
    """Norm sqrt(z), also for black, white and unusual images."""
    encoder = LatentEncoder(SMALL, STREAMS.generator("weights"))
    strange = torch.cat([pictures(4), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16) * 5])
    lengths = encoder(strange).norm(dim=1)
    assert torch.allclose(lengths, torch.full((6,), math.sqrt(12)), rtol=1e-4)
    assert torch.allclose(unit_mean_square(torch.full((1, 4), 0.5)), torch.ones(1, 4), atol=1e-6)


def test_a_latent_depends_only_on_its_image() -> None:
    """An image that is not finite does not affect others."""
    encoder = LatentEncoder(SMALL, STREAMS.generator("weights"))
    spoiled = pictures(3)
    spoiled[1] = float("nan")
    together, alone = encoder(spoiled), encoder(pictures(3)[[0, 2]])
    assert torch.allclose(together[[0, 2]], alone, atol=1e-5)
    assert not bool(torch.isfinite(together[1]).any())


def test_equal_streams_give_equal_encoders() -> None:
    """And the description matches the weights."""
    one, two = (LatentEncoder(SMALL, STREAMS.generator("weights")) for _ in range(2))
    assert weights_hash(one) == weights_hash(two)
    assert (one.size, one.latent_width) == (16, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 20}, "size must be a power of two"),
        ({"latent_width": 0}, r"latent_width must lie in \[1, 65536\], got 0"),
        ({"channel_max": 0}, r"channel_max must lie in \[1, 65536\], got 0"),
    ],
)
def test_a_shape_out_of_bounds_is_refused_by_name(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LatentEncoderConfig(**change)


@pytest.mark.parametrize("light_fraction", [0.0, 1.0])
def test_the_bundled_encoder_encodes_light_and_dark_faces(light_fraction: float) -> None:
    """The reconstruction is closer to the photo in lightness than to another photo of its group. New synthetic faces
    through cameras, 48 dark and 48 light. The error of another face of the same group is what encoding only the group
    would leave; the encoder must leave less than two thirds of it.
    """
    model = load_model(ENCODER_PATH)
    faces = sample_faces(48, ToneMix(light_fraction=light_fraction), STREAMS.generator("faces"))
    photos = render(faces, 32, noise=STREAMS.generator("camera"))
    with torch.no_grad():
        generated = model.generator.synthesize(model.generator.map(model.networks["encoder"](photos))).clamp(
            0, 1
        )
    true, read = measure_tone(photos).lab[:, 0], measure_tone(generated).lab[:, 0]
    assert float((read - true).abs().mean()) < 0.67 * float((read.roll(1) - true).abs().mean())
    assert torch.isfinite(generated).all()
