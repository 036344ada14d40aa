"""The StyleGAN2 generator at any power-of-two size.

Sources: Karras et al. 2020 (arXiv:1912.04958) for the network, Karras et al. 2020 (arXiv:2006.06676) for gains and
parameter names: a state dict of the published stylegan2-ada networks fits without renaming (their constant
`resample_filter` entries are not weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.models.generator_protocol import check_inputs, sample, truncated
from fedface.models.stylegan_layers import (
    LRELU_SLOPE,
    ChannelBase,
    ChannelPyramid,
    Classes,
    Layers,
    Linear,
    Width,
    binomial_filter,
    bounded,
    checked_labels,
    lrelu,
    modulated_conv,
    unit_mean_square,
    upsample,
)
from fedface.tensor_types import Images, Latents, Styles
from fedface.validation import PositiveFloat, PowerOfTwo, checked


@dataclass(frozen=True, kw_only=True)
@checked
class StyleGAN2Config(ChannelPyramid):
    """The architecture of a generator; equal configs have weights that can be summed."""

    kind: ClassVar[str] = "stylegan2"

    size: Annotated[int, PowerOfTwo(8, 1024)] = 32  # height and width of images in pixels
    latent_width: Width = 64  # width of z
    style_width: Width = 64  # width of w
    mapping_layers: Layers = 4  # fully connected layers from z to w
    channel_base: ChannelBase = 2048  # channels at side r are min(channel_base / r, channel_max)
    channel_max: Width = 96
    architecture: Literal["skip", "orig", "resnet"] = "skip"
    # Activations are kept within +- this; published for half precision: 256.
    clamp: PositiveFloat | None = None
    classes: Classes = 0  # of a class-conditional generator; 0 if unconditional
    prior: Literal["standard", "fitted"] = "standard"  # fitted: latents pass a stored affine map


class Mapping(nn.Module):
    """z -> w: normalise, then fully connected layers that learn a hundred times slower.

    With classes, the label is embedded, normalised as well, and appended to z. With a fitted prior, z is first replaced
    by `prior_mean + prior_root @ z`, the normal distribution that was fitted to devices' photos; it starts as the
    standard one.
    """

    w_avg: Tensor
    prior_mean: Tensor
    prior_root: Tensor

    def __init__(self, config: StyleGAN2Config, rng: torch.Generator | None) -> None:
        super().__init__()
        self.layers, self.classes, self.prior = config.mapping_layers, config.classes, config.prior
        embedded = config.style_width if config.classes else 0
        widths = [config.latent_width + embedded] + [config.style_width] * config.mapping_layers
        for i in range(config.mapping_layers):
            layer = Linear(widths[i], widths[i + 1], activate="lrelu", lr_multiplier=0.01, rng=rng)
            self.add_module(f"fc{i}", layer)
        if config.classes:
            self.embed = Linear(config.classes, config.style_width, rng=rng)
        self.register_buffer("w_avg", torch.zeros(config.style_width))
        if config.prior == "fitted":
            self.register_buffer("prior_mean", torch.zeros(config.latent_width))
            self.register_buffer("prior_root", torch.eye(config.latent_width))

    def forward(self, latents: Latents, labels: Tensor | None = None) -> Tensor:
        """Latents (n, z) and, with classes, labels (n, classes) -> (n, v)."""
        if self.prior == "fitted":
            latents = self.prior_mean + latents @ self.prior_root.t()
        x = unit_mean_square(latents)
        if self.classes:
            labels = checked_labels(labels, self.classes).to(x.dtype)
            x = torch.cat([x, unit_mean_square(self.embed(labels))], dim=1)
        elif labels is not None:
            raise ConfigError("this generator has no classes, got labels; map latents alone")
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        return x


class StyledConv(nn.Module):
    """One modulated 3 x 3 convolution with its noise map."""

    noise_const: Tensor
    filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int,
        up: int,
        config: StyleGAN2Config,
        rng: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.up, self.side, self.clamp = up, side, config.clamp
        self.affine = Linear(config.style_width, inputs, bias_start=1.0, rng=rng)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3, generator=rng))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("noise_const", torch.randn(side, side, generator=rng))
        self.register_buffer("filter", binomial_filter(), persistent=False)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None, gain: float = 1.0) -> Tensor:
        kernel = self.filter if self.up == 2 else None
        y = modulated_conv(x, self.weight, self.affine(style), up_kernel=kernel)
        y = y + (self.noise_const if noise is None else noise) * self.noise_strength
        return lrelu(y + self.bias[:, None, None], gain, self.clamp)


class ToRGB(nn.Module):
    """One modulated 1 x 1 convolution to RGB, without demodulation."""

    def __init__(self, inputs: int, config: StyleGAN2Config, rng: torch.Generator | None) -> None:
        super().__init__()
        self.clamp = config.clamp
        self.affine = Linear(config.style_width, inputs, bias_start=1.0, rng=rng)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1, generator=rng))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1.0 / math.sqrt(inputs)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = modulated_conv(x, self.weight, self.affine(style) * self.gain, demodulate=False)
        return bounded(y + self.bias[:, None, None], 1.0, self.clamp)


class Shortcut(nn.Module):
    """The shortcut of a resnet block: a 1 x 1 convolution without bias, and twice the sides."""

    filter: Tensor

    def __init__(self, inputs: int, outputs: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1, generator=rng))
        self.gain = 1.0 / math.sqrt(inputs)
        self.register_buffer("filter", binomial_filter(), persistent=False)

    def forward(self, x: Tensor, gain: float) -> Tensor:
        return upsample(functional.conv2d(x, self.weight * (self.gain * gain)), self.filter)


class Block(nn.Module):
    """The layers of one side: double, convolve, convolve, and (skip) a colour image."""

    filter: Tensor

    def __init__(self, side: int, config: StyleGAN2Config, rng: torch.Generator | None) -> None:
        super().__init__()
        channels = config.channels(side)
        if side == 4:
            self.const = nn.Parameter(torch.randn(channels, 4, 4, generator=rng))
        else:
            self.conv0 = StyledConv(config.channels(side // 2), channels, side, 2, config, rng)
        self.conv1 = StyledConv(channels, channels, side, 1, config, rng)
        self.shortcut = config.architecture == "resnet" and side != 4
        if self.shortcut:
            self.skip = Shortcut(config.channels(side // 2), channels, rng)
        self.colours = config.architecture == "skip" or side == config.size
        if self.colours:
            self.torgb = ToRGB(channels, config, rng)
        self.first = side == 4
        self.register_buffer("filter", binomial_filter(), persistent=False)

    def forward(
        self, x: Tensor | None, image: Tensor | None, styles: Tensor, noise: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """`styles` (n, 2 or 3, v) and `noise` (1 or 2 maps) are this block's own."""
        if x is None:
            x = self.const.expand(styles.shape[0], -1, -1, -1)
            x = self.conv1(x, styles[:, 0], noise[-1])
        elif self.shortcut:
            half = math.sqrt(0.5)
            around = self.skip(x, half)
            x = around + self.conv1(self.conv0(x, styles[:, 0], noise[0]), styles[:, 1], noise[-1], half)
        else:
            x = self.conv1(self.conv0(x, styles[:, 0], noise[0]), styles[:, 1], noise[-1])
        if image is not None:
            image = upsample(image, self.filter)
        if self.colours:
            rgb = self.torgb(x, styles[:, 1 if self.first else 2])
            image = rgb if image is None else image + rgb
        return x, image


class Synthesis(nn.Module):
    """Styles -> an image in [-1, 1], the published network's own range."""

    def __init__(self, config: StyleGAN2Config, rng: torch.Generator | None) -> None:
        super().__init__()
        self.sides = config.sides
        for side in config.sides:
            self.add_module(f"b{side}", Block(side, config, rng))

    def forward(self, styles: Styles, noise: Sequence[Tensor] | None) -> Tensor:
        x: Tensor | None = None
        image: Tensor | None = None
        used = 0
        for side in self.sides:
            convs = 1 if side == 4 else 2
            maps = [None] * convs if noise is None else list(noise[used : used + convs])
            # The colour layer shares its style with the next block's first convolution.
            own = styles[:, used : used + convs + 1]
            x, image = self.get_submodule(f"b{side}")(x, image, own, maps)
            used += convs
        return cast(Tensor, image)


class StyleGAN2(nn.Module):
    """A `generator_protocol.Generator` with random weights."""

    def __init__(self, config: StyleGAN2Config, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.size, self.latent_width, self.style_slope = config.size, config.latent_width, LRELU_SLOPE
        self.style_inputs = 2 * len(config.sides)
        self.noise_sides = (4, *(side for side in config.sides[1:] for _ in range(2)))  # 4, 8, 8, 16, ...
        self.mapping = Mapping(config, rng)
        self.synthesis = Synthesis(config, rng)

    def map(self, latents: Latents, labels: Tensor | None = None) -> Styles:
        """Standard normal latents (n, z) -> styles (n, k, v), the same style k times.

        Args:
            latents: (n, z).
            labels: (n, classes), usually one-hot, for a generator with classes; None for one without.

        Raises:
            ConfigError: The generator has classes and got no labels of that width, or has none and got labels.
        """
        return cast(Tensor, self.mapping(latents, labels))[:, None].expand(-1, self.style_inputs, -1)

    def truncate(self, styles: Styles, psi: float, cutoff: int | None = None) -> Styles:
        """See `generator_protocol.truncated`."""
        return truncated(styles, self.mapping.w_avg, psi, cutoff)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        check_inputs(self, styles, noise)
        return (cast(Tensor, self.synthesis(styles, noise)) + 1.0) / 2.0

    def sample(self, count: int, rng: torch.Generator, *, psi: float = 1.0, batch: int = 64) -> Images:
        return sample(self, count, rng, psi=psi, batch=batch)


class ClassConditioned(nn.Module):
    """A class-conditional generator, fixed to one class: an unconditional generator for searches and audits.

    A module, so that freezing or moving it reaches the generator's weights.
    """

    label: Tensor

    def __init__(self, generator: StyleGAN2, label: int) -> None:
        super().__init__()
        classes = generator.config.classes
        if not 0 <= label < classes:
            raise ConfigError(f"label must be one of the generator's {classes} classes, from 0, got {label}")
        self.generator = generator
        self.size, self.latent_width, self.style_slope = generator.size, generator.latent_width, LRELU_SLOPE
        self.style_inputs, self.noise_sides = generator.style_inputs, generator.noise_sides
        self.register_buffer("label", torch.eye(classes)[label], persistent=False)

    def map(self, latents: Latents) -> Styles:
        return self.generator.map(latents, self.label.expand(latents.shape[0], -1))

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """Towards the mean style of all classes together, as published."""
        return self.generator.truncate(styles, psi)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        return self.generator.synthesize(styles, noise)
