"""The layers of a StyleGAN2 with constant weights, and their chain rule written out; used by `fast_stylegan2`.

Each layer is one convolution and three or four passes over its activations in either direction, and no gradient of a
weight is ever computed. Two identities save passes. Leaky ReLU is homogeneous, so that the gradient times a layer's
output equals, pixel by pixel, the gradient times the input of its leaky ReLU. And that input is noise and bias plus
demodulation times a convolution, so that the gradient of the demodulation needs sums over pixels only, and the
convolution's result need not be stored.

Source: Karras et al. 2020 (arXiv:1912.04958), section 2.2, for modulation; the rest is the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedface.models.stylegan2 import Block, StyledConv, ToRGB
from fedface.models.stylegan_layers import LRELU_GAIN, LRELU_SLOPE, Linear, blur, bounded, upsample


@dataclass(frozen=True)
class FrozenAffine:
    """Style -> the scales of one layer's input channels."""

    weight: Tensor  # (v, i)
    bias: Tensor  # (i,)

    def __call__(self, style: Tensor) -> Tensor:
        return torch.addmm(self.bias, style, self.weight)


@dataclass(frozen=True)
class FrozenConv:
    """One styled convolution, its gain folded in: lrelu(gain z) = gain lrelu(z) for gain > 0."""

    affine: FrozenAffine
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
class FrozenToRGB:
    """The 1 x 1 convolution to RGB."""

    affine: FrozenAffine
    weight: Tensor  # float32 (3, i)
    bias: Tensor  # float32 (3,)
    clamp: float | None


@dataclass(frozen=True)
class FrozenBlock:
    """The layers of one side."""

    side: int
    const: Tensor | None  # low (1, c, 4, 4) in the first block
    convs: tuple[FrozenConv, ...]
    colours: FrozenToRGB | None
    shortcut: Tensor | None  # low (o, i, 1, 1) in the resnet form
    kernel: Tensor  # low (4, 4)

    @property
    def dtype(self) -> torch.dtype:
        """Of its activations."""
        return self.kernel.dtype

    def image_bytes(self) -> int:
        """Of one layer's activations, for one image."""
        conv = self.convs[-1]
        return self.side**2 * conv.outputs * conv.weight.element_size()


def _affine(layer: Linear, gain: float = 1.0) -> FrozenAffine:
    weight = layer.weight * (layer.weight_gain * gain)
    return FrozenAffine(weight.t().contiguous(), layer.bias * (layer.bias_gain * gain))


def _conv(layer: StyledConv, gain: float, low: torch.dtype) -> FrozenConv:
    weight = layer.weight.transpose(0, 1) if layer.up == 2 else layer.weight
    kernel = layer.filter * 4.0 if layer.up == 2 else None
    strength = float(layer.noise_strength) * gain
    return FrozenConv(
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


def _colours(layer: ToRGB) -> FrozenToRGB:
    return FrozenToRGB(_affine(layer.affine, layer.gain), layer.weight[:, :, 0, 0], layer.bias, layer.clamp)


def freeze_block(block: Block, low: torch.dtype) -> FrozenBlock:
    """Prepare the layers of one side; `low` is the type of its activations and weights."""
    half = math.sqrt(0.5) if block.shortcut else 1.0
    convs = [] if block.first else [_conv(block.conv0, LRELU_GAIN, low)]
    return FrozenBlock(
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


def _folds(conv: FrozenConv, x: Tensor) -> bool:
    """Whether scaling the weights by the demodulation is less work than scaling the output."""
    return x.shape[0] == 1 and (conv.blur is not None or conv.weight.shape[1] * 9 < x.shape[2] * x.shape[3])


def _run_conv(conv: FrozenConv, x: Tensor, style: Tensor, demod: Tensor, plane: Tensor | None) -> Tensor:
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
class ConvGradients:
    """Of the inputs of `_run_conv`."""

    x: Tensor
    style: Tensor
    demod: Tensor
    plane: Tensor | None


def _conv_backward(
    conv: FrozenConv, x: Tensor, out: Tensor, gradient: Tensor, inputs: Sequence[Any], *, of_plane: bool
) -> ConvGradients:
    """The gradients of one layer from that of its output; `inputs` are style, demodulation and plane."""
    (style, demod, plane), low = inputs, x.dtype
    if conv.clamp is not None:
        gradient = gradient * (out.abs() < conv.clamp)
    # Leaky ReLU is homogeneous: gradient * out = gradient' * (demod * y + plane + bias) at each pixel.
    total = (gradient * out).sum(dim=(2, 3)).float()
    gradient = torch.ops.aten.leaky_relu_backward(gradient, out, LRELU_SLOPE, True)
    total = total - conv.bias * gradient.sum(dim=(2, 3)).float()
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
    of_style = (gradient * x).sum(dim=(2, 3)).float()
    return ConvGradients(gradient.mul_(style.to(low)[:, :, None, None]), of_style, total / demod, found)


def _to_rgb_weight(colours: FrozenToRGB, style: Tensor) -> Tensor:
    """One weight per image, float32 (n, 3, i)."""
    return colours.weight * style[:, None]


def _run_to_rgb(colours: FrozenToRGB, x: Tensor, style: Tensor) -> Tensor:
    """x (n, i, h, w), style (n, i) -> colours before their clamp, float32 (n, 3, h, w), channels-last."""
    weight = _to_rgb_weight(colours, style).to(x.dtype)
    rgb = torch.bmm(_rows(x), weight.transpose(1, 2)).float() + colours.bias
    return _pixels(rgb, x)


def _to_rgb_backward(
    colours: FrozenToRGB, x: Tensor, style: Tensor, of_image: Tensor, of_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the activations, those of later blocks added, and of the style."""
    if colours.clamp is not None:
        of_image = of_image * (_run_to_rgb(colours, x, style).abs() < colours.clamp)
    rows_of_image = _rows(of_image).to(x.dtype)
    of_style = (torch.bmm(rows_of_image.transpose(1, 2), _rows(x)).float() * colours.weight).sum(dim=1)
    weight = _to_rgb_weight(colours, style).to(x.dtype)
    rows = (
        torch.bmm(rows_of_image, weight)
        if of_x is None
        else torch.baddbmm(_rows(of_x), rows_of_image, weight)
    )
    return _pixels(rows, x), of_style


class _Blocks(torch.autograd.Function):
    """`run_blocks` with the inputs of all blocks in one sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: tuple[FrozenBlock, ...],
        x: Tensor | None,
        image: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        remaining: Iterator[Any] = iter(inputs)
        saved: list[Tensor] = []
        had_image: list[bool] = []
        save = any(ctx.needs_input_grad)
        ctx.dtype = None if x is None else x.dtype
        for block in blocks:
            if block.const is not None:
                count = cast(Tensor, inputs[0]).shape[0]
                x = block.const.expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
            before = x = cast(Tensor, x).to(block.dtype)
            activations = [x]
            for conv in block.convs:
                x = _run_conv(conv, x, next(remaining), next(remaining), next(remaining))
                activations.append(x)
            if block.shortcut is not None:
                x = upsample(functional.conv2d(before, block.shortcut), block.kernel) + x
                activations.append(x)
            had_image.append(image is not None)
            if image is not None:
                image = upsample(image, block.kernel.float())
            if block.colours is not None:
                rgb = bounded(_run_to_rgb(block.colours, x, next(remaining)), 1.0, block.colours.clamp)
                image = rgb if image is None else image.add_(rgb)
            if save:
                saved.extend(activations)
        ctx.blocks, ctx.had_image, ctx.saved = blocks, had_image, len(saved)
        ctx.save_for_backward(*saved, *inputs)
        return x, image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_image = (_channels_last(gradient) for gradient in gradients)
        tensors: Sequence[Any] = ctx.saved_tensors
        saved, inputs = list(tensors[: ctx.saved]), tensors[ctx.saved :]
        input_gradients: list[Tensor | None] = [None] * len(inputs)
        at = len(inputs)
        for block, had_image in zip(reversed(ctx.blocks), reversed(ctx.had_image), strict=True):
            of_x = None if of_x is None else of_x.to(block.dtype)
            if block.colours is not None:
                at -= 1
                if of_image is not None:
                    of_x, input_gradients[at] = _to_rgb_backward(
                        block.colours, saved[-1], inputs[at], of_image, of_x
                    )
            if of_image is not None:
                kernel = block.kernel.float()
                of_image = blur(of_image, kernel, 1, gain=4.0, stride=2) if had_image else None
            around = None
            if block.shortcut is not None:
                saved.pop()
                around = blur(cast(Tensor, of_x), block.kernel, 1, gain=4.0, stride=2)
                around = functional.conv_transpose2d(around, block.shortcut)
            for conv in reversed(block.convs):
                at -= 3
                out = saved.pop()
                gradient = _conv_backward(
                    conv,
                    saved[-1],
                    out,
                    cast(Tensor, of_x),
                    inputs[at : at + 3],
                    of_plane=ctx.needs_input_grad[at + 5],
                )
                of_x, input_gradients[at] = gradient.x, gradient.style
                input_gradients[at + 1], input_gradients[at + 2] = gradient.demod, gradient.plane
            saved.pop()
            if around is not None:
                of_x = cast(Tensor, of_x) + around
        of_x = cast(Tensor, of_x).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return None, of_x, of_image, *input_gradients


def _channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def run_blocks(
    blocks: tuple[FrozenBlock, ...],
    inputs: Sequence[Sequence[Tensor | None]],
    x: Tensor | None,
    image: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Run consecutive blocks; inputs may require gradients (of first order), weights never do.

    Args:
        blocks: From `freeze_block`, in their order.
        inputs: For each block, float32: style (n, i), demodulation times gain (n, o) and noise times strength
            (n or 1, 1, side, side) or None, for each convolution; then the style of the RGB layer if it has one.
        x: Activations of the block before; None at the first block.
        image: RGB so far (n, 3, side / 2, side / 2), float32; None before the first RGB layer.

    Returns:
        Activations, and RGB or None.
    """
    flat = [tensor for block in inputs for tensor in block]
    return cast(tuple[Tensor | None, Tensor | None], cast(Any, _Blocks).apply(blocks, x, image, *flat))
