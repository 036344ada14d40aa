"""Guided flow: samples of exact flows compared with posteriors in closed form, and its guarantees."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from posteriors import HALVED, STREAMS, Agreement, Normal, NormalFlow, agreement, measuring
from torch import Tensor

from fedface.models.checkpoint import load_flow
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.upsampling.degradation import Area, BicubicPulse, Chain, Degradation, Jpeg
from fedface.upsampling.flow_posterior import GuidedFlowConfig, GuidedFlowUpsampler, gram
from fedface.upsampling.upsampler import StepSnapshot, squared_difference

ALIKE = NormalFlow(torch.full((48,), 0.2))  # all directions equal, as "isotropic" assumes
UNLIKE = NormalFlow(torch.logspace(-2, -0.5, 48))  # spreads from 0.01 to 0.3
FINE = GuidedFlowConfig(steps=100, cg_steps=12, data_std=0.2, faces_at_once=2000)
# Where all directions are alike, the matrix that conjugate gradients invert is a multiple of the identity.
FINE_ALIKE = replace(FINE, cg_steps=2)
QUICK = GuidedFlowConfig(steps=3, cg_steps=2)


def photo_of(flow: NormalFlow, s: float) -> Tensor:
    """A face of the flow, halved, with noise s, (12,)."""
    prior = flow.prior()
    root = torch.linalg.cholesky(prior.covariance)
    face = prior.mean + root @ torch.randn(48, generator=STREAMS.generator("truth"))
    return measuring() @ face + s * torch.randn(12, generator=STREAMS.generator("noise"))


@cache
def faces_of_one_photo(flow: NormalFlow, config: GuidedFlowConfig) -> Tensor:
    """2,000 faces, (2000, 48)."""
    photo = photo_of(flow, config.noise_std).view(1, 3, 2, 2)
    found = GuidedFlowUpsampler(flow, HALVED, config, STREAMS).upsample(photo, faces_per_photo=2000)
    return found.images[0].flatten(1)


def compared(flow: NormalFlow, config: GuidedFlowConfig, *, believed: float = 1.0) -> Agreement:
    """2,000 faces of one photo compared with the posterior for `believed` times the noise."""
    s = config.noise_std
    right: Normal = flow.prior().given(measuring(), believed * s, photo_of(flow, s))
    return agreement(faces_of_one_photo(flow, config), right)


@pytest.fixture(scope="module")
def flow() -> RectifiedFlow:
    return RectifiedFlow(
        FlowConfig(size=16, width=8, multipliers=(1.0, 2.0), time_width=8), STREAMS.generator("weights")
    )


@pytest.fixture(scope="module")
def low(flow: RectifiedFlow) -> Tensor:
    return Area(4).apply(flow.sample(3, STREAMS.generator("faces")))


@pytest.mark.parametrize("covariance", ["isotropic", "moments"])
@pytest.mark.parametrize("churn", [0.0, 1.0])
def test_faces_of_an_isotropic_normal_flow_have_the_posteriors_mean_and_covariance(
    covariance: str, churn: float
) -> None:
    """Both covariances are exact there, up to the 100 steps."""
    assert compared(ALIKE, replace(FINE_ALIKE, covariance=covariance, churn=churn)).holds  # type: ignore[arg-type]


@pytest.mark.parametrize("churn", [0.0, 1.0])
def test_moments_are_right_where_directions_differ_thirtyfold(churn: float) -> None:
    """Means within random variation; covariances within twice that, because of the 100 steps."""
    found = compared(UNLIKE, replace(FINE, churn=churn))
    assert found.mean <= 1 and found.covariance <= 2


def test_the_check_detects_a_wrong_prior_and_a_wrong_noise() -> None:
    """Planted positives: one deviation for all directions where they differ, and a posterior for half the noise."""
    assert compared(UNLIKE, replace(FINE, covariance="isotropic")).mean > 2
    assert not compared(ALIKE, FINE_ALIKE, believed=0.5).holds


def test_the_gram_matrix_is_that_of_the_explicit_degradation() -> None:
    matrix = measuring()
    torch.testing.assert_close(gram(HALVED, 4), matrix @ matrix.T)


def test_the_gram_matrix_of_a_jpeg_is_the_diagonal_of_its_derivative() -> None:
    """As published for nonlinear degradations; every value depends only on itself."""
    found = gram(Chain((Area(2), Jpeg(90))), 32)
    assert torch.equal(found, found.diagonal().diag()) and (found.diagonal() > 0).all()


@pytest.mark.parametrize("seen_through", [BicubicPulse(4), Area(8)])
def test_the_bundled_flows_samples_fit_and_are_exchangeable_with_the_truth(
    seen_through: Degradation,
) -> None:
    """Given a photo, truth and two samples are exchangeable: all pairs are equally far apart."""
    base, config = load_flow().generator, GuidedFlowConfig(steps=25)
    truth = base.sample(10, STREAMS.generator("originals"))
    photos = seen_through.apply(truth)
    photos = photos + config.noise_std * torch.randn(photos.shape, generator=STREAMS.generator("grain"))
    found = GuidedFlowUpsampler(base, seen_through, config, STREAMS).upsample(photos, faces_per_photo=2)
    assert found.converged.double().mean() >= 0.9
    pair = squared_difference(found.images[:, 0], found.images[:, 1]).mean()
    apart = torch.stack([squared_difference(found.images[:, i], truth).mean() for i in (0, 1)]).mean()
    assert 0.5 < float(pair / apart) < 2


def test_every_step_is_shown_and_counted(flow: RectifiedFlow, low: Tensor) -> None:
    heard: list[tuple[int, int]] = []
    seen: list[StepSnapshot] = []
    sampler = GuidedFlowUpsampler(
        flow,
        Area(4),
        replace(QUICK, faces_at_once=2),
        STREAMS,
        progress=lambda done, total: heard.append((done, total)),
        watch=seen.append,
    )
    found = sampler.upsample(low, faces_per_photo=1)
    assert heard == [(step, 6) for step in range(1, 7)]
    assert [snapshot.step for snapshot in seen] == [1, 2, 3] * 2
    # The last step ends at the expected face.
    torch.testing.assert_close(seen[-1].images.clamp(0, 1), found.images[2])
    assert found.steps == 3


def test_a_jpeg_is_linearised_at_the_expected_face(low: Tensor) -> None:
    base, seen_through = load_flow().generator, Chain((Area(2), Jpeg(80)))
    photos = seen_through.apply(base.sample(4, STREAMS.generator("originals")))
    free, guided = (
        GuidedFlowUpsampler(
            base, seen_through, GuidedFlowConfig(noise_std=spread, steps=12), STREAMS
        ).upsample(photos, faces_per_photo=1)
        for spread in (100.0, 0.03)
    )
    assert guided.consistency_error.mean() < free.consistency_error.mean() / 10


def test_wrong_settings_are_named(flow: RectifiedFlow) -> None:
    with pytest.raises(ValueError, match="must divide"):
        GuidedFlowUpsampler(flow, BicubicPulse(5), QUICK, STREAMS)
    for wrong, message in (
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"data_std": 0.0}, "data_std must be a finite number above 0, got 0"),
        ({"churn": 1.5}, r"churn must lie in \[0, 1\], got 1.5"),
        ({"noise_std": float("nan")}, "noise_std must be at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidedFlowConfig(**wrong)  # type: ignore[arg-type]
