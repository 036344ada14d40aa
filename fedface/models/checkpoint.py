"""Weights as one flat vector (for aggregation) or one safetensors file (for storage), and their hash.

safetensors is a list of named tensors and cannot carry code, so an untrusted file is at worst wrong. Shapes and names
are checked before anything is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fedface.atomic_io import check_output, write_output
from fedface.codec import dumps, loads
from fedface.errors import ConfigError, WeightsError
from fedface.models.model import (
    Architecture,
    FlowArchitecture,
    GanArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    build_model,
)
from fedface.models.stylegan2 import StyleGAN2
from fedface.tensor_types import Vector
from fedface.text import sanitize_text

BUNDLED = Path(__file__).parent / "weights"
GAN_PATH = BUNDLED / "gan32.safetensors"
FLOW_PATH = BUNDLED / "flow32.safetensors"
ENCODER_PATH = BUNDLED / "encoder32.safetensors"
STYLE_ENCODER_PATH = BUNDLED / "style-encoder32.safetensors"
SUPER_RESOLUTION_PATH = BUNDLED / "super-resolution32.safetensors"
HEADER = "fedface"  # the metadata key of our header
MARK = f'{{"__metadata__":{{"{HEADER}":'  # safetensors writes the metadata first


def flatten_tensors(tensors: Sequence[Tensor]) -> Vector:
    """Tensors as one float32 vector (d,)."""
    return torch.cat([t.detach().float().reshape(-1) for t in tensors]) if tensors else torch.zeros(0)


def assign_tensors(vector: Vector, tensors: Sequence[Tensor], what: str) -> None:
    """Write a flat vector into tensors; raises WeightsError where they have another number of `what`."""
    _check_count(vector, _count(tensors), what)
    with torch.no_grad():
        for part, values in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):  # type: ignore[no-untyped-call]
            part.copy_(values.reshape(part.shape))


def flatten_parameters(*modules: nn.Module) -> Vector:
    """All trainable weights of the modules, in the order of their names, as one float32 vector (d,)."""
    return flatten_tensors(sorted_parameters(*modules))


def flatten_buffers(*modules: nn.Module) -> Vector:
    """What belongs to a model without being trained (noise maps, the mean style), flat like `flatten_parameters`."""
    return flatten_tensors(_buffers(*modules))


def assign_parameters(vector: Vector, *modules: nn.Module) -> None:
    """Write what `flatten_parameters` returned; raises WeightsError where the lengths differ."""
    assign_tensors(vector, sorted_parameters(*modules), "weights")


def assign_buffers(vector: Vector, *modules: nn.Module) -> None:
    """Write what `flatten_buffers` returned; raises WeightsError where the lengths differ."""
    assign_tensors(vector, _buffers(*modules), "numbers in buffers")


def model_from_vectors(architecture: Architecture, weights: Vector, buffers: Vector) -> Model:
    """A model of an architecture, with the vectors that `flatten_parameters` and `flatten_buffers` return.

    Guarantees:
        * Memory is allocated only once the architecture is known to have as many numbers as the vectors.

    Args:
        architecture: It may be untrusted.
        weights: Of all networks, (d,).
        buffers: Of all networks, flat.

    Raises:
        WeightsError: The architecture has another number of weights or of values in buffers.
    """
    try:
        numbers, trainable = _sizes(architecture)
        _check_count(buffers, numbers, "numbers in buffers")
        _check_count(weights, trainable, "weights")
        model = build_model(architecture, torch.Generator())
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise WeightsError(
            f"networks of this architecture cannot be built on this machine ({error})"
        ) from error
    assign_buffers(buffers, *model.modules())
    assign_parameters(weights, *model.modules())
    return model


@lru_cache(maxsize=16)
def _sizes(architecture: Architecture) -> tuple[int, int]:
    """How many numbers in buffers and how many weights its networks have; allocates no memory for them."""
    with torch.device("meta"):
        planned = build_model(architecture).modules()
    return _count(_buffers(*planned)), _count(sorted_parameters(*planned))


def _count(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _check_count(vector: Vector, expected: int, what: str) -> None:
    if vector.shape != (expected,):
        raise WeightsError(
            f"these networks have {expected} {what}, got a vector of shape {tuple(vector.shape)}"
        )


def _buffers(*modules: nn.Module) -> list[Tensor]:
    """The buffers that a state dict holds, in the order of their names, network by network."""
    states = [(module.state_dict(keep_vars=True), sorted(module.named_buffers())) for module in modules]
    return [state[name] for state, buffers in states for name, _ in buffers if name in state]


def sorted_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """All parameters in the order of their names, network by network."""
    return [p for module in modules for _, p in sorted(module.named_parameters(), key=itemgetter(0))]


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of every weight and buffer, the first 16 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def estimate_mean_style(generator: StyleGAN2, rng: torch.Generator, *, draws: int = 4096) -> None:
    """Set the mean style, towards which truncation pulls, from `draws` fresh latents."""
    latents = torch.randn(draws, generator.latent_width, generator=rng)
    with torch.no_grad():
        generator.mapping.w_avg.copy_(generator.mapping(latents).mean(dim=0))


def model_bytes(model: Model) -> bytes:
    """The safetensors bytes of a model's networks, architecture and notes."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.networks.items():
        for name, value in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = value.detach().contiguous().float()
    return save(tensors, {HEADER: dumps(CheckpointHeader(model.architecture, dict(model.notes)))})


def check_place(path: Path) -> None:
    """Raise WeightsError or ConfigError unless a model could be saved there; called before hours of training."""
    if not path.name or path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the .safetensors file to write")
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if not home.is_dir():
        raise WeightsError(f"{path}: cannot be written, because {home} is a file and not a folder")
    check_output(path, MARK)


def save_model(path: Path, model: Model) -> None:
    """Write a model to a file, on the disk on return; a crash in the middle leaves the old file as it was.

    Raises:
        WeightsError: The path names a folder, or lies within a file.
        ConfigError: An existing file is not a model of fedface; it is unchanged.
    """
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, model_bytes(model), MARK)


@dataclass(frozen=True)
class CheckpointHeader:
    """The metadata of a checkpoint file."""

    version: ClassVar[int] = 4

    architecture: Architecture
    notes: dict[str, Any]


def load_model(path: Path) -> Model:
    """Read a model from a file that `save_model` wrote.

    Raises:
        WeightsError: The file is missing, is not a safetensors file, is of another kind, lacks or adds a weight,
            or has one of another shape or one that is not finite.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; give a .safetensors file that fedface wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({error}); "
            "convert a checkpoint of another program with fedface weights import"
        ) from error
    if HEADER not in header:
        raise WeightsError(
            f"{path}: expected a model of fedface, got a safetensors file of another kind; "
            "`fedface weights import` reads files of other programs"
        )
    try:
        header_read = loads(CheckpointHeader, header[HEADER])
        # Without memory first: an untrusted architecture may be larger than this machine.
        with torch.device("meta"):
            _check(path, build_model(header_read.architecture), tensors)
        model = build_model(header_read.architecture, torch.Generator(), header_read.notes)
    except (TypeError, ValueError, ConfigError, RuntimeError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{path}: its description of the networks cannot be read ({error})") from error
    for prefix, module in model.networks.items():
        module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
    return model


def _check(path: Path, model: Model, tensors: dict[str, Tensor]) -> None:
    """Raise WeightsError unless a file has exactly these networks' weights; the networks may lie on no device."""
    expected = {
        f"{prefix}.{name}": value
        for prefix, module in model.networks.items()
        for name, value in module.state_dict().items()
    }
    try:
        check_weights(expected, tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise WeightsError(f"{path}: {name}: should hold float32 numbers, got {value.dtype}")


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare untrusted weights with those of a network, which may lie on no device.

    Raises:
        WeightsError: A weight is missing, not expected, of another shape, not floating point or not finite.
    """
    if missing := sorted(set(expected) - set(found)):
        raise WeightsError(f"lacks {len(missing)} weights, the first is {missing[0]}")
    if extra := sorted(set(found) - set(expected)):
        raise WeightsError(
            f"has {len(extra)} weights that are not expected, the first is {sanitize_text(extra[0])}"
        )
    for name, value in found.items():
        shape, own = list(expected[name].shape), list(value.shape)
        if own != shape:
            raise WeightsError(f"{name}: should have shape {shape}, got {own}")
        if not value.is_floating_point():
            raise WeightsError(f"{name}: should hold floating point numbers, got {value.dtype}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{name}: holds numbers that are not finite")


def load_as(path: Path, architecture: type[Architecture]) -> Model:
    """Read a model that must have this architecture; raises WeightsError as `load_model` does, or for another one."""
    model = load_model(path)
    if not isinstance(model.architecture, architecture):
        raise WeightsError(
            f"{path}: expected {architecture.description}, got {model.architecture.description}"
        )
    return model


def load_gan() -> Model:
    """The bundled default: faces of 32 px, trained on synthetic faces of which 85 in 100 have light skin."""
    return load_as(GAN_PATH, GanArchitecture)


def load_flow() -> Model:
    """The bundled rectified flow, trained on the same synthetic faces as `load_gan`."""
    return load_as(FLOW_PATH, FlowArchitecture)


def load_style_encoder() -> Model:
    """The bundled generator with the encoder that estimates the styles of a photo of 8 px."""
    return load_as(STYLE_ENCODER_PATH, StyleEncoderArchitecture)


def load_super_resolution() -> Model:
    """The bundled super-resolution network, 8 to 32 px, trained on the same synthetic faces."""
    return load_as(SUPER_RESOLUTION_PATH, SuperResolutionArchitecture)
