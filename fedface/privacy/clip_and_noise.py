"""The Gaussian mechanism as it runs on vectors: clip each unit's, add noise to their sum.

What it costs is in privacy/mechanism.py, from the same `clip_norm` and `sigma`.
Source: Abadi et al. (2016), arXiv:1607.00133; on floating-point numbers, Mironov (2012), CCS, and Haney et al. (2022),
arXiv:2207.13793.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedface.privacy.mechanism import GaussianSum
from fedface.randomness import SecretNoise
from fedface.tensor_types import Vector

_AT_ONCE = 2**20  # numbers that are noised together
_GRID_BITS = 20  # a noised sum lies on a grid 2^20 to 2^21 times as fine as the noise's deviation

MAX_NORM = 1e18  # longer vectors become zero: float32 could not scale them down without rounding them up


def clip_l2(update: Vector, clip_norm: float) -> Vector:
    """Scale a vector down so that its Euclidean length is at most `clip_norm`.

    Guarantees:
        * `norm(result) <= clip_norm`, up to one float32 rounding.
        * A vector with a non-finite entry, or longer than 1e18, becomes zero.

    Args:
        update: Shape (d,), in weight units.
        clip_norm: The longest length allowed, > 0.

    Returns:
        The same direction, shape (d,). A zero vector stays zero.
    """
    # In float64: a lane of float32 squares loses small ones beside a large one, and the length comes out too short.
    length: Tensor = torch.linalg.vector_norm(update, dtype=torch.float64)
    if not bool(length.detach() <= MAX_NORM):  # nor what is not a number
        return torch.zeros_like(update)
    scale: Tensor = (clip_norm / length).clamp(max=1.0).to(update.dtype)  # differentiable, for attacks
    return update * scale


def add_noise(total: Vector, mechanism: GaussianSum, secret: SecretNoise) -> Vector:
    """The sum (d,) with fresh normal noise added once; never call it twice on one entry.

    The noised sum is rounded to a grid of public width, a power of two about a millionth of the noise's standard
    deviation. Rounding what was noised is post-processing (Dwork & Roth 2014, Proposition 2.1). Without it the gaps
    between floating-point numbers tell which sums a result can come from, and with them the exact sum, at any
    epsilon (Mironov 2012; Haney et al. 2022, arXiv:2207.13793): float32 noise has holes, which the sum shifts. Here
    the sum is taken apart into a whole number of grid widths, which shifts the result exactly, and a rest, which
    meets the noise in float64, where a grid width still holds billions of numbers.
    """
    deviation = mechanism.sigma * mechanism.clip_norm
    grid = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    noised = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    into, flat = noised.view(-1), total.detach().reshape(-1)
    for start in range(0, len(flat), _AT_ONCE):  # in parts: float64 takes eight bytes for each number
        part = slice(start, start + _AT_ONCE)
        widths = flat[part].cpu().double() / grid  # exact, by a power of two
        whole = widths.round()
        rest = widths - whole + deviation / grid * secret.normals(len(widths))
        # Plus zero: minus zero comes of minus zeros alone, and would tell the sign of a tiny sum.
        into[part] = ((whole + rest.round() + 0.0) * grid).to(into)
    return noised
