"""Partition of photos among devices: complete, disjoint, and as unequal as requested."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.photos.client_partition import ByGroup, Dirichlet, Even, Partition, partition

LABELS = ["a"] * 600 + ["b"] * 300 + ["c"] * 100


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shares(parts: list[np.ndarray]) -> list[Counter[str]]:
    return [Counter(LABELS[index] for index in part) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=0, max_size=60),
    devices=st.integers(1, 12),
    how=st.one_of(
        st.just(Even()), st.just(ByGroup()), st.floats(0.01, 100).map(lambda alpha: Dirichlet(alpha=alpha))
    ),
    seed=st.integers(0, 99),
)
def test_every_photo_goes_to_exactly_one_device(
    labels: list[str], devices: int, how: Partition, seed: int
) -> None:
    parts = partition(labels, devices, how, rng(seed))
    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = partition(labels, devices, how, rng(seed))
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


def test_even_parts_have_equal_sizes_and_everyones_groups() -> None:
    counts = shares(partition(LABELS, 4, Even(), rng()))
    assert all(sum(count.values()) == 250 for count in counts)
    assert all(110 < count["a"] < 190 for count in counts)  # 150 expected


def test_by_group_no_device_sees_two_groups_and_large_groups_get_more_devices() -> None:
    counts = shares(partition(LABELS, 10, ByGroup(), rng()))
    assert all(len(count) == 1 for count in counts)
    assert Counter(next(iter(count)) for count in counts) == {"a": 6, "b": 3, "c": 1}
    assert all(sum(count.values()) == 100 for count in counts)


def test_with_fewer_devices_than_groups_no_group_is_split() -> None:
    counts = shares(partition(LABELS, 2, ByGroup(), rng()))
    assert counts == [Counter(a=600), Counter(b=300, c=100)]


def test_a_large_alpha_is_even_and_a_small_one_is_not() -> None:
    even = shares(partition(LABELS, 5, Dirichlet(alpha=1e6), rng()))
    assert all(abs(count["a"] - 120) <= 2 and abs(count["b"] - 60) <= 2 for count in even)
    unequal = shares(partition(LABELS, 5, Dirichlet(alpha=0.01), rng()))
    assert max(count["a"] for count in unequal) > 500


def test_at_least_one_device_is_needed() -> None:
    with pytest.raises(ValueError, match="devices must be >= 1"):
        partition(LABELS, 0, Even(), rng())


def test_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number above 0"):
        Dirichlet(alpha=0)
