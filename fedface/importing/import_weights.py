"""Imports weights of other programs into our networks, whose configuration is inferred from the tensors.

`foreign_checkpoint` reads the file without running anything, `key_maps` gives our names; here the configuration is
inferred, compared name by name and shape by shape, and only then built and loaded. Anything that does not fit exactly
is refused, because a network that is nearly the published one generates images that are nearly right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fedface.errors import ConfigError, WeightsError
from fedface.importing.foreign_checkpoint import ForeignFile, ForeignNetwork, is_safetensors, read_foreign
from fedface.importing.infer_config import (
    architecture_of,
    build_exactly,
    channels_of,
    check_fields,
    clamp_of,
    count_of,
    group_of,
    sides_of,
    width_of,
)
from fedface.importing.key_maps import (
    pulse_generator,
    rosinality_discriminator,
    rosinality_generator,
    without_filters,
)
from fedface.models.checkpoint import load_model
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.model import GanArchitecture, GeneratorArchitecture, Model
from fedface.models.rectified_flow import RectifiedFlow
from fedface.models.stylegan1 import StyleGAN1, StyleGAN1Config
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.text import sanitize_text

# Of what a file does not store: noise maps, and the latents from which the mean style is estimated.
FIXED_SEED: Final = 20
MEAN_DRAWS: Final = 10_000

Kind = Literal[
    "stylegan2-ada of NVIDIA",
    "stylegan2-ada state dict",
    "stylegan2 of rosinality",
    "stylegan1 as PULSE reads it",
    "fedface",
]


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    kind: Kind
    generator: StyleGAN2 | StyleGAN1 | None
    discriminator: Discriminator | None
    notes: Mapping[str, Any]  # the file's name and hash, and remarks, for the model's notes
    ignored: tuple[str, ...]  # names of unused tensors in the file

    def model(self) -> Model:
        """A model: a GAN where the file has a discriminator, a generator alone otherwise.

        Raises:
            WeightsError: There is no generator, or the discriminator is of another size.
        """
        if self.generator is None:
            raise WeightsError(
                f"{self.notes['file']}: holds a discriminator alone; a model needs a generator"
            )
        if self.discriminator is None:
            alone = GeneratorArchitecture(generator=self.generator.config)
            return Model(alone, {"generator": self.generator}, self.notes)
        if isinstance(self.generator, StyleGAN1) or self.generator.size != self.discriminator.config.size:
            raise WeightsError(
                f"{self.notes['file']}: its generator has {self.generator.size} px and its discriminator "
                f"{self.discriminator.config.size} px; they do not belong together"
            )
        architecture = GanArchitecture(
            generator=self.generator.config, discriminator=self.discriminator.config
        )
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        return Model(architecture, networks, self.notes)


def import_file(path: Path, mapping: Path | None = None) -> ImportedModel:
    """Read a file of another program or of ours, recognised by its content.

    Args:
        path: NVIDIA's .pkl, rosinality's .pt, a StyleGAN1 or stylegan2-ada state dict, or our safetensors.
        mapping: The second file of a StyleGAN1 that is stored in two, as PULSE does.

    Raises:
        WeightsError: The file cannot be read safely, is of an unknown kind, or does not fit our networks exactly.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    notes = {"file": path.name, "sha256": _digest(path)}
    try:
        if is_safetensors(path):
            if mapping is not None:
                raise WeightsError("--mapping applies to a StyleGAN1 in two files, not with safetensors")
            return _ours(path, notes)
        content = read_foreign(path)
        if mapping is not None:
            notes |= {"mapping_file": mapping.name, "mapping_sha256": _digest(mapping)}
            return _pulse([content, read_foreign(mapping)], notes)
        return _converted(content, notes)
    except (WeightsError, ConfigError) as error:
        raise WeightsError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: takes more memory to convert than this machine has") from error


def _digest(path: Path) -> str:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ours(path: Path, notes: dict[str, Any]) -> ImportedModel:
    model = load_model(path)
    known = isinstance(model.architecture, GanArchitecture | GeneratorArchitecture)
    generator = model.generator if known else None
    if generator is None or isinstance(generator, RectifiedFlow):
        raise WeightsError("is a model of fedface already; use it as it is")
    return ImportedModel(
        kind="fedface",
        generator=generator,
        discriminator=model.discriminator if isinstance(model.architecture, GanArchitecture) else None,
        notes={**model.notes, **notes},
        ignored=(),
    )


def _converted(content: ForeignFile, notes: dict[str, Any]) -> ImportedModel:
    """Which program wrote these networks, by the names of their weights."""
    names = {name for network in content.networks.values() for name in network.tensors}
    if "synthesis.b4.const" in names or "b4.out.weight" in names:
        from_nvidia = content.kind == "nvidia-pickle"
        return _stylegan2(
            content, notes, "stylegan2-ada of NVIDIA" if from_nvidia else "stylegan2-ada state dict"
        )
    if "input.input" in names or "final_linear.1.weight" in names:
        return _stylegan2(content, notes, "stylegan2 of rosinality")
    if any(name.endswith(("blocks.4x4.const", "dense0.weight")) for name in names):
        return _pulse([content], notes)
    classes = sorted({network.class_name for network in content.networks.values() if network.class_name})
    examples = ", ".join(sanitize_text(name, 40) for name in sorted(names)[:3]) or "no weights"
    raise WeightsError(
        f"holds {' and '.join(classes) or 'networks'} of an unknown kind ({examples}); supported are StyleGAN2 of "
        "NVIDIA's stylegan2-ada-pytorch and of rosinality, and StyleGAN1 as PULSE reads it"
    )


def _stylegan2(content: ForeignFile, notes: dict[str, Any], kind: Kind) -> ImportedModel:
    """The averaged generator where there is one, and the discriminator if it is one that we can compute."""
    by_rosinality = kind == "stylegan2 of rosinality"
    averaged, plain, discriminator_key = ("g_ema", "g", "d") if by_rosinality else ("G_ema", "G", "D")
    has_generator, has_discriminator = (
        ("input.input", "final_linear.1.weight") if by_rosinality else ("synthesis.b4.const", "b4.out.weight")
    )
    generator_name = _first_of(content, (averaged, plain, ""), has_generator)
    discriminator_name = _first_of(content, (discriminator_key, ""), has_discriminator)
    used = {generator_name, discriminator_name}
    remarks: list[str] = []
    generator = discriminator = None
    if generator_name is not None:
        network = content.networks[generator_name]
        if by_rosinality:
            tensors = rosinality_generator(network.tensors)
            if "latent_avg" in content.tensors:
                tensors["mapping.w_avg"] = content.tensors["latent_avg"].reshape(-1)
                used.add("latent_avg")
            network = replace(network, tensors=tensors)
        generator = _generator(network, remarks)
    if discriminator_name is not None:
        network = content.networks[discriminator_name]
        try:
            if by_rosinality:
                network = replace(network, tensors=rosinality_discriminator(network.tensors))
            discriminator = _discriminator(network)
        except (WeightsError, ConfigError) as error:
            if generator is None:
                raise
            remarks.append(f"the discriminator ({discriminator_name}) was left out: {error}")
            used.remove(discriminator_name)
    if kind == "stylegan2-ada state dict":
        remarks.append("the file does not say whether activations are clamped; they are not")
    if generator_name == plain:
        remarks.append(f"there is no averaged generator ({averaged}); {plain} was taken")
    return ImportedModel(
        kind=kind,
        generator=generator,
        discriminator=discriminator,
        notes=_with(notes, remarks),
        ignored=_ignored(content, used),
    )


def _pulse(files: list[ForeignFile], notes: dict[str, Any]) -> ImportedModel:
    tensors: dict[str, Tensor] = {}
    ignored: list[str] = []
    for content in files:
        for network in content.networks.values():
            renamed = pulse_generator(network.tensors)
            if twice := sorted(set(renamed) & set(tensors)):
                raise WeightsError(f"both files hold {sanitize_text(twice[0])}; give one of each kind")
            tensors |= renamed
        ignored += _ignored(content, set(content.networks))
    halves = {name.split(".")[0] for name in tensors}
    if halves != {"mapping", "synthesis"}:
        missing = "mapping" if "mapping" not in halves else "synthesis"
        raise WeightsError(
            f"holds a StyleGAN1 without its {missing}; give both: fedface weights import SYNTHESIS --mapping MAPPING"
        )
    remarks = ["noise maps are not in such files; fixed ones were sampled"]
    generator = _stylegan1(tensors, remarks)
    return ImportedModel(
        kind="stylegan1 as PULSE reads it",
        generator=generator,
        discriminator=None,
        notes=_with(notes, remarks),
        ignored=tuple(ignored),
    )


def _first_of(content: ForeignFile, names: Iterable[str], has: str) -> str | None:
    """The first of these networks that exists and has this weight."""
    return next((name for name in names if has in getattr(content.networks.get(name), "tensors", {})), None)


def _ignored(content: ForeignFile, used: Collection[str | None]) -> tuple[str, ...]:
    """Names of unused tensors, safe for a terminal."""
    left = sorted({*content.networks, *content.tensors}.difference(used))
    return (*(sanitize_text(name, 40) for name in left), *content.ignored)


def _with(notes: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    return {**notes, "remarks": list(dict.fromkeys(remarks))} if remarks else notes


def _generator(network: ForeignNetwork, remarks: list[str]) -> StyleGAN2:
    """A generator with stylegan2-ada's names, configured from the shapes and loaded."""
    tensors = without_filters(network.tensors, ".resample_filter")
    sides = sides_of(tensors, r"synthesis\.b([0-9]{1,6})\.conv1\.weight")
    check_fields(network)
    style = width_of(tensors, "synthesis.b4.conv1.affine.weight", 1)
    classes = width_of(tensors, "mapping.embed.weight", 1) if "mapping.embed.weight" in tensors else 0
    table = {side: width_of(tensors, f"synthesis.b{side}.conv1.weight", 0) for side in sides}
    base, most = channels_of(table)
    config = StyleGAN2Config(
        size=max(sides),
        latent_width=width_of(tensors, "mapping.fc0.weight", 1) - (style if classes else 0),
        style_width=style,
        mapping_layers=count_of(tensors, r"mapping\.fc[0-9]+\.weight"),
        architecture=architecture_of(tensors, "synthesis.b4.torgb.weight"),
        clamp=clamp_of(network),
        classes=classes,
        channel_base=base,
        channel_max=most,
    )
    rng = torch.Generator().manual_seed(FIXED_SEED)
    if not any(name.endswith(".noise_const") for name in tensors):
        remarks.append("noise maps are not in the file; fixed ones were sampled")
        tensors |= {
            f"synthesis.b{side}.{conv}.noise_const": torch.randn(side, side, generator=rng)
            for side in sides
            for conv in (("conv1",) if side == 4 else ("conv0", "conv1"))
        }
    mean_known = "mapping.w_avg" in tensors
    if not mean_known:
        tensors["mapping.w_avg"] = torch.zeros(style)
    generator = build_exactly(StyleGAN2, config, tensors)
    if not mean_known:
        _estimate_mean_style(generator, remarks, rng)
    return generator


def _discriminator(network: ForeignNetwork) -> Discriminator:
    """A discriminator with stylegan2-ada's names, configured from the shapes and loaded."""
    tensors = without_filters(network.tensors, ".resample_filter")
    sides = sides_of({**tensors, "b4.conv0.weight": torch.empty(0)}, r"b([0-9]{1,6})\.conv0\.weight")
    check_fields(network)
    table = {side: width_of(tensors, f"b{side}.conv0.weight", 1) for side in sides if side > 4}
    table[4] = width_of(tensors, "b4.conv.weight", 0)
    statistics = width_of(tensors, "b4.conv.weight", 1) - table[4]
    base, most = channels_of(table)
    config = DiscriminatorConfig(
        size=max(sides),
        architecture=architecture_of(tensors, "b4.fromrgb.weight"),
        clamp=clamp_of(network),
        minibatch_group=group_of(network) if statistics else 0,
        minibatch_channels=max(1, statistics),
        channel_base=base,
        channel_max=most,
    )
    if "mapping.embed.weight" in tensors:
        layers = count_of(tensors, r"mapping\.fc[0-9]+\.weight")
        config = replace(config, classes=width_of(tensors, "mapping.embed.weight", 1), mapping_layers=layers)
    return build_exactly(Discriminator, config, tensors)


def _stylegan1(tensors: dict[str, Tensor], remarks: list[str]) -> StyleGAN1:
    sides = sides_of(tensors, r"synthesis\.blocks\.([0-9]{1,6})x\1\.epi1\.noise\.weight")
    table = {
        side: width_of(tensors, f"synthesis.blocks.{side}x{side}.epi1.noise.weight", 0) for side in sides
    }
    base, most = channels_of(table)
    config = StyleGAN1Config(
        size=max(sides),
        latent_width=width_of(tensors, "mapping.dense0.weight", 1),
        style_width=width_of(tensors, "synthesis.blocks.4x4.epi1.style_mod.lin.weight", 1),
        mapping_layers=count_of(tensors, r"mapping\.dense[0-9]+\.weight"),
        channel_base=base,
        channel_max=most,
    )
    rng = torch.Generator().manual_seed(FIXED_SEED)
    defaults = {"mapping.w_avg": torch.zeros(config.style_width)} | {
        f"synthesis.blocks.{side}x{side}.epi{place}.noise.const": torch.randn(side, side, generator=rng)
        for side in sides
        for place in (1, 2)
    }
    generator = build_exactly(StyleGAN1, config, {**defaults, **tensors})
    if "mapping.w_avg" not in tensors:
        _estimate_mean_style(generator, remarks, rng)
    return generator


def _estimate_mean_style(generator: StyleGAN2 | StyleGAN1, remarks: list[str], rng: torch.Generator) -> None:
    """Set the mean style from fresh latents, where the file has none; with classes, of all classes equally."""
    remarks.append(f"the mean style is not in the file; it was estimated from {MEAN_DRAWS:,} latents")
    classes = generator.config.classes if isinstance(generator, StyleGAN2) else 0
    if classes > MEAN_DRAWS:
        raise WeightsError(
            f"has {classes:,} classes and no mean style, which is estimated for {MEAN_DRAWS:,} at most"
        )
    total = torch.zeros_like(generator.mapping.w_avg)
    with torch.no_grad():
        for first in range(0, MEAN_DRAWS, 500):
            latents = torch.randn(500, generator.latent_width, generator=rng)
            if classes:
                labels = torch.zeros(500, classes)
                labels[range(500), torch.arange(first, first + 500) % classes] = 1
                total += generator.mapping(latents, labels).sum(dim=0)
            else:
                total += generator.mapping(latents).sum(dim=0)
        generator.mapping.w_avg.copy_(total / MEAN_DRAWS)
