"""A small U-Net with group normalisation: an image and a time in, an image out.

Nothing in it mixes the images of a batch or draws a random number, so that per-example gradients exist: group instead
of batch normalisation (Wu and He 2018, arXiv:1803.08494), no dropout.

The form is that of Ho et al. 2020 (arXiv:2006.11239): residual blocks, one attention at the coarsest side, time as
sines and cosines, here scaling and shifting the normalised channels (Perez et al. 2018, arXiv:1709.07871) as in
Dhariwal and Nichol 2021 (arXiv:2105.05233). For speed pixels are first folded into channels, and the two halves
joined by sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import ConfigError
from fedface.validation import In, PositiveInt, checked

_MAX_FREQUENCY = 1000.0  # the highest frequency of the time embedding, in radians per unit of time
_MAX_WIDTH = 2**16  # channels of a side, and numbers of the time embedding
_MAX_SIDES = 8


@dataclass(frozen=True, kw_only=True)
@checked
class UNetConfig:
    """The architecture of a U-Net for images of any side that its patches and halvings divide.

    It may be untrusted: it is bounded before its numbers are multiplied or memory is allocated.
    """

    width: Annotated[int, In(f"[1, {_MAX_WIDTH}]")] = 64  # channels at the finest side
    # Channels of each side, in widths, finest first.
    multipliers: tuple[Annotated[float, In("(0, 1024]")], ...] = (1.0, 1.5)
    blocks: Annotated[int, In("[1, 64]")] = 1  # residual blocks at each side of each half
    patch: PositiveInt = 2  # pixels per side that are folded into channels first
    group: PositiveInt = 8  # channels normalised together; divides every side's channels
    time_width: Annotated[int, In(f"[1, {_MAX_WIDTH}]")] = 64  # width of the time embedding, even

    def __post_init__(self) -> None:
        if self.time_width % 2:
            raise ConfigError(f"time_width must be even, got {self.time_width}")
        if not self.multipliers:
            raise ConfigError("multipliers must name at least one side, got none")
        if len(self.multipliers) > _MAX_SIDES:
            raise ConfigError(
                f"multipliers must name at most {_MAX_SIDES} sides, got {len(self.multipliers)}"
            )
        for channels in self.channels:
            if channels < self.group or channels % self.group:
                raise ConfigError(
                    f"every side's channels must be a multiple of group {self.group}, got {channels}"
                )
            if channels > _MAX_WIDTH:
                raise ConfigError(f"every side's channels must be at most {_MAX_WIDTH}, got {channels}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each side, finest first."""
        return tuple(round(self.width * times) for times in self.multipliers)

    @property
    def divisor(self) -> int:
        """What an image's side must be a multiple of."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


class TimeEmbedding(nn.Module):
    """Times (n,) in [0, 1] -> (n, time_width): sines and cosines, then two layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Geometrically spaced from 1 to the highest.
        frequencies = torch.exp(torch.linspace(0.0, math.log(_MAX_FREQUENCY), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies.to(times.dtype)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return functional.silu(self.second(functional.silu(self.first(waves))))


class ResidualBlock(nn.Module):
    """Normalise, convolve, normalise under the time's scale and shift, convolve; added to the input."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm0 = nn.GroupNorm(inputs // config.group, inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(config.time_width, 2 * outputs)
        self.norm1 = nn.GroupNorm(outputs // config.group, outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Features (n, inputs, h, w) and time (n, time_width) -> (n, outputs, h, w)."""
        y = self.conv0(functional.silu(self.norm0(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(functional.silu(self.norm1(y) * (1.0 + scale) + shift))
        return cast(Tensor, self.skip(x) + y)


class Attention(nn.Module):
    """Every position looks at every other, one head; added to the input."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // config.group, channels)
        self.ask = nn.Conv2d(channels, 3 * channels, 1)
        self.answer = nn.Conv2d(channels, channels, 1)
        self.scale = 1.0 / math.sqrt(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        query, key, value = self.ask(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(query.transpose(1, 2) @ key * self.scale, dim=2)
        seen = (value @ weights.transpose(1, 2)).reshape(x.shape)
        return cast(Tensor, x + self.answer(seen))


class UNet(nn.Module):
    """Images (n, 3, s, s) and times (n,) -> images (n, 3, s, s); the start is the zero map."""

    def __init__(self, config: UNetConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        sides = config.channels
        self.time = TimeEmbedding(config.time_width)
        self.enter = nn.Conv2d(3 * config.patch**2, sides[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, channels in enumerate(sides):
            finer = sides[max(0, i - 1)]
            inputs = [finer] + [channels] * (config.blocks - 1)
            outputs = [channels] * (config.blocks - 1) + [finer]
            self.down.append(nn.ModuleList(ResidualBlock(n, channels, config) for n in inputs))
            self.up.append(nn.ModuleList(ResidualBlock(channels, n, config) for n in outputs))
        self.attention = Attention(sides[-1], config)
        self.middle = ResidualBlock(sides[-1], sides[-1], config)
        self.norm = nn.GroupNorm(sides[0] // config.group, sides[0])
        self.leave = nn.Conv2d(sides[0], 3 * config.patch**2, 3, padding=1)
        self._initialise(rng)

    def _initialise(self, rng: torch.Generator | None) -> None:
        """Weights of variance 1 / inputs, biases 0; what ends a residual sum starts at 0."""
        last = {self.leave, self.attention.answer}
        last |= {module.conv1 for module in self.modules() if isinstance(module, ResidualBlock)}
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    std = 0.0 if module in last else 1.0 / math.sqrt(module.weight[0].numel())
                    module.weight.normal_(0.0, 1.0, generator=rng).mul_(std)
                    cast(Tensor, module.bias).zero_()

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Images (n, 3, s, s) and times (n,) in [0, 1] -> (n, 3, s, s)."""
        time = self.time(times)
        x = self.enter(functional.pixel_unshuffle(x, self.config.patch))
        passed: list[Tensor] = []
        for i, blocks in enumerate(self.down):
            if i:
                x = functional.avg_pool2d(x, 2)
            for block in cast(nn.ModuleList, blocks):
                x = block(x, time)
            passed.append(x)
        x = self.middle(self.attention(x), time)
        for i in reversed(range(len(self.up))):
            # A half of the variance from each: the sum of the two halves keeps the scale.
            x = (x + passed[i]) * math.sqrt(0.5)
            for block in cast(nn.ModuleList, self.up[i]):
                x = block(x, time)
            if i:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.leave(functional.silu(self.norm(x)))
        return functional.pixel_shuffle(x, self.config.patch)
