"""The crop that training sees of a photo: FFHQ's, of its largest face, cut out of the decoded pixels.

The scan cuts it from the pixels in which it looked for faces, so that a photo is decoded once. Only a face that is
small in a large photo needs more pixels than that, and a second decoding.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedface.errors import LibraryError
from fedface.photos.face_alignment import align, alignment_side
from fedface.photos.image_io import Photo, shrink
from fedface.photos.photo_index import PhotoRecord

MAX_STORED_SIDE = 256  # pixels a side of a stored crop: at most 197 kB a photo


@dataclass(frozen=True, kw_only=True)
class PhotoSelection:
    """Which photos of a library may be used: by folder, and by the size of the face."""

    folders: tuple[Path, ...] = ()  # only files in or below these, relative to the library; none: all
    exclude_folders: tuple[Path, ...] = ()  # no file in or below these; letter case is ignored
    min_face_side: float = 32.0  # pixels a side of the largest face's crop in the photo

    def __post_init__(self) -> None:
        for folder in (*self.folders, *self.exclude_folders):
            if folder.is_absolute() or ".." in folder.parts or folder.parts[:1] == ("~",):
                raise LibraryError(
                    f"{folder}: expected a folder inside the library, relative to it and without .."
                )

    def allows(self, path: Path) -> bool:
        """Whether the folders allow a file; by whole names, so that `anna` does not match `annabel`."""
        names = _names(path)
        return (
            not self.folders or any(_starts_with(names, _names(one)) for one in self.folders)
        ) and not any(_starts_with(_folded(names), _folded(_names(one))) for one in self.exclude_folders)


def _names(path: Path) -> tuple[str, ...]:
    """The names on the way to a file; accents are part of their letter, as some systems store them apart."""
    return tuple(unicodedata.normalize("NFC", name) for name in path.parts)


def _folded(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.casefold() for name in names)


def _starts_with(names: tuple[str, ...], folder: tuple[str, ...]) -> bool:
    return names[: len(folder)] == folder


def decode_side(record: PhotoRecord, size: int) -> int:
    """The longest side at which a photo must be decoded for a crop: two pixels for each of the crop's.

    Raises:
        LibraryError: The record has no face.
    """
    if not record.faces or record.width is None or record.height is None:
        raise LibraryError(f"{record.path} has no face in the latest scan; open the library again")
    scale = min(1.0, 2.0 * size / alignment_side(record.faces[0].landmarks))
    return max(64, math.ceil(max(record.width, record.height) * scale))


def training_crop(record: PhotoRecord, photo: Photo, size: int) -> np.ndarray:
    """Cut the largest face out of a photo, decoded at `decode_side` pixels or more.

    Returns:
        uint8, shape (size, size, 3).

    Raises:
        LibraryError: The record has no face.
    """
    pixels = shrink(photo.pixels, decode_side(record, size))
    scale = pixels.shape[1] / photo.width
    return align(pixels, record.faces[0].scaled(scale).landmarks, size)
