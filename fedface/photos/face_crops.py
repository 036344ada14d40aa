"""The faces of one photo, cropped and upright, or the reason for having none: for `upsample` and the local page.

Unlike a scan, this takes the time to look for faces in all four quarter turns of the photo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedface.errors import LibraryError
from fedface.photos.face_alignment import Detector, Face, align, alignment_side, usable
from fedface.photos.image_io import Photo, cut_square

LONGEST_SIDE = 1600  # pixels in which faces are looked for
MIN_FACE_SIDE = 64  # a square picture of at most this side is taken as an aligned low-resolution face
TURNS = (0, 90, 270, 180)  # degrees counterclockwise, the usual ones first
_SURE = 1.0  # a face that scores less may be a face lying on its side: the photo is looked at in every turn


@dataclass(frozen=True, kw_only=True)
class FaceCrop:
    crop: np.ndarray  # (s, s, 3) uint8: FFHQ's crop at the requested size, or a small picture's own pixels
    number: int  # from 1, the largest face first
    people: int  # faces found in the photo; 0 where the picture was taken as a face already
    rotation: int  # degrees counterclockwise by which the photo had to be turned
    side: float  # of the crop in pixels of the photo: how much there is to see

    @property
    def already_small(self) -> bool:
        """Whether the picture itself was taken as a low-resolution face."""
        return self.people == 0


def face_crops(
    photo: Photo, detector: Callable[[], Detector], size: int, *, smallest: int, name: str
) -> tuple[FaceCrop, ...]:
    """Every face of a photo, the largest first.

    Args:
        photo: Decoded at LONGEST_SIDE.
        detector: Makes the detector; not called for a picture that is small enough to be a face already.
        size: Side in pixels of the crops.
        smallest: A square picture of this side, up to 64 pixels, is taken as a face as it is.
        name: Names the photo in errors.

    Raises:
        LibraryError: No face was found in any quarter turn, the detector failed, or the photo is too small.
    """
    height, width = photo.pixels.shape[:2]
    if height == width and min(smallest, MIN_FACE_SIDE) <= height <= MIN_FACE_SIDE:
        return (FaceCrop(crop=photo.pixels, number=1, people=0, rotation=0, side=float(height)),)
    if min(height, width) < min(smallest, MIN_FACE_SIDE):
        raise LibraryError(
            f"{name}: only {width} x {height} pixels, fewer than the {smallest} x {smallest} that are shown; "
            "give a larger picture, or choose fewer pixels"
        )
    finder = detector()
    seen: dict[int, list[Face]] = {}
    try:
        for turn in TURNS:
            seen[turn] = usable(finder.find(_turned(photo, turn)))
            if _surest(seen[turn]) >= _SURE:
                break
    except Exception as error:
        # One broad net: a picture on which a detector fails must not end the work on all others.
        raise LibraryError(f"{name}: the face detector failed on it ({type(error).__name__})") from error
    best = max(seen, key=lambda turn: _surest(seen[turn]))  # of equal ones the first
    if not seen[best]:
        raise LibraryError(
            f"{name}: no face found, nor in the photo turned round; give a photo with a face at least 32 pixels "
            f"wide, a square picture of {min(smallest, MIN_FACE_SIDE)} to {MIN_FACE_SIDE} pixels that is a face "
            "already, or use --no-detect"
        )
    return tuple(
        FaceCrop(
            crop=align(_turned(photo, best), face.landmarks, size),
            number=number,
            people=len(seen[best]),
            rotation=best,
            side=alignment_side(face.landmarks),
        )
        for number, face in enumerate(seen[best], start=1)
    )


def whole_image(photo: Photo, size: int, *, name: str) -> FaceCrop:
    """The middle square of a photo, taken as an aligned face as it is: for faces that are pixelated already.

    Raises:
        LibraryError: The square has fewer pixels than a face of `size` needs: 2.
    """
    height, width = photo.pixels.shape[:2]
    side = min(height, width)
    if side < 2:
        raise LibraryError(f"{name}: only {width} x {height} pixels; give a larger picture")
    top, left = (height - side) // 2, (width - side) // 2
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) * side + np.array([left, top]) - 0.5
    crop = (
        photo.pixels if side <= MIN_FACE_SIDE and height == width else cut_square(photo.pixels, corners, size)
    )
    return FaceCrop(crop=crop, number=1, people=0, rotation=0, side=float(side))


def _turned(photo: Photo, degrees: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(photo.pixels, degrees // 90))


def _surest(faces: list[Face]) -> float:
    return max((face.score for face in faces), default=-math.inf)
