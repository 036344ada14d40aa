"""The JPEG round trip: against Pillow's files, its straight-through gradient, and what it refuses."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from fedface.upsampling.jpeg import CHROMINANCE, LUMINANCE, Jpeg, quantisers, waves

Chroma = Literal["4:4:4", "4:2:0"]


def soft_picture(height: int, width: int) -> np.ndarray:
    """Smooth colours, as photos have, with some noise in them; uint8."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (3 + height // 6, 3 + width // 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)


def stored_by_pillow(picture: np.ndarray, jpeg: Jpeg) -> np.ndarray:
    """Written to a file in memory and read back."""
    file = io.BytesIO()
    kept = {"4:4:4": 0, "4:2:0": 2}[jpeg.chroma]
    Image.fromarray(picture).save(file, "JPEG", quality=jpeg.quality, subsampling=kept)
    return np.asarray(Image.open(file).convert("RGB"))


def as_images(picture: np.ndarray) -> Tensor:
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [5, 30, 50, 75, 95, 100])
def test_pixels_are_those_of_a_file_that_pillow_wrote(quality: int, chroma: Chroma) -> None:
    """To the last grey level with libjpeg-turbo, whose fixed-point numbers are ours; nearly so with others."""
    jpeg = Jpeg(quality, chroma)
    for height, width in [(16, 16), (64, 48), (17, 23), (30, 20), (33, 40), (8, 8), (5, 3), (4, 4), (1, 1)]:
        for picture in (soft_picture(height, width), soft_picture(height, width) // 200 * 255):
            ours = (jpeg.apply(as_images(picture))[0] * 255).round().permute(1, 2, 0).numpy()
            apart = np.abs(ours - stored_by_pillow(picture, jpeg))
            assert np.quantile(apart, 0.98) <= 1, (height, width)
            assert not (features.check_feature("libjpeg_turbo") and apart.any()), (height, width)


def test_tables_are_scaled_as_files_carry_them() -> None:
    """Pillow reads the tables out of its own files, in zigzag order undone."""
    for quality in (1, 10, 49, 50, 90, 100):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        for index, base in enumerate((LUMINANCE, CHROMINANCE)):
            written = Image.open(file).quantization[index]  # type: ignore[attr-defined]
            assert quantisers(base, quality).flatten().tolist() == list(written)


def test_the_integer_transform_is_the_cosine_transform_to_thirteen_bits() -> None:
    frequency, place = np.arange(8)[:, None], np.arange(8)
    exact = 8192 * np.cos((2 * place + 1) * frequency * np.pi / 16) * np.where(frequency, np.sqrt(2), 1)
    assert np.abs(waves().numpy() - exact).max() < 1.5


def test_an_even_grey_picture_is_stored_exactly() -> None:
    """Coarse steps round the mean of a block only: grey 128 is the zero of the transform."""
    grey = torch.full((2, 3, 9, 14), 128 / 255)
    assert torch.equal(Jpeg(10).apply(grey), grey)


def test_no_pictures_are_stored_as_none() -> None:
    for chroma in ("4:4:4", "4:2:0"):
        assert Jpeg(50, chroma).apply(torch.zeros(0, 3, 9, 16)).shape == (0, 3, 9, 16)  # type: ignore[arg-type]


def test_values_are_eight_bits_and_clamped() -> None:
    read = Jpeg(90).apply(3 * torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)))
    assert 0 <= read.min() and read.max() <= 1
    torch.testing.assert_close(read * 255, (read * 255).round(), atol=1e-4, rtol=0)


def test_the_gradient_passes_straight_through_full_chroma() -> None:
    images = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    read = Jpeg(40, "4:4:4").apply(images)
    (gradient,) = torch.autograd.grad((read * weights).sum(), images)
    assert torch.equal(gradient, weights)
    assert torch.equal(read.detach(), Jpeg(40, "4:4:4").apply(images.detach()))


def slow_shared_chroma(picture: np.ndarray) -> np.ndarray:
    """4:2:0 without rounding and clamping, pixel by pixel, (h, w, 3) in float64."""
    forward = np.array([[0.299, 0.587, 0.114], [-0.16874, -0.33126, 0.5], [0.5, -0.41869, -0.08131]])
    planes = picture @ forward.T
    height, width = picture.shape[:2]
    rows, columns = -(-height // 2), -(-width // 2)
    half = np.zeros((rows, columns, 2))
    for i in range(rows):
        for j in range(columns):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                half[i, j] += planes[min(2 * i + y, height - 1), min(2 * j + x, width - 1), 1:] / 4
    for y in range(height):
        for x in range(width):
            total = np.zeros(2)
            for i, across in ((y // 2, 0.75), (y // 2 + (1 if y % 2 else -1), 0.25)):
                for j, along in ((x // 2, 0.75), (x // 2 + (1 if x % 2 else -1), 0.25)):
                    total += across * along * half[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
            planes[y, x, 1:] = total
    return planes @ np.linalg.inv(forward).T


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
def test_the_gradient_of_shared_chroma_equals_finite_differences_without_rounding(
    height: int, width: int
) -> None:
    """The documented straight-through form, against a loop over pixels."""
    rng = np.random.default_rng(3)
    picture, weights = rng.uniform(size=(height, width, 3)), rng.normal(size=(height, width, 3))
    images = torch.tensor(picture).permute(2, 0, 1)[None].requires_grad_()
    read = Jpeg(60, "4:2:0").apply(images)
    (gradient,) = torch.autograd.grad((read[0].permute(1, 2, 0) * torch.tensor(weights)).sum(), images)
    for y, x, colour in [(0, 0, 0), (3, 4, 1), (height - 1, width - 1, 2), (height - 1, 0, 0)]:
        moved = picture.copy()
        moved[y, x, colour] += 1e-3
        slope = ((slow_shared_chroma(moved) - slow_shared_chroma(picture)) * weights).sum() / 1e-3
        assert gradient[0, colour, y, x].item() == pytest.approx(slope, abs=1e-3)


def test_wrong_settings_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"quality must lie in 1\.\.100, got 0"):
        Jpeg(0)
    with pytest.raises(ValueError, match="chroma must be 4:4:4 or 4:2:0, got 4:1:1"):
        Jpeg(50, "4:1:1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(n, 3, h, w\), got \(1, 1, 8, 8\)"):
        Jpeg(50).apply(torch.zeros(1, 1, 8, 8))
