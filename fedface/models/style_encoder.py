"""The style encoder: a low-resolution photo -> the styles whose picture it may be, in one forward pass.

Called from upsampling/methods (milliseconds a face, or a start for PULSE) and training/upsampler (devices teach it).
Source: pSp, Richardson et al. 2021 (arXiv:2008.00951), section 3: one style for each input of a frozen generator,
each told as a change of the mean style. Like theirs it reads photos of one side, to which smaller ones are enlarged;
that side is small here, because a photo of few pixels holds nothing that a larger one could show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.latent_encoder import HalvingBlock
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.stylegan_layers import Conv, ConvOptions, Linear, resize_up
from fedface.tensor_types import LowImages, Styles

WIDEST = 2**12  # channels, and style inputs times style width, are bounded: a description may be a stranger's


@dataclass(frozen=True, kw_only=True)
class StyleEncoderNetworkConfig:
    """The shape of a style encoder; equal configs have weights that can be summed."""

    side: int = 16  # photos of up to so many pixels a side are read, enlarged to it; a power of two, 4 to 256
    style_inputs: int = 8  # k of the generator
    style_width: int = 128  # v of the generator
    width: int = 48  # channels of the trunk
    blocks: int = 2  # residual blocks at the photo's side
    hidden: int = 128  # width of the layer between trunk and styles

    def __post_init__(self) -> None:
        if self.side not in [2**p for p in range(2, 9)]:
            raise ConfigError(f"side must be a power of two from 4 to 256, got {self.side}")
        for name, least, most in (
            ("style_inputs", 1, 64), ("style_width", 1, WIDEST), ("width", 1, WIDEST), ("blocks", 0, 64),
            ("hidden", 1, WIDEST),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie in [{least}, {most}], got {getattr(self, name)}")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity; nothing mixes the pictures of a batch."""

    def __init__(self, width: int, rng: torch.Generator | None) -> None:
        super().__init__()
        self.conv0 = Conv(width, width, 3, rng=rng)
        self.conv1 = Conv(width, width, 3, ConvOptions(activate="linear"), rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) -> the same shape, of about the same variance."""
        half = math.sqrt(0.5)
        return cast(Tensor, x * half + self.conv1(self.conv0(x), half))


class StyleEncoder(nn.Module):
    """Photos (n, 3, l, l) in [0, 1], l <= side -> styles (n, k, v): the mean style, plus what the photo says."""

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
        """One style for each input of the generator, for each photo."""
        x = self.fromrgb(resize_up(low, self.config.side) * 2.0 - 1.0)
        for number in range(self.config.blocks):
            x = self.get_submodule(f"r{number}")(x)
        for number in range(self.halvings):
            x = self.get_submodule(f"h{number}")(x)
        changes = self.out(self.fc(x.flatten(1)))
        shape = (-1, self.config.style_inputs, self.config.style_width)
        return cast(Tensor, self.mean_style + changes.reshape(shape))


class StyleUpsampler(nn.Module):
    """A style encoder before its generator, as one network: low-resolution photos -> faces, one each."""

    def __init__(self, generator: StyleGAN2, encoder: StyleEncoder) -> None:
        super().__init__()
        self.generator = generator
        self.encoder = encoder

    def forward(self, low: LowImages) -> Tensor:
        """(n, 3, l, l) -> (n, 3, size, size), nominally in [0, 1], not clamped."""
        return self.generator.synthesize(self.encoder(low))
