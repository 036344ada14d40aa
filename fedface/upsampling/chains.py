"""Markov chains, many at once, towards a posterior whose data term is a sum of squares.

Called by `upsampling.langevin`. The state of a chain is a vector x with a standard normal prior; the data term
at noise s is E(x) / s^2 with E(x) = |A G(x) - y|^2 / 2, so that a point that is known at one noise is known at all.

One move is a trajectory of the leapfrog rule, accepted or refused as a whole. With one leap it is the
Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996); with several it is Hamiltonian Monte Carlo (Neal
2011, arXiv:1206.1901). A metric M, constant during a move, turns directions that the photo fixes (posterior spread
about s / |J|) and those it leaves free (spread 1) into directions of equal spread: M = I + J'J / s^2, the
Gauss-Newton matrix (Girolami & Calderhead 2011; Martin et al. 2012 for its low rank form).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedface.shapes import Images, LowImages

DIFFERENCE = 1e-2  # of the finite differences behind a metric, in prior standard deviations


class Chances:
    """One stream of chance for each chain, so that a chain does not depend on which others run beside it."""

    def __init__(self, streams: Sequence[torch.Generator]) -> None:
        self._streams = streams

    def normals(self, *shape: int) -> Tensor:
        """Standard normal numbers, (n, *shape)."""
        return torch.stack([torch.randn(*shape, generator=stream) for stream in self._streams])

    def uniforms(self) -> Tensor:
        """Numbers uniform in [0, 1), (n,)."""
        return torch.cat([torch.rand(1, generator=stream) for stream in self._streams])


@dataclass(frozen=True)
class Point:
    """Where n chains stand."""

    x: Tensor  # (n, d) prior standard normal
    images: Images  # (n, 3, s, s) clamped to [0, 1], what x stands for
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

        def pick(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), mine, others)

        return Point(
            pick(self.x, other.x),
            pick(self.images, other.images),
            pick(self.energy, other.energy),
            pick(self.slope, other.slope),
        )


class Measured:
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
    """M = I + V diag(stiffness / s^2) V' for each chain, V orthonormal."""

    directions: Tensor  # (n, d, r), columns are V; r = 0 is the identity
    stiffness: Tensor  # (n, r) squared singular values of the Jacobian along them

    @staticmethod
    def identity(x: Tensor) -> Metric:
        """No metric: every direction counts as if the photo left it free."""
        return Metric(x.new_zeros(*x.shape, 0), x.new_zeros(len(x), 0))

    def narrow(self, rows: Tensor, s: float) -> Tensor:
        """M^(-1/2) rows, (n, d): unit steps become as long as the posterior is wide in their direction."""
        along = torch.einsum("ndr,nd->nr", self.directions, rows)
        shrink = torch.rsqrt(1 + self.stiffness / s**2) - 1
        return rows + torch.einsum("ndr,nr->nd", self.directions, shrink * along)

    def blended(self, other: Metric, share: float) -> Metric:
        """The mean of two, `share` of it the other's, cut to the other's rank."""
        mine = self.directions * ((1 - share) * self.stiffness).sqrt()[:, None]
        others = other.directions * (share * other.stiffness).sqrt()[:, None]
        joined = torch.cat([mine, others], dim=2)
        directions, lengths, _ = torch.linalg.svd(joined, full_matrices=False)
        r = other.stiffness.shape[1]
        return Metric(directions[:, :, :r], lengths[:, :r].square())


def gauss_newton(measured: Measured, x: Tensor, rank: int, chances: Chances) -> Metric:
    """The metric where the chains stand, by finite differences along at most `rank` directions.

    With no more coordinates than `rank` all are taken. Otherwise the directions are those that a random sketch of
    the measured values pulls at (Halko et al. 2011, arXiv:0909.4061), all of them if there are few values.

    Args:
        measured: The generator and the photo.
        x: States, (n, d).
        rank: Most directions; 0 gives the identity.
        chances: Where the sketch is drawn from.
    """
    n, d = x.shape
    with torch.no_grad():
        here = measured.values(x)
    m = here.shape[1]
    r = min(rank, d)
    if r == 0 or n == 0:
        return Metric.identity(x)
    if d <= rank:
        basis = torch.eye(d).to(x).expand(n, d, d)
    else:
        sketch = torch.eye(m).to(x).expand(n, m, m) if m <= rank else chances.normals(rank, m)
        pulled = [measured.pull(x, sketch[:, i]) for i in range(sketch.shape[1])]
        basis = torch.linalg.qr(torch.stack(pulled, dim=2)).Q
    with torch.no_grad():
        columns = [
            (measured.values(x + DIFFERENCE * basis[:, :, i]) - here) / DIFFERENCE
            for i in range(basis.shape[2])
        ]
    jacobian = torch.stack(columns, dim=2)
    stiffness, turned = torch.linalg.eigh(jacobian.mT @ jacobian)
    return Metric(basis @ turned, stiffness.clamp(min=0))


@dataclass(frozen=True)
class Moved:
    """What one move came to."""

    point: Point
    accepted: Tensor  # (n,) bool
    chance: Tensor  # (n,) probability with which it was accepted, in [0, 1]


def move(
    measured: Measured, point: Point, metric: Metric, s: float, *, step: Tensor, leaps: int, chances: Chances
) -> Moved:
    """One Metropolis-adjusted trajectory; it leaves the posterior at noise s exactly as it is.

    Args:
        measured: The generator and the photo.
        point: Where the chains stand.
        metric: Constant along the trajectory, and chosen without looking at where it leads.
        s: Noise of the measurement at this level.
        step: Length of each leap, (n,), in posterior standard deviations.
        leaps: How many, >= 1; 1 is Langevin.
        chances: Where momenta and decisions are drawn from.
    """
    momentum = chances.normals(point.x.shape[1]).to(point.x)
    before = point.potential(s) + momentum.square().sum(dim=1) / 2
    length, at = step[:, None], point
    for _ in range(leaps):
        momentum = momentum - length / 2 * metric.narrow(at.gradient(s), s)
        at = measured.point(at.x + length * metric.narrow(momentum, s))
        momentum = momentum - length / 2 * metric.narrow(at.gradient(s), s)
    after = at.potential(s) + momentum.square().sum(dim=1) / 2
    chance = torch.nan_to_num((before - after).clamp(max=0).exp(), nan=0.0)
    accepted = chances.uniforms().to(chance) < chance
    return Moved(at.where(accepted, point), accepted, chance)


def drift(measured: Measured, point: Point, s: float, *, step: float, chances: Chances) -> Moved:
    """One unadjusted Langevin step of length `step`: x - step^2 / 2 gradient + step * normal; always accepted."""
    normals = chances.normals(point.x.shape[1]).to(point.x)
    at = measured.point(point.x - step**2 / 2 * point.gradient(s) + step * normals)
    always = torch.ones(len(point.x), dtype=torch.bool, device=point.x.device)
    return Moved(at, always, always.to(point.x))
