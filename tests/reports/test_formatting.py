"""Numbers and sentences of reports: bounds are rounded outwards, and a failed attack proves nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from made_up import around, attacks

from fedface import number_format
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.plan import DPParameters, Schedule
from fedface.reports import formatting

DP = DPParameters(
    schedule=Schedule(rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=1, clip_norm=1.0),
    noise_multiplier=1.0,
)


def test_an_infinite_epsilon_is_not_a_number_in_the_record() -> None:
    bounds = Epsilon(lower=1.0, estimate=math.inf, upper=math.inf, delta=1e-5, unit="photo")
    assert isinstance(bounds.measured(), NotMeasured)
    assert bounds.to_record()["upper"] == "infinite" and "no privacy guarantee" in str(bounds)


def test_an_attack_that_failed_does_not_prove_that_none_could_succeed() -> None:
    plain, noised = attacks()
    assert formatting.defense_label(noised.scores.defense) == "DP sigma=1"
    assert "does not prove" in formatting.attack_description(noised)
    assert "closer to the photos" in formatting.attack_description(plain)


def test_identification_is_compared_with_guessing() -> None:
    plain, noised = attacks()
    guessing = replace(noised.identification, rate=Interval(0.015, 0.005, 0.04, 200))
    assert "no more often than guessing" in formatting.identification_sentence(
        guessing, noised.scores.defense
    )
    assert "more often than guessing" in formatting.identification_sentence(
        plain.identification, plain.scores.defense
    )
    unclear = replace(plain.scores, gain=around(0.1, 1.0, 6))
    assert "about as much as a guess" in formatting.inversion_sentence(unclear)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.01, "1.0 %"), (0.5, "50 %"), (0.999638, "99.96 %"), (1 - 3e-7, "99.99997 %"), (1.0, "100 %")],
)
def test_a_share_close_to_one_is_never_rounded_up_to_one(share: float, text: str) -> None:
    assert number_format.percent(share).replace(number_format.SPACE, " ") == text


def test_an_epsilon_of_sixty_is_reported_as_no_bound() -> None:
    """1 / (1 + e^-60) is 1 to the last bit."""
    words = formatting.meaning(Epsilon(lower=60.0, estimate=60.0, upper=60.0, delta=1e-3, unit="photo"), DP)
    assert "at most 100\N{NO-BREAK SPACE}% sure" in words and "weak bound" in words


def test_epsilon_one_bounds_a_prior_of_one_half_by_73_percent() -> None:
    """e / (1 + e) = 0.731."""
    words = formatting.meaning(Epsilon(lower=1.0, estimate=1.0, upper=1.0, delta=1e-5, unit="photo"), DP)
    assert "at most 73.2" in words and "1 in 100,000" in words and "weak" not in words
