"""The latent encoder: a photo -> the latent whose image is nearest to it, in one forward pass.

The trunk is the discriminator's: residual blocks that halve the sides, Karras et al. 2020 (arXiv:1912.04958); an
image's latent depends on that image alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from fedface.models.stylegan_layers import (
    ChannelBase,
    ChannelPyramid,
    Conv,
    ConvOptions,
    Linear,
    Width,
    unit_mean_square,
)
from fedface.tensor_types import Images, Latents
from fedface.validation import PowerOfTwo, checked


@dataclass(frozen=True, kw_only=True)
@checked
class LatentEncoderConfig(ChannelPyramid):
    """The architecture of an encoder; equal configs have weights that can be summed."""

    size: Annotated[int, PowerOfTwo(8, 1024)] = 32  # height and width of images in pixels
    latent_width: Width = 64  # width of z, as in the generator it belongs to
    channel_base: ChannelBase = 1024  # channels at side r are min(channel_base / r, channel_max)
    channel_max: Width = 64


class HalvingBlock(nn.Module):
    """Two convolutions that halve the sides, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.conv0 = Conv(inputs, inputs, 3, rng=rng)
        self.conv1 = Conv(inputs, outputs, 3, ConvOptions(down=2), rng=rng)
        self.skip = Conv(inputs, outputs, 1, ConvOptions(activate="linear", down=2, bias=False), rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h/2, w/2)."""
        half = math.sqrt(0.5)
        return cast(Tensor, self.skip(x, half) + self.conv1(self.conv0(x), half))


class LatentEncoder(nn.Module):
    """Images (n, 3, size, size) in [0, 1] -> latents (n, z) of L2 norm sqrt(z), as the mapping normalises them."""

    def __init__(self, config: LatentEncoderConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.size, self.latent_width = config.size, config.latent_width
        self.fromrgb = Conv(3, config.channels(config.size), 1, rng=rng)
        for side in reversed(config.sides[1:]):
            block = HalvingBlock(config.channels(side), config.channels(side // 2), rng)
            self.add_module(f"b{side}", block)
        channels = config.channels(4)
        self.conv = Conv(channels, channels, 3, rng=rng)
        self.fc = Linear(channels * 16, channels, activate="lrelu", rng=rng)
        self.out = Linear(channels, config.latent_width, rng=rng)

    def forward(self, images: Images) -> Latents:
        x = self.fromrgb(images * 2.0 - 1.0)
        for side in reversed(self.config.sides[1:]):
            x = self.get_submodule(f"b{side}")(x)
        return unit_mean_square(self.out(self.fc(self.conv(x).flatten(1))))
