"""Fitting the latent prior: moments are recovered, one photo is bounded, noise has the stated size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedface.errors import PrivacyError
from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig
from fedface.models.model import EncoderArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.models.stylegan_layers import unit_mean_square
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Images, Latents, Vector
from fedface.training.dp_sgd import SampledMechanism, private_sum
from fedface.training.latent_prior import (
    VARIANCES,
    PriorRound,
    PriorTrainingConfig,
    fit_latent_prior,
    photo_vectors,
)

STREAMS = Streams(31)
WIDTH = 16
SECONDS = ("none", "diagonal", "full")


def config(second: str = "diagonal", **changes: float) -> PriorTrainingConfig:
    """The default configuration with other second moments."""
    return replace(PriorTrainingConfig(second_moments=second, expected_batch_size=10), **changes)  # type: ignore[arg-type]


def dp_parameters(recipe: PriorTrainingConfig, sigma: float = 0.0) -> DPParameters:
    """The schedule with a noise multiplier; 0 is without privacy."""
    return DPParameters(schedule=recipe.schedule(), noise_multiplier=sigma)


def encoder() -> LatentEncoder:
    """An encoder of 16 px with random weights, always the same."""
    shape = LatentEncoderConfig(size=16, latent_width=WIDTH, channel_base=64, channel_max=8)
    return LatentEncoder(shape, STREAMS.generator("encoder"))


def generator() -> StyleGAN2:
    """A generator of 16 px with random weights, always the same."""
    shape = StyleGAN2Config(
        size=16, channel_base=64, channel_max=6, latent_width=WIDTH, style_width=8, mapping_layers=2
    )
    return StyleGAN2(shape, STREAMS.generator("generator"))


def photos(count: int) -> Images:
    """Noise images of different brightness."""
    rng = STREAMS.generator("photos")
    return torch.rand(count, 3, 16, 16, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)


def one_round(seen: Images, recipe: PriorTrainingConfig, sigma: float = 0.0) -> Vector:
    """The update of a device with these photos."""
    rng = SecretNoise() if sigma else STREAMS.generator("coins")
    return sent(encoder(), seen, recipe, dp_parameters(recipe, sigma), rng)


def prior_round(reader: LatentEncoder, recipe: PriorTrainingConfig, dp: DPParameters) -> PriorRound:
    """A round with this encoder; devices do not use the generator."""
    shape = StyleGAN2Config(
        size=reader.config.size,
        latent_width=reader.config.latent_width,
        style_width=8,
        mapping_layers=1,
        channel_base=64,
        channel_max=4,
    )
    model = build_model(EncoderArchitecture(generator=shape, encoder=reader.config), torch.Generator())
    return PriorRound(replace(model, networks={**model.networks, "encoder": reader}), recipe, dp)


def sent(
    reader: LatentEncoder,
    seen: Images,
    recipe: PriorTrainingConfig,
    dp: DPParameters,
    rng: SecretNoise | torch.Generator,
) -> Vector:
    """The update of a device with this encoder and these photos."""
    return prior_round(reader, recipe, dp).update(seen, rng=rng, streams=STREAMS)


def test_with_distributed_noise_a_device_sends_the_sum_of_its_photos_vectors() -> None:
    """Without noise, in the units in which each vector is clipped; the fit expects the noise of the shares."""
    recipe = config()
    dp = replace(dp_parameters(recipe, 2.0), noise="distributed", honest_devices=4)
    work = prior_round(encoder(), recipe, dp)
    sums = work.update(photos(5), rng=SecretNoise(), streams=STREAMS) / work.ranges()
    vectors = torch.cat([photo_vectors(encoder()(photo), recipe) for photo in photos(5).split(1)])
    torch.testing.assert_close(sums, vectors.double().sum(0), atol=1e-5, rtol=1e-4)


def spread_latents(count: int) -> Latents:
    """Latents on the sphere: component 0 off centre, component 1 narrow, components 2 and 3 correlated."""
    z = torch.randn(count, WIDTH, generator=STREAMS.generator("latents"))
    z[:, 0] += 1.5
    z[:, 1] *= 0.3
    z[:, 3] = 0.8 * z[:, 2] + 0.6 * z[:, 3]
    return unit_mean_square(z)


def fitted_moments(
    total: Vector, devices: int, recipe: PriorTrainingConfig, agreed: DPParameters
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the prior that a total gives."""
    mapping = fit_latent_prior(generator(), total, devices, recipe, agreed).mapping
    return mapping.prior_mean.double(), (mapping.prior_root @ mapping.prior_root.T).double()


def clean_total(latents: Latents, recipe: PriorTrainingConfig) -> Vector:
    """The sum of devices with these latents without noise."""
    return photo_vectors(latents, recipe).sum(0) / recipe.expected_batch_size


@pytest.mark.parametrize("second", SECONDS)
def test_a_photos_vector_has_the_clip_norm_by_construction(second: str) -> None:
    """Count, latent and squares fill the norm; only clamped or average squares leave some of it."""
    recipe = config(second, clip_norm=2.5)
    lengths = photo_vectors(spread_latents(500), recipe).norm(dim=1)
    assert float(lengths.max()) <= 2.5 * (1 + 1e-5)
    if second != "diagonal":
        assert float(lengths.min()) >= 2.5 * (1 - 1e-5)
    spike = torch.zeros(1, WIDTH)
    spike[0, 3] = math.sqrt(WIDTH)
    assert float(photo_vectors(spike, recipe).norm()) == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("second", SECONDS)
def test_without_noise_the_moments_of_the_photos_are_recovered(second: str) -> None:
    """A moment x is shrunk to x - min(|x|, c e / x), never by more than sqrt(c e), e its variance."""
    latents, recipe = spread_latents(40_000), config(second)
    mean, covariance = fitted_moments(clean_total(latents, recipe), 3, recipe, dp_parameters(recipe))
    true_mean = latents.double().mean(0)
    most = math.sqrt(2 * math.log(WIDTH) / len(latents))
    assert float((mean - true_mean).abs().max()) <= most * 1.01
    assert float(mean[0]) == pytest.approx(float(true_mean[0]), rel=1e-3)
    if second == "none":
        assert torch.allclose(covariance, torch.eye(WIDTH).double(), atol=1e-5)
        return
    true = torch.cov(latents.double().T, correction=0)
    # What the mean lost moves the square of it; a cut of the longest squares loses a little of the tails.
    cut = float((photo_vectors(latents, recipe).norm(dim=1) > 0.9999 * recipe.clip_norm).double().mean())
    if second == "diagonal":
        assert (
            float((covariance.diagonal() - true.diagonal()).abs().max())
            < math.sqrt(2) * most + 0.2 * cut + 0.01
        )
        assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-5)
    else:
        # Each eigenvalue is shrunk by at most the largest that random variation would give; the error of the mean, at
        # most `most` per component, enters once more through its product with the mean.
        bound = 2 * math.sqrt(WIDTH / len(latents)) + 2 * float(true_mean.norm()) * most * math.sqrt(WIDTH)
        assert float(torch.linalg.matrix_norm(covariance - true, 2)) < bound
        assert float(covariance[2, 3]) == pytest.approx(float(true[2, 3]), abs=0.03)


@pytest.mark.parametrize("second", SECONDS)
def test_huge_noise_leaves_the_prior_standard(second: str) -> None:
    """Without information nothing is changed, whatever the noise."""
    recipe = config(second)
    for _ in range(5):
        total = one_round(photos(20), recipe, sigma=1000.0)
        mean, covariance = fitted_moments(total, 1, recipe, dp_parameters(recipe, 1000.0))
        # The count passes for a large one by noise once in 740 times; then the moments are noise below theirs.
        assert float(mean.abs().max()) < 1.0 and float((covariance - torch.eye(WIDTH)).abs().max()) < 2.0
    mean, covariance = fitted_moments(torch.zeros(len(total)), 1, recipe, dp_parameters(recipe, 1000.0))
    assert float(mean.abs().max()) == 0.0 and torch.allclose(covariance, torch.eye(WIDTH).double(), atol=1e-5)


def test_an_update_without_photos_is_noise_of_the_stated_size() -> None:
    """(sigma clip / divisor)^2 in every number: 33 numbers x 100 rounds, five standard errors."""
    recipe = config(clip_norm=2.0)
    sent = torch.cat([one_round(photos(0), recipe, sigma=1.5) for _ in range(100)])
    assert float(sent.std()) == pytest.approx(1.5 * 2.0 / 10, rel=5 / math.sqrt(2 * len(sent)))
    assert abs(float(sent.mean())) < 5 * 0.3 / math.sqrt(len(sent))


@pytest.mark.parametrize("second", SECONDS)
def test_one_photo_more_moves_the_sum_by_at_most_the_clip_norm(second: str) -> None:
    """Before noise, over the public divisor."""
    recipe = config(second, clip_norm=0.7)
    moved = one_round(photos(9), recipe) - one_round(photos(9)[:8], recipe)
    assert 0.3 * 0.07 < float(moved.norm()) <= 0.07 * (1 + 1e-4)


def cancelling() -> LatentEncoder:
    """A hostile encoder: its last rows cancel exactly, so that only rounding remains, which becomes the latent."""
    rng = STREAMS.generator("cancelling")
    hostile = LatentEncoder(LatentEncoderConfig(), rng)
    order = torch.randperm(64, generator=rng)
    with torch.no_grad():
        weight, bias = hostile.fc.weight.clone(), hostile.fc.bias.clone()
        weight[32:], bias[32:] = weight[:32], bias[:32]
        huge = torch.randn(64, 32, generator=rng) * 1e6
        hostile.fc.weight.copy_(weight[order])
        hostile.fc.bias.copy_(bias[order])
        hostile.out.weight.copy_(torch.cat([huge, -huge], dim=1)[:, order])
        hostile.out.bias.zero_()
    return hostile


def test_a_photos_latent_is_bit_identical_in_any_batch() -> None:
    """Also if an encoder amplifies rounding, which depends on the batch size: the clip norm must bound one photo."""
    hostile, recipe = cancelling(), config()
    seen: list[Latents] = []
    hostile.register_forward_hook(lambda module, images, latents: seen.append(latents))
    many = torch.rand(20, 3, 32, 32, generator=STREAMS.generator("many"))
    rows, totals = {}, {}
    for count in range(1, 21):
        seen.clear()
        totals[count] = sent(hostile, many[:count], recipe, dp_parameters(recipe), STREAMS.generator("coins"))
        rows[count] = torch.cat(seen)
    for count in range(1, 20):
        assert torch.equal(rows[count], rows[20][:count])
        moved = (totals[count + 1] - totals[count]) * recipe.expected_batch_size
        assert float(moved.norm()) <= recipe.clip_norm * (1 + 1e-4)


def test_a_photo_that_is_not_finite_adds_nothing() -> None:
    """And does not affect others."""
    spoiled = photos(6)
    spoiled[2, 0, 3, 3] = float("nan")
    stored = photos(6)[[0, 1, 3, 4, 5]]
    assert torch.allclose(one_round(spoiled, config()), one_round(stored, config()), atol=1e-6)


def test_sums_of_devices_are_additive() -> None:
    """The sum of two devices' clean sums is the sum of one device with both libraries."""
    both = one_round(photos(9), config())
    assert torch.allclose(
        one_round(photos(9)[:4], config()) + one_round(photos(9)[4:], config()), both, atol=1e-6
    )


def test_a_private_sum_equals_a_slow_loop() -> None:
    """Clip each by hand, add, and omit what is not finite."""
    vectors = torch.randn(7, 5, generator=STREAMS.generator("vectors"))
    vectors[3, 1] = float("inf")
    slow = torch.zeros(5)
    for row in vectors:
        length = float(row.norm())
        if math.isfinite(length):
            slow += row * min(1.0, 1.5 / length)
    fast = private_sum(vectors, SampledMechanism(ClippedSum(clip_norm=1.5), 1.0, STREAMS.generator("coins")))
    assert torch.allclose(fast.float(), slow, atol=1e-6)


def test_every_photo_is_used_without_amplification_by_sampling() -> None:
    """The cost is that of one plain Gaussian sum."""
    agreed = dp_parameters(config(), 1.3)
    plain = epsilon_of(GaussianSum(clip_norm=1.0, sigma=1.3).event(), 1e-5)
    assert epsilon_of(agreed.event(), 1e-5).estimate == pytest.approx(plain.estimate, rel=1e-3)
    assert agreed.schedule.rounds == agreed.schedule.steps_per_round == 1


def test_a_private_round_refuses_a_seeded_generator() -> None:
    """Seeded noise gives no privacy."""
    recipe = config()
    with pytest.raises(PrivacyError, match="SecretNoise"):
        sent(encoder(), photos(3), recipe, dp_parameters(recipe, 1.0), STREAMS.generator("replayable"))


def mapped_from(module: StyleGAN2, latents: Latents) -> Tensor:
    """The styles of latents."""
    with torch.no_grad():
        return module.map(latents)


def test_the_fitted_generator_differs_only_in_its_prior() -> None:
    """A latent gives the styles that the transformed latent gave before; weights are unchanged."""
    recipe, before = config("full"), generator()
    after = fit_latent_prior(
        before, clean_total(spread_latents(20_000), recipe), 3, recipe, dp_parameters(recipe)
    )
    mean, root = after.mapping.prior_mean, after.mapping.prior_root
    latents = torch.randn(50, WIDTH, generator=STREAMS.generator("fresh"))
    assert after.config == replace(before.config, prior="fitted") and before.config.prior == "standard"
    assert torch.allclose(
        mapped_from(after, latents), mapped_from(before, mean + latents @ root.T), atol=1e-5
    )
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)
    assert float(mean[0]) > 0.5 and float((root @ root.T)[1, 1]) < 0.3


def test_encoder_errors_do_not_change_the_prior() -> None:
    """Devices with the generator's own samples: an encoder with random weights is wrong about all of them."""
    recipe, made_from = config(), generator()
    own = made_from.sample(1500, STREAMS.generator("own samples"))
    total = sent(encoder(), own, recipe, dp_parameters(recipe), STREAMS.generator("coins"))
    naive = fit_latent_prior(made_from, total, 1, recipe, dp_parameters(recipe)).mapping
    aware = fit_latent_prior(made_from, total, 1, recipe, dp_parameters(recipe), encoder=encoder()).mapping
    assert float(naive.prior_mean.norm()) > 2.0
    # The garrote passes none of 16 numbers except with small probability.
    assert float(aware.prior_mean.norm()) < 0.15
    assert float((aware.prior_root - torch.eye(WIDTH)).abs().max()) < 0.15


def test_a_prior_can_be_fitted_again() -> None:
    """Latents are taken before the prior, so a second fit replaces the first."""
    recipe = config()
    total = clean_total(spread_latents(20_000), recipe)
    once = fit_latent_prior(generator(), total, 3, recipe, dp_parameters(recipe))
    twice = fit_latent_prior(once, total, 3, recipe, dp_parameters(recipe))
    assert torch.equal(once.mapping.prior_root, twice.mapping.prior_root)


def test_variances_stay_within_their_bounds() -> None:
    """Equal photos do not give a generator of one face."""
    same = unit_mean_square(torch.randn(1, WIDTH, generator=STREAMS.generator("one"))).expand(5000, -1)
    for second in ("diagonal", "full"):
        recipe = config(second)
        _, covariance = fitted_moments(clean_total(same, recipe), 1, recipe, dp_parameters(recipe))
        values = torch.linalg.eigvalsh(covariance)
        assert float(values.min()) >= VARIANCES[0] - 1e-5 and float(values.max()) <= VARIANCES[1] + 1e-5


@pytest.mark.parametrize("second", SECONDS)
def test_the_public_ranges_contain_every_update(second: str) -> None:
    """With at most the expected number of photos and without noise."""
    recipe = config(second, max_photos=60)
    ranges = prior_round(encoder(), recipe, dp_parameters(recipe)).ranges()
    sent = one_round(photos(60), recipe)
    assert sent.shape == ranges.shape and float(ranges.min()) > 0
    assert float((sent / ranges).abs().max()) <= 1.0 + 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expected_batch_size": 0}, "expected_batch_size must lie in"),
        ({"max_photos": 0}, "max_photos must lie in"),
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"count_fraction": 1.0}, "count_fraction must lie in"),
        ({"second_moment_fraction": 0.0}, "second_moment_fraction must lie in"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_name(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**change)


def test_a_total_of_another_configuration_is_refused() -> None:
    """Products and squares have different numbers."""
    recipe = config("full")
    with pytest.raises(ValueError, match="moments are"):
        fit_latent_prior(
            generator(), clean_total(spread_latents(10), config()), 1, recipe, dp_parameters(recipe)
        )
