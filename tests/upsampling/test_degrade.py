"""The known downscales: against the published filter, mathematics and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedface.upsampling.degrade import Area, BicubicPulse, Degradation, bicubic_kernel


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
    twin = F.interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    ours = BicubicPulse(factor).apply(images)
    torch.testing.assert_close(ours[:, :, 2:-2, 2:-2], twin[:, :, 2:-2, 2:-2], atol=2e-6, rtol=0)


@pytest.mark.parametrize("degradation", [BicubicPulse(4), BicubicPulse(16), Area(4), Area(16), Area(1)])
def test_a_picture_of_one_colour_keeps_it(degradation: Degradation) -> None:
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    low = degradation.apply(colour.expand(2, 3, 16, 16))
    side = 16 // degradation.factor
    torch.testing.assert_close(low, colour.expand(2, 3, side, side), atol=1e-5, rtol=0)


def test_an_odd_factor_shifts_by_half_a_pixel_as_published() -> None:
    """On a ramp of one per pixel the blocks of three around 7 and 10 read as 7.5 and 10.5."""
    ramp = torch.arange(18.0).expand(1, 3, 18, 18)
    assert BicubicPulse(3).apply(ramp)[0, 0, 2, 2:4].tolist() == pytest.approx([7.5, 10.5], abs=1e-4)


def test_area_is_the_mean_of_each_block() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert Area(2).apply(images)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


@pytest.mark.parametrize("degradation", [BicubicPulse(4), Area(4)])
def test_a_size_that_the_factor_does_not_divide_is_named(degradation: Degradation) -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(10, 8\)"):
        degradation.apply(torch.zeros(1, 3, 10, 8))


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be >= 1, got 0"):
        BicubicPulse(0)
