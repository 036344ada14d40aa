"""Images for the page: data URIs, and the standard deviation between faces."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.photos.image_io import SOFTWARE, png_bytes
from fedface.tensor_types import Images
from fedface.upsampling.upsampler import pixel_std

SHOWN = 256  # pixels a side of a face on the page, at most


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The per-pixel standard deviation of several faces for the same pixels."""

    picture: np.ndarray  # uint8, shape (h, w): the standard deviation, scaled so that the maximum is white
    most: float  # the largest standard deviation, in levels of 0 to 255
    mean: float  # the mean over the picture, in levels of 0 to 255


def images_of(pixels: np.ndarray) -> Images:
    """uint8 pixels (h, w, 3) as one picture (1, 3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255.0


def eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1], quantised to eight bits per channel."""
    return (images.clamp(0, 1) * 255.0).round() / 255.0


def shown(images: Tensor) -> Tensor:
    """Images (n, 3, s, s) enlarged to the size that the page shows; a copy."""
    factor = max(1, images.shape[-1] // SHOWN)
    small = F.avg_pool2d(images, factor) if factor > 1 else images
    return small.detach().clone()


def data_uri(pixels: np.ndarray) -> str:
    """uint8 pixels as a PNG data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels, software=SOFTWARE)).decode("ascii")


def spread_of(images: Images) -> Spread:
    """The standard deviation between faces (f, 3, s, s) as an image; black if the faces are equal."""
    apart = pixel_std(images)
    most = float(apart.max())
    bright = apart / most if most > 0 else apart
    return Spread(
        picture=(bright * 255.0).round().to(torch.uint8).numpy(),
        most=255.0 * most,
        mean=255.0 * float(apart.mean()),
    )
