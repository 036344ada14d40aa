"""A super-resolution network: a low-resolution photo -> one larger image, the baseline of most products.

Small residual blocks without normalisation and a sub-pixel tail, as in EDSR (Lim et al. 2017, arXiv:1707.02921) and
ESPCN (Shi et al. 2016, arXiv:1609.05158); the network adds to a bicubic enlargement. Trained by regression it returns
the mean of all faces that fit the photo, the more blurred the less the photo determines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.models.style_encoder import ResidualBlock
from fedface.models.stylegan_layers import Conv, ConvOptions, resize_up
from fedface.tensor_types import Images, LowImages
from fedface.validation import In, PowerOfTwo, checked

MAX_WIDTH = 2**12


@dataclass(frozen=True, kw_only=True)
@checked
class SuperResolutionNetworkConfig:
    """The architecture of a super-resolution network; equal configs have weights that can be summed."""

    # Photos of up to so many pixels a side are read, enlarged to it.
    side: Annotated[int, In("[1, 512]")] = 16
    factor: Annotated[int, PowerOfTwo(1, 64)] = 2  # how much larger than that side images are
    width: Annotated[int, In(f"[1, {MAX_WIDTH}]")] = 32  # channels
    blocks: Annotated[int, In("[0, 64]")] = 4  # residual blocks

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 1024:
            raise ConfigError(f"factor times side must lie between 8 and 1024 pixels, got {self.size}")

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.side * self.factor


class SuperResolutionNetwork(nn.Module):
    """Photos (n, 3, l, l) in [0, 1], l <= side -> images (n, 3, size, size), not clamped."""

    def __init__(self, config: SuperResolutionNetworkConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config, self.size = config, config.size
        width = config.width
        self.head = Conv(3, width, 3, rng=rng)
        for number in range(config.blocks):
            self.add_module(f"r{number}", ResidualBlock(width, rng))
        self.doublings = int(math.log2(config.factor))
        for number in range(self.doublings):
            self.add_module(f"up{number}", Conv(width, 4 * width, 3, rng=rng))
        self.tail = Conv(width, 3, 3, ConvOptions(activate="linear", gain=0.1), rng=rng)

    def forward(self, low: LowImages) -> Images:
        x = self.head(resize_up(low, self.config.side) * 2.0 - 1.0)
        for number in range(self.config.blocks):
            x = self.get_submodule(f"r{number}")(x)
        for number in range(self.doublings):
            x = functional.pixel_shuffle(self.get_submodule(f"up{number}")(x), 2)
        return cast(Tensor, resize_up(low, self.size) + self.tail(x))
