"""The known downscale: what turned a face into the low-resolution photo that we are given.

Called by the upsamplers, which search for a face whose downscaled picture equals the photo, and by the
audits, which make low-resolution probes. A degradation is a frozen value, so that a record can name it.

Sources: Menon et al. 2020 (arXiv:2003.03808) for the bicubic filter; Keys (1981) for the cubic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.shapes import Images, LowImages


def _check_factor(factor: int) -> None:
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")


def _check_images(images: Images, factor: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (n, 3, h, w), got {tuple(images.shape)}")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {tuple(images.shape[2:])}")


def bicubic_kernel(factor: int) -> Tensor:
    """The 4 * factor taps of the cubic filter (a = -0.5) stretched by `factor`, float64, summing to 1."""
    _check_factor(factor)
    x = ((torch.arange(4 * factor, dtype=torch.float64) - 2 * factor + 0.5) / factor).abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return taps / taps.sum()


@lru_cache(maxsize=16)
def _bicubic_rows(factor: int, side: int) -> Tensor:
    """The downscale of one axis, (side / factor, side); reflected borders do not repeat the edge."""
    taps = bicubic_kernel(factor)
    before = 3 * factor // 2
    rows = torch.zeros(side // factor, side, dtype=torch.float64)
    period = max(2 * (side - 1), 1)
    for row in range(side // factor):
        for tap, weight in enumerate(taps.tolist()):
            position = (row * factor + tap - before) % period
            rows[row, min(position, period - position) if side > 1 else 0] += weight
    return rows


@dataclass(frozen=True)
class BicubicPulse:
    """PULSE's downscale: a separable cubic of 4 * factor taps, reflected borders, stride `factor`.

    For even factors it equals the antialiased bicubic of torch and PIL inside the picture; only the border
    differs. Odd factors shift by half a pixel, as in the published code: factor 1 is not the identity.
    """

    factor: int  # >= 1

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor), not clamped.

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        _check_images(images, self.factor)
        rows = _bicubic_rows(self.factor, images.shape[2]).to(images)
        columns = _bicubic_rows(self.factor, images.shape[3]).to(images)
        return rows @ images @ columns.T


@dataclass(frozen=True)
class Area:
    """The mean of each block of factor x factor pixels: what pixelation and binned sensors do."""

    factor: int  # >= 1; 1 is the identity

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor).

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        _check_images(images, self.factor)
        return F.avg_pool2d(images, self.factor)


Degradation: TypeAlias = BicubicPulse | Area
