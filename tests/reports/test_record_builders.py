"""What the audits return goes into the record unchanged, and what has no bound says so."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from fedface import number_format
from fedface.audits.gradient_inversion import AttackResult, CosineSearch, Defense, NoDefense
from fedface.audits.group_metrics import rate_interval
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.accounting import reconstruction_success_bound
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.plan import Schedule, make_plan
from fedface.privacy.privacy_target import NoPrivacy as NoTarget
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.reports import formatting, record_builders
from fedface.reports.run_record import NoPrivacyRecord, PlanRecord

SCHEDULE = Schedule(rounds=2, steps_per_round=3, sampling_rate=0.1, expected_batch_size=10, clip_norm=1.0)


def an_attack(defence: Defense, gain: Interval) -> AttackResult:
    """A made-up result. FIXTURE: no number in it was measured."""
    some = Interval(12.0, 11.0, 13.0, 4)
    blank = torch.zeros(4, 3, 16, 16)
    return AttackResult(
        defense=defence,
        search=CosineSearch(),
        truth=blank,
        recovered=blank,
        guess=blank,
        psnr=some,
        ssim=some,
        baseline_psnr=some,
        baseline_ssim=some,
        gain=gain,
    )


def test_a_plan_with_a_promise_keeps_its_numbers_and_its_price_is_within_the_target() -> None:
    plan = make_plan(PrivacyTarget(epsilon=5.0, delta=1e-5), SCHEDULE)
    kept = record_builders.plan_record(plan)
    assert isinstance(kept, PlanRecord)
    assert kept.noise_multiplier == plan.noise_multiplier
    assert (kept.rounds, kept.steps_per_round, kept.sampling_rate) == (2, 3, 0.1)
    assert kept.epsilon.upper <= kept.target_epsilon == 5.0
    assert kept.epsilon.delta == 1e-5


def test_a_plan_without_noise_is_written_as_no_promise() -> None:
    assert isinstance(record_builders.plan_record(make_plan(NoTarget(), SCHEDULE)), NoPrivacyRecord)


def test_an_infinite_epsilon_is_not_a_number_in_the_record() -> None:
    bounds = Epsilon(lower=1.0, estimate=math.inf, upper=math.inf, delta=1e-5, unit="photo")
    assert isinstance(bounds.measured(), NotMeasured)
    assert bounds.to_record()["upper"] == "infinite" and "no privacy guarantee" in str(bounds)


def test_an_attack_keeps_its_numbers_and_the_theorems_ceiling() -> None:
    defence = GaussianSum(clip_norm=1.0, sigma=1.0)
    gain, gallery = Interval(-3.0, -4.0, -2.0, 4), rate_interval(3, 200)
    kept = record_builders.attack_record(
        an_attack(defence, gain), gallery, gallery_size=100, weights_hash="ab" * 32, pictures=()
    )
    assert asdict(kept.gain) == asdict(gain)
    assert asdict(kept.gallery) == asdict(gallery)
    assert kept.gallery_ceiling == reconstruction_success_bound(defence.event(), 0.01)
    assert kept.defense == "DP sigma=1"
    assert "does not prove" in kept.sentence
    assert "which chance alone explains" in kept.sentence


def test_an_attack_without_defence_has_no_ceiling_below_certainty() -> None:
    gain = Interval(6.0, 4.0, 8.0, 4)
    kept = record_builders.attack_record(
        an_attack(NoDefense(), gain),
        rate_interval(20, 20),
        gallery_size=100,
        weights_hash="ab" * 32,
        pictures=(),
    )
    assert kept.gallery_ceiling == 1.0
    assert "more often than chance" in kept.sentence


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.01, "1.0 %"), (0.5, "50 %"), (0.999638, "99.96 %"), (1 - 3e-7, "99.99997 %"), (1.0, "100 %")],
)
def test_a_share_close_to_all_is_never_rounded_up_to_all(share: float, text: str) -> None:
    assert number_format.percent(share).replace(number_format.SPACE, " ") == text


def test_an_epsilon_of_sixty_bounds_nothing_and_says_so() -> None:
    """1 / (1 + e^-60) is 1 to the last bit."""
    words = formatting.meaning(Epsilon(lower=60.0, estimate=60.0, upper=60.0, delta=1e-3, unit="photo"))
    assert "at most 100\N{NO-BREAK SPACE}% sure" in words and "weak bound" in words


def test_epsilon_one_turns_an_even_bet_into_at_most_73_percent() -> None:
    """e / (1 + e) = 0.731."""
    words = formatting.meaning(Epsilon(lower=1.0, estimate=1.0, upper=1.0, delta=1e-5, unit="photo"))
    assert "at most 73.2" in words and "1 in 100,000" in words and "weak" not in words
