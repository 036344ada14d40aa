"""Files in other programs' formats, written for tests: weights from the references, written by Python's pickle. The
classes that NVIDIA's files name are replaced by stand-ins while a file is written, and are missing when it is read.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BUFFERS = ("resample_filter", "noise_const", "w_avg")


def reference(shared: Path, name: str) -> dict[str, Tensor]:
    """Every array of a reference by name."""
    with np.load(shared / "refs" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def state(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a reference."""
    return {key[6:]: value for key, value in arrays.items() if key.startswith("state/")}


class EasyDict(dict):
    """Stands in for dnnlib.util.EasyDict."""


class Persistent:
    """Stands in for a module of NVIDIA's: reduces to its description, as theirs do."""

    def __init__(self, class_name: str, fields: dict[str, Any]) -> None:
        self.class_name, self.fields = class_name, fields

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemError('the source of a file was run')",
            "class_name": self.class_name,
            "state": self.fields,
        }
        return (_reconstruct_persistent_obj, (meta,))


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise SystemError("a file's classes were made")


@contextmanager
def stand_ins() -> Iterator[None]:
    """The modules that NVIDIA's files name, importable while a file is written."""
    names = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }
    names |= {"dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}}
    homes = {
        thing: (thing.__module__, thing.__qualname__) for thing in (_reconstruct_persistent_obj, EasyDict)
    }
    for name, things in names.items():
        module = ModuleType(name)
        for word, thing in things.items():
            setattr(module, word, thing)
            thing.__module__ = name
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        for thing, (module_name, _) in homes.items():
            thing.__module__ = module_name


def persistent(
    tensors: Mapping[str, Tensor], class_name: str, fields: Mapping[str, Any] | None = None
) -> Persistent:
    """A module with its parts, as stylegan2-ada nests them, from weights by dotted name.

    Args:
        tensors: By dotted name.
        class_name: Class of the outermost module.
        fields: More fields by dotted name, which every module of NVIDIA's has.
    """
    reported = dict(fields or {})
    names = {name.split(".")[0] for name in tensors if "." in name}
    names |= {name.split(".")[0] for name in reported if "." in name}
    own: dict[str, Any] = {
        "training": False,
        "_parameters": OrderedDict(),
        "_buffers": OrderedDict(),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict(),
        "_init_args": (),
        "_init_kwargs": EasyDict(img_resolution=32),
    }
    for name, value in tensors.items():
        if "." in name:
            continue
        if name in BUFFERS:
            own["_buffers"][name] = value.clone()
        else:
            own["_parameters"][name] = nn.Parameter(value.clone())
    own |= {name: value for name, value in reported.items() if "." not in name}
    for part in sorted(names):
        inner = {
            name[len(part) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{part}.")
        }
        more = {
            name[len(part) + 1 :]: value for name, value in reported.items() if name.startswith(f"{part}.")
        }
        own["_modules"][part] = persistent(inner, "Part", more)
    return Persistent(class_name, own)


def layer_fields(tensors: Mapping[str, Tensor], clamp: float | None = None) -> dict[str, Any]:
    """The fields that determine what a network computes, as in NVIDIA's modules."""
    fields: dict[str, Any] = {}
    for name, value in tensors.items():
        layer, _, last = name.rpartition(".")
        if last != "weight":
            continue
        if ".fc" in f".{name}" and "mapping" in name:
            fields[f"{layer}.weight_gain"] = np.float64(0.01) / np.sqrt(value.shape[1])
            fields[f"{layer}.activation"] = "lrelu"
        elif value.dim() == 4:
            fields[f"{layer}.conv_clamp"] = None if layer.endswith("skip") else clamp
            fields[f"{layer}.activation"] = "lrelu"
            if f"{layer}.noise_const" in tensors:
                fields[f"{layer}.use_noise"] = True
    return fields


def nvidia_bytes(
    networks: Mapping[str, Mapping[str, Tensor]],
    *,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    protocol: int = 3,
    beside: Mapping[str, Any] | None = None,
) -> bytes:
    """A stylegan2-ada .pkl of these networks."""
    reported = fields or {}
    with stand_ins():
        content: dict[str, Any] = {
            name: persistent(
                tensors,
                "Discriminator" if name == "D" else "Generator",
                reported.get(name, layer_fields(tensors)),
            )
            for name, tensors in networks.items()
        }
        content |= beside or {}
        return pickle.dumps(content, protocol=protocol)


def torch_bytes(content: Any, *, zipped: bool = True) -> bytes:
    """What torch.save writes, in its newer or its older format."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
