"""How far apart two sets of faces are, with features that need no download and no training.

Called by the audit suite and by training to compare a generator's faces with a probe. Each face becomes 132
numbers in units of ten CIELAB steps: where light and colour lie (the lowest cosine coefficients) and how much
fine contrast there is (Haar wavelets at three scales). Everything is fixed mathematics, so the numbers are
the same on every machine.

What that costs: these distances are NOT comparable with published FID or KID, which use an Inception network
trained on ImageNet. They see tone, light, layout and sharpness; they know nothing of identity or expression,
and a set of plausible faces with wrong teeth can score well. Compare them only with each other, at the same
number of faces, and against the floor that `compare_faces` reports.

Sources: Heusel et al. 2017 (arXiv:1706.08500) for the Frechet distance; Binkowski et al. 2018
(arXiv:1801.01401) for the kernel distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fedface.audits.disaggregate import Interval
from fedface.photos.tone import srgb_to_lab
from fedface.shapes import Images

FEATURE_WIDTH = 132
_SIDE = 32  # faces are brought to this side first, so that sets of different sizes can be compared
_UNIT = 10.0  # CIELAB steps


@lru_cache(maxsize=2)
def _cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `side` points as a matrix, divided by sqrt(side)."""
    frequency, position = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)
    rows = torch.cos(math.pi * frequency[:, None] * (position + 0.5) / side) * math.sqrt(2)
    rows[0] = 1.0
    return rows / side


def face_features(images: Images) -> Tensor:
    """132 numbers for each face, in units of ten CIELAB steps.

    64 cosine coefficients of L* (8 x 8), 16 of a* and 16 of b* (4 x 4 each), scaled so that the squares of
    all coefficients add up to the mean square of the picture; then the root mean square of the Haar wavelets
    of L* in each quarter of the face, for three scales and three directions (36).

    Args:
        images: (n, 3, h, w) sRGB in [0, 1], clamped; brought to 32 x 32 by area means.

    Returns:
        (n, 132) float64.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (n, 3, h, w), got {tuple(images.shape)}")
    x = images.detach().double().clamp(0, 1)
    if min(x.shape[2:]) >= _SIDE:
        x = F.adaptive_avg_pool2d(x, _SIDE)
    else:
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    lab = srgb_to_lab(x) / _UNIT
    cosines = _cosines(_SIDE)
    waves = cosines @ lab @ cosines.T
    parts = [waves[:, 0, :8, :8], waves[:, 1, :4, :4], waves[:, 2, :4, :4]]
    smooth = lab[:, :1]
    for _ in range(3):
        smooth, details = _haar(smooth)
        parts.append(F.adaptive_avg_pool2d(details.square(), 2).sqrt())
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One Haar step with means: (n, 1, s, s) -> smooth (n, 1, s/2, s/2) and details (n, 3, s/2, s/2)."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    details = torch.cat((a - b + c - d, a + b - c - d, a - b - c + d), dim=1) / 4
    return (a + b + c + d) / 4, details


def _check_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features must have shapes (n, d) and (m, d), got {shapes}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"each set needs at least two faces, got {len(a)} and {len(b)}")
    return a.double(), b.double()


def _covariance(features: Tensor) -> Tensor:
    width = features.shape[1]
    return torch.cov(features.T).view(width, width)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features, >= 0.

    Sets (n, d) and (m, d); the result is in squared units. Biased upwards for few faces: compare only figures
    of equal counts.
    """
    a, b = _check_features(a, b)
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of two sets of features under the kernel (x.y / d + 1)^3; may fall below 0."""
    a, b = _check_features(a, b)
    width = a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    def within(x: Tensor) -> Tensor:
        table = kernel(x, x)
        return (table.sum() - table.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


@dataclass(frozen=True, kw_only=True)
class FaceComparison:
    """Two sets of faces compared by the features of this module, not by Inception's."""

    frechet: float  # between half of the real faces and as many made ones; squared units, biased upwards
    frechet_floor: float  # between the two halves of the real faces: what a perfect set scores
    frechet_count: int  # faces on each side of both
    kernel: Interval  # unbiased squared MMD, with its interval; covers 0 where the sets cannot be told apart
    real: int  # faces
    made: int


def compare_faces(real: Images, made: Images, rng: np.random.Generator) -> FaceComparison:
    """Compare made faces with real ones.

    The kernel distance is the mean over disjoint blocks of faces, whose spread gives its interval. The other
    has none; read it against its floor.

    Args:
        real: At least 40 faces (n, 3, h, w) in [0, 1].
        made: At least 40 faces (m, 3, h, w) in [0, 1].
        rng: Where the blocks are drawn from.
    """
    if min(len(real), len(made)) < 40:
        raise ValueError(f"each set needs at least 40 faces, got {len(real)} and {len(made)}")
    a = face_features(real)[torch.from_numpy(rng.permutation(len(real)))]
    b = face_features(made)[torch.from_numpy(rng.permutation(len(made)))]
    blocks = min(10, min(len(a), len(b)) // 10)
    pairs = zip(a.tensor_split(blocks), b.tensor_split(blocks), strict=True)
    distances = np.array([kernel_distance(x, y) for x, y in pairs])
    estimate = float(distances.mean())
    half = float(stats.t.ppf(0.975, blocks - 1) * distances.std(ddof=1)) / math.sqrt(blocks)
    side = min(len(a) // 2, len(b))
    first, second = a[:side], a[side : 2 * side]
    return FaceComparison(
        frechet=frechet_distance(first, b[:side]),
        frechet_floor=frechet_distance(first, second),
        frechet_count=side,
        kernel=Interval(estimate, estimate - half, estimate + half, min(len(a), len(b))),
        real=len(a),
        made=len(b),
    )
