"""Runs that a server chooses knowing earlier answers stay within a budget; composition alone does not bound that."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from priced import gaussian, one_sum, sampled
from pytest import approx
from scipy.stats import norm

from fedface.errors import LedgerError, PolicyRefusal
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import PlannedRound
from fedface.privacy.plan import DPParameters, RunReleases, Schedule
from fedface.privacy.releases import Release, compose, flatten_event
from fedface.privacy.renyi_filter import (
    epsilon_overhead,
    filter_epsilon,
    filter_order,
    renyi_divergence,
    within_filter,
)

DELTA = 1e-5


def test_a_gaussian_release_has_its_closed_form() -> None:
    """Mironov (2017), Proposition 7: order / (2 sigma^2)."""
    assert renyi_divergence(Release("gaussian", 2.0, 1.0), 3.0) == approx(3.0 / 8.0)


@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.064), (1.0, 0.01), (5.0, 0.2)])
@pytest.mark.parametrize("order", [2, 3, 8, 30])
def test_a_sampled_gaussian_agrees_with_the_binomial_sum_of_another_library(
    sigma: float, q: float, order: int
) -> None:
    """Mironov, Talwar and Zhang (2019), section 3.3, at integer orders."""
    accountant = RdpAccountant([order]).compose(sampled(sigma, q, 1))
    (release, _), = flatten_event(sampled(sigma, q, 1))  # fmt: skip
    assert renyi_divergence(release, order) == approx(accountant._rdp[0], rel=1e-6)


def test_replacing_a_sampled_unit_agrees_with_a_slow_sum() -> None:
    """(1-q) N(0) + q N(1) beside (1-q) N(0) + q N(-1), summed over a fine grid without logarithms."""
    sigma, q, order = 1.2, 0.3, 4.0
    at = np.linspace(-15, 15, 300_001)
    one, other = ((1 - q) * norm.pdf(at, 0, sigma) + q * norm.pdf(at, mean, sigma) for mean in (1, -1))
    slow = math.log((one**order * other ** (1 - order)).sum() * (at[1] - at[0])) / (order - 1)
    assert renyi_divergence(Release("swapped", sigma, q), order) == approx(slow, rel=1e-6)


def test_the_order_minimises_what_a_gaussian_run_costs_up_to_its_fixed_share() -> None:
    """At the order itself a Gaussian's budget is stationary: neighbours of it admit less."""
    best = 1.0 + (filter_order(8.0, DELTA) - 1.0) / 0.8
    admitted = [(8.0 - epsilon_overhead(order, DELTA)) / order for order in (best - 0.05, best, best + 0.05)]
    assert max(admitted) == admitted[1]


@pytest.mark.parametrize(
    ("event", "exact"),
    [
        (compose([sampled(0.6092, 0.064, 24)]), 8.0),
        (gaussian(4.0, 30), None),
        (sampled(1.0, 0.01, 3000), None),
    ],
)
def test_several_charges_cost_more_than_their_distribution_says_and_never_less(
    event: dp.DpEvent, exact: float | None
) -> None:
    counted = filter_epsilon([(event, 1)], DELTA)
    truth = epsilon_of(event, DELTA).upper
    assert exact is None or truth == approx(exact, abs=0.01)
    assert truth < counted < 1.6 * truth
    assert within_filter([(event, 1)], counted, DELTA) and not within_filter(
        [(event, 1)], 0.99 * counted, DELTA
    )


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert filter_epsilon([], DELTA) == 0.0
    assert filter_epsilon([(dp.NonPrivateDpEvent(), 1)], DELTA) == math.inf
    assert not within_filter([(dp.NonPrivateDpEvent(), 1)], 1e9, DELTA)


# The counterexample. A first release is observed, and the server then chooses one of several kinds of runs, each of
# which fits the budget beside the first by the privacy loss distribution of what was used in the end.

EPSILON = 3.0
FIRST = 1.6  # noise multiplier of the first release, a Gaussian sum
KINDS = [(1.0, 1), (0.3, 4), (0.064, 24), (0.01, 200)]  # sampling rate and steps of the runs to choose from


def steps(sigma: float, q: float, count: int) -> dp.DpEvent:
    return sampled(sigma, q, count) if q < 1 else gaussian(sigma, count)


def least_noise(fits: object, q: float, count: int) -> float:
    """The smallest noise multiplier, to half a percent, of a run that is admitted after the first release."""
    low, high = 0.2, 50.0
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(steps(middle, q, count)) else (middle, high)  # type: ignore[operator]
    return high


def adaptive_delta(noises: list[float]) -> float:
    """Delta at EPSILON of the best choice among the kinds for every outcome of the first release, both directions.

    delta = E_P [max over kinds of delta_kind(EPSILON - loss)], where P is the first release's distribution with (or
    without) the unit and loss its privacy loss at the outcome.
    """
    at = np.linspace(-12.0 * FIRST, 12.0 * FIRST + 1.0, 801)
    worst = 0.0
    for mean, other in ((1.0, 0.0), (0.0, 1.0)):
        loss = ((at - other) ** 2 - (at - mean) ** 2) / (2.0 * FIRST**2)
        left = []
        for (q, count), sigma in zip(KINDS, noises, strict=True):
            one = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-3)
            many = one.self_compose(count) if count > 1 else one
            side = many._pmf_remove if mean == 1.0 else many._pmf_add
            left.append([side.get_delta_for_epsilon(float(EPSILON - part)) for part in loss])
        density = norm.pdf(at, mean, FIRST) * (at[1] - at[0])
        worst = max(worst, float((density * np.max(left, axis=0)).sum()))
    return worst


@pytest.fixture(scope="module")
def first() -> dp.DpEvent:
    return one_sum(sigma=FIRST).event()


def test_the_composition_of_what_was_used_does_not_bound_an_adaptive_server(first: dp.DpEvent) -> None:
    """Every kind alone keeps (3, 1e-5) beside the first release; the best choice for each outcome does not."""

    def fits(event: dp.DpEvent) -> bool:
        return epsilon_of(compose([first, event]), DELTA).upper <= EPSILON

    noises = [least_noise(fits, q, count) for q, count in KINDS]
    for sigma, kind in zip(noises, KINDS, strict=True):
        assert fits(steps(sigma, *kind))
    assert adaptive_delta(noises) > 1.3 * DELTA


def test_the_filter_bounds_an_adaptive_server(first: dp.DpEvent) -> None:
    """Of what the filter admits after the first release, the best choice for each outcome keeps the budget."""

    def fits(event: dp.DpEvent) -> bool:
        return within_filter([(first, 1), (event, 1)], EPSILON, DELTA)

    assert adaptive_delta([least_noise(fits, q, count) for q, count in KINDS]) <= DELTA


def run(key: str, sigma: float, q: float, count: int, rounds: int = 1) -> PlannedRound:
    schedule = Schedule(
        rounds=rounds, steps_per_round=count, sampling_rate=q, expected_batch_size=1, clip_norm=1.0
    )
    sigma = float(f"{sigma:.4g}")
    return PlannedRound(
        key=key,
        round=1,
        releases=RunReleases(training=DPParameters(schedule=schedule, noise_multiplier=sigma)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_ledger_refuses_a_second_run_that_only_the_composition_would_admit(
    tmp_path: Path, first: dp.DpEvent, kind: tuple[float, int]
) -> None:
    """After any answer of the first run; and it admits one that the filter does."""
    ledger, budget = Ledger.open(tmp_path / "ledger.sqlite"), [Budget(epsilon=EPSILON, delta=DELTA)]
    ledger.record_round(run("first", FIRST, 1.0, 1), budget)

    def composed(event: dp.DpEvent) -> bool:
        return epsilon_of(compose([first, event]), DELTA).upper <= EPSILON

    def filtered(event: dp.DpEvent) -> bool:
        return within_filter([(first, 1), (event, 1)], EPSILON, DELTA)

    with pytest.raises(PolicyRefusal, match="is already spent"):
        ledger.record_round(run("second", least_noise(composed, *kind), *kind), budget)
    ledger.record_round(run("second", 1.01 * least_noise(filtered, *kind), *kind), budget)


def test_a_run_alone_is_admitted_by_its_distribution_and_leaves_no_room(tmp_path: Path) -> None:
    """Its parameters are fixed before its first answer, so that it costs exactly what its plan says."""
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    whole = run("family", 0.936, 0.064, 4, rounds=6)
    cost = epsilon_of(whole.releases.event(), DELTA).upper
    budget = [Budget(epsilon=cost + 1e-6, delta=DELTA)]
    assert not within_filter([(whole.releases.event(), 1)], budget[0].epsilon, DELTA)
    ledger.record_round(whole, budget)
    assert ledger.spent(DELTA).upper == cost
    with pytest.raises(PolicyRefusal):
        ledger.record_round(run("other", 9999.0, 0.01, 1), budget)


def test_a_run_is_what_it_was_recorded_as(tmp_path: Path) -> None:
    """More rounds, less noise, another rate or metrics that were not announced are a new run."""
    ledger, budget = Ledger.open(tmp_path / "ledger.sqlite"), [Budget(epsilon=50.0, delta=DELTA)]
    ledger.record_round(run("family", 1.0, 0.1, 4, rounds=3), budget)
    terms = run("family", 1.0, 0.1, 4, rounds=3).releases
    changed = [
        run("family", 1.0, 0.1, 4, rounds=4),
        run("family", 1.1, 0.1, 4, rounds=3),
        run("family", 1.0, 0.2, 4, rounds=3),
        PlannedRound(
            key="family/metrics",
            round=1,
            releases=RunReleases(training=terms.training, evaluation=one_sum()),
        ),
    ]
    for planned in changed:
        with pytest.raises(PolicyRefusal, match="A change is a new run"):
            ledger.record_round(planned, budget)
    for number in (2, 3):
        ledger.record_round(PlannedRound(key="family", round=number, releases=terms), budget)
    assert ledger.spent(DELTA) == epsilon_of(terms.event(), DELTA)


def test_the_unit_and_delta_of_a_ledger_stay_those_of_its_first_run(tmp_path: Path) -> None:
    """A delta of 1e-2 would admit what 1e-5 refuses; a larger epsilon is the owner's to give."""
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    ledger.record_round(run("a", 4.0, 1.0, 1), [Budget(epsilon=2.0, delta=DELTA)])
    for changed in (Budget(epsilon=2.0, delta=1e-2), Budget(epsilon=2.0, delta=DELTA, unit="library")):
        with pytest.raises(LedgerError, match="per photo at delta 1e-05 since"):
            ledger.record_round(run("b", 4.0, 1.0, 1), [changed])
        with pytest.raises(LedgerError, match="per photo at delta 1e-05 since"):
            ledger.check_round(run("b", 4.0, 1.0, 1), [changed])
    ledger.record_round(run("b", 4.0, 1.0, 1), [Budget(epsilon=5.0, delta=DELTA)])
    assert [entry.run for entry in ledger.entries()] == ["a", "b"]


def test_a_run_that_fits_a_period_counts_there_once_and_a_longer_one_round_by_round(tmp_path: Path) -> None:
    """Otherwise a run at exactly a month's budget, which a filter counts higher, would pause within the month."""
    today = datetime(2031, 5, 1, tzinfo=UTC)
    ledger = Ledger.open(tmp_path / "ledger.sqlite", now=lambda: today)
    short, long = run("short", 1.6, 0.064, 4, rounds=6), run("long", 1.6, 0.064, 4, rounds=40)
    cost = epsilon_of(short.releases.event(), DELTA).upper
    life = Budget(epsilon=20.0, delta=DELTA)
    month = Budget(epsilon=cost + 1e-6, delta=DELTA, days=30)
    for number in range(1, 7):
        ledger.record_round(replace(short, round=number), [life, month])
    assert ledger.spent_against(month).upper == cost
    with pytest.raises(PolicyRefusal, match="in any 30 days"):
        ledger.record_round(long, [life, month])
    today += timedelta(days=32)
    done = 0
    with pytest.raises(PolicyRefusal, match="in any 30 days"):
        for done in range(40):
            ledger.record_round(replace(long, round=done + 1), [life, month])
    one = long.dp.event(1)
    assert within_filter([(one, done)], month.epsilon, DELTA)
    assert not within_filter([(one, done + 1)], month.epsilon, DELTA)
