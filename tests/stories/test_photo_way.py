"""One photo with a known pattern, followed to the wire, where neither it nor its gradient is found. Every byte that a
device sends is searched. Without DP the gradient is there: the search can find what it looks for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import NO_PRIVACY, first_device, tiny_experiment, tiny_gan, train_task
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
    """A unique photo: a checkerboard whose squares contain their own numbers."""
    photo = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16) / 1000 + 0.1
    return torch.where((torch.arange(16)[:, None] + torch.arange(16)) % 2 == 0, photo, 1 - photo)


def gradient_of(gan: Model, photo: Images) -> Vector:
    """The discriminator's gradient of one photo, flat and in the order of the wire."""
    loss = functional.softplus(-gan.discriminator(photo)).sum()
    names = sorted(dict(gan.discriminator.named_parameters()))
    weights = dict(gan.discriminator.named_parameters())
    gradients = torch.autograd.grad(loss, [weights[name] for name in names])
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def sent(tmp_path: Path, gan: Model, photos: Images, target: dict[str, str]) -> tuple[Vector, bytes]:
    """A device's update of the discriminator as the server decodes it, and all bytes on the wire."""
    experiment = tiny_experiment(tmp_path / "recipe", {**ALONE, **target})
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
    """Cosine between the update and the photo's gradient; descent has the opposite sign."""
    return float(functional.cosine_similarity(-update, gradient, dim=0))


def pixel_runs(photo: Images) -> list[bytes]:
    """Eight neighbouring pixels of each row, in every likely encoding of a photo."""
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
    """The same networks without the fake half of the discriminator's loss, so that only the photo contributes."""
    # A generator whose pictures are all grey teaches the discriminator about grey alone; its weights stay as they are.
    with torch.no_grad():
        for block in gan.generator.synthesis.children():
            block.torgb.weight.zero_()
            block.torgb.bias.zero_()
    return gan


def about(gan: Model, update: Vector, gradient: Vector) -> float:
    """The cosine after removing from both the part that anyone can compute, the gradient of grey images."""
    generated = gan.generator.synthesize(gan.generator.map(torch.zeros(1, 64)))
    loss = functional.softplus(gan.discriminator(generated.detach())).sum()
    weights = dict(gan.discriminator.named_parameters())
    known = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, [weights[name] for name in sorted(weights)])]
    )
    known = known / known.norm()
    rest, expected = ((v - (v @ known) * known) for v in (update, gradient))
    return likeness(rest, expected)


def test_without_dp_the_photos_gradient_is_on_the_wire(tmp_path: Path) -> None:
    """The planted positive: one photo, one step, no noise, no encryption. The search finds it at once."""
    gan = blind_discriminator(tiny_gan())
    update, wire = sent(tmp_path, gan, planted(), {"privacy": NO_PRIVACY})
    assert about(gan, update, gradient_of(gan, planted())) > 0.99
    assert not any(run in wire for run in pixel_runs(planted()))


def test_under_dp_neither_the_photo_nor_its_gradient_is_on_the_wire(tmp_path: Path) -> None:
    """The cosine is that of noise: for d numbers with noise of sigma its small size is known."""
    gan = blind_discriminator(tiny_gan())
    update, wire = sent(
        tmp_path, gan, planted(), {"privacy": "{kind: privacy-target, epsilon: 1, delta: 1e-3}"}
    )
    gradient = gradient_of(gan, planted())
    sigma = tiny_experiment(tmp_path / "again", {**ALONE, "privacy.epsilon": "1"}).plan().noise_multiplier
    # Signal at most 1 (the clip norm), noise of norm sigma * sqrt(d); five standard errors of 1 / sqrt(d).
    most = 1 / (sigma * len(update) ** 0.5) + 5 / len(update) ** 0.5
    assert most < 0.2
    assert abs(about(gan, update, gradient)) < most
    assert not any(run in wire for run in pixel_runs(planted()))


def test_a_device_with_the_photo_cannot_be_distinguished_from_one_without_it(tmp_path: Path) -> None:
    """The noise is larger than the photo's contribution: cosines with it and without it overlap."""
    gan = blind_discriminator(tiny_gan())
    gradient = gradient_of(gan, planted())
    target = {"privacy": "{kind: privacy-target, epsilon: 0.5, delta: 1e-3}"}
    found = {
        name: [about(gan, sent(tmp_path / f"{name}{i}", gan, seen, target)[0], gradient) for i in range(8)]
        for name, seen in (("with", planted()), ("without", planted()[:0]))
    }
    assert min(found["with"]) < max(found["without"])


def test_among_other_photos_only_dp_hides_the_photo(tmp_path: Path) -> None:
    """Among 24 photos without noise its gradient is still visible; with noise it is not. Averaging is no guarantee."""
    gan = blind_discriminator(tiny_gan())
    others = torch.rand(23, 3, 16, 16, generator=Streams(4).generator("crowd"))
    crowd = {"training.expected_batch_size": "24"}
    with_it, _ = sent(tmp_path / "a", gan, torch.cat([planted(), others]), {**crowd, "privacy": NO_PRIVACY})
    without, _ = sent(tmp_path / "b", gan, others, {**crowd, "privacy": NO_PRIVACY})
    # Subtracting all other photos leaves this photo's gradient, up to rounding.
    assert likeness(with_it - without, gradient_of(gan, planted())) > 0.99
    target = {**crowd, "privacy": "{kind: privacy-target, epsilon: 1, delta: 1e-3}"}
    hidden, _ = sent(tmp_path / "c", gan, torch.cat([planted(), others]), target)
    clean, _ = sent(tmp_path / "d", gan, others, target)
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
