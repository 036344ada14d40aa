"""The optimiser of PULSE: Adam on spheres, with a learning rate that rises, falls and drops.

A standard normal vector of many coordinates lies close to a sphere; a variable that stays on its own sphere therefore
stays plausible.

Sources: Menon et al. 2020 (arXiv:2003.03808) for the spheres and, in its published code, the schedule; Kingma and
Ba 2015 (arXiv:1412.6980) for Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def one_cycle_drop(step: int, steps: int) -> float:
    """The multiplier of the learning rate: 0.1, 1 at 45 % of the steps, 0.1 at 90 %, 0.001 at the end."""
    return float(np.interp(step / steps, [0, 0.45, 0.9, 1], [0.1, 1, 0.1, 0.001]))


def _radius(variable: Tensor) -> Tensor:
    return (variable.square().sum(dim=tuple(range(2, variable.ndim)), keepdim=True) + 1e-9).sqrt()


class SphericalAdam:
    """Adam whose variables keep their length: after each step every row returns to its own sphere.

    Variables have shape (n, k, ...); a row is everything after two axes: one latent or one noise map.
    """

    def __init__(self, variables: Sequence[Tensor], learning_rate: float) -> None:
        self.variables = [variable.clone() for variable in variables]
        self.learning_rate = learning_rate
        self._radii = [_radius(variable) for variable in variables]
        self._mean = [torch.zeros_like(variable) for variable in variables]
        self._square = [torch.zeros_like(variable) for variable in variables]
        self._step = 0

    def step(self, gradients: Sequence[Tensor], multiplier: float = 1.0) -> None:
        """Move every variable one step along its gradient, then back onto its sphere."""
        self._step += 1
        bias_mean, bias_square = 1 - 0.9**self._step, 1 - 0.999**self._step
        rate = self.learning_rate * multiplier / bias_mean
        for i, gradient in enumerate(gradients):
            self._mean[i].lerp_(gradient, 0.1)
            self._square[i].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = (self._square[i] / bias_square).sqrt_().add_(1e-8)
            moved = self.variables[i].detach() - rate * self._mean[i] / size
            self.variables[i] = moved / _radius(moved) * self._radii[i]

    def keep(self, chosen: Tensor) -> None:
        """Go on with the faces that `chosen`, (n,) bool, marks; forget the others."""
        for state in (self.variables, self._radii, self._mean, self._square):
            state[:] = [tensor[chosen] for tensor in state]
