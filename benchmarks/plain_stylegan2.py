"""A slow and obvious StyleGAN2 with the weights of ours, and the random weights that benchmarks search.

Used by `latent_search` and `side_by_side`. Written from the paper (Karras et al. 2020, arXiv:1912.04958): one modulated
and demodulated weight per image and a grouped convolution, resampling by zero insertion, padding and convolution,
float32, NCHW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fedface.models.checkpoint import load_gan
from fedface.models.stylegan2 import Block, StyledConv, StyleGAN2, StyleGAN2Config, ToRGB
from fedface.randomness import Streams
from fedface.tensor_types import Images, Latents, Styles


def zero_inserted(x: Tensor, kernel: Tensor, *, up: int, pad: tuple[int, int]) -> Tensor:
    """Insert zeros between pixels, pad, and filter each channel: (n, c, h, w) -> (n, c, about up * h, ...)."""
    n, c, h, w = x.shape
    x = x.reshape(n * c, 1, h, 1, w, 1)
    x = functional.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n * c, 1, h * up, w * up)
    x = functional.pad(x, (*pad, *pad))
    x = functional.conv2d(x, (kernel * up**2)[None, None])
    return x.reshape(n, c, *x.shape[2:])


def plain_modulated(weight: Tensor, style: Tensor, *, demodulate: bool) -> Tensor:
    """The weights of the paper's equations 1 and 3, one per image: (n, o, i, k, k)."""
    weights = weight[None] * style[:, None, :, None, None]
    if demodulate:
        weights = weights * (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    return weights


class PlainGenerator:
    """A slow and obvious StyleGAN2 (skip form) with the weights of a `StyleGAN2`."""

    def __init__(self, weights: StyleGAN2) -> None:
        self.weights = weights.requires_grad_(False)
        self.size, self.latent_width = weights.size, weights.latent_width
        self.style_inputs, self.noise_sides = weights.style_inputs, weights.noise_sides
        self.style_slope = weights.style_slope

    def map(self, latents: Latents) -> Styles:
        """As the generator's."""
        return self.weights.map(latents.to(self.weights.mapping.w_avg.device)).to(latents.device)

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """As the generator's."""
        return self.weights.truncate(styles.to(self.weights.mapping.w_avg.device), psi).to(styles.device)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, k, v) -> images (n, 3, size, size)."""
        home, place = styles.device, self.weights.mapping.w_avg.device
        styles = styles.to(place)
        noise = None if noise is None else [plane.to(place) for plane in noise]
        used, picture = 0, torch.zeros(1)
        blocks = [
            cast(Block, self.weights.synthesis.get_submodule(f"b{s}")) for s in self.weights.config.sides
        ]
        x = blocks[0].const.expand(styles.shape[0], -1, -1, -1)
        for block in blocks:
            for conv in [block.conv1] if block.first else [block.conv0, block.conv1]:
                x = self._convolve(conv, x, styles[:, used], None if noise is None else noise[used])
                used += 1
            rgb = self._colours(block.torgb, x, styles[:, used])
            if not block.first:
                rgb = rgb + zero_inserted(picture, block.filter, up=2, pad=(2, 1))
            picture = rgb
        return ((picture + 1) / 2).to(home)

    def _convolve(self, layer: StyledConv, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        weights = plain_modulated(layer.weight, layer.affine(style), demodulate=True)
        n, outputs, inputs = weights.shape[:3]
        x = x.reshape(1, n * inputs, *x.shape[2:])
        if layer.up == 2:
            weights = weights.transpose(1, 2).reshape(n * inputs, outputs, 3, 3)
            x = functional.conv_transpose2d(x, weights, stride=2, groups=n)
            x = x.reshape(n, outputs, *x.shape[2:])
            x = zero_inserted(x, layer.filter * 4, up=1, pad=(1, 1))
        else:
            x = functional.conv2d(x, weights.reshape(n * outputs, inputs, 3, 3), padding=1, groups=n)
            x = x.reshape(n, outputs, *x.shape[2:])
        x = x + (layer.noise_const if noise is None else noise) * layer.noise_strength
        return functional.leaky_relu(x + layer.bias[:, None, None], 0.2) * 2**0.5

    def _colours(self, layer: ToRGB, x: Tensor, style: Tensor) -> Tensor:
        weights = plain_modulated(layer.weight, layer.affine(style) * layer.gain, demodulate=False)
        n, _, inputs = weights.shape[:3]
        y = functional.conv2d(
            x.reshape(1, n * inputs, *x.shape[2:]), weights.reshape(n * 3, inputs, 1, 1), groups=n
        )
        return y.reshape(n, 3, *x.shape[2:]) + layer.bias[:, None, None]


def searched(size: int, base: int) -> StyleGAN2:
    """The base checkpoint at its own size; otherwise random weights at the published widths.

    Random biases and noise strengths are about as large as trained ones.
    """
    if size == 32:
        return load_gan().network(StyleGAN2)
    config = StyleGAN2Config(
        size=size,
        latent_width=512,
        style_width=512,
        mapping_layers=8,
        channel_base=base,
        channel_max=512,
    )
    rng = Streams(0).generator(f"benchmark/{size}/{base}")
    generator = StyleGAN2(config, rng)
    with torch.no_grad():
        for layer in generator.synthesis.modules():
            if isinstance(layer, StyledConv):
                layer.noise_strength.fill_(0.05)
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=rng))
    return generator
