"""Every form of generator and discriminator equals its slow reference, and per-example gradients are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slow_reference
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedface.errors import ConfigError
from fedface.models.discriminator import Discriminator, DiscriminatorConfig, minibatch_std
from fedface.models.generator_protocol import draw_noise
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config

RNG = torch.Generator()


def stirred(module: nn.Module) -> nn.Module:
    """Nonzero biases and noise strengths, because initial zeros would hide errors."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                weight.add_(0.3 * torch.randn(weight.shape, generator=RNG))
    return module.double()


def generator_of(**more: Any) -> StyleGAN2:
    RNG.manual_seed(1)
    config = StyleGAN2Config(
        size=16, latent_width=5, style_width=6, mapping_layers=2, channel_base=64, channel_max=7, **more
    )
    return stirred(StyleGAN2(config, RNG))  # type: ignore[return-value]


def discriminator_of(**more: Any) -> Discriminator:
    RNG.manual_seed(2)
    return stirred(Discriminator(DiscriminatorConfig(size=16, channel_base=64, channel_max=8, **more), RNG))  # type: ignore[return-value]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
def test_each_generator_equals_its_slow_reference(architecture: str, clamp: float | None) -> None:
    """Explicit convolutions, one weight per image; the clamp is low enough to have an effect."""
    generator = generator_of(architecture=architecture, clamp=clamp)
    styles = normal(2, generator.style_inputs, 6)
    generated = 2 * generator.synthesize(styles).detach().numpy() - 1
    state = slow_reference.state_of(generator).at("synthesis.")
    reference = [slow_reference.synthesis(state, own, 16, architecture, clamp) for own in styles.numpy()]
    np.testing.assert_allclose(generated, np.stack(reference), atol=1e-9)
    if clamp is not None:
        free = generator_of(architecture=architecture, clamp=None)
        assert np.abs(2 * free.synthesize(styles).detach().numpy() - 1 - generated).max() > 0.1


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize("architecture", ["resnet", "orig", "skip"])
def test_each_discriminator_equals_its_slow_reference(architecture: str, clamp: float | None) -> None:
    """With minibatch statistics in groups of four, two statistics each."""
    discriminator = discriminator_of(
        architecture=architecture, clamp=clamp, minibatch_group=4, minibatch_channels=2
    )
    pictures = normal(8, 3, 16, 16)
    reference = slow_reference.discriminator(
        slow_reference.state_of(discriminator),
        pictures.numpy(),
        None,
        architecture=architecture,
        clamp=clamp,
        group=4,
        shares=2,
    )
    np.testing.assert_allclose(discriminator((pictures + 1) / 2).detach().numpy(), reference, atol=1e-9)


@pytest.mark.parametrize(("count", "group"), [(1, 4), (3, 4), (4, 4), (8, 4), (6, 2), (5, 1), (7, 32)])
def test_minibatch_statistics_equal_a_loop(count: int, group: int) -> None:
    """A batch smaller than a group is one group."""
    x = normal(count, 6, 4, 4)
    found = minibatch_std(x, group, 3)
    assert found.shape == (count, 3, 4, 4)
    reference = np.stack(slow_reference.spread(list(x.numpy()), group, 3))
    np.testing.assert_allclose(
        found.numpy(), np.broadcast_to(reference[:, :, None, None], found.shape), atol=1e-12
    )


def test_one_image_and_equal_images_have_no_deviation() -> None:
    """Only the root of epsilon remains: 1e-4."""
    x = normal(1, 4, 4, 4)
    for batch in (x, x.expand(4, -1, -1, -1)):
        torch.testing.assert_close(
            minibatch_std(batch, 4, 1), torch.full((len(batch), 1, 4, 4), 1e-4).double()
        )


def test_a_batch_that_cannot_be_split_in_groups_is_refused() -> None:
    """Six images cannot be split into groups of four."""
    with pytest.raises(ConfigError, match="at most 4 or a multiple of it, got 6"):
        discriminator_of(minibatch_group=4)(normal(6, 3, 16, 16))


def test_only_minibatch_statistics_couple_images() -> None:
    """The clean negative and the planted positive of what private training requires."""
    pictures, other = normal(4, 3, 16, 16), normal(1, 3, 16, 16)
    swapped = torch.cat([pictures[:3], other])
    for group, moved in ((0, False), (4, True)):
        discriminator = discriminator_of(minibatch_group=group)
        assert bool((discriminator(pictures) - discriminator(swapped))[:3].abs().max() > 1e-9) is moved


@pytest.mark.parametrize("architecture", ["resnet", "orig", "skip"])
def test_per_example_gradients_of_each_discriminator_equal_a_loop(architecture: str) -> None:
    """vmap(grad) against a loop."""
    discriminator = discriminator_of(architecture=architecture)
    pictures = normal(3, 3, 16, 16)
    weights = dict(discriminator.named_parameters())

    def logit(values: dict[str, Tensor], picture: Tensor) -> Tensor:
        return functional_call(discriminator, values, (picture[None],))[0]

    together = vmap(grad(logit), in_dims=(None, 0))(weights, pictures)
    for i, picture in enumerate(pictures):
        alone = torch.autograd.grad(discriminator(picture[None])[0], list(weights.values()))
        for name, gradient in zip(weights, alone, strict=True):
            torch.testing.assert_close(together[name][i], gradient, msg=name)


@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
def test_style_gradients_of_each_generator_equal_a_loop(architecture: str) -> None:
    """vmap(grad) against a loop, with given noise."""
    generator = generator_of(architecture=architecture)
    styles = normal(3, generator.style_inputs, 6)
    noise = [normal(1, 1, side, side) for side in generator.noise_sides]

    def brightness(own: Tensor) -> Tensor:
        return generator.synthesize(own[None], noise).square().sum()

    together = vmap(grad(brightness))(styles)
    for i, own in enumerate(styles):
        own = own.clone().requires_grad_()
        (alone,) = torch.autograd.grad(brightness(own), own)
        torch.testing.assert_close(together[i], alone)


def test_noise_is_fixed_given_random_or_none() -> None:
    """Passing the fixed maps changes nothing; random ones come from the stream; zeros equal zero strength."""
    generator = generator_of()
    styles = normal(2, generator.style_inputs, 6)
    named = dict(generator.named_buffers())
    fixed = [value[None, None] for name, value in named.items() if name.endswith("noise_const")]
    torch.testing.assert_close(generator.synthesize(styles, fixed), generator.synthesize(styles))
    sampled = [draw_noise(generator, 2, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert [tuple(map.shape) for map in sampled[0]] == [(2, 1, side, side) for side in (4, 8, 8, 16, 16)]
    generated = [generator.synthesize(styles, [map.double() for map in maps]) for maps in sampled]
    assert torch.equal(generated[0], generated[1]) and not torch.equal(generated[0], generated[2])
    quiet = generator.synthesize(
        styles, [map.double() for map in [torch.zeros(1, 1, side, side) for side in generator.noise_sides]]
    )
    with torch.no_grad():
        for name, weight in generator.named_parameters():
            if name.endswith("noise_strength"):
                weight.zero_()
    torch.testing.assert_close(quiet, generator.synthesize(styles))


@pytest.mark.parametrize("cutoff", [0, 3, 6])
def test_truncation_with_a_cutoff_changes_only_the_coarse_styles(cutoff: int) -> None:
    """Half way to the mean up to the cutoff, unchanged after it."""
    generator = generator_of()
    generator.mapping.w_avg.copy_(normal(6))
    styles = normal(2, 6, 6)
    found = generator.truncate(styles, 0.5, cutoff)
    torch.testing.assert_close(found[:, :cutoff], (styles[:, :cutoff] + generator.mapping.w_avg) / 2)
    assert torch.equal(found[:, cutoff:], styles[:, cutoff:])


def test_a_wrong_number_of_styles_or_noise_maps_is_refused() -> None:
    """With the expected number."""
    generator = generator_of()
    with pytest.raises(ValueError, match="6, v"):
        generator.synthesize(normal(2, 5, 6))
    with pytest.raises(ValueError, match="5 maps, got 4"):
        generator.synthesize(
            normal(2, 6, 6), [torch.zeros(1, 1, side, side) for side in generator.noise_sides][1:]
        )


@pytest.mark.parametrize(
    ("wrong", "result"),
    [
        ({"minibatch_group": -1}, "minibatch_group must be at least 0"),
        ({"minibatch_group": 4, "minibatch_channels": 3}, "must divide the 64 channels"),
        ({"minibatch_channels": 0}, r"minibatch_channels must lie in \[1, 65536\]"),
        ({"classes": -1}, r"classes must lie in \[0, 65536\]"),
        ({"mapping_layers": 65}, r"mapping_layers must lie in \[1, 64\]"),
        ({"clamp": 0.0}, "clamp must be a finite number above 0"),
    ],
)
def test_a_discriminator_config_out_of_range_is_refused(wrong: dict[str, Any], result: str) -> None:
    """With name, bound and value."""
    with pytest.raises(ConfigError, match=result):
        DiscriminatorConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "result"),
    [
        ({"classes": -1}, r"classes must lie in \[0, 65536\]"),
        ({"clamp": -1.0}, "clamp must be a finite number above 0"),
    ],
)
def test_a_generator_config_out_of_range_is_refused(wrong: dict[str, Any], result: str) -> None:
    """With name, bound and value."""
    with pytest.raises(ConfigError, match=result):
        StyleGAN2Config(**wrong)
