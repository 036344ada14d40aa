"""Sums of clipped per-unit gradients, from one ordinary forward and backward pass a microbatch where that is exact.

Called from training/private_steps.py; pure functions, which know nothing of noise, coins or prices.

Two ways to the same numbers. *Layer by layer*: one pass over the microbatch stops at the outputs of convolutions,
fully connected layers and group normalisations; each photo's own gradient of a weight is then a contraction of what
the layer read with what its output's gradient is (Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019,
arXiv:1912.06015). *Whole network*: torch.func.vmap over torch.func.grad, which knows every operation and costs more.

Which one is decided by the network at hand and never by trust: autograd's own record of the loss is searched for
ways to a trained weight that were not understood (a weight read outside its layer, an adapter, a scalar, a gradient
within the loss), and if there is one the whole network is differentiated instead. What no pass over a batch can see
is a network that mixes the photos of a batch: `private_steps.check_per_photo_gradients` refuses those before the
first step.

Norms are those of the vectors that are added, number for number, so that one unit adds at most `clip_norm` whatever
the gradient was rounded to. Ghost norms (Li et al. 2022, arXiv:2110.05679; Bu et al. 2022, arXiv:2205.10683) save the
vectors and lose that: where positions cancel, the norm that they find can be shorter than the vector. They are used
for what cannot cancel, the one outer product that a photo leaves in a fully connected layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedface.shapes import Images

# (network, photos (n, ...)) or (network, photos (n, ...), draws (n, ...)) -> one loss per photo, (n,)
PerPhotoLoss = Callable[..., Tensor]
Draw = Callable[[int], Tensor]  # how many photos -> one row of fresh draws per photo, (n, ...)
Rows = tuple[Tensor, ...]  # photos, or photos and draws

_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_FEW_POSITIONS, _FEW_CHANNELS = 64, 16  # up to here a product of matrices beats a grouped convolution


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step changes, by name, in the order of `module.parameters()`."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def clipped_unit_sum(
    module: nn.Module,
    loss: PerPhotoLoss,
    photos: Images,
    *,
    clip_norm: float,
    units: Tensor | None = None,
    draw: Draw | None = None,
    scales: Sequence[Tensor] | None = None,
    microbatch: int = 32,
) -> list[Tensor]:
    """The sum over units of their photos' summed gradients, each unit's scaled down to length `clip_norm`.

    Guarantees:
        * One unit more or less moves the sum by at most `clip_norm`, up to float32 rounding.
        * A unit with a number that is not finite adds nothing.
        * The gradients of at most `microbatch` photos, and the sum of one unit, are in memory at once.

    Args:
        module: The network; neither its weights nor its `.grad` fields change.
        loss: One loss per photo; photo i's loss must depend on photo i alone, and rows of what the network is shown
            must stand photo by photo.
        photos: Shape (n, ...), n >= 0.
        clip_norm: Longest gradient of one unit, > 0, over all weights, after scaling.
        units: Which unit each photo belongs to, (n,) int64, a unit's photos side by side; None: each its own.
        draw: Gives the loss's own draws, fresh for every microbatch, one row per photo.
        scales: Public factors of the gradient's numbers, one tensor (*weight.shape) per trained parameter.
        microbatch: How many photos are differentiated at once, >= 1; units may straddle.

    Returns:
        One tensor (*weight.shape) per trained parameter, in the order of `module.parameters()`.

    Raises:
        ValueError: A number out of bounds, units of another length, or a unit's photos not side by side.
    """
    if microbatch < 1 or not clip_norm > 0:
        raise ValueError(f"microbatch must be >= 1 and clip_norm > 0, got {microbatch} and {clip_norm}")
    alone = units is None or _count(photos, units) == len(photos)
    weights = list(trained(module).values())
    clipping = _Clipping(weights, clip_norm, scales)
    layerwise = True
    for start in range(0, len(photos), microbatch):
        part = photos[start : start + microbatch].detach()
        rows = (part,) if draw is None else (part, draw(len(part)))
        found = _layer_by_layer(module, loss, weights, rows, alone and scales is None) if layerwise else None
        layerwise = found is not None
        gradients = found or _Found(_whole_network(module, loss, rows), [])
        if alone:
            clipping.add(gradients)
        else:
            assert units is not None
            clipping.add_units(gradients.each, units[start : start + microbatch])
    clipping.end_unit()
    return clipping.totals


def _count(photos: Images, units: Tensor) -> int:
    """How many units there are; raises ValueError where their photos do not stand side by side."""
    count = len(torch.unique(units))
    if units.shape != (len(photos),) or len(torch.unique_consecutive(units)) != count:
        raise ValueError(
            f"units must name one unit for each of {len(photos)} photos, a unit's photos side by side, "
            f"got {tuple(units.shape)} with {count} units"
        )
    return count


def gradients_of_each(
    module: nn.Module, loss: PerPhotoLoss, photos: Images, *, draws: Tensor | None = None
) -> list[Tensor]:
    """The gradient of each photo's own loss, unclipped: never let one leave the device.

    Args:
        module: The network; its `.grad` fields are left alone.
        loss: As for `clipped_unit_sum`.
        photos: Shape (n, ...), n >= 1.
        draws: One row per photo, or None.

    Returns:
        One tensor (n, *weight.shape) per trained parameter.
    """
    rows = (photos.detach(),) if draws is None else (photos.detach(), draws)
    found = _layer_by_layer(module, loss, list(trained(module).values()), rows, False)
    return _whole_network(module, loss, rows) if found is None else found.each


def is_understood(
    module: nn.Module, loss: PerPhotoLoss, photos: Images, *, draws: Tensor | None = None
) -> bool:
    """Whether this network's gradients are taken layer by layer; the whole network is differentiated otherwise."""
    rows = (photos.detach(),) if draws is None else (photos.detach(), draws)
    return _layer_by_layer(module, loss, list(trained(module).values()), rows, False) is not None


@dataclass(frozen=True)
class _Outer:
    """One outer product per photo, out (n, o) times seen (n, i), kept as its two halves."""

    weight: int  # position among the trained parameters
    factor: float
    out: Tensor
    seen: Tensor


@dataclass(frozen=True)
class _Found:
    """The gradients of a microbatch: numbers of each photo, and outer products that are not multiplied out.

    `each` is (n, *weight.shape) per parameter, and has no numbers at all, (n, 0), where `outers` has them.
    """

    each: list[Tensor]
    outers: list[_Outer]


class _Clipping:
    """A running sum of clipped gradients, and the sum of the one unit that may go on in the next microbatch."""

    def __init__(self, weights: Sequence[Tensor], clip_norm: float, scales: Sequence[Tensor] | None) -> None:
        self.totals = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        self._clip_norm, self._scales = clip_norm, scales
        self._unit: int | None = None
        self._begun: list[Tensor] = []

    def add(self, found: _Found) -> None:
        """Clip every row and add it."""
        rows = self._scaled(found.each)
        square = _squares(rows)
        for outer in found.outers:
            square = square + (_square(outer.out) * _square(outer.seen)) * outer.factor**2
        length = square.sqrt()
        usable = torch.isfinite(length)
        scale = torch.where(usable, (self._clip_norm / length).clamp(max=1.0), 0.0)
        outers = [(outer, outer.out, outer.seen) for outer in found.outers]
        if not bool(usable.all()):
            # Nothing times infinity is not nothing: rows without a length are left out, not multiplied by zero.
            scale, rows = scale[usable], [row[usable] for row in rows]
            outers = [(outer, out[usable], seen[usable]) for outer, out, seen in outers]
        for total, row in zip(self.totals, rows, strict=True):
            if row.shape[1:] == total.shape:
                total += (scale[None] @ _flat(row)).view_as(total)
        for outer, out, seen in outers:
            self.totals[outer.weight] += (out * (scale * outer.factor)[:, None]).t() @ seen

    def add_units(self, each: list[Tensor], units: Tensor) -> None:
        """Sum rows unit by unit; every unit but the last is complete."""
        names, where = torch.unique_consecutive(units, return_inverse=True)
        sums = [row.new_zeros(len(names), *row.shape[1:]).index_add_(0, where, row) for row in each]
        if self._unit is not None and self._unit == int(names[0]):
            for total, begun in zip(sums, self._begun, strict=True):
                total[0] += begun
        else:
            self.end_unit()
        self.add(_Found([total[:-1] for total in sums], []))
        self._unit, self._begun = int(names[-1]), [total[-1].clone() for total in sums]

    def end_unit(self) -> None:
        """Add the unit that was begun, if one was."""
        if self._unit is not None:
            self.add(_Found([begun[None] for begun in self._begun], []))
        self._unit, self._begun = None, []

    def _scaled(self, rows: list[Tensor]) -> list[Tensor]:
        if self._scales is None:
            return rows
        return [row * scale for row, scale in zip(rows, self._scales, strict=True)]


def _square(rows: Tensor) -> Tensor:
    """The squared length of each row, (n, ...) -> (n,)."""
    length: Tensor = torch.linalg.vector_norm(_flat(rows), dim=1)
    return length.square()


def _flat(rows: Tensor) -> Tensor:
    """(n, ...) -> (n, d), for scalars too."""
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def _squares(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([_square(part) for part in parts]).sum(0)


def _whole_network(module: nn.Module, loss: PerPhotoLoss, rows: Rows) -> list[Tensor]:
    weights = {name: weight.detach() for name, weight in trained(module).items()}

    def loss_of_one(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        def network(*inputs: Tensor) -> Any:
            return functional_call(module, weights, inputs)

        losses: Tensor = loss(network, *(part.unsqueeze(0) for part in row))
        return losses.squeeze(0)

    each = vmap(grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
    gradients: dict[str, Tensor] = each(weights, *rows)
    return list(gradients.values())


def _layer_by_layer(
    module: nn.Module, loss: PerPhotoLoss, weights: list[nn.Parameter], rows: Rows, keep_outer: bool
) -> _Found | None:
    """The gradients of each photo, or None where this network is not understood."""
    photos = len(rows[0])
    watch = _Watch(weights, photos)
    with torch.enable_grad(), watch:
        losses = loss(module, *rows)
    if losses.shape != (photos,) or any(layer.is_changed() for layer in watch.layers):
        return None
    if not losses.requires_grad:
        return _Found([weight.new_zeros(photos, *weight.shape) for weight in weights], [])
    if not _only_by(watch.layers, losses, weights):
        return None
    outs = [layer.out for layer in watch.layers]
    slopes = torch.autograd.grad(losses.sum(), outs, allow_unused=True) if outs else ()
    uses = [0] * len(weights)
    for layer in watch.layers:
        for source in layer.sources():
            uses[source.weight] += 1
    found: dict[int, Tensor] = {}
    outers: list[_Outer] = []
    for layer, slope in zip(watch.layers, slopes, strict=True):
        if slope is None:
            continue
        outer = layer.outer(slope, photos) if keep_outer else None
        if outer is not None and uses[outer.weight] == 1:
            outers.append(outer)
            parts = layer.bias_gradients(slope, photos)
        else:
            parts = layer.gradients(slope, photos)
        for source, part in parts:
            part = part if source.factor == 1.0 else part * source.factor
            found[source.weight] = found[source.weight] + part if source.weight in found else part
    kept = {outer.weight for outer in outers}
    each = [
        found[i].reshape(photos, *weight.shape)
        if i in found
        else weight.new_zeros(photos, *((0,) if i in kept else weight.shape))
        for i, weight in enumerate(weights)
    ]
    return _Found(each, outers)


def _only_by(layers: Sequence[_Layer], losses: Tensor, weights: Sequence[nn.Parameter]) -> bool:
    """Whether every way from the losses to a trained weight ends at one of these layers, as its weight or bias.

    Reads autograd's own record, in which nothing can hide: not a weight read outside its layer, nor an adapter, nor a
    loss that differentiates the network, whose record leads to the weights by the second derivative of a layer.
    """
    learning = {id(weight) for weight in weights}
    entered = {layer.node: layer.seen_node for layer in layers}
    reached, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if id(getattr(node, "variable", None)) in learning:
            return False
        following = [edge for edge, _ in node.next_functions]
        if node in entered:
            seen = entered[node]
            if seen is not None and seen not in following:
                return False
            following = [seen]
        waiting.extend(following)
    return True


@dataclass(frozen=True)
class _Source:
    """Where a layer's weight comes from: a trained parameter, times a number."""

    weight: int  # position among the trained parameters
    factor: float


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One call of a layer: what it read and what it answered."""

    weight: _Source | None
    bias: _Source | None
    seen: Tensor
    out: Tensor
    node: Any  # autograd's record of this call
    seen_node: Any  # and of what it read; None for what needs no gradient
    versions: tuple[int, int]  # of `seen` and `out`

    def is_changed(self) -> bool:
        """Whether somebody wrote into either since: then their contraction is no gradient any more."""
        return self.versions != (self.seen._version, self.out._version)

    def sources(self) -> list[_Source]:
        return [source for source in (self.weight, self.bias) if source is not None]

    def outer(self, slope: Tensor, photos: int) -> _Outer | None:
        """The gradient of the weight as one outer product per photo, where it is one."""
        return None

    def gradients(self, slope: Tensor, photos: int) -> Iterator[tuple[_Source, Tensor]]:
        """The gradients of weight and bias, (n, ...) each, from that of the output."""
        yield from self.bias_gradients(slope, photos)
        if self.weight is not None:
            yield self.weight, self.weight_gradient(slope, photos)

    def bias_gradients(self, slope: Tensor, photos: int) -> Iterator[tuple[_Source, Tensor]]:
        if self.bias is not None:
            yield self.bias, _by_photo(slope.flatten(2).sum(2) if slope.ndim > 2 else slope, photos)

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Dense(_Layer):
    def outer(self, slope: Tensor, photos: int) -> _Outer | None:
        if self.weight is None or len(slope) != photos:
            return None
        return _Outer(self.weight.weight, self.weight.factor, slope, self.seen)

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        out, seen = (part.reshape(photos, -1, part.shape[1]) for part in (slope, self.seen))
        return out.transpose(1, 2) @ seen


@dataclass(frozen=True, kw_only=True)
class _Convolution(_Layer):
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
class _GroupNorm(_Layer):
    groups: int
    eps: float

    def weight_gradient(self, slope: Tensor, photos: int) -> Tensor:
        normal = functional.group_norm(self.seen, self.groups, None, None, self.eps)
        return _by_photo((slope * normal).flatten(2).sum(2), photos)


def _by_photo(rows: Tensor, photos: int) -> Tensor:
    """Sum what belongs to one photo, (n * k, ...) -> (n, ...)."""
    return rows if len(rows) == photos else rows.reshape(photos, -1, *rows.shape[1:]).sum(1)


class _Watch(TorchFunctionMode):
    """While a loss is computed, notes the calls of layers that are understood and what they read."""

    def __init__(self, weights: Sequence[nn.Parameter], photos: int) -> None:
        super().__init__()
        self.layers: list[_Layer] = []
        self._photos = photos
        self._known = {id(weight): _Source(position, 1.0) for position, weight in enumerate(weights)}
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
            self._known[id(made)] = _Source(source.weight, source.factor * float(number))

    def _sources(self, seen: Tensor, *weights: Tensor | None) -> list[_Source | None] | None:
        """Where the weights of a call come from; None where that, or whose rows it reads, is not understood."""
        found: list[_Source | None] = []
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
