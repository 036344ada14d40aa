"""DP-SGD steps against slow references: one photo at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from pytest import approx
from scipy import stats
from torch import Tensor, nn

from fedface.errors import PrivacyError
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.distributed_noise import DistributedNoise, noised_integers
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import SecretNoise, Streams
from fedface.training.dp_sgd import (
    SampledMechanism,
    check_mechanism,
    check_per_example_gradients,
    check_shares,
    private_gradient,
)
from fedface.training.per_example_gradients import (
    Draws,
    Network,
    PerExampleProblem,
    per_example_gradients,
    vmap_gradients,
)
from fedface.training.unit_clipping import (
    ClippedSumAccumulator,
    MicrobatchGradients,
    clipped_sum,
    poisson_sample_units,
)

STREAMS = Streams(3)


class Scaled(nn.Module):
    """A convolution with equalised learning rate: its weight is multiplied by a gain in forward."""

    def __init__(self, inputs: int, outputs: int, rng: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3, generator=rng))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain = 1.0 / math.sqrt(9 * inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.conv2d(x, self.weight * self.gain, self.bias, padding=1), 0.2)


class SmallCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rng = STREAMS.generator("weights")
        self.first, self.second = Scaled(3, 4, rng), Scaled(4, 1, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.avg_pool2d(self.first(x), 2)).mean(dim=(1, 2, 3))


class Demodulated(SmallCritic):
    """Uses a layer's weight outside that layer's forward, as demodulation does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.first.weight.square().sum().rsqrt()


class Coupled(SmallCritic):
    """Minibatch statistics: every photo's score depends on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0, keepdim=True) / 2)


class Statistics(SmallCritic):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def loss(network: Network, photos: Tensor) -> Tensor:
    return F.softplus(-network(photos)).reshape(len(photos))


def faces(count: int, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=STREAMS.generator("faces"))


def one_at_a_time(module: nn.Module, photos: Tensor) -> list[list[Tensor]]:
    """The slow reference: an ordinary backward pass per photo."""
    weights = list(module.parameters())
    return [list(torch.autograd.grad(loss(module, photo[None]).sum(), weights)) for photo in photos]


def length(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient))


def by_opacus(problem: PerExampleProblem, photos: Tensor) -> list[Tensor]:
    """Opacus's own per-sample gradients, as an independent reference."""
    wrapped = GradSampleModule(problem.network, loss_reduction="sum", force_functorch=True)
    torch.autograd.backward(problem.loss(wrapped, photos).sum())
    gradients = [weight.grad_sample for weight in problem.weights()]  # type: ignore[attr-defined]
    wrapped.to_standard_module()
    problem.network.zero_grad()
    return gradients


def by_vmap(problem: PerExampleProblem, photos: Tensor) -> list[Tensor]:
    return vmap_gradients(problem, (photos,))


@pytest.mark.parametrize("engine", [per_example_gradients, by_vmap, by_opacus])
def test_each_photos_gradient_is_that_of_its_own_backward_pass(
    engine: Callable[[PerExampleProblem, Tensor], list[Tensor]],
) -> None:
    module, photos = SmallCritic(), faces(5)
    ours = engine(PerExampleProblem(module, loss), photos)
    for photo, reference in enumerate(one_at_a_time(module, photos)):
        for one, other in zip(ours, reference, strict=True):
            assert torch.allclose(one[photo], other, rtol=1e-4, atol=1e-7)
    assert all(weight.grad is None for weight in module.parameters())
    assert not any(hasattr(weight, "grad_sample") for weight in module.parameters())


def test_without_noise_and_with_a_huge_clip_norm_it_is_the_plain_gradient() -> None:
    module, photos = SmallCritic(), faces(7)
    ours = private_gradient(
        PerExampleProblem(module, loss, microbatch=3),
        photos,
        SampledMechanism(ClippedSum(clip_norm=1e6), 1.0, STREAMS.generator("coins")),
        expected_batch_size=7,
    )
    plain = torch.autograd.grad(loss(module, photos).mean(), list(module.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, plain, strict=True))


def test_the_clipped_sum_equals_the_slow_reference_at_any_microbatch() -> None:
    module, photos = SmallCritic(), faces(9)
    references = one_at_a_time(module, photos)
    clip_norm = sorted(length(reference) for reference in references)[4]
    scaled = [[g * min(1.0, clip_norm / length(reference)) for g in reference] for reference in references]
    expected = [torch.stack(parts).sum(0) / 4 for parts in zip(*scaled, strict=True)]
    for microbatch in (1, 4, 32):
        ours = private_gradient(
            PerExampleProblem(module, loss, microbatch=microbatch),
            photos,
            SampledMechanism(ClippedSum(clip_norm=clip_norm), 1.0, STREAMS.generator("coins")),
            expected_batch_size=4,
        )
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, expected, strict=True))


def test_one_photo_more_moves_the_sum_by_at_most_the_clip_norm() -> None:
    """Even an outlier with a gradient a million times larger."""
    gradients = per_example_gradients(PerExampleProblem(SmallCritic(), loss), faces(6))
    outlier = [g.index_fill(0, torch.tensor([5]), 1e6) for g in gradients]
    with_it, without = clipped_sum(outlier, 0.5), clipped_sum([g[:5] for g in outlier], 0.5)
    difference = length([a - b for a, b in zip(with_it, without, strict=True)])
    assert difference <= 0.5 * (1 + 1e-5)
    assert difference == approx(0.5, rel=1e-4)


@pytest.mark.parametrize("microbatch", [None, 16])
def test_one_photo_more_moves_a_large_sum_by_no_more(microbatch: int | None) -> None:
    """Sums at a power of two, followed by as many tiny vectors, which float32 would lose on one side only. Added in
    float32, 65,536 photos moved by 65 clip norms, and by 5 in microbatches.
    """
    count, width = 2**15, 16
    long = torch.full((count, width), width**-0.5)
    tiny = torch.full((count, width), -(width**-0.5) * 2.0**-9 * 0.99 / (microbatch or 1))
    without = torch.cat([long, tiny])

    def total(rows: torch.Tensor) -> torch.Tensor:
        if microbatch is None:
            return clipped_sum([rows], 1.0)[0].double()
        clipping = ClippedSumAccumulator([torch.zeros(width)], 1.0)
        for part in torch.split(rows, microbatch):
            clipping.add(MicrobatchGradients([part], []))
        return clipping.totals(exact=False)[0].double()

    moved = float((total(torch.cat([long[:1], without])) - total(without)).norm())
    assert moved == approx(1.0, abs=2 * len(without) / 2**24)
    # The planted positive: one number of each vector, added up one after the other in float32.
    once, twice = (
        np.cumsum(rows[:, 0].numpy(), dtype=np.float32)[-1]
        for rows in (without, torch.cat([long[:1], without]))
    )
    assert microbatch is not None or abs(float(twice) - float(once)) * width**0.5 > 2.0


@pytest.mark.parametrize("broken", [math.nan, math.inf, 3e38])
def test_a_photo_whose_gradient_is_not_finite_adds_nothing(broken: float) -> None:
    gradients = [torch.ones(2, 3), torch.ones(2, 2)]
    gradients[0][1, 1] = broken
    total = clipped_sum(gradients, 100.0)
    assert torch.equal(total[0], torch.ones(3)) and torch.equal(total[1], torch.ones(2))


def test_a_non_finite_photo_does_not_affect_the_step() -> None:
    photos = faces(3)
    photos[1, 0, 0, 0] = math.nan
    gradient = private_gradient(
        PerExampleProblem(SmallCritic(), loss),
        photos,
        SampledMechanism(ClippedSum(clip_norm=1.0), 1.0, STREAMS.generator("coins")),
        expected_batch_size=3,
    )
    assert all(bool(torch.isfinite(g).all()) for g in gradient)


def test_noise_is_added_once_with_standard_deviation_sigma_clip_over_batch() -> None:
    """Without photos only noise remains; its sum of squares is chi-square. Three microbatches add no more."""
    module = nn.Linear(300, 300)

    def flat_loss(network: Network, x: Tensor) -> Tensor:
        return 0.0 * network(x).sum(1)

    mechanism = GaussianSum(clip_norm=0.1, sigma=2.0)
    scale = 2.0 * 0.1 / 16
    for photos in (torch.zeros(0, 300), torch.zeros(40, 300)):
        released = private_gradient(
            PerExampleProblem(module, flat_loss, microbatch=16),
            photos,
            SampledMechanism(mechanism, 0.9, SecretNoise()),
            expected_batch_size=16,
        )
        flat = torch.cat([g.flatten() for g in released]).double() / scale
        probability = stats.chi2.cdf(float(flat.square().sum()), flat.numel())
        assert 1e-6 < probability < 1 - 1e-6


def test_two_private_steps_on_the_same_photos_differ() -> None:
    module, photos = SmallCritic(), faces(4)
    first, second = (
        private_gradient(
            PerExampleProblem(module, loss),
            photos,
            SampledMechanism(GaussianSum(clip_norm=1.0, sigma=1.0), 1.0, SecretNoise()),
            expected_batch_size=4,
        )
        for _ in range(2)
    )
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_step_without_dp_is_reproducible() -> None:
    module, photos = SmallCritic(), faces(20)
    first, second = (
        private_gradient(
            PerExampleProblem(module, loss),
            photos,
            SampledMechanism(ClippedSum(clip_norm=1.0), 0.3, STREAMS.generator("coins")),
            expected_batch_size=4,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_private_step_refuses_a_seeded_generator() -> None:
    with pytest.raises(PrivacyError, match="SecretNoise"):
        private_gradient(
            PerExampleProblem(SmallCritic(), loss),
            faces(2),
            SampledMechanism(GaussianSum(clip_norm=1.0, sigma=1.0), 0.5, STREAMS.generator("coins")),
            expected_batch_size=2,
        )


@pytest.mark.parametrize("rng", [SecretNoise(), STREAMS.generator("coins")])
def test_batch_sizes_are_binomial_and_every_photo_is_sampled_equally_often(
    rng: SecretNoise | torch.Generator,
) -> None:
    draws = [poisson_sample_units(50, 0.2, rng) for _ in range(4000)]
    sizes = torch.tensor([len(d) for d in draws]).bincount(minlength=51).double().numpy()
    expected = 4000 * stats.binom.pmf(range(51), 50, 0.2)
    middle = slice(4, 18)
    observed = [*sizes[middle], sizes[:4].sum() + sizes[18:].sum()]
    required = [*expected[middle], expected[:4].sum() + expected[18:].sum()]
    assert stats.chisquare(observed, required).pvalue > 1e-6
    per_photo = torch.cat(draws).bincount(minlength=50).double().numpy()
    assert (abs(per_photo - 800) < 6 * math.sqrt(4000 * 0.2 * 0.8)).all()


def test_empty_and_full_samples_work() -> None:
    assert poisson_sample_units(0, 0.5, SecretNoise()).numel() == 0
    assert poisson_sample_units(5, 1.0, SecretNoise()).tolist() == [0, 1, 2, 3, 4]


def check(module: nn.Module, size: int = 8) -> None:
    check_per_example_gradients(PerExampleProblem(module, loss), faces(2, size))


def test_the_check_passes_a_discriminator_at_equalised_learning_rate() -> None:
    check(SmallCritic())


def test_the_check_passes_the_discriminator_that_training_uses() -> None:
    config = DiscriminatorConfig(size=16, channel_base=256, channel_max=16)
    discriminator = Discriminator(config, rng=STREAMS.generator("discriminator"))
    check(discriminator, 16)


def test_the_check_passes_a_network_that_uses_a_weight_outside_its_layer() -> None:
    check(Demodulated())


def test_the_check_refuses_minibatch_statistics() -> None:
    with pytest.raises(PrivacyError, match="photo"):
        check(Coupled())


def test_the_check_refuses_batch_normalisation() -> None:
    with pytest.raises(PrivacyError, match="mixes photos"):
        check(Statistics())


def test_a_frozen_parameter_gets_no_gradient() -> None:
    module = SmallCritic()
    module.first.weight.requires_grad_(False)
    shapes = [tuple(g.shape[1:]) for g in per_example_gradients(PerExampleProblem(module, loss), faces(3))]
    assert shapes == [(4,), (1, 4, 3, 3), (1,)]


def shifted_loss(network: Network, photos: Tensor, draws: Tensor) -> Tensor:
    """The mean over K draws (n, K, ...) of the loss at photo + draw, one per photo."""
    count = draws.shape[1]
    shown = photos.repeat_interleave(count, dim=0) + draws.flatten(0, 1)
    return loss(network, shown).view(-1, count).mean(dim=1)


def test_scaled_gradients_are_clipped_after_they_are_scaled() -> None:
    """Compared with a slow reference; one more photo moves the sum by at most the clip norm, for any scales."""
    module, photos = SmallCritic(), faces(5)
    scales = [torch.rand(weight.shape) * 100 for weight in module.parameters()]

    def step(seen: Tensor) -> Tensor:
        parts = private_gradient(
            PerExampleProblem(module, loss, scales=scales, microbatch=2),
            seen,
            SampledMechanism(ClippedSum(clip_norm=0.5), 1.0, torch.Generator()),
            expected_batch_size=1,
        )
        return torch.cat([part.flatten() for part in parts])

    required = torch.zeros(())
    for gradient in one_at_a_time(module, photos):
        long = torch.cat([(g * scale).flatten() for g, scale in zip(gradient, scales, strict=True)])
        required = required + long * min(1.0, 0.5 / float(long.norm()))
    assert torch.allclose(step(photos), required, atol=1e-5)
    assert float((step(photos) - step(photos[:4])).norm()) <= 0.5 * (1 + 1e-5)


def sampled(photos: int, count: int = 3) -> Tensor:
    return torch.randn(photos, count, 3, 8, 8, generator=STREAMS.generator("draws"))


def draw_by_draw(module: nn.Module, photos: Tensor, draws: Tensor) -> list[list[Tensor]]:
    """The slow reference: one backward pass per photo and draw, then the mean over a photo's draws."""
    weights = list(module.parameters())
    every = [
        [torch.autograd.grad(loss(module, (photo + one)[None]).sum(), weights) for one in row]
        for photo, row in zip(photos, draws, strict=True)
    ]
    return [[torch.stack(parts).mean(0) for parts in zip(*photo, strict=True)] for photo in every]


def test_draws_are_averaged_within_each_photo_as_in_the_slow_reference() -> None:
    """Three draws for each of four photos, all different."""
    module, photos, draws = SmallCritic(), faces(4), sampled(4)
    ours = per_example_gradients(PerExampleProblem(module, shifted_loss), photos, draws)
    for photo, reference in enumerate(draw_by_draw(module, photos, draws)):
        for one, other in zip(ours, reference, strict=True):
            assert torch.allclose(one[photo], other, rtol=1e-4, atol=1e-7)


def test_clipping_comes_after_the_mean_over_draws() -> None:
    """One photo with many draws adds a vector of norm clip_norm and no more, in the reference's direction."""
    module, photos, draws = SmallCritic(), faces(1), sampled(1, 16)
    (reference,) = draw_by_draw(module, photos, draws)
    clip_norm = length(reference) / 3

    fixed_draws = Draws(lambda count, _: draws[:count], np.random.default_rng())
    ours = private_gradient(
        PerExampleProblem(module, shifted_loss, fixed_draws, microbatch=1),
        photos,
        SampledMechanism(ClippedSum(clip_norm=clip_norm), 1.0, STREAMS.generator("coins")),
        expected_batch_size=1,
    )
    assert length(ours) == approx(clip_norm, rel=1e-4)
    assert all(torch.allclose(a, b / 3, rtol=1e-3, atol=1e-7) for a, b in zip(ours, reference, strict=True))


def test_every_microbatch_gets_as_many_rows_of_draws_as_images() -> None:
    """Seven photos in threes need 3, 3 and 3, because of padding; no photos need one microbatch."""
    asked: list[int] = []

    def draw(photos: int, _: np.random.Generator) -> Tensor:
        asked.append(photos)
        return sampled(photos)

    for photos in (7, 0):
        gradient = private_gradient(
            PerExampleProblem(
                SmallCritic(), shifted_loss, Draws(draw, np.random.default_rng()), microbatch=3
            ),
            faces(photos),
            SampledMechanism(GaussianSum(clip_norm=1.0, sigma=1.0), 1.0, SecretNoise()),
            expected_batch_size=4,
        )
        assert all(float(part.abs().max()) > 0 for part in gradient)
    assert asked == [3, 3, 3, 3]


def test_the_check_passes_a_loss_with_draws_and_refuses_a_network_that_mixes_photos() -> None:
    """The check works with draws as without."""
    draws = Draws(lambda count, _: sampled(count), np.random.default_rng())
    check_per_example_gradients(PerExampleProblem(SmallCritic(), shifted_loss, draws), faces(2))
    with pytest.raises(PrivacyError, match="mixes photos"):
        check_per_example_gradients(PerExampleProblem(Statistics(), shifted_loss, draws), faces(2))


def weak_noise(total: Tensor, mechanism: GaussianSum, secret: SecretNoise) -> Tensor:
    """Half of the noise that it is priced for."""
    return 0.5 * add_noise(total, mechanism, secret)


def frozen_noise(total: Tensor, mechanism: GaussianSum, _: SecretNoise) -> Tensor:
    """The same noise in every step."""
    drawn = torch.randn(total.shape, generator=torch.Generator().manual_seed(1))
    return total + mechanism.sigma * mechanism.clip_norm * drawn


@pytest.mark.parametrize("broken", [weak_noise, frozen_noise])
def test_a_mechanism_that_is_not_the_priced_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[Tensor, GaussianSum, SecretNoise], Tensor]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(PrivacyError, match="the noise has mean"):
        patch.setattr("fedface.training.dp_sgd.add_noise", broken)
        check_mechanism(GaussianSum(clip_norm=0.5, sigma=2.0), SecretNoise())
    for clip_norm in (1e-3, 1.0, 1e3):
        check_mechanism(GaussianSum(clip_norm=clip_norm, sigma=2.0), SecretNoise())


@pytest.mark.parametrize(("unit", "clip"), [("photo", 0.5), ("library", 0.02)])
def test_a_share_of_less_noise_than_is_priced_is_refused(
    monkeypatch: pytest.MonkeyPatch, unit: Literal["photo", "library"], clip: float
) -> None:
    """Three honest shares have the variance of the sum, at the clip norm of the unit; half of one is too little."""
    schedule = Schedule(rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=1, clip_norm=0.5)
    dp = DPParameters(
        schedule=schedule,
        noise_multiplier=2.0,
        unit=unit,
        update_clip_norm=0.02,
        noise="distributed",
        honest_devices=3,
    )
    check_shares(dp)
    priced, seen = DistributedNoise.of(dp, 10, 3), noised_integers
    assert priced is not None and priced.clip_norm == clip
    monkeypatch.setattr(
        "fedface.training.dp_sgd.noised_integers", lambda update, noise: seen(update, noise) // 2
    )
    with pytest.raises(PrivacyError, match="this device's share of the noise has standard deviation"):
        check_shares(dp)


def test_clipping_that_does_not_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(gradients: list[Tensor], clip_norm: float) -> list[Tensor]:
        return [gradient.nan_to_num().sum(0) for gradient in gradients]

    monkeypatch.setattr("fedface.training.dp_sgd.clipped_sum", unclipped)
    with pytest.raises(PrivacyError, match="clipped to L2 norm 5 instead of 0.5"):
        check_mechanism(GaussianSum(clip_norm=0.5, sigma=2.0), SecretNoise())
