"""One axis of each linear downscale as a matrix, (side afterwards, side before), float64.

An image is filtered along its columns and its rows by two such matrices, which include the treatment of the borders.

Sources: Menon et al. 2020 (arXiv:2003.03808) for the filter of PULSE; Keys (1981) for the cubic.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, which is 0 from 2 on."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def bicubic_kernel(factor: int) -> Tensor:
    """The 4 * factor taps of the cubic filter stretched by `factor`, float64, summing to 1."""
    taps = _cubic((torch.arange(4 * factor, dtype=torch.float64) - 2 * factor + 0.5) / factor)
    return taps / taps.sum()


def _reflected(taps: Tensor, side: int, *, stride: int, before: int) -> Tensor:
    """Slide `taps` along one axis from `before` pixels outside it; reflected borders do not repeat the edge."""
    rows = torch.zeros(side // stride, side, dtype=torch.float64)
    period = max(2 * (side - 1), 1)
    positions = torch.arange(side // stride)[:, None] * stride + torch.arange(len(taps)) - before
    folded = positions % period
    columns = torch.minimum(folded, period - folded) if side > 1 else torch.zeros_like(folded)
    return rows.scatter_add_(1, columns, taps.expand(side // stride, -1))


@lru_cache(maxsize=16)
def pulse_rows(factor: int, side: int) -> Tensor:
    """PULSE's cubic: 4 * factor taps, 3 * factor pixels of reflected border, half of them (rounded down) before."""
    return _reflected(bicubic_kernel(factor), side, stride=factor, before=3 * factor // 2)


@lru_cache(maxsize=16)
def bicubic_rows(factor: int, side: int) -> Tensor:
    """The cubic around the middle of each block of `factor` pixels; taps outside are left out, the rest sums to 1."""
    middle = (torch.arange(side // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    rows = _cubic((torch.arange(side, dtype=torch.float64) - middle[:, None]) / factor)
    return rows / rows.sum(dim=1, keepdim=True)


@lru_cache(maxsize=16)
def mean_rows(factor: int, side: int) -> Tensor:
    """The mean of each block of `factor` pixels."""
    return torch.eye(side // factor, dtype=torch.float64).repeat_interleave(factor, dim=1) / factor


@lru_cache(maxsize=16)
def gaussian_rows(sigma: float, side: int) -> Tensor:
    """A Gaussian cut off at four sigma and normalised, with reflected borders."""
    radius = math.floor(4 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma).square())
    return _reflected(taps / taps.sum(), side, stride=1, before=radius)
