"""Which layers a loss calls, what they read, and each photo's gradient of their weights from their outputs' gradients.

Called from training/per_example_gradients.py. While a loss is computed, `Watch` notes the calls of convolutions, fully connected
layers and group normalisations with a trained weight; whatever else reaches a weight is found in autograd's record, not
here. A photo's own gradient of a layer's weight is a contraction of what the layer read with its output's gradient
(Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedface.training.unit_clipping import OuterProduct

_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_FEW_POSITIONS, _FEW_CHANNELS = 64, 16  # up to here a product of matrices beats a grouped convolution


@dataclass(frozen=True)
class GradientSource:
    """Where a layer's weight comes from: a trained parameter, times a number."""

    weight: int  # position among the trained parameters
    factor: float


@dataclass(frozen=True, kw_only=True)
class RecordedLayer:
    """One call of a layer: what it read and what it answered."""

    weight: GradientSource | None
    bias: GradientSource | None
    seen: Tensor
    out: Tensor
    node: Any  # autograd's record of this call
    seen_node: Any  # and of what it read; None for what needs no gradient
    versions: tuple[int, int]  # of `seen` and `out`

    def is_changed(self) -> bool:
        """Whether somebody wrote into either since: then their contraction is no gradient any more."""
        return self.versions != (self.seen._version, self.out._version)

    def sources(self) -> list[GradientSource]:
        return [source for source in (self.weight, self.bias) if source is not None]

    def outer(self, slope: Tensor, photos: int) -> OuterProduct | None:
        """The gradient of the weight as one outer product per photo, where it is one."""
        return None

    def gradients(self, slope: Tensor, photos: int) -> Iterator[tuple[GradientSource, Tensor]]:
        """The gradients of weight and bias, (n, ...) each, from that of the output."""
        yield from self.bias_gradients(slope, photos)
        if self.weight is not None:
            yield self.weight, self.weight_gradient(slope, photos)

    def bias_gradients(self, slope: Tensor, photos: int) -> Iterator[tuple[GradientSource, Tensor]]:
        if self.bias is not None:
            yield self.bias, _by_photo(slope.flatten(2).sum(2) if slope.ndim > 2 else slope, photos)

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Dense(RecordedLayer):
    def outer(self, slope: Tensor, photos: int) -> OuterProduct | None:
        if self.weight is None or len(slope) != photos:
            return None
        return OuterProduct(self.weight.weight, self.weight.factor, slope, self.seen)

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        out, seen = (part.reshape(photos, -1, part.shape[1]) for part in (slope, self.seen))
        return out.transpose(1, 2) @ seen


@dataclass(frozen=True, kw_only=True)
class _Convolution(RecordedLayer):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        inputs, (outputs, *sides) = self.seen.shape[1], slope.shape[1:]
        few = math.prod(sides) <= _FEW_POSITIONS or min(inputs, outputs) <= _FEW_CHANNELS
        if not (few and len(slope) == photos) and self.kernel != (1, 1):
            gradient = self._grouped(slope, photos)
        elif outputs < inputs and self.stride == (1, 1) and self.kernel != (1, 1):
            return self._from_slopes(slope)
        else:
            read = _columns(self.seen, self.kernel, self.stride, self.padding, sides)
            gradient = _by_photo(slope.flatten(2) @ read.transpose(1, 2), photos)
        return gradient.reshape(photos, outputs, inputs, *self.kernel)

    def _from_slopes(self, slope: Tensor) -> Tensor:
        """As the columns of what was read times the slope, with the roles exchanged: less to copy for few outputs."""
        down, across = self.kernel
        outside = (down - 1 - self.padding[0], across - 1 - self.padding[1])
        given = _columns(slope, self.kernel, (1, 1), outside, self.seen.shape[2:])
        turned = given @ self.seen.flatten(2).transpose(1, 2)
        return turned.reshape(len(slope), -1, down, across, self.seen.shape[1]).flip(2, 3).movedim(4, 2)

    def _grouped(self, slope: Tensor, photos: int) -> Tensor:
        """One convolution whose groups are photos and whose batch is what belongs to one photo."""
        out, seen = (
            part.reshape(photos, -1, *part.shape[1:]).transpose(0, 1).flatten(1, 2)
            for part in (slope, self.seen)
        )
        inputs, outputs = self.seen.shape[1], slope.shape[1]
        shape = seen.new_empty(1).expand(photos * outputs, inputs, *self.kernel)
        gradients = torch.ops.aten.convolution_backward(
            out,
            seen,
            shape,
            None,
            self.stride,
            self.padding,
            (1, 1),
            False,
            (0, 0),
            photos,
            [False, True, False],
        )
        gradient: Tensor = gradients[1]
        return gradient


def _columns(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    sides: Sequence[int],
) -> Tensor:
    """What a kernel sees at each of `sides` positions, (n, c, h, w) -> (n, c * kernel, positions)."""
    down, across = padding
    x = functional.pad(x, (across, across, down, down)).contiguous()
    row, channel, line, pixel = x.stride()
    strides = (row, channel, line, pixel, line * stride[0], pixel * stride[1])
    return x.as_strided((*x.shape[:2], *kernel, *sides), strides).reshape(len(x), -1, math.prod(sides))


@dataclass(frozen=True, kw_only=True)
class _GroupNorm(RecordedLayer):
    groups: int
    eps: float

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        normal = functional.group_norm(self.seen, self.groups, None, None, self.eps)
        return _by_photo((slope * normal).flatten(2).sum(2), photos)


def _by_photo(rows: Tensor, photos: int) -> Tensor:
    """Sum what belongs to one photo, (n * k, ...) -> (n, ...)."""
    return rows if len(rows) == photos else rows.reshape(photos, -1, *rows.shape[1:]).sum(1)


class LayerRecorder(TorchFunctionMode):
    """While a loss is computed, notes the calls of layers that are understood and what they read."""

    def __init__(self, weights: Sequence[nn.Parameter], photos: int) -> None:
        super().__init__()
        self.layers: list[RecordedLayer] = []
        self._photos = photos
        self._known = {id(weight): GradientSource(position, 1.0) for position, weight in enumerate(weights)}
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets their identity

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is functional.conv2d:
            return self._convolve(*args, **named)
        if func is functional.linear:
            return self._connect(*args, **named)
        if func is functional.group_norm:
            return self._normalise(*args, **named)
        made = func(*args, **named)
        if func in _PRODUCTS and len(args) == 2 and not named:
            self._note_product(*args, made)
        return made

    def _note_product(self, one: Any, other: Any, made: Tensor) -> None:
        """A trained weight times a number is the weight of a layer at equalised learning rate."""
        weight, number = (other, one) if isinstance(one, int | float) else (one, other)
        source = self._known.get(id(weight))
        if source is not None and isinstance(number, int | float):
            self._kept.append(made)
            self._known[id(made)] = GradientSource(source.weight, source.factor * float(number))

    def _sources(self, seen: Tensor, *weights: Tensor | None) -> list[GradientSource | None] | None:
        """Where the weights of a call come from; None where that, or whose rows it reads, is not understood."""
        found: list[GradientSource | None] = []
        for weight in weights:
            learns = weight is not None and weight.requires_grad
            found.append(self._known.get(id(weight)) if learns else None)
            if learns and found[-1] is None:
                return None
        # Within a transformation of torch.func a tensor is not what it seems.
        whole = len(seen) > 0 and len(seen) % self._photos == 0 and not is_functorch_wrapped_tensor(seen)
        return found if whole and any(source is not None for source in found) else None

    def _noted(self, seen: Tensor, out: Tensor) -> dict[str, Any]:
        return {
            "seen": seen.detach(),
            "out": out,
            "node": out.grad_fn,
            "seen_node": seen.grad_fn,
            "versions": (seen._version, out._version),
        }

    def _convolve(
        self,
        seen: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> Tensor:
        plain = groups == 1 and _pair(dilation) == (1, 1) and not isinstance(padding, str) and seen.ndim == 4
        sources = self._sources(seen, weight, bias) if plain else None
        if sources is None or isinstance(padding, str):
            return functional.conv2d(seen, weight, bias, stride, padding, dilation, groups)
        out = functional.conv2d(seen, weight, bias, stride, padding)
        layer = _Convolution(
            weight=sources[0],
            bias=sources[1],
            kernel=(weight.shape[2], weight.shape[3]),
            stride=_pair(stride),
            padding=_pair(padding),
            **self._noted(seen, out),
        )
        self.layers.append(layer)
        return layer.out

    def _connect(self, seen: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sources = self._sources(seen, weight, bias) if seen.ndim == 2 else None
        if sources is None:
            return functional.linear(seen, weight, bias)
        out = functional.linear(seen, weight, bias)
        layer = _Dense(weight=sources[0], bias=sources[1], **self._noted(seen, out))
        self.layers.append(layer)
        return layer.out

    def _normalise(
        self,
        seen: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        sources = self._sources(seen, weight, bias) if seen.ndim > 2 else None
        if sources is None:
            return functional.group_norm(seen, num_groups, weight, bias, eps)
        out = functional.group_norm(seen, num_groups, weight, bias, eps)
        layer = _GroupNorm(
            weight=sources[0],
            bias=sources[1],
            groups=num_groups,
            eps=eps,
            **self._noted(seen, out),
        )
        self.layers.append(layer)
        return layer.out


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
