"""Intervals: known formulas, coverage on data with a known truth, and gaps without false alarms."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from fedface.audits.group_metrics import gap_between, mean_interval, metrics_by_group, rates_by_group
from fedface.measurements import Interval, NotMeasured, rate_interval
from fedface.randomness import Streams

STREAMS = Streams(11)


def test_wilsons_interval_has_its_textbook_values() -> None:
    """0 of 10 gives [0, z^2 / (n + z^2)]; 81 of 263 is Newcombe's (1998) example."""
    z2 = 1.959964**2
    none = rate_interval(0, 10)
    assert (none.low, none.high) == (0.0, pytest.approx(z2 / (10 + z2), rel=1e-5))
    newcombe = rate_interval(81, 263)
    assert (newcombe.low, newcombe.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    whole = rate_interval(10, 10)
    assert (whole.low, whole.high) == (pytest.approx(10 / (10 + z2), rel=1e-5), 1.0)


def test_a_mean_below_ten_photos_gets_students_interval() -> None:
    """1, 2, 3: mean 2, half width 4.302653 / sqrt 3."""
    interval = mean_interval([1, 2, 3], STREAMS.numpy("t"))
    assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert interval.is_small


@pytest.mark.parametrize("count", [5, 20, 60])
def test_intervals_of_a_mean_have_about_their_nominal_coverage(count: int) -> None:
    """300 skewed samples of a gamma distribution with mean 1; skewness costs a little coverage."""
    rng = STREAMS.numpy(f"coverage {count}")
    intervals = [mean_interval(rng.gamma(4, 0.25, size=count), rng, resamples=500) for _ in range(300)]
    coverage = np.mean([i.low <= 1 <= i.high for i in intervals])
    assert 0.89 <= coverage <= 0.985


def test_bca_leans_towards_the_long_tail() -> None:
    rng = STREAMS.numpy("skew")
    interval = mean_interval(rng.exponential(size=40), rng)
    assert interval.high - interval.estimate > interval.estimate - interval.low > 0


def test_equal_streams_give_equal_intervals() -> None:
    values = STREAMS.numpy("values").normal(size=30)
    first, second = (mean_interval(values, STREAMS.numpy("bootstrap")) for _ in range(2))
    assert first == second


def test_groups_keep_their_order_and_empty_ones_are_explicit() -> None:
    table = metrics_by_group([1.0, 3.0, 5.0], ["b", "b", "c"], STREAMS.numpy("g"), expected=["a", "b"])
    assert list(table) == ["a", "b", "c"]
    assert table["a"] == NotMeasured(not_measured="no photos")
    pair = table["b"]
    assert isinstance(pair, Interval) and pair.estimate == 2.0 and pair.count == 2 and pair.is_small
    assert table["c"] == NotMeasured(not_measured="only 1 photo, so no interval")
    rates = rates_by_group([1, 0, 1], ["b", "b", "c"], expected=["a"])
    assert rates["b"].estimate == 0.5 and isinstance(rates["a"], NotMeasured)


def test_gaps_of_equal_groups_cover_zero_despite_the_choice_of_extremes() -> None:
    """Clean negative: seven equal groups, 200 probes, at most about 5 % false alarms."""
    rng = STREAMS.numpy("ghosts")
    groups = [name for name in "abcdefg" for _ in range(20)]
    alarms = 0
    for _ in range(200):
        values = rng.normal(size=140)
        means = {name: values[[g == name for g in groups]].mean() for name in "abcdefg"}
        gap = gap_between(values, groups, means, rng, rate=False, draws=2000)
        assert gap is not None
        alarms += gap.clear
    assert alarms <= 20


def test_a_planted_gap_is_found_with_its_group_sign_and_size() -> None:
    rng = STREAMS.numpy("planted")
    groups = ["a"] * 30 + ["b"] * 30 + ["c"] * 30
    values = rng.normal(size=90) + 3.0 * np.array([group == "b" for group in groups])
    badness = {name: interval.estimate for name, interval in metrics_by_group(values, groups, rng).items()}
    gap = gap_between(values, groups, badness, rng, rate=False)
    assert gap is not None and gap.worst == "b" and gap.clear
    assert gap.difference.low < 3.0 < gap.difference.high and gap.difference.count == 60


def test_groups_without_a_failure_still_have_an_interval() -> None:
    """12 of 12 against 11 of 12 proves nothing; 60 of 60 against 30 of 60 does."""
    rng = STREAMS.numpy("rates")
    for count, hits, clear in ((12, 11, False), (60, 30, True)):
        values = [1.0] * count + [1.0] * hits + [0.0] * (count - hits)
        groups = ["a"] * count + ["b"] * count
        gap = gap_between(values, groups, {"a": -1.0, "b": -hits / count}, rng, rate=True)
        assert gap is not None and (gap.worst, gap.best, gap.clear) == ("b", "a", clear)


def test_small_groups_are_left_out_of_a_gap_where_larger_ones_exist() -> None:
    rng = STREAMS.numpy("small")
    values = [*rng.normal(size=40), 50.0, 51.0]
    groups = ["a"] * 20 + ["b"] * 20 + ["c"] * 2
    gap = gap_between(values, groups, {"a": 0.0, "b": 0.1, "c": 50.0}, rng, rate=False)
    assert gap is not None and gap.worst == "b"
    assert gap_between(values[:21], groups[:21], {"a": 0.0, "b": 1.0}, rng, rate=False) is None


def test_an_interval_is_plain_json() -> None:
    assert json.loads(json.dumps(asdict(Interval(1.0, 0.5, 2.0, 12)), allow_nan=False))["count"] == 12


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.inf], STREAMS.numpy("x"))
    with pytest.raises(ValueError, match="at least two values, got 1"):
        mean_interval([3.0], STREAMS.numpy("x"))
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        rate_interval(0, 0)
    with pytest.raises(ValueError, match=r"successes must lie in \[0, 3\], got 4"):
        rate_interval(4, 3)
