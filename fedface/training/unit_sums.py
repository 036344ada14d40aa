"""Which photos a private step looks at, and the sum of units' clipped gradients in bounded memory.

Called from private_steps.py. A unit is what one promise covers: a photo, or all photos of an occasion. Units join a
step by one secret coin each; the gradients of a unit's photos are summed, and their sum is clipped, so that one unit
more or less moves the total by at most the clip norm (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with units
in place of examples; "user-level sampling" of Charles et al. 2024, arXiv:2407.07737).

Of an occasion with many photos a step looks at `MOST_OF_A_UNIT` at most, drawn by secret chance. Given the draw the
step is the same Poisson-sampled Gaussian sum over units, and a mixture over draws that do not hang on the other
units is no further apart than its parts (joint convexity, Balle et al. 2018, arXiv:1807.01647): it costs nothing,
and an album of a thousand photos cannot make a device work for hours.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from fedface.randomness import SecretNoise

Chance = SecretNoise | torch.Generator  # secret for a promise, replayable only where nothing is promised

MOST_OF_A_UNIT = 16  # photos of one unit that a step looks at


def units_of(photos: Tensor, units: Tensor | None) -> Tensor:
    """Which unit each photo belongs to, int64 (n,), checked."""
    if units is None:
        return torch.arange(len(photos))
    if units.shape != (len(photos),) or units.dtype != torch.int64:
        raise ValueError(
            f"units must be int64 of shape ({len(photos)},), got {units.dtype} {tuple(units.shape)}"
        )
    if len(units) and not torch.equal(torch.unique(units), torch.arange(int(units.max()) + 1)):
        raise ValueError("units must be numbered from 0 without gaps")
    return units


def sampled_units(count: int, sampling_rate: float, chance: Chance) -> Tensor:
    """Toss one coin per unit and return the numbers of those that join, int64, ascending; may be empty.

    Args:
        count: How many units there are.
        sampling_rate: Probability q of each coin, 0 < q <= 1, a public constant.
        chance: Secret for a promised run.
    """
    return torch.from_numpy(np.flatnonzero(_tosses(count, chance) < sampling_rate))


def joined_photos(units: Tensor, sampling_rate: float, chance: Chance) -> Tensor:
    """The positions of the photos that a step looks at, photos of one unit side by side, int64; may be empty.

    Args:
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps.
        sampling_rate: As for `sampled_units`.
        chance: As for `sampled_units`.
    """
    count = int(units.max()) + 1 if len(units) else 0
    joined = sampled_units(count, sampling_rate, chance)
    if count == len(units):  # every photo by itself
        return torch.argsort(units)[joined]
    order = torch.from_numpy(np.argsort(_tosses(len(units), chance), kind="stable"))
    order = order[torch.argsort(units[order], stable=True)]  # by unit, shuffled within
    sorted_units = units[order]
    first = torch.searchsorted(sorted_units, sorted_units)
    place = torch.arange(len(units)) - first  # among the photos of the unit
    looked_at = torch.isin(sorted_units, joined) & (place < MOST_OF_A_UNIT)
    return order[looked_at]


def _tosses(count: int, chance: Chance) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, (count,)."""
    match chance:
        case SecretNoise():
            return chance.uniforms(count)
        case torch.Generator():
            tosses: np.ndarray = torch.rand(count, generator=chance, dtype=torch.float64).numpy()
            return tosses
        case _:
            assert_never(chance)


def clipped_sum(gradients: list[Tensor], clip_norm: float) -> list[Tensor]:
    """The sum over photos of their gradients, each first scaled down to length `clip_norm` over all weights.

    Guarantees:
        * One photo more or less moves the sum by at most `clip_norm`, up to float32 rounding.
        * A photo with a non-finite gradient adds nothing.

    Args:
        gradients: One tensor (n, *weight.shape) per parameter.
        clip_norm: Longest gradient of one photo, > 0.

    Returns:
        One tensor (*weight.shape) per parameter.
    """
    length = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    usable = torch.isfinite(length)
    scale = torch.where(usable, (clip_norm / length).clamp(max=1.0), 0.0)
    finite = gradients if bool(usable.all()) else [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in gradients]
    return [torch.einsum("n,n...->...", scale, g) for g in finite]


class SumOfUnits:
    """Adds up units' clipped gradients, whose photos come side by side but may be cut by the end of a microbatch."""

    def __init__(self, zeros: list[Tensor], clip_norm: float) -> None:
        """Zeros of each weight's shape, and the longest sum that one unit can add, > 0."""
        self._totals, self._clip_norm = zeros, clip_norm
        self._open: tuple[int, list[Tensor]] | None = (
            None  # the unit whose photos may go on, and its sum so far
        )

    def add(self, gradients: list[Tensor], members: Tensor) -> None:
        """One microbatch: gradients (n, *weight.shape), and which unit each photo belongs to, (n,)."""
        numbers, place = torch.unique_consecutive(members, return_inverse=True)
        sums = gradients
        if len(numbers) < len(members):
            sums = [
                torch.zeros(len(numbers), *g.shape[1:], dtype=g.dtype).index_add_(0, place, g)
                for g in gradients
            ]
        if self._open is not None and self._open[0] == int(numbers[0]):
            sums = [
                torch.cat([(s[0] + before)[None], s[1:]])
                for s, before in zip(sums, self._open[1], strict=True)
            ]
        elif self._open is not None:
            self._close()
        self._sum([s[:-1] for s in sums])
        self._open = (int(numbers[-1]), [s[-1].clone() for s in sums])

    def end(self) -> list[Tensor]:
        """The sum over all units."""
        if self._open is not None:
            self._close()
        return self._totals

    def _close(self) -> None:
        assert self._open is not None
        self._sum([part[None] for part in self._open[1]])
        self._open = None

    def _sum(self, sums: list[Tensor]) -> None:
        if len(sums[0]):
            clipped = clipped_sum(sums, self._clip_norm)
            self._totals = [t + c for t, c in zip(self._totals, clipped, strict=True)]
