"""What every generator family promises, so that upsamplers and audits need not know which one they search.

Called from upsampling/, training/ and audits/. The three verbs are those of Karras et al. 2019
(arXiv:1812.04948): a mapping to styles, truncation towards the mean style, and synthesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fedface.shapes import Images, Latents, Styles


class Generator(Protocol):
    """Latents -> styles -> images. Implementations are torch modules; weights are frozen by the searcher."""

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
