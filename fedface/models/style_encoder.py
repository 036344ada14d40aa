"""The style encoder: a low-resolution photo -> the styles of a face that fits it, in one forward pass.

Source: pSp, Richardson et al. 2021 (arXiv:2008.00951), section 3: one style for each input of a frozen generator,
each as a difference from the mean style. Like theirs it reads photos of one size, to which smaller ones are enlarged;
that size is small here, because enlarging a photo adds no information.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from fedface.models.latent_encoder import HalvingBlock
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.stylegan_layers import Conv, ConvOptions, Linear, resize_up
from fedface.tensor_types import LowImages, Styles
from fedface.validation import In, PowerOfTwo, checked

# Channels, and style inputs times style width, are bounded: a configuration may be untrusted
MAX_WIDTH = 2**12


@dataclass(frozen=True, kw_only=True)
@checked
class StyleEncoderNetworkConfig:
    """The architecture of a style encoder; equal configs have weights that can be summed."""

    # Photos of up to so many pixels a side are read, enlarged to it.
    side: Annotated[int, PowerOfTwo(4, 256)] = 16
    style_inputs: Annotated[int, In("[1, 64]")] = 8  # k of the generator
    style_width: Annotated[int, In(f"[1, {MAX_WIDTH}]")] = 128  # v of the generator
    width: Annotated[int, In(f"[1, {MAX_WIDTH}]")] = 48  # channels of the trunk
    blocks: Annotated[int, In("[0, 64]")] = 2  # residual blocks at the photo's side
    hidden: Annotated[int, In(f"[1, {MAX_WIDTH}]")] = 128  # width of the layer between trunk and styles


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a skip connection; nothing mixes the images of a batch."""

    def __init__(self, width: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.conv0 = Conv(width, width, 3, rng=rng)
        self.conv1 = Conv(width, width, 3, ConvOptions(activate="linear"), rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) -> the same shape, of about the same variance."""
        half = math.sqrt(0.5)
        return cast(Tensor, x * half + self.conv1(self.conv0(x), half))


class StyleEncoder(nn.Module):
    """Photos (n, 3, l, l) in [0, 1], l <= side -> styles (n, k, v): the mean style plus a difference."""

    mean_style: Tensor

    def __init__(self, config: StyleEncoderNetworkConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean_style", torch.zeros(config.style_width))
        self.fromrgb = Conv(3, config.width, 3, rng=rng)
        for number in range(config.blocks):
            self.add_module(f"r{number}", ResidualBlock(config.width, rng))
        self.halvings = int(math.log2(config.side)) - 2
        for number in range(self.halvings):
            self.add_module(f"h{number}", HalvingBlock(config.width, config.width, rng))
        self.fc = Linear(config.width * 16, config.hidden, activate="lrelu", rng=rng)
        self.out = Linear(config.hidden, config.style_inputs * config.style_width, rng=rng)

    def forward(self, low: LowImages) -> Styles:
        x = self.fromrgb(resize_up(low, self.config.side) * 2.0 - 1.0)
        for number in range(self.config.blocks):
            x = self.get_submodule(f"r{number}")(x)
        for number in range(self.halvings):
            x = self.get_submodule(f"h{number}")(x)
        differences = self.out(self.fc(x.flatten(1)))
        shape = (-1, self.config.style_inputs, self.config.style_width)
        return cast(Tensor, self.mean_style + differences.reshape(shape))


class StyleUpsampler(nn.Module):
    """A style encoder and its generator as one network: low-resolution photos -> faces, one each."""

    def __init__(self, generator: StyleGAN2, encoder: StyleEncoder) -> None:
        super().__init__()
        self.generator = generator
        self.encoder = encoder

    def forward(self, low: LowImages) -> Tensor:
        """(n, 3, l, l) -> (n, 3, size, size), nominally in [0, 1], not clamped."""
        return self.generator.synthesize(self.encoder(low))
