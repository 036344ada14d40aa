"""What a network's weights say about its shape, and whether they fit it exactly.

Called from importing/import_weights. Sizes come from the shapes of weights; what shapes cannot tell, such as a bound on
activations, comes from the fields that NVIDIA's files carry beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedface.errors import WeightsError
from fedface.importing.foreign_checkpoint import ForeignNetwork
from fedface.models.stylegan_layers import MAX_WIDTH
from fedface.text import sanitize_text


def sides_of(tensors: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """The sides of the blocks, which must be 4, 8, ... without a gap."""
    found = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name)))
    if len(found) < 2 or found != [4 * 2**place for place in range(len(found))] or found[-1] > 1024:
        raise WeightsError(f"has blocks of sides {found[:10]}; wanted 4, 8, and so on up to 1024 at most")
    return tuple(found)


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


def clamp_of(network: ForeignNetwork) -> float | None:
    """The one bound on activations that all layers share; the published shortcuts have none, nor have ours."""
    bounds = {
        value
        for name, value in network.fields.items()
        if name.endswith(".conv_clamp")
        and not name.endswith("skip.conv_clamp")
        and name != "b4.fromrgb.conv_clamp"
    }
    if not bounds:
        return None  # a bare list of weights does not say
    if len(bounds) > 1:
        raise WeightsError(
            "clamps some layers and not others, or by different bounds, which our networks do not"
        )
    (bound,) = bounds
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float)):
        raise WeightsError("has a bound on activations that is no number")
    return None if bound is None else float(bound)


def group_of(network: ForeignNetwork) -> int:
    """Pictures whose spread the discriminator is told: the file's figure, or the published 4."""
    found = network.fields.get("b4.mbstd.group_size", 4)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise WeightsError(
            "takes its minibatch statistics over whole batches, which our discriminator does not"
        )
    return found


def check_fields(network: ForeignNetwork, mapping: tuple[str, float]) -> None:
    """Refuse what has the same weights and computes something else."""
    prefix, rate = mapping
    for name, value in network.fields.items():
        if name.endswith(".activation") and value not in ("lrelu", "linear"):
            raise WeightsError(
                f"{sanitize_text(name)}: is {sanitize_text(str(value), 20)}; our networks have lrelu"
            )
        if name.endswith(".use_noise") and value is not True:
            raise WeightsError(f"{sanitize_text(name)}: is off; our networks have noise in every layer")
        if name.startswith(prefix) and name.endswith(".weight_gain"):
            weight = network.tensors.get(name.removesuffix("_gain"), torch.empty(0))
            inputs = weight.shape[-1] if weight.dim() else 0
            if not isinstance(value, float) or not abs(value * inputs**0.5 - rate) < 1e-6:
                raise WeightsError(
                    f"{sanitize_text(name)}: is not that of a learning rate multiplier of {rate}"
                )


def width_of(tensors: Mapping[str, Tensor], name: str, dimension: int) -> int:
    """One side of a weight; raises WeightsError if it is not there or has fewer."""
    if name not in tensors:
        raise WeightsError(f"lacks {name}")
    shape = tensors[name].shape
    if len(shape) <= dimension:
        raise WeightsError(f"{name}: has shape {list(shape)}, which is none of this layer")
    if not 1 <= shape[dimension] <= MAX_WIDTH:
        raise WeightsError(
            f"{name}: has shape {list(shape)}; layers have 1 to {MAX_WIDTH:,} inputs and outputs"
        )
    return int(shape[dimension])


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many weights have such a name."""
    return sum(1 for name in tensors if re.fullmatch(pattern, name))


def floats_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in float32, each in memory of its own."""
    return {name: value.detach().to(torch.float32, copy=True).contiguous() for name, value in tensors.items()}


def check_fit(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Compare weights with those of the network that `make` would make; it is made without memory.

    Raises:
        WeightsError: A weight is missing, does not belong, has another shape, is no floating point number or is
            not finite.
    """
    try:
        # A stranger's shapes may be of networks that fill this machine, or that no machine could hold.
        with torch.device("meta"):
            wanted = make().state_dict()
    except (RuntimeError, OverflowError) as error:
        raise WeightsError("has shapes of a network that no machine could hold") from error
    if missing := sorted(set(wanted) - set(tensors)):
        raise WeightsError(f"lacks {len(missing)} weights, the first is {missing[0]}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise WeightsError(
            f"has {len(extra)} weights that do not belong, the first is {sanitize_text(extra[0])}"
        )
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise WeightsError(
                f"{name}: should have shape {list(wanted[name].shape)}, got {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise WeightsError(f"{name}: should hold floating point numbers, got {value.dtype}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{name}: holds numbers that are not finite")
