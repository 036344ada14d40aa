"""Weights as one flat vector (for aggregation) or one safetensors file (for keeping), and their hash.

Called from training/, federation/, the command line. safetensors is a list of numbers with names and cannot
carry code, so a file from a stranger is at worst wrong. Shapes and names are checked before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fedface.errors import ConfigError, WeightsError
from fedface.models.critic import Critic, CriticConfig
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2
from fedface.shapes import Vector

BASE_PATH = Path(__file__).parent / "weights" / "base32.safetensors"
FORMAT = "fedface-gan-1"
PREFIXES = ("generator", "critic")  # of names in a file, in the order of `Gan.modules`


@dataclass(frozen=True)
class Gan:
    """A generator and the critic it was trained against, with what is known about their making."""

    generator: StyleGAN2
    critic: Critic
    notes: Mapping[str, Any]

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Both networks in the order in which their weights are flattened."""
        return self.generator, self.critic


def new_gan(generator: GeneratorConfig, critic: CriticConfig, chance: torch.Generator) -> Gan:
    """Both networks with random weights; their sizes must agree."""
    if generator.size != critic.size:
        raise ConfigError(f"generator and critic must have one size, got {generator.size} and {critic.size}")
    return Gan(StyleGAN2(generator, chance), Critic(critic, chance), {})


def copy_gan(gan: Gan) -> Gan:
    """The same weights in new memory."""
    twin = Gan(StyleGAN2(gan.generator.config), Critic(gan.critic.config), dict(gan.notes))
    for mine, theirs in zip(twin.modules(), gan.modules(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return twin


def vector_of(*modules: nn.Module) -> Vector:
    """All trainable weights of the modules, in the order of their names, as one float32 vector (d,)."""
    return torch.cat([p.detach().float().reshape(-1) for module in modules for _, p in _named(module)])


def buffers_of(*modules: nn.Module) -> Vector:
    """What belongs to the weights without being trained, noise maps and the mean style, flat like `vector_of`."""
    return torch.cat([b.detach().float().reshape(-1) for module in modules for b in _buffers(module)])


def fill(vector: Vector, *modules: nn.Module) -> None:
    """Write a flat vector back into the weights it came from.

    Raises:
        WeightsError: The vector has another length than the modules have weights.
    """
    _fill(vector, [p for module in modules for _, p in _named(module)], "weights")


def fill_buffers(vector: Vector, *modules: nn.Module) -> None:
    """Write what `buffers_of` read; raises WeightsError where the lengths differ."""
    _fill(vector, [b for module in modules for b in _buffers(module)], "numbers in buffers")


def _fill(vector: Vector, parts: list[Tensor], what: str) -> None:
    wanted = sum(part.numel() for part in parts)
    if vector.shape != (wanted,):
        raise WeightsError(
            f"these networks have {wanted} {what}, got a vector of shape {tuple(vector.shape)}"
        )
    with torch.no_grad():
        for part, values in zip(parts, vector.split([part.numel() for part in parts]), strict=True):  # type: ignore[no-untyped-call]
            part.copy_(values.reshape(part.shape))


def _buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that a state dict holds, in the order of their names."""
    kept = module.state_dict(keep_vars=True)
    return [kept[name] for name, _ in sorted(module.named_buffers()) if name in kept]


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted(module.named_parameters(), key=lambda item: item[0])


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of every weight and buffer, the first 16 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def remember_mean_style(generator: StyleGAN2, chance: torch.Generator, *, draws: int = 4096) -> None:
    """Set the mean style, towards which truncation pulls, from `draws` fresh latents."""
    latents = torch.randn(draws, generator.latent_width, generator=chance)
    with torch.no_grad():
        generator.mapping.w_avg.copy_(generator.mapping(latents).mean(dim=0))


def gan_bytes(gan: Gan) -> bytes:
    """The safetensors bytes of both networks, their configs and notes."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in zip(PREFIXES, gan.modules(), strict=True):
        for name, value in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = value.detach().contiguous().float()
    header = {
        "format": FORMAT,
        "generator": json.dumps(asdict(gan.generator.config)),
        "critic": json.dumps(asdict(gan.critic.config)),
        "notes": json.dumps(dict(gan.notes)),
    }
    return save(tensors, header)


def save_gan(path: Path, gan: Gan) -> None:
    """Write both networks to a file, on the disk on return; a crash in the middle leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".draft")
    with draft.open("wb") as file:
        file.write(gan_bytes(gan))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def load_gan(path: Path) -> Gan:
    """Read both networks from a file that `save_gan` wrote.

    Raises:
        WeightsError: The file is missing, is no safetensors file, is of another kind, lacks or adds a weight,
            or has one of another shape or one that is not finite.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; give a .safetensors file that fedface wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: wanted a generator and critic of fedface ({FORMAT}), got {header.get('format', 'another kind')}"
        )
    try:
        shapes = (
            GeneratorConfig(**json.loads(header["generator"])),
            CriticConfig(**json.loads(header["critic"])),
        )
        notes = dict(json.loads(header["notes"]))
        # Without memory first: the description is a stranger's, and may be of networks that fill this machine.
        with torch.device("meta"):
            _check(path, Gan(StyleGAN2(shapes[0]), Critic(shapes[1]), {}), tensors)
        gan = new_gan(*shapes, torch.Generator())
    except (KeyError, TypeError, ValueError, ConfigError, RuntimeError) as error:
        raise WeightsError(f"{path}: its description of the networks is damaged ({error})") from error
    for prefix, module in zip(PREFIXES, gan.modules(), strict=True):
        module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
    return Gan(gan.generator, gan.critic, notes)


def _check(path: Path, gan: Gan, tensors: dict[str, Tensor]) -> None:
    """Raise WeightsError unless a file has exactly these networks' weights; the networks may lie on no device."""
    wanted = {
        f"{prefix}.{name}": value
        for prefix, module in zip(PREFIXES, gan.modules(), strict=True)
        for name, value in module.state_dict().items()
    }
    if missing := sorted(set(wanted) - set(tensors)):
        raise WeightsError(f"{path}: lacks {len(missing)} weights, the first is {missing[0]}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise WeightsError(f"{path}: has {len(extra)} weights that do not belong, the first is {extra[0]}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise WeightsError(
                f"{path}: {name} should have shape {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
            )
        if value.dtype != torch.float32:
            raise WeightsError(f"{path}: {name} should hold float32 numbers, got {value.dtype}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite")


def load_base() -> Gan:
    """The embedded default: faces of 32 px, trained on drawn faces of which 85 in 100 have light skin."""
    return load_gan(BASE_PATH)
