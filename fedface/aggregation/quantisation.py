"""Updates quantised to integers on a public grid, so that sums are exact.

The grid has 2M + 1 points, M = 2^(bits - 1) - 1, from -R to R including 0, so that an unchanged weight remains
unchanged. Values are rounded to the nearest point, ties to even, which is deterministic. Privacy noise is added before;
clamping and rounding are post-processing without privacy cost. Packing puts several integers into one slot, each with
headroom for the sum, so that one addition adds all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

from fedface.errors import AggregationError
from fedface.tensor_types import Vector
from fedface.validation import Above, AtLeast, In, checked

Integers = Int64[ndarray, "d"]


def finite_vector(update: Vector) -> Vector:
    """The update itself, on the CPU and detached, if it is a non-empty finite float vector (d,).

    Raises AggregationError otherwise, with the number of values that are not finite, before anything leaves.
    """
    if update.ndim != 1 or update.numel() == 0 or not update.is_floating_point():
        raise AggregationError(
            f"an update must be a non-empty float vector (d,), got {tuple(update.shape)} of {update.dtype}"
        )
    broken = int((~torch.isfinite(update)).sum())
    if broken:
        raise AggregationError(
            f"{broken} of {update.numel()} values of this update are not finite; nothing was sent. "
            "Lower the learning rate or skip this round."
        )
    return update.detach().cpu()


@dataclass(frozen=True, kw_only=True)
@checked
class Quantiser:
    """A public uniform grid of 2^bits - 1 points on [-R, R].

    Guarantees:
        * For values inside [-R, R], the de-quantised sum of n updates differs from their sum by at most
          n * step / 2 in each coordinate, up to one float32 rounding of the result.
        * Zero maps to zero exactly, and negating an update negates its grid points.
    """

    value_range: Annotated[float, Above(0)]  # R, weight units, public
    bits: Annotated[int, In("[2, 24]")]
    max_devices: Annotated[int, AtLeast(1)]  # the headroom

    @property
    def half(self) -> int:
        """M, the number of grid points on each side of zero: 2^(bits - 1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """The distance between grid points, R / M, in weight units."""
        return self.value_range / self.half

    @property
    def largest_sum(self) -> int:
        """The largest integer that a coordinate of a full sum can reach: max_devices * 2M."""
        return self.max_devices * 2 * self.half

    @property
    def sum_bits(self) -> int:
        """Bits that hold any coordinate of a full sum: about bits + log2(max_devices)."""
        return self.largest_sum.bit_length()

    def quantise(self, update: Vector) -> Integers:
        """Round an update (d,), weight units, to the nearest grid points; values outside [-R, R] are clamped.

        Returns:
            Shape (d,), each in 0..2M: the grid point plus M.

        Raises:
            AggregationError: It is not a non-empty finite float vector.
        """
        values = finite_vector(update).double().numpy()
        points = np.rint(np.clip(values, -self.value_range, self.value_range) / self.step)
        return np.asarray(points.astype(np.int64) + self.half)

    def dequantise_sum(self, integers: Integers, count: int) -> Vector:
        """The sum in weight units, float32, shape (d,), of `count` quantised updates summed as integers.

        Args:
            integers: Sums of what `quantise` returns, shape (d,), each in 0..count * 2M.
            count: How many updates are in the sum, 1..max_devices.

        Raises AggregationError if an integer is not a possible sum: a device sent something other than an update.
        """
        if not 1 <= count <= self.max_devices:
            raise AggregationError(f"a sum must contain 1..{self.max_devices} updates, got {count}")
        if integers.ndim != 1 or integers.dtype != np.int64 or len(integers) == 0:
            raise AggregationError(
                f"a sum of integers must be int64 (d,), got {integers.shape} {integers.dtype}"
            )
        lowest, highest = int(integers.min()), int(integers.max())
        if lowest < 0 or highest > count * 2 * self.half:
            raise AggregationError(
                f"a sum of {count} updates of {self.bits} bits must lie in 0..{count * 2 * self.half}, got "
                f"{lowest}..{highest}: a device sent something that is not a quantised update"
            )
        total = (integers - count * self.half).astype(np.float64) * self.step
        return torch.from_numpy(total.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Several integers per slot.

    Guarantees:
        * The slot-wise sum of packed updates unpacks to the sum of their integers, as long as every sum stays below
          2^width: no carry crosses from one integer into its neighbour.
    """

    width: int  # bits for one integer of a full sum, >= 1
    per_slot: int  # integers in one slot, >= 1; per_slot * width <= 62

    def __post_init__(self) -> None:
        if min(self.width, self.per_slot) < 1 or self.per_slot * self.width > 62:
            raise ValueError(f"a slot must hold 1..62 bits, got {self.per_slot} x {self.width}")

    def slots_for(self, length: int) -> int:
        """How many slots carry `length` integers."""
        return -(-length // self.per_slot)

    def _places(self) -> np.ndarray:
        places: np.ndarray = np.arange(self.per_slot, dtype=np.int64)[:, None] * self.width
        return places

    def pack(self, integers: Integers) -> np.ndarray:
        """One update's integers, int64 (d,), each in 0..2^width - 1, as slots, int64 (n,)."""
        slots = self.slots_for(len(integers))
        fields = np.zeros(self.per_slot * slots, dtype=np.int64)
        fields[: len(integers)] = integers
        packed: np.ndarray = (fields.reshape(self.per_slot, slots) << self._places()).sum(axis=0)
        return packed

    def unpack(self, slots: np.ndarray, length: int) -> Integers:
        """Sums of packed updates, int64 (n,), as int64 (length,).

        Raises AggregationError if the slots are not a possible sum of packed updates.
        """
        spread: np.ndarray = slots[None, :] >> self._places()
        if int((spread[-1] >> self.width).max()) > 0:
            raise AggregationError("a slot exceeds the largest possible sum: this is not a sum of updates")
        fields = (spread & ((1 << self.width) - 1)).reshape(-1)
        if fields[length:].any():
            raise AggregationError("the padding after the sum is not zero: this is not a sum of updates")
        return fields[:length]
