"""Generators and flows with posteriors in closed form, and a test of samples against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedface.randomness import Streams
from fedface.upsampling.degradation import Area

STREAMS = Streams(23)
HALVED = Area(2)  # 4 px -> 2 px: 12 measured values
SIDE = 4


def directions(count: int) -> Tensor:
    """Orthonormal columns in the space of images, (48, count)."""
    sampled = torch.randn(48, count, generator=STREAMS.generator("directions"))
    return torch.linalg.qr(sampled).Q


def measuring() -> Tensor:
    """`HALVED` as a matrix, (12, 48)."""
    return HALVED.apply(torch.eye(48).view(48, 3, SIDE, SIDE)).flatten(1).T.contiguous()


@dataclass(frozen=True)
class Normal:
    """A normal distribution of vectors."""

    mean: Tensor  # (d,)
    covariance: Tensor  # (d, d)

    def given(self, matrix: Tensor, s: float, seen: Tensor) -> Normal:
        """The distribution of a vector given `matrix` @ vector + noise of standard deviation s = `seen`."""
        cross = self.covariance.double() @ matrix.double().T
        total = matrix.double() @ cross + s**2 * torch.eye(len(matrix), dtype=torch.float64)
        gain = torch.linalg.solve(total, cross.T).T
        mean = self.mean.double() + gain @ (seen - matrix @ self.mean).double()
        return Normal(mean, self.covariance.double() - gain @ cross.T)

    def whitened(self, samples: Tensor) -> Tensor:
        """Samples (n, d) whitened by this distribution: mean 0 and covariance I if they are its own."""
        root = torch.linalg.cholesky(self.covariance.double())
        return torch.linalg.solve_triangular(root, (samples.double() - self.mean.double()).T, upper=False).T


@dataclass(frozen=True)
class Agreement:
    """The deviation of samples from a distribution, relative to the largest that random variation explains."""

    mean: float  # largest |mean| of a whitened coordinate, over 4.5 standard errors
    covariance: (
        float  # largest |eigenvalue - 1| of the whitened covariance, over the edge for so many samples
    )

    @property
    def holds(self) -> bool:
        """Whether random variation explains all deviations."""
        return self.mean <= 1 and self.covariance <= 1


def agreement(samples: Tensor, known: Normal) -> Agreement:
    """Compare samples (n, d) with a distribution. The edge is where the spectrum of n whitened samples ends (Marchenko
    & Pastur 1967), and 5 of its standard deviations sqrt(2 / n) beyond.
    """
    white = known.whitened(samples)
    n, d = white.shape
    values = torch.linalg.eigvalsh(torch.cov(white.T))
    edge = (1 + (d / n) ** 0.5) ** 2 - 1 + 5 * (2 / n) ** 0.5
    return Agreement(
        float(white.mean(dim=0).abs().max()) * n**0.5 / 4.5, float((values - 1).abs().max()) / edge
    )


class LinearGenerator:
    """Images 0.5 + columns @ (latent, noise map): the posterior of its inputs is normal."""

    size, style_inputs, style_slope = SIDE, 1, 1.0

    def __init__(self, columns: Tensor, *, maps: int = 0) -> None:
        self.columns = columns  # (48, z + 16 maps)
        self.noise_sides: tuple[int, ...] = (SIDE,) * maps
        self.latent_width = columns.shape[1] - maps * SIDE**2

    def map(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents[:, None]

    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        """Towards zero."""
        return psi * styles

    def synthesize(self, styles: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """(n, 1, z) -> (n, 3, 4, 4)."""
        inputs = torch.cat([styles[:, 0], *(sampled.flatten(1) for sampled in noise or ())], dim=1)
        return (0.5 + inputs @ self.columns[:, : inputs.shape[1]].T).view(-1, 3, SIDE, SIDE)

    def inputs_of(self, images: Tensor) -> Tensor:
        """Back from pictures to latents and noise maps, (n, z + 16 maps)."""
        return (images.flatten(1) - 0.5).double() @ torch.linalg.pinv(self.columns.double()).T

    def prior(self) -> Normal:
        """Of latents and noise maps."""
        d = self.columns.shape[1]
        return Normal(torch.zeros(d), torch.eye(d))


class NormalFlow:
    """The exact velocity of a flow whose images, in [-1, 1], are normal around 0 with the given deviations."""

    size = SIDE

    def __init__(self, spreads: Tensor) -> None:
        self.axes, self.spreads = directions(48), spreads  # of each axis, (48,)

    def velocity(self, x: Tensor, times: Tensor) -> Tensor:
        """Towards E[picture | x]."""
        t = times[:, None]
        along = t * self.spreads**2 / ((1 - t) ** 2 + (t * self.spreads) ** 2)
        expected = (x.flatten(1) @ self.axes * along) @ self.axes.T
        return ((expected - x.flatten(1)) / (1 - t)).view_as(x)

    def prior(self) -> Normal:
        """Of pictures in [0, 1], (48,)."""
        half = self.spreads / 2
        return Normal(torch.full((48,), 0.5), (self.axes * half**2) @ self.axes.T)
