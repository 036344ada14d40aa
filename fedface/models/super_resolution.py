"""A super-resolution network: a low-resolution photo -> one larger picture, as most products ship.

Called from upsampling/methods and training/upsampler. Small residual blocks without normalisation and a sub-pixel
tail, as in EDSR (Lim et al. 2017, arXiv:1707.02921) and ESPCN (Shi et al. 2016, arXiv:1609.05158); the network adds
to a bicubic enlargement. Trained by regression it answers with the mean of all faces that fit: no face in
particular, and the more blurred the less the photo says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.models.style_encoder import ResidualBlock
from fedface.models.stylegan_layers import Conv, ConvOptions, resize_up
from fedface.tensor_types import Images, LowImages

WIDEST = 2**12


@dataclass(frozen=True, kw_only=True)
class SuperResolutionNetworkConfig:
    """The shape of a super-resolution network; equal configs have weights that can be summed."""

    side: int = 16  # photos of up to so many pixels a side are read, enlarged to it, from 1 to 512
    factor: int = 2  # how much larger than that side pictures are, a power of two from 1 to 64
    width: int = 32  # channels
    blocks: int = 4  # residual blocks

    def __post_init__(self) -> None:
        if self.factor not in [2**p for p in range(7)]:
            raise ConfigError(f"factor must be a power of two from 1 to 64, got {self.factor}")
        for name, least, most in (("side", 1, 512), ("width", 1, WIDEST), ("blocks", 0, 64)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie in [{least}, {most}], got {getattr(self, name)}")
        if not 8 <= self.size <= 1024:
            raise ConfigError(f"factor times side must lie between 8 and 1024 pixels, got {self.size}")

    @property
    def size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.side * self.factor


class SuperResolutionNetwork(nn.Module):
    """Photos (n, 3, l, l) in [0, 1], l <= side -> pictures (n, 3, size, size), not clamped."""

    def __init__(self, config: SuperResolutionNetworkConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.head = Conv(3, width, 3, rng=rng)
        for number in range(config.blocks):
            self.add_module(f"r{number}", ResidualBlock(width, rng))
        self.doublings = int(math.log2(config.factor))
        for number in range(self.doublings):
            self.add_module(f"up{number}", Conv(width, 4 * width, 3, rng=rng))
        self.tail = Conv(width, 3, 3, ConvOptions(activate="linear", gain=0.1), rng=rng)

    @property
    def size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.config.size

    def forward(self, low: LowImages) -> Images:
        """One picture for each photo."""
        x = self.head(resize_up(low, self.config.side) * 2.0 - 1.0)
        for number in range(self.config.blocks):
            x = self.get_submodule(f"r{number}")(x)
        for number in range(self.doublings):
            x = functional.pixel_shuffle(self.get_submodule(f"up{number}")(x), 2)
        return cast(Tensor, resize_up(low, self.size) + self.tail(x))
