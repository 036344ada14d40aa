"""The StyleGAN1 generator at any power-of-two size, as searched by the published PULSE.

Sources: Karras et al. 2019 (arXiv:1812.04948) for the network, Karras et al. 2018 (arXiv:1710.10196) for equalised
weights. Parameter names are those of the state dicts that PULSE reads, behind `mapping.` and `synthesis.`; those
files hold a blur `kernel`, which is not a weight, and neither `mapping.w_avg` nor any `noise.const`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.models.generator_protocol import check_inputs, sample, truncated
from fedface.models.stylegan_layers import (
    LRELU_GAIN,
    LRELU_SLOPE,
    ChannelBase,
    ChannelPyramid,
    Conv,
    ConvOptions,
    Layers,
    Linear,
    Width,
    unit_mean_square,
)
from fedface.tensor_types import Images, Latents, Styles
from fedface.validation import PowerOfTwo, checked

FUSED_FROM = 128  # from this side on, the published network doubles and convolves in one step


@dataclass(frozen=True, kw_only=True)
@checked
class StyleGAN1Config(ChannelPyramid):
    """The shape of a StyleGAN1 generator; the defaults are the published network for 1024 px faces."""

    kind: ClassVar[str] = "stylegan1"

    size: Annotated[int, PowerOfTwo(8, 1024)] = 1024  # height and width of images in pixels
    latent_width: Width = 512  # width of z
    style_width: Width = 512  # width of w
    mapping_layers: Layers = 8  # fully connected layers from z to w
    # Channels at side r are min(channel_base / r, channel_max); twice "fmap_base".
    channel_base: ChannelBase = 16384
    channel_max: Width = 512


def double_then_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Repeat every pixel twice along both sides, then convolve: (n, i, h, w), (o, i, 3, 3) -> (n, o, 2h, 2w)."""
    return functional.conv2d(functional.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)


def double_and_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The same in one transposed convolution, as published for large images.

    A transposed convolution turns its kernel around, and the published network does not turn it back. So this
    equals `double_then_convolve` of the weight flipped along both sides; weights were trained for one form.
    """
    padded = functional.pad(weight.transpose(0, 1), (1, 1, 1, 1))
    summed = padded[..., 1:, 1:] + padded[..., :-1, 1:] + padded[..., 1:, :-1] + padded[..., :-1, :-1]
    return functional.conv_transpose2d(x, summed, stride=2, padding=1)


def soften(x: Tensor) -> Tensor:
    """Filter each channel with the outer product of [1, 2, 1] / 4 with itself; zeros lie around the image."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
    return functional.conv2d(x, kernel, padding=1, groups=x.shape[1])


class Mapping(nn.Module):
    """z -> w: normalise, then fully connected layers that learn a hundred times slower."""

    w_avg: Tensor

    def __init__(self, config: StyleGAN1Config, rng: torch.Generator | None) -> None:
        super().__init__()
        self.layers = config.mapping_layers
        widths = [config.latent_width] + [config.style_width] * config.mapping_layers
        for i in range(config.mapping_layers):
            layer = Linear(widths[i], widths[i + 1], gain=LRELU_GAIN, lr_multiplier=0.01, rng=rng)
            self.add_module(f"dense{i}", layer)
        self.register_buffer("w_avg", torch.zeros(config.style_width))

    def forward(self, latents: Latents) -> Tensor:
        x = unit_mean_square(latents)
        for i in range(self.layers):
            # The gain stands at the weights, so that it does not reach the bias; StyleGAN2 moved it behind both.
            x = functional.leaky_relu(self.get_submodule(f"dense{i}")(x), LRELU_SLOPE)
        return x


class DoublingConv(nn.Module):
    """Double the sides, convolve, soften, and only then add the bias."""

    def __init__(self, inputs: int, outputs: int, side: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3, generator=rng))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_gain = LRELU_GAIN / math.sqrt(inputs * 9)
        self.fused = side >= FUSED_FROM

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight_gain
        y = double_and_convolve(x, weight) if self.fused else double_then_convolve(x, weight)
        return soften(y) + self.bias[:, None, None]


class Noise(nn.Module):
    """One noise map, as strong in each channel as that channel learned."""

    const: Tensor

    def __init__(self, channels: int, side: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.register_buffer("const", torch.randn(side, side, generator=rng))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return x + self.weight[:, None, None] * (self.const if noise is None else noise)


class StyleModulation(nn.Module):
    """A style -> one factor and one offset for each channel."""

    def __init__(self, channels: int, config: StyleGAN1Config, rng: torch.Generator | None) -> None:
        super().__init__()
        self.lin = Linear(config.style_width, 2 * channels, rng=rng)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        factor, offset = self.lin(style)[:, :, None, None].chunk(2, dim=1)
        return cast(Tensor, x * (factor + 1.0) + offset)


class Epilogue(nn.Module):
    """What follows each convolution: noise, leaky ReLU, instance norm (epsilon 1e-5), style."""

    def __init__(
        self, channels: int, side: int, config: StyleGAN1Config, rng: torch.Generator | None
    ) -> None:
        super().__init__()
        self.noise = Noise(channels, side, rng)
        self.style_mod = StyleModulation(channels, config, rng)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        x = functional.leaky_relu(self.noise(x, noise), LRELU_SLOPE)
        return cast(Tensor, self.style_mod(functional.instance_norm(x, eps=1e-5), style))


class FirstBlock(nn.Module):
    """A learned image of side 4 and one convolution."""

    def __init__(self, config: StyleGAN1Config, rng: torch.Generator | None) -> None:
        super().__init__()
        channels = config.channels(4)
        self.const = nn.Parameter(torch.ones(1, channels, 4, 4))
        self.bias = nn.Parameter(torch.ones(channels))
        self.epi1 = Epilogue(channels, 4, config, rng)
        self.conv = Conv(channels, channels, 3, ConvOptions(activate="linear", gain=LRELU_GAIN), rng=rng)
        self.epi2 = Epilogue(channels, 4, config, rng)

    def forward(self, styles: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        """`styles` (n, 2, v) and two noise maps -> (n, c, 4, 4)."""
        x = (self.const + self.bias[:, None, None]).expand(styles.shape[0], -1, -1, -1)
        x = self.epi1(x, styles[:, 0], noise[0])
        return cast(Tensor, self.epi2(self.conv(x), styles[:, 1], noise[1]))


class Block(nn.Module):
    """The layers of one side above 4: a doubling convolution and one more."""

    def __init__(self, side: int, config: StyleGAN1Config, rng: torch.Generator | None) -> None:
        super().__init__()
        channels = config.channels(side)
        self.conv0_up = DoublingConv(config.channels(side // 2), channels, side, rng)
        self.epi1 = Epilogue(channels, side, config, rng)
        self.conv1 = Conv(channels, channels, 3, ConvOptions(activate="linear", gain=LRELU_GAIN), rng=rng)
        self.epi2 = Epilogue(channels, side, config, rng)

    def forward(self, x: Tensor, styles: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        """`styles` (n, 2, v) and two noise maps -> (n, c, side, side)."""
        x = self.epi1(self.conv0_up(x), styles[:, 0], noise[0])
        return cast(Tensor, self.epi2(self.conv1(x), styles[:, 1], noise[1]))


class Synthesis(nn.Module):
    """Styles -> an image, nominally in [-1, 1], the published network's own range."""

    def __init__(self, config: StyleGAN1Config, rng: torch.Generator | None) -> None:
        super().__init__()
        first: dict[str, nn.Module] = {"4x4": FirstBlock(config, rng)}
        others = {f"{side}x{side}": Block(side, config, rng) for side in config.sides[1:]}
        self.blocks = nn.ModuleDict(first | others)
        self.torgb = Conv(config.channels(config.size), 3, 1, ConvOptions(activate="linear"), rng=rng)

    def forward(self, styles: Styles, noise: Sequence[Tensor | None]) -> Tensor:
        x = styles
        for i, block in enumerate(self.blocks.values()):
            own, maps = styles[:, 2 * i : 2 * i + 2], noise[2 * i : 2 * i + 2]
            x = block(own, maps) if i == 0 else block(x, own, maps)
        return cast(Tensor, self.torgb(x))


class StyleGAN1(nn.Module):
    """A `generator_protocol.Generator` with random weights; `importing` reads the published ones."""

    def __init__(self, config: StyleGAN1Config, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.size, self.latent_width, self.style_slope = config.size, config.latent_width, LRELU_SLOPE
        self.noise_sides = tuple(side for side in config.sides for _ in range(2))  # 4, 4, 8, 8, ...
        self.style_inputs = len(self.noise_sides)
        self.mapping = Mapping(config, rng)
        self.synthesis = Synthesis(config, rng)

    def map(self, latents: Latents) -> Styles:
        return cast(Tensor, self.mapping(latents))[:, None].expand(-1, self.style_inputs, -1)

    def truncate(self, styles: Styles, psi: float, cutoff: int | None = None) -> Styles:
        """See `generator_protocol.truncated`; published faces have a cutoff of 8."""
        return truncated(styles, self.mapping.w_avg, psi, cutoff)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        check_inputs(self, styles, noise)
        maps = [None] * len(self.noise_sides) if noise is None else list(noise)
        return (cast(Tensor, self.synthesis(styles, maps)) + 1.0) / 2.0

    def sample(self, count: int, rng: torch.Generator, *, psi: float = 1.0, batch: int = 64) -> Images:
        return sample(self, count, rng, psi=psi, batch=batch)
