"""The parameters of the Gaussian mechanism, and the privacy events that the accountant prices.

One object for both uses: privacy/clip_and_noise.py clips and noises vectors with the same numbers.
Source: Dwork & Roth (2014), Theorem A.1; Balle & Wang (2018), arXiv:1805.06530; sampling as in Abadi et al.
(2016), arXiv:1607.00133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from fedface.validation import Above, In, checked

Event = DpEvent  # what was released; the name by which other modules know dp_accounting's record

# Far outside, float32 breaks the guarantee: squares of short gradients vanish, so that they are not clipped at
# all, and noise vanishes beside its own rounding. A stranger's schedule must not reach there.
ClipNorm = Annotated[float, Above(0), In("[1e-6, 1e6]")]  # what float32 can clip to
Sigma = Annotated[float, Above(0, "; without noise the kind is no-privacy")]


@dataclass(frozen=True, kw_only=True)
@checked
class GaussianSum:
    """A sum of clipped vectors plus normal noise of standard deviation `sigma * clip_norm` per coordinate."""

    kind: ClassVar[str] = "gaussian-sum"

    clip_norm: ClipNorm  # longest one unit's vector can be, in weight units
    sigma: Sigma  # noise multiplier: noise standard deviation / clip norm

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

    What a reply reveals beside its content, such as its time, can be observed once for each round.
    """
    return SelfComposedDpEvent(GaussianDpEvent(ROUND_FLOOR_MULTIPLIER), rounds)
