"""One photo -> one picture that shows how little a pixelated face says: several faces, all equally right.

Called by `fedface upsample`. Finds and aligns the largest face, shrinks it, searches faces that shrink to the
same pixels, and lays them side by side with their misfit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedface.errors import LibraryError, PhotoError
from fedface.models.contracts import Generator
from fedface.photos.faces import Detector, align, usable
from fedface.photos.pixels import read_photo
from fedface.photos.tone import measure_tone
from fedface.randomness import Streams
from fedface.reports.figures import face_grid
from fedface.shapes import Images
from fedface.upsampling.contracts import Upsampled
from fedface.upsampling.degrade import BicubicPulse
from fedface.upsampling.pulse import Pulse, PulseConfig

LONGEST_SIDE = 1600  # pixels in which faces are looked for
SMALL = 64  # a picture of at most this side is taken as an aligned, already shrunken face


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """What was found in a photo and what the search made of it."""

    truth: Images  # (1, 3, size, size), the aligned face at the generator's size
    low: Images  # (1, 3, side, side)
    made: Upsampled
    faces_in_photo: int  # 0 where the picture was taken as a face already


def upsample_photo(
    path: Path,
    generator: Generator,
    detector: Callable[[], Detector],
    *,
    factor: int,
    faces: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Portrait:
    """Find the largest face of a photo, shrink it by `factor`, and search `faces` faces that shrink alike.

    A square picture of at most 64 pixels a side, and no fewer than are searched, is taken as an aligned face
    as it is; if it is as small as the generator's size divided by the factor, it is the measurement itself.

    Raises:
        PhotoError: The file cannot be read.
        LibraryError: No face was found, or the factor does not divide the generator's size.
    """
    size = generator.size
    if size % factor or factor < 2:
        raise LibraryError(
            f"the factor must divide the generator's {size} pixels and be at least 2, got {factor}"
        )
    degradation = BicubicPulse(factor)
    try:
        photo = read_photo(path, longest_side=LONGEST_SIDE)
    except PhotoError as error:
        raise PhotoError(f"{path}: {error}") from error
    height, width = photo.pixels.shape[:2]
    side = size // factor
    found = 0
    if min(side, SMALL) <= height == width <= SMALL:
        small = _images(photo.pixels)
        truth = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic", antialias=True)
        low = small if height == side else degradation.apply(truth)
    else:
        seen = usable(detector().find(photo.pixels))
        if not seen:
            raise LibraryError(
                f"{path}: no face found; give a photo with a face at least 32 pixels wide, or a square picture of "
                f"{min(side, SMALL)} to {SMALL} pixels that is a face already"
            )
        found = len(seen)
        truth = _images(align(photo.pixels, seen[0].landmarks, size))
        low = degradation.apply(truth)
    search = Pulse(generator, degradation, PulseConfig(), Streams(seed), progress=progress)
    return Portrait(
        truth=truth.clamp(0, 1),
        low=low,
        made=search.upsample(low, faces_per_photo=faces),
        faces_in_photo=found,
    )


def portrait_sheet(portrait: Portrait) -> bytes:
    """The picture of a portrait: the face, its few pixels, and every face found with its misfit."""
    made = portrait.made.images[0]
    side = portrait.low.shape[-1]
    tone = float(measure_tone(portrait.truth).monk[0])
    columns = [f"photo\nMonk {tone:.1f}", f"{side} x {side}\nshown"]
    for i, (misfit, fits) in enumerate(zip(portrait.made.misfit[0], portrait.made.converged[0], strict=True)):
        columns.append(f"face {i + 1}{'' if fits else ', no fit'}\nmisfit {float(misfit):.4f}")
    low = portrait.low.clamp(0, 1)
    enlarged = torch.nn.functional.interpolate(low, size=made.shape[-2:], mode="nearest")
    shrunk = torch.nn.functional.interpolate(
        BicubicPulse(made.shape[-1] // side).apply(torch.cat([portrait.truth, enlarged, made])).clamp(0, 1),
        size=made.shape[-2:],
        mode="nearest",
    )
    rows = [
        ("photo and\nfaces found", torch.cat([portrait.truth, enlarged, made])),
        (f"shrunk to\n{side} x {side}", shrunk),
    ]
    return face_grid(rows, columns)


def _images(pixels: np.ndarray) -> Images:
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise PhotoError(f"wanted pixels (h, w, 3), got {pixels.shape}")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255.0
