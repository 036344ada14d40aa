"""Records which layers a loss calls and what they read, and gives each photo's gradient of their weights.

While a loss is computed, `LayerRecorder` records the calls of convolutions, fully connected layers and group
normalisations with a trained weight; whatever else reaches a weight shows in autograd's record, not here. A photo's
own gradient of a layer's weight is a contraction of the layer's input with its output's gradient (Goodfellow 2015,
arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
    """One call of a layer: its input and its output."""

    weight: GradientSource | None
    bias: GradientSource | None
    inputs: Tensor
    out: Tensor
    node: Any  # autograd's node of this call
    input_node: Any  # and of its input; None where that needs no gradient
    versions: tuple[int, int]  # of `inputs` and `out`

    def is_changed(self) -> bool:
        """Whether either was written into since: then their contraction is not the gradient."""
        return self.versions != (self.inputs._version, self.out._version)

    def sources(self) -> list[GradientSource]:
        return [source for source in (self.weight, self.bias) if source is not None]

    def outer(self, output_gradient: Tensor, photos: int) -> OuterProduct | None:
        """The gradient of the weight as one outer product per photo, where it is one."""
        return None

    def gradients(self, output_gradient: Tensor, photos: int) -> Iterator[tuple[GradientSource, Tensor]]:
        """The gradients of weight and bias, (n, ...) each, from that of the output."""
        yield from self.bias_gradients(output_gradient, photos)
        if self.weight is not None:
            yield self.weight, self.weight_gradient(output_gradient, photos)

    def bias_gradients(self, output_gradient: Tensor, photos: int) -> Iterator[tuple[GradientSource, Tensor]]:
        if self.bias is not None:
            summed = output_gradient.flatten(2).sum(2) if output_gradient.ndim > 2 else output_gradient
            yield self.bias, _by_photo(summed, photos)

    def weight_gradient(self, output_gradient: Tensor, photos: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Dense(RecordedLayer):
    def outer(self, output_gradient: Tensor, photos: int) -> OuterProduct | None:
        if self.weight is None or len(output_gradient) != photos:
            return None
        return OuterProduct(self.weight.weight, self.weight.factor, output_gradient, self.inputs)

    def weight_gradient(self, output_gradient: Tensor, photos: int) -> Tensor:
        out, inputs = (part.reshape(photos, -1, part.shape[1]) for part in (output_gradient, self.inputs))
        return out.transpose(1, 2) @ inputs


@dataclass(frozen=True, kw_only=True)
class _Convolution(RecordedLayer):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def weight_gradient(self, output_gradient: Tensor, photos: int) -> Tensor:
        channels, (outputs, *sides) = self.inputs.shape[1], output_gradient.shape[1:]
        few = math.prod(sides) <= _FEW_POSITIONS or min(channels, outputs) <= _FEW_CHANNELS
        if not (few and len(output_gradient) == photos) and self.kernel != (1, 1):
            gradient = self._grouped(output_gradient, photos)
        elif outputs < channels and self.stride == (1, 1) and self.kernel != (1, 1):
            return self._from_output_gradients(output_gradient)
        else:
            columns = _columns(self.inputs, self.kernel, self.stride, self.padding, sides)
            gradient = _by_photo(output_gradient.flatten(2) @ columns.transpose(1, 2), photos)
        return gradient.reshape(photos, outputs, channels, *self.kernel)

    def _from_output_gradients(self, output_gradient: Tensor) -> Tensor:
        """With the roles of input and output gradient exchanged: less to copy for few outputs."""
        down, across = self.kernel
        outside = (down - 1 - self.padding[0], across - 1 - self.padding[1])
        columns = _columns(output_gradient, self.kernel, (1, 1), outside, self.inputs.shape[2:])
        product = columns @ self.inputs.flatten(2).transpose(1, 2)
        return (
            product.reshape(len(output_gradient), -1, down, across, self.inputs.shape[1])
            .flip(2, 3)
            .movedim(4, 2)
        )

    def _grouped(self, output_gradient: Tensor, photos: int) -> Tensor:
        """One convolution whose groups are photos and whose batch is what belongs to one photo."""
        out, inputs = (
            part.reshape(photos, -1, *part.shape[1:]).transpose(0, 1).flatten(1, 2)
            for part in (output_gradient, self.inputs)
        )
        channels, outputs = self.inputs.shape[1], output_gradient.shape[1]
        shape = inputs.new_empty(1).expand(photos * outputs, channels, *self.kernel)
        geometry = (self.stride, self.padding, (1, 1), False, (0, 0))
        _, gradient, _ = torch.ops.aten.convolution_backward(
            out, inputs, shape, None, *geometry, photos, [False, True, False]
        )
        return cast(Tensor, gradient)


def _columns(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    sides: Sequence[int],
) -> Tensor:
    """The receptive field at each of `sides` positions, (n, c, h, w) -> (n, c * kernel, positions)."""
    down, across = padding
    x = functional.pad(x, (across, across, down, down)).contiguous()
    row, channel, line, pixel = x.stride()
    strides = (row, channel, line, pixel, line * stride[0], pixel * stride[1])
    return x.as_strided((*x.shape[:2], *kernel, *sides), strides).reshape(len(x), -1, math.prod(sides))


@dataclass(frozen=True, kw_only=True)
class _GroupNorm(RecordedLayer):
    groups: int
    eps: float

    def weight_gradient(self, output_gradient: Tensor, photos: int) -> Tensor:
        normal = functional.group_norm(self.inputs, self.groups, None, None, self.eps)
        return _by_photo((output_gradient * normal).flatten(2).sum(2), photos)


def _by_photo(rows: Tensor, photos: int) -> Tensor:
    """Sum what belongs to one photo, (n * k, ...) -> (n, ...)."""
    return rows if len(rows) == photos else rows.reshape(photos, -1, *rows.shape[1:]).sum(1)


class LayerRecorder(TorchFunctionMode):
    """While a loss is computed, records the calls of supported layers and their inputs."""

    def __init__(self, weights: Sequence[nn.Parameter], photos: int) -> None:
        super().__init__()
        self.layers: list[RecordedLayer] = []
        self._photos = photos
        self._sources_of = {
            id(weight): GradientSource(position, 1.0) for position, weight in enumerate(weights)
        }
        self._alive: list[Tensor] = []  # so that no other tensor gets their identity

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.conv2d:
            return self._convolve(*args, **kwargs)
        if func is functional.linear:
            return self._connect(*args, **kwargs)
        if func is functional.group_norm:
            return self._normalise(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            self._note_product(*args, result)
        return result

    def _note_product(self, one: Any, other: Any, product: Tensor) -> None:
        """A trained weight times a number is the weight of a layer at equalised learning rate."""
        weight, number = (other, one) if isinstance(one, int | float) else (one, other)
        source = self._sources_of.get(id(weight))
        if source is not None and isinstance(number, int | float):
            self._alive.append(product)
            self._sources_of[id(product)] = GradientSource(source.weight, source.factor * float(number))

    def _sources(self, inputs: Tensor, *weights: Tensor | None) -> list[GradientSource | None] | None:
        """Where the weights of a call come from; None where that, or whose rows it reads, is not known."""
        sources: list[GradientSource | None] = []
        for weight in weights:
            trained = weight is not None and weight.requires_grad
            sources.append(self._sources_of.get(id(weight)) if trained else None)
            if trained and sources[-1] is None:
                return None
        # Within a transformation of torch.func a tensor is a wrapper.
        whole = (
            len(inputs) > 0 and len(inputs) % self._photos == 0 and not is_functorch_wrapped_tensor(inputs)
        )
        return sources if whole and any(source is not None for source in sources) else None

    def _record(
        self,
        kind: type[RecordedLayer],
        sources: list[GradientSource | None],
        inputs: Tensor,
        out: Tensor,
        **options: Any,
    ) -> Tensor:
        """Record a call of a layer; returns its output."""
        weight, bias = sources
        self.layers.append(
            kind(
                weight=weight,
                bias=bias,
                inputs=inputs.detach(),
                out=out,
                node=out.grad_fn,
                input_node=inputs.grad_fn,
                versions=(inputs._version, out._version),
                **options,
            )
        )
        return out

    def _convolve(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> Tensor:
        plain = (
            groups == 1 and _pair(dilation) == (1, 1) and not isinstance(padding, str) and inputs.ndim == 4
        )
        sources = self._sources(inputs, weight, bias) if plain else None
        if sources is None or isinstance(padding, str):
            return functional.conv2d(inputs, weight, bias, stride, padding, dilation, groups)
        out = functional.conv2d(inputs, weight, bias, stride, padding)
        kernel = (weight.shape[2], weight.shape[3])
        shape = {"kernel": kernel, "stride": _pair(stride), "padding": _pair(padding)}
        return self._record(_Convolution, sources, inputs, out, **shape)

    def _connect(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sources = self._sources(inputs, weight, bias) if inputs.ndim == 2 else None
        out = functional.linear(inputs, weight, bias)
        return out if sources is None else self._record(_Dense, sources, inputs, out)

    def _normalise(
        self,
        inputs: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        sources = self._sources(inputs, weight, bias) if inputs.ndim > 2 else None
        out = functional.group_norm(inputs, num_groups, weight, bias, eps)
        if sources is None:
            return out
        return self._record(_GroupNorm, sources, inputs, out, groups=num_groups, eps=eps)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
