"""The StyleGAN2 critic: a picture -> one number, large for photos and small for pictures of the generator.

Called from training/ (the one network that sees photos) and audits/inversion. Sources: Karras et al. 2020
(arXiv:1912.04958, arXiv:2006.06676); parameter names as there. There are no minibatch statistics: they
couple photos, and a photo's clipped gradient would depend on its neighbours, which voids the promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.layers import Conv, Linear
from fedface.shapes import Images


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The shape of a critic; equal configs have weights that can be summed."""

    size: int = 32  # height and width of images in pixels, a power of two from 8 to 1024
    channel_base: int = 1024  # channels at side r are min(channel_base / r, channel_max)
    channel_max: int = 64
    architecture: Literal["resnet", "orig"] = "resnet"
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.size not in [2**p for p in range(3, 11)]:
            raise ConfigError(f"size must be a power of two from 8 to 1024, got {self.size}")
        for name in ("channel_base", "channel_max"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the blocks from large to small, size ... 8; the last layers work at 4."""
        return tuple(2**p for p in range(int(math.log2(self.size)), 2, -1))

    def channels(self, side: int) -> int:
        """Channels entering the block of this side."""
        return max(1, min(self.channel_base // side, self.channel_max))


class CriticBlock(nn.Module):
    """Two convolutions that halve the sides, with a shortcut in the resnet form."""

    def __init__(self, side: int, config: CriticConfig, chance: torch.Generator | None) -> None:
        super().__init__()
        inputs, outputs = config.channels(side), config.channels(side // 2)
        if side == config.size:
            self.fromrgb = Conv(3, inputs, 1, clamp=config.clamp, chance=chance)
        self.conv0 = Conv(inputs, inputs, 3, clamp=config.clamp, chance=chance)
        self.conv1 = Conv(inputs, outputs, 3, down=2, clamp=config.clamp, chance=chance)
        if config.architecture == "resnet":
            self.skip = Conv(inputs, outputs, 1, activate="linear", down=2, bias=False, chance=chance)
        self.first = side == config.size
        self.shortcut = config.architecture == "resnet"

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.fromrgb(x)
        if not self.shortcut:
            return cast(Tensor, self.conv1(self.conv0(x)))
        half = math.sqrt(0.5)
        return cast(Tensor, self.skip(x, half) + self.conv1(self.conv0(x), half))


class CriticHead(nn.Module):
    """The last convolution and two fully connected layers, at side 4."""

    def __init__(self, config: CriticConfig, chance: torch.Generator | None) -> None:
        super().__init__()
        channels = config.channels(4)
        self.conv = Conv(channels, channels, 3, clamp=config.clamp, chance=chance)
        self.fc = Linear(channels * 16, channels, activate="lrelu", chance=chance)
        self.out = Linear(channels, 1, chance=chance)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.out(self.fc(self.conv(x).flatten(1))))


class Critic(nn.Module):
    """Images (n, 3, size, size) in [0, 1] -> logits (n,)."""

    def __init__(self, config: CriticConfig, chance: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        for side in config.sides:
            self.add_module(f"b{side}", CriticBlock(side, config, chance))
        self.b4 = CriticHead(config, chance)

    def forward(self, images: Images) -> Tensor:
        """One logit per image, shape (n,); positive means "looks like a photo"."""
        x = images * 2.0 - 1.0
        for side in self.config.sides:
            x = self.get_submodule(f"b{side}")(x)
        return cast(Tensor, self.b4(x))[:, 0]
