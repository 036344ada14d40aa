"""Which weights are trained: all, or low-rank changes of the layers that shape an image.

Source: FFA-LoRA, Sun et al. 2024 (arXiv:2403.12313): a weight W (o, i) becomes W + s B A, where A (r, i) is random,
public and frozen, and only B (o, r), which starts at zero, is trained. Then the mean of the devices' updates is the
update of the mean (averaging A and B separately is not), and noise enters linearly. LoRA itself: Hu et al. 2021,
arXiv:2106.09685.

The rows of A are orthonormal and s = sqrt(i / r). Over the choice of A the mean of s^2 A^T A is the identity,
so that, with the same learning rate and clip norm as for all weights:

* one step of gradient descent moves W, in the mean over A, as a step of all weights would;
* the gradient of B has in the root mean square the norm of the gradient of W, hence is clipped alike;
* noise on B becomes noise of the same norm on W, and so does a step of Adam, which moves every coordinate by about
  the learning rate.

At r = i the steps of gradient descent are the same as those of all weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, ClassVar, assert_never

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedface.errors import WeightsError
from fedface.models.checkpoint import assign_tensors, flatten_tensors, sorted_parameters
from fedface.tensor_types import Vector
from fedface.validation import In, checked

MAX_RANK = 4096


@dataclass(frozen=True)
class Full:
    """All weights are trained."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
@checked
class Lora:
    """Only low-rank changes of convolutions, style affines and fully connected layers are trained; no bias is."""

    kind: ClassVar[str] = "lora"

    # r; a layer with fewer inputs than this gets as many as it has inputs.
    rank: Annotated[int, In(f"[1, {MAX_RANK}]")] = 4


Adaptation = Full | Lora


class LoraParametrization(nn.Module):
    """W -> W + s (B A), reshaped like W; B is the one trained parameter, A a buffer that no file holds."""

    down: Tensor

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        rank = min(rank, inputs)
        # In float64, so that another machine's rounding does not reach the float32 rows.
        gaussian = torch.randn(inputs, rank, generator=rng, dtype=torch.float64)
        rows = torch.linalg.qr(gaussian).Q.T
        self.scale = math.sqrt(inputs / rank)
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))
        self.register_buffer("down", rows.to(weight).contiguous(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, of the same shape."""
        return weight + self.scale * (self.up @ self.down).reshape(weight.shape)


def attach(module: nn.Module, adapt: Adaptation, rng: torch.Generator) -> None:
    """Mark in place which weights of a network are trained; its outputs do not change.

    For `Lora` these are the changes of every weight of at least two dimensions outside a mapping network; everything
    else is frozen. Equal networks, equal `adapt` and equally seeded `rng` give equal adapters, on any machine.

    Args:
        module: A network without adapters; WeightsError if it has some, `merge` them first.
        adapt: All weights, or low-rank changes.
        rng: Public random directions (A), in the order of the layers' names. Not used by `Full`.
    """
    if any(isinstance(part, LoraParametrization) for part in module.modules()):
        raise WeightsError("this network has adapters already; merge them before new ones are attached")
    match adapt:
        case Full():
            module.requires_grad_(True)
        case Lora(rank=rank):
            module.requires_grad_(False)
            for layer, weight in _adaptable(module):
                parametrize.register_parametrization(layer, "weight", LoraParametrization(weight, rank, rng))
        case _:
            assert_never(adapt)


def merge(module: nn.Module) -> None:
    """Add the low-rank changes to the weights in place and mark every weight as trained again.

    The state dict has the same names as before `attach`. A network without adapters is only marked.
    """
    for layer in list(module.modules()):
        if _changed(layer):
            _unshare_class(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    module.requires_grad_(True)


def flatten_trainable(*modules: nn.Module) -> Vector:
    """The trained weights, in the order of their names, network by network, as one float32 vector (d,)."""
    return flatten_tensors(_trained(modules))


def assign_trainable(vector: Vector, *modules: nn.Module) -> None:
    """Write a flat vector back into the trained weights.

    Raises:
        WeightsError: The vector has another length than `flatten_trainable` of these networks: device and server
            must attach the same adapters.
    """
    assign_tensors(vector, _trained(modules), "trained weights")


def _trained(modules: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    return [weight for weight in sorted_parameters(*modules) if weight.requires_grad]


def _adaptable(module: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """The layers with a weight to adapt, and it, in the order of their names."""
    layers = []
    for name, layer in sorted(module.named_modules(), key=itemgetter(0)):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2 and "mapping" not in name.split("."):
            layers.append((layer, weight))
    return layers


def _changed(layer: nn.Module) -> bool:
    """Whether a layer's own weight has an adapter."""
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(part, LoraParametrization)
        for part in layer.get_submodule("parametrizations.weight").children()
    )


def _unshare_class(layer: nn.Module) -> None:
    """Give a layer a class of its own, like the one it has.

    Copies share the class that torch made when the adapter was attached, and removing an adapter deletes the
    property `weight` from that class: the copies would lose theirs.
    """
    shared = type(layer)
    body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, body)
