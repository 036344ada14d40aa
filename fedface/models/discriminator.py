"""The StyleGAN2 discriminator: an image -> one logit, large for photos and small for generated images.

Sources: Karras et al. 2020 (arXiv:1912.04958, arXiv:2006.06676); parameter names as there. Minibatch statistics
(Karras et al. 2018, arXiv:1710.10196, section 3) are off by default: they couple photos, so that a photo's
clipped gradient would depend on the rest of the batch, which voids the privacy guarantee. They are supported for
published discriminators that use them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.stylegan_layers import (
    ChannelBase,
    ChannelPyramid,
    Classes,
    Conv,
    ConvOptions,
    Layers,
    Linear,
    Width,
    binomial_filter,
    checked_labels,
    downsample,
    unit_mean_square,
)
from fedface.tensor_types import Images
from fedface.validation import NonNegativeInt, PositiveFloat, PowerOfTwo, checked


@dataclass(frozen=True, kw_only=True)
@checked
class DiscriminatorConfig(ChannelPyramid):
    """The architecture of a discriminator; equal configs have weights that can be summed."""

    size: Annotated[int, PowerOfTwo(8, 1024)] = 32  # height and width of images in pixels
    channel_base: ChannelBase = 1024  # channels at side r are min(channel_base / r, channel_max)
    channel_max: Width = 64
    architecture: Literal["resnet", "orig", "skip"] = "resnet"
    # Activations are kept within +- this; published for half precision: 256.
    clamp: PositiveFloat | None = None
    minibatch_group: NonNegativeInt = 0  # images whose standard deviation is an input; 0 is off, published 4
    minibatch_channels: Width = 1  # how many such statistics
    classes: Classes = 0  # of a class-conditional discriminator; 0 if unconditional
    mapping_layers: Layers = 8  # fully connected layers for the label, where there are classes

    def __post_init__(self) -> None:
        if self.minibatch_group and self.channels(4) % self.minibatch_channels:
            raise ConfigError(
                f"minibatch_channels must divide the {self.channels(4)} channels at side 4, "
                f"got {self.minibatch_channels}"
            )


def minibatch_std(x: Tensor, group: int, channels: int) -> Tensor:
    """The standard deviation within a group of images, averaged over each of f parts of the channels.

    (n, c, h, w) -> (n, f, h, w), equal within a group and at every pixel. Image i is in group i mod (n / group), as
    published. Source: Karras et al. 2018 (arXiv:1710.10196), section 3.

    Args:
        x: Activations (n, c, h, w).
        group: Images in a group, >= 1; a smaller batch is one group. ConfigError for a batch that it does not divide.
        channels: f, divides c.
    """
    n, c, h, w = x.shape
    members = min(group, n)
    if n % members:
        raise ConfigError(
            f"a discriminator with minibatch_group {group} scores batches of at most {group} or a multiple of it, "
            f"got {n}"
        )
    y = x.reshape(members, n // members, channels, c // channels, h, w)
    variance = (y - y.mean(dim=0)).square().mean(dim=0)
    deviation = torch.sqrt(variance + 1e-8).mean(dim=(2, 3, 4))
    return deviation.repeat(members, 1)[:, :, None, None].expand(-1, -1, h, w)


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the sides: orig, with a shortcut (resnet), or with image inputs (skip)."""

    filter: Tensor

    def __init__(self, side: int, config: DiscriminatorConfig, rng: torch.Generator | None) -> None:
        super().__init__()
        inputs, outputs = config.channels(side), config.channels(side // 2)
        self.has_fromrgb = side == config.size or config.architecture == "skip"
        if self.has_fromrgb:
            self.fromrgb = Conv(3, inputs, 1, ConvOptions(clamp=config.clamp), rng=rng)
        self.conv0 = Conv(inputs, inputs, 3, ConvOptions(clamp=config.clamp), rng=rng)
        self.conv1 = Conv(inputs, outputs, 3, ConvOptions(down=2, clamp=config.clamp), rng=rng)
        if config.architecture == "resnet":
            self.skip = Conv(inputs, outputs, 1, ConvOptions(activate="linear", down=2, bias=False), rng=rng)
        self.shortcut, self.halved = config.architecture == "resnet", config.architecture == "skip"
        self.register_buffer("filter", binomial_filter(), persistent=False)

    def forward(self, x: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and the image at this side -> both at half of it; only "skip" halves the image."""
        if self.has_fromrgb:
            features = self.fromrgb(images)
            x = features if x is None else x + features
        if self.halved:
            images = downsample(images, self.filter)
        if self.shortcut:
            half = math.sqrt(0.5)
            return self.skip(x, half) + self.conv1(self.conv0(x), half), images
        return self.conv1(self.conv0(x)), images


class DiscriminatorEpilogue(nn.Module):
    """The last convolution and two fully connected layers, at side 4."""

    def __init__(self, config: DiscriminatorConfig, rng: torch.Generator | None) -> None:
        super().__init__()
        channels = config.channels(4)
        self.group, self.shares = config.minibatch_group, config.minibatch_channels
        self.conv = Conv(
            channels + (self.shares if self.group else 0),
            channels,
            3,
            ConvOptions(clamp=config.clamp),
            rng=rng,
        )
        self.fc = Linear(channels * 16, channels, activate="lrelu", rng=rng)
        self.out = Linear(channels, channels if config.classes else 1, rng=rng)
        self.has_fromrgb = config.architecture == "skip"
        if self.has_fromrgb:
            self.fromrgb = Conv(3, channels, 1, rng=rng)  # published without a clamp

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """(n, c, 4, 4) -> (n, 1), or (n, c) where there are classes."""
        if self.has_fromrgb:
            x = x + self.fromrgb(images)
        if self.group:
            x = torch.cat([x, minibatch_std(x, self.group, self.shares)], dim=1)
        return cast(Tensor, self.out(self.fc(self.conv(x).flatten(1))))


class LabelMapping(nn.Module):
    """Labels -> projection vectors of their classes."""

    def __init__(self, config: DiscriminatorConfig, rng: torch.Generator | None) -> None:
        super().__init__()
        self.classes, self.layers = config.classes, config.mapping_layers
        width = config.channels(4)
        self.embed = Linear(config.classes, width, rng=rng)
        for i in range(config.mapping_layers):
            layer = Linear(width, width, activate="lrelu", lr_multiplier=0.01, rng=rng)
            self.add_module(f"fc{i}", layer)

    def forward(self, labels: Tensor | None) -> Tensor:
        """(n, classes) -> (n, c)."""
        labels = checked_labels(labels, self.classes).to(self.embed.weight.dtype)
        x = unit_mean_square(self.embed(labels))
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        return x


class Discriminator(nn.Module):
    """Images (n, 3, size, size) in [0, 1] -> logits (n,)."""

    def __init__(self, config: DiscriminatorConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        for side in reversed(config.sides[1:]):
            self.add_module(f"b{side}", DiscriminatorBlock(side, config, rng))
        if config.classes:
            self.mapping = LabelMapping(config, rng)
        self.b4 = DiscriminatorEpilogue(config, rng)

    def forward(self, images: Images, labels: Tensor | None = None) -> Tensor:
        """One logit per image, shape (n,); positive means real, of its class where there are classes.

        Args:
            images: (n, 3, size, size) in [0, 1].
            labels: (n, classes), usually one-hot, for a discriminator with classes; None for one without.

        Raises:
            ConfigError: Labels are missing, unexpected or of another width, or the batch cannot be split in groups.
        """
        if labels is not None and not self.config.classes:
            raise ConfigError("this discriminator has no classes, got labels; pass images alone")
        x, scaled = None, images * 2.0 - 1.0
        for side in reversed(self.config.sides[1:]):
            x, scaled = self.get_submodule(f"b{side}")(x, scaled)
        features = cast(Tensor, self.b4(x, scaled))
        if not self.config.classes:
            return features[:, 0]
        projection = cast(Tensor, self.mapping(labels))
        return (features * projection).sum(dim=1) / math.sqrt(projection.shape[1])
