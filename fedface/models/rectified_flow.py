"""Rectified flow: straight-ish paths from noise to pictures, behind the three verbs of every generator.

Called from training/, upsampling/, audits/. A network learns the velocity v(x, t) that carries standard
normal noise (t = 0) to pictures (t = 1) along x_t = (1 - t) noise + t picture, by regression on
picture - noise. A picture is made by following the velocity from t = 0 to 1; because that is an ordinary
differential equation, following it backwards takes a photo to its latent.

Sources: Liu et al. 2022 (arXiv:2209.03003), equations 1 and 2; Lipman et al. 2022 (arXiv:2210.02747).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.generator_protocol import sample
from fedface.models.unet import UNet, UNetConfig
from fedface.tensor_types import Images, Latents, Styles
from fedface.validation import In, checked


@dataclass(frozen=True, kw_only=True)
@checked
class FlowConfig:
    """The shape of a flow; equal configs have weights that can be summed."""

    size: Literal[16, 32, 64] = 32  # height and width of images in pixels
    width: int = 64  # channels at the finest side
    multipliers: tuple[float, ...] = (1.0, 1.5)  # channels of each side, in widths, finest first
    blocks: int = 1  # residual blocks at each side of each half
    patch: int = 2  # pixels per side that are folded into channels first
    group: int = 8  # channels normalised together
    time_width: int = 64  # width of the time embedding
    # Midpoint steps from noise to picture; two evaluations of the network each.
    steps: Annotated[int, In("[1, 1000]")] = 8

    def __post_init__(self) -> None:
        if self.size % self.unet.divisor:
            raise ConfigError(
                f"size must be a multiple of patch times all halvings, {self.unet.divisor}, got {self.size}"
            )

    @property
    def unet(self) -> UNetConfig:
        """The shape of the network that knows the velocity."""
        return UNetConfig(
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            patch=self.patch,
            group=self.group,
            time_width=self.time_width,
        )


class RectifiedFlow(nn.Module):
    """A `models.contracts.Generator` whose latents are noise pictures; fill it with `fedface.models.checkpoint`."""

    def __init__(self, config: FlowConfig, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet, rng)

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.config.size

    @property
    def latent_width(self) -> int:
        """Width of a latent: one number for each colour of each pixel."""
        return 3 * self.config.size**2

    @property
    def style_inputs(self) -> int:
        """1: a flow takes its noise whole."""
        return 1

    @property
    def noise_sides(self) -> tuple[int, ...]:
        """None: all chance is in the latent."""
        return ()

    @property
    def style_slope(self) -> float:
        """1: no leaky ReLU ends the mapping, which is the identity."""
        return 1.0

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """The velocity; see `velocity`."""
        return cast(Tensor, self.unet(x, times))

    def velocity(self, x: Tensor, times: Tensor) -> Tensor:
        """Where a point moves: (n, 3, s, s) in [-1, 1] plus noise, times (n,) in [0, 1] -> (n, 3, s, s)."""
        return self(x, times)  # type: ignore[no-any-return]

    def map(self, latents: Latents) -> Styles:
        """Standard normal latents (n, 3 s s) -> styles (n, 1, 3 s s), the same numbers."""
        return latents[:, None]

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """Move styles towards their mean, zero: psi = 1 leaves them, psi = 0 gives the mean."""
        return psi * styles

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, 1, 3 s s) -> images (n, 3, size, size), nominally in [0, 1], not clamped.

        Differentiable in styles and weights; keeps every step's activations for that.

        Args:
            styles: Noise pictures, flat.
            noise: Nothing: there are no noise maps.

        Raises:
            ValueError: Noise maps were given.
        """
        if noise:
            raise ValueError(f"a flow takes no noise maps, got {len(noise)}")
        return (self._follow(self._unflat(styles[:, 0]), 0.0, 1.0, self.config.steps) + 1.0) / 2.0

    def invert(self, images: Images, *, steps: int | None = None) -> Latents:
        """The latents whose pictures these are: the same path backwards, up to the error of its steps.

        Args:
            images: (n, 3, size, size) in [0, 1].
            steps: Midpoint steps, >= 1; the config's if None. More steps come closer to the exact inverse.

        Returns:
            Latents (n, 3 s s); standard normal as far as the flow knows such pictures.
        """
        count = self.config.steps if steps is None else steps
        if count < 1:
            raise ValueError(f"steps must be at least 1, got {count}")
        return self._follow(2.0 * images - 1.0, 1.0, 0.0, count).flatten(1)

    def sample(self, count: int, rng: torch.Generator, *, psi: float = 1.0, batch: int = 64) -> Images:
        """Draw `count` pictures without gradients, clamped to [0, 1], shape (count, 3, size, size)."""
        return sample(self, count, rng, psi=psi, batch=batch)

    def _unflat(self, latents: Latents) -> Tensor:
        return latents.reshape(-1, 3, self.config.size, self.config.size)

    def _follow(self, x: Tensor, start: float, end: float, steps: int) -> Tensor:
        """Integrate dx/dt = v(x, t) from `start` to `end` with the midpoint rule, error of order 1 / steps^2."""
        stride = (end - start) / steps
        for step in range(steps):
            now = x.new_full((len(x),), start + step * stride)
            half = x + 0.5 * stride * self.velocity(x, now)
            x = x + stride * self.velocity(half, now + 0.5 * stride)
        return x
