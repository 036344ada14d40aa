"""Writes pictures for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedface.photos.image_io import png_bytes


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels, shape (h, w, 3) or (h, w), as a PNG without any metadata."""
    path.write_bytes(png_bytes(pixels))
