"""Which photos a private step uses, and the sum of units' clipped gradients in bounded memory.

A unit is what the privacy guarantee protects: a photo, or all photos of an occasion. Units join a step by one secret
coin each; the gradients of a unit's photos are summed, and their sum is clipped, so that one unit more or less moves
the total by at most the clip norm (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with units in place of examples;
"user-level sampling" of Charles et al. 2024, arXiv:2407.07737).

Of an occasion with many photos a step uses `MAX_PHOTOS_PER_UNIT` at most, sampled secretly. Given the sample the step
is the same Poisson-sampled Gaussian sum over units, and the divergence of a mixture over samples that are independent
of the other units is at most that of its parts (joint convexity, Balle et al. 2018, arXiv:1807.01647): it has no
privacy cost, and an album of a thousand photos cannot keep a device busy for hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from fedface.privacy.clip_and_noise import MAX_NORM
from fedface.randomness import SecretNoise

NoiseSource = SecretNoise | torch.Generator  # secret under a guarantee; replayable only without one

_AT_ONCE = 2**13  # numbers of each photo that are added together, in the processor's cache
_PART, _ROUNDED_UP = 1024, (1.0 + 4e-6) ** 2
_ROWS = 64  # gradients that are turned into float64 together
MAX_FACTOR_NORM = 1e15  # of the factors of an outer product that is not multiplied out
MAX_PHOTOS_PER_UNIT = 16  # photos of one unit that a step uses


def unit_members(photos: Tensor, units: Tensor | None) -> Tensor:
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


def poisson_sample_units(count: int, sampling_rate: float, rng: NoiseSource) -> Tensor:
    """The numbers of the units that join by one coin each, int64, ascending; may be empty.

    Args:
        count: How many units there are.
        sampling_rate: Probability q of each coin, 0 < q <= 1, a public constant.
        rng: Secret for a private run.
    """
    return torch.from_numpy(np.flatnonzero(_uniforms(count, rng) < sampling_rate))


def sample_photos(units: Tensor, sampling_rate: float, rng: NoiseSource) -> Tensor:
    """The positions of the photos that a step uses, photos of one unit adjacent, int64; may be empty.

    Args:
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps.
        sampling_rate: As for `poisson_sample_units`.
        rng: As for `poisson_sample_units`.
    """
    count = int(units.max()) + 1 if len(units) else 0
    joined = poisson_sample_units(count, sampling_rate, rng)
    if count == len(units):  # every photo by itself
        return torch.argsort(units)[joined]
    order = torch.from_numpy(np.argsort(_uniforms(len(units), rng), kind="stable"))
    order = order[torch.argsort(units[order], stable=True)]  # by unit, shuffled within each
    sorted_units = units[order]
    first = torch.searchsorted(sorted_units, sorted_units)
    place = torch.arange(len(units)) - first  # rank among the photos of the unit
    used = torch.isin(sorted_units, joined) & (place < MAX_PHOTOS_PER_UNIT)
    return order[used]


def _uniforms(count: int, rng: NoiseSource) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, (count,)."""
    match rng:
        case SecretNoise():
            return rng.uniforms(count)
        case torch.Generator():
            uniforms: np.ndarray = torch.rand(count, generator=rng, dtype=torch.float64).numpy()
            return uniforms
        case _:
            assert_never(rng)


def clipped_sum(gradients: list[Tensor], clip_norm: float, *, exact: bool = False) -> list[Tensor]:
    """The sum over photos of their gradients, each first clipped to L2 norm `clip_norm` over all weights.

    Guarantees:
        * One photo more or less moves the sum by at most `clip_norm`, up to one rounding of the whole sum to
          the dtype of the gradients, which is n / 2^24 clip norms at most: it is added up in float64.
        * A photo with a non-finite gradient adds nothing.

    Args:
        gradients: One tensor (n, *weight.shape) per parameter.
        clip_norm: Largest L2 norm of one photo's gradient, > 0.
        exact: Whether to return the sum in float64 instead, without that rounding.

    Returns:
        One tensor (*weight.shape) per parameter.
    """
    accumulator = ClippedSumAccumulator(
        [gradient[0] if len(gradient) else gradient.sum(0) for gradient in gradients], clip_norm
    )
    for start in range(0, max(map(len, gradients), default=0), _ROWS):
        accumulator.add(
            MicrobatchGradients([gradient[start : start + _ROWS].double() for gradient in gradients], [])
        )
    return accumulator.totals(exact=exact)


@dataclass(frozen=True)
class OuterProduct:
    """One outer product per photo, output gradient (n, o) times input (n, i), kept as its two factors."""

    weight: int  # position among the trained parameters
    factor: float
    output_gradient: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class MicrobatchGradients:
    """The gradients of a microbatch: one row per photo, and outer products that are not multiplied out.

    `each` is (n, *weight.shape) per parameter, and empty, (n, 0), for parameters in `outers`.
    """

    each: list[Tensor]
    outers: list[OuterProduct]


class ClippedSumAccumulator:
    """A running sum of clipped gradients, and the sum of the one unit that may continue in the next microbatch.

    Summed in float64: in float32 many small gradients vanish beside a large sum below a power of two and round up
    above it, so that one photo more, which decides the side, could move the sum by many clip norms.
    """

    def __init__(
        self, weights: Sequence[Tensor], clip_norm: float, scales: Sequence[Tensor] | None = None
    ) -> None:
        """For sums of these shapes; `scales` are public factors of every number."""
        self._dtypes = [weight.dtype for weight in weights]
        self._totals = [
            torch.zeros(weight.shape, device=weight.device, dtype=torch.float64) for weight in weights
        ]
        self._clip_norm, self._scales = clip_norm, scales
        self._unit: int | None = None
        self._partial: list[Tensor] = []

    def add(self, gradients: MicrobatchGradients) -> None:
        """Clip every row and add it; rows without a finite norm are set to zero."""
        rows = self._scaled(gradients.each)
        square = _squares(rows)
        fits = torch.ones(len(square), dtype=torch.bool)
        for outer in gradients.outers:
            out, inputs = _norm(outer.output_gradient), _norm(outer.inputs)
            # A product of a tiny and a huge factor is left out: rounding its scaled factors could increase its norm.
            fits &= (out <= MAX_FACTOR_NORM) & (inputs <= MAX_FACTOR_NORM)
            square = square + (out * inputs * outer.factor).square()
        norm = square.sqrt()
        usable = (norm <= MAX_NORM) & fits  # False for NaN
        scale = torch.where(usable, (self._clip_norm / norm).clamp(max=1.0), 0.0)
        for total, row in zip(self._totals, rows, strict=True):
            if row.shape[1:] == total.shape:
                _add_scaled(total, _zeroed(row, ~usable), scale)
        for outer in gradients.outers:
            out, inputs = (_zeroed(part, ~usable).double() for part in (outer.output_gradient, outer.inputs))
            self._totals[outer.weight] += (out * (scale * outer.factor)[:, None]).t() @ inputs

    def add_units(self, each: list[Tensor], units: Tensor) -> None:
        """Sum rows unit by unit; every unit but the last is complete and added."""
        numbers, where = torch.unique_consecutive(units, return_inverse=True)
        sums = [row.new_zeros(len(numbers), *row.shape[1:]) for row in each]
        if self._unit is not None and self._unit == int(numbers[0]):
            for total, partial in zip(sums, self._partial, strict=True):
                total[0] = partial
        else:
            self.end_unit()
        # Photo after photo, wherever microbatches end: how gradients that cancel round must not depend on the others.
        for total, row in zip(sums, each, strict=True):
            total.index_add_(0, where, row)
        self.add(MicrobatchGradients([total[:-1] for total in sums], []))
        self._unit, self._partial = int(numbers[-1]), [total[-1].clone() for total in sums]

    def end_unit(self) -> None:
        """Add the unit of which photos are still held, if any."""
        if self._unit is not None:
            self.add(MicrobatchGradients([partial[None] for partial in self._partial], []))
        self._unit, self._partial = None, []

    def totals(self, *, exact: bool) -> list[Tensor]:
        """The sums, rounded once to the dtypes of the weights, or in float64."""
        if exact:
            return self._totals
        return [total.to(dtype) for total, dtype in zip(self._totals, self._dtypes, strict=True)]

    def _scaled(self, rows: list[Tensor]) -> list[Tensor]:
        if self._scales is None:
            return rows
        return [row * scale for row, scale in zip(rows, self._scales, strict=True)]


def _add_scaled(total: Tensor, rows: Tensor, scale: Tensor) -> None:
    """Add rows (n, ...) times their scales (n,) to a float64 total (...), in parts: float64 takes twice the memory."""
    flat, into = _flat(rows), total.view(-1)
    for start in range(0, len(into), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        into[part] += scale @ flat[:, part].double()


def _zeroed(rows: Tensor, where: Tensor) -> Tensor:
    """The rows, set to zero where 0 * inf would not be: in place and always, so that nothing depends on a photo."""
    own = rows.contiguous() if 0 in rows.stride() else rows
    return own.masked_fill_(where.view(-1, *(1,) * (rows.ndim - 1)), 0.0)


def _square(rows: Tensor) -> Tensor:
    """The squared L2 norm of each row, (n, ...) -> (n,) float64, never too small.

    Summed in float64 over parts of a thousand numbers: over a whole row a lane of float32 squares loses small ones
    beside a large one, and the norm comes out too small. Within a part the error is below four in a million, which is
    added.
    """
    flat = _flat(rows)
    if flat.dtype == torch.float64:
        whole: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return whole.square()
    cut = flat.shape[1] // _PART * _PART
    parts = torch.linalg.vector_norm(flat[:, :cut].reshape(len(flat), cut // _PART, _PART), dim=2)
    rest = torch.linalg.vector_norm(flat[:, cut:], dim=1)
    square: Tensor = parts.double().square().sum(1) + rest.double().square()
    return square * _ROUNDED_UP


def _norm(rows: Tensor) -> Tensor:
    """The L2 norm of each row in float64, (n, ...) -> (n,): in float32 the squares of a tiny factor vanish."""
    norm: Tensor = torch.linalg.vector_norm(_flat(rows), dim=1, dtype=torch.float64)
    return norm


def _flat(rows: Tensor) -> Tensor:
    """(n, ...) -> (n, d), for scalars too."""
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def _squares(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([_square(part) for part in parts]).sum(0)
