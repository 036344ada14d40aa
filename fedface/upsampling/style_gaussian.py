"""Styles as a normal distribution through a leaky ReLU, so that a search may move each style on its own.

A mapping network maps one latent to one style; PULSE searches one style for each input of the generator, each as
plausible as the mapping's own.

Source: Menon et al. 2020 (arXiv:2003.03808), section 3.2, and its published code for the leaky ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.tensor_types import Latents, Styles


@dataclass(frozen=True)
class StyleGaussian:
    """A normal distribution of styles before the last leaky ReLU of the mapping, coordinate by coordinate."""

    mean: Tensor  # (v,)
    std: Tensor  # (v,)
    slope: float = 0.2  # of that leaky ReLU, > 0; 1 where the mapping ends with none

    def styles(self, latents: Tensor) -> Styles:
        """Latents (n, k, v) -> styles (n, k, v): LeakyReLU of latents * std + mean."""
        return F.leaky_relu(latents * self.std + self.mean, self.slope)

    def latents(self, styles: Styles) -> Tensor:
        """The way back: styles (n, k, v) -> latents (n, k, v), 0 in coordinates that never vary."""
        apart = F.leaky_relu(styles, 1.0 / self.slope) - self.mean
        return torch.where(self.std > 0, apart / self.std, 0.0)


def fit_style_gaussian(
    mapping: Callable[[Latents], Styles],
    latent_width: int,
    *,
    samples: int,
    stream: torch.Generator,
    slope: float = 0.2,
) -> StyleGaussian:
    """Fit the distribution of a mapping's styles with its last leaky ReLU undone.

    The standard deviation is unbiased. The gain behind that ReLU (sqrt 2 in StyleGAN2) does not matter: a leaky ReLU
    is homogeneous.

    Args:
        mapping: Latents (n, z) -> styles (n, k, v), equal for all k.
        latent_width: z.
        samples: How many latents to sample, >= 2.
        stream: Of the latents.
        slope: Of the last leaky ReLU, > 0 (`Generator.style_slope`); 1 where there is none.
    """
    total = square = torch.zeros((), dtype=torch.float64)
    # The latents of a flow are whole pictures: fewer of them at once.
    at_once = min(10_000, max(1, 2**23 // latent_width))
    with torch.no_grad():
        for start in range(0, samples, at_once):
            latents = torch.randn(min(at_once, samples - start), latent_width, generator=stream)
            styles = mapping(latents)[:, 0]
            before = F.leaky_relu(styles, 1.0 / slope).double()
            total = total + before.sum(dim=0)
            square = square + before.square().sum(dim=0)
    mean = total / samples
    variance = (square - samples * mean.square()).clamp(min=0) / (samples - 1)
    return StyleGaussian(mean.to(styles.dtype), variance.sqrt().to(styles.dtype), slope)
