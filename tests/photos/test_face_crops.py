"""Faces of a photo: every unusual photo gives a face or one sentence that explains why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from png_files import write_png

from fedface.errors import LibraryError
from fedface.photos.detectors import EmbeddedDetector
from fedface.photos.face_alignment import Detector, Face
from fedface.photos.face_crops import LONGEST_SIDE, FaceCrop, face_crops, whole_image
from fedface.photos.image_io import read_photo


class Blind:
    """A detector that finds nothing."""

    name = "blind"

    def find(self, pixels: np.ndarray) -> list[Face]:
        return []


@cache
def embedded() -> Detector:
    """The bundled detector."""
    return EmbeddedDetector()


def grey(folder: Path, height: int, width: int) -> Path:
    """A uniform grey image."""
    path = folder / f"{height}x{width}.png"
    write_png(path, np.full((height, width, 3), 128, dtype=np.uint8))
    return path


def crops(path: Path, detector: Callable[[], Detector], size: int) -> tuple[FaceCrop, ...]:
    """The faces of a file."""
    photo = read_photo(path, longest_side=LONGEST_SIDE)
    return face_crops(photo, detector, size, smallest=8, name=str(path))


@pytest.mark.parametrize("side", [8, 16, 64])
def test_a_small_square_picture_is_used_as_a_face(tmp_path: Path, side: int) -> None:
    """Nothing is detected or cropped: its own pixels are returned."""
    (only,) = crops(grey(tmp_path, side, side), Blind, 32)
    assert only.already_small and only.people == 0 and only.crop.shape == (side, side, 3)
    assert (only.crop == 128).all()


def test_a_photo_with_too_few_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="only 5 x 5 pixels, fewer than the 8 x 8 that are shown"):
        crops(grey(tmp_path, 5, 5), Blind, 32)


def test_a_photo_without_a_face_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="no face found, nor in the photo turned round; give a photo"):
        crops(grey(tmp_path, 80, 120), Blind, 32)


def test_two_people_are_two_faces(shared: Path) -> None:
    both = crops(shared / "data/library/people/two_people.jpg", embedded, 64)
    assert [face.number for face in both] == [1, 2] and {face.people for face in both} == {2}
    assert all(face.crop.shape == (64, 64, 3) and 150 < face.side < 450 for face in both)


def test_a_rotated_photo_is_turned_upright(shared: Path, tmp_path: Path) -> None:
    """The same crop as of the upright photo, up to resampling, and the rotation is reported."""
    pixels = read_photo(shared / "data/library/people/obama.jpg", longest_side=300).pixels
    found = []
    for quarter in range(4):
        path = tmp_path / f"{quarter}.png"
        write_png(path, np.ascontiguousarray(np.rot90(pixels, -quarter)))
        found += crops(path, embedded, 64)
    assert [face.rotation for face in found] == [0, 90, 180, 270]
    for face in found[1:]:
        assert np.abs(face.crop.astype(float) - found[0].crop.astype(float)).mean() < 12


def test_a_grey_photo_has_a_face_too(shared: Path, tmp_path: Path) -> None:
    pixels = read_photo(shared / "data/library/people/obama.jpg", longest_side=600).pixels
    path = tmp_path / "grey.png"
    write_png(path, np.repeat(pixels.mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2))
    (found,) = crops(path, embedded, 64)
    assert found.people == 1 and (found.crop[..., 0] == found.crop[..., 1]).all()


def test_a_pixelated_picture_can_be_used_without_detection(tmp_path: Path) -> None:
    """The centre square of 40 x 60 pixels, its four quarters in their places and colours."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, 10:30], pixels[20:, 30:50] = 200, 100
    path = tmp_path / "blocks.png"
    write_png(path, pixels)
    taken = whole_image(read_photo(path), 8, name="blocks")
    assert taken.crop.shape == (8, 8, 3) and taken.side == 40.0 and taken.already_small
    quarters = taken.crop[[1, 1, 6, 6], [1, 6, 1, 6], 0].astype(int)
    assert np.abs(quarters - [200, 0, 0, 100]).max() <= 12
