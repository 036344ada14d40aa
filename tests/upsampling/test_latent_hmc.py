"""HMC: samples compared with posteriors in closed form and by rejection, and its guarantees."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from posteriors import (
    HALVED,
    STREAMS,
    LinearGenerator,
    Normal,
    agreement,
    directions,
    measuring,
)
from torch import Tensor

from fedface.config import dump, parse
from fedface.models.checkpoint import load_gan
from fedface.models.fast_stylegan2 import prepare_for_search
from fedface.models.generator_protocol import Generator, sample
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2, StyleGAN2Config
from fedface.photos.skin_tone import measure_tone
from fedface.upsampling.degradation import Area, BicubicPulse, Chain, Noise
from fedface.upsampling.latent_hmc import HmcConfig, HmcUpsampler, consistency_bound, measurement_noise
from fedface.upsampling.upsampler import Upsampled, squared_difference

# Posterior spreads about 0.06, 0.5 and 1: the photo fixes one direction and leaves one free.
POOR = torch.tensor([0.3, 0.03, 0.003])
SHORT = HmcConfig(
    noise_std=0.005, noise_levels=6, transitions=2, final_transitions=6, leapfrog_steps=8, faces_at_once=2000
)
CHAINS = 2000
QUICK = HmcConfig(noise_levels=3, transitions=1, final_transitions=1, leapfrog_steps=2, rank=4)


def photo_of(generator: LinearGenerator, s: float) -> Tensor:
    """A photo of the model: a sampled face, downscaled by two, with noise."""
    latent = torch.randn(1, generator.columns.shape[1], generator=STREAMS.generator("truth"))
    face = (0.5 + latent @ generator.columns.T).view(1, 3, 4, 4)
    return HALVED.apply(face) + s * torch.randn(1, 3, 2, 2, generator=STREAMS.generator("noise"))


def known(generator: LinearGenerator, s: float, photo: Tensor) -> Normal:
    matrix = measuring()
    seen = photo.flatten() - matrix @ torch.full((48,), 0.5)
    return generator.prior().given(matrix @ generator.columns, s, seen)


def sampled(generator: LinearGenerator, config: HmcConfig, photo: Tensor) -> Upsampled:
    return HmcUpsampler(generator, HALVED, config, STREAMS).upsample(photo, faces_per_photo=CHAINS)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    config = StyleGAN2Config(
        size=16, latent_width=16, style_width=16, mapping_layers=2, channel_base=256, channel_max=16
    )
    return StyleGAN2(config, STREAMS.generator("weights"))


@pytest.fixture(scope="module")
def low(generator: StyleGAN2) -> Tensor:
    return Area(4).apply(sample(generator, 3, STREAMS.generator("faces")))


@pytest.mark.parametrize(
    "config",
    [
        SHORT,
        replace(SHORT, rank=0, leapfrog_steps=30, noise_levels=8, transitions=3, final_transitions=10),
        replace(SHORT, leapfrog_steps=1, noise_levels=10, transitions=6, final_transitions=60),
    ],
    ids=["metric", "no metric", "single leaps"],
)
def test_samples_of_a_linear_generator_have_the_mean_and_covariance_of_its_posterior(
    config: HmcConfig,
) -> None:
    """Ill-conditioned: deviations from 0.06 to 1. Whitened samples must have mean 0 and covariance I."""
    linear = LinearGenerator(directions(3) * POOR)
    photo = photo_of(linear, config.noise_std)
    found = sampled(linear, config, photo)
    assert agreement(linear.inputs_of(found.images[0]), known(linear, config.noise_std, photo)).holds
    assert found.converged.all()


def test_the_check_detects_the_best_fit_and_a_wrong_noise() -> None:
    """Planted positives: the most likely face, and the same chains compared with another noise."""
    linear = LinearGenerator(directions(3) * POOR)
    photo = photo_of(linear, SHORT.noise_std)
    right = known(linear, SHORT.noise_std, photo)
    found = linear.inputs_of(sampled(linear, SHORT, photo).images[0])
    assert not agreement(right.mean + 1e-6 * found, right).holds
    assert not agreement(found, known(linear, 1.3 * SHORT.noise_std, photo)).holds


def test_sampled_noise_maps_follow_their_posterior_too() -> None:
    """3 latents and a map of 16; the 12 measured values constrain at most 12 directions of these 19."""
    columns = torch.cat([directions(3) * POOR, 0.03 * directions(19)[:, 3:]], dim=1)
    linear = LinearGenerator(columns, maps=1)
    photo = photo_of(linear, SHORT.noise_std)
    found = sampled(linear, replace(SHORT, noise="sampled", rank=12), photo)
    assert agreement(linear.inputs_of(found.images[0]), known(linear, SHORT.noise_std, photo)).holds


def test_the_published_steps_are_accurate_for_an_isotropic_posterior() -> None:
    """Unadjusted: their bias, of order step^2 / 4 per narrowest variance, is below what 2000 chains show."""
    linear = LinearGenerator(directions(3) * torch.tensor([0.1, 0.07, 0.05]))
    config = replace(
        HmcConfig.paper(),
        noise="fixed",
        start_std=0.04,
        noise_levels=3,
        transitions=150,
        step=0.15,
        faces_at_once=2000,
    )
    photo = photo_of(linear, config.noise_std)
    found = sampled(linear, config, photo)
    assert agreement(linear.inputs_of(found.images[0]), known(linear, config.noise_std, photo)).holds


def test_a_published_step_is_the_written_formula_of_the_paper() -> None:
    """One level: x + noise of variance 2 eta, minus eta times the gradient, eta = 5e-6."""
    config = replace(HmcConfig.paper(), noise="fixed", noise_levels=1, transitions=1)
    linear = LinearGenerator(directions(3) * POOR)
    photo, s, eta = photo_of(linear, 0.02), 0.02, 5e-6
    rng = STREAMS.generator("langevin/0")
    x, xi = torch.randn(3, generator=rng).double(), torch.randn(3, generator=rng).double()
    pulled = (measuring() @ linear.columns).double()
    residual = pulled @ x - (photo.flatten() - 0.5).double()
    expected = x - eta * (pulled.T @ residual / s**2 + x) + math.sqrt(2 * eta) * xi
    found = HmcUpsampler(linear, HALVED, config, STREAMS).upsample(photo, faces_per_photo=1)
    torch.testing.assert_close(linear.inputs_of(found.images[0])[0], expected, atol=1e-4, rtol=0)


def dark(images: Tensor) -> Tensor:
    return (measure_tone(images).monk >= 5.5).double()


class Rejection:
    """Exact group shares of the posterior: samples of the prior, each accepted with its likelihood."""

    def __init__(self, generator: Generator, s: float, count: int) -> None:
        faces = sample(prepare_for_search(generator), count, STREAMS.generator("prior"))  # type: ignore[arg-type]
        self.s, self.low, self.dark = s, Area(16).apply(faces), dark(faces)

    def share(self, photo: Tensor) -> tuple[float, float]:
        """P(dark | photo) and its standard error; acceptance is weighted with its probability."""
        accepted = (-photo.numel() / (2 * self.s**2) * squared_difference(self.low, photo)).double().exp()
        share = float((accepted * self.dark).sum() / accepted.sum())
        error = float((accepted * (self.dark - share)).square().sum().sqrt() / accepted.sum())
        return share, error


def check_against_rejection(*, draws: int, photos: int, faces: int, config: HmcConfig) -> None:
    """The most ambiguous and some clear photos of 2 x 2 pixels, noise 0.1, of the base checkpoint's own faces."""
    base = load_gan().generator
    rejection = Rejection(base, config.noise_std, draws)
    truth = Area(16).apply(sample(prepare_for_search(base), 30, STREAMS.generator("originals")))  # type: ignore[arg-type]
    seen = truth + config.noise_std * torch.randn(truth.shape, generator=STREAMS.generator("grain"))
    shares = [rejection.share(photo[None]) for photo in seen]
    order = sorted(range(len(shares)), key=lambda i: abs(shares[i][0] - 0.5))
    chosen = [*order[: photos - 1], order[len(order) // 2]]
    assert 0.25 < shares[chosen[0]][0] < 0.75
    found = HmcUpsampler(base, Area(16), config, STREAMS).upsample(seen[chosen], faces_per_photo=faces)
    for at, images in zip(chosen, found.images, strict=True):
        share, error = shares[at]
        generated = float(dark(images).mean())
        spread = math.hypot(error, math.sqrt(max(share * (1 - share), 0.02) / faces))
        assert abs(generated - share) < 3 * spread, (share, error, generated)
    assert found.converged.double().mean() > 0.95


@pytest.mark.slow
def test_tone_shares_of_samples_equal_those_of_rejection_sampling_for_many_photos() -> None:
    """Five photos, 60 chains each: a share of 0.5 is checked to 0.2."""
    config = HmcConfig(noise_std=0.1, noise_levels=6, transitions=2, final_transitions=8, leapfrog_steps=8)
    check_against_rejection(draws=15_000, photos=5, faces=60, config=config)


def test_consistency_errors_of_samples_are_chi_squared() -> None:
    """Over photos of the model, a sample is as far from the photo as the truth: mean m, variance 2 m."""
    linear, s = LinearGenerator(directions(3) * POOR), SHORT.noise_std
    latents = torch.randn(CHAINS, 3, generator=STREAMS.generator("truths"))
    faces = (0.5 + latents @ linear.columns.T).view(-1, 3, 4, 4)
    photos = HALVED.apply(faces) + s * torch.randn(CHAINS, 3, 2, 2, generator=STREAMS.generator("grains"))
    found = HmcUpsampler(linear, HALVED, SHORT, STREAMS).upsample(photos, faces_per_photo=1)
    chi = (found.consistency_error * 12 / s**2).double()
    assert chi.mean().item() == pytest.approx(12, abs=4 * math.sqrt(24 / CHAINS))
    assert chi.var().item() == pytest.approx(24, rel=0.2)
    assert 0.995 < found.converged.double().mean() < 1


def test_the_bound_is_a_chi_squared_quantile() -> None:
    """Two degrees of freedom: an exponential distribution, whose quantile is known."""
    assert consistency_bound(0.1, 2) == pytest.approx(-2 * math.log(0.001) * 0.01 / 2)


def test_noise_of_the_degradation_and_of_the_model_add_up() -> None:
    assert measurement_noise(Chain((Area(2), Noise(0.03))), 0.04) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="spread must be > 0"):
        measurement_noise(Area(2), 0.0)


def test_a_photo_that_no_face_can_match_has_not_converged(generator: StyleGAN2, low: Tensor) -> None:
    """Clean negative: a checkerboard; the other photos have the same result without it."""
    checkers = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).float().expand(1, 3, 4, 4)
    sampler = HmcUpsampler(generator, Area(4), QUICK, STREAMS)
    together = sampler.upsample(torch.cat([low[:2], checkers]), faces_per_photo=1)
    assert not together.converged[2].any()
    alone = sampler.upsample(low[:2], faces_per_photo=1)
    torch.testing.assert_close(together.consistency_error[:2], alone.consistency_error, atol=1e-6, rtol=1e-3)


def test_one_class_of_a_generator_with_classes_is_sampled(low: Tensor) -> None:
    config = StyleGAN2Config(
        size=16, latent_width=8, style_width=8, mapping_layers=1, channel_base=64, channel_max=8, classes=2
    )
    held = ClassConditioned(StyleGAN2(config, STREAMS.generator("classes")), 1)
    found = HmcUpsampler(held, Area(4), QUICK, STREAMS).upsample(low, faces_per_photo=1)
    assert found.images.shape == (3, 1, 3, 16, 16)


def test_wrong_settings_are_named(generator: StyleGAN2) -> None:
    with pytest.raises(ValueError, match="must divide"):
        HmcUpsampler(generator, BicubicPulse(5), QUICK, STREAMS)
    for wrong, message in (
        ({"noise_levels": 0}, "noise_levels must be at least 1, got 0"),
        ({"step": 0.0}, "step must be a finite number above 0, got 0"),
        ({"noise_std": -1.0}, "noise_std must be at least 0, got -1"),
        ({"correction": "none"}, "needs leapfrog_steps 1, rank 0 and final_transitions 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HmcConfig(**wrong)  # type: ignore[arg-type]


def test_settings_survive_a_yaml_round_trip() -> None:
    for config in (HmcConfig(), HmcConfig.paper()):
        assert parse(dump(config), HmcConfig, name="recipe", leave_out=["kind"]) == config
