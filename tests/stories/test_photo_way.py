"""One photo's way: a photo with a known pattern, followed to the wire, where neither it nor its gradient is.

Every byte that a device sends is searched. Without a promise the gradient is there, plainly: so the search
can find what it looks for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import NO_PROMISE, first_device, tiny_experiment, tiny_gan, train_task
from torch.nn import functional

from fedface.aggregation.payload import Payload
from fedface.aggregation.plain import PlainAggregation
from fedface.device.client import handle_task
from fedface.messages.messages import TrainResult, to_message
from fedface.messages.parsing import read_reply
from fedface.models.checkpoint import assign_parameters, flatten_parameters
from fedface.models.model import Model
from fedface.photos.device_dataset import DeviceDataset
from fedface.randomness import Streams
from fedface.tensor_types import Images, Vector
from fedface.transport.wire import from_record, to_record

ALONE = {
    "training.rounds": "1",
    "training.steps_per_round": "1",
    "training.sampling_rate": "1",
    "training.expected_batch_size": "1",
    "training.clip_norm": "1",
    "training.r2_weight": "0",
}


def planted() -> Images:
    """A photo that nobody else has: a checkerboard whose squares carry their own numbers."""
    photo = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16) / 1000 + 0.1
    return torch.where((torch.arange(16)[:, None] + torch.arange(16)) % 2 == 0, photo, 1 - photo)


def gradient_of(gan: Model, photo: Images) -> Vector:
    """What the discriminator learns from one photo, flat and in the order of the wire."""
    loss = functional.softplus(-gan.discriminator(photo)).sum()
    names = sorted(dict(gan.discriminator.named_parameters()))
    weights = dict(gan.discriminator.named_parameters())
    gradients = torch.autograd.grad(loss, [weights[name] for name in names])
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def sent(tmp_path: Path, gan: Model, photos: Images, promise: dict[str, str]) -> tuple[Vector, bytes]:
    """A device's update of the discriminator as the server reads it, and all bytes that crossed the wire."""
    experiment = tiny_experiment(tmp_path / "recipe", {**ALONE, **promise})
    device = replace(
        first_device(experiment, tmp_path / "devices"), photos=lambda size: DeviceDataset.independent(photos)
    )
    reply = handle_task(train_task(experiment, gan), device)
    crossed = from_record(to_record(to_message(reply)))
    wire = crossed.header.encode() + b"".join(crossed.blobs.values())
    read = read_reply(crossed)
    assert isinstance(read, TrainResult)
    update = PlainAggregation(max_devices=2).reveal(Payload.from_bytes(read.payload))
    return update[len(flatten_parameters(gan.generator)) :], wire


def likeness(update: Vector, gradient: Vector) -> float:
    """Cosine between what was sent and what the photo would teach; descent has the opposite sign."""
    return float(functional.cosine_similarity(-update, gradient, dim=0))


def pixel_runs(photo: Images) -> list[bytes]:
    """Eight neighbouring pixels of each row, in every form in which a photo is likely to be written."""
    rows = photo[0].reshape(-1, 16)[:, :8].numpy()
    forms = [
        rows.astype("<f4"),
        rows.astype("<f8"),
        rows.astype("<f2"),
        (rows * 255).round().astype(np.uint8),
    ]
    interleaved = (photo[0].permute(1, 2, 0).reshape(-1, 24).numpy() * 255).round().astype(np.uint8)
    return [run.tobytes() for form in [*forms, interleaved] for run in form]


def blind_discriminator(gan: Model) -> Model:
    """The same networks with the made half of the discriminator's loss silenced, so that the photo is all it learns."""
    # A generator whose pictures are all grey teaches the discriminator about grey alone; its weights stay as they are.
    with torch.no_grad():
        for block in gan.generator.synthesis.children():
            block.torgb.weight.zero_()
            block.torgb.bias.zero_()
    return gan


def about(gan: Model, update: Vector, gradient: Vector) -> float:
    """Likeness after the part that everybody can compute, the lesson of grey pictures, is taken out of both."""
    made = gan.generator.synthesize(gan.generator.map(torch.zeros(1, 64)))
    loss = functional.softplus(gan.discriminator(made.detach())).sum()
    weights = dict(gan.discriminator.named_parameters())
    known = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, [weights[name] for name in sorted(weights)])]
    )
    known = known / known.norm()
    rest, wanted = ((v - (v @ known) * known) for v in (update, gradient))
    return likeness(rest, wanted)


def test_without_a_promise_the_photos_gradient_is_on_the_wire(tmp_path: Path) -> None:
    """The planted positive: one photo, one step, no noise, in the open. The search finds it at once."""
    gan = blind_discriminator(tiny_gan())
    update, wire = sent(tmp_path, gan, planted(), {"privacy": NO_PROMISE})
    assert about(gan, update, gradient_of(gan, planted())) > 0.99
    assert not any(run in wire for run in pixel_runs(planted()))


def test_under_a_promise_neither_the_photo_nor_its_gradient_is_on_the_wire(tmp_path: Path) -> None:
    """The likeness is that of noise: a cosine of d numbers with noise of sigma has a known small size."""
    gan = blind_discriminator(tiny_gan())
    update, wire = sent(
        tmp_path, gan, planted(), {"privacy": "{kind: privacy-target, epsilon: 1, delta: 1e-3}"}
    )
    gradient = gradient_of(gan, planted())
    sigma = tiny_experiment(tmp_path / "again", {**ALONE, "privacy.epsilon": "1"}).plan().noise_multiplier
    # Signal at most 1 (the clip norm) beside noise of length sigma * sqrt(d); five standard errors of 1 / sqrt(d).
    most = 1 / (sigma * len(update) ** 0.5) + 5 / len(update) ** 0.5
    assert most < 0.2
    assert abs(about(gan, update, gradient)) < most
    assert not any(run in wire for run in pixel_runs(planted()))


def test_a_device_with_the_photo_cannot_be_told_from_one_without_it(tmp_path: Path) -> None:
    """The noise is the same and larger than the photo: likeness with it and without it overlap."""
    gan = blind_discriminator(tiny_gan())
    gradient = gradient_of(gan, planted())
    promise = {"privacy": "{kind: privacy-target, epsilon: 0.5, delta: 1e-3}"}
    found = {
        name: [about(gan, sent(tmp_path / f"{name}{i}", gan, seen, promise)[0], gradient) for i in range(8)]
        for name, seen in (("with", planted()), ("without", planted()[:0]))
    }
    assert min(found["with"]) < max(found["without"])


def test_in_a_crowd_the_photo_is_hidden_even_from_noise_free_eyes_only_by_the_promise(tmp_path: Path) -> None:
    """Among 24 photos without noise its gradient still shows; with noise it does not. Averaging is no promise."""
    gan = blind_discriminator(tiny_gan())
    others = torch.rand(23, 3, 16, 16, generator=Streams(4).generator("crowd"))
    crowd = {"training.expected_batch_size": "24"}
    with_it, _ = sent(tmp_path / "a", gan, torch.cat([planted(), others]), {**crowd, "privacy": NO_PROMISE})
    without, _ = sent(tmp_path / "b", gan, others, {**crowd, "privacy": NO_PROMISE})
    # Who knows all other photos subtracts them: what is left is this photo's gradient, to rounding.
    assert likeness(with_it - without, gradient_of(gan, planted())) > 0.99
    promise = {**crowd, "privacy": "{kind: privacy-target, epsilon: 1, delta: 1e-3}"}
    hidden, _ = sent(tmp_path / "c", gan, torch.cat([planted(), others]), promise)
    clean, _ = sent(tmp_path / "d", gan, others, promise)
    assert abs(likeness(hidden - clean, gradient_of(gan, planted()))) < 0.2


def test_fill_and_vector_agree_on_where_the_discriminator_begins() -> None:
    """Otherwise the tests above would look at the wrong numbers."""
    gan = tiny_gan()
    vector = flatten_parameters(*gan.modules())
    front = len(flatten_parameters(gan.generator))
    vector[front:] = 0
    assign_parameters(vector, *gan.modules())
    assert all(float(weight.detach().abs().max()) == 0 for weight in gan.discriminator.parameters())
    assert any(float(weight.detach().abs().max()) > 0 for weight in gan.generator.parameters())
