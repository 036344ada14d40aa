"""The interface of all generators, so that upsamplers and audits are independent of the architecture.

The three methods are those of Karras et al. 2019 (arXiv:1812.04948): a mapping to styles, truncation towards the mean
style, and synthesis. What needs these methods alone, such as sampling, is defined here for all
generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedface.tensor_types import Images, Latents, Styles


class Generator(Protocol):
    """Latents -> styles -> images. Implementations are torch modules; the caller freezes the weights."""

    @property
    def size(self) -> int:
        """Height and width of the images, a power of two."""
        ...

    @property
    def latent_width(self) -> int:
        """Width z of one latent; latents are standard normal."""
        ...

    @property
    def style_inputs(self) -> int:
        """How many styles one image takes, k = 2 * log2(size) - 2."""
        ...

    @property
    def noise_sides(self) -> tuple[int, ...]:
        """Side of each square noise map, in the order in which synthesis adds them."""
        ...

    @property
    def style_slope(self) -> float:
        """Slope below zero of the leaky ReLU that ends `map`, > 0: 0.2 for StyleGANs, 1 where none does.

        A search that models styles as a normal distribution undoes it first (Menon et al. 2020, section 3.2).
        """
        ...

    def map(self, latents: Latents) -> Styles:
        """Standard normal latents (n, z) -> styles (n, k, v), the same style repeated k times."""
        ...

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """Pull styles towards their mean: psi = 1 leaves them, psi = 0 is the mean style."""
        ...

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, k, v) -> images (n, 3, size, size), sRGB nominally in [0, 1], not clamped.

        Args:
            styles: One style per input; they may differ between inputs.
            noise: One map (n or 1, 1, side, side) per entry of `noise_sides`; None means the fixed maps that
                belong to the weights.
        """
        ...


def sample(
    generator: Generator, count: int, rng: torch.Generator, *, psi: float = 1.0, batch: int = 64
) -> Images:
    """Sample images without gradients, with the generator's fixed noise.

    Args:
        count: How many images, >= 0.
        rng: Where the latents are drawn from.
        psi: How far styles stay from their mean, see `Generator.truncate`.
        batch: Images at once, >= 1; bounds the memory, does not change the result.

    Returns:
        (count, 3, size, size), clamped to [0, 1].
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
    """Styles (n, k, v) moved towards their mean (v,): the first `cutoff` inputs, or all where it is None."""
    moved = mean.lerp(styles, psi)
    return moved if cutoff is None else torch.cat([moved[:, :cutoff], styles[:, cutoff:]], dim=1)
