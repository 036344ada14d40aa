"""The distance of tones, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from fedface.audits.tone_distance import tone_distance

RNG = np.random.Generator(np.random.PCG64(3))


def test_moving_every_face_by_two_steps_is_a_distance_of_two() -> None:
    """Wasserstein-1 of a shift is the shift."""
    readings = RNG.normal(4.0, 1.0, 300)
    found = tone_distance(readings + 2.0, readings, RNG)
    assert found.estimate == pytest.approx(2.0) and found.low < 2.0 < found.high and found.count == 300


def test_one_middle_tone_differs_from_a_mixture_of_the_same_mean() -> None:
    """Half at 2, half at 8, against all at 5: every face must move by 3, though the means agree."""
    mixed = np.repeat([2.0, 8.0], 100)
    assert tone_distance(np.full(200, 5.0), mixed, RNG).estimate == pytest.approx(3.0)


def test_equal_sets_are_at_zero_and_two_samples_of_one_distribution_near_it() -> None:
    """The clean negative: the floor of n draws is about 1.1 sd / sqrt(n), here 0.035."""
    first, second = RNG.normal(5.0, 1.0, 1000), RNG.normal(5.0, 1.0, 1000)
    assert tone_distance(first, first, RNG).estimate == 0.0
    assert tone_distance(first, second, RNG).estimate < 4 * 0.035


def test_the_estimate_lies_in_its_interval_also_where_there_is_no_distance() -> None:
    """Equal kinds of 100 faces, where reflected resamples may all lie below the estimate."""
    for _ in range(30):
        found = tone_distance(RNG.normal(5.0, 1.0, 100), RNG.normal(5.0, 1.0, 100), RNG, resamples=100)
        assert 0.0 <= found.low <= found.estimate <= found.high


def test_the_interval_covers_the_truth_in_about_95_of_100_repetitions() -> None:
    """Two normals a step apart; 95 % of 60 repetitions, minus three standard deviations, is 52."""
    covered = 0
    for _ in range(60):
        found = tone_distance(RNG.normal(5.0, 1.0, 200), RNG.normal(6.0, 1.0, 200), RNG, resamples=200)
        covered += found.low <= 1.0 <= found.high
    assert covered >= 52


@pytest.mark.parametrize("generated", [[1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_too_few_or_unreadable_readings_are_refused(generated: list[float]) -> None:
    with pytest.raises(ValueError, match="generated"):
        tone_distance(generated, [1.0, 2.0], RNG)
