"""Privacy costs against closed forms, and against numbers published or measured elsewhere."""

from __future__ import annotations

import math
import time

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from priced import analytic_epsilon, gaussian, sampled
from pytest import approx
from scipy.optimize import brentq
from scipy.stats import norm

from fedface.errors import PrivacyError
from fedface.privacy.accounting import (
    calibrate_noise_multiplier,
    epsilon_of,
    reconstruction_success_bound,
    within_budget,
)
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy.releases import compose, event_from_json, event_to_json


@pytest.mark.parametrize(("sigma", "delta"), [(0.3, 1e-5), (1.0, 1e-3), (1.0, 1e-8), (100.0, 1e-5)])
def test_one_gaussian_has_the_cost_of_the_closed_form(sigma: float, delta: float) -> None:
    bounds, exact = epsilon_of(gaussian(sigma), delta), analytic_epsilon(sigma, delta)
    assert bounds.lower <= exact * (1 + 1e-9) and exact <= bounds.upper * (1 + 1e-9)
    assert bounds.estimate == approx(exact, rel=1e-3)


def test_four_equal_gaussian_rounds_cost_as_much_as_one_with_half_the_noise() -> None:
    """Gaussian events compose by adding 1/sigma^2."""
    assert epsilon_of(gaussian(2.0, 4), 1e-5).upper == approx(epsilon_of(gaussian(1.0), 1e-5).upper, abs=1e-9)
    unequal = compose([gaussian(2.0, 2), gaussian(math.sqrt(2.0))])
    assert epsilon_of(unequal, 1e-5).upper == approx(epsilon_of(gaussian(1.0), 1e-5).upper, rel=1e-6)


def test_sampling_rate_one_is_no_sampling() -> None:
    everybody = epsilon_of(sampled(1.0, 1.0, 4), 1e-5).upper
    assert everybody == approx(epsilon_of(gaussian(0.5), 1e-5).upper, rel=1e-6)


def test_one_sampled_gaussian_step_has_the_cost_of_the_mixture() -> None:
    """delta(eps) of removing a unit, by quadrature of the two densities on a fine grid."""
    sigma, q, delta = 1.0, 0.2, 1e-5
    x = [i * 1e-3 - 12.0 for i in range(25_000)]
    null, moved = norm.pdf(x), norm.pdf([v - 1.0 / sigma for v in x])

    def excess(epsilon: float) -> float:
        mixture = (1 - q) * null + q * moved
        return float((mixture - math.exp(epsilon) * null).clip(min=0).sum() * 1e-3 - delta)

    exact = brentq(excess, 0.0, 20.0)
    bounds = epsilon_of(sampled(sigma, q, 1), delta)
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.estimate == approx(exact, rel=1e-4)


@pytest.mark.parametrize(("steps", "epsilon"), [(10_000, 6.19), (1_000, 1.83)])
def test_long_runs_agree_with_other_accountants(steps: int, epsilon: float) -> None:
    bounds = epsilon_of(sampled(1.0, 0.01, steps), 1e-5)
    assert bounds.upper == approx(epsilon, abs=0.005)
    assert bounds.lower <= bounds.estimate <= bounds.upper


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "epsilon"),
    [
        (0.7, 0.01, 120, 1e-5, 2.4612381),
        (0.7, 1.0, 2, 1e-5, 10.1224946),
        (1.0, 0.0064, 782, 1e-6, 1.199),
        (1.0, 1.0, 5, 1e-6, 12.595),
        (4.0, 0.01, 10_000, 4.243484e-6, 1.0),
        (2.0, 0.01, 10_000, 0.0102249112, 1.0),
        (2.0, 0.01, 10_000, 0.0228503396, 0.8),
        (2.0, 0.02, 10_000, 0.1499173297, 1.0),
    ],
)
def test_published_costs_are_reproduced(
    sigma: float, q: float, steps: int, delta: float, epsilon: float
) -> None:
    """Tests of tensorflow/privacy (compute_dp_sgd_privacy_test.py, its PLD values; for the third and fourth its
    sigma 2 halved by microbatches), and example and tests of DPBayes/PLD-Accountant (Koskela et al. 2020).
    """
    bounds = epsilon_of(sampled(sigma, q, steps), delta)
    assert bounds.upper == approx(epsilon, abs=6e-4)
    assert bounds.lower <= epsilon


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "epsilon"),
    [
        (
            4.0,
            0.01,
            10_000,
            1.26,
        ),  # Abadi et al. (2016), Section 5.1: the moments accountant after 100 epochs
        (
            1.3,
            256 / 60_000,
            4_687,
            1.34,
        ),  # Bu et al. (2020), Figure 4: the moments accountant, 20 epochs of MNIST
        (1.3, 150 / 60_000, 6_000, 0.7242234),  # tensorflow/privacy's test, Renyi
    ],
)
def test_looser_published_bounds_lie_above_ours(sigma: float, q: float, steps: int, epsilon: float) -> None:
    bounds = epsilon_of(sampled(sigma, q, steps), 1e-5)
    assert 0.7 * epsilon < bounds.upper < epsilon


@pytest.mark.parametrize(
    "event",
    [
        sampled(0.8, 0.02, 50),
        sampled(2.0, 0.3, 40),
        gaussian(3.0, 12),
        compose([sampled(1.0, 0.1, 30), gaussian(5.0, 3), gaussian(4.0)]),
    ],
)
def test_the_renyi_accountant_is_never_lower(event: dp.DpEvent) -> None:
    """Its conversion is not tight, so its epsilon is higher, by less than half here."""
    renyi = RdpAccountant().compose(event).get_epsilon(1e-5)
    bounds = epsilon_of(event, 1e-5)
    assert bounds.upper <= renyi < 1.5 * bounds.upper


@pytest.mark.parametrize("epsilon", [0.5, 1.5, 3.0])
def test_three_different_releases_agree_with_integration(
    epsilon: float,
) -> None:
    """Two sampled Gaussians and a Gaussian: the hockey-stick, summed over a grid in three dimensions.

    The unit is removed or added; the worse of both is the price.
    """
    sigma, q, evaluation, moments = 0.8, 0.3, 1.5, 2.0

    def densities(deviation: float, rate: float) -> tuple[np.ndarray, np.ndarray, float]:
        at = np.linspace(-7.0 * deviation, 7.0 * deviation + 1.0, 121)
        without = norm.pdf(at, 0, deviation)
        return (1 - rate) * without + rate * norm.pdf(at, 1, deviation), without, at[1] - at[0]

    axes = [densities(sigma, q), densities(evaluation, 1.0), densities(moments, 0.5)]
    p, r = (np.einsum("i,j,k->ijk", *(axis[side] for axis in axes)) for side in (0, 1))
    truth = max(
        (p - math.exp(epsilon) * r).clip(min=0).sum(), (r - math.exp(epsilon) * p).clip(min=0).sum()
    ) * math.prod(axis[2] for axis in axes)
    event = compose([sampled(sigma, q, 1), gaussian(evaluation), sampled(moments, 0.5, 1)])
    assert epsilon_of(event, float(truth)).estimate == approx(epsilon, abs=3e-3)


def test_ten_rounds_compose_to_less_than_their_sum() -> None:
    rounds = [sampled(1.0, 0.01, 100)] * 10
    assert epsilon_of(compose(rounds), 1e-5).upper == approx(1.83, abs=0.005)
    assert sum(epsilon_of(r, 1e-5).upper for r in rounds) == approx(7.18, abs=0.01)


@pytest.mark.parametrize(("rounds", "delta"), [(50_000, 1e-10), (50_000, 1e-5), (5_000, 1e-10)])
def test_a_hundred_million_releases_have_an_upper_bound_near_the_central_limit(
    rounds: int, delta: float
) -> None:
    """Rounds of 2,000 steps at rate q: mu^2 = n q^2 (exp(sigma^-2) - 1) (Bu et al. 2020, arXiv:1911.11607)."""
    q, sigma, steps = 1e-4, 2.0, 2_000 * rounds
    mu = q * math.sqrt(steps * math.expm1(sigma**-2))
    bounds, exact = epsilon_of(sampled(sigma, q, steps), delta), analytic_epsilon(1 / mu, delta)
    assert 0.0 <= bounds.lower <= exact <= bounds.upper < 1.15 * exact
    assert within_budget(sampled(sigma, q, steps), bounds.upper, delta)
    kappa = 1e-3
    ceiling = reconstruction_success_bound(sampled(sigma, q, steps), kappa)
    assert norm.cdf(norm.ppf(kappa) + mu) <= ceiling < 2 * norm.cdf(norm.ppf(kappa) + mu)


def test_losses_that_are_rounded_far_down_have_the_lower_bound_zero() -> None:
    """A million steps with little noise, whose coarse grid loses half a step each."""
    bounds = epsilon_of(sampled(0.5, 0.9, 10**6), 1e-5)
    assert bounds.lower == 0.0 and math.isfinite(bounds.upper)


def test_no_release_costs_zero_and_no_noise_costs_infinity() -> None:
    assert epsilon_of(compose([]), 1e-5).upper == 0.0
    assert epsilon_of(compose([gaussian(1.0), dp.NonPrivateDpEvent()]), 1e-5).lower == math.inf
    assert epsilon_of(dp.GaussianDpEvent(0.0), 1e-5).lower == math.inf


@pytest.mark.parametrize(
    "event",
    [
        dp.UnsupportedDpEvent(),
        dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.0)),
        dp.PoissonSampledDpEvent(0.1, dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 3)),
        dp.PoissonSampledDpEvent(0.1, dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.0))),
        dp.GaussianDpEvent(math.nan),
        gaussian(1.0, -1),
        gaussian(1.0, 10**12),
    ],
)
def test_events_without_a_known_cost_are_refused(event: dp.DpEvent) -> None:
    with pytest.raises(PrivacyError):
        epsilon_of(event, 1e-5)


@pytest.mark.parametrize(
    "event",
    [sampled(0.005, 0.5, 100_000), sampled(0.0011, 0.9, 10**8), gaussian(1.0, 10**9), gaussian(0.002, 10**6)],
)
def test_a_loss_beyond_every_grid_is_infinite_and_no_error(event: dp.DpEvent) -> None:
    """Any request of a server must have a cost."""
    assert epsilon_of(event, 1e-5).upper == math.inf
    assert not within_budget(event, 1e6, 1e-5)
    assert reconstruction_success_bound(event, 0.1) == 1.0


@pytest.mark.parametrize("sigma", [1e-300, 1e-4, 0.05, 1e5])
def test_the_cost_of_extreme_noise_is_computed_quickly(sigma: float) -> None:
    """A server must not be able to keep a device busy with absurd parameters."""
    start = time.process_time()
    assert epsilon_of(sampled(sigma, 0.5, 100_000), 1e-5).upper >= 0.0
    assert time.process_time() - start < 10.0


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"),
    [(1.0, 0.01, 1000), (10.0, 0.5, 20), (3.0, 1.0, 10), (0.05, 0.05, 100), (30.0, 0.2, 5)],
)
def test_calibrated_noise_is_the_least_of_four_digits_that_keeps_epsilon(
    epsilon: float, q: float, steps: int
) -> None:
    target = PrivacyTarget(epsilon=epsilon, delta=1e-5)
    sigma = calibrate_noise_multiplier(target, lambda s: sampled(s, q, steps))
    step = 10.0 ** (math.floor(math.log10(sigma)) - 3)
    assert sigma == float(f"{sigma:.4g}")
    assert epsilon_of(sampled(sigma, q, steps), target.delta).upper <= epsilon
    assert epsilon_of(sampled(sigma - step, q, steps), target.delta).upper > epsilon


def test_calibrated_noise_of_one_gaussian_is_the_analytic_one() -> None:
    """Balle & Wang (2018): the sigma at which the closed form gives epsilon exactly."""
    sigma = calibrate_noise_multiplier(PrivacyTarget(epsilon=1.0, delta=1e-5), dp.GaussianDpEvent)
    assert analytic_epsilon(sigma, 1e-5) == approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("sigma", "kappa"), [(0.7, 0.9), (1.0, 1 / 256), (1.0, 0.5), (4.0, 0.1)])
def test_the_reconstruction_bound_of_one_gaussian_is_its_trade_off(kappa: float, sigma: float) -> None:
    """Hayes et al. (2023): Phi(Phi^-1(kappa) + 1/sigma)."""
    exact = float(norm.cdf(norm.ppf(kappa) + 1 / sigma))
    ceiling = reconstruction_success_bound(dp.GaussianDpEvent(sigma), kappa)
    assert exact - 1e-9 <= ceiling <= exact + 1e-4


def test_reconstruction_bounds_at_the_ends() -> None:
    assert reconstruction_success_bound(compose([]), 0.1) == 0.1
    assert reconstruction_success_bound(dp.NonPrivateDpEvent(), 0.1) == 1.0
    assert reconstruction_success_bound(sampled(1.0, 0.01, 1000), 1 / 256) == approx(0.013, abs=0.0005)
    assert reconstruction_success_bound(sampled(1.0, 0.01, 1000), 0.1) == approx(0.19, abs=0.005)


def test_an_event_survives_the_ledger() -> None:
    event = compose([sampled(1.1, 0.3, 12), gaussian(2.0), sampled(3.0, 0.1, 1), gaussian(2.0)])
    text = event_to_json(event)
    assert event_to_json(event_from_json(text)) == text
    assert epsilon_of(event_from_json(text), 1e-5) == epsilon_of(event, 1e-5)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"kind":"magic","scale":1,"q":1,"count":1}]'])
def test_invalid_event_text_is_refused(text: str) -> None:
    with pytest.raises(PrivacyError, match="not an event"):
        event_from_json(text)
