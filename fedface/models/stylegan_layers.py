"""The layers that the StyleGAN2 generator and discriminator share: equalised weights, filtered resampling.

Sources: Karras et al. 2018 (arXiv:1710.10196) for equalised learning rates, Karras et al. 2020 (arXiv:1912.04958) for
modulation, Karras et al. 2020 (arXiv:2006.06676) for the exact gains. Every layer is a plain function of its weights
and its input, one image at a time, so that `torch.func.vmap(grad)` gives per-photo gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.validation import In

LRELU_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2.0)
MAX_WIDTH = 2**16  # inputs or outputs of one layer; the published ones have 512
# Bounds of what an untrusted configuration may ask for.
Width = Annotated[int, In(f"[1, {MAX_WIDTH}]")]
Classes = Annotated[int, In(f"[0, {MAX_WIDTH}]")]
Layers = Annotated[int, In("[1, 64]")]
ChannelBase = Annotated[int, In("[1, 16777216]")]


class ChannelPyramid:
    """The sides and channels of the blocks of a configuration."""

    size: int  # height and width of images in pixels, a power of two
    channel_base: int
    channel_max: int

    @property
    def sides(self) -> tuple[int, ...]:
        """4, 8, ... size."""
        return tuple(2**p for p in range(2, int(math.log2(self.size)) + 1))

    def channels(self, side: int) -> int:
        """min(channel_base / side, channel_max), at least 1."""
        return max(1, min(self.channel_base // side, self.channel_max))


def lrelu(x: Tensor, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """Leaky ReLU of slope 0.2 times sqrt(2) * gain, clamped to +-clamp * gain when a clamp is given."""
    return bounded(functional.leaky_relu(x, LRELU_SLOPE) * (LRELU_GAIN * gain), gain, clamp)


def bounded(x: Tensor, gain: float, clamp: float | None) -> Tensor:
    """Clamp activations to +-clamp * gain; None leaves them alone."""
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


def binomial_filter() -> Tensor:
    """The outer product of [1, 3, 3, 1] / 8 with itself, shape (4, 4), sum 1."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
    return torch.outer(row, row)


def blur(x: Tensor, kernel: Tensor, padding: int, gain: float = 1.0, stride: int = 1) -> Tensor:
    """Filter each channel with `kernel` (4, 4) after zero padding on all sides; keep every `stride`-th pixel."""
    channels = x.shape[1]
    weight = (kernel * gain).to(x.dtype).expand(channels, 1, 4, 4)
    return functional.conv2d(x, weight, padding=padding, stride=stride, groups=channels)


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Double the sides: zero insertion, then the binomial filter with gain 4. (n, c, h, w) -> (n, c, 2h, 2w)."""
    channels = x.shape[1]
    weight = (kernel * 4.0).to(x.dtype).expand(channels, 1, 4, 4)
    return functional.conv_transpose2d(x, weight, stride=2, padding=1, groups=channels)


def downsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Halve the sides: the binomial filter at every second pixel. (n, c, h, w) -> (n, c, h/2, w/2)."""
    return blur(x, kernel, padding=1, stride=2)


@lru_cache(maxsize=32)
def enlarging_rows(low: int, side: int) -> Tensor:
    """Bicubic enlargement of one axis as a matrix, (side, low) float64; rows sum to 1. Equal sides: the identity."""
    # On the CPU whatever the default device is: the cache outlives it.
    lines = torch.eye(low, dtype=torch.float64, device="cpu")[None, None]
    grown = functional.interpolate(lines, size=(side, low), mode="bicubic", align_corners=False)
    return grown[0, 0]


def resize_up(x: Tensor, side: int) -> Tensor:
    """Bicubic enlargement to side x side pixels, (n, c, l, l) -> (n, c, side, side); a matrix on either hand."""
    rows = enlarging_rows(x.shape[-1], side).to(x)
    return x if x.shape[-1] == side else rows @ x @ rows.T


def unit_mean_square(x: Tensor) -> Tensor:
    """Scale each row of (n, v) so that the mean of its squares is 1 (pixel norm, epsilon 1e-8)."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def checked_labels(labels: Tensor | None, classes: int) -> Tensor:
    """Labels (n, classes), unchanged; raises ConfigError where they are missing or have another width."""
    if labels is None:
        raise ConfigError(
            f"this network is conditional on {classes} classes and got no labels; "
            f"pass labels of shape (n, {classes}), or fix a generator's class with ClassConditioned"
        )
    if labels.ndim != 2 or labels.shape[1] != classes:
        raise ConfigError(f"labels must have shape (n, {classes}), got {tuple(labels.shape)}")
    return labels


class Linear(nn.Module):
    """A fully connected layer with equalised learning rate.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        activate: "lrelu" or "linear".
        gain: Factor of the weight when it is used, besides that of the equalised learning rate.
        lr_multiplier: Stored weights are divided by it, and learn slower by as much.
        bias_start: Initial value of every bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        activate: str = "linear",
        gain: float = 1.0,
        lr_multiplier: float = 1.0,
        bias_start: float = 0.0,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=rng) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias_start))
        self.activate = activate
        self.weight_gain = gain * lr_multiplier / math.sqrt(inputs)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, outputs)."""
        y = functional.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return lrelu(y) if self.activate == "lrelu" else y


@dataclass(frozen=True, kw_only=True)
class ConvOptions:
    """What a convolution does besides convolving."""

    activate: Literal["lrelu", "linear"] = "lrelu"
    gain: float = 1.0  # of the weight when it is used, besides that of the equalised learning rate
    down: Literal[1, 2] = 1  # 2: halve the sides after the binomial blur
    bias: bool = True
    clamp: float | None = None  # largest absolute output, times the gain of `forward`


class Conv(nn.Module):
    """A k x k convolution with equalised learning rate."""

    filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        options: ConvOptions | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        options = options or ConvOptions()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel, generator=rng))
        self.bias = nn.Parameter(torch.zeros(outputs)) if options.bias else None
        self.activate, self.down, self.clamp = options.activate, options.down, options.clamp
        self.padding = kernel // 2
        self.weight_gain = options.gain / math.sqrt(inputs * kernel * kernel)
        self.register_buffer("filter", binomial_filter(), persistent=False)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h/down, w/down), times `gain` after the activation."""
        weight = self.weight * self.weight_gain
        if self.down == 1:
            y = functional.conv2d(x, weight, self.bias, padding=self.padding)
        elif self.padding == 0:
            y = functional.conv2d(downsample(x, self.filter), weight, self.bias)
        else:
            y = functional.conv2d(blur(x, self.filter, padding=2), weight, self.bias, stride=2)
        return lrelu(y, gain, self.clamp) if self.activate == "lrelu" else bounded(y * gain, gain, self.clamp)


def modulated_conv(
    x: Tensor, weight: Tensor, styles: Tensor, *, up_kernel: Tensor | None = None, demodulate: bool = True
) -> Tensor:
    """Scale input channels by a style, convolve, and scale outputs back to unit variance.

    Source: Karras et al. 2020 (arXiv:1912.04958), section 2.2, in the form that scales activations instead of
    building one weight per image; the two differ by rounding only.

    Args:
        x: Activations (n, i, h, w).
        weight: (o, i, 3 or 1, same).
        styles: (n, i).
        up_kernel: The binomial filter (4, 4), to double the sides; None leaves them.
        demodulate: Divide by the root of the summed squares of the modulated weight (epsilon 1e-8).
    """
    y = x * styles[:, :, None, None]
    if up_kernel is None:
        y = functional.conv2d(y, weight, padding=weight.shape[-1] // 2)
    else:
        y = functional.conv_transpose2d(y, weight.transpose(0, 1), stride=2)
        y = blur(y, up_kernel, padding=1, gain=4.0)
    if not demodulate:
        return y
    energy = styles.square() @ weight.square().sum(dim=(2, 3)).t()
    return y * torch.rsqrt(energy + 1e-8)[:, :, None, None]
