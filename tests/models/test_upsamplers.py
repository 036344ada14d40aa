"""Networks that answer a photo in one pass: a style encoder before a generator, and a super-resolution network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import GENERATOR, RESOLVER, STYLES
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.models.checkpoint import (
    load_model,
    load_style_encoder,
    load_super_resolution,
    save_model,
    weights_hash,
)
from fedface.models.model import StyleEncoderArchitecture, SuperResolutionArchitecture, build_model
from fedface.models.style_encoder import StyleEncoder, StyleEncoderNetworkConfig, StyleUpsampler
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.stylegan_layers import resize_up
from fedface.models.super_resolution import SuperResolutionNetwork, SuperResolutionNetworkConfig
from fedface.randomness import Streams
from fedface.training.dp_sgd import check_per_example_gradients
from fedface.training.per_example_gradients import PerExampleProblem
from fedface.training.upsampler import reconstruction_loss
from fedface.upsampling.degradation import BicubicPulse

STREAMS = Streams(3)
PHOTOS = torch.rand(3, 3, 4, 4, generator=STREAMS.generator("photos"))


@pytest.mark.parametrize(("low", "side"), [(4, 8), (8, 8), (3, 16), (2, 32)])
def test_enlarging_by_a_matrix_is_torchs_bicubic(low: int, side: int) -> None:
    photos = torch.rand(2, 3, low, low, generator=STREAMS.generator("low"))
    twin = functional.interpolate(photos, size=(side, side), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_up(photos, side), twin, atol=2e-6, rtol=0)


def test_an_encoder_that_says_nothing_names_the_mean_style() -> None:
    """With its last layer at zero every input of the generator gets the mean, whatever the photo."""
    encoder = StyleEncoder(STYLES, STREAMS.generator("encoder"))
    with torch.no_grad():
        encoder.mean_style.copy_(torch.arange(16.0))
        encoder.out.weight.zero_()
    styles = encoder(PHOTOS)
    assert torch.equal(styles, torch.arange(16.0).expand(3, 6, 16))


def test_a_network_whose_tail_is_zero_enlarges_bicubically() -> None:
    resolver = SuperResolutionNetwork(RESOLVER, STREAMS.generator("resolver"))
    with torch.no_grad():
        resolver.tail.weight.zero_()
    torch.testing.assert_close(resolver(PHOTOS), resize_up(PHOTOS, 16))


def test_one_network_of_encoder_and_generator_is_one_after_the_other() -> None:
    generator = StyleGAN2(GENERATOR, STREAMS.generator("generator"))
    encoder = StyleEncoder(STYLES, STREAMS.generator("encoder"))
    both = StyleUpsampler(generator, encoder)(PHOTOS)
    assert torch.equal(both, generator.synthesize(encoder(PHOTOS)))
    assert both.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    "shape",
    [
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
        SuperResolutionArchitecture(network=RESOLVER),
    ],
)
def test_the_answer_to_a_photo_hangs_on_that_photo_alone(
    shape: StyleEncoderArchitecture | SuperResolutionArchitecture,
) -> None:
    """Per-photo gradients equal one-photo gradients, and nobody's moves when another photo changes."""
    model = build_model(shape, STREAMS.generator("weights"))
    assert model.is_upsampler
    faces = torch.rand(2, 3, 16, 16, generator=STREAMS.generator("faces"))
    problem = PerExampleProblem(model.upsampler, reconstruction_loss(BicubicPulse(4), 10.0))
    check_per_example_gradients(problem, faces)


@pytest.mark.parametrize("low", [1, 2, 4, 8])
def test_photos_up_to_the_side_are_answered_with_faces_of_one_size(low: int) -> None:
    photos = torch.rand(1, 3, low, low, generator=STREAMS.generator("low"))
    for shape in (
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
        SuperResolutionArchitecture(network=RESOLVER),
    ):
        model = build_model(shape, STREAMS.generator("weights"))
        assert model.is_upsampler
        assert model.upsampler(photos).shape == (1, 3, 16, 16) and model.size == 16
        assert model.architecture.max_input_size == 8


@pytest.mark.parametrize(
    "shape",
    [
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
        SuperResolutionArchitecture(network=RESOLVER),
    ],
)
def test_a_file_gives_back_the_networks_that_were_kept(
    tmp_path: Path, shape: StyleEncoderArchitecture | SuperResolutionArchitecture
) -> None:
    model = build_model(shape, STREAMS.generator("weights"), {"made_by": "a test"})
    save_model(tmp_path / "kept.safetensors", model)
    again = load_model(tmp_path / "kept.safetensors")
    assert type(again) is type(model) and again.architecture == shape and again.notes == {"made_by": "a test"}
    assert weights_hash(*again.modules()) == weights_hash(*model.modules())


def test_shapes_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(ConfigError, match="must output 6 styles of width 16.* got 8 of width 128"):
        StyleEncoderArchitecture(generator=GENERATOR, encoder=StyleEncoderNetworkConfig())
    with pytest.raises(ConfigError, match="side must be at most the generator's 16, got 32"):
        StyleEncoderArchitecture(
            generator=GENERATOR, encoder=StyleEncoderNetworkConfig(side=32, style_inputs=6, style_width=16)
        )
    with pytest.raises(ConfigError, match="factor must be a power of two from 1 to 64, got 3"):
        SuperResolutionNetworkConfig(factor=3)
    with pytest.raises(ConfigError, match="between 8 and 1024 pixels, got 2048"):
        SuperResolutionNetworkConfig(side=512, factor=4)
    with pytest.raises(ConfigError, match="side must be a power of two from 4 to 256, got 12"):
        StyleEncoderNetworkConfig(side=12)


def test_a_super_resolution_network_draws_nobody() -> None:
    """Commands that draw samples say so; a style encoder's generator draws."""
    with pytest.raises(ConfigError, match="cannot generate faces without a photo"):
        _ = build_model(SuperResolutionArchitecture(network=RESOLVER)).generator
    styled = build_model(StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES))
    assert styled.generator is styled.networks["generator"]


def test_the_embedded_upsamplers_read_sixteen_pixels_and_stand_on_the_embedded_generator() -> None:
    """Made from the same synthetic faces; the encoder's generator is the base checkpoint's."""
    styled, resolved = load_style_encoder(), load_super_resolution()
    assert (styled.size, resolved.size) == (32, 32)
    assert (styled.architecture.max_input_size, resolved.architecture.max_input_size) == (16, 16)
    assert styled.notes["generator"] == weights_hash(styled.generator)
    assert styled.notes["recipe"]["light_fraction"] == resolved.notes["recipe"]["light_fraction"] == 0.85
