"""Feed-forward networks: a style encoder with a generator, and a super-resolution network."""

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
def test_bicubic_enlargement_equals_torch(low: int, side: int) -> None:
    photos = torch.rand(2, 3, low, low, generator=STREAMS.generator("low"))
    reference = functional.interpolate(photos, size=(side, side), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_up(photos, side), reference, atol=2e-6, rtol=0)


def test_an_encoder_with_zero_output_gives_the_mean_style() -> None:
    """With its last layer at zero every input of the generator is the mean, for any photo."""
    encoder = StyleEncoder(STYLES, STREAMS.generator("encoder"))
    with torch.no_grad():
        encoder.mean_style.copy_(torch.arange(16.0))
        encoder.out.weight.zero_()
    styles = encoder(PHOTOS)
    assert torch.equal(styles, torch.arange(16.0).expand(3, 6, 16))


def test_a_network_with_zero_residual_enlarges_bicubically() -> None:
    resolver = SuperResolutionNetwork(RESOLVER, STREAMS.generator("resolver"))
    with torch.no_grad():
        resolver.tail.weight.zero_()
    torch.testing.assert_close(resolver(PHOTOS), resize_up(PHOTOS, 16))


def test_the_combined_network_applies_encoder_and_generator() -> None:
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
def test_the_output_for_a_photo_depends_only_on_that_photo(
    shape: StyleEncoderArchitecture | SuperResolutionArchitecture,
) -> None:
    """Per-example gradients equal single-photo gradients, and none changes with another photo."""
    model = build_model(shape, STREAMS.generator("weights"))
    assert model.is_upsampler
    faces = torch.rand(2, 3, 16, 16, generator=STREAMS.generator("faces"))
    problem = PerExampleProblem(model.upsampler, reconstruction_loss(BicubicPulse(4), 10.0))
    check_per_example_gradients(problem, faces)


@pytest.mark.parametrize("low", [1, 2, 4, 8])
def test_photos_of_any_supported_size_give_faces_of_one_size(low: int) -> None:
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
def test_a_file_gives_the_saved_networks(
    tmp_path: Path, shape: StyleEncoderArchitecture | SuperResolutionArchitecture
) -> None:
    model = build_model(shape, STREAMS.generator("weights"), {"made_by": "a test"})
    save_model(tmp_path / "saved.safetensors", model)
    again = load_model(tmp_path / "saved.safetensors")
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


def test_a_super_resolution_network_cannot_sample() -> None:
    """Commands that sample report it; a style encoder's generator can sample."""
    with pytest.raises(ConfigError, match="cannot generate faces without a photo"):
        _ = build_model(SuperResolutionArchitecture(network=RESOLVER)).generator
    styled = build_model(StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES))
    assert styled.generator is styled.networks["generator"]


def test_the_bundled_upsamplers_accept_16_pixels_and_use_the_bundled_generator() -> None:
    """Trained on the same synthetic faces; the encoder's generator is that of the base checkpoint."""
    styled, resolved = load_style_encoder(), load_super_resolution()
    assert (styled.size, resolved.size) == (32, 32)
    assert (styled.architecture.max_input_size, resolved.architecture.max_input_size) == (16, 16)
    assert styled.notes["generator"] == weights_hash(styled.generator)
    assert styled.notes["recipe"]["light_fraction"] == resolved.notes["recipe"]["light_fraction"] == 0.85
