"""StyleGAN1: doubling in both published forms, the order of its layers, and the interface of a generator."""

from __future__ import annotations

import numpy as np
import pytest
import slow_reference
import torch
from scipy.signal import correlate2d
from torch import Tensor
from torch.func import grad, vmap

from fedface.models.generator_protocol import Generator
from fedface.models.stylegan1 import (
    FUSED_FROM,
    StyleGAN1,
    StyleGAN1Config,
    double_and_convolve,
    double_then_convolve,
    soften,
)
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler

SMALL = StyleGAN1Config(
    size=16, latent_width=5, style_width=6, mapping_layers=2, channel_base=32, channel_max=4
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=Streams(5).generator(str(shape)), dtype=torch.float64)


@pytest.fixture
def generator() -> StyleGAN1:
    """With nonzero biases and noise strengths; zeros would hide errors."""
    rng = Streams(5).generator("weights")
    generated = StyleGAN1(SMALL, rng)
    with torch.no_grad():
        for name, weight in generated.named_parameters():
            if name.endswith(("bias", "noise.weight", "const")):
                weight.add_(0.3 * torch.randn(weight.shape, generator=rng))
    return generated.double()


def test_both_forms_of_doubling_agree_with_a_flipped_kernel() -> None:
    """A transposed convolution flips its kernel, a convolution does not; equal up to rounding."""
    x, weight = normal(2, 3, 5, 7), normal(4, 3, 3, 3)
    apart = double_then_convolve(x, weight.flip(2, 3))
    assert apart.shape == (2, 4, 10, 14)
    torch.testing.assert_close(double_and_convolve(x, weight), apart)
    assert float((double_and_convolve(x, weight) - double_then_convolve(x, weight)).abs().max()) > 1


def test_the_impulse_response_shows_the_orientation_of_each_kernel() -> None:
    """Rows [a, a+b, b+c, c] for the fused form, and [c, b+c, a+b, a] for the other."""
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1] = 1
    row, column = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 7.0, 11.0])
    weight = torch.outer(column, row).double()[None, None]
    laid = torch.zeros(6, 6, dtype=torch.float64)
    laid[1:5, 1:5] = torch.outer(
        torch.tensor([3.0, 10.0, 18.0, 11.0]), torch.tensor([1.0, 3.0, 6.0, 4.0])
    ).double()
    torch.testing.assert_close(double_and_convolve(x, weight)[0, 0], laid)
    torch.testing.assert_close(double_then_convolve(x, weight)[0, 0], laid.flip(0, 1))


def test_blurring_preserves_a_constant_image_except_at_the_border() -> None:
    """The kernel sums to 1; zeros outside the image take a quarter at an edge."""
    soft = soften(torch.ones(1, 2, 4, 4))
    assert torch.equal(soft[:, :, 1:3, 1:3], torch.ones(1, 2, 2, 2))
    assert torch.equal(soft[:, :, 0, 1:3], torch.full((1, 2, 2), 0.75))


def test_large_sides_double_in_one_step_and_small_ones_do_not() -> None:
    """As published: from 128 on."""
    with torch.device("meta"):
        full = StyleGAN1(StyleGAN1Config())
    fused = {
        side: full.synthesis.get_submodule(f"blocks.{side}x{side}.conv0_up").fused for side in SMALL.sides[1:]
    }
    fused |= {s: full.synthesis.get_submodule(f"blocks.{s}x{s}.conv0_up").fused for s in (64, 128, 1024)}
    assert fused == {side: side >= FUSED_FROM for side in fused} and FUSED_FROM == 128


def epilogue(x: np.ndarray, style: np.ndarray, state: slow_reference.State) -> np.ndarray:
    """Noise, leaky ReLU, every channel to mean 0 and variance 1, then the style's factor and offset."""
    x = x + state["noise.weight"][:, None, None] * state["noise.const"]
    x = np.where(x > 0, x, 0.2 * x)
    x = (x - x.mean(axis=(1, 2), keepdims=True)) / np.sqrt(x.var(axis=(1, 2), keepdims=True) + 1e-5)
    factor, offset = np.split(slow_reference.dense(style, state.at("style_mod.lin.")), 2)
    return x * (factor + 1)[:, None, None] + offset[:, None, None]


def reference(
    state: slow_reference.State, styles: np.ndarray, sides: tuple[int, ...], fused: int
) -> np.ndarray:
    """One face's styles (k, v) -> (3, size, size) in the published range."""

    def conv(x: np.ndarray, layer: slow_reference.State, gain: float, turned: bool = False) -> np.ndarray:
        weight = layer["weight"][:, :, ::-1, ::-1] if turned else layer["weight"]
        return slow_reference.convolved(x, weight) * gain / np.sqrt(weight[0].size)

    gain, x = np.sqrt(2), np.zeros(0)
    soft = np.outer([1, 2, 1], [1, 2, 1]) / 16
    for i, side in enumerate(sides):
        block = state.at(f"blocks.{side}x{side}.")
        if side == 4:
            x, last = block["const"][0] + block["bias"][:, None, None], block.at("conv.")
        else:
            x, up = x.repeat(2, axis=1).repeat(2, axis=2), block.at("conv0_up.")
            x = conv(x, up, gain, side >= fused)
            x = np.stack([correlate2d(channel, soft, "same") for channel in x]) + up["bias"][:, None, None]
            last = block.at("conv1.")
        x = epilogue(x, styles[2 * i], block.at("epi1."))
        x = epilogue(conv(x, last, gain) + last["bias"][:, None, None], styles[2 * i + 1], block.at("epi2."))
    return conv(x, state.at("torgb."), 1.0) + state["torgb.bias"][:, None, None]


@pytest.mark.parametrize("fused", [8, 16, 32])
def test_the_network_equals_its_slow_reference(generator: StyleGAN1, fused: int) -> None:
    """Image by image and channel by channel, with the doubling fused from a side on."""
    for side in (8, 16):
        generator.synthesis.get_submodule(f"blocks.{side}x{side}.conv0_up").fused = side >= fused  # type: ignore[assignment]
    styles = normal(2, 6, 6)
    state = slow_reference.state_of(generator).at("synthesis.")
    expected = np.stack([reference(state, own, SMALL.sides, fused) for own in styles.numpy()])
    np.testing.assert_allclose(2 * generator.synthesize(styles).detach().numpy() - 1, expected, atol=1e-9)


def test_the_mapping_equals_its_slow_reference(generator: StyleGAN1) -> None:
    """The gain applies to the weights and not to the bias."""
    latents = normal(3, 5)
    state = slow_reference.state_of(generator).at("mapping.")
    for latent, style in zip(latents.numpy(), generator.map(latents).detach().numpy(), strict=True):
        x = slow_reference.normalised(latent)
        for i in range(2):
            weight, bias = state[f"dense{i}.weight"], state[f"dense{i}.bias"]
            x = weight @ x * 0.01 * np.sqrt(2 / len(x)) + 0.01 * bias
            x = np.where(x > 0, x, 0.2 * x)
        np.testing.assert_allclose(style, np.tile(x, (6, 1)), atol=1e-12)


def test_given_noise_replaces_the_fixed_maps(generator: StyleGAN1) -> None:
    """Passing the fixed maps changes nothing, others do."""
    styles = normal(2, 6, 6)
    named = dict(generator.named_buffers())
    fixed = [value[None, None] for name, value in named.items() if name.endswith("noise.const")]
    torch.testing.assert_close(generator.synthesize(styles, fixed), generator.synthesize(styles))
    silent = [torch.zeros_like(map) for map in fixed]
    assert (
        float((generator.synthesize(styles, silent) - generator.synthesize(styles)).abs().max().detach())
        > 0.01
    )
    with pytest.raises(ValueError, match="6 maps, got 5"):
        generator.synthesize(styles, fixed[1:])


def test_style_gradients_equal_a_loop(generator: StyleGAN1) -> None:
    """vmap(grad) against a loop."""
    styles = normal(3, 6, 6)

    def brightness(own: Tensor) -> Tensor:
        return generator.synthesize(own[None]).square().sum()

    together = vmap(grad(brightness))(styles)
    for i, own in enumerate(styles):
        own = own.clone().requires_grad_()
        (alone,) = torch.autograd.grad(brightness(own), own)
        torch.testing.assert_close(together[i], alone)


def test_truncation_moves_towards_the_mean_up_to_the_cutoff(generator: StyleGAN1) -> None:
    """Published faces use psi 0.7 and cutoff 8."""
    generator.mapping.w_avg.copy_(normal(6))
    styles = normal(2, 6, 6)
    found = generator.truncate(styles, 0.7, 4)
    torch.testing.assert_close(found[:, :4], 0.3 * generator.mapping.w_avg + 0.7 * styles[:, :4])
    assert torch.equal(found[:, 4:], styles[:, 4:])


def test_pulse_searches_it_like_any_generator() -> None:
    """The interface is sufficient."""
    generated: Generator = StyleGAN1(SMALL, Streams(5).generator("weights"))
    search = PulseUpsampler(generated, BicubicPulse(4), PulseConfig(steps=3, mapping_samples=50), Streams(3))
    found = search.upsample(torch.full((1, 3, 4, 4), 0.5), faces_per_photo=2)
    assert found.images.shape == (1, 2, 3, 16, 16) and generated.style_slope == 0.2
