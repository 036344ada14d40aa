"""The camera of drawn faces: from light on the sensor to sRGB, and JPEG's loss.

Called by photos.drawn. The steps are those that treat dark skin worse in real cameras: too little exposure,
a dynamic range whose floor swallows the darkest tones, noise that is largest, relative to the signal, there.
Source of the JPEG steps: ITU-T T.81, annex K (tables) and libjpeg's scaling of quality; 4:4:4 chroma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedface.photos.skin_tone import srgb_from_linear
from fedface.synthetic.parameters import SyntheticFaces
from fedface.tensor_types import Images

_SHOULDER = 0.06  # how early highlights roll off, linear light


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def through_camera(radiance: Images, faces: SyntheticFaces, noise: torch.Generator | None = None) -> Images:
    """What the camera makes of the light that reaches it.

    Args:
        radiance: (n, 3, h, w) linear light, >= 0, 1 is white at exposure 0.
        faces: n faces; their exposure, dynamic range, sensor noise and gamma are used.
        noise: Source of the sensor noise; without it there is none and the picture is deterministic.

    Returns:
        (n, 3, h, w) sRGB in [0, 1].
    """
    signal = radiance * _column(torch.exp2(faces.exposure))
    if noise is not None:
        # Shot noise grows with the root of the signal, read noise stays.
        level = _column(faces.sensor_noise) * (0.2 + signal.clamp(min=0) / 0.18 * 0.8).sqrt()
        signal = signal + level * torch.randn(signal.shape, generator=noise)
    floor = _column(torch.exp2(-faces.dynamic_range))
    signal = signal.clamp(min=0)
    signal = signal * signal / (signal + floor)
    signal = 1 - _SHOULDER * torch.nn.functional.softplus((1 - signal) / _SHOULDER)
    return srgb_from_linear(signal) ** _column(faces.gamma)


_LUMA = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 "
    "72 92 95 98 112 100 103 99"
)
_CHROMA = (
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99"
    + 32 * " 99"
)
_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def _cosines() -> Tensor:
    """The orthonormal 8-point DCT-II matrix, (frequency, position)."""
    frequency, position = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    matrix = torch.cos(math.pi * (2 * position + 1) * frequency / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def through_jpeg(images: Images, faces: SyntheticFaces) -> Images:
    """The pictures after JPEG at each face's quality: blockwise DCT, quantised and undone.

    Args:
        images: (n, 3, h, w) sRGB; clamped to [0, 1].
        faces: n faces; their `jpeg_quality` is used.

    Returns:
        (n, 3, h, w) sRGB in [0, 1].
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images.clamp(0, 1), (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc = torch.tensor(_YCC)
    planes = torch.einsum("ij,njhw->nihw", to_ycc, padded * 255)
    planes[:, 0] -= 128
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = planes.reshape(count, 3, rows, 8, columns, 8).transpose(3, 4)
    tables = torch.tensor([[float(entry) for entry in text.split()] for text in (_LUMA, _CHROMA, _CHROMA)])
    quality = faces.jpeg_quality.round().clamp(1, 100)
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = ((tables * percent[:, None, None] + 50) / 100).floor().clamp(1, 255).reshape(count, 3, 1, 1, 8, 8)
    cosines = _cosines()
    coded = torch.round(cosines @ blocks @ cosines.T / steps) * steps
    planes = (cosines.T @ coded @ cosines).transpose(3, 4).reshape(planes.shape)
    planes[:, 0] += 128
    decoded = torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_ycc), planes) / 255
    return decoded[:, :, :height, :width].clamp(0, 1)
