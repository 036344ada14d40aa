"""Noise in shares: what is sampled, what sums of shares cost, and that no vector and no sum exceeds its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from scipy.stats import norm

from fedface.errors import PrivacyError
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.discrete_gaussian import DiscreteGaussian
from fedface.privacy.distributed_noise import DistributedNoise, from_sum, noised_integers
from fedface.privacy.plan import DPParameters, Schedule, make_plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy.releases import flatten_event
from fedface.randomness import SecretNoise


class Words(SecretNoise):
    """Known words in place of random ones."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words = list(words)

    def words(self, count: int) -> np.ndarray:
        now, self._words = self._words[:count], self._words[count:]
        return np.array(now, dtype=np.uint64)


def noise(**changes: Any) -> DistributedNoise:
    terms = {
        "length": 1000,
        "unit": "library",
        "clip_norm": 0.5,
        "noise_multiplier": 1.5,
        "honest": 3,
        "max_devices": 5,
    }
    return DistributedNoise(**(terms | changes))


def probabilities(variance: int, shares: int) -> np.ndarray:
    """Of the sum of so many discrete Gaussians, by convolution of their exact probabilities, symmetric about 0."""
    k = np.arange(-15 * math.isqrt(variance), 15 * math.isqrt(variance) + 1)
    one = np.exp(-(k**2) / (2.0 * variance))
    one /= one.sum()
    total = np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, one)
    return total


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang (2018), Theorem 8, at sensitivity / standard deviation mu."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def test_a_sample_counts_the_exact_cumulative_probabilities_below_a_uniform_number_of_256_bits() -> None:
    """Computed here with 100 decimal digits: the word before a threshold, and the one at it, differ by one sample."""
    with localcontext() as context:
        context.prec = 100
        weights = [(Decimal(-(k**2)) / 32).exp() for k in range(-76, 77)]
        below = [sum(weights[: k + 77]) / sum(weights) for k in (-40, -8, 0, 1, 30)]
        thresholds = [int(p * 2**256) for p in below]
    for k, threshold in zip((-40, -8, 0, 1, 30), thresholds, strict=True):  # each decided by the last words
        for shift, expected in ((-(2**12), k), (2**12, k + 1)):
            number = threshold + shift
            words = [(number >> at) % 2**64 for at in (192, 128, 64, 0)]
            assert DiscreteGaussian(16).sample(1, Words(words)).tolist() == [expected]


@pytest.mark.parametrize("variance", [16, 40_000, 30_000_000, 10**12])
def test_samples_have_the_variance_and_the_tails_of_a_gaussian(variance: int) -> None:
    """Also where a wide distribution is composed of narrow ones; bounds are five standard errors wide."""
    distribution = DiscreteGaussian(variance)
    x = distribution.sample(200_000, SecretNoise()) / math.sqrt(variance)
    assert abs(x.mean()) < 5 / math.sqrt(len(x))
    assert (x**2).mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(x)))
    assert (x**4).mean() == pytest.approx(3.0, abs=5 * math.sqrt(96 / len(x)) + 1 / variance)
    assert (abs(x) > 3).mean() == pytest.approx(2 * norm.sf(3), abs=0.0006 + 0.1 / math.sqrt(variance))
    assert 18.9 * math.sqrt(variance) <= distribution.largest <= 20 * math.sqrt(variance)


def test_shares_add_up_to_one_discrete_gaussian() -> None:
    """Kairouz, Liu and Steinke (2021): three shares of variance 16 are one of 48, up to rounding."""
    total = probabilities(16, 3)
    k = np.arange(len(total)) - len(total) // 2
    one = np.exp(-(k**2) / 96.0)
    near = abs(k) < 50
    np.testing.assert_allclose(total[near], (one / one.sum())[near], rtol=1e-10)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("shift", [(1,), (7,), (20,), (3, 4), (12, 16)])
def test_an_integer_vector_with_shares_costs_at_most_what_a_gaussian_with_eight_less_variance_does(
    shift: tuple[int, ...], epsilon: float
) -> None:
    """By brute force over all outputs, in one and two dimensions; and about what a Gaussian of all of it costs."""
    total = probabilities(16, 3)
    p, q = np.ones(1), np.ones(1)
    for by in shift:
        p = np.multiply.outer(p, np.pad(total, (by, 0)))
        q = np.multiply.outer(q, np.pad(total, (0, by)))
    exact, distance = hockey_stick(p, q, epsilon), math.hypot(*shift)
    assert exact <= gaussian_delta(distance / math.sqrt(48 - 8), epsilon) + 1e-13
    assert exact == pytest.approx(gaussian_delta(distance / math.sqrt(48), epsilon), rel=0.03, abs=1e-6)


def test_two_rounds_cost_at_most_what_the_accountant_says() -> None:
    """All pairs of outputs of two rounds at once, against the composed privacy loss distribution of the Gaussian."""
    total, shift = probabilities(16, 4), 12
    p, q = np.pad(total, (shift, 0)), np.pad(total, (0, shift))
    event = SelfComposedDpEvent(GaussianDpEvent(math.sqrt(4 * 16 - 8) / shift), 2)
    for delta in (1e-3, 1e-5):
        epsilon = epsilon_of(event, delta).upper
        assert hockey_stick(np.multiply.outer(p, p), np.multiply.outer(q, q), epsilon) <= delta


def test_the_honest_shares_are_the_least_that_pay_for_the_multiplier_and_the_integers() -> None:
    """honest * variance >= sigma^2 * bound + 8 holds, and with one less per share it would not."""
    for n in (
        noise(),
        noise(honest=1),
        noise(length=10**6, noise_multiplier=0.7, honest=40, max_devices=100),
    ):
        needed = Fraction(n.noise_multiplier) ** 2 * n.max_square_norm + 8
        assert n.honest * (n.share_variance - 1) < needed <= n.honest * n.share_variance


@pytest.mark.parametrize("length", [1, 50, 10**6, 30 * 10**6])
def test_rounding_lengthens_the_norm_bound_by_less_than_half_a_percent(length: int) -> None:
    n = noise(length=length, honest=300, max_devices=1000)
    assert n.scale**2 < n.max_square_norm < (1.005 * n.scale) ** 2


def test_no_rounded_vector_exceeds_the_bound_even_where_every_number_is_rounded_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With uniform numbers of zero all attempts are too long, and the vector is rounded towards zero."""
    monkeypatch.setattr(SecretNoise, "uniforms", lambda self, count: np.zeros(count))
    monkeypatch.setattr(DiscreteGaussian, "sample", lambda self, count, secret: np.zeros(count, np.int64))
    n = noise(length=10**6)
    integers = noised_integers(torch.full((n.length,), 1.01 * n.clip_norm / 1000), n)
    assert int(integers @ integers) <= n.max_square_norm
    assert integers.tolist()[:3] == [n.scale // 1000] * 3


def test_one_photo_more_changes_the_integers_of_a_sum_by_the_bound_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same uniform numbers round both sums, of any length, and no number leaves a device's part of the ring."""
    coins = np.random.default_rng(3).random(1000)
    monkeypatch.setattr(SecretNoise, "uniforms", lambda self, count: coins)
    monkeypatch.setattr(DiscreteGaussian, "sample", lambda self, count, secret: np.zeros(count, np.int64))
    n = noise(unit="photo")
    total, photo = torch.randn(2, 1000, generator=torch.Generator().manual_seed(4)).double()
    photo *= n.clip_norm / photo.norm()
    one, more = (noised_integers(100.0 * total + x, n) for x in (torch.zeros(1000), photo))
    assert 0.99 * n.scale**2 <= int((more - one) @ (more - one)) <= n.max_square_norm
    assert abs(one * n.step - 100.0 * total.numpy()).max() <= n.step
    for far in (1e9, -1e9):
        (number,) = set(noised_integers(torch.full((1000,), far), n).tolist())
        assert n.max_devices * (abs(number) + n.share.largest) < 2**31 and number * far > 0


@pytest.mark.parametrize("unit", ["library", "photo"])
def test_numbers_are_rounded_at_random_and_keep_their_mean(
    monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """0.3 becomes 0 or 1, of mean 0.3: rounded to the nearest, one photo could move every number by a whole one."""
    monkeypatch.setattr(DiscreteGaussian, "sample", lambda self, count, secret: np.zeros(count, np.int64))
    n = noise(unit=unit, length=100_000)
    integers = noised_integers(torch.full((n.length,), 0.3 * n.step), n)
    assert set(integers.tolist()) == {0, 1}
    assert integers.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n.length))


def test_rounding_a_sum_once_costs_at_most_what_rounding_each_photo_does() -> None:
    """By brute force: a sum of 0.3 and one photo of 1.7 more, which rounded is 2 at most."""
    total = np.pad(probabilities(16, 3), (0, 2))

    def rounded(value: float) -> np.ndarray:
        down = math.floor(value)
        up = value - down
        return (1 - up) * np.roll(total, down) + up * np.roll(total, down + 1)

    for epsilon in (0.1, 1.0):
        exact = hockey_stick(rounded(0.3 + 1.7), rounded(0.3), epsilon)
        assert exact <= gaussian_delta(2 / math.sqrt(48 - 8), epsilon) + 1e-13


def test_per_photo_a_round_is_one_private_step_at_the_price_of_local_noise() -> None:
    """Amplified by sampling as before: the server sees sums in which every device's coins are secret."""
    schedule = Schedule(rounds=9, steps_per_round=1, sampling_rate=0.1, expected_batch_size=8, clip_norm=0.3)
    local = DPParameters(schedule=schedule, noise_multiplier=1.2)
    shared = replace(local, noise="distributed", honest_devices=4)
    assert flatten_event(shared.event()) == flatten_event(local.event())
    agreed = DistributedNoise.of(shared, 50, 8)
    assert agreed is not None and (agreed.unit, agreed.clip_norm) == ("photo", 0.3)
    small = DistributedNoise.of(replace(shared, update_clip_norm=0.01), 50, 8)
    assert small == agreed  # the clip norm of updates is none of photos
    assert (shared.noises_in_sum(8), local.noises_in_sum(8)) == (2.0, 8.0)
    with pytest.raises(ValueError, match="steps_per_round must be 1 with distributed noise per photo"):
        replace(shared, schedule=replace(schedule, steps_per_round=2))


def test_a_sum_of_noised_integers_is_the_sum_of_the_clipped_updates_with_the_noise_of_all_shares() -> None:
    """Five devices; one update is too long, one is not finite and counts as zero."""
    n = noise(length=100_000)
    updates = [torch.full((n.length,), value) for value in (0.001, -0.0005, 0.0, 1.0, math.nan)]
    total = from_sum(np.sum([noised_integers(u, n) for u in updates], axis=0), n).double()
    expected = 0.001 - 0.0005 + n.clip_norm / math.sqrt(n.length)
    deviation = n.step * math.sqrt(5 * n.share_variance + 1)
    assert float(total.mean()) == pytest.approx(expected, abs=5 * deviation / math.sqrt(n.length))
    assert float(total.std()) == pytest.approx(deviation, rel=0.02)
    assert n.step * math.sqrt(n.honest * n.share_variance) >= n.noise_multiplier * n.clip_norm


def test_noise_is_never_repeated() -> None:
    n = noise()
    assert not np.array_equal(noised_integers(torch.zeros(1000), n), noised_integers(torch.zeros(1000), n))


def test_noise_that_could_leave_the_ring_is_refused() -> None:
    with pytest.raises(
        PrivacyError, match="does not fit sums of 32 bits at noise multiplier 5000 with 1 honest"
    ):
        noise(noise_multiplier=5000.0, honest=1, max_devices=1000)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a vector of 1000 numbers, got shape"):
        noised_integers(torch.zeros(999), noise())


def test_distributed_noise_costs_what_central_noise_does_and_is_agreed_on_by_all_devices() -> None:
    """Ten rounds of 100 devices, of which 50 in each sum are honest."""
    schedule = Schedule(rounds=10, steps_per_round=5, sampling_rate=0.1, expected_batch_size=8, clip_norm=1.0)
    target = PrivacyTarget(epsilon=4.0, delta=1e-5, unit="library", noise="distributed")
    central = make_plan(replace(target, noise="central"), schedule, update_clip_norm=0.5)
    plan = make_plan(target, schedule, update_clip_norm=0.5, honest_devices=50)
    dp, sigma = plan.dp_parameters, plan.noise_multiplier
    assert (sigma, plan.epsilon()) == (central.noise_multiplier, central.epsilon())
    assert DistributedNoise.of(dp, 1000, 100) == DistributedNoise(
        length=1000, unit="library", clip_norm=0.5, noise_multiplier=sigma, honest=50, max_devices=100
    )
    assert DistributedNoise.of(central.dp_parameters, 1000, 100) is None
    assert (dp.noises_in_sum(80), central.dp_parameters.noises_in_sum(80)) == (1.6, 1.0)
    words = " ".join(plan.describe())
    assert "any 50 devices in a round's sum add" in words and "keep it from the server" in words
    assert "trusted server" not in words


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        ({"unit": "library"}, "noise must be"),
        ({"unit": "photo", "noise": "central"}, "noise must be .local. .*or .distributed. with unit photo"),
        (
            {"unit": "library", "noise": "distributed"},
            "honest_devices must be at least 1 with distributed noise",
        ),
        (
            {"unit": "library", "noise": "central", "honest_devices": 3},
            "and 0 without, got 3 with central noise",
        ),
    ],
)
def test_a_task_cannot_contradict_itself_about_its_noise(terms: dict[str, Any], problem: str) -> None:
    schedule = Schedule(rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=8, clip_norm=1.0)
    with pytest.raises(ValueError, match=problem):
        DPParameters(schedule=schedule, noise_multiplier=1.0, **terms)
