"""The Gaussian mechanism: clip vectors, add noise to their sum, and name what that costs.

One object for both uses: the numbers that clip and noise are the numbers that the accountant prices.
Source: Dwork & Roth (2014), Theorem A.1; Balle & Wang (2018), arXiv:1805.06530; sampling as in Abadi et al.
(2016), arXiv:1607.00133; on floating-point numbers, Mironov (2012), CCS, and Haney et al. (2022), arXiv:2207.13793.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from torch import Tensor

from fedface.randomness import SecretNoise
from fedface.tensor_types import Vector
from fedface.validation import Above, In, checked

Event = DpEvent  # what was released; the name by which other rooms know dp_accounting's record


# Far outside, float32 breaks the guarantee: squares of short gradients vanish, so that they are not clipped at
# all, and noise vanishes beside its own rounding. A stranger's schedule must not reach there.
ClipNorm = Annotated[float, Above(0), In("[1e-6, 1e6]")]  # what float32 can clip to
Sigma = Annotated[float, Above(0, "; without noise the kind is no-privacy")]


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


@dataclass(frozen=True, kw_only=True)
@checked
class GaussianSum:
    """A sum of clipped vectors plus normal noise of standard deviation `sigma * clip_norm` per coordinate."""

    kind: ClassVar[str] = "gaussian-sum"

    clip_norm: ClipNorm  # longest one unit's vector can be, in weight units
    sigma: Sigma  # noise multiplier: noise standard deviation / clip norm

    def clip(self, update: Vector) -> Vector:
        """One unit's vector (d,), scaled down to length `clip_norm` at most; zero if not finite."""
        return clip_l2(update, self.clip_norm)

    def noise(self, total: Vector, secret: SecretNoise) -> Vector:
        """The sum (d,) with fresh normal noise added once; never call it twice on one booking.

        The noised sum is rounded to a grid of public width, a power of two about a millionth of the noise's standard
        deviation. Rounding what was noised is post-processing (Dwork & Roth 2014, Proposition 2.1). Without it the gaps
        between floating-point numbers tell which sums a result can come from, and with them the exact sum, at any
        epsilon (Mironov 2012; Haney et al. 2022, arXiv:2207.13793): float32 noise has holes, which the sum shifts. Here
        the sum is taken apart into a whole number of grid widths, which shifts the result exactly, and a rest, which
        meets the noise in float64, where a grid width still holds billions of numbers.
        """
        deviation = self.sigma * self.clip_norm
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

    def event(self) -> DpEvent:
        """What one noised sum releases about one unit, with everyone taking part for certain."""
        return GaussianDpEvent(self.sigma)


ROUND_FLOOR_MULTIPLIER = 200.0  # of the Gaussian release that `round_floor` adds to each round


@dataclass(frozen=True, kw_only=True)
@checked
class ClippedSum:
    """A sum of clipped vectors without noise, hence without a guarantee. The mechanism of `NoPrivacy`."""

    kind: ClassVar[str] = "clipped-sum"

    clip_norm: ClipNorm  # longest one unit's vector can be, in weight units

    def clip(self, update: Vector) -> Vector:
        """One unit's vector (d,), scaled down to length `clip_norm` at most; zero if not finite."""
        return clip_l2(update, self.clip_norm)

    def event(self) -> DpEvent:
        """The event whose epsilon is infinite."""
        return NonPrivateDpEvent()


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """Steps of DP-SGD: each unit joins each step by its own coin, then the Gaussian sum is released."""

    sampling_rate: float  # q, the coin's probability, 0 < q <= 1; a public constant
    sum: GaussianSum  # what each step releases
    steps: int  # how many steps, >= 1

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def event(self) -> DpEvent:
        """What all steps together release about one unit, if the coins stay secret."""
        step = PoissonSampledDpEvent(self.sampling_rate, self.sum.event())
        return SelfComposedDpEvent(step, self.steps)


def round_floor(rounds: int) -> DpEvent:
    """What each round costs beside its mechanism, so that none is free to repeat, however large its noise.

    What an answer shows beside its content, such as when it comes, can be observed once for each round.
    """
    return SelfComposedDpEvent(GaussianDpEvent(ROUND_FLOOR_MULTIPLIER), rounds)
