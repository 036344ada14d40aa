"""Reads untrusted checkpoint files of other programs, without running any code in them.

Supported are NVIDIA's stylegan2-ada .pkl, and what torch.save writes in either of its two formats. Both are pickles;
`safe_pickle` reads those as plain data, from which this module builds tensors within bounds: a tensor never reaches
outside its storage, and all tensors together take little more memory than the size of the file.
"""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedface.errors import WeightsError
from fedface.importing.file_kinds import START, kind_without_weights
from fedface.importing.safe_pickle import Budget, PickledCall, PickleRefused, check_name, read_pickle
from fedface.importing.torch_archive import MAX_SIZE, TORCH_MAGIC, Storage, read_storages, read_zip
from fedface.text import sanitize_text

_MAX_DEPTH: Final = 32  # networks within networks
_PERSISTENT: Final = "torch_utils.persistence._reconstruct_persistent_obj"

PlainValue = bool | int | float | str | None
Kind = Literal["nvidia-pickle", "torch-checkpoint"]


@dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    class_name: str  # as named in the file; "" for a plain state dict
    tensors: Mapping[str, Tensor]  # by dotted name
    fields: Mapping[str, PlainValue]  # by dotted name, such as synthesis.img_resolution


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    kind: Kind
    networks: Mapping[str, ForeignNetwork]  # by the file's name, such as G_ema; "" if the file is one network
    tensors: Mapping[str, Tensor]  # outside the networks, such as latent_avg
    ignored: tuple[str, ...]  # names of everything else


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and an opening brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[6:8] == b"\0\0"


def read_foreign(path: Path) -> ForeignFile:
    """Read a file of NVIDIA's or of torch.save, recognised by its content.

    Guarantees:
        * Nothing that the file names is imported or called.
        * The tensors take at most four times as many bytes as the file, and 1 MiB.
        * Any file of 10 MB is read or refused within about two CPU seconds, a larger one also takes its reading time.

    Raises:
        WeightsError: The file is missing, too large, of another kind or damaged, it names something that no
            weights need, or takes more work than weights do; the message says what.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    size = path.stat().st_size
    budget = Budget(size)
    try:
        with path.open("rb") as file:
            start = file.read(START)
            if problem := kind_without_weights(start):
                raise PickleRefused(problem)
            if not 16 <= size <= MAX_SIZE:
                raise PickleRefused(f"has {size:,} bytes; files of weights have 16 to {MAX_SIZE:,}")
            if start.startswith(b"PK\x03\x04"):
                return _sorted("torch-checkpoint", read_zip(file, size, budget), budget)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                value = read_pickle(content, budget, nested=lambda inner: _read_nested(inner, budget))
                if value == TORCH_MAGIC:
                    return _sorted("torch-checkpoint", read_storages(content, budget), budget)
                return _sorted("nvidia-pickle", value, budget)
    except PickleRefused as error:
        raise WeightsError(f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: takes more memory to read than this machine has") from error


def _read_nested(content: bytes, budget: Budget) -> Storage:
    """What torch.storage._load_from_bytes is given: one storage in the older format of torch.save."""
    budget.spend(size=len(content))
    stream = io.BytesIO(content)
    if read_pickle(stream, budget) == TORCH_MAGIC:
        value = read_storages(stream, budget)
        if isinstance(value, Storage):
            return value
    raise PickleRefused("gives torch.storage._load_from_bytes something other than a storage")


def _sorted(kind: Kind, value: Any, budget: Budget) -> ForeignFile:
    """Networks, tensors beside them, and the rest by name."""
    if _is_network(value):
        value = {"": value}
    if not isinstance(value, dict):
        raise PickleRefused("is a pickle that holds no networks by name")
    networks: dict[str, ForeignNetwork] = {}
    beside: dict[str, Tensor] = {}
    ignored: list[str] = []
    for name, part in value.items():
        budget.spend(parts=len(part) if isinstance(part, dict) else 1)
        if not isinstance(name, str):
            ignored.append(str(name) if isinstance(name, int) else f"a {type(name).__name__}")
        elif _is_network(part):
            networks[name] = _network(part, budget)
        elif _is_tensor(part):
            beside[name] = _tensor(part, budget)
        else:
            ignored.append(sanitize_text(name, 40))
    if not networks and not beside:
        raise PickleRefused("is a pickle that holds no networks by name")
    return ForeignFile(kind=kind, networks=networks, tensors=beside, ignored=tuple(ignored))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, PickledCall) and value.name.startswith("torch._utils._rebuild_")


def _is_network(value: Any) -> bool:
    """A module of NVIDIA's with its state, or a dictionary of tensors."""
    if isinstance(value, PickledCall):
        return value.name == _PERSISTENT
    if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
        return False
    return sum(map(_is_tensor, value.values())) > max(1, len(value) // 2)


def _network(value: PickledCall | dict[str, Any], budget: Budget) -> ForeignNetwork:
    if isinstance(value, dict):
        tensors = {
            name: _tensor(part, budget)
            for name, part in value.items()
            if isinstance(name, str) and _is_tensor(part)
        }
        return ForeignNetwork(class_name="", tensors=tensors, fields={})
    tensors = {}
    fields: dict[str, PlainValue] = {}
    for prefix, module in _modules(value, "", budget):
        for group in ("_parameters", "_buffers"):
            for name, part in _named(module.get(group)).items():
                if _is_tensor(part):
                    tensors[check_name(prefix + name)] = _tensor(part, budget)
        for name, part in module.items():
            if isinstance(name, str) and not name.startswith("_"):
                fields[check_name(prefix + name)] = _plain(part)
    given = _meta(value).get("class_name")
    class_name = sanitize_text(given, 40) if isinstance(given, str) else "?"
    return ForeignNetwork(class_name=class_name, tensors=tensors, fields=fields)


def _modules(value: Any, prefix: str, budget: Budget, depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each module's own dictionary, with the dotted name that stands before what is in it."""
    if depth > _MAX_DEPTH:
        raise PickleRefused(f"has networks within networks, more than {_MAX_DEPTH} deep")
    meta = _meta(value)
    state = meta.get("state")
    if not isinstance(state, dict):
        raise PickleRefused("has a network without its numbers")
    budget.spend(parts=1 + sum(len(part) for part in (state, *state.values()) if isinstance(part, dict)))
    yield prefix, state
    for name, part in _named(state.get("_modules")).items():
        if part is not None:
            yield from _modules(part, check_name(f"{prefix}{name}."), budget, depth + 1)


def _meta(value: Any) -> dict[str, Any]:
    """The argument of _reconstruct_persistent_obj: type, version, module_src, class_name, state."""
    if not (isinstance(value, PickledCall) and value.name == _PERSISTENT):
        raise PickleRefused("has a network that is not one of NVIDIA's among its own")
    if len(value.args) != 1 or not isinstance(value.args[0], dict):
        raise PickleRefused("has a network without a description")
    return value.args[0]


def _named(value: Any) -> dict[str, Any]:
    return (
        {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}
    )


def _tensor(value: PickledCall, budget: Budget) -> Tensor:
    """A view of a storage, checked to stay within it."""
    match value:
        case PickledCall("torch._utils._rebuild_parameter", (PickledCall() as inner, *_)):
            value = inner
    if value.name not in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        raise PickleRefused(f"calls {value.name} on something that is not a tensor")
    if len(value.args) < 4:
        raise PickleRefused(f"calls {value.name} without arguments")
    storage, offset, shape, strides = value.args[:4]
    if not isinstance(storage, Storage) or storage.values is None:
        raise PickleRefused(f"calls {value.name} on something that is not a storage")
    if not (
        _are_counts((offset,)) and _are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)
    ):
        raise PickleRefused(f"calls {value.name} with an invalid shape")
    if math.prod(max(side, 1) for side in shape) > MAX_SIZE:
        raise PickleRefused(f"calls {value.name} with shape {list(shape)}, which is too large")
    numel = math.prod(shape)
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if numel and (last >= storage.numel or numel > storage.numel):
        raise PickleRefused(
            f"calls {value.name} with shape {list(shape)}, strides {list(strides)} and offset {offset}, which "
            f"reaches outside its {storage.numel} numbers"
        )
    budget.spend(parts=10, size=numel * storage.dtype.itemsize)
    return torch.as_strided(storage.values, shape, strides, offset) if numel else torch.empty(shape)


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)
    )


def _plain(value: Any) -> PlainValue:
    """A field of a module as Python's own number or text; None for everything else.

    Raises:
        PickleRefused: It calls for a number of numpy and gives none.
    """
    match value:
        case bool() | int() | float() | str():
            return value
        case PickledCall(name, (PickledCall("numpy.dtype", (code, *_)), bytes(content))) if _is_scalar(name):
            dtype = np.dtype(str(code).lstrip("<>=|")).newbyteorder("<")
            if len(content) != dtype.itemsize:
                raise PickleRefused(f"calls {name} with {len(content)} bytes for a number of kind {dtype}")
            return cast(PlainValue, np.frombuffer(content, dtype)[0].item())
        case PickledCall(name) if _is_scalar(name):
            raise PickleRefused(f"calls {name} on something that is not a number")
        case _:
            return None


def _is_scalar(name: str) -> bool:
    return name.endswith(".multiarray.scalar")
