"""A round of upsampler training: DP-SGD on degraded photos."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import GENERATOR, RESOLVER, STYLES, tiny_way, train_task
from torch import Tensor

from fedface.device.client import handle_task
from fedface.errors import ConfigError, PrivacyError, WeightsError
from fedface.messages.messages import Refusal, TrainResult
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, weights_hash
from fedface.models.lora import Full, Lora, flatten_trainable
from fedface.models.model import Model, StyleEncoderArchitecture, SuperResolutionArchitecture, build_model
from fedface.models.super_resolution import SuperResolutionNetworkConfig
from fedface.privacy.ledger import Ledger
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.simulation.devices import prepare, simulated_device
from fedface.synthetic.faces import render_people
from fedface.training.pretrain_gan import pair_losses
from fedface.training.upsampler import (
    UpsamplerRound,
    UpsamplerTrainingConfig,
    mark_upsampler,
    reconstruction_loss,
)
from fedface.upsampling.degradation import Area, BicubicPulse, Chain, Degradation, Noise, Pixelate
from fedface.upsampling.upsampler import squared_difference

STREAMS = Streams(11)
PHOTOS = render_people(6, 0.5, 16, STREAMS)
CONFIG = UpsamplerTrainingConfig(
    rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=4, clip_norm=0.5, lr=0.2, momentum=0.0
)
SHAPES = {
    "styles": StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
    "resolver": SuperResolutionArchitecture(network=RESOLVER),
}
LARGE = SuperResolutionNetworkConfig(
    side=512, factor=2, width=16, blocks=64
)  # 1.2 MB of weights, gigabytes of activations
both = pytest.mark.parametrize("name", SHAPES)


def marked(name: str) -> Model:
    """A model with its trained parameters marked."""
    model: Model = build_model(SHAPES[name], STREAMS.generator(name))
    assert model.is_upsampler
    mark_upsampler(model, Full(), STREAMS.generator("adapter"))
    return model


def dp_parameters(noise: float = 0.0, config: UpsamplerTrainingConfig = CONFIG) -> DPParameters:
    """This schedule, with or without noise."""
    return DPParameters(schedule=config.schedule(), noise_multiplier=noise)


def seeded() -> torch.Generator:
    """A seeded generator."""
    return STREAMS.generator("coins")


@both
def test_one_step_is_the_clipped_mean_of_one_photo_gradients(name: str) -> None:
    """A slow reference: each photo alone, its gradient clipped, summed, divided by the public batch size."""
    model = marked(name)
    network = copy.deepcopy(model.upsampler)
    weights = [w for _, w in sorted(network.named_parameters()) if w.requires_grad]
    total = torch.zeros(sum(w.numel() for w in weights))
    for photo in PHOTOS.split(1):
        low = BicubicPulse(4).apply(photo).clamp(0, 1)
        generated = network(low)
        loss = pair_losses(generated, photo) + 10.0 * squared_difference(
            BicubicPulse(4).apply(generated), low
        )
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), weights)])
        total += gradient * min(1.0, 0.5 / float(gradient.norm()))
    update = UpsamplerRound(model, CONFIG, dp_parameters()).update(PHOTOS, rng=seeded(), streams=STREAMS)
    torch.testing.assert_close(update, -0.2 * total / 4, atol=2e-6, rtol=1e-3)


@both
def test_one_photo_more_moves_a_step_by_the_clip_norm_at_most(name: str) -> None:
    """The bound that the noise is scaled to, also for pure noise."""
    model = marked(name)
    wild = torch.rand(1, 3, 16, 16, generator=STREAMS.generator("wild"))
    one, more = (
        UpsamplerRound(model, CONFIG, dp_parameters()).update(seen, rng=seeded(), streams=STREAMS)
        for seen in (PHOTOS, torch.cat([PHOTOS, wild]))
    )
    moved = float((more - one).norm())
    assert 0 < moved <= 0.2 * 0.5 / 4 * (1 + 1e-5)


@both
def test_with_distributed_noise_a_device_sends_the_sum_of_its_one_step(name: str) -> None:
    """In units of clipped gradients, without noise: it is added in shares, to integers."""
    model, dp = marked(name), dp_parameters(2.0)
    shared = UpsamplerRound(model, CONFIG, replace(dp, noise="distributed", honest_devices=3))
    sent = shared.update(PHOTOS, rng=SecretNoise(), streams=STREAMS)
    plain = UpsamplerRound(model, CONFIG, dp_parameters()).update(PHOTOS, rng=seeded(), streams=STREAMS)
    torch.testing.assert_close(sent / shared.ranges(), plain.double() * 4 / -0.2, atol=3e-5, rtol=1e-3)
    whole = UpsamplerRound(model, CONFIG, dp_parameters())
    one, other = (
        flatten_parameters(*work.apply(total.float(), 2, torch.Generator()).modules())
        for work, total in ((shared, sent), (whole, plain))
    )
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not shared.update(PHOTOS[:0], rng=SecretNoise(), streams=STREAMS).any()


@both
def test_noise_has_the_stated_size_also_without_a_photo(name: str) -> None:
    """An empty library: each number is rate * sigma * clip / batch of noise, and DP needs secret noise."""
    model = marked(name)
    update = UpsamplerRound(model, CONFIG, dp_parameters(2.0)).update(
        PHOTOS[:0], rng=SecretNoise(), streams=STREAMS
    )
    # Beyond a noise of 0.5 the rate falls as 1 / noise: 0.2 * 0.5 / 2.
    assert float(update.std()) == pytest.approx(0.05 * 2.0 * 0.5 / 4, rel=0.1)
    with pytest.raises(PrivacyError, match="SecretNoise"):
        UpsamplerRound(model, CONFIG, dp_parameters(2.0)).update(PHOTOS, rng=seeded(), streams=STREAMS)


def test_devices_train_the_encoder_and_never_the_generator() -> None:
    """The update has the encoder's length; the round's networks are unchanged."""
    model = marked("styles")
    assert isinstance(model.architecture, StyleEncoderArchitecture)
    before = flatten_parameters(*model.modules())
    update = UpsamplerRound(model, CONFIG, dp_parameters()).update(PHOTOS, rng=seeded(), streams=STREAMS)
    assert (
        len(update)
        == len(flatten_trainable(model.networks["encoder"]))
        == flatten_parameters(model.networks["encoder"]).numel()
    )
    assert torch.equal(flatten_parameters(*model.modules()), before)


@both
def test_ranges_contain_an_update_of_the_expected_number_of_photos(name: str) -> None:
    """Two steps with momentum 0.9 repeat a step 1 + 1.9 times; twice that is the range."""
    config = UpsamplerTrainingConfig(steps_per_round=2, lr=0.2, clip_norm=0.5, momentum=0.9)
    ranges = UpsamplerRound(marked(name), config, dp_parameters()).ranges()
    assert torch.allclose(ranges, torch.full_like(ranges, 2 * 2.9 * 0.2 * 0.5))


@both
def test_several_steps_are_descent_with_heavy_ball_momentum(name: str) -> None:
    """A slow reference: v <- 0.5 v + mean gradient, w <- w - rate v, three times; and the outputs come closer."""
    config = UpsamplerTrainingConfig(
        steps_per_round=3, sampling_rate=1.0, expected_batch_size=6, clip_norm=1e3, lr=0.02, momentum=0.5
    )
    model = marked(name)
    lesson, network = (
        reconstruction_loss(config.downscale, config.consistency_weight),
        copy.deepcopy(model.upsampler),
    )
    weights = [w for _, w in sorted(network.named_parameters()) if w.requires_grad]
    start, pace = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]
    losses = []
    for _ in range(3):
        loss = lesson(network, PHOTOS).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, moved, gradient in zip(weights, pace, gradients, strict=True):
                moved.mul_(0.5).add_(gradient)
                weight -= 0.02 * moved
    update = UpsamplerRound(model, config, dp_parameters(config=config)).update(
        PHOTOS, rng=seeded(), streams=STREAMS
    )
    expected = torch.cat([(w.detach() - s).flatten() for w, s in zip(weights, start, strict=True)])
    torch.testing.assert_close(update, expected, atol=2e-5, rtol=1e-3)
    assert losses[2] < losses[1] < losses[0]


def test_the_loss_compares_photo_and_low_resolution_pixels() -> None:
    """A perfect output has loss 0; one that is 0.1 too bright everywhere has 0.3, plus 0.01 times the weight."""

    def perfect(low: Tensor) -> Tensor:
        return PHOTOS

    lesson = reconstruction_loss(Area(4), 10.0)
    assert float(lesson(perfect, PHOTOS).abs().max()) < 1e-6
    brighter = lesson(lambda low: PHOTOS + 0.1, PHOTOS)
    torch.testing.assert_close(brighter, torch.full((6,), 0.3 + 10.0 * 0.01), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["styles", "resolver"])
def test_a_policy_for_generators_only_refuses_upsampler_training(tmp_path: Path, way: str) -> None:
    """The objective is derived from the training config on the device; if allowed, the same task is answered."""
    experiment = tiny_way(tmp_path, way)
    assert experiment.training.objective == "upsampler"
    prepare(experiment, tmp_path / "allowed")
    task = train_task(experiment, experiment.start())
    answered = handle_task(task, simulated_device(experiment, 0, tmp_path / "allowed"))
    assert isinstance(answered, TrainResult)
    strict = tiny_way(
        tmp_path,
        way,
        {
            "policy": "{max_epsilon: 8, delta: 1e-3, objectives: [generator], protocols: [plain], min_cohort_size: 1}"
        },
    )
    prepare(strict, tmp_path / "strict")
    refused = handle_task(task, simulated_device(strict, 0, tmp_path / "strict"))
    assert isinstance(refused, Refusal) and "upsampler" in refused.reason


def test_config_and_network_must_agree_on_the_learner(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a super-resolution network"):
        UpsamplerTrainingConfig(learner="super-resolution").check(SHAPES["styles"])
    with pytest.raises(ConfigError, match="leaves faces at 16 pixels"):
        UpsamplerTrainingConfig(downscale=BicubicPulse(1)).check(SHAPES["styles"])
    with pytest.raises(ConfigError, match="leaves faces at 16 pixels"):
        UpsamplerTrainingConfig(learner="super-resolution", downscale=Pixelate(16)).check(SHAPES["resolver"])
    with pytest.raises(ConfigError, match="does not support faces of 16 pixels"):
        UpsamplerTrainingConfig(downscale=Area(5)).check(SHAPES["styles"])
    with pytest.raises(ValueError, match="downscale must add no noise"):
        UpsamplerTrainingConfig(downscale=Chain((Area(4), Noise(0.1))))
    with pytest.raises(ConfigError, match="downscale.*must be that of the training"):
        tiny_way(tmp_path, "styles", {"upsampling": "{downscale: {kind: area, factor: 4}}"})


def test_low_rank_changes_of_an_encoder_send_fewer_numbers() -> None:
    full, lora = marked("styles"), build_model(SHAPES["styles"], STREAMS.generator("styles"))
    assert isinstance(lora.architecture, StyleEncoderArchitecture)
    mark_upsampler(lora, Lora(rank=2), STREAMS.generator("adapter"))
    counts = [len(UpsamplerRound(model, CONFIG, dp_parameters()).ranges()) for model in (lora, full)]
    assert counts[0] < counts[1] / 2


@pytest.mark.parametrize(
    ("way", "training", "shape", "result"),
    [
        (
            "resolver",
            {},
            SuperResolutionArchitecture(network=LARGE),
            "numbers in memory",
        ),
        ("styles", {"downscale": Pixelate(16)}, SHAPES["styles"], "leaves faces at 16 pixels"),
    ],
)
def test_impossible_tasks_are_refused_before_anything_is_recorded(
    tmp_path: Path, way: str, training: dict[str, Degradation], shape: StyleEncoderArchitecture, result: str
) -> None:
    """A hostile shape, or a downscale that does not reduce faces: an error, no entry, and no photo read."""
    experiment = tiny_way(tmp_path, way)
    prepare(experiment, tmp_path)
    model = experiment.start()
    device = replace(simulated_device(experiment, 0, tmp_path), photos=unread)
    task = train_task(experiment, model)
    with pytest.raises((ConfigError, WeightsError, ValueError), match=result):
        expected = replace(experiment.training, **training)
        if shape is not SHAPES["styles"]:
            model = build_model(shape, STREAMS.generator("large"))
        agreed = replace(task.config, training=expected, architecture=model.architecture)
        hostile = replace(
            task, config=agreed, weights=flatten_parameters(*model.modules()),
            buffers=flatten_buffers(*model.modules()),
            model=weights_hash(*model.modules()),
        )  # fmt: skip
        handle_task(hostile, device)
    assert Ledger.open(device.ledger_path).entries() == []


def unread(size: int) -> Tensor:
    """Photos that must not be read."""
    raise AssertionError("a photo was read")
