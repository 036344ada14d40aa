"""The flow's private round against slow references, and the bundled checkpoint by its metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from fedface.audits.bias import DARKER_FROM
from fedface.audits.feature_distances import face_features, kernel_distance
from fedface.errors import PrivacyError
from fedface.models.checkpoint import flatten_parameters, load_flow, weights_hash
from fedface.models.lora import Lora, assign_trainable, attach, flatten_trainable
from fedface.models.model import FlowArchitecture, Model
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.photos.skin_tone import measure_tone
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.training.flow import (
    FlowRound,
    FlowTrainingConfig,
    flow_loss,
    loss_over_draws,
    public_scales,
    times_and_noises,
)
from fedface.training.per_example_gradients import PerExampleProblem, per_example_gradients
from fedface.training.pretrain_flow import (
    FlowPretrainConfig,
    FlowPretraining,
    pretrain_flow,
    stratified_times,
    synthesize_pool,
)

STREAMS = Streams(4)
TINY = FlowConfig(size=16, width=8, multipliers=(1.0, 2.0), group=4, time_width=8, steps=4)
CONFIG = FlowTrainingConfig(
    rounds=2,
    steps_per_round=1,
    sampling_rate=1.0,
    expected_batch_size=6,
    clip_norm=0.5,
    noise_draws=3,
    lr=0.2,
    preconditioner=0.0,
    lr_noise_threshold=1000.0,
)


def tiny_flow() -> RectifiedFlow:
    """Weights away from the initial ones, at which most gradients are zero."""
    flow = RectifiedFlow(TINY, STREAMS.generator("weights"))
    rng = STREAMS.generator("moved")
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1)
    return flow


def photos(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=STREAMS.generator("photos"))


def dp_parameters(noise: float = 0.0, config: FlowTrainingConfig = CONFIG) -> DPParameters:
    return DPParameters(schedule=config.schedule(), noise_multiplier=noise)


def synthetic_faces(count: int, light_fraction: float, name: str) -> Tensor:
    """Faces through cameras, as in pretraining."""
    rng = STREAMS.generator(name)
    return render(sample_faces(count, ToneMix(light_fraction=light_fraction), rng), 32, noise=rng)


def round_of(flow: RectifiedFlow, images: Tensor, **changes: Any) -> Tensor:
    given: dict[str, Any] = {"rng": STREAMS.generator("coins"), "streams": STREAMS, **changes}
    return flow_round(flow, given.pop("config", CONFIG), given.pop("dp", dp_parameters())).update(
        images, **given
    )


def flow_round(flow: RectifiedFlow, config: FlowTrainingConfig, dp: DPParameters | None = None) -> FlowRound:
    model = Model(FlowArchitecture(flow=flow.config), {"flow": flow})
    return FlowRound(model, config, dp_parameters(config=config) if dp is None else dp)


def test_the_true_velocity_has_zero_loss() -> None:
    """image - noise is the regression target; velocity zero has the squared distance."""
    images, noise = photos(2), torch.randn(2, 3, 16, 16, generator=STREAMS.generator("noise"))
    way, times = (2.0 * images - 1.0) - noise, torch.tensor([0.25, 0.75])
    assert torch.allclose(flow_loss(lambda x, t: way, images, noise, times), torch.zeros(2))
    still = flow_loss(lambda x, t: torch.zeros_like(x), images, noise, times)
    assert torch.allclose(still, way.square().mean(dim=(1, 2, 3)))


def test_the_network_is_evaluated_on_the_line_from_noise_to_image() -> None:
    """At t = 0 the noise, at 1 the image in [-1, 1], between them the interpolation."""
    images, noise = photos(3), torch.randn(3, 3, 16, 16, generator=STREAMS.generator("noise"))
    seen: list[Tensor] = []

    def network(x: Tensor, times: Tensor) -> Tensor:
        seen.append(x)
        return x

    flow_loss(network, images, noise, torch.tensor([0.0, 1.0, 0.5]))
    pictures = 2.0 * images - 1.0
    assert torch.equal(seen[0][0], noise[0])
    assert torch.allclose(seen[0][1], pictures[1], atol=1e-6)
    assert torch.allclose(seen[0][2], (pictures[2] + noise[2]) / 2.0, atol=1e-6)


def test_the_loss_over_draws_is_the_mean_of_single_ones() -> None:
    """A loop over photos and draws."""
    flow, images = tiny_flow(), photos(2)
    draws = times_and_noises(2, 3, 16, 1.0, np.random.default_rng(1))
    slow = [
        [
            flow_loss(flow, images[n : n + 1], draws[n, k, 1:].view(1, 3, 16, 16), draws[n, k, :1]).item()
            for k in range(3)
        ]
        for n in range(2)
    ]
    assert loss_over_draws(flow, images, draws).tolist() == pytest.approx(np.mean(slow, axis=1), rel=1e-5)


def test_draws_are_stratified_in_time_and_antithetic_in_noise() -> None:
    """One time in each quarter of [0, max_time]; each second noise is minus the one before; all are standard normal."""
    draws = times_and_noises(500, 4, 8, 0.8, np.random.default_rng(2))
    times, noise = draws[:, :, 0], draws[:, :, 1:]
    assert draws.shape == (500, 4, 1 + 3 * 64)
    assert torch.equal((times / 0.2).floor().sort(dim=1).values, torch.arange(4.0).expand(500, 4))
    assert stats.kstest(times.flatten().numpy() / 0.8, "uniform").pvalue > 1e-4
    assert torch.equal(noise[:, 0::2], -noise[:, 1::2])
    assert stats.kstest(noise[:50, ::2].flatten().numpy(), "norm").pvalue > 1e-4
    # Which of the two opposite noises comes first must not hang together with the time.
    assert abs(float((times[:, 0] - times[:, 1]).mean())) < 6 * 0.8 / math.sqrt(6 * 500)
    assert times_and_noises(2, 3, 8, 1.0, np.random.default_rng(3)).shape == (2, 3, 193)


def test_a_round_without_noise_and_with_a_huge_clip_norm_is_plain_gradient_descent() -> None:
    """Compared with autograd: with a field that ignores draws, the round is one step on the mean loss."""
    flow, images = tiny_flow(), photos(6)
    before = flatten_parameters(flow)
    config = FlowTrainingConfig(
        rounds=1,
        steps_per_round=1,
        sampling_rate=1.0,
        expected_batch_size=6,
        clip_norm=1e6,
        noise_draws=64,
        lr=0.2,
        preconditioner=0.0,
    )
    change = round_of(flow, images, config=config, dp=dp_parameters(config=config))
    assert torch.equal(flatten_parameters(flow), before) and all(w.grad is None for w in flow.parameters())
    draws = times_and_noises(6, 512, 16, 1.0, np.random.default_rng(5))
    weights = [weight for _, weight in sorted(flow.named_parameters())]
    plain = torch.autograd.grad(loss_over_draws(flow, images, draws).mean(), weights)
    expected = -0.2 * torch.cat([part.flatten() for part in plain])
    # Other draws of the same distribution: the directions agree as far as 64 draws a photo allow.
    assert float(functional.cosine_similarity(change, expected, dim=0)) > 0.98
    assert float(change.norm() / expected.norm()) == pytest.approx(1.0, abs=0.1)


def test_one_photo_moves_a_round_by_at_most_the_clip_norm_times_the_rate() -> None:
    """An unusual photo among faces: the bound that the noise is scaled to."""
    flow, images = tiny_flow(), photos(1) * 1e4
    bound = CONFIG.lr * CONFIG.clip_norm / CONFIG.expected_batch_size
    assert float(round_of(flow, images).norm()) == pytest.approx(bound, rel=1e-3)


def test_a_round_without_photos_has_noise_of_the_stated_size() -> None:
    """rate * sigma * clip / batch on every weight; the sum of squares is chi-square."""
    flow = tiny_flow()
    change = round_of(flow, photos(0), dp=dp_parameters(2.0), rng=SecretNoise())
    scale = CONFIG.lr * 2.0 * CONFIG.clip_norm / CONFIG.expected_batch_size
    probability = stats.chi2.cdf(float((change.double() / scale).square().sum()), len(change))
    assert 1e-6 < probability < 1 - 1e-6


def test_momentum_repeats_a_fraction_of_each_step() -> None:
    """After two steps of pure noise a, b the weights change by -rate * ((1 + m) a + b): a known variance."""
    config = replace(CONFIG, steps_per_round=2, expected_batch_size=6, clip_norm=0.5, lr=0.2, momentum=0.5)
    change = round_of(tiny_flow(), photos(0), config=config, dp=dp_parameters(2.0, config), rng=SecretNoise())
    scale = 0.2 * 2.0 * 0.5 / 6 * math.sqrt(1.5**2 + 1.0)
    probability = stats.chi2.cdf(float((change.double() / scale).square().sum()), len(change))
    assert 1e-6 < probability < 1 - 1e-6


SCALED = replace(CONFIG, preconditioner=0.1)


def public_gradients(flow: RectifiedFlow) -> list[Tensor]:
    """Each synthetic face's gradient by the definition of the scales, (64, *weight.shape) per weight."""
    streams = Streams(0).child("public faces")
    faces = sample_faces(64, ToneMix(light_fraction=0.5), streams.generator("faces"))
    pictures = render(faces, 16, noise=streams.generator("camera"))
    draws = times_and_noises(64, 1, 16, 1.0, streams.numpy("draws"))
    return per_example_gradients(PerExampleProblem(flow, loss_over_draws), pictures, draws)


def test_scales_equalise_public_gradients_and_preserve_their_mean_square() -> None:
    """1 / (r_i + 0.1 r) up to one factor, by hand; sum of (s g)^2 equals sum of g^2."""
    flow = tiny_flow()
    scales = public_scales(flow, SCALED)
    assert scales is not None
    gradients = public_gradients(flow)
    squares = [gradient.square().sum(dim=0) for gradient in gradients]
    energy = sum(float(square.sum()) for square in squares)
    stored = sum(float((s.square() * square).sum()) for s, square in zip(scales, squares, strict=True))
    assert stored == pytest.approx(energy, rel=1e-4)
    roots = torch.cat([square.sqrt().flatten() for square in squares])
    evened = torch.cat([scale.flatten() for scale in scales]) * (roots + 0.1 * roots.square().mean().sqrt())
    assert evened.std() < 1e-3 * evened.mean()


def test_a_scaled_round_is_descent_along_scaled_and_clipped_gradients() -> None:
    """A slow reference: one photo's gradient times the scales, clipped, over the divisor, times the rate."""
    flow, one = tiny_flow(), photos(1)
    config = replace(SCALED, noise_draws=1, clip_norm=1e-3)
    moved = round_of(flow, one, config=config, dp=dp_parameters(config=config))
    assert moved.norm().item() == pytest.approx(config.lr * 1e-3 / config.expected_batch_size, rel=1e-3)
    plain = round_of(flow, one, config=replace(config, preconditioner=0.0), dp=dp_parameters(config=config))
    assert functional.cosine_similarity(moved, plain, dim=0) < 0.99


def test_above_the_noise_threshold_the_rate_is_inverse_to_the_noise() -> None:
    """Without photos: sigma 0.5 and sigma 5 move the weights equally far."""
    calm = replace(CONFIG, lr_noise_threshold=0.5)
    moved = [
        float(
            round_of(tiny_flow(), photos(0), config=calm, dp=dp_parameters(noise), rng=SecretNoise()).norm()
        )
        for noise in (0.5, 5.0)
    ]
    assert moved[0] == pytest.approx(moved[1], rel=0.1)


def test_scales_are_shared_between_equal_flows_only() -> None:
    """Simulated devices of one process compute them once for a round's weights."""
    one, other = (
        public_scales(tiny_flow(), SCALED),
        public_scales(RectifiedFlow(TINY, torch.Generator()), SCALED),
    )
    assert one is public_scales(tiny_flow(), SCALED) and one is not other
    assert public_scales(tiny_flow(), CONFIG) is None


def test_a_private_round_refuses_a_seeded_generator() -> None:
    with pytest.raises(PrivacyError, match="SecretNoise"):
        round_of(tiny_flow(), photos(2), dp=dp_parameters(1.0))


def test_a_round_is_reproducible_only_without_dp() -> None:
    flow, images = tiny_flow(), photos(4)
    assert torch.equal(round_of(flow, images), round_of(flow, images))
    first, second = (round_of(flow, images, dp=dp_parameters(1e-6), rng=SecretNoise()) for _ in range(2))
    # Hardly any noise: what differs are the times and noises, which are secret as well.
    assert float((first - second).norm()) > 0.01 * float(first.norm())


def test_with_adapters_a_round_changes_only_them_and_lowers_the_loss() -> None:
    """The update has the length of the trained vector."""
    flow, images = tiny_flow(), photos(8)
    attach(flow, Lora(rank=2), STREAMS.generator("adapters"))
    config = FlowTrainingConfig(
        steps_per_round=4,
        sampling_rate=1.0,
        expected_batch_size=8,
        clip_norm=10.0,
        lr=0.05,
        preconditioner=0.0,
        adapt=Lora(rank=2),
    )
    change = round_of(flow, images, config=config, dp=dp_parameters(config=config))
    assert change.shape == flatten_trainable(flow).shape == flow_round(flow, config).ranges().shape
    assert len(change) < len(flatten_parameters(flow)) / 2
    draws = times_and_noises(8, 32, 16, 1.0, np.random.default_rng(6))
    with torch.no_grad():
        before = float(loss_over_draws(flow, images, draws).mean())
        assign_trainable(flatten_trainable(flow) + change, flow)
        assert float(loss_over_draws(flow, images, draws).mean()) < before


def test_ranges_contain_every_update_without_noise() -> None:
    """No weight moves further than all photos together could move it."""
    flow = tiny_flow()
    ranges = flow_round(flow, CONFIG).ranges()
    assert ranges.shape == flatten_parameters(flow).shape
    assert bool((round_of(flow, photos(6)).abs() <= ranges).all())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_draws", 0),
        ("noise_draws", 65),
        ("max_time", 0.0),
        ("max_time", 1.1),
        ("lr", 0.0),
        ("server_lr", 5.0),
        ("rounds", 0),
    ],
)
def test_an_invalid_config_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        FlowTrainingConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pool", 0),
        ("steps", 0),
        ("batch", 1),
        ("light_fraction", 1.5),
        ("learning_rate", 0.0),
        ("averaging", 1.0),
    ],
)
def test_an_invalid_pretraining_config_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        FlowPretrainConfig(**{field: value})


def silent(name: str, done: int, of: int, metrics: dict[str, float]) -> None:
    """Discards progress."""


def test_times_of_pretraining_are_logit_normal_one_from_each_slice() -> None:
    """The logits of 1000 stratified times are normal, closer than random ones would be."""
    times = stratified_times(1000, STREAMS.generator("times"))
    sorted_places = torch.special.ndtr(torch.logit(times.double())).sort().values * 1000
    assert bool(((sorted_places.floor() - torch.arange(1000)).abs() <= 1).all())


def test_pretraining_improves_the_flow_and_writes_notes() -> None:
    """A hundredth of the steps: better than none, equal for equal seeds, with notes."""
    config = FlowPretrainConfig(pool=64, steps=60, batch=16, learning_rate=1e-2, flow=TINY)
    flow = pretrain_flow(config, silent)
    torch.rand(3)
    assert weights_hash(flow.generator) == weights_hash(pretrain_flow(config, silent).generator)
    assert flow.notes["images_seen"] == 60 * 16 and flow.notes["recipe"]["seed"] == 7
    images = synthesize_pool(config, silent).float() / 255.0
    draws = times_and_noises(64, 4, 16, 1.0, np.random.default_rng(7))
    untrained = FlowPretraining(config, synthesize_pool(config, silent)).flow
    with torch.no_grad():
        start, end = (
            float(loss_over_draws(net, images, draws).mean()) for net in (untrained, flow.generator)
        )
    assert end < 0.8 * start


@pytest.fixture(scope="module")
def generated() -> Tensor:
    """Samples of the bundled flow."""
    return load_flow().generator.sample(150, STREAMS.generator("samples"))


@pytest.mark.slow
def test_the_bundled_flow_generates_faces(generated: Tensor) -> None:
    """Closer to synthetic faces than blurred ones are, and than another tone distribution is."""
    real, again = synthetic_faces(150, 0.85, "real"), synthetic_faces(150, 0.85, "again")
    blurred = functional.interpolate(functional.avg_pool2d(again, 4), scale_factor=4.0, mode="bilinear")
    planted = (blurred, synthetic_faces(150, 0.3, "others"))
    truth = face_features(real)
    distance = kernel_distance(truth, face_features(generated))
    assert all(distance < kernel_distance(truth, face_features(bad)) for bad in planted)


def test_the_bundled_flow_has_the_tones_of_its_training_data(generated: Tensor) -> None:
    """Its share of darker faces is closer to that of synthetic faces at 85 % light than at 50 %."""
    assert load_flow().notes["recipe"]["light_fraction"] == 0.85
    sets = (generated, synthetic_faces(300, 0.85, "real"), synthetic_faces(300, 0.5, "mixed"))
    share, light, mixed = (float((measure_tone(faces).monk >= DARKER_FROM).float().mean()) for faces in sets)
    assert abs(share - light) < abs(share - mixed)


def test_the_bundled_flow_inverts_photos() -> None:
    """Unseen synthetic faces: above 30 dB after both ways, and latents of unit variance."""
    flow = load_flow().generator
    faces = synthetic_faces(16, 0.85, "unseen")
    with torch.no_grad():
        latents = flow.invert(faces, steps=16)
        back = flow.synthesize(flow.map(latents)).clamp(0.0, 1.0)
    psnr = -10.0 * torch.log10((back - faces).square().mean(dim=(1, 2, 3)))
    assert float(psnr.min()) > 30.0
    assert 0.8 < float(latents.std()) < 1.25
