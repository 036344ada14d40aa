"""Degradations: compared with the published filter, closed forms, torch and scipy, and each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from fedface.config import dump, parse
from fedface.errors import ConfigError
from fedface.upsampling.degradation import (
    Area,
    Bicubic,
    BicubicPulse,
    Blur,
    Chain,
    Degradation,
    Noise,
    Pixelate,
    apply_degradation,
    format_degradation,
)
from fedface.upsampling.jpeg import Jpeg
from fedface.upsampling.resampling_matrices import bicubic_kernel

LINEAR: list[Degradation] = [
    BicubicPulse(4),
    BicubicPulse(3),
    Bicubic(4),
    Bicubic(3),
    Area(4),
    Pixelate(6),
    Blur(1.3),
    Blur(9.0),
    Noise(0.1),
    Chain((Blur(0.8), Bicubic(2), Noise(0.02), Pixelate(3), Area(2))),
    Chain((Noise(0.1),)),
]
STORED = Chain((Blur(0.7), Bicubic(4), Noise(0.02), Jpeg(80)))


def sampled(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [4, 8])
def test_pulse_bicubic_equals_the_published_filter_and_its_gradient(shared: Path, factor: int) -> None:
    reference = np.load(shared / "refs" / f"pulse_bicubic_x{factor}.npz")
    images = torch.tensor(reference["in/x"]).requires_grad_()
    low = BicubicPulse(factor).apply(images)
    (gradient,) = torch.autograd.grad(low.square().sum(), images)
    np.testing.assert_allclose(bicubic_kernel(factor).numpy(), reference["out/kernel1d"], atol=1e-7)
    np.testing.assert_allclose(low.detach().numpy(), reference["out/y"], atol=1e-6)
    np.testing.assert_allclose(gradient.numpy(), reference["out/grad_x_of_sum_sq"], atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4, 6])
def test_pulse_bicubic_equals_antialiased_bicubic_inside_the_picture(factor: int) -> None:
    images = torch.rand(1, 3, 12 * factor, 8 * factor, generator=torch.Generator().manual_seed(1))
    slow = F.interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    ours = BicubicPulse(factor).apply(images)
    torch.testing.assert_close(ours[:, :, 2:-2, 2:-2], slow[:, :, 2:-2, 2:-2], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "degradation",
    [
        BicubicPulse(4),
        BicubicPulse(16),
        Bicubic(4),
        Area(4),
        Area(16),
        Area(1),
        Pixelate(8),
        Blur(3.0),
        STORED,
    ],
    ids=format_degradation,
)
def test_a_uniform_image_is_unchanged(degradation: Degradation) -> None:
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    low = degradation.apply(colour.expand(2, 3, 16, 16))
    side = 16 // degradation.factor
    # A stored file rounds to 8 bits.
    near = 1e-5 if degradation.linear else 2 / 255
    torch.testing.assert_close(low, colour.expand(2, 3, side, side), atol=near, rtol=0)


def test_an_odd_factor_shifts_by_half_a_pixel_as_published() -> None:
    """On a ramp of one per pixel the blocks of three around 7 and 10 read as 7.5 and 10.5."""
    ramp = torch.arange(18.0).expand(1, 3, 18, 18)
    assert BicubicPulse(3).apply(ramp)[0, 0, 2, 2:4].tolist() == pytest.approx([7.5, 10.5], abs=1e-4)


def test_area_is_the_mean_of_each_block() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert Area(2).apply(images)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


@pytest.mark.parametrize("degradation", [BicubicPulse(4), Bicubic(4), Area(4), Pixelate(4)])
def test_a_size_that_the_factor_does_not_divide_is_named(degradation: Degradation) -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(10, 8\)"):
        degradation.apply(torch.zeros(1, 3, 10, 8))


@pytest.mark.parametrize("degradation", LINEAR, ids=format_degradation)
def test_a_linear_degradation_is_linear(degradation: Degradation) -> None:
    """In float64."""
    assert degradation.linear
    x, other = sampled(2, 3, 24, 24).double(), sampled(2, 3, 24, 24, seed=2).double()
    low = degradation.low_side(24)
    measured = degradation.apply(x)
    assert measured.shape == (2, 3, low, low) and degradation.factor == 24 // low
    torch.testing.assert_close(degradation.apply(2 * x - other), 2 * measured - degradation.apply(other))


@pytest.mark.parametrize("degradation", LINEAR, ids=format_degradation)
def test_gradients_equal_finite_differences(degradation: Degradation) -> None:
    images = sampled(1, 3, 12, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: degradation.apply(x).square(), images, fast_mode=True)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_bicubic_equals_the_antialiased_bicubic_of_torch_at_the_borders_too(factor: int) -> None:
    images = sampled(2, 3, 5 * factor, 3 * factor)
    slow = F.interpolate(images, size=(5, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(Bicubic(factor).apply(images), slow, atol=1e-6, rtol=0)


def test_bicubic_equals_that_of_pillow() -> None:
    """Pillow resizes one float plane at a time."""
    plane = sampled(32, 48)
    slow = np.asarray(Image.fromarray(plane.numpy()).resize((12, 8), Image.Resampling.BICUBIC))
    ours = Bicubic(4).apply(plane.expand(1, 3, -1, -1))[0, 1]
    np.testing.assert_allclose(ours.numpy(), slow, atol=1e-6)


def test_pixelate_equals_a_loop_over_blocks() -> None:
    images = sampled(2, 3, 8, 12)
    slow = images.numpy().copy()
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            block = slow[:, :, top : top + 4, left : left + 4]
            block[:] = block.mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(Pixelate(4).apply(images).numpy(), slow, atol=1e-6)


def test_the_impulse_response_of_blur_is_the_gaussian() -> None:
    """sigma 1.5 in the centre of 33 pixels: exp(-(x^2 + y^2) / 2 sigma^2), normalised, far from the borders."""
    images = torch.zeros(1, 3, 33, 33)
    images[:, :, 16, 16] = 1
    squares = torch.arange(-16, 17).square()
    gaussian = torch.exp(-(squares[:, None] + squares) / (2 * 1.5**2))
    torch.testing.assert_close(Blur(1.5).apply(images)[0, 0], gaussian / gaussian.sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sigma", "side"), [(0.6, 9), (2.0, 16), (5.0, 7)])
def test_blur_equals_that_of_scipy_with_mirrored_borders(sigma: float, side: int) -> None:
    """Also if the Gaussian is wider than the image and is reflected more than once."""
    images = sampled(1, 3, side, side).double()
    slow = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=4.0)
    np.testing.assert_allclose(Blur(sigma).apply(images).numpy(), slow, atol=1e-12)


def test_measured_noise_has_its_standard_deviation_and_its_mean_is_what_apply_gives() -> None:
    """40,000 values: the standard error of the mean is 1/200 of the deviation."""
    images = torch.full((1, 3, 120, 120), 0.5)
    degradation = Noise(0.05)
    assert torch.equal(degradation.apply(images), images) and degradation.noise_std == 0.05
    left = apply_degradation(degradation, images, torch.Generator().manual_seed(1)) - images
    assert left.std().item() == pytest.approx(0.05, rel=0.02)
    assert left.mean().item() == pytest.approx(0, abs=0.05 / 60)
    again = apply_degradation(degradation, images, torch.Generator().manual_seed(1)) - images
    assert torch.equal(left, again)


@pytest.mark.parametrize(
    ("chain", "noise_std"),
    [
        (Chain((Area(2), Noise(0.1))), 0.1),
        (Chain((Noise(0.1), Area(2))), 0.05),
        (Chain((Noise(0.03), Jpeg(90), Noise(0.04))), 0.05),
        (Chain((Noise(0.1), Pixelate(2), Area(2))), 0.05),
        (Chain((Bicubic(4), Blur(1.0))), 0.0),
    ],
)
def test_the_noise_std_of_a_chain_is_filtered_by_later_parts(chain: Chain, noise_std: float) -> None:
    """A mean of four values has half their deviation; independent noises add their squares."""
    assert chain.noise_std == pytest.approx(noise_std)


def test_the_noise_std_of_a_chain_is_the_measured_deviation() -> None:
    chain = Chain((Noise(0.2), Blur(0.8), Bicubic(2)))
    images = torch.full((8, 3, 64, 64), 0.5)
    measured = apply_degradation(chain, images, torch.Generator().manual_seed(1))[..., 4:-4, 4:-4]
    assert measured.std().item() == pytest.approx(chain.noise_std, rel=0.03)


def test_a_chain_applies_its_parts_in_order() -> None:
    """Consecutive filters are one matrix, up to rounding."""
    parts = (Blur(0.8), Bicubic(2), Pixelate(3), Noise(0.1), BicubicPulse(2), Area(2))
    images = sampled(2, 3, 24, 48)
    slow = images
    for part in parts:
        slow = part.apply(slow)
    torch.testing.assert_close(Chain(parts).apply(images), slow, atol=1e-6, rtol=0)
    assert Chain(parts).factor == 8 and Chain(parts).low_side(48) == 6


def test_what_is_measured_is_clamped_and_what_is_applied_is_not() -> None:
    """A cubic overshoots at a hard edge."""
    edge = torch.cat((torch.zeros(1, 3, 16, 8), torch.ones(1, 3, 16, 8)), dim=3)
    sharp = Bicubic(2)
    assert sharp.apply(edge).min() < -0.01 and sharp.apply(edge).max() > 1.01
    measured = apply_degradation(sharp, edge, torch.Generator())
    assert measured.min() == 0 and measured.max() == 1


def test_jpeg_is_not_linear_and_passes_its_gradient_on() -> None:
    assert not STORED.linear
    images = sampled(1, 3, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(STORED.apply(images).sum(), images)
    # All parts keep the mean, and brightness passes through JPEG unchanged.
    assert gradient.sum().item() == pytest.approx(3 * 4 * 4, rel=1e-3)


def test_degradations_have_descriptions() -> None:
    assert format_degradation(BicubicPulse(4)) == "bicubic (PULSE), 4 times smaller"
    assert format_degradation(Chain((Blur(1.5), Area(8), Noise(0.02)))) == (
        "Gaussian blur of 1.5 pixels, then means of blocks, 8 times smaller, then noise of 0.02"
    )


@pytest.mark.parametrize("degradation", [*LINEAR, Jpeg(75, "4:2:0"), STORED], ids=format_degradation)
def test_every_degradation_survives_a_yaml_round_trip(degradation: Degradation) -> None:
    assert parse(dump(degradation), Degradation, name="d.yaml") == degradation  # type: ignore[arg-type,comparison-overlap]


def test_a_chain_is_read_from_yaml_by_kinds() -> None:
    text = """
kind: chain
parts:
- {kind: blur, sigma: 1}
- {kind: bicubic, factor: 4}
- {kind: noise, std: 2e-2}
- {kind: jpeg, quality: 90, chroma: 4:4:4}
"""
    expected = Chain((Blur(1.0), Bicubic(4), Noise(0.02), Jpeg(90, "4:4:4")))
    assert parse(text, Degradation, name="d.yaml") == expected  # type: ignore[arg-type,comparison-overlap]
    with pytest.raises(ConfigError, match=r"d\.yaml:4: parts\.0\.sigma: must lie in \(0, 1024\], got 0"):
        parse(text.replace("sigma: 1", "sigma: 0"), Degradation, name="d.yaml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected one of bicubic-pulse, .* got .blurr.; did you mean"):
        parse(text.replace("kind: blur", "kind: blurr"), Degradation, name="d.yaml")  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_named() -> None:
    for degradation, text in (
        (Bicubic(4), "factor must divide the size 18, got 4"),
        (Pixelate(4), "block must divide the size 18, got 4"),
        (Chain((Bicubic(2), Area(2))), "factor must divide the size 9, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            degradation.low_side(18)
    with pytest.raises(ValueError, match="factor must divide the size 9, got 2"):
        Chain((Bicubic(2), Area(2))).apply(torch.zeros(1, 3, 18, 18))


def test_wrong_settings_are_refused() -> None:
    for wrong, text in (
        (lambda: BicubicPulse(0), "factor must be at least 1, got 0"),
        (lambda: Bicubic(-1), "factor must be at least 1, got -1"),
        (lambda: Pixelate(0), "block must be at least 1, got 0"),
        (lambda: Blur(0.0), r"sigma must lie in \(0, 1024\], got 0.0"),
        (lambda: Blur(2000.0), r"sigma must lie in \(0, 1024\], got 2000.0"),
        (lambda: Chain((Area(1),) * 17), "at most 16 degradations, got 17"),
        (lambda: Noise(float("nan")), "std must be at least 0, got nan"),
        (lambda: Chain(()), "at least one degradation"),
        (lambda: Chain((Chain((Area(2),)),)), "other than chains"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=text):
            wrong()
