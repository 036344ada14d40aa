"""Faces, face detectors, and the aligned crop that every network here is trained on: FFHQ's.

Source: the alignment of FFHQ (Karras, Laine, Aila 2019, arXiv:1812.04948), which PULSE uses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedface.photos.image_io import cut_square

MAX_SIDES = 8  # a face's crop is at most so many times as large as the shorter side of its picture


@dataclass(frozen=True)
class Face:
    """One detected face; x and y in pixels of the photo, where (0, 0) is the centre of the first pixel."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    landmarks: np.ndarray  # shape (5, 2): eye at image left, eye at right, nose, mouth left, mouth right
    score: float  # the detector's own scale; larger is surer

    def __post_init__(self) -> None:
        if self.landmarks.shape != (5, 2) or not np.isfinite(self.landmarks).all():
            raise ValueError(f"landmarks must be finite, shape (5, 2), got shape {self.landmarks.shape}")

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        left, top, right, bottom = self.box
        return max(right - left, 0.0) * max(bottom - top, 0.0)

    def scaled(self, factor: float) -> Face:
        """The same face in the same photo enlarged by `factor` (> 0); pixel centres stay pixel centres."""
        left, top, right, bottom = ((edge + 0.5) * factor - 0.5 for edge in self.box)
        return Face((left, top, right, bottom), (self.landmarks + 0.5) * factor - 0.5, self.score)


class Detector(Protocol):
    """Finds faces; `name` says which detector with which settings, and keys the cache of a scan."""

    @property
    def name(self) -> str: ...

    def find(self, pixels: np.ndarray) -> list[Face]:
        """All faces in upright sRGB pixels, uint8, shape (h, w, 3), largest first; none is an empty list."""


def usable(faces: Sequence[Face]) -> list[Face]:
    """The faces that can be aligned (eyes and mouth a pixel or more apart), by the area of their box."""
    apart = [face for face in faces if _arm(face.landmarks) >= 1.0]
    return sorted(apart, key=lambda face: (-face.area, -face.score))


def _arm(landmarks: np.ndarray) -> float:
    """Half the side of FFHQ's crop in pixels: max(2|e|, 1.8|m|)."""
    e = landmarks[1] - landmarks[0]
    m = landmarks[3:5].mean(axis=0) - landmarks[0:2].mean(axis=0)
    return max(2.0 * float(np.hypot(*e)), 1.8 * float(np.hypot(*m)))


def alignment_side(landmarks: np.ndarray) -> float:
    """The side of FFHQ's crop in pixels of the photo."""
    return 2.0 * _arm(landmarks)


def alignment_square(landmarks: np.ndarray) -> np.ndarray:
    """The corners of FFHQ's crop for five landmarks.

    With e from the left to the right eye and m from the middle of the eyes to the middle of the mouth: the
    square's half side is x = e - rot90(m), scaled to length max(2|e|, 1.8|m|); its centre is eyes + 0.1 m.

    Args:
        landmarks: Shape (5, 2), in the order of `Face`; the nose is not used.

    Returns:
        Upper left, lower left, lower right, upper right; float64, shape (4, 2).

    Raises:
        ValueError: Eyes and mouth coincide, so that no direction is up.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    eyes, mouth = points[0:2].mean(axis=0), points[3:5].mean(axis=0)
    e, m = points[1] - points[0], mouth - eyes
    x = e - _turned(m)
    length = float(np.hypot(*x))
    if not length > 1e-6:
        raise ValueError("eyes and mouth coincide: no crop can be aligned to them")
    x *= _arm(points) / length
    y = _turned(x)
    centre = eyes + 0.1 * m
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def landmarks_in_crop(landmarks: np.ndarray, size: int) -> np.ndarray:
    """Where the five landmarks land in the crop that `align` makes; shape (5, 2), x and y in its pixels."""
    corners = alignment_square(landmarks)
    right, down = corners[3] - corners[0], corners[1] - corners[0]
    offset = landmarks - corners[0]
    shares = np.stack([offset @ right / (right @ right), offset @ down / (down @ down)], axis=1)
    return shares * size - 0.5


def _turned(vector: np.ndarray) -> np.ndarray:
    """A quarter turn clockwise as the viewer sees it (y points down)."""
    return np.array([-vector[1], vector[0]])


def check_in_picture(landmarks: np.ndarray, height: int, width: int) -> None:
    """Raise ValueError unless a face of these landmarks can lie in a picture of this size, in part at least.

    The crop of any other face would show the picture's mirrored border alone, or need memory without bound.
    """
    corners, side = alignment_square(landmarks), alignment_side(landmarks)
    x, y = corners.mean(axis=0)
    if not (
        side <= MAX_SIDES * min(height, width) and -side <= x <= width + side and -side <= y <= height + side
    ):
        raise ValueError(
            f"the landmarks make a face of {side:.0f} pixels at ({x:.0f}, {y:.0f}) of a picture of {width} x {height}"
        )


def align(pixels: np.ndarray, landmarks: np.ndarray, size: int) -> np.ndarray:
    """Cut a face out as FFHQ does: eyes level, mouth below, softly mirrored where the photo ends.

    Args:
        pixels: uint8, shape (h, w, 3).
        landmarks: Shape (5, 2), in the order of `Face`.
        size: Side of the crop in pixels, >= 1.

    Returns:
        uint8, shape (size, size, 3). A face smaller than the crop is enlarged smoothly.

    Raises:
        ValueError: The landmarks are not those of a face in this picture.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    check_in_picture(landmarks, *pixels.shape[:2])
    return cut_square(pixels, alignment_square(landmarks), size)
