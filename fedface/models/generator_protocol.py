"""The interface of all generators, so that upsamplers and audits are independent of the architecture.

Mapping to styles, truncation towards the mean style and synthesis are those of Karras et al. 2019 (arXiv:1812.04948).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedface.tensor_types import Images, Latents, Styles


class Generator(Protocol):
    """Latents -> styles -> images. Implementations are torch modules; the caller freezes the weights."""

    size: int  # height and width of the images, a power of two
    latent_width: int  # z; latents are standard normal
    style_inputs: int  # k, how many styles one image takes; 2 * log2(size) - 2 for StyleGANs
    noise_sides: tuple[int, ...]  # side of each square noise map, in the order in which synthesis adds them
    # Slope below zero of the leaky ReLU that ends `map`, > 0: 0.2 for StyleGANs, 1 where none does. A search that
    # models styles as a normal distribution undoes it first (Menon et al. 2020, section 3.2).
    style_slope: float

    def map(self, latents: Latents) -> Styles:
        """Standard normal latents (n, z) -> styles (n, k, v), the same style repeated k times."""

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """Pull styles towards their mean: psi = 1 leaves them, psi = 0 is the mean style."""

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, k, v) -> images (n, 3, size, size), sRGB nominally in [0, 1], not clamped.

        Args:
            styles: One style per input; they may differ between inputs.
            noise: One map (n or 1, 1, side, side) per entry of `noise_sides`; None means the fixed maps that
                belong to the weights.

        Raises:
            ValueError: There are more or fewer styles or maps than the network has inputs for.
        """


def sample(
    generator: Generator, count: int, rng: torch.Generator, *, psi: float = 1.0, batch: int = 64
) -> Images:
    """Images without gradients, with the generator's fixed noise: (count, 3, size, size), clamped to [0, 1].

    Args:
        count: How many, >= 0.
        psi: See `Generator.truncate`.
        batch: Images at once, >= 1; bounds the memory, does not change the result.
    """
    latents = torch.randn(count, generator.latent_width, generator=rng, device=rng.device)
    with torch.no_grad():
        parts = [
            generator.synthesize(generator.truncate(generator.map(part), psi)).clamp(0.0, 1.0)
            for part in torch.split(latents, batch)
        ]
    return torch.cat(parts)


def draw_noise(generator: Generator, count: int, rng: torch.Generator) -> list[Tensor]:
    """Fresh standard normal noise maps for `count` images, each (count, 1, side, side), for `synthesize`."""
    return [
        torch.randn(count, 1, side, side, generator=rng, device=rng.device) for side in generator.noise_sides
    ]


def check_inputs(generator: Generator, styles: Styles, noise: Sequence[Tensor] | None) -> None:
    """Raises ValueError unless there are as many styles, and noise maps if any, as the generator takes."""
    if styles.shape[1] != generator.style_inputs:
        raise ValueError(
            f"styles must have shape (n, {generator.style_inputs}, v), got {tuple(styles.shape)}"
        )
    if noise is not None and len(noise) != len(generator.noise_sides):
        raise ValueError(f"noise must be {len(generator.noise_sides)} maps, got {len(noise)}")


def truncated(styles: Styles, mean: Tensor, psi: float, cutoff: int | None) -> Styles:
    """Styles (n, k, v) moved towards their mean (v,): the first `cutoff` (coarse) inputs, or all where it is None."""
    moved = mean.lerp(styles, psi)
    return moved if cutoff is None else torch.cat([moved[:, :cutoff], styles[:, cutoff:]], dim=1)
