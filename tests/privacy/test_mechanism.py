"""The mechanism that runs is the one that is accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import dp_accounting as dp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedface.privacy.clip_and_noise import add_noise, clip_l2
from fedface.privacy.mechanism import ClippedSum, GaussianSum, SampledGaussian
from fedface.randomness import SecretNoise


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_a_clipped_vector_is_never_longer_than_the_clip_norm(entries: list[float], clip_norm: float) -> None:
    clipped = clip_l2(torch.tensor(entries), clip_norm)
    assert float(clipped.double().norm()) <= clip_norm * (1 + 1e-6)


def test_a_short_vector_stays_and_a_long_one_keeps_its_direction() -> None:
    assert torch.equal(clip_l2(torch.tensor([3.0, 4.0]), 5.0), torch.tensor([3.0, 4.0]))
    assert torch.allclose(clip_l2(torch.tensor([30.0, 40.0]), 5.0), torch.tensor([3.0, 4.0]))
    assert torch.equal(clip_l2(torch.zeros(3), 5.0), torch.zeros(3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
def test_a_vector_that_is_not_finite_becomes_zero(broken: float) -> None:
    assert torch.equal(clip_l2(torch.tensor([1.0, broken]), 1.0), torch.zeros(2))


def test_noise_has_standard_deviation_sigma_times_clip_norm() -> None:
    """The sum of squares of d standard normals is chi-square with d degrees of freedom."""
    mechanism = GaussianSum(clip_norm=0.5, sigma=3.0)
    noise = add_noise(torch.zeros(200_000), mechanism, SecretNoise()).double() / 1.5
    probability = stats.chi2.cdf(float(noise.square().sum()), 200_000)
    assert 1e-6 < probability < 1 - 1e-6
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def naive(total: torch.Tensor, deviation: float) -> torch.Tensor:
    """Noise added in float32: the planted positive of the attack below."""
    noise = torch.tensor(deviation) * SecretNoise().normals(len(total)).float()
    return total + noise


def refuted(sent: torch.Tensor, total: torch.Tensor, deviation: float) -> int:
    """The number of values that this total cannot have become by float32 noise (Mironov 2012)."""
    possible = torch.zeros(len(sent), dtype=torch.bool)
    for noise in _around(sent - total, 2):
        reached = total + noise == sent
        for normal in _around(noise / deviation, 2):
            possible |= reached & (torch.tensor(deviation) * normal == noise)
    return int((~possible).sum())


def _around(x: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """The neighbouring float32 numbers."""
    for end in (-math.inf, math.inf):
        y = x
        for _ in range(steps + 1):
            yield y
            y = torch.nextafter(y, torch.tensor(end))


def test_the_gaps_of_float32_do_not_reveal_the_number_of_photos() -> None:
    """37 or 36 equal photos at sigma 90, epsilon below 0.1: one look refutes naive noise, and not ours."""
    one = torch.nn.functional.normalize(torch.rand(2000), dim=0)
    truth, wrong = 37 * one, 36 * one
    mechanism = GaussianSum(clip_norm=1.0, sigma=89.6)
    leaky = naive(truth, 89.6)
    assert refuted(leaky, truth, 89.6) == 0
    assert refuted(leaky, wrong, 89.6) > 50
    for _ in range(3):
        sent = add_noise(truth, mechanism, SecretNoise())
        right, other = refuted(sent, truth, 89.6), refuted(sent, wrong, 89.6)
        assert right > 0  # the truth itself looks as impossible as anything else
        assert abs(right - other) < 5 * math.sqrt(2 * 2000 * 0.25)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2), st.floats(-1e4, 1e4, width=32))
def test_every_noised_sum_lies_on_the_same_grid(clip_norm: float, sigma: float, value: float) -> None:
    """Multiples of a power of two, 2^20 to 2^21 of them per standard deviation, for any sum."""
    deviation = clip_norm * sigma
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 20)
    total = torch.full((64,), value * deviation / 1e3, dtype=torch.float64)
    widths = add_noise(total, GaussianSum(clip_norm=clip_norm, sigma=sigma), SecretNoise()) / grid
    assert torch.equal(widths, widths.round())
    assert 2**20 <= deviation / grid < 2**21


@pytest.mark.parametrize("value", [0.0, 0.3, 123456.7])
def test_the_last_bits_of_a_noised_sum_are_uniform_whatever_the_sum_is(value: float) -> None:
    """Counts of the last four bits, chi-square with 15 degrees of freedom; fails once in a million."""
    mechanism = GaussianSum(clip_norm=1.0, sigma=1.0)
    sent = add_noise(torch.full((200_000,), value, dtype=torch.float64), mechanism, SecretNoise())
    last = torch.remainder(sent * 2.0**20, 16).long()
    assert stats.chisquare(torch.bincount(last, minlength=16).numpy()).pvalue > 1e-6
    assert abs(float(sent.mean()) - value) < 5 / math.sqrt(200_000)


def test_no_zero_reveals_the_sign_of_a_tiny_sum() -> None:
    """A million numbers just below zero, or at minus zero: none becomes minus zero."""
    for value in (-1e-9, -0.0, -1e-40):
        for _ in range(4):
            sent = add_noise(
                torch.full((2**20,), value), GaussianSum(clip_norm=1.0, sigma=64.0), SecretNoise()
            )
            assert not bool((torch.signbit(sent) & (sent == 0)).any())


def test_events_carry_the_numbers_of_the_mechanism() -> None:
    one = GaussianSum(clip_norm=2.0, sigma=1.3)
    assert one.event() == dp.GaussianDpEvent(1.3)
    steps = SampledGaussian(sampling_rate=0.1, sum=one, steps=7).event()
    assert steps == dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.3)), 7)
    assert ClippedSum(clip_norm=2.0).event() == dp.NonPrivateDpEvent()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gaussian_sum_needs_noise(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be"):
        GaussianSum(clip_norm=1.0, sigma=sigma)


def test_noise_is_added_to_every_number_once_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand numbers, seven at a time, of any shape: each has its own noise."""
    monkeypatch.setattr("fedface.privacy.clip_and_noise._AT_ONCE", 7)
    total = torch.arange(10_000.0).reshape(100, 100).t()  # not in one piece
    noise = add_noise(total, GaussianSum(clip_norm=1.0, sigma=1.0), SecretNoise()) - total
    assert noise.shape == (100, 100) and len(noise.unique()) > 5_000
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 1e-6
