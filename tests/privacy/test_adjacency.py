"""Privacy costs under other adjacency relations: closed forms, published numbers, and numerical hockey-stick
divergences.
"""

from __future__ import annotations

import math
from functools import cache

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import analytic_epsilon, gaussian, sampled
from pytest import approx
from scipy.stats import norm

from fedface.errors import PrivacyError
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.adjacency import convert_unit, replace_one_event
from fedface.privacy.releases import compose, event_from_json, event_to_json
from fedface.privacy_units import UNITS, Unit, covers

DELTA = 1e-5


@pytest.mark.parametrize(("sigma", "count"), [(0.8, 1), (2.0, 1), (2.0, 4), (20.0, 100)])
def test_replacing_one_in_a_gaussian_sum_costs_what_half_the_noise_costs(sigma: float, count: int) -> None:
    """The vector moves twice as far; `count` releases are one with noise sigma / sqrt(count)."""
    exact = analytic_epsilon(sigma / 2.0 / math.sqrt(count), DELTA)
    bounds = epsilon_of(replace_one_event(gaussian(sigma, count)), DELTA)
    assert bounds.lower <= exact * (1 + 1e-9) and exact <= bounds.upper * (1 + 1e-9)
    assert bounds.estimate == approx(exact, rel=1e-3)


def test_doubled_sensitivity_has_the_published_cost() -> None:
    """TensorFlow Privacy's test of microbatches, which double the sensitivity: two passes, sigma 0.7, PLD 24.716."""
    assert epsilon_of(replace_one_event(gaussian(0.7, 2)), DELTA).upper == approx(24.7160779, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "q", "epsilon", "delta"),
    [
        (4.0, 0.01, 1.9931200626, 1e-5),
        (2.0, 0.01, 1.0, 0.1282093857),
        (2.0, 0.01, 0.8, 0.1680320735),
        (1.0, 0.01, 1.0, 0.5568096732),
        (2.0, 0.02, 1.0, 0.5113118822),
    ],
)
def test_replacing_one_in_sampled_steps_agrees_with_the_fourier_accountant(
    sigma: float, q: float, epsilon: float, delta: float
) -> None:
    """10,000 steps under the substitute relation: example and tests of DPBayes/PLD-Accountant (Koskela et al. 2020)."""
    bounds = epsilon_of(replace_one_event(sampled(sigma, q, 10_000)), delta)
    assert bounds.upper == approx(epsilon, abs=2e-3)
    assert bounds.lower <= epsilon


@cache
def fixed_size_cost(sigma: float, steps: int) -> float:
    """Batches of a fixed size under replace one; sigma is noise / distance that one replacement moves the sum."""
    step = dp.SampledWithoutReplacementDpEvent(10_000, 100, dp.GaussianDpEvent(sigma))
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(dp.SelfComposedDpEvent(step, steps)).get_epsilon(DELTA))


def test_published_numbers_for_replace_one_by_sampler_and_noise() -> None:
    """Rate 0.01, noise as long as the clip norm, replace one: three samplers, and what only half the noise buys.

    13.2 for 10,000 fixed-size steps and 21.0 for 1,000 are Renyi bounds of two mechanisms: a replacement moves a sum
    by twice the clip norm, so noise as long as the clip norm is sigma 0.5 there; the first has twice that noise.
    """
    assert fixed_size_cost(1.0, 10_000) == approx(13.2, abs=0.1)  # noise twice the clip norm
    assert fixed_size_cost(0.5, 1_000) == approx(21.0, abs=0.1)  # noise as long as the clip norm
    poisson = epsilon_of(replace_one_event(sampled(1.0, 0.01, 1_000)), DELTA)
    assert poisson.upper == approx(2.843, abs=0.005)  # the same noise; ours, with secret coins
    everybody = epsilon_of(replace_one_event(gaussian(1.0, 1_000)), DELTA)
    assert everybody.lower > 2_000  # the mean loss, half of (2 sqrt(1,000) / sigma)^2
    assert poisson.upper < fixed_size_cost(0.5, 1_000) < everybody.lower


def test_fixed_size_sampling_is_not_accounted_as_poisson_sampling() -> None:
    step = dp.SampledWithoutReplacementDpEvent(10_000, 100, dp.GaussianDpEvent(1.0))
    with pytest.raises(PrivacyError, match="SampledWithoutReplacement"):
        replace_one_event(step)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    sigma=st.floats(0.4, 5.0),
    q=st.floats(0.002, 1.0),
    steps=st.integers(1, 30),
    reported=st.sampled_from(UNITS),
    expected=st.sampled_from(UNITS),
)
def test_converting_to_another_unit_never_lowers_the_cost(
    sigma: float, q: float, steps: int, reported: Unit, expected: Unit
) -> None:
    """A coarser guarantee is never cheaper for the units within, and a finer one guarantees nothing."""
    event = compose([sampled(sigma, q, steps), gaussian(3.0)])
    seen = epsilon_of(convert_unit(event, source=reported, target=expected), DELTA)
    assert seen.upper >= epsilon_of(event, DELTA).upper * (1 - 1e-3)
    assert math.isfinite(seen.upper) == covers(reported, expected)


def hockey_stick(
    p: list[tuple[float, np.ndarray]], r: list[tuple[float, np.ndarray]], sigma: float, epsilon: float
) -> float:
    """Of two mixtures of round normals in the plane, the sum of max(0, P - e^eps R) over a fine grid."""
    side = np.arange(-6.0 * sigma - 3.0, 6.0 * sigma + 3.0, sigma / 40.0)

    def density(mixture: list[tuple[float, np.ndarray]]) -> np.ndarray:
        parts = (
            share * np.outer(norm.pdf(side, centre[0], sigma), norm.pdf(side, centre[1], sigma))
            for share, centre in mixture
        )
        return np.asarray(sum(parts))

    excess = density(p) - math.exp(epsilon) * density(r)
    return float(excess.clip(min=0).sum() * (sigma / 40.0) ** 2)


ZERO = np.zeros(2)
inside = st.builds(
    lambda length, angle: length * np.array([math.cos(angle), math.sin(angle)]),
    st.floats(0.0, 1.0),
    st.floats(0.0, 2 * math.pi),
)


@settings(max_examples=25, deadline=None)
@given(
    before=inside,
    after=inside,
    sigma=st.floats(0.5, 2.0),
    q=st.floats(0.02, 1.0),
    epsilon=st.floats(0.0, 3.0),
)
def test_the_cost_of_a_photo_in_an_occasion_is_an_upper_bound(
    before: np.ndarray, after: np.ndarray, sigma: float, q: float, epsilon: float
) -> None:
    """One sampled step on an occasion whose clipped gradient is `before` with a photo and `after` without it."""
    truth = hockey_stick([(1 - q, ZERO), (q, before)], [(1 - q, ZERO), (q, after)], sigma, epsilon)
    if truth > 1e-7:  # below that the grid says nothing
        price = epsilon_of(replace_one_event(sampled(sigma, q, 1)), truth * (1 - 1e-4))
        assert price.upper >= epsilon


@pytest.mark.parametrize(("sigma", "q", "epsilon"), [(0.6, 0.1, 1.0), (1.0, 0.5, 0.5), (2.0, 0.05, 0.02)])
def test_opposite_gradients_reach_the_bound(sigma: float, q: float, epsilon: float) -> None:
    """For a = -b of full norm the bound is tight."""
    ahead, behind = np.array([0.6, 0.8]), np.array([-0.6, -0.8])
    truth = hockey_stick([(1 - q, ZERO), (q, ahead)], [(1 - q, ZERO), (q, behind)], sigma, epsilon)
    assert epsilon_of(replace_one_event(sampled(sigma, q, 1)), truth).upper == approx(epsilon, abs=2e-3)


def test_a_photo_that_alone_links_two_occasions_is_not_covered() -> None:
    """With it there is one unit, without it two, each sampled separately: further apart than one replacement."""
    sigma, q, epsilon = 1.0, 0.5, 2.0
    ahead, behind = np.array([1.0, 0.0]), np.array([-1.0, 0.0])
    one = [(1 - q, ZERO), (q, ahead)]
    two = [((1 - q) ** 2, ZERO), (2 * q * (1 - q), behind), (q * q, 2 * behind)]
    truth = hockey_stick(one, two, sigma, epsilon)
    assert epsilon_of(replace_one_event(sampled(sigma, q, 1)), truth).upper < epsilon
    photo = convert_unit(sampled(sigma, q, 1), source="occasion", target="photo")
    assert epsilon_of(photo, truth).lower == math.inf


def test_converted_events_survive_the_ledger_and_are_not_converted_twice() -> None:
    event = replace_one_event(compose([sampled(1.1, 0.3, 12), gaussian(2.0)]))
    text = event_to_json(event)
    assert event_to_json(event_from_json(text)) == text
    assert epsilon_of(event_from_json(text), DELTA) == epsilon_of(event, DELTA)
    with pytest.raises(PrivacyError, match="replaced already"):
        replace_one_event(event)


def test_without_dp_every_conversion_is_infinite() -> None:
    assert epsilon_of(replace_one_event(dp.NonPrivateDpEvent()), DELTA).lower == math.inf
    assert epsilon_of(replace_one_event(compose([])), DELTA).upper == 0.0
