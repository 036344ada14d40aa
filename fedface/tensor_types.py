"""Tensor type aliases, and the letters of their shapes.

n   faces or photos in a batch          c   colour channels, always 3 (sRGB)
h,w height and width in pixels          z   width of a latent
k   number of style inputs of a generator ("num_ws")
v   width of a style                    d   number of weights in a flattened vector

Images are float32, sRGB, nominally in [0, 1]; a generator may stray outside, so clamp where you display.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Images = Float[Tensor, "n 3 h w"]
StoredImages = Images | UInt8[Tensor, "n 3 h w"]  # bytes, 0 to 255, take a quarter of the memory
LowImages = Float[Tensor, "n 3 lh lw"]
Latents = Float[Tensor, "n z"]
Styles = Float[Tensor, "n k v"]
Vector = Float[Tensor, "d"]


def in_floats(images: StoredImages) -> Images:
    """Stored images as input of networks, float32 in [0, 1]; floats are returned unchanged."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images
