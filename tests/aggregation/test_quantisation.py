"""Sums of quantised updates are exact, and rounding costs at most half a step per device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.aggregation.quantisation import Packing, Quantiser
from fedface.errors import AggregationError

TINY = Quantiser(value_range=1.0, bits=2, max_devices=4)  # the grid -1, 0, 1
EIGHT = Quantiser(value_range=127.0, bits=8, max_devices=3)  # step 1: the grid is the whole numbers


def test_a_grid_of_step_one_rounds_to_integers_ties_to_even() -> None:
    """By hand: -127..127 shifted by 127."""
    update = torch.tensor([-127.0, -0.5, 0.0, 0.4, 0.5, 1.5, 2.5, 127.0])
    assert (EIGHT.step, EIGHT.half) == (1.0, 127)
    assert EIGHT.quantise(update).tolist() == [0, 127, 127, 127, 127, 129, 129, 254]


def test_values_outside_the_range_are_clamped() -> None:
    """Two of four lie outside [-1, 1]; the edge itself does not."""
    assert TINY.quantise(torch.tensor([-5.0, 1.0, 1.5, 0.0])).tolist() == [0, 2, 2, 1]


def test_zero_stays_exactly_zero_in_every_sum() -> None:
    """Zero is a grid point."""
    zero = TINY.quantise(torch.zeros(3))
    assert TINY.dequantise_sum(4 * zero, 4).tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 24),
    value_range=st.floats(1e-6, 1e3),
    devices=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_the_sum_of_n_updates_is_off_by_at_most_n_half_steps(
    bits: int, value_range: float, devices: int, seed: int
) -> None:
    """Compared with a float64 sum."""
    quantiser = Quantiser(value_range=value_range, bits=bits, max_devices=6)
    uniform = np.random.default_rng(seed).uniform(-1, 1, (devices, 20)) * value_range
    updates = torch.from_numpy(uniform.astype(np.float32)).clamp(-value_range, value_range)
    integers = np.sum([quantiser.quantise(update) for update in updates], axis=0)
    error = (quantiser.dequantise_sum(integers, devices).double() - updates.double().sum(0)).abs().max()
    float32_rounding = devices * value_range * 2.0**-23
    assert error <= devices * quantiser.step / 2 + float32_rounding
    assert int(integers.max()) <= quantiser.largest_sum < 1 << quantiser.sum_bits


def test_negating_an_update_negates_its_sum() -> None:
    """The grid is symmetric, so rounding has no bias."""
    update = torch.linspace(-1, 1, 101)
    quantiser = Quantiser(value_range=1.0, bits=7, max_devices=2)
    both = quantiser.quantise(update) + quantiser.quantise(-update)
    assert quantiser.dequantise_sum(both, 2).abs().max() == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_on_the_device(broken: float) -> None:
    """Clamping would turn infinity into a finite number."""
    with pytest.raises(AggregationError, match="1 of 2 values"):
        TINY.quantise(torch.tensor([0.0, broken]))


def test_only_non_empty_float_vectors_are_quantised() -> None:
    """Other shapes and types are refused."""
    for update in (torch.zeros(2, 2), torch.zeros(0), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(AggregationError, match="float vector"):
            TINY.quantise(update)


def test_impossible_sums_are_refused() -> None:
    """With 2 bits and two devices a coordinate lies in 0..4."""
    assert TINY.dequantise_sum(np.array([0, 4]), 2).tolist() == [-2.0, 2.0]
    for integers, count in (([0, 5], 2), ([-1, 0], 2), ([0, 0], 0), ([0, 0], 5)):
        with pytest.raises(AggregationError):
            TINY.dequantise_sum(np.array(integers), count)


@settings(max_examples=60, deadline=None)
@given(
    per_slot=st.integers(1, 6),
    width=st.integers(3, 10),
    length=st.integers(1, 50),
    devices=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packed_sums_unpack_to_the_sum_of_the_integers(
    per_slot: int, width: int, length: int, devices: int, seed: int
) -> None:
    """No carry crosses into a neighbour."""
    packing = Packing(width=width, per_slot=per_slot)
    top = ((1 << width) - 1) // devices
    updates = np.random.default_rng(seed).integers(0, top + 1, (devices, length))
    total = np.sum([packing.pack(update) for update in updates], axis=0)
    assert (packing.unpack(total, length) == updates.sum(axis=0)).all()
    assert total.shape == (packing.slots_for(length),)


def test_slots_that_are_not_a_sum_of_updates_are_refused() -> None:
    """A bit above the last integer, or anything in the padding."""
    packing = Packing(width=4, per_slot=2)
    slots = packing.pack(np.array([1, 2, 3]))
    overfull, padded = slots.copy(), slots.copy()
    overfull[0] += 1 << 8
    padded[1] += 1 << 4
    for hostile in (overfull, padded):
        with pytest.raises(AggregationError):
            packing.unpack(hostile, 3)
