"""Every training method: what the device sends is what the server applies, and each method has its own update size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import DISCRIMINATOR, GENERATOR, WAYS, tiny_experiment, tiny_way

from fedface.errors import ConfigError, PrivacyError
from fedface.experiment import Experiment
from fedface.models.checkpoint import flatten_parameters, weights_hash
from fedface.models.lora import Lora, attach, flatten_trainable
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    Model,
    SuperResolutionArchitecture,
    build_model,
)
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.tensor_types import Images
from fedface.training import per_example_gradients
from fedface.training.per_example_gradients import PerExampleProblem
from fedface.training.training_methods import (
    common_streams,
    prepare_round,
)
from fedface.training.training_round import TrainingRound

each_way = pytest.mark.parametrize("way", WAYS)
COMMON = common_streams(3, 1)


def photos(count: int, seed: int = 1) -> Images:
    """Synthetic faces of 16 px."""
    return render(sample_faces(count, ToneMix(light_fraction=0.5), Streams(seed).generator("faces")), 16)


def begun(experiment: Experiment) -> tuple[Model, TrainingRound]:
    """The model before the round, and the round."""
    model = experiment.start()
    return model, prepare_round(model, experiment.training, experiment.plan().dp_parameters, COMMON)


def update_of(work: TrainingRound, seen: Images, name: str = "device") -> torch.Tensor:
    """A reproducible update, without DP."""
    streams = Streams(7).child(name)
    return work.update(seen, rng=streams.generator("without dp"), streams=streams)


def state_of(model: Model) -> torch.Tensor:
    """All saved numbers of a model, flat."""
    return torch.cat([v.flatten() for module in model.modules() for v in module.state_dict().values()])


def wider(architecture: Architecture) -> Architecture:
    """With more channels in the network that is trained on photos."""
    match architecture:
        case GanArchitecture(discriminator=network):
            return replace(architecture, discriminator=replace(network, channel_max=16))
        case FlowArchitecture(flow=flow):
            return replace(architecture, flow=replace(flow, width=32))
        case SuperResolutionArchitecture(network=resolver):
            return replace(architecture, network=replace(resolver, width=16))
        case _:
            raise ValueError(architecture)


@pytest.mark.parametrize("way", ["full", "flow", "resolver"])
def test_two_architectures_in_one_process_are_checked_separately(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose gradients depend on a place in a microbatch, which its own weights hide, and one whose do not."""
    used: list[int] = []
    experiment = tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"})
    other = wider(WAYS[way][1])
    widest = len(flatten_parameters(build_model(other).modules()[-1]))

    def independent(problem: PerExampleProblem, *given: object, zero_shows: bool) -> bool:
        return zero_shows or len(flatten_parameters(problem.network)) < widest

    padded = per_example_gradients._padded
    monkeypatch.setattr(per_example_gradients, "_deterministic", {})
    monkeypatch.setattr(per_example_gradients, "_is_deterministic", independent)
    monkeypatch.setattr(
        per_example_gradients, "_padded", lambda seen, size: used.append(size) or padded(seen, size)
    )
    for architecture in (WAYS[way][1], other):
        model = build_model(architecture, Streams(5).generator("weights"))
        update_of(
            prepare_round(model, experiment.training, experiment.plan().dp_parameters, COMMON), photos(0)
        )
    assert used[0] == 16 and used[-1] == 1


@each_way
def test_an_update_has_a_range_for_each_number_and_does_not_change_the_model(
    tmp_path: Path, way: str
) -> None:
    experiment = tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"})
    model, work = begun(experiment)
    before = weights_hash(*model.modules())
    update = update_of(work, photos(8))
    assert update.shape == work.ranges().shape and update.isfinite().all() and (work.ranges() > 0).all()
    assert weights_hash(*model.modules()) == before
    assert experiment.training.describe_update()


@each_way
def test_faces_stored_as_bytes_give_the_same_update(tmp_path: Path, way: str) -> None:
    """A whole library of floats would not fit in memory: bytes become floats on use."""
    stored = (photos(8) * 255.0).round().to(torch.uint8)
    _, work = begun(tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"}))
    assert torch.equal(update_of(work, stored), update_of(work, stored.float() / 255.0))


@each_way
def test_device_and_server_prepare_the_same_round_from_the_task(tmp_path: Path, way: str) -> None:
    """Two preparations from equal weights and seeds apply one update equally: adapters are derived, not sent."""
    experiment = tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"})
    _, device = begun(experiment)
    _, server = begun(experiment)
    update = update_of(device, photos(8))
    first, second = (work.apply(update, 1, Streams(2).generator("mean")) for work in (device, server))
    assert torch.equal(state_of(first), state_of(second))
    assert state_of(first).shape != state_of(experiment.start()).shape or not torch.equal(
        state_of(first), state_of(experiment.start())
    )


@pytest.mark.parametrize("way", [way for way in WAYS if way != "prior"])
def test_the_sum_of_two_updates_moves_the_weights_by_their_mean(tmp_path: Path, way: str) -> None:
    """Applying is linear, also for low-rank changes, because their directions are public and fixed. The mapping's
    stored weights are of size 100, where neighbouring float32 numbers are 8e-6 apart.
    """
    experiment = tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"})
    model, work = begun(experiment)
    start = flatten_parameters(*model.modules())
    one, two = update_of(work, photos(8), "one"), update_of(work, photos(8, 2), "two")
    moved = [
        flatten_parameters(*work.apply(total, devices, Streams(2).generator("m")).modules()) - start
        for total, devices in ((one, 1), (two, 1), (one + two, 2))
    ]
    assert torch.allclose((moved[0] + moved[1]) / 2, moved[2], atol=1e-4)
    assert moved[0].abs().max() > 1e-3


@each_way
def test_a_zero_update_changes_nothing(tmp_path: Path, way: str) -> None:
    """The same weights, and for the prior the standard one."""
    model, work = begun(tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"}))
    after = work.apply(torch.zeros_like(work.ranges()), 2, Streams(2).generator("mean"))
    assert torch.allclose(
        flatten_parameters(*after.modules()), flatten_parameters(*model.modules()), atol=1e-6
    )
    if isinstance(model.architecture, SuperResolutionArchitecture) or isinstance(
        after.architecture, SuperResolutionArchitecture
    ):
        return  # it cannot sample
    latents = torch.randn(4, model.generator.latent_width, generator=Streams(1).generator("z"))
    assert torch.allclose(after.generator.map(latents), model.generator.map(latents), atol=1e-5)


@each_way
def test_the_release_of_one_photo_is_what_a_step_clips(tmp_path: Path, way: str) -> None:
    """An audit attacks this vector: the same for equal photos, another for another photo."""
    _, work = begun(tiny_way(tmp_path, way, {"privacy": "{kind: no-privacy}"}))
    release = work.per_example_release(Streams(9))
    one, other = photos(1), photos(1, 2)
    assert torch.equal(release(one), release(one)) and not torch.allclose(release(one), release(other))
    seen = one.clone().requires_grad_()
    (slope,) = torch.autograd.grad(release(seen).square().sum(), seen)
    assert slope.shape == one.shape and slope.abs().max() > 0


def test_gan_training_releases_the_gradient_of_its_discriminator_loss(
    tmp_path: Path,
) -> None:
    """A slow reference: softplus of minus the logit, differentiated by hand."""
    model, work = begun(tiny_way(tmp_path, "full", {"privacy": "{kind: no-privacy}"}))
    discriminator = model.modules()[1]
    loss = torch.nn.functional.softplus(-discriminator(photos(1))).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(discriminator.parameters()))])
    assert torch.allclose(work.per_example_release(Streams(9))(photos(1)), expected, atol=1e-6)


@each_way
def test_a_private_round_refuses_a_seeded_generator(tmp_path: Path, way: str) -> None:
    _, work = begun(tiny_way(tmp_path, way))
    with pytest.raises(PrivacyError, match="SecretNoise"):
        update_of(work, photos(4))


@pytest.mark.parametrize(("way", "family"), [("full", "flow"), ("prior", "full"), ("flow", "prior")])
def test_a_method_needs_a_model_of_its_family(tmp_path: Path, way: str, family: str) -> None:
    model = build_model(WAYS[family][1])
    with pytest.raises(ConfigError, match="needs a"):
        tiny_way(tmp_path, way).training.check(model.architecture)


@pytest.mark.parametrize("change", [{"minibatch_group": 4}, {"classes": 2}])
def test_a_discriminator_that_couples_photos_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    """Minibatch statistics couple photos, and classes are labels that no device sends."""
    architecture = GanArchitecture(generator=GENERATOR, discriminator=replace(DISCRIMINATOR, **change))
    with pytest.raises(ConfigError, match="several images at once"):
        tiny_experiment(tmp_path).training.check(architecture)


@pytest.mark.parametrize("way", ["full", "lora", "prior"])
def test_a_generator_with_classes_is_refused(tmp_path: Path, way: str) -> None:
    """No device sends the classes of its photos; the same shape without them is accepted."""
    shape = WAYS[way][1]
    assert isinstance(shape, GanArchitecture | EncoderArchitecture)
    training = tiny_way(tmp_path, way).training
    training.check(shape)
    named = replace(shape, generator=replace(shape.generator, classes=3))
    with pytest.raises(ConfigError, match="devices do not send the classes"):
        training.check(named)


def test_low_rank_changes_send_fewer_numbers_and_the_prior_fewest(tmp_path: Path) -> None:
    """The counts that `fedface plan` prints, against a count by hand."""
    counts = {way: len(begun(tiny_way(tmp_path / way, way))[1].ranges()) for way in WAYS}
    assert counts["full"] == flatten_parameters(*build_model(WAYS["full"][1]).modules()).numel()
    by_hand = build_model(WAYS["lora"][1])
    for module in by_hand.modules():
        attach(module, Lora(rank=2), Streams(0).generator("a"))
    assert counts["lora"] == flatten_trainable(*by_hand.modules()).numel() < counts["full"]
    assert counts["prior"] == 1 + 2 * GENERATOR.latent_width < counts["lora"]
    assert counts["flow-lora"] < counts["flow"]
