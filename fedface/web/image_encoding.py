"""Images for the page: data URIs, and the standard deviation between faces."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.photos.image_io import SOFTWARE, png_bytes
from fedface.tensor_types import Images
from fedface.upsampling.upsampler import pixel_std

SHOWN = 256  # pixels a side of a face on the page, at most


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


def spread_record(images: Images) -> dict[str, Any]:
    """For JSON: the standard deviation between faces (f, 3, s, s) as a picture, its maximum and its mean.

    The picture is scaled so that the maximum is white; it is black if the faces are equal. The numbers are in levels
    of 0 to 255.
    """
    apart = pixel_std(images)
    most = float(apart.max())
    picture = (apart / (most or 1.0) * 255.0).round().to(torch.uint8).numpy()
    return {
        "picture": data_uri(picture),
        "most": round(255.0 * most),
        "mean": round(255.0 * float(apart.mean()), 1),
    }
