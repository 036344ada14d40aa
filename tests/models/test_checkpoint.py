"""Weights as a vector and as a file: round trips are exact, invalid files are refused, no code is executed."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DISCRIMINATOR, GENERATOR, tiny_gan
from torch import Tensor

from fedface.codec import encode
from fedface.errors import ConfigError, WeightsError
from fedface.models.checkpoint import (
    HEADER,
    assign_buffers,
    assign_parameters,
    estimate_mean_style,
    flatten_buffers,
    flatten_parameters,
    load_as,
    load_gan,
    load_model,
    model_from_vectors,
    save_model,
    weights_hash,
)
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.latent_encoder import LatentEncoderConfig
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    GeneratorArchitecture,
    build_model,
)
from fedface.models.rectified_flow import FlowConfig
from fedface.models.stylegan1 import StyleGAN1Config
from fedface.randomness import Streams


def test_a_flat_vector_is_assigned_back() -> None:
    """assign_parameters(flatten_parameters(m)) changes nothing, and replaces every weight of another network."""
    source, target = tiny_gan("a"), tiny_gan("b")
    vector = flatten_parameters(*source.modules())
    assert not torch.equal(flatten_parameters(*target.modules()), vector)
    assign_parameters(vector, *target.modules())
    assert torch.equal(flatten_parameters(*target.modules()), vector)
    latents = torch.randn(2, 64, generator=Streams(1).generator("z"))
    theirs = target.discriminator(source.generator.synthesize(source.generator.map(latents)))
    assert torch.equal(
        source.discriminator(source.generator.synthesize(source.generator.map(latents))), theirs
    )


def test_a_vector_has_the_generator_first_then_the_discriminator_by_name() -> None:
    """Device and server must agree on the order."""
    gan = tiny_gan()
    by_hand = [
        dict(module.named_parameters())[name].reshape(-1)
        for module in (gan.generator, gan.discriminator)
        for name in sorted(dict(module.named_parameters()))
    ]
    assert torch.equal(flatten_parameters(*gan.modules()), torch.cat(by_hand))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_vector_of_another_length_is_refused(change: int) -> None:
    """Before anything is written."""
    gan = tiny_gan()
    before = flatten_parameters(*gan.modules())
    with pytest.raises(WeightsError, match=f"{len(before)} weights, got a vector"):
        assign_parameters(torch.zeros(len(before) + change), *gan.modules())
    assert torch.equal(flatten_parameters(*gan.modules()), before)


def test_a_copy_shares_no_memory() -> None:
    """Training a copy does not change the original."""
    gan = tiny_gan()
    before = weights_hash(*gan.modules())
    reference = copy.deepcopy(gan)
    assert weights_hash(*reference.modules()) == before
    assign_parameters(torch.zeros_like(flatten_parameters(*reference.modules())), *reference.modules())
    assert weights_hash(*gan.modules()) == before


def test_the_hash_changes_with_one_weight_or_buffer() -> None:
    """A report names exactly the weights that it measured."""
    gan, reference = tiny_gan(), tiny_gan()
    assert weights_hash(*gan.modules()) == weights_hash(*reference.modules())
    vector = flatten_parameters(*reference.modules())
    vector[-1] = torch.nextafter(vector[-1], torch.tensor(9.0))
    assign_parameters(vector, *reference.modules())
    assert weights_hash(*gan.modules()) != weights_hash(*reference.modules())
    mean = tiny_gan()
    estimate_mean_style(mean.generator, Streams(1).generator("mean"), draws=8)
    assert weights_hash(*gan.modules()) != weights_hash(*mean.modules())


def test_a_file_gives_the_same_networks(tmp_path: Path) -> None:
    """Weights, buffers, shapes and notes."""
    gan = replace(tiny_gan(), notes={"made_by": "a test", "steps": [1, 2]})
    estimate_mean_style(gan.generator, Streams(1).generator("mean"), draws=8)
    save_model(tmp_path / "deep" / "gan.safetensors", gan)
    again = load_model(tmp_path / "deep" / "gan.safetensors")
    assert weights_hash(*again.modules()) == weights_hash(*gan.modules())
    assert (again.generator.config, again.discriminator.config, again.notes) == (
        GENERATOR,
        DISCRIMINATOR,
        gan.notes,
    )


def test_the_bundled_checkpoint_is_complete() -> None:
    """It can be loaded, generates faces almost within [0, 1], and has notes on its training."""
    gan = load_gan()
    generated = gan.generator.synthesize(
        gan.generator.map(torch.randn(4, 64, generator=Streams(1).generator("z")))
    )
    assert generated.shape == (4, 3, 32, 32)
    assert float(((generated > -0.2) & (generated < 1.2)).float().mean()) > 0.95
    assert gan.notes["made_by"] == "fedface pretrain gan"


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash while writing, planted at fsync, the old networks are still there."""
    path = tmp_path / "gan.safetensors"
    save_model(path, tiny_gan("old"))

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model(path, tiny_gan("new"))
    assert weights_hash(*load_model(path).modules()) == weights_hash(*tiny_gan("old").modules())


def test_networks_of_different_sizes_are_refused() -> None:
    """A 32 px discriminator with a 16 px generator."""
    with pytest.raises(ConfigError, match="must have one size, got 16 and 32"):
        GanArchitecture(generator=GENERATOR, discriminator=DiscriminatorConfig(size=32))


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """A valid checkpoint's path, tensors and description, to be corrupted one by one."""
    path = tmp_path / "gan.safetensors"
    save_model(path, tiny_gan())
    architecture = GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR)
    header = {"version": "4", "architecture": json.dumps(encode(architecture)), "notes": "{}"}
    return path, load_file(path), header


def described(**changes: object) -> str:
    """The description of a valid GAN except for its generator."""
    return json.dumps(
        {
            "kind": "gan",
            "generator": {"kind": "stylegan2", **asdict(GENERATOR), **changes},
            "discriminator": asdict(DISCRIMINATOR),
        }
    )


Parts = tuple[Path, dict[str, Tensor], dict[str, str]]
BIAS = "discriminator.b4.out.bias"


def write(parts: Parts) -> None:
    """A checkpoint of these parts; the values of its header are JSON."""
    path, tensors, header = parts
    text = ", ".join(f"{json.dumps(key)}: {value}" for key, value in header.items())
    save_file(tensors, path, {HEADER: f"{{{text}}}"})


def refused(parts: Parts) -> str:
    """The error for corrupted parts; it always contains the file's name."""
    write(parts)
    path = parts[0]
    with pytest.raises(WeightsError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_the_parts_are_valid_before_they_are_corrupted(parts: Parts) -> None:
    """Otherwise the tests below would pass for another reason."""
    write(parts)
    path = parts[0]
    assert weights_hash(*load_model(path).modules()) == weights_hash(*tiny_gan().modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(parts: Parts, value: float) -> None:
    """One is enough."""
    parts[1][BIAS][0] = value
    result = refused(parts)
    assert BIAS in result and "not finite" in result


def test_a_weight_of_another_shape_is_named(parts: Parts) -> None:
    """With both shapes."""
    parts[1][BIAS] = torch.zeros(2)
    assert f"{BIAS}: should have shape [1], got [2]" in refused(parts)


def test_a_weight_of_another_type_is_named(parts: Parts) -> None:
    """Integers are not weights."""
    parts[1][BIAS] = torch.zeros(1, dtype=torch.int64)
    assert f"{BIAS}: should hold floating point numbers" in refused(parts)


def test_a_missing_weight_is_named(parts: Parts) -> None:
    """The first of them."""
    del parts[1][BIAS]
    assert f"lacks 1 weights, the first is {BIAS}" in refused(parts)


@pytest.mark.parametrize("name", ["discriminator.more", "elsewhere"])
def test_a_weight_too_many_is_named(parts: Parts, name: str) -> None:
    """Also one that belongs to neither network."""
    parts[1][name] = torch.zeros(1)
    assert f"1 weights that are not expected, the first is {name}" in refused(parts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "{"),
        ("architecture", "[]"),
        ("architecture", "null"),
        ("architecture", '{"kind": "cat"}'),
        ("architecture", described(size=17)),
        ("architecture", described(deep=1)),
        ("architecture", described(channel_max=0)),
        ("architecture", described(mapping_layers=10**9)),
        ("architecture", "[" * 100_000),
        (
            "architecture",
            json.dumps({"kind": "gan", "discriminator": {**asdict(DISCRIMINATOR), "channel_base": -1}}),
        ),
        ("notes", "3"),
        ("version", "3"),
    ],
)
def test_a_damaged_description_is_refused(parts: Parts, key: str, value: str) -> None:
    """The description is untrusted; no error is a traceback."""
    parts[2][key] = value
    assert "cannot be read" in refused(parts)


@pytest.mark.parametrize(
    ("channels", "base", "result"),
    [
        (2**16, 2**24, "should have shape"),
        (2**17, 2**24, "cannot be read"),
        (2**29, 2**40, "cannot be read"),
        (2**16, 2**40, "cannot be read"),
    ],
)
def test_a_description_of_huge_networks_takes_no_memory(
    parts: Parts, channels: int, base: int, result: str
) -> None:
    """A layer of 150 GB is compared with the file before it is allocated; an absurd one is refused as such."""
    parts[2]["architecture"] = described(channel_max=channels, channel_base=base)
    assert result in refused(parts)


@pytest.mark.parametrize(
    "change",
    [
        {"multipliers": [1e308]},
        {"multipliers": [1024.0, 1.0]},
        {"multipliers": [1.0] * 9},
        {"multipliers": [-1.0]},
        {"blocks": 65},
        {"blocks": 10**40},
        {"width": 10**40},
        {"time_width": 2**40},
    ],
)
def test_a_description_of_a_huge_flow_is_refused(parts: Parts, change: dict[str, object]) -> None:
    """Before anything is computed from it."""
    parts[2]["architecture"] = json.dumps({"kind": "flow", "flow": {"width": 128, **change}})
    assert "cannot be read" in refused(parts)


@pytest.mark.parametrize("error", [OverflowError, MemoryError])
def test_running_out_of_memory_is_reported_in_one_sentence(
    parts: Parts, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted while the networks are built."""

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedface.models.checkpoint.build_model", full)
    assert "cannot be read" in refused(parts)
    with pytest.raises(WeightsError, match="cannot be built on this machine"):
        never_built = replace(GENERATOR, mapping_layers=3)
        model_from_vectors(
            GanArchitecture(generator=never_built, discriminator=DISCRIMINATOR),
            torch.zeros(1),
            torch.zeros(1),
        )


def test_vectors_fit_only_networks_of_their_shape() -> None:
    """Weights and buffers of a model rebuild it; one number more of either is refused."""
    model = tiny_gan()
    estimate_mean_style(model.generator, Streams(1).generator("mean"), draws=8)
    weights, buffers = flatten_parameters(*model.modules()), flatten_buffers(*model.modules())
    again = model_from_vectors(model.architecture, weights, buffers)
    assert weights_hash(*again.modules()) == weights_hash(*model.modules())
    for more in ((torch.zeros(1 + len(weights)), buffers), (weights, torch.zeros(1 + len(buffers)))):
        with pytest.raises(WeightsError, match="got a vector of shape"):
            model_from_vectors(model.architecture, *more)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    """At any length, in one sentence that names it."""
    path = tmp_path / "gan.safetensors"
    save_model(path, tiny_gan())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="gan.safetensors: not a readable safetensors file"):
        load_model(path)


def test_a_pickle_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    """A pickle with code is not executed."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / "bomb.pt", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match="not a readable|no such checkpoint"):
            load_model(path)
    assert not (tmp_path / "ran").exists()


def test_another_kind_of_safetensors_file_is_named(tmp_path: Path) -> None:
    """The error is not "cannot be read": the file is valid."""
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="expected a model of fedface.*weights import"):
        load_model(tmp_path / "other.safetensors")


ARCHITECTURES = (
    GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR),
    EncoderArchitecture(
        generator=GENERATOR, encoder=LatentEncoderConfig(size=16, channel_base=64, channel_max=8)
    ),
    FlowArchitecture(flow=FlowConfig(width=16)),
    GeneratorArchitecture(generator=GENERATOR),
    GeneratorArchitecture(generator=StyleGAN1Config(size=16, latent_width=16)),
)


@pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=[type(architecture).__name__ for architecture in ARCHITECTURES]
)
def test_every_family_is_restored_from_its_file_and_from_its_flat_vector(
    tmp_path: Path, architecture: Architecture
) -> None:
    """Shape, weights, buffers and notes; and a model built from the architecture takes the flat vectors."""
    model = build_model(architecture, Streams(4).generator("weights"), {"made_by": "a test"})
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert again.architecture == model.architecture == architecture and again.notes == {"made_by": "a test"}
    assert weights_hash(*again.modules()) == weights_hash(*model.modules())
    reference = build_model(architecture)
    assign_parameters(flatten_parameters(*model.modules()), *reference.modules())
    assign_buffers(flatten_buffers(*model.modules()), *reference.modules())
    assert weights_hash(*reference.modules()) == weights_hash(*model.modules())
    assert weights_hash(*copy.deepcopy(model).modules()) == weights_hash(*model.modules())


def test_a_model_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    """A flow where a GAN is expected."""
    save_model(tmp_path / "flow.safetensors", build_model(FlowArchitecture(flow=FlowConfig(width=16))))
    with pytest.raises(
        WeightsError, match="expected a generator with its discriminator, got a rectified flow"
    ):
        load_as(tmp_path / "flow.safetensors", GanArchitecture)
