"""Reads untrusted checkpoint files of other programs, without running any code in them.

Supported are NVIDIA's stylegan2-ada .pkl, and what torch.save writes in either of its two formats. Both are pickles;
`safe_pickle` reads those as plain data, from which this module builds tensors within bounds: a tensor never reaches
outside its storage, and all tensors together take little more memory than the size of the file.
"""

from __future__ import annotations

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
from fedface.importing.safe_pickle import (
    PickledCall,
    PickleRefused,
    pickle_stream,
    read_pickle,
)
from fedface.importing.torch_archive import FEW_STEPS, LARGEST, TORCH_MAGIC, Storage, read_storages, read_zip
from fedface.text import sanitize_text

_DEEPEST: Final = 32  # networks within networks
_MOST_PARTS: Final = 200_000  # entries of modules; a published checkpoint has about ten thousand
_LONGEST_NAME: Final = 200  # characters of a dotted name; published ones have about forty
_PERSISTENT: Final = "torch_utils.persistence._reconstruct_persistent_obj"

PlainValue = bool | int | float | str | None
Kind = Literal["nvidia-pickle", "torch-checkpoint"]


@dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """One network of a file."""

    class_name: str  # as named in the file; "" for a plain state dict
    tensors: Mapping[str, Tensor]  # by dotted name
    fields: Mapping[str, PlainValue]  # by dotted name, such as synthesis.img_resolution


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """What a file holds."""

    kind: Kind
    networks: Mapping[
        str, ForeignNetwork
    ]  # by the file's own name, such as G_ema; "" if the file is one network
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
        * The tensors take at most twice as many bytes as the file.

    Raises:
        WeightsError: The file is missing, too large, of another kind or damaged, or it names something that no
            weights need; the message says what.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    size = path.stat().st_size
    if not 16 <= size <= LARGEST:
        raise WeightsError(f"{path}: has {size:,} bytes; files of weights have 16 to {LARGEST:,}")
    budget = _Budget(size)
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _sorted("torch-checkpoint", read_zip(file, size), budget)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                value = read_pickle(content, nested=lambda inner: _read_nested(inner, budget))
                if value == TORCH_MAGIC:
                    return _sorted("torch-checkpoint", read_storages(content), budget)
                return _sorted("nvidia-pickle", value, budget)
    except PickleRefused as error:
        raise WeightsError(f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: takes more memory to read than this machine has") from error


class _Budget:
    """How many more tensors, and bytes of them, a file may name."""

    def __init__(self, size: int) -> None:
        self._bytes = 3 * size + 2**20  # once for the storages, twice for the views of them
        self._parts = _MOST_PARTS

    def spend(self, size: int, parts: int = 1) -> None:
        self._bytes -= size
        self._parts -= parts
        if self._bytes < 0:
            raise PickleRefused("names tensors that are together much larger than itself")
        if self._parts < 0:
            raise PickleRefused(f"has more than {_MOST_PARTS:,} parts, which is more than any network has")


def _read_nested(content: bytes, budget: _Budget) -> Storage:
    """What torch.storage._load_from_bytes is given: one storage in the older format of torch.save."""
    budget.spend(len(content))
    stream = pickle_stream(content)
    if read_pickle(stream, most_steps=FEW_STEPS) != TORCH_MAGIC:
        raise PickleRefused("gives torch.storage._load_from_bytes something other than a storage")
    value = read_storages(stream, most_steps=FEW_STEPS)
    if not isinstance(value, Storage):
        raise PickleRefused("gives torch.storage._load_from_bytes something other than a storage")
    return value


def _sorted(kind: Kind, value: Any, budget: _Budget) -> ForeignFile:
    """Networks, tensors beside them, and the rest by name."""
    if _is_network(value):
        value = {"": value}
    if not isinstance(value, dict):
        raise PickleRefused("is a pickle that holds no networks by name")
    networks: dict[str, ForeignNetwork] = {}
    beside: dict[str, Tensor] = {}
    ignored: list[str] = []
    for name, part in value.items():
        budget.spend(0, len(part) if isinstance(part, dict) else 1)
        if not isinstance(name, str):
            ignored.append(str(name) if isinstance(name, int) else f"a {type(name).__name__}")
        elif _is_network(part):
            networks[_joined("", name)] = _network(part, budget)
        elif _is_tensor(part):
            beside[_joined("", name)] = _tensor(part, budget)
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


def _network(value: PickledCall | dict[str, Any], budget: _Budget) -> ForeignNetwork:
    if isinstance(value, dict):
        tensors = {
            _joined("", name): _tensor(part, budget)
            for name, part in value.items()
            if isinstance(name, str) and _is_tensor(part)
        }
        return ForeignNetwork(class_name="", tensors=tensors, fields={})
    tensors = {}
    fields: dict[str, PlainValue] = {}
    for prefix, module in _modules(value, "", budget):
        for group in ("_parameters", "_buffers"):
            for name, part in _words_of(module.get(group)).items():
                if _is_tensor(part):
                    tensors[_joined(prefix, name)] = _tensor(part, budget)
        for name, part in module.items():
            if isinstance(name, str) and not name.startswith("_") and _is_plain(part):
                fields[_joined(prefix, name)] = _plain(part)
    return ForeignNetwork(class_name=_class_name(value), tensors=tensors, fields=fields)


def _modules(
    value: Any, prefix: str, budget: _Budget, depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each module's own dictionary, with the dotted name that stands before what is in it."""
    if depth > _DEEPEST:
        raise PickleRefused(f"has networks within networks, more than {_DEEPEST} deep")
    meta = _meta(value)
    state = meta.get("state")
    if not isinstance(state, dict):
        raise PickleRefused("has a network without its numbers")
    budget.spend(0, 1 + sum(len(part) for part in (state, *state.values()) if isinstance(part, dict)))
    yield prefix, state
    for name, part in _words_of(state.get("_modules")).items():
        if part is not None:
            yield from _modules(part, f"{_joined(prefix, name)}.", budget, depth + 1)


def _joined(prefix: str, name: str) -> str:
    """A dotted name; a long one is refused, because every part within would hold a copy of it."""
    if len(prefix) + len(name) > _LONGEST_NAME:
        raise PickleRefused(
            f"has a name of {len(prefix) + len(name):,} characters, {sanitize_text(prefix + name[:40], 40)}; "
            f"names of weights have {_LONGEST_NAME} at most"
        )
    return prefix + name


def _meta(value: Any) -> dict[str, Any]:
    """The argument of _reconstruct_persistent_obj: type, version, module_src, class_name, state."""
    if not (isinstance(value, PickledCall) and value.name == _PERSISTENT):
        raise PickleRefused("has a network that is not one of NVIDIA's among its own")
    if len(value.args) != 1 or not isinstance(value.args[0], dict):
        raise PickleRefused("has a network without a description")
    return value.args[0]


def _class_name(value: Any) -> str:
    name = _meta(value).get("class_name")
    return sanitize_text(name, 40) if isinstance(name, str) else "?"


def _words_of(value: Any) -> dict[str, Any]:
    return (
        {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}
    )


def _tensor(value: PickledCall, budget: _Budget) -> Tensor:
    """A view of a storage, checked to stay within it."""
    for _ in range(2):
        if (
            value.name == "torch._utils._rebuild_parameter"
            and value.args
            and isinstance(value.args[0], PickledCall)
        ):
            value = value.args[0]
    if value.name not in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        raise PickleRefused(f"asks for {value.name} of something that is not a tensor")
    if len(value.args) < 4:
        raise PickleRefused(f"asks for {value.name} without saying of what")
    storage, offset, shape, strides = value.args[:4]
    if not isinstance(storage, Storage) or storage.values is None:
        raise PickleRefused(f"asks for {value.name} of something that is not a storage")
    if not (
        _are_counts((offset,)) and _are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)
    ):
        raise PickleRefused(f"asks for {value.name} with an invalid shape")
    numel = math.prod(shape)
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if numel and (last >= storage.numel or numel > storage.numel):
        raise PickleRefused(
            f"asks for {value.name} with shape {list(shape)}, strides {list(strides)} and offset {offset}, which "
            f"reaches outside its {storage.numel} numbers"
        )
    budget.spend(numel * storage.dtype.itemsize)
    return torch.as_strided(storage.values, shape, strides, offset) if numel else torch.empty(shape)


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < LARGEST for value in values)
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or _is_numpy_scalar(value)


def _is_numpy_scalar(value: Any) -> bool:
    return isinstance(value, PickledCall) and value.name.endswith(".multiarray.scalar")


def _plain(value: Any) -> PlainValue:
    """A field of a module as Python's own number or words."""
    if not isinstance(value, PickledCall):
        return cast(PlainValue, value)
    kind, content = value.args if len(value.args) == 2 else (None, None)
    if not (isinstance(kind, PickledCall) and kind.name == "numpy.dtype" and isinstance(content, bytes)):
        raise PickleRefused(f"asks for {value.name} of something that is not a number")
    code = str(kind.args[0]).lstrip("<>=|")
    if len(content) != np.dtype(code).itemsize:
        raise PickleRefused(f"asks for {value.name} with {len(content)} bytes for a number of kind {code}")
    return cast(PlainValue, np.frombuffer(content, dtype=np.dtype(code).newbyteorder("<"))[0].item())
