"""A plan meets its privacy target over all rounds, and its parameters are sent without an epsilon."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent
from priced import one_sum
from pytest import approx

from fedface.codec import CodecError, decode, encode
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import DPParameters, Plan, RunReleases, Schedule, attack_ceilings, make_plan
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget

SCHEDULE = Schedule(rounds=10, steps_per_round=5, sampling_rate=0.1, expected_batch_size=8, clip_norm=0.5)
TARGET = PrivacyTarget(epsilon=4.0, delta=1e-5)


def test_all_rounds_together_cost_at_most_the_target() -> None:
    plan = make_plan(TARGET, SCHEDULE)
    bounds = plan.epsilon()
    assert bounds is not None and 3.99 <= bounds.upper <= 4.0
    assert epsilon_of(plan.event(1), 1e-5).upper < 4.0
    assert plan.mechanism() == GaussianSum(clip_norm=0.5, sigma=plan.noise_multiplier)


def test_more_rounds_need_more_noise() -> None:
    longer = Schedule(rounds=40, steps_per_round=5, sampling_rate=0.1, expected_batch_size=8, clip_norm=0.5)
    assert make_plan(TARGET, longer).noise_multiplier > make_plan(TARGET, SCHEDULE).noise_multiplier


def test_without_dp_there_is_no_noise_and_epsilon_is_infinite() -> None:
    plan = make_plan(NoPrivacy(), SCHEDULE)
    assert plan.noise_multiplier == 0.0 and plan.epsilon() is None
    assert plan.mechanism() == ClippedSum(clip_norm=0.5)
    assert epsilon_of(plan.event(1), 1e-5).lower == float("inf")
    assert "NO PRIVACY GUARANTEE" in plan.describe()[-1]


def test_a_target_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="does not go with"):
        Plan(privacy=TARGET, schedule=SCHEDULE, noise_multiplier=0.0)


def test_the_description_of_a_plan_names_unit_delta_neighbours_and_bounds() -> None:
    words = " ".join(make_plan(TARGET, SCHEDULE).describe())
    for part in ("per photo", "delta 1e-5", "add or remove one", "(between ", "over the whole run"):
        assert part in words


def test_parameters_survive_the_wire_and_contain_no_epsilon() -> None:
    terms = make_plan(TARGET, SCHEDULE).dp_parameters
    record = encode(terms)
    assert decode(DPParameters, record, complete=True) == terms
    assert "epsilon" not in str(record)


@pytest.mark.parametrize(
    "change",
    [{"sampling_rate": 1.5}, {"rounds": 0}, {"steps_per_round": 10**6},
     {"noise_multiplier": -1.0}, {"noise_multiplier": float("nan")},
     {"clip_norm": float("inf")}, {"epsilon": 1.0}, {"rounds": float("inf")},
     {"unit": "house"}, {"update_clip_norm": 0.0},
     {"clip_norm": 1e-30}, {"clip_norm": 1e30}, {"noise_multiplier": 1e200}, {"expected_batch_size": 10**30}],
)  # fmt: skip
def test_parameters_out_of_bounds_are_refused(change: dict[str, float]) -> None:
    record = encode(DPParameters(schedule=SCHEDULE, noise_multiplier=1.0))
    outer = {key: value for key, value in change.items() if key in record}
    schedule = {**record["schedule"], **{key: value for key, value in change.items() if key not in record}}
    with pytest.raises(CodecError, match=next(iter(change))):
        decode(DPParameters, {**record, **outer, "schedule": schedule}, complete=True)


def test_half_of_the_rounds_cost_what_half_of_the_steps_cost() -> None:
    terms = DPParameters(schedule=SCHEDULE, noise_multiplier=1.0)
    half = DPParameters(
        schedule=Schedule(
            rounds=5, steps_per_round=5, sampling_rate=0.1, expected_batch_size=8, clip_norm=0.5
        ),
        noise_multiplier=1.0,
    )
    assert epsilon_of(terms.event(5), 1e-5) == epsilon_of(half.event(), 1e-5)
    assert epsilon_of(terms.event(5), 1e-5).upper == approx(epsilon_of(terms.event(5), 1e-5).lower, abs=0.02)


def test_ceilings_name_their_event() -> None:
    """The demo's recipe at delta 1e-4, 100 candidates: recomputed independently for each event."""
    schedule = Schedule(
        rounds=6, steps_per_round=4, sampling_rate=0.064, expected_batch_size=64, clip_norm=1.0
    )
    dp = DPParameters(schedule=schedule, noise_multiplier=0.5556)
    known = {
        "one step that surely holds the photo": 0.300,
        "one step that the photo joins with probability 0.064": 0.0285,
        "one update of 4 steps, all of which hold the photo": 0.899,
        "one update of 4 steps": 0.0503,
        "all 6 updates of the run": 0.132,
    }
    ceilings = {each.given: each.ceiling for each in attack_ceilings(RunReleases(training=dp), 100)}
    assert list(ceilings) == list(known)
    for given, ceiling in known.items():
        assert ceilings[given] == approx(ceiling, rel=0.01), given
    both = attack_ceilings(RunReleases(training=dp, evaluation=one_sum(rounds=2, sigma=2.0)), 100)
    assert both[-1].given.startswith("everything that the run releases") and both[-1].ceiling > 0.15
    assert attack_ceilings(RunReleases(training=replace(dp, noise_multiplier=0.0)), 100) == ()


def test_noise_and_rates_are_numbers_of_a_public_grid() -> None:
    for change in ({"noise_multiplier": 1.23456}, {"noise_multiplier": 2e4}):
        with pytest.raises(ValueError, match="noise_multiplier must"):
            DPParameters(**{"schedule": SCHEDULE, "noise_multiplier": 1.0, **change})
    with pytest.raises(
        ValueError, match="sampling_rate must have at most 4 significant digits, such as 0.1235"
    ):
        replace(SCHEDULE, sampling_rate=0.123456)


def test_no_round_is_free_however_large_its_noise() -> None:
    """Ten thousand rounds with next to no signal cost as much as one Gaussian sum with multiplier 2."""
    schedule = replace(SCHEDULE, rounds=10_000, sampling_rate=1e-4, steps_per_round=1)
    dp = DPParameters(schedule=schedule, noise_multiplier=1e4)
    assert epsilon_of(dp.event(), 1e-5).upper == approx(
        epsilon_of(GaussianDpEvent(2.0), 1e-5).upper, rel=1e-3
    )
