"""Imported weights reproduce the published images, logits and gradients; anything that does not match exactly is
refused.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import layer_fields, nvidia_bytes, reference, state, torch_bytes
from torch import Tensor

from fedface.errors import WeightsError
from fedface.importing import import_weights
from fedface.importing.import_weights import ImportedModel, import_file
from fedface.models.checkpoint import load_model, save_model, weights_hash
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.model import GanArchitecture, GeneratorArchitecture
from fedface.models.stylegan1 import StyleGAN1
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config

TINY = StyleGAN2Config(
    size=16, latent_width=6, style_width=5, mapping_layers=3, channel_base=128, channel_max=12
)
TINY_DISCRIMINATOR = DiscriminatorConfig(size=16, channel_base=128, channel_max=12)


def imported(folder: Path, content: bytes, mapping: bytes | None = None) -> ImportedModel:
    """Import a file of these bytes; its name does not reveal its format."""
    (folder / "weights.bin").write_bytes(content)
    if mapping is None:
        return import_file(folder / "weights.bin")
    (folder / "mapping.bin").write_bytes(mapping)
    return import_file(folder / "weights.bin", folder / "mapping.bin")


def refused(folder: Path, content: bytes, mapping: bytes | None = None) -> str:
    """The error for a file of these bytes."""
    with pytest.raises(WeightsError) as caught:
        imported(folder, content, mapping)
    sentence = str(caught.value)
    assert sentence.startswith(str(folder)) and sentence.isprintable()
    return sentence


def filters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with the constant filters that NVIDIA's files also contain."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    more = {
        f"{name.rpartition('.')[0]}.resample_filter": torch.outer(row, row)
        for name, value in tensors.items()
        if value.dim() == 4 and ("conv" in name or "skip" in name)
    }
    return tensors | more


def random_generator(config: StyleGAN2Config, seed: int = 1) -> StyleGAN2:
    """A generator of random weights, with a mean style."""
    generator = StyleGAN2(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rng = torch.Generator().manual_seed(seed + 1)
        for name, value in generator.state_dict().items():
            if name.endswith(("noise_strength", "bias", "w_avg")):
                value.add_(torch.randn(value.shape, generator=rng) * 0.1)
    return generator


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("protocol", [0, 1, 3, 4])
@pytest.mark.parametrize("name", ["sg2ada_g32_map2_skip", "sg2ada_g64_map8_skip", "sg2ada_g32_map2_orig"])
def test_nvidias_generators_are_imported(shared: Path, tmp_path: Path, name: str, protocol: int) -> None:
    """From the bytes of a .pkl to the published images, with truncation, and their gradients."""
    arrays = reference(shared, name)
    found = imported(tmp_path, nvidia_bytes({"G_ema": state(arrays)}, protocol=protocol))
    generator = found.generator
    assert isinstance(generator, StyleGAN2) and found.discriminator is None
    assert found.kind == "stylegan2-ada of NVIDIA" and isinstance(
        found.model().architecture, GeneratorArchitecture
    )
    styles = generator.truncate(generator.map(arrays["in/z"]), 0.7)
    assert furthest(2 * generator.synthesize(styles) - 1, arrays["out/img_psi0.7_const"]) < 1e-4
    wplus = arrays["in/wplus"].requires_grad_()
    (gradient,) = torch.autograd.grad((2 * generator.synthesize(wplus) - 1).square().mean(), wplus)
    assert furthest(gradient, arrays["out/grad_wplus_of_mean_sq"]) < 1e-4


@pytest.mark.parametrize("name", ["sg2ada_d32_orig", "sg2ada_d64_resnet", "sg2ada_d32_resnet_nombstd"])
def test_nvidias_discriminators_are_imported(shared: Path, tmp_path: Path, name: str) -> None:
    """Both forms, with and without minibatch statistics; a discriminator without a generator is refused."""
    arrays = reference(shared, name)
    found = imported(tmp_path, nvidia_bytes({"D": state(arrays)}))
    assert found.discriminator is not None and found.generator is None
    picture = ((arrays["in/img"] + 1) / 2).requires_grad_()
    logits = found.discriminator(picture)
    assert furthest(logits, arrays["out/logits"][:, 0]) < 1e-4
    (gradient,) = torch.autograd.grad(logits.sum(), picture)
    assert furthest(gradient / 2, arrays["out/grad_img_of_sum"]) < 1e-4
    assert furthest(found.discriminator(picture[:1]), arrays["out/logits_first1"][:, 0]) < 1e-4
    with pytest.raises(WeightsError, match="holds a discriminator alone"):
        found.model()


@pytest.mark.parametrize("zipped", [True, False])
def test_rosinalitys_networks_reproduce_their_images_and_logits(
    shared: Path, tmp_path: Path, zipped: bool
) -> None:
    """Values and gradients to 1e-4, in both formats of torch.save, with the trainer's arguments in the file."""
    arrays, judged = reference(shared, "rosinality_g32"), reference(shared, "rosinality_d32")
    content = {
        "g": state(arrays),
        "d": state(judged),
        "g_ema": state(arrays),
        "latent_avg": arrays["in/truncation_latent"][0],
        "g_optim": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.002}]},
        "args": Namespace(path="faces", iter=800000),
    }
    found = imported(tmp_path, torch_bytes(content, zipped=zipped))
    generator, discriminator = found.generator, found.discriminator
    assert found.kind == "stylegan2 of rosinality" and isinstance(found.model().architecture, GanArchitecture)
    assert isinstance(generator, StyleGAN2) and discriminator is not None
    assert found.ignored == ("g", "g_optim", "args") and "remarks" not in found.notes
    styles = generator.map(arrays["in/z"])
    assert furthest(styles[:, 0], arrays["out/w"]) < 1e-4
    shorter = generator.truncate(styles, 0.7)
    assert furthest(2 * generator.synthesize(shorter) - 1, arrays["out/img_z_trunc0.7"]) < 1e-4
    wplus = arrays["in/wplus"].requires_grad_()
    picture = 2 * generator.synthesize(wplus) - 1
    assert furthest(picture, arrays["out/img_wplus"]) < 1e-4
    (gradient,) = torch.autograd.grad(picture.square().mean(), wplus)
    assert furthest(gradient, arrays["out/grad_wplus_of_mean_sq"]) < 1e-4
    assert furthest(discriminator((judged["in/img"] + 1) / 2), judged["out/logits"][:, 0]) < 1e-4


def test_pulses_two_files_give_one_stylegan1(shared: Path, tmp_path: Path) -> None:
    """In either order, in one file, with the prefixes of the port; if one half is missing, the error says so."""
    sampled, mapped = reference(shared, "pulse_sg1_synthesis64"), reference(shared, "pulse_sg1_mapping64")
    halves = torch_bytes(state(sampled)), torch_bytes(state(mapped), zipped=False)
    joined = {f"g_synthesis.{name}": value for name, value in state(sampled).items()}
    joined |= {f"g_mapping.{name}": value for name, value in state(mapped).items()}
    hashes = set()
    for found in (
        imported(tmp_path, *halves),
        imported(tmp_path, *reversed(halves)),
        imported(tmp_path, torch_bytes(joined)),
    ):
        generator = found.generator
        assert isinstance(generator, StyleGAN1) and isinstance(
            found.model().architecture, GeneratorArchitecture
        )
        noise = [sampled[f"in/noise{place}"] for place in range(10)]
        styles = sampled["in/w"].clone().requires_grad_()
        picture = 2 * generator.synthesize(styles, noise) - 1
        assert furthest(picture, sampled["out/img"]) < 1e-4
        (gradient,) = torch.autograd.grad(picture.square().mean(), styles)
        assert furthest(gradient, sampled["out/grad_w_of_mean_sq"]) < 1e-4
        assert furthest(generator.map(mapped["in/z"])[:, 0], mapped["out/w"]) < 1e-4
        hashes.add(weights_hash(generator))
        assert any("mean style is not in the file" in remark for remark in found.notes["remarks"])
    assert len(hashes) == 1
    assert "without its mapping" in refused(tmp_path, halves[0])
    assert "without its synthesis" in refused(tmp_path, halves[1])
    assert "both files hold" in refused(tmp_path, halves[0], halves[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "orig"},
        {"architecture": "resnet"},
        {"classes": 3},
        {"clamp": 256.0},
        {"size": 8, "channel_base": 64, "channel_max": 7, "mapping_layers": 1},
        {"size": 64, "channel_base": 512, "channel_max": 48},
    ],
)
def test_architectures_are_inferred_from_the_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Sizes, widths, layers, form, classes and clamp are recovered, and so is every weight."""
    config = replace(TINY, **changes)
    generator = random_generator(config)
    tensors = filters(generator.state_dict())
    layers = {"G_ema": layer_fields(tensors, config.clamp)}
    found = imported(tmp_path, nvidia_bytes({"G_ema": tensors}, fields=layers)).generator
    assert isinstance(found, StyleGAN2)
    same = [field.name for field in fields(config) if field.name != "channel_base"]
    assert {name: getattr(found.config, name) for name in same} == {
        name: getattr(config, name) for name in same
    }
    assert [found.config.channels(side) for side in config.sides] == [
        config.channels(side) for side in config.sides
    ]
    assert weights_hash(found) == weights_hash(generator)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "orig", "minibatch_group": 4},
        {"architecture": "skip", "minibatch_group": 8, "minibatch_channels": 2},
        {"classes": 3, "mapping_layers": 2},
        {"clamp": 100.0},
    ],
)
def test_discriminators_are_inferred_from_the_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The group size is a field; everything else is in the shapes."""
    config = replace(TINY_DISCRIMINATOR, **changes)
    discriminator = Discriminator(config, torch.Generator().manual_seed(3))
    tensors = filters(discriminator.state_dict())
    layers = layer_fields(tensors, config.clamp)
    if config.minibatch_group:
        layers["b4.mbstd.group_size"] = config.minibatch_group
    found = imported(tmp_path, nvidia_bytes({"D": tensors}, fields={"D": layers})).discriminator
    assert found is not None and weights_hash(found) == weights_hash(discriminator)
    same = [field.name for field in fields(config) if field.name != "channel_base"]
    assert {name: getattr(found.config, name) for name in same} == {
        name: getattr(config, name) for name in same
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b4.mbstd.group_size": None}, "its minibatch statistics are over the whole batch"),
        ({"b4.mbstd.group_size": 0}, "its minibatch statistics are over an invalid group"),
        ({"b16.conv0.activation": "relu"}, "our networks have lrelu"),
        ({"weight": torch.full((12,), torch.nan)}, "holds numbers that are not finite"),
        ({"channels": 5}, "minibatch_channels must divide"),
    ],
)
def test_a_generator_is_imported_without_an_unsupported_discriminator(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """The discriminator is left out with a note that gives the reason; alone, it is refused for the same reason."""
    config = replace(TINY_DISCRIMINATOR, minibatch_group=4)
    tensors = dict(Discriminator(config, torch.Generator().manual_seed(3)).state_dict())
    layers = layer_fields(tensors) | {name: value for name, value in changes.items() if "." in name}
    if "weight" in changes:
        tensors["b4.conv.bias"] = changes["weight"]
    if "channels" in changes:
        tensors["b4.conv.weight"] = torch.zeros(12, 12 + changes["channels"], 3, 3)
    networks = {"G_ema": random_generator(TINY).state_dict(), "D": tensors}
    found = imported(tmp_path, nvidia_bytes(networks, fields={"D": layers}))
    assert found.generator is not None and weights_hash(found.generator) == weights_hash(
        random_generator(TINY)
    )
    assert isinstance(found.model().architecture, GeneratorArchitecture) and found.ignored == ("D",)
    (remark,) = found.notes["remarks"]
    assert remark.startswith("the discriminator (D) was left out: ") and words in remark
    assert words in refused(tmp_path, nvidia_bytes({"D": tensors}, fields={"D": layers}))


def test_a_generator_with_its_discriminator_is_saved_and_loaded(tmp_path: Path) -> None:
    """With the same hash; G is used only if G_ema is missing; halves are not invented."""
    averaged, plain = random_generator(TINY, 1), random_generator(TINY, 2)
    discriminator = Discriminator(TINY_DISCRIMINATOR, torch.Generator().manual_seed(3))
    networks = {"G": plain.state_dict(), "D": discriminator.state_dict(), "G_ema": averaged.state_dict()}
    found = imported(tmp_path, nvidia_bytes(networks, beside={"augment_pipe": None}))
    assert found.ignored == ("G", "augment_pipe")
    save_model(tmp_path / "saved.safetensors", found.model())
    again = load_model(tmp_path / "saved.safetensors")
    assert isinstance(again.architecture, GanArchitecture)
    assert weights_hash(*again.modules()) == weights_hash(averaged, discriminator)
    assert import_file(tmp_path / "saved.safetensors").kind == "fedface"
    del networks["G_ema"]
    found = imported(tmp_path, nvidia_bytes(networks))
    assert found.generator is not None and weights_hash(found.generator) == weights_hash(plain)
    assert any("no averaged generator" in remark for remark in found.notes["remarks"])
    larger = Discriminator(DiscriminatorConfig(size=32, channel_base=128, channel_max=12), torch.Generator())
    found = imported(tmp_path, nvidia_bytes({"G_ema": plain.state_dict(), "D": larger.state_dict()}))
    with pytest.raises(WeightsError, match="do not belong together"):
        found.model()


def test_half_precision_and_state_dicts_are_read(tmp_path: Path) -> None:
    """A fedface state dict in float16, alone or by name; what it does not contain is reported in a note."""
    generator = random_generator(TINY)
    halved = {name: value.half() for name, value in generator.state_dict().items()}
    for content in (halved, {"G_ema": halved}):
        found = imported(tmp_path, torch_bytes(content))
        assert found.kind == "stylegan2-ada state dict" and isinstance(found.generator, StyleGAN2)
        assert furthest(found.generator.synthesis.b4.const, generator.synthesis.b4.const) < 2e-3
        assert any(
            "does not say whether activations are clamped" in words for words in found.notes["remarks"]
        )


def rosinality_like(shared: Path) -> dict[str, Tensor]:
    """A generator's weights by rosinality's names."""
    return state(reference(shared, "rosinality_g32"))


def test_old_files_without_noise_or_mean_are_completed_deterministically(
    shared: Path, tmp_path: Path
) -> None:
    """From a fixed seed and reported in a note, so that two imports of one file have one hash."""
    tensors = {name: value for name, value in rosinality_like(shared).items() if "noises" not in name}
    found = [imported(tmp_path, torch_bytes({"g_ema": tensors})) for _ in range(2)]
    assert len({weights_hash(one.generator) for one in found if one.generator is not None}) == 1
    words = " ".join(found[0].notes["remarks"])
    assert "noise maps are not in the file" in words and "10,000 latents" in words
    generator = found[0].generator
    assert isinstance(generator, StyleGAN2)
    with torch.no_grad():
        styles = generator.map(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(9)))[:, 0]
    error = styles.std(dim=0) * (1 / 10_000 + 1 / 20_000) ** 0.5
    assert ((styles.mean(dim=0) - generator.mapping.w_avg).abs() < 6 * error).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv1.conv.weight": torch.zeros(1, 64, 64, 3, 3) / 0}, "holds numbers that are not finite"),
        ({"conv1.activate.bias": torch.zeros(63)}, "should have shape [64], got [63]"),
        ({"conv1.activate.bias": torch.zeros(64, dtype=torch.int32)}, "should hold floating point numbers"),
        ({"conv1.activate.bias": None}, "lacks 1 weights"),
        ({"input.input": torch.zeros(2, 64, 4, 4)}, "of which the first is 1"),
        ({"conv9.weight": torch.zeros(1)}, "has 1 weights that are not expected, the first is conv9.weight"),
        ({"convs.0.conv.blur.kernel": torch.ones(4, 4)}, "is another filter"),
        ({"convs.0.conv.blur.kernel": torch.ones(3)}, "is another filter"),
        ({"convs.3.conv.weight": torch.zeros(1, 50, 64, 3, 3)}, "thinned layer by layer"),
        ({"convs.3.conv.weight": None}, "has blocks of sides [4, 8, 32]"),
        ({"convs.99.conv.weight": torch.zeros(1, 4, 4, 3, 3)}, "has blocks of sides"),
        ({"style.1.weight": torch.zeros(60, 64)}, "fc0.weight: should have shape [64, 64], got [60, 64]"),
        ({"style.1.weight": torch.zeros(0, 10**9)}, "layers have 1 to 65,536 inputs"),
        ({"style.1.weight": torch.zeros(64)}, "which is not that of this layer"),
        ({"conv1.conv.modulation.weight": torch.zeros(64, 0)}, "layers have 1 to 65,536 inputs"),
    ],
)  # fmt: skip
def test_weights_that_do_not_match_exactly_are_refused(
    shared: Path, tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    """Missing, extra, another shape, another filter, not finite: one sentence with the name of the weight."""
    tensors = {**rosinality_like(shared), **change}
    stored = {name: value for name, value in tensors.items() if value is not None}
    assert words in refused(tmp_path, torch_bytes({"g_ema": stored}))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("synthesis.b8.conv0.activation", "sin", "our networks have lrelu"),
        ("synthesis.b8.conv0.use_noise", False, "noise in every layer"),
        ("synthesis.b8.conv0.conv_clamp", 100, "clamps some layers and not others"),
        ("mapping.fc0.weight_gain", 0.5, "learning rate multiplier of 0.01"),
    ],
)
def test_fields_that_would_change_the_images_are_refused(
    tmp_path: Path, field: str, value: Any, words: str
) -> None:
    """Equal weights do not make equal networks: fields of NVIDIA's modules matter too."""
    tensors = random_generator(TINY).state_dict()
    fields = layer_fields(tensors)
    imported(tmp_path, nvidia_bytes({"G_ema": tensors}, fields={"G_ema": fields}))
    content = nvidia_bytes({"G_ema": tensors}, fields={"G_ema": fields | {field: value}})
    assert words in refused(tmp_path, content)


def test_other_files_get_an_error_that_lists_what_can_be_read(tmp_path: Path) -> None:
    """A network of another kind, no networks, another program's safetensors file, a missing file."""
    other = {"encoder.0.weight": torch.zeros(3, 3), "encoder.0.bias": torch.zeros(3)}
    sentence = refused(tmp_path, torch_bytes({"state_dict": other}))
    assert "encoder.0.bias" in sentence and "StyleGAN2" in sentence
    sentence = refused(tmp_path, nvidia_bytes({"G_ema": {"synthesis.input.freqs": torch.zeros(2)}}))
    assert "Generator" in sentence and "unknown kind" in sentence
    assert "unknown kind" in refused(tmp_path, torch_bytes({"latent_avg": torch.zeros(3)}))
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert "another kind" in refused(tmp_path, len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match="no such file"):
        import_file(tmp_path / "none.pkl")
    (tmp_path / "a.pt").write_bytes(torch_bytes({"synthesis.b4.const": torch.zeros(1), "b": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="none.pt: no such file"):
        import_file(tmp_path / "a.pt", tmp_path / "none.pt")


def test_names_from_a_file_are_safe_for_a_terminal(tmp_path: Path) -> None:
    """Of networks, of tensors and of everything else: no escape codes, at most forty letters."""
    rest = {
        "\x1b[1mnet": {"a": torch.zeros(2), "b": torch.zeros(2)},
        "\x07": torch.zeros(2),
        "t" * 99: torch.zeros(2),
    }
    content = {"G_ema": random_generator(TINY).state_dict(), "\x1b]0;step\x07": 3, **rest}
    found = imported(tmp_path, torch_bytes(content))
    assert found.ignored == ("?", "?[1mnet", f"{'t' * 40}...", "?]0;step?")


def test_running_out_of_memory_in_a_conversion_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the file was read."""

    def full(*words: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr(import_weights, "build_exactly", full)
    content = torch_bytes({"G_ema": random_generator(TINY).state_dict()})
    assert "more memory to convert than this machine has" in refused(tmp_path, content)
