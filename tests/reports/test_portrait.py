"""One photo, several faces that shrink to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedface.errors import LibraryError
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2
from fedface.photos.faces import Detector, Face
from fedface.photos.pixels import write_png
from fedface.reports.portrait import portrait_sheet, upsample_photo

GENERATOR = StyleGAN2(
    GeneratorConfig(size=16, channel_base=64, channel_max=8), torch.Generator().manual_seed(0)
)


class Blind:
    """A detector that finds nothing."""

    name = "blind"

    def find(self, pixels: np.ndarray) -> list[Face]:
        """Nobody."""
        return []


def blind() -> Detector:
    """Made only when it is needed."""
    return Blind()


def photo_of(folder: Path, height: int, width: int) -> Path:
    """A grey picture."""
    path = folder / f"{height}x{width}.png"
    write_png(path, np.full((height, width, 3), 128, dtype=np.uint8))
    return path


def test_a_picture_as_small_as_the_measurement_is_the_measurement(tmp_path: Path) -> None:
    """Four by four grey pixels, factor 4, 16 px: nothing is detected, cropped or shrunk."""
    found = upsample_photo(photo_of(tmp_path, 4, 4), GENERATOR, blind, factor=4, faces=2, seed=0)
    assert found.faces_in_photo == 0
    assert torch.allclose(found.low, torch.full((1, 3, 4, 4), 128 / 255))
    assert found.made.images.shape == (1, 2, 3, 16, 16)
    assert portrait_sheet(found).startswith(b"\x89PNG")


def test_a_photo_without_a_face_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """Larger than a face alone, and nobody in it."""
    with pytest.raises(LibraryError, match="no face found; give a photo"):
        upsample_photo(photo_of(tmp_path, 80, 120), GENERATOR, blind, factor=4, faces=1, seed=0)


def test_a_factor_that_does_not_divide_the_picture_is_refused(tmp_path: Path) -> None:
    """16 is no multiple of 3."""
    with pytest.raises(LibraryError, match="must divide the generator's 16 pixels"):
        upsample_photo(photo_of(tmp_path, 4, 4), GENERATOR, blind, factor=3, faces=1, seed=0)
