"""Networks of every size that a config allows, and the published full size."""

from __future__ import annotations

import math

import pytest
import torch

from fedface.errors import ConfigError
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.stylegan1 import StyleGAN1, StyleGAN1Config
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config

SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]
FULL = StyleGAN2Config(
    size=1024,
    latent_width=512,
    style_width=512,
    mapping_layers=8,
    channel_base=32768,
    channel_max=512,
)
FULL_DISCRIMINATOR = DiscriminatorConfig(size=1024, channel_base=32768, channel_max=512, minibatch_group=4)


@pytest.mark.parametrize("size", SIZES)
def test_generators_and_discriminators_of_every_size_work(size: int) -> None:
    """k = 2 log2(size) - 2 styles in, one image of `size` pixels out, one logit."""
    rng = torch.Generator().manual_seed(0)
    shape = {"size": size, "channel_base": 4 * size, "channel_max": 4}
    generator = StyleGAN2(StyleGAN2Config(latent_width=8, style_width=8, mapping_layers=2, **shape), rng)
    styles = generator.map(torch.randn(1, 8, generator=rng))
    assert styles.shape == (1, 2 * (size.bit_length() - 1) - 2, 8)
    assert len(generator.noise_sides) == styles.shape[1] - 1
    with torch.no_grad():
        generated = generator.synthesize(styles)
        assert generated.shape == (1, 3, size, size)
        assert Discriminator(DiscriminatorConfig(**shape), rng)(generated).shape == (1,)


@pytest.mark.parametrize("size", SIZES)
def test_stylegan1_generates_images_of_its_size(size: int) -> None:
    """As many noise maps as styles, and finite numbers."""
    rng = torch.Generator().manual_seed(0)
    config = StyleGAN1Config(
        size=size, latent_width=8, style_width=8, mapping_layers=2, channel_base=4 * size, channel_max=4
    )
    generator = StyleGAN1(config, rng)
    assert generator.style_inputs == len(generator.noise_sides) == 2 * (size.bit_length() - 1) - 2
    generated = generator.sample(1, rng)
    assert generated.shape == (1, 3, size, size) and bool(generated.isfinite().all())


@pytest.mark.parametrize("config", [StyleGAN2Config, DiscriminatorConfig, StyleGAN1Config])
@pytest.mark.parametrize("size", [0, 4, 48, 2048])
def test_a_size_that_is_not_a_power_of_two_in_range_is_refused(config: type, size: int) -> None:
    """8 to 1024, powers of two."""
    with pytest.raises(ConfigError, match="power of two"):
        config(size=size)


def test_truncation_to_zero_gives_the_mean_face() -> None:
    """psi = 0 is the mean style, whatever the latent."""
    rng = torch.Generator().manual_seed(0)
    generator = StyleGAN2(StyleGAN2Config(size=8, channel_max=4), rng)
    styles = generator.truncate(generator.map(torch.randn(3, 64, generator=rng)), psi=0.0)
    assert torch.equal(styles, torch.zeros_like(styles) + generator.mapping.w_avg)


def published_channels(side: int) -> int:
    """Karras et al. 2020, configuration F: 512 up to 64 px, then half as many at each doubling."""
    return {128: 256, 256: 128, 512: 64, 1024: 32}.get(side, 512)


def counted(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_full_size_generator_has_the_published_shape() -> None:
    """Layers counted one by one: eight of the mapping, then per side styles, kernels, biases, noise and colours."""
    with torch.device("meta"):
        generator = StyleGAN2(FULL)
    assert generator.style_inputs == 18 and len(generator.noise_sides) == 17
    assert [FULL.channels(side) for side in FULL.sides] == [published_channels(side) for side in FULL.sides]
    total = 8 * (512 * 512 + 512)
    for side in FULL.sides:
        here = published_channels(side)
        convolutions = [here] if side == 4 else [published_channels(side // 2), here]
        for inputs in convolutions:
            total += 512 * inputs + inputs + here * inputs * 9 + here + 1
        total += 512 * here + here + 3 * here + 3
    total += 512 * 4 * 4
    assert counted(generator) == total


def test_the_full_size_discriminator_has_the_published_shape() -> None:
    """Two convolutions and a shortcut per side, then three layers; the spread of a group is one more channel."""
    with torch.device("meta"):
        discriminator = Discriminator(FULL_DISCRIMINATOR)
    total = 3 * published_channels(1024) + published_channels(1024)
    for power in range(10, 2, -1):
        here, below = published_channels(2**power), published_channels(2 ** (power - 1))
        total += here * here * 9 + here + here * below * 9 + below + here * below
    total += 513 * 512 * 9 + 512 + 512 * 16 * 512 + 512 + 512 + 1
    assert counted(discriminator) == total


def test_the_full_size_stylegan1_has_the_published_shape() -> None:
    """Eighteen convolutions; each epilogue has a noise weight per channel and two numbers per channel from w."""
    config = StyleGAN1Config()
    with torch.device("meta"):
        generator = StyleGAN1(config)
    assert generator.style_inputs == 18
    channels = [min(512, int(8192 / 2 ** (math.log2(side) - 1))) for side in config.sides]
    assert [config.channels(side) for side in config.sides] == channels
    total = 8 * (512 * 512 + 512) + 512 * 4 * 4 + 512 + 3 * 16 + 3
    for i, here in enumerate(channels):
        for inputs in [here] if i == 0 else [channels[i - 1], here]:
            total += here * inputs * 9 + here
        total += 2 * (here + 2 * here * 512 + 2 * here)
    assert counted(generator) == total
