"""One round of GAN training: equal to a slow reference, bounded, and private where photos are used."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_gan
from torch.nn import functional

from fedface.errors import PrivacyError
from fedface.models.checkpoint import assign_parameters, flatten_parameters, weights_hash
from fedface.models.model import Model
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.tensor_types import Images, Vector
from fedface.training.gan import GanRound, GanTrainingConfig

STREAMS = Streams(11)
ONE_STEP = GanTrainingConfig(
    rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=6, clip_norm=1e6, discriminator_lr=0.05,
    generator_lr=1e-3, generator_steps=1, fake_batch_size=4, r2_weight=0.5,
)  # fmt: skip


def photos(count: int = 6) -> Images:
    """Noise images."""
    return torch.rand(count, 3, 16, 16, generator=STREAMS.generator("photos"))


def dp_parameters(config: GanTrainingConfig, sigma: float = 0.0) -> DPParameters:
    """The schedule with a noise multiplier; 0 is without privacy."""
    return DPParameters(schedule=config.schedule(), noise_multiplier=sigma)


def one_round(gan: Model, seen: Images, config: GanTrainingConfig, sigma: float = 0.0) -> Vector:
    """A round with the streams of this file."""
    rng = SecretNoise() if sigma else STREAMS.generator("coins")
    return GanRound(gan, config, dp_parameters(config, sigma)).update(seen, rng=rng, streams=STREAMS)


def slow_reference(gan: Model, seen: Images, config: GanTrainingConfig) -> Vector:
    """One step without clipping or noise: plain descent on the discriminator, then Adam by its formula."""
    reference = copy.deepcopy(gan)
    latents = STREAMS.generator("latents")
    torch.randn(2, reference.generator.latent_width, generator=latents)  # the check of per-photo gradients

    made_from = torch.randn(config.fake_batch_size, reference.generator.latent_width, generator=latents)
    generated = reference.generator.synthesize(reference.generator.map(made_from)).detach().requires_grad_()
    on_photos = functional.softplus(-reference.discriminator(seen)).sum() / config.expected_batch_size
    on_generated = functional.softplus(reference.discriminator(generated)).mean()
    (slope,) = torch.autograd.grad(reference.discriminator(generated).sum(), generated, create_graph=True)
    penalty = config.r2_weight / 2 * slope.pow(2).flatten(1).sum(1).mean()
    weights = list(reference.discriminator.parameters())
    gradients = torch.autograd.grad(on_photos + on_generated + penalty, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= config.discriminator_lr * gradient

    weights = list(reference.generator.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    for step in range(1, config.generator_steps + 1):
        made_from = torch.randn(config.fake_batch_size, reference.generator.latent_width, generator=latents)
        loss = functional.softplus(
            -reference.discriminator(reference.generator.synthesize(reference.generator.map(made_from)))
        ).mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, square in zip(weights, gradients, squares, strict=True):
                # Adam without momentum: each gradient over the root of the running mean of its squares.
                square.mul_(0.9).add_(0.1 * gradient.square())
                weight -= config.generator_lr * gradient / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
    return flatten_parameters(*reference.modules()) - flatten_parameters(*gan.modules())


def generator_weights(gan: Model) -> int:
    """The number of the generator's weights, which come first in a vector."""
    return len(flatten_parameters(gan.generator))


@pytest.mark.parametrize("generator_steps", [1, 3])
def test_one_step_without_dp_is_ordinary_adversarial_training(generator_steps: int) -> None:
    """Sampling rate 1, no clipping, no noise: the textbook step, up to float32 rounding."""
    gan, config = tiny_gan(), replace(ONE_STEP, generator_steps=generator_steps)
    ours, theirs = one_round(gan, photos(), config), slow_reference(gan, photos(), config)
    front = generator_weights(gan)
    assert float((ours[front:] - theirs[front:]).abs().max()) < 1e-5 * float(theirs[front:].abs().max())
    # Adam divides a gradient by its own length, so a weight whose gradient is rounding may go either way.
    off = (ours[:front] - theirs[:front]).abs() > 1e-2 * ONE_STEP.generator_lr
    assert float(off.float().mean()) < 0.01
    assert float(theirs[front:].abs().max()) > 1e-4 and float(theirs[:front].abs().max()) > 1e-4


def test_a_round_does_not_change_its_input_networks() -> None:
    """The server's weights are the same for the next device."""
    gan = tiny_gan()
    before = weights_hash(*gan.modules())
    assert float(one_round(gan, photos(), ONE_STEP).abs().max()) > 0
    assert weights_hash(*gan.modules()) == before


def test_a_round_without_dp_is_reproducible_for_any_global_seed() -> None:
    """Equal streams give equal updates."""
    config = replace(ONE_STEP, steps_per_round=3, sampling_rate=0.5)
    first = one_round(tiny_gan(), photos(), config)
    torch.rand(5)
    assert torch.equal(first, one_round(tiny_gan(), photos(), config))


def test_a_device_without_photos_sends_noise_of_the_usual_size() -> None:
    """With zero photos and with six, the noise of the discriminator's update has the same size."""
    config = replace(ONE_STEP, clip_norm=1.0, r2_weight=0.0, discriminator_lr=1.0)
    gan = tiny_gan()
    front = generator_weights(gan)
    sizes = [float(one_round(gan, photos(count), config, sigma=50.0)[front:].std()) for count in (0, 6)]
    noise = 50.0 / config.expected_batch_size
    for size in sizes:
        assert size == pytest.approx(
            noise, rel=5 / (2 * (len(flatten_parameters(gan.discriminator)) ** 0.5)) + 0.01
        )


def test_a_private_round_is_never_the_same_twice() -> None:
    """Equal photos, equal streams, fresh noise on every weight of the discriminator."""
    gan = tiny_gan()
    front = generator_weights(gan)
    first, second = (one_round(gan, photos(), ONE_STEP, sigma=1.0)[front:] for _ in range(2))
    assert bool((first != second).float().mean() > 0.99)


def test_a_private_round_refuses_a_seeded_generator() -> None:
    """Seeded noise gives no privacy; nothing is computed."""
    with pytest.raises(PrivacyError, match="SecretNoise"):
        GanRound(tiny_gan(), ONE_STEP, dp_parameters(ONE_STEP, 1.0)).update(
            photos(), rng=STREAMS.generator("x"), streams=STREAMS
        )


def test_the_tasks_schedule_overrides_the_configuration() -> None:
    """A configuration of 1 step under a schedule of 2 takes 2."""
    agreed = dp_parameters(replace(ONE_STEP, steps_per_round=2))
    ours = GanRound(tiny_gan(), ONE_STEP, agreed).update(
        photos(), rng=STREAMS.generator("coins"), streams=STREAMS
    )
    theirs = one_round(tiny_gan(), photos(), replace(ONE_STEP, steps_per_round=2))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("generator_steps", [1, 2])
def test_the_public_ranges_contain_every_update(generator_steps: int) -> None:
    """Without noise, R2 included, and with no more photos than expected, no weight leaves its range."""
    config = replace(
        ONE_STEP,
        steps_per_round=4,
        generator_steps=generator_steps,
        clip_norm=0.01,
        discriminator_lr=5.0,
        r2_weight=50.0,
    )
    gan = tiny_gan()
    moved = one_round(gan, photos(), config) / GanRound(gan, config, dp_parameters(config)).ranges()
    front = generator_weights(gan)
    assert moved.shape == flatten_parameters(*gan.modules()).shape
    assert float(moved.abs().max()) <= 1.0
    assert float(moved[:front].abs().max()) > 0.2 and float(moved[front:].abs().max()) > 0.05


def test_one_photo_more_moves_the_discriminator_by_at_most_its_clipped_gradient() -> None:
    """rate * clip norm / expected batch in one step: the sensitivity that is accounted for."""
    config = replace(ONE_STEP, clip_norm=0.05)
    gan = tiny_gan()
    front = generator_weights(gan)
    six, seven = (one_round(gan, photos(7)[:count], config)[front:] for count in (6, 7))
    most = config.discriminator_lr * config.clip_norm / config.expected_batch_size
    assert 0.5 * most < float((six - seven).norm()) <= most * 1.001


def test_photos_affect_the_generator_only_through_the_noised_discriminator() -> None:
    """A generator's step with other photos differs only if the discriminator's update differs."""
    gan = tiny_gan()
    front = generator_weights(gan)
    still = replace(ONE_STEP, discriminator_lr=1e-30)
    one, other = one_round(gan, photos(), still), one_round(gan, photos().flip(-1) * 0.3, still)
    assert torch.equal(one[:front], other[:front])
    moving = (one_round(gan, x, ONE_STEP)[:front] for x in (photos(), photos().flip(-1) * 0.3))
    assert not torch.equal(*moving)


def test_training_moves_samples_towards_the_photos() -> None:
    """White photos, black start: forty steps without DP make the samples lighter."""
    gan = tiny_gan()
    config = replace(
        ONE_STEP,
        steps_per_round=40,
        clip_norm=5.0,
        discriminator_lr=0.2,
        generator_lr=5e-3,
        fake_batch_size=16,
    )
    white = torch.ones(6, 3, 16, 16)
    before = gan.generator.sample(64, STREAMS.generator("look")).mean()
    after = copy.deepcopy(gan)
    assign_parameters(flatten_parameters(*gan.modules()) + one_round(gan, white, config), *after.modules())
    assert float(after.generator.sample(64, STREAMS.generator("look")).mean()) > float(before) + 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fake_batch_size": 1}, "fake_batch_size must lie in .2, 4096., got 1"),
        ({"generator_steps": 0}, "generator_steps must lie in .1, 4096., got 0"),
        ({"discriminator_lr": 0.0}, "discriminator_lr must lie in"),
        ({"generator_lr": float("nan")}, "generator_lr must lie in"),
        ({"r2_weight": -1.0}, "r2_weight must lie in"),
        ({"server_lr": 5.0}, "server_lr must lie in"),
        ({"sampling_rate": 0.0}, "sampling_rate must lie in"),
        ({"expected_batch_size": 0}, "expected_batch_size must lie in"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_name(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(ONE_STEP, **change)  # type: ignore[arg-type]


def test_a_round_that_would_take_years_is_refused() -> None:
    """Each factor is allowed by itself; a hostile task multiplies them."""
    with pytest.raises(ValueError, match="generated images in a round, got 1,200,000"):
        GanTrainingConfig(steps_per_round=100, generator_steps=999, fake_batch_size=12)


def test_a_generator_is_not_trained_with_noise_that_only_a_sum_completes() -> None:
    """Its steps read the discriminator after the step on photos, which would have no noise yet."""
    dp = replace(dp_parameters(ONE_STEP, 1.0), noise="distributed", honest_devices=3)
    with pytest.raises(PrivacyError, match="per photo or occasion this training needs local noise"):
        ONE_STEP.prepare(tiny_gan(), dp, torch.Generator())
    assert ONE_STEP.prepare(tiny_gan(), replace(dp, unit="library"), torch.Generator())
