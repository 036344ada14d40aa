"""A StyleGAN2 whose weights are constants, prepared once so that searching its inputs is fast.

Called from upsampling/ and audits/, wherever styles or noise maps move and weights do not. What is prepared:
equalised gains are folded into the weights, the energies of demodulation are summed once, weights lie
channels-last and, where the machine multiplies bfloat16 in hardware, are rounded to it. What is saved in a step:
no gradient of a weight is ever computed, and each layer is one convolution and three or four passes over its
activations in either direction; docs/speed.md has the measurements behind each choice.

Sources: Karras et al. 2020 (arXiv:1912.04958), section 2.2, for modulation; the rest is the chain rule. Two
identities spare passes. Leaky ReLU is homogeneous, so that the gradient times a layer's output equals the
gradient times its input, sum by sum. And a layer's input is its noise and bias plus demodulation times a
convolution, so that the gradient of the demodulation needs sums over pixels only, not the convolution again.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedface.models.layers import (
    LRELU_GAIN,
    LRELU_SLOPE,
    blur,
    bounded,
    upsample,
)
from fedface.models.stylegan2 import Block, StyledConv, StyleGAN2, ToRGB
from fedface.shapes import Images, Latents, Styles

Precision = Literal["float32", "bfloat16"]

# On a CPU, activations of one layer beyond this leave the caches, and the allocator asks the system for new pages
# at every call: larger batches are then cut, which costs nothing because the weights of such layers are small.
BYTES_AT_ONCE = 8 * 2**20


def fast_precision(device: torch.device) -> Precision:
    """bfloat16 where this device multiplies matrices in it, float32 elsewhere.

    A fact about the hardware, not a measurement, so that two runs on one machine choose alike.
    """
    match device.type:
        case "cuda":
            known = torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu" if hasattr(torch.cpu, "get_capabilities"):
            capabilities = torch.cpu.get_capabilities()
            known = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
        case _:
            known = False
    return "bfloat16" if known else "float32"


def frozen(
    generator: StyleGAN2,
    *,
    precision: Precision | Literal["auto"] = "float32",
    device: torch.device | None = None,
) -> FrozenStyleGAN2:
    """Prepare a generator for many syntheses with gradients of styles and noise.

    Guarantees:
        * Later changes of the generator do not reach the result, and it is never changed.
        * In float32, images and gradients equal those of the generator up to rounding (1e-4 relative).
        * Gradients are of first order.

    Args:
        generator: Any StyleGAN2; classes and a fitted prior come along.
        precision: Of activations and weights of the convolutions. Styles, demodulation and the sum of colours
            are float32 always. "auto" asks `fast_precision`.
        device: Where the weights lie; None leaves them where they are.
    """
    place = generator.mapping.w_avg.device if device is None else device
    chosen = fast_precision(place) if precision == "auto" else precision
    match chosen:
        case "float32":
            low = torch.float32
        case "bfloat16":
            low = torch.bfloat16
        case _:
            assert_never(chosen)
    with torch.no_grad():
        copied = copy.deepcopy(generator).requires_grad_(False).eval().to(place)
        blocks = tuple(
            _block(cast(Block, copied.synthesis.get_submodule(f"b{side}")), low)
            for side in copied.config.sides
        )
    del copied.synthesis  # its weights are in the blocks
    return FrozenStyleGAN2(copied, blocks, chosen, place)


@dataclass(frozen=True)
class _Affine:
    """Style -> the scales of one layer's input channels."""

    weight: Tensor  # (v, i)
    bias: Tensor  # (i,)

    def __call__(self, style: Tensor) -> Tensor:
        return torch.addmm(self.bias, style, self.weight)


@dataclass(frozen=True)
class _Conv:
    """One styled convolution, its gain folded in: lrelu(gain z) = gain lrelu(z) for gain > 0."""

    affine: _Affine
    weight: Tensor  # low; (o, i, 3, 3), or (i, o, 3, 3) when it doubles the sides
    energy: Tensor  # float32 (i, o), squares summed over the kernel
    bias: Tensor  # float32 (o,), times gain
    noise: Tensor  # float32 (1, 1, side, side), times strength and gain
    strength: float  # of noise, times gain
    gain: float
    clamp: float | None  # of the output
    blur: Tensor | None  # low (o, 1, 4, 4) when it doubles the sides

    @property
    def outputs(self) -> int:
        return self.bias.shape[0]


@dataclass(frozen=True)
class _Colours:
    """The 1 x 1 convolution to three colours."""

    affine: _Affine
    weight: Tensor  # float32 (3, i)
    bias: Tensor  # float32 (3,)
    clamp: float | None


@dataclass(frozen=True)
class _Block:
    """The layers of one side."""

    side: int
    const: Tensor | None  # low (1, c, 4, 4) in the first block
    convs: tuple[_Conv, ...]
    colours: _Colours | None
    shortcut: Tensor | None  # low (o, i, 1, 1) in the resnet form
    kernel: Tensor  # low (4, 4)

    def image_bytes(self) -> int:
        """Of one layer's activations, for one image."""
        conv = self.convs[-1]
        return self.side**2 * conv.outputs * conv.weight.element_size()


def _affine(layer: Any, gain: float = 1.0) -> _Affine:
    weight = layer.weight * (layer.weight_gain * gain)
    return _Affine(weight.t().contiguous(), layer.bias * (layer.bias_gain * gain))


def _conv(layer: StyledConv, gain: float, low: torch.dtype) -> _Conv:
    weight = layer.weight.transpose(0, 1) if layer.up == 2 else layer.weight
    kernel = layer.filter * 4.0 if layer.up == 2 else None
    strength = float(layer.noise_strength) * gain
    return _Conv(
        affine=_affine(layer.affine),
        weight=weight.to(low).contiguous(memory_format=torch.channels_last),
        energy=layer.weight.square().sum(dim=(2, 3)).t().contiguous(),
        bias=layer.bias * gain,
        noise=layer.noise_const[None, None] * strength,
        strength=strength,
        gain=gain,
        clamp=None if layer.clamp is None else layer.clamp * gain / LRELU_GAIN,
        blur=None if kernel is None else kernel.to(low).expand(layer.bias.shape[0], 1, 4, 4),
    )


def _colours(layer: ToRGB) -> _Colours:
    return _Colours(_affine(layer.affine, layer.gain), layer.weight[:, :, 0, 0], layer.bias, layer.clamp)


def _block(block: Block, low: torch.dtype) -> _Block:
    half = math.sqrt(0.5) if block.shortcut else 1.0
    convs = [] if block.first else [_conv(block.conv0, LRELU_GAIN, low)]
    return _Block(
        side=block.conv1.side,
        const=block.const[None].to(low) if block.first else None,
        convs=(*convs, _conv(block.conv1, LRELU_GAIN * half, low)),
        colours=_colours(block.torgb) if block.colours else None,
        shortcut=(block.skip.weight * (block.skip.gain * half)).to(low) if block.shortcut else None,
        kernel=block.filter.to(low),
    )


def _rows(x: Tensor) -> Tensor:
    """(n, c, h, w) channels-last -> (n, h w, c) without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pixels(rows: Tensor, like: Tensor) -> Tensor:
    """(n, h w, c) -> (n, c, h, w) channels-last, with the sides of `like`."""
    return rows.view(rows.shape[0], like.shape[2], like.shape[3], rows.shape[2]).permute(0, 3, 1, 2)


def _folds(conv: _Conv, x: Tensor) -> bool:
    """Whether scaling the weights by the demodulation is less work than scaling the output."""
    return x.shape[0] == 1 and (conv.blur is not None or conv.weight.shape[1] * 9 < x.shape[2] * x.shape[3])


def _run_conv(conv: _Conv, x: Tensor, style: Tensor, demod: Tensor, plane: Tensor | None) -> Tensor:
    """lrelu(demod * conv(x * style) + plane + bias), with `demod` (n, o) holding the gain."""
    low = x.dtype
    x = x * style.to(low)[:, :, None, None]
    scale, bias = demod.to(low)[:, :, None, None], conv.bias.to(low)
    if conv.blur is not None:
        x = functional.conv_transpose2d(x, conv.weight, stride=2)
    padding, groups = 1, 1 if conv.blur is None else conv.outputs
    kernel = conv.weight if conv.blur is None else conv.blur
    if _folds(conv, x):
        x = functional.conv2d(x, kernel * scale[0, :, None], bias, padding=padding, groups=groups)
    else:
        x = functional.conv2d(x, kernel, padding=padding, groups=groups)
        x = x.mul_(scale).add_(bias[:, None, None])
    if plane is not None:
        x = x.add_(plane.to(low))
    x = functional.leaky_relu_(x, LRELU_SLOPE)
    return x if conv.clamp is None else x.clamp_(-conv.clamp, conv.clamp)


@dataclass
class _ConvGradients:
    """Of the inputs of `_run_conv`."""

    x: Tensor
    style: Tensor
    demod: Tensor
    plane: Tensor | None


def _unrun_conv(
    conv: _Conv, x: Tensor, out: Tensor, gradient: Tensor, inputs: Sequence[Any], *, of_plane: bool
) -> _ConvGradients:
    """The gradients of one layer from that of its output; `inputs` are style, demodulation and plane."""
    (style, demod, plane), low = inputs, x.dtype
    if conv.clamp is not None:
        gradient = gradient * (out.abs() < conv.clamp)
    # Leaky ReLU is homogeneous: gradient * out = gradient' * (demod * y + plane + bias) at each pixel.
    total = (gradient * out).sum(dim=(2, 3), dtype=torch.float32)
    gradient = torch.ops.aten.leaky_relu_backward(gradient, out, LRELU_SLOPE, True)
    total = total - conv.bias * gradient.sum(dim=(2, 3), dtype=torch.float32)
    if plane is not None:
        noise = plane.to(low).flatten(2).expand(x.shape[0], -1, -1)
        total = total - torch.bmm(noise, _rows(gradient))[:, 0].float()
    found = gradient.sum(dim=1, keepdim=True, dtype=torch.float32) if of_plane else None
    if plane is not None and found is not None and plane.shape[0] != found.shape[0]:
        found = found.sum(dim=0, keepdim=True)
    scale = demod.to(low)[:, :, None, None]
    kernel = conv.weight if conv.blur is None else conv.blur
    if _folds(conv, out):
        kernel = kernel * scale[0, :, None]
    else:
        gradient = gradient.mul_(scale)
    if conv.blur is not None:
        # The filter is symmetric: its adjoint is itself, over a border of 2.
        gradient = functional.conv2d(gradient, kernel, padding=2, groups=conv.outputs)
        gradient = functional.conv2d(gradient, conv.weight, stride=2)
    else:
        gradient = functional.conv_transpose2d(gradient, kernel, padding=1)
    of_style = (gradient * x).sum(dim=(2, 3), dtype=torch.float32)
    return _ConvGradients(gradient.mul_(style.to(low)[:, :, None, None]), of_style, total / demod, found)


def _colour_weight(colours: _Colours, style: Tensor) -> Tensor:
    """One weight per image, float32 (n, 3, i)."""
    return colours.weight * style[:, None]


def _run_colours(colours: _Colours, x: Tensor, style: Tensor) -> Tensor:
    """x (n, i, h, w), style (n, i) -> colours before their clamp, float32 (n, 3, h, w), channels-last."""
    weight = _colour_weight(colours, style).to(x.dtype)
    rgb = torch.bmm(_rows(x), weight.transpose(1, 2)).float() + colours.bias
    return _pixels(rgb, x)


def _unrun_colours(
    colours: _Colours, x: Tensor, style: Tensor, of_picture: Tensor, of_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the activations, those of later blocks added, and of the style."""
    if colours.clamp is not None:
        of_picture = of_picture * (_run_colours(colours, x, style).abs() < colours.clamp)
    given = _rows(of_picture).to(x.dtype)
    of_style = (torch.bmm(given.transpose(1, 2), _rows(x)).float() * colours.weight).sum(dim=1)
    weight = _colour_weight(colours, style).to(x.dtype)
    rows = torch.bmm(given, weight) if of_x is None else torch.baddbmm(_rows(of_x), given, weight)
    return _pixels(rows, x), of_style


class _Blocks(torch.autograd.Function):
    """Some blocks in a row: activations and colours so far in, activations and colours out.

    `inputs` holds, block by block, the style, the demodulation and the noise plane (or None) of each convolution
    and then the style of the colours, if the block makes any. All are float32; activations are not.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: tuple[_Block, ...], x: Tensor | None, picture: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        given, kept, coloured = iter(inputs), [], []  # type: Iterator[Any], list[Tensor], list[bool]
        keep = any(ctx.needs_input_grad)
        for block in blocks:
            if block.const is not None:
                count = cast(Tensor, inputs[0]).shape[0]
                x = block.const.expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
            before = x = cast(Tensor, x)
            made = [x]
            for conv in block.convs:
                x = _run_conv(conv, x, next(given), next(given), next(given))
                made.append(x)
            if block.shortcut is not None:
                x = upsample(functional.conv2d(before, block.shortcut), block.kernel) + x
                made.append(x)
            coloured.append(picture is not None)
            if picture is not None:
                picture = upsample(picture, block.kernel.float())
            if block.colours is not None:
                rgb = bounded(_run_colours(block.colours, x, next(given)), 1.0, block.colours.clamp)
                picture = rgb if picture is None else picture.add_(rgb)
            if keep:
                kept.extend(made)
        ctx.blocks, ctx.coloured, ctx.kept = blocks, coloured, len(kept)
        ctx.save_for_backward(*kept, *inputs)
        return x, picture

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_picture = (_channels_last(gradient) for gradient in gradients)
        saved: Sequence[Any] = ctx.saved_tensors
        kept, inputs = list(saved[: ctx.kept]), saved[ctx.kept :]
        found: list[Tensor | None] = [None] * len(inputs)
        at = len(inputs)
        for block, coloured in zip(reversed(ctx.blocks), reversed(ctx.coloured), strict=True):
            if block.colours is not None:
                at -= 1
                if of_picture is not None:
                    of_x, found[at] = _unrun_colours(block.colours, kept[-1], inputs[at], of_picture, of_x)
            if of_picture is not None:
                kernel = block.kernel.float()
                of_picture = blur(of_picture, kernel, 1, gain=4.0, stride=2) if coloured else None
            around = None
            if block.shortcut is not None:
                kept.pop()
                around = blur(cast(Tensor, of_x), block.kernel, 1, gain=4.0, stride=2)
                around = functional.conv_transpose2d(around, block.shortcut)
            for conv in reversed(block.convs):
                at -= 3
                out = kept.pop()
                made = _unrun_conv(
                    conv,
                    kept[-1],
                    out,
                    cast(Tensor, of_x),
                    inputs[at : at + 3],
                    of_plane=ctx.needs_input_grad[at + 5],
                )
                of_x, found[at], found[at + 1], found[at + 2] = made.x, made.style, made.demod, made.plane
            kept.pop()
            if around is not None:
                of_x = cast(Tensor, of_x) + around
        first = ctx.needs_input_grad[1]
        return None, of_x if first else None, of_picture, *found


def _channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


class FrozenStyleGAN2:
    """A generator of constants; make one with `frozen`.

    Styles and noise maps may lie on any device: they are brought to the weights, and images come back to where
    the styles were.
    """

    def __init__(
        self, mapping: StyleGAN2, blocks: tuple[_Block, ...], precision: Precision, device: torch.device
    ) -> None:
        self._mapping = mapping
        self._blocks = blocks
        self.precision = precision
        self.device = device
        self.config = mapping.config

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.config.size

    @property
    def latent_width(self) -> int:
        """Width of a latent."""
        return self.config.latent_width

    @property
    def style_inputs(self) -> int:
        """2 * log2(size) - 2."""
        return self._mapping.style_inputs

    @property
    def noise_sides(self) -> tuple[int, ...]:
        """4, 8, 8, 16, 16, ..., one per styled convolution."""
        return self._mapping.noise_sides

    @property
    def style_slope(self) -> float:
        """As the generator's."""
        return self._mapping.style_slope

    def map(self, latents: Latents, labels: Tensor | None = None) -> Styles:
        """As the generator's: latents (n, z) -> styles (n, k, v), in float32."""
        labels = None if labels is None else labels.to(self.device)
        return self._mapping.map(latents.to(self.device), labels).to(latents.device)

    def truncate(self, styles: Styles, psi: float, cutoff: int | None = None) -> Styles:
        """As the generator's: psi = 1 leaves styles, psi = 0 gives their mean."""
        return self._mapping.truncate(styles.to(self.device), psi, cutoff).to(styles.device)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, k, v) -> images (n, 3, size, size), nominally in [0, 1], not clamped.

        Args:
            styles: One style per input.
            noise: One map (n or 1, 1, side, side) per entry of `noise_sides`; None takes the fixed maps.

        Raises:
            ValueError: There are more or fewer styles or maps than the network has inputs for.
        """
        if styles.shape[1] != self.style_inputs:
            raise ValueError(f"styles must have shape (n, {self.style_inputs}, v), got {tuple(styles.shape)}")
        if noise is not None and len(noise) != len(self.noise_sides):
            raise ValueError(f"noise must be {len(self.noise_sides)} maps, got {len(noise)}")
        count = styles.shape[0]
        inputs = list(self._inputs(styles.to(self.device), noise))
        whole = sum(count * block.image_bytes() <= self._at_once() for block in self._blocks)
        x = picture = None
        if whole:
            x, picture = _run(self._blocks[:whole], inputs[:whole], None, None)
        if rest := self._blocks[whole:]:
            cut = max(1, self._at_once() // max(block.image_bytes() for block in rest))
            parts = []
            for start in range(0, count, cut):
                part = slice(start, min(start + cut, count))
                own = [[_part(tensor, part, count) for tensor in block] for block in inputs[whole:]]
                parts.append(_run(rest, own, _part(x, part, count), _part(picture, part, count))[1])
            picture = torch.cat([cast(Tensor, part) for part in parts])
        return ((cast(Tensor, picture) + 1.0) / 2.0).contiguous().to(styles.device)

    def _at_once(self) -> int:
        return BYTES_AT_ONCE if self.device.type == "cpu" else sys.maxsize

    def _inputs(self, styles: Styles, noise: Sequence[Tensor] | None) -> Iterator[list[Tensor | None]]:
        """Per block, what `_Blocks` takes; small, float32, and left to autograd."""
        used = 0
        for block in self._blocks:
            given: list[Tensor | None] = []
            for conv in block.convs:
                style = conv.affine(styles[:, used])
                demod = torch.rsqrt(style.square() @ conv.energy + 1e-8) * conv.gain
                plane = conv.noise if noise is None else noise[used].to(self.device)
                moves = noise is not None and plane.requires_grad
                if noise is not None:
                    plane = plane * conv.strength
                given += [style, demod, plane if conv.strength or moves else None]
                used += 1
            if block.colours is not None:
                # The colours share their style with the next block's first convolution.
                given.append(block.colours.affine(styles[:, used]))
            yield given


def _run(
    blocks: tuple[_Block, ...],
    inputs: Sequence[list[Tensor | None]],
    x: Tensor | None,
    picture: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    flat = [tensor for block in inputs for tensor in block]
    return cast(Any, _Blocks).apply(blocks, x, picture, *flat)  # type: ignore[no-any-return]


def _part(tensor: Tensor | None, part: slice, count: int) -> Any:
    """Some images of a batch; what all share stays whole."""
    return tensor if tensor is None or tensor.shape[0] != count else tensor[part]
