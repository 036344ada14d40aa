"""Infers a network's configuration from its weights, and checks that they fit it exactly.

Sizes come from the shapes of weights; what shapes do not determine, such as a clamp on activations, comes from the
fields that NVIDIA's files store beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from fedface.errors import WeightsError
from fedface.importing.foreign_checkpoint import ForeignNetwork
from fedface.models.checkpoint import check_weights
from fedface.models.stylegan_layers import MAX_WIDTH
from fedface.text import sanitize_text

Network = TypeVar("Network", bound=nn.Module)


def sides_of(tensors: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """The sides of the blocks, which must be 4, 8, ... without a gap."""
    sides = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name)))
    if len(sides) < 2 or sides != [4 * 2**place for place in range(len(sides))] or sides[-1] > 1024:
        raise WeightsError(f"has blocks of sides {sides[:10]}; expected 4, 8, and so on up to 1024 at most")
    return tuple(sides)


def channels_of(table: Mapping[int, int]) -> tuple[int, int]:
    """The `channel_base` and `channel_max` with which our rule gives these channels.

    Raises:
        WeightsError: No pair does, as in networks that were thinned layer by layer.
    """
    most = max(table.values())
    base = max(side * count for side, count in table.items())
    if {side: max(1, min(base // side, most)) for side in table} != dict(table):
        listed = ", ".join(f"{side}: {table[side]}" for side in sorted(table))
        raise WeightsError(
            f"has channels by side {{{listed}}}, which are not min(base / side, max) for any base and max; "
            "networks that were thinned layer by layer cannot be converted"
        )
    return base, most


def architecture_of(tensors: Mapping[str, Tensor], colors: str) -> Literal["skip", "orig", "resnet"]:
    """How a network's blocks are joined; `colors` is a weight of side 4 that only the skip architecture has."""
    if any(name.endswith(".skip.weight") for name in tensors):
        return "resnet"
    return "skip" if colors in tensors else "orig"


def clamp_of(network: ForeignNetwork) -> float | None:
    """The clamp on activations that all layers share; the published shortcuts have none, nor have ours."""
    bounds = {
        value
        for name, value in network.fields.items()
        if name.endswith(".conv_clamp")
        and not name.endswith("skip.conv_clamp")
        and name != "b4.fromrgb.conv_clamp"
    }
    if len(bounds) > 1:
        raise WeightsError(
            "clamps some layers and not others, or by different bounds, which our networks do not"
        )
    bound = next(iter(bounds), None)  # not stored with a plain state dict
    if bound is None:
        return None
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e6:
        raise WeightsError("has a clamp on activations that is not a number between 0 and 1,000,000")
    return float(bound)


def group_of(network: ForeignNetwork) -> int:
    """The group size of minibatch statistics: the file's, or the published 4."""
    group = network.fields.get("b4.mbstd.group_size", 4)
    if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= 1024:
        raise WeightsError(
            f"its minibatch statistics are over {'the whole batch' if group is None else 'an invalid group'}, "
            "and ours are over groups of 1 to 1,024 images"
        )
    return group


def check_fields(network: ForeignNetwork) -> None:
    """Refuse networks with the same weights that compute something else."""
    for name, value in network.fields.items():
        if name.endswith(".activation") and value not in ("lrelu", "linear"):
            raise WeightsError(
                f"{sanitize_text(name)}: is {sanitize_text(str(value), 20)}; our networks have lrelu"
            )
        if name.endswith(".use_noise") and value is not True:
            raise WeightsError(f"{sanitize_text(name)}: is off; our networks have noise in every layer")
        if name.startswith("mapping.fc") and name.endswith(".weight_gain"):
            weight = network.tensors.get(name.removesuffix("_gain"), torch.empty(0))
            inputs = weight.shape[-1] if weight.dim() else 0
            if not isinstance(value, float) or not abs(value * inputs**0.5 - 0.01) < 1e-6:
                raise WeightsError(
                    f"{sanitize_text(name)}: is not that of a learning rate multiplier of 0.01"
                )


def width_of(tensors: Mapping[str, Tensor], name: str, dimension: int) -> int:
    """One dimension of a weight's shape; raises WeightsError if it is missing."""
    if name not in tensors:
        raise WeightsError(f"lacks {name}")
    shape = tensors[name].shape
    if len(shape) <= dimension:
        raise WeightsError(f"{name}: has shape {list(shape)}, which is not that of this layer")
    if not 1 <= shape[dimension] <= MAX_WIDTH:
        raise WeightsError(
            f"{name}: has shape {list(shape)}; layers have 1 to {MAX_WIDTH:,} inputs and outputs"
        )
    return int(shape[dimension])


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many weights match a name."""
    return sum(1 for name in tensors if re.fullmatch(pattern, name))


def build_exactly(
    network_class: Callable[..., Network], config: object, tensors: Mapping[str, Tensor]
) -> Network:
    """A network of this configuration with these weights, in float32.

    They are compared with those of a network without memory first: an untrusted file's shapes may be of networks
    larger than this machine, or than any.

    Raises:
        WeightsError: A weight is missing, not expected, of another shape, not floating point or not finite.
    """
    try:
        with torch.device("meta"):
            expected = network_class(config).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise WeightsError("has shapes of a network that no machine could hold") from error
    check_weights(expected, tensors)
    network = network_class(config, torch.Generator())
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return network
