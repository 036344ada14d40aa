"""Maps other programs' names of weights to ours, which are those of stylegan2-ada.

Pure functions from named tensors to named tensors; what has no counterpart is either a constant filter, which is
compared with ours, or refused by name later. Sources: Karras et al. 2020 (arXiv:1912.04958) for the
layers, the state dicts of the two programs for the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fedface.errors import WeightsError
from fedface.text import sanitize_text

Tensors = Mapping[str, Tensor]


def without_filters(
    tensors: Tensors, ends: str = ".kernel", taps: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
) -> dict[str, Tensor]:
    """The weights without the constant filters stored among them.

    Args:
        tensors: By name.
        ends: How the names of filters end.
        taps: One row of the filter that our networks compute, up to a factor.

    Raises:
        WeightsError: A stored filter differs, so that our network would not compute the same images.
    """
    row = torch.tensor(taps)
    expected = torch.outer(row, row) / row.sum().square()
    for name, value in tensors.items():
        if name.endswith(ends):
            fits = value.shape[-2:] == expected.shape and value.numel() == expected.numel()
            actual = value.float().reshape(expected.shape) if fits else expected
            if not fits or not torch.allclose(actual / actual.sum(), expected, atol=1e-5):
                raise WeightsError(
                    f"{sanitize_text(name)}: is another filter than {list(taps)}, which our networks use"
                )
    return {name: value for name, value in tensors.items() if not name.endswith(ends)}


def rosinality_generator(tensors: Tensors) -> dict[str, Tensor]:
    """A generator of rosinality's stylegan2-pytorch, any size, by our names.

    Layer j of its list `convs` is the first (even j) or second convolution of side 8 * 2^(j // 2).
    """
    renamed: dict[str, Tensor] = {}
    for name, value in without_filters(tensors).items():
        parts = name.split(".")
        match parts:
            case ["style", place, last] if _is_place(place) and int(place) > 0:
                renamed[f"mapping.fc{int(place) - 1}.{last}"] = value
            case ["input", "input"]:
                renamed["synthesis.b4.const"] = _first(name, value, 4)
            case ["conv1", *rest]:
                renamed |= _styled("synthesis.b4.conv1", name, rest, value)
            case ["to_rgb1", *rest]:
                renamed |= _styled("synthesis.b4.torgb", name, rest, value)
            case ["convs", place, *rest] if _is_place(place):
                layer = f"synthesis.b{_side(int(place) // 2)}.conv{int(place) % 2}"
                renamed |= _styled(layer, name, rest, value)
            case ["to_rgbs", place, *rest] if _is_place(place):
                renamed |= _styled(f"synthesis.b{_side(int(place))}.torgb", name, rest, value)
            case ["noises", word] if re.fullmatch(r"noise_[0-9]{1,2}", word):
                after = int(word.removeprefix("noise_")) - 1
                layer = "b4.conv1" if after < 0 else f"b{_side(after // 2)}.conv{after % 2}"
                renamed[f"synthesis.{layer}.noise_const"] = _first(name, _first(name, value, 4), 3)
            case _:
                renamed[name] = value
    return renamed


def _styled(layer: str, name: str, rest: list[str], value: Tensor) -> dict[str, Tensor]:
    """One modulated convolution of rosinality's."""
    match rest:
        case ["conv", "weight"]:
            return {f"{layer}.weight": _first(name, value, 5)}
        case ["conv", "modulation", ("weight" | "bias") as last]:
            return {f"{layer}.affine.{last}": value}
        case ["noise", "weight"]:
            return {f"{layer}.noise_strength": value.reshape([]) if value.numel() == 1 else value}
        case ["activate", "bias"]:
            return {f"{layer}.bias": value}
        case ["bias"]:
            return {f"{layer}.bias": value.reshape(-1)}
        case _:
            return {name: value}


def rosinality_discriminator(tensors: Tensors) -> dict[str, Tensor]:
    """A discriminator of rosinality's stylegan2-pytorch, any size, by our names.

    Its list `convs` begins with the layer that reads colours; entry j is the block of side size / 2^(j - 1).
    """
    places = [int(found[1]) for name in tensors if (found := re.match(r"convs\.([0-9]{1,2})\.", name))]
    size = 4 * 2 ** max(places, default=0)
    words = {
        "conv1.0.weight": "conv0.weight",
        "conv1.1.bias": "conv0.bias",
        "conv2.1.weight": "conv1.weight",
        "conv2.2.bias": "conv1.bias",
        "skip.1.weight": "skip.weight",
    }
    last = {
        "convs.0.0.weight": f"b{size}.fromrgb.weight",
        "convs.0.1.bias": f"b{size}.fromrgb.bias",
        "final_conv.0.weight": "b4.conv.weight",
        "final_conv.1.bias": "b4.conv.bias",
        "final_linear.0.weight": "b4.fc.weight",
        "final_linear.0.bias": "b4.fc.bias",
        "final_linear.1.weight": "b4.out.weight",
        "final_linear.1.bias": "b4.out.bias",
    }
    renamed: dict[str, Tensor] = {}
    for name, value in without_filters(tensors).items():
        found = re.fullmatch(r"convs\.([0-9]{1,2})\.(.+)", name)
        if name in last:
            renamed[last[name]] = value
        elif found and found[2] in words:
            renamed[f"b{size >> (int(found[1]) - 1)}.{words[found[2]]}"] = value
        else:
            renamed[name] = value
    return renamed


def pulse_generator(tensors: Tensors) -> dict[str, Tensor]:
    """A StyleGAN1 state dict as PULSE reads them, of the mapping, the synthesis or both, by our names."""
    renamed: dict[str, Tensor] = {}
    for name, value in without_filters(tensors, taps=(1.0, 2.0, 1.0)).items():
        name = re.sub(r"^(g_)?(mapping|synthesis)\.", "", name)
        renamed[f"mapping.{name}" if re.match(r"dense[0-9]+\.", name) else f"synthesis.{name}"] = value
    return renamed


def _is_place(word: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,2}", word) is not None


def _side(place: int) -> int:
    return 8 << min(place, 16)


def _first(name: str, value: Tensor, dimensions: int) -> Tensor:
    """The one entry along the first dimension."""
    if value.dim() != dimensions or value.shape[0] != 1:
        raise WeightsError(
            f"{sanitize_text(name)}: should have {dimensions} dimensions of which the first is 1, "
            f"got shape {list(value.shape)}"
        )
    return value[0]
