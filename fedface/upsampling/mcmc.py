"""Markov chains, many at once, for a posterior whose data term is a sum of squares.

The state of a chain is a vector x with a standard normal prior; the data term at noise s is E(x) / s^2 with
E(x) = |A G(x) - y|^2 / 2, so that E of one point serves every noise level.

One transition is a leapfrog trajectory, accepted or rejected as a whole. With one leapfrog step it is the
Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996); with several it is Hamiltonian Monte Carlo (Neal
2011, arXiv:1206.1901). A metric M = I + E[J'J] / s^2 turns directions that photos fix (posterior spread about s / |J|)
and those they leave free (spread 1) into directions of about equal spread. It is the Gauss-Newton matrix of Girolami &
Calderhead (2011), but averaged over the prior and the same everywhere, as Titsias (2023, arXiv:2305.14442) averages
over the posterior: a metric of the place itself changes within a fraction of a step (docs/posterior.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedface.tensor_types import Images, LowImages

DIFFERENCE = 1e-2  # of the finite differences behind a metric, in prior standard deviations


class PerChainRng:
    """One random stream for each chain, so that a chain does not depend on which others run beside it."""

    def __init__(self, streams: Sequence[torch.Generator]) -> None:
        self._streams = streams

    def normals(self, *shape: int) -> Tensor:
        """Standard normal numbers, (n, *shape)."""
        return torch.stack([torch.randn(*shape, generator=stream) for stream in self._streams])

    def uniforms(self) -> Tensor:
        """Numbers uniform in [0, 1), (n,)."""
        return torch.cat([torch.rand(1, generator=stream) for stream in self._streams])


class Point(NamedTuple):
    """The states of n chains."""

    x: Tensor  # (n, d) prior standard normal
    images: Images  # (n, 3, s, s) clamped to [0, 1], generated from x
    energy: Tensor  # (n,) E(x) = |A G(x) - y|^2 / 2, summed over the measured values
    slope: Tensor  # (n, d) gradient of E

    def potential(self, s: float) -> Tensor:
        """Minus the logarithm of the target density up to a constant, (n,)."""
        return self.energy / s**2 + self.x.square().sum(dim=1) / 2

    def gradient(self, s: float) -> Tensor:
        """Of the potential, (n, d)."""
        return self.slope / s**2 + self.x

    def where(self, chosen: Tensor, other: Point) -> Point:
        """This point for the chains that `chosen`, (n,) bool, marks; the other point for the rest."""
        return Point(
            *(
                torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), mine, others)
                for mine, others in zip(self, other, strict=True)
            )
        )


class ForwardModel:
    """A generator as a function of flat states, beside what was measured."""

    def __init__(
        self, draw: Callable[[Tensor], Images], measure: Callable[[Images], LowImages], target: LowImages
    ) -> None:
        self._draw = draw  # states (n, d) -> images (n, 3, s, s), not clamped
        self._measure = measure
        self.target = target  # (n, 3, lh, lw)

    def values(self, x: Tensor) -> Tensor:
        """What would be measured, (n, m)."""
        return self._measure(self._draw(x).clamp(0, 1)).flatten(1)

    def point(self, x: Tensor) -> Point:
        """Evaluate states, with the gradient."""
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            images = self._draw(inputs).clamp(0, 1)
            energy = (self._measure(images) - self.target).square().flatten(1).sum(dim=1) / 2
            (slope,) = torch.autograd.grad(energy.sum(), inputs)
        return Point(inputs.detach(), images.detach(), energy.detach(), slope)

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """Rows J'w of the Jacobian J of `values`: weights (n, m) -> (n, d)."""
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            (row,) = torch.autograd.grad((self.values(inputs) * weights).sum(), inputs)
        return row


@dataclass(frozen=True)
class Metric:
    """M = I + V diag(stiffness / s^2) V', V orthonormal; one for all chains."""

    directions: Tensor  # (d, r), columns are V; r = 0 is the identity
    stiffness: Tensor  # (r,) squared change of the measured values along each, >= 0

    @staticmethod
    def identity(width: int) -> Metric:
        """No metric: every direction counts as if photos left it free."""
        return Metric(torch.zeros(width, 0), torch.zeros(0))

    def narrow(self, rows: Tensor, s: float) -> Tensor:
        """M^(-1/2) rows, (n, d): unit steps become about as long as the posterior is wide in their direction."""
        if not len(self.stiffness):
            return rows
        shrink = torch.rsqrt(1 + self.stiffness / s**2) - 1
        return rows + ((rows @ self.directions) * shrink) @ self.directions.mT


def gauss_newton(measured: ForwardModel, x: Tensor, rank: int, rng: torch.Generator) -> Metric:
    """The mean of J'J over states, along the directions in which it is largest.

    J is the Jacobian of the measured values. With no more coordinates than `rank` the mean is taken as it is, by
    finite differences; otherwise in the space that a random sketch of J' spans (Halko et al. 2011, arXiv:0909.4061).

    Args:
        measured: The generator; the photo plays no part.
        x: States to average over, (n, d), n >= 1.
        rank: Most directions, >= 1.
    """
    n, d = x.shape
    with torch.no_grad():
        here = measured.values(x)
    if d <= rank:
        basis = torch.eye(d)
    else:
        pulled = []
        for _ in range(-(-2 * rank // n)):  # twice as many rows as directions are kept: the sketch is random
            pulled.append(measured.pull(x, torch.randn(here.shape, generator=rng)))
        basis = torch.linalg.svd(torch.cat(pulled), full_matrices=False).Vh[:rank].mT
    with torch.no_grad():
        changes = [
            (measured.values(x + DIFFERENCE * basis[:, i]) - here) / DIFFERENCE for i in range(basis.shape[1])
        ]
    jacobian = torch.stack(changes, dim=2).flatten(0, 1)
    stiffness, turned = torch.linalg.eigh(jacobian.mT @ jacobian / n)
    return Metric(basis @ turned, stiffness.clamp(min=0))


class Transition(NamedTuple):
    """The result of one move."""

    point: Point
    acceptance_probability: Tensor  # (n,) in [0, 1]


def hmc_step(
    measured: ForwardModel,
    point: Point,
    metric: Metric,
    s: float,
    *,
    step: Tensor,
    leapfrog_steps: int,
    rngs: PerChainRng,
) -> Transition:
    """One Metropolis-adjusted trajectory; it leaves the posterior at noise s exactly as it is.

    Args:
        measured: The generator and the photo.
        point: Where the chains stand.
        metric: Constant along the trajectory, and independent of it.
        s: Noise of the measurement at this level.
        step: Length of each leapfrog step, (n,), in posterior standard deviations.
        leapfrog_steps: How many, >= 1; 1 is Langevin.
    """
    momentum = rngs.normals(point.x.shape[1]).to(point.x)
    before = point.potential(s) + momentum.square().sum(dim=1) / 2
    length, at = step[:, None], point
    for _ in range(leapfrog_steps):
        momentum = momentum - length / 2 * metric.narrow(at.gradient(s), s)
        at = measured.point(at.x + length * metric.narrow(momentum, s))
        momentum = momentum - length / 2 * metric.narrow(at.gradient(s), s)
    after = at.potential(s) + momentum.square().sum(dim=1) / 2
    probability = torch.nan_to_num((before - after).clamp(max=0).exp(), nan=0.0)
    accepted = rngs.uniforms().to(probability) < probability
    return Transition(at.where(accepted, point), probability)


def ula_step(measured: ForwardModel, point: Point, s: float, *, step: float, rngs: PerChainRng) -> Transition:
    """One unadjusted Langevin step of length `step`: x - step^2 / 2 gradient + step * normal; always accepted."""
    normals = rngs.normals(point.x.shape[1]).to(point.x)
    at = measured.point(point.x - step**2 / 2 * point.gradient(s) + step * normals)
    return Transition(at, point.x.new_ones(len(point.x)))
