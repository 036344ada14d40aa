"""Networks of every size that a config allows."""

from __future__ import annotations

import pytest
import torch

from fedface.errors import ConfigError
from fedface.models.critic import Critic, CriticConfig
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_a_generator_makes_pictures_of_its_size_and_a_critic_judges_them(size: int) -> None:
    """k = 2 log2(size) - 2 styles go in, one picture of `size` pixels comes out, one logit follows."""
    chance = torch.Generator().manual_seed(0)
    shape = {"size": size, "channel_base": 4 * size, "channel_max": 4}
    generator = StyleGAN2(GeneratorConfig(latent_width=8, style_width=8, mapping_layers=2, **shape), chance)
    styles = generator.map(torch.randn(1, 8, generator=chance))
    assert styles.shape == (1, 2 * (size.bit_length() - 1) - 2, 8)
    assert len(generator.noise_sides) == styles.shape[1] - 1
    with torch.no_grad():
        made = generator.synthesize(styles)
        assert made.shape == (1, 3, size, size)
        assert Critic(CriticConfig(**shape), chance)(made).shape == (1,)


@pytest.mark.parametrize("size", [0, 4, 48, 2048])
def test_a_size_that_is_no_power_of_two_in_range_is_refused(size: int) -> None:
    """8 to 1024, powers of two."""
    with pytest.raises(ConfigError, match="power of two"):
        GeneratorConfig(size=size)


def test_truncation_to_nothing_gives_everybody_the_mean_face() -> None:
    """psi = 0 is the mean style, whatever the latent."""
    chance = torch.Generator().manual_seed(0)
    generator = StyleGAN2(GeneratorConfig(size=8, channel_max=4), chance)
    styles = generator.truncate(generator.map(torch.randn(3, 64, generator=chance)), psi=0.0)
    assert torch.equal(styles, torch.zeros_like(styles) + generator.mapping.w_avg)
