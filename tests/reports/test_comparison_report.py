"""Comparisons over several seeds: intervals never narrower than those of single runs."""

from __future__ import annotations

import math

import pytest

from fedface.measurements import Interval, NotMeasured
from fedface.reports.comparison_report import over_seeds

NOTHING = NotMeasured(not_measured="needs 40 faces")


def run(estimate: float, half: float = 0.1) -> Interval:
    """One seed's metric."""
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, count=100)


def test_three_seeds_give_students_interval_of_their_spread() -> None:
    """Estimates 1, 2, 3: mean 2, standard error 1 / sqrt 3, and 4.3027 of them at two degrees of freedom."""
    found = over_seeds([run(1.0), run(2.0), run(3.0)])
    half = 4.302653 / math.sqrt(3)
    assert isinstance(found, Interval) and found.count == 300
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-5)


def test_equal_estimates_of_several_seeds_keep_their_sampling_error() -> None:
    """Three equal estimates have no variance; the sampling error of the faces remains, divided by sqrt 3."""
    found = over_seeds([run(2.0), run(2.0), run(2.0)])
    assert isinstance(found, Interval)
    assert (found.low, found.high) == pytest.approx((2.0 - 0.1 / math.sqrt(3), 2.0 + 0.1 / math.sqrt(3)))


def test_two_seeds_reach_from_the_lowest_to_the_highest_end() -> None:
    found = over_seeds([run(1.0), run(2.0)])
    assert isinstance(found, Interval)
    assert (found.estimate, found.low, found.high) == pytest.approx((1.5, 0.9, 2.1))


def test_one_seed_is_unchanged_and_none_gives_a_reason() -> None:
    assert over_seeds([run(1.0)]) == run(1.0)
    assert over_seeds([NOTHING, NOTHING]) == NOTHING
    partly = over_seeds([NOTHING, run(1.0)])
    assert isinstance(partly, NotMeasured) and "in 1 of 2 runs only" in partly.not_measured
    assert isinstance(over_seeds([]), NotMeasured)
