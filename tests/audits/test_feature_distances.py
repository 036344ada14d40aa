"""Distances between sets of faces: closed forms for Gaussians, and faces that differ in a known way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedface.audits.feature_distances import (
    FEATURE_WIDTH,
    Moments,
    face_distance,
    face_features,
    faces_to_extrapolate,
    frechet_distance,
    frechet_interval,
    frechet_of_moments,
    kernel_distance,
    kernel_interval,
)
from fedface.photos.skin_tone import srgb_to_lab
from fedface.randomness import Streams

STREAMS = Streams(5)


def clouds(count: int, name: str) -> Tensor:
    """Smooth random images (count, 3, 32, 32)."""
    coarse = torch.rand(count, 3, 4, 4, generator=STREAMS.generator(name))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)


def whitened(count: int, width: int, name: str) -> Tensor:
    """Points whose sample mean is exactly 0 and whose sample covariance is exactly 1."""
    x = torch.randn(count, width, generator=STREAMS.generator(name), dtype=torch.float64)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_known_gaussians_is_exact() -> None:
    """Diagonal covariances commute: |m|^2 + sum (s_a - s_b)^2."""
    mean, spread = torch.tensor([1.0, -2.0, 0.5, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    a, b = whitened(50, 4, "a"), whitened(70, 4, "b") * spread + mean
    assert frechet_distance(a, b) == pytest.approx(5.25 + (spread - 1).square().sum().item(), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute_equals_the_two_by_two_formula() -> None:
    """tr (A B)^1/2 = sqrt(tr AB + 2 sqrt det AB) for 2 x 2."""
    mix_a = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).double()
    mix_b = torch.tensor([[2.0, 0.0], [-1.0, 0.5]]).double()
    a, b = whitened(40, 2, "a") @ mix_a.T, whitened(40, 2, "b") @ mix_b.T
    cov_a, cov_b = mix_a @ mix_a.T, mix_b @ mix_b.T
    product = cov_a @ cov_b
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (cov_a.trace() + cov_b.trace() - 2 * cross).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_set_has_no_distance_to_itself() -> None:
    features = face_features(clouds(30, "self"))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)


def test_kernel_distance_equals_its_definition_by_loops() -> None:
    x = torch.randn(5, 3, generator=STREAMS.generator("x")).double()
    y = torch.randn(4, 3, generator=STREAMS.generator("y")).double()

    def k(p: Tensor, q: Tensor) -> float:
        return float((p @ q / 3 + 1) ** 3)

    xx = [k(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    yy = [k(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    xy = [k(p, q) for p in x for q in y]
    expected = sum(xx) / 20 + sum(yy) / 12 - 2 * sum(xy) / 20
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_fewer_faces_than_features_have_the_distance_of_their_moments() -> None:
    """The singular values of X_a X_b^T are those of the root of the product of the covariances."""
    a = torch.randn(9, 30, generator=STREAMS.generator("a")).double()
    b = torch.randn(14, 30, generator=STREAMS.generator("b")).double() * 2 + 1
    expected = frechet_of_moments(Moments.of(a), Moments.of(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_the_kernel_interval_contains_the_closed_form_of_two_gaussians() -> None:
    """In one dimension (x y + 1)^3 sums squares of differences of raw moments, with weights 3, 3, 1."""
    x = torch.randn(2000, 1, generator=STREAMS.generator("x")).double()
    y = torch.randn(3000, 1, generator=STREAMS.generator("y")).double() + 0.5
    expected = 3 * 0.5**2 + 3 * (0.5**2) ** 2 + (0.5**3 + 3 * 0.5) ** 2
    found = kernel_interval(x, y)
    assert found.low < expected < found.high and found.high - found.low < expected
    assert found.estimate == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_the_extrapolated_frechet_distance_is_unbiased() -> None:
    """Gaussians at distance 1 in 40 dimensions, 120 points each: plain distances are far above 1, extrapolated ones are
    not.
    """
    rng = STREAMS.generator("bias")
    plain, found = [], []
    for _ in range(30):
        a = torch.randn(120, 40, generator=rng)
        b = torch.randn(120, 40, generator=rng) + torch.eye(40)[0]
        plain.append(frechet_distance(a, b))
        found.append(frechet_interval(a, b))
    estimates = torch.tensor([interval.estimate for interval in found])
    assert min(plain) > 4
    assert abs(estimates.mean() - 1) < 0.5
    assert sum(interval.low <= 1 <= interval.high for interval in found) >= 26


def test_the_extrapolation_is_valid_from_its_minimum_count() -> None:
    """Equal Gaussians in 40 dimensions, the worst case: 60 points are enough, 30 are not."""
    rng = STREAMS.generator("flat")
    covered = {
        count: sum(
            frechet_interval(
                torch.randn(count, 40, generator=rng), torch.randn(count, 40, generator=rng)
            ).covers_zero
            for _ in range(20)
        )
        for count in (faces_to_extrapolate(40), 30)
    }
    assert faces_to_extrapolate(40) == 60
    assert covered[60] >= 18 and covered[30] <= 5


def test_kernel_intervals_of_equal_sources_cover_zero() -> None:
    """At most 1 of 60 may lie entirely below 0."""
    rng = STREAMS.generator("equal")
    found = [
        kernel_interval(torch.randn(60, 8, generator=rng), torch.randn(60, 8, generator=rng))
        for _ in range(60)
    ]
    assert sum(not interval.covers_zero for interval in found) <= 4
    assert sum(interval.high < 0 for interval in found) <= 1


def test_an_interval_needs_two_faces_per_block() -> None:
    x = torch.randn(19, 3, generator=STREAMS.generator("few"))
    for interval in (kernel_interval, frechet_interval):
        with pytest.raises(ValueError, match="at least 20 faces a side, got 19 and 19"):
            interval(x, x)


def test_a_picture_of_one_colour_has_its_lab_as_first_coefficients_and_no_contrast() -> None:
    colour = torch.tensor([0.7, 0.5, 0.4]).view(1, 3, 1, 1)
    features = face_features(colour.expand(1, 3, 64, 64))[0]
    lab = srgb_to_lab(colour.double()).flatten()
    assert features.shape == (FEATURE_WIDTH,)
    torch.testing.assert_close(features[[0, 64, 80]], lab / 10)
    rest = torch.ones(FEATURE_WIDTH, dtype=torch.bool)
    rest[[0, 64, 80]] = False
    assert features[rest].abs().max() < 1e-5


def test_blur_lowers_the_contrast_features() -> None:
    images = torch.rand(4, 3, 32, 32, generator=STREAMS.generator("noise"))
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    assert (face_features(blurred)[:, 96:108] < face_features(images)[:, 96:108]).all()


def test_darkened_faces_are_distinguished_and_equal_sources_are_not() -> None:
    """Clean negative, planted positive."""
    real, same, dark = clouds(200, "real"), clouds(200, "same"), clouds(200, "dark") * 0.6
    clean = face_distance(real, same, STREAMS.numpy("clean"))
    planted = face_distance(real, dark, STREAMS.numpy("planted"))
    assert clean.covers_zero and planted.low > 0
    first, second = face_features(real).split(100)
    floor = frechet_distance(first, second)
    assert frechet_distance(first, face_features(same)[:100]) < 1.2 * floor
    assert frechet_distance(first, face_features(dark)[:100]) > 1.8 * floor


def test_too_few_faces_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 40 faces, got 10 and 40"):
        face_distance(clouds(10, "few"), clouds(40, "many"), STREAMS.numpy("x"))
