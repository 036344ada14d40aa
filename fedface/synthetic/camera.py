"""The camera of synthetic faces: from light on the sensor to sRGB.

The steps are those that treat dark skin worse in real cameras: too little exposure, a dynamic range whose floor
swallows the darkest tones, noise that is largest, relative to the signal, there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedface.photos.skin_tone import srgb_from_linear
from fedface.synthetic.parameters import SyntheticFaces
from fedface.tensor_types import Images

_SHOULDER = 0.06  # how early highlights roll off, linear light


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def through_camera(radiance: Images, faces: SyntheticFaces, noise: torch.Generator | None = None) -> Images:
    """From light to sRGB in [0, 1], (n, 3, h, w): exposure, sensor noise, dynamic range, highlights, gamma.

    Args:
        radiance: (n, 3, h, w) linear light, >= 0, 1 is white at exposure 0.
        faces: n faces; their exposure, dynamic range, sensor noise and gamma are used.
        noise: Source of the sensor noise; without it there is none.
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
