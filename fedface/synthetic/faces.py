"""Synthetic faces: small rendered portraits whose skin tone, light, camera and every other parameter are known.

They train the bundled networks without any photo, and are a probe whose truth is known. No person is shown; the
parameters are independent standard normals through quantile functions, see `parameters`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedface.randomness import Streams
from fedface.synthetic.camera import through_camera
from fedface.synthetic.parameters import (
    NORMALS,
    SyntheticFaces,
    ToneMix,
    faces_from_normals,
    neutral_light,
    sample_faces,
)
from fedface.synthetic.scene import find_masks, radiance
from fedface.synthetic.shading import EYE_X, EYE_Y, MOUTH_Y, column, features, place, project, spot
from fedface.tensor_types import Images

__all__ = [
    "NORMALS",
    "SyntheticFaces",
    "ToneMix",
    "render",
    "render_occasions",
    "render_people",
    "faces_from_normals",
    "landmarks",
    "neutral_light",
    "sample_faces",
    "skin_mask",
    "through_camera",
]

# What differs from photo to photo of one person at one occasion.
MOMENT = ("yaw", "pitch", "roll", "smile", "mouth_open", "brow_raise", "gaze")
_PIXELS_AT_ONCE = 2**16  # keeps every intermediate tensor inside a core's cache
_FINE = 64  # images smaller than this are rendered at twice their size and averaged in linear light


def _chunks(faces: SyntheticFaces, size: int) -> list[SyntheticFaces]:
    step = max(1, _PIXELS_AT_ONCE // (size * size))
    return [faces[start : start + step] for start in range(0, len(faces), step)]


def _check(size: int) -> None:
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")


def _fine_size(size: int) -> int:
    return size if size >= _FINE else 2 * size


def _at_size(images: Tensor, size: int) -> Tensor:
    return images if images.shape[-1] == size else torch.nn.functional.avg_pool2d(images, 2)


@torch.no_grad()
def render(faces: SyntheticFaces, size: int, *, noise: torch.Generator | None = None) -> Images:
    """n faces as a camera would see them, (n, 3, size, size) sRGB in [0, 1].

    Args:
        faces: n faces.
        size: Side of the square images in pixels, at least 16; raises ValueError below.
        noise: Source of the sensor noise; without it the image is a function of the parameters alone.
    """
    _check(size)
    images = torch.empty(len(faces), 3, size, size)
    done = 0
    for part in _chunks(faces, _fine_size(size)):
        light = _at_size(radiance(part, _fine_size(size)), size)
        images[done : done + len(part)] = through_camera(light, part, noise)
        done += len(part)
    return images


def render_people(count: int, light_fraction: float, size: int, streams: Streams) -> Images:
    """Freshly sampled faces through cameras, (count, 3, size, size); equal streams give equal faces.

    Args:
        count: How many, >= 1.
        light_fraction: Share of light skin, Monk 1 to 5, in [0, 1].
        size: Side in pixels, at least 16.
        streams: Its streams "faces" and "camera" are used.
    """
    faces = sample_faces(count, ToneMix(light_fraction=light_fraction), streams.generator("faces"))
    return render(faces, size, noise=streams.generator("camera"))


def render_occasions(occasions: int, each: int, light_fraction: float, size: int, streams: Streams) -> Images:
    """`each` photos of each of several synthetic people, adjacent: (occasions * each, 3, size, size).

    Photos of one occasion show one person in one light, through one camera, with different poses and expressions.
    With one photo each they are those of `render_people`, whose other arguments these are.
    """
    mix = ToneMix(light_fraction=light_fraction)
    people = sample_faces(occasions, mix, streams.generator("faces"))
    faces = people[torch.arange(occasions).repeat_interleave(each)]
    if each > 1:
        moments = sample_faces(occasions * each, mix, streams.generator("moments"))
        faces = replace(faces, **{name: getattr(moments, name) for name in MOMENT})
    return render(faces, size, noise=streams.generator("camera"))


@torch.no_grad()
def skin_mask(faces: SyntheticFaces, size: int) -> Tensor:
    """How much of each pixel is visible facial skin: no hair, beard, glasses, eyes, brows or lips.

    The result is (n, size, size) in [0, 1]; `size` is at least 16.
    """
    _check(size)
    parts = []
    for part in _chunks(faces, _fine_size(size)):
        at = place(part, _fine_size(size))
        masks = find_masks(part, at)
        skin = masks.face * (1 - masks.hair) * (1 - masks.frame)
        skin = skin * (1 - spot(at.side - EYE_X, at.y - EYE_Y, 0.05, 0.025))
        skin = skin * (1 - spot(at.side - 0.125, at.y + 0.1, 0.06, 0.018))
        skin = skin * (1 - spot(at.x, at.y - MOUTH_Y, 0.07, 0.03))
        bearded = column(part.beard) * torch.sigmoid((at.y - 0.13) / 0.01)
        parts.append(_at_size(skin * (1 - bearded), size))
    return torch.cat(parts) if parts else torch.empty(0, size, size)


def landmarks(faces: SyntheticFaces) -> Tensor:
    """Left eye, right eye (of the image), nose tip, left and right mouth corner: (n, 5, 2) as (x, y).

    In fractions of the image's side with the origin at its top left.
    """
    return project(faces, features(faces)) + 0.5
