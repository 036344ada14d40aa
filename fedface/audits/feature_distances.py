"""How far apart two sets of faces are, with features that need no download and no training.

Each face becomes 132 numbers in units of ten CIELAB steps: where light and colour lie (the lowest cosine coefficients)
and how much fine contrast there is (Haar wavelets at three scales). The numbers are the same on every machine. The
distances take features of any kind, see audits/feature_extractors.

These distances are NOT comparable with published FID or KID, which use an Inception network trained on ImageNet. They
see tone, light, layout and sharpness, not identity or expression, and a set of plausible faces with wrong teeth can
score well. Compare them only with each other, at the same number of faces, and against the floor that
audits/sample_quality reports.

Memory is one block of a table of distances and a few covariances, whatever the number of faces.

Sources: Heusel et al. 2017 (arXiv:1706.08500) for the Frechet distance; Binkowski et al. 2018
(arXiv:1801.01401) for the kernel distance; Chan, Golub, LeVeque 1983 for merging moments; Quenouille 1956 and
Kuensch 1989 for the jackknife over blocks; Chong and Forsyth 2020 (arXiv:1911.07023) for why the Frechet
distance has to be taken to infinitely many faces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fedface.measurements import Interval
from fedface.photos.skin_tone import srgb_to_lab
from fedface.tensor_types import Images

FEATURE_WIDTH = 132
_SIDE = 32  # faces are brought to this side first, so that sets of different sizes can be compared
_UNIT = 10.0  # CIELAB steps
_TABLE = 2**21  # numbers in one block of a table, 16 MiB: bounds the memory
BLOCKS = 10  # that a set is cut into for its interval


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
    all coefficients add up to the mean square of the image; then the root mean square of the Haar wavelets
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


def rows_at_once(columns: int) -> int:
    """How many rows of a table with so many columns are computed together, so that memory stays bounded."""
    return max(1, _TABLE // max(1, columns))


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of rows seen so far; enough for the Frechet distance, and small."""

    count: int  # rows, >= 1
    mean: Tensor  # (d,) float64
    scatter: Tensor  # (d, d) float64: the sum of (x - mean) (x - mean)^T

    @staticmethod
    def of(features: Tensor) -> Moments:
        """The moments of rows (n, d), n >= 1."""
        if features.ndim != 2 or len(features) < 1:
            raise ValueError(f"features must have shape (n, d) with n >= 1, got {tuple(features.shape)}")
        x = features.double()
        mean = x.mean(dim=0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together, as if they had been seen at once (Chan et al. 1983)."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def without(self, part: Moments) -> Moments:
        """The moments that are left when a part of the rows is taken away: the inverse of `merge`."""
        count = self.count - part.count
        if count < 1:
            raise ValueError(f"cannot take {part.count} rows from {self.count}")
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        step = part.mean - mean
        between = torch.outer(step, step) * (count * part.count / self.count)
        return Moments(count, mean, self.scatter - part.scatter - between)

    @property
    def covariance(self) -> Tensor:
        """(d, d), unbiased; needs two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) from the moments of two sets, >= 0."""
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features, >= 0.

    Sets (n, d) and (m, d); the result is in squared units. Biased upwards for few faces: compare only distances
    of equal counts, or see `frechet_interval`. With fewer faces than features the trace of the root is taken
    as the sum of the singular values of X_a X_b^T, which is the same and cheaper.
    """
    a, b = _check_features(a, b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_of_moments(Moments.of(a), Moments.of(b))
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    x, y = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + x.square().sum() + y.square().sum() - 2 * cross))


def jackknife_half_width(without: np.ndarray) -> np.ndarray:
    """Half the 95 % interval of a statistic from its values with one block left out, (blocks, ...) -> (...).

    Student's quantile with blocks - 1 degrees of freedom. For statistics that are quadratic near their least
    value, such as distances of equal sets, it is too wide rather than too narrow.
    """
    blocks = len(without)
    variance = (blocks - 1) / blocks * np.square(without - without.mean(axis=0)).sum(axis=0)
    return np.asarray(stats.t.ppf(0.975, blocks - 1) * np.sqrt(variance))


def faces_to_extrapolate(width: int) -> int:
    """Faces a side from which `frechet_interval` holds for any features of this width: one and a half times it.

    Measured on Gaussians with equal variances, the worst case: at as many faces as features, or fewer, the bias
    is no longer c/n, and the interval may miss the truth altogether. Features whose variances fall off quickly
    need fewer.
    """
    return max(2 * BLOCKS, math.ceil(1.5 * width))


def frechet_interval(a: Tensor, b: Tensor) -> Interval:
    """The Frechet distance of infinitely many faces, estimated: the jackknife over blocks takes the bias away.

    The bias of a distance from n faces is c/n to first order; ten times the distance from all faces less nine
    times the mean of those with a tenth left out has none of it (Quenouille 1956), which is Chong and Forsyth's
    extrapolation with two sizes. May fall below 0 where the sets are alike.

    Args:
        a: (n, d), in random order: the blocks are consecutive rows. n >= 20; holds from
            `faces_to_extrapolate` on.
        b: (m, d), likewise.
    """
    a, b = _check_features(a, b)
    _check_blocks(a, b)
    parts_a, parts_b = a.tensor_split(BLOCKS), b.tensor_split(BLOCKS)
    full = frechet_distance(a, b)
    if min(len(a), len(b)) > 2 * a.shape[1]:
        all_a, all_b = Moments.of(a), Moments.of(b)
        without = [
            frechet_of_moments(all_a.without(Moments.of(x)), all_b.without(Moments.of(y)))
            for x, y in zip(parts_a, parts_b, strict=True)
        ]
    else:
        without = [frechet_distance(_all_but(parts_a, i), _all_but(parts_b, i)) for i in range(BLOCKS)]
    estimate = BLOCKS * full - (BLOCKS - 1) * float(np.mean(without))
    half = float(jackknife_half_width(np.array(without)))
    return Interval(estimate, estimate - half, estimate + half, min(len(a), len(b)))


def _check_blocks(a: Tensor, b: Tensor) -> None:
    if min(len(a), len(b)) < 2 * BLOCKS:
        raise ValueError(f"an interval needs at least {2 * BLOCKS} faces a side, got {len(a)} and {len(b)}")


def _all_but(parts: Sequence[Tensor], excluded: int) -> Tensor:
    return torch.cat([part for index, part in enumerate(parts) if index != excluded])


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """The sum of (x.y / d + 1)^3 over all pairs, in blocks of bounded size."""
    width = x.shape[1]
    total = 0.0
    for start in range(0, len(x), step := rows_at_once(len(y))):
        total += float((x[start : start + step] @ y.T / width + 1).pow(3).sum())
    return total


def _kernel_sums(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> np.ndarray:
    return np.array([[_kernel_sum(x, y) for y in ys] for x in xs])


@dataclass(frozen=True)
class _KernelSums:
    """Kernel sums between the blocks of two sets, from which the distance of any choice of blocks follows."""

    count_x: np.ndarray  # (blocks,) rows
    count_y: np.ndarray
    within_x: np.ndarray  # (blocks, blocks)
    within_y: np.ndarray
    across: np.ndarray
    self_x: np.ndarray  # (blocks,) the sum over pairs of a row with itself
    self_y: np.ndarray

    @staticmethod
    def of(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> _KernelSums:
        def alone(parts: Sequence[Tensor]) -> np.ndarray:
            return np.array([float((p.square().mean(dim=1) + 1).pow(3).sum()) for p in parts])

        return _KernelSums(
            np.array([len(x) for x in xs]),
            np.array([len(y) for y in ys]),
            _kernel_sums(xs, xs),
            _kernel_sums(ys, ys),
            _kernel_sums(xs, ys),
            alone(xs),
            alone(ys),
        )

    def distance(self, chosen: np.ndarray) -> float:
        """The unbiased squared MMD of the blocks whose entry in `chosen` (blocks,) is 1."""
        n, m = float(chosen @ self.count_x), float(chosen @ self.count_y)
        xx = (chosen @ self.within_x @ chosen - chosen @ self.self_x) / (n * (n - 1))
        yy = (chosen @ self.within_y @ chosen - chosen @ self.self_y) / (m * (m - 1))
        return float(xx + yy - 2 * (chosen @ self.across @ chosen) / (n * m))

    def error_between_equals(self) -> float:
        """The standard error if the sets were alike: pairs of blocks then vary as if they were independent."""
        across = self.across / np.outer(self.count_x, self.count_y)
        terms = self.within_x / np.outer(self.count_x, self.count_x) - across - across.T
        terms += self.within_y / np.outer(self.count_y, self.count_y)
        pairs = terms[np.triu_indices(len(terms), 1)]
        return float(pairs.std(ddof=1)) / math.sqrt(len(pairs))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of two sets of features under the kernel (x.y / d + 1)^3; may fall below 0."""
    a, b = _check_features(a, b)
    return _KernelSums.of([a], [b]).distance(np.ones(1))


def kernel_interval(a: Tensor, b: Tensor) -> Interval:
    """`kernel_distance` of all faces with its 95 % interval, from sums between ten blocks of each set.

    All pairs are used: where sets are alike, the mean over disjoint blocks would spread about three times as
    far. The squared error is the jackknife's, plus that of a statistic of equal sets, which varies by products
    of pairs that the jackknife sees badly (Gretton et al. 2012, section 4).

    Args:
        a: (n, d), n >= 20, in random order: the blocks are consecutive rows.
        b: (m, d), m >= 20, in random order.
    """
    a, b = _check_features(a, b)
    _check_blocks(a, b)
    sums = _KernelSums.of(a.tensor_split(BLOCKS), b.tensor_split(BLOCKS))
    estimate = sums.distance(np.ones(BLOCKS))
    without = np.array([sums.distance(1 - np.eye(BLOCKS)[i]) for i in range(BLOCKS)])
    floor = float(stats.t.ppf(0.975, BLOCKS - 1)) * sums.error_between_equals()
    half = math.hypot(float(jackknife_half_width(without)), floor)
    return Interval(estimate, estimate - half, estimate + half, min(len(a), len(b)))


def face_distance(real: Images, generated: Images, rng: np.random.Generator) -> Interval:
    """The unbiased squared MMD of `face_features`, with its interval; covers 0 where the sets cannot be distinguished.

    Args:
        real: At least 40 faces (n, 3, h, w) in [0, 1].
        generated: At least 40 faces (m, 3, h, w) in [0, 1].
        rng: Orders the faces, which determines the blocks.
    """
    if min(len(real), len(generated)) < 40:
        raise ValueError(f"each set needs at least 40 faces, got {len(real)} and {len(generated)}")
    a = face_features(real)[torch.from_numpy(rng.permutation(len(real)))]
    b = face_features(generated)[torch.from_numpy(rng.permutation(len(generated)))]
    return kernel_interval(a, b)
