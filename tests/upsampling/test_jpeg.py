"""The JPEG round trip: the pixels of a file, the straight-through gradient, and wrong settings."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedface.upsampling.jpeg import Jpeg

Chroma = Literal["4:4:4", "4:2:0"]


def soft_picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, as photos have; uint8."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (3 + height // 6, 3 + width // 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)


def stored_by_pillow(picture: np.ndarray, jpeg: Jpeg) -> np.ndarray:
    """Written to a file in memory and read back."""
    file = io.BytesIO()
    stored = {"4:4:4": 0, "4:2:0": 2}[jpeg.chroma]
    Image.fromarray(picture).save(file, "JPEG", quality=jpeg.quality, subsampling=stored)
    return np.asarray(Image.open(file).convert("RGB"))


def as_images(picture: np.ndarray) -> Tensor:
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [5, 30, 50, 75, 95, 100])
def test_pixels_are_those_of_a_file_that_pillow_wrote(quality: int, chroma: Chroma) -> None:
    jpeg = Jpeg(quality, chroma)
    for height, width in [(16, 16), (64, 48), (17, 23), (30, 20), (33, 40), (8, 8), (5, 3), (4, 4), (1, 1)]:
        for picture in (soft_picture(height, width), soft_picture(height, width) // 200 * 255):
            ours = (jpeg.apply(as_images(picture))[0] * 255).round().permute(1, 2, 0).numpy()
            assert np.array_equal(ours, stored_by_pillow(picture, jpeg)), (height, width)


def test_a_uniform_grey_image_is_stored_exactly() -> None:
    """Quantisation rounds only the mean of a block: grey 128 is the zero of the transform."""
    grey = torch.full((2, 3, 9, 14), 128 / 255)
    assert torch.equal(Jpeg(10).apply(grey), grey)


def test_an_empty_batch_is_unchanged() -> None:
    for chroma in ("4:4:4", "4:2:0"):
        assert Jpeg(50, chroma).apply(torch.zeros(0, 3, 9, 16)).shape == (0, 3, 9, 16)  # type: ignore[arg-type]


def test_values_are_eight_bits_and_clamped() -> None:
    read = Jpeg(90).apply(3 * torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)))
    assert 0 <= read.min() and read.max() <= 1
    torch.testing.assert_close(read * 255, (read * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:0"])
def test_the_gradient_is_that_of_the_identity(chroma: Chroma) -> None:
    images = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    read = Jpeg(40, chroma).apply(images)
    (gradient,) = torch.autograd.grad((read * weights).sum(), images)
    assert torch.equal(gradient, weights)
    assert torch.equal(read.detach(), Jpeg(40, chroma).apply(images.detach()))


def test_each_example_has_its_own_gradient_under_vmap() -> None:
    """As per-example gradients are computed in the fallback."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def loss(image: Tensor) -> Tensor:
        return Jpeg(60).apply(image[None]).square().sum()

    slow = torch.stack([torch.func.grad(loss)(image) for image in images])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(images), slow)
    torch.testing.assert_close(slow, 2 * Jpeg(60).apply(images))


def test_nan_stays_nan() -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    images[0, 1, 2, 3] = torch.nan
    assert Jpeg(40).apply(images).isnan().nonzero().tolist() == [[0, 1, 2, 3]]


def test_wrong_settings_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"quality must lie in \[1, 100\], got 0"):
        Jpeg(0)
    with pytest.raises(ValueError, match="chroma must be one of 4:4:4, 4:2:0, got '4:1:1'"):
        Jpeg(50, "4:1:1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(n, 3, h, w\), got \(1, 1, 8, 8\)"):
        Jpeg(50).apply(torch.zeros(1, 1, 8, 8))
