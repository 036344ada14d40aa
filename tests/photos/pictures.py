"""JPEG files of pixels, for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def jpeg_bytes(pixels: np.ndarray, *, quality: int) -> bytes:
    """A JPEG file of uint8 pixels, shape (h, w, 3)."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def jpeg_round_trip(pixels: np.ndarray, quality: int) -> np.ndarray:
    """uint8 pixels, shape (h, w, 3), after JPEG compression."""
    with Image.open(io.BytesIO(jpeg_bytes(pixels, quality=quality))) as image:
        return np.array(image.convert("RGB"))
