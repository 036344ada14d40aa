"""What runs is what is priced."""

from __future__ import annotations

import dp_accounting as dp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedface.privacy.mechanism import ClippedSum, GaussianSum, SampledGaussian
from fedface.randomness import SecretNoise


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_a_clipped_vector_is_never_longer_than_the_clip_norm(entries: list[float], clip_norm: float) -> None:
    clipped = GaussianSum(clip_norm=clip_norm, sigma=1.0).clip(torch.tensor(entries))
    assert float(clipped.double().norm()) <= clip_norm * (1 + 1e-6)


def test_a_short_vector_stays_and_a_long_one_keeps_its_direction() -> None:
    mechanism = GaussianSum(clip_norm=5.0, sigma=1.0)
    assert torch.equal(mechanism.clip(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]))
    assert torch.allclose(mechanism.clip(torch.tensor([30.0, 40.0])), torch.tensor([3.0, 4.0]))
    assert torch.equal(mechanism.clip(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
def test_a_vector_that_is_not_finite_becomes_zero(broken: float) -> None:
    assert torch.equal(ClippedSum(clip_norm=1.0).clip(torch.tensor([1.0, broken])), torch.zeros(2))


def test_noise_has_standard_deviation_sigma_times_clip_norm() -> None:
    """The sum of squares of d standard normals is chi-square with d degrees of freedom."""
    mechanism = GaussianSum(clip_norm=0.5, sigma=3.0)
    noise = mechanism.noise(torch.zeros(200_000), SecretNoise()).double() / 1.5
    probability = stats.chi2.cdf(float(noise.square().sum()), 200_000)
    assert 1e-6 < probability < 1 - 1e-6
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def test_events_carry_the_numbers_of_the_mechanism() -> None:
    one = GaussianSum(clip_norm=2.0, sigma=1.3)
    assert one.event() == dp.GaussianDpEvent(1.3)
    steps = SampledGaussian(sampling_rate=0.1, sum=one, steps=7).event()
    assert steps == dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.3)), 7)
    assert ClippedSum(clip_norm=2.0).event() == dp.NonPrivateDpEvent()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gaussian_sum_without_noise_cannot_be_made(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be"):
        GaussianSum(clip_norm=1.0, sigma=sigma)
