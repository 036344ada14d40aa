"""Events and the closed form that privacy costs are compared with, for the tests of accounting and adjacency."""

from __future__ import annotations

import math

import dp_accounting as dp
from scipy.optimize import brentq
from scipy.stats import norm


def gaussian(sigma: float, count: int = 1) -> dp.DpEvent:
    return dp.SelfComposedDpEvent(dp.GaussianDpEvent(sigma), count)


def sampled(sigma: float, q: float, steps: int) -> dp.DpEvent:
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma)), steps)


def analytic_epsilon(sigma: float, delta: float) -> float:
    """Balle & Wang (2018), Theorem 8, solved for epsilon."""

    def excess(epsilon: float) -> float:
        far = math.exp(epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma))
        return float(norm.cdf(0.5 / sigma - epsilon * sigma) - far - delta)

    return float(brentq(excess, 0.0, 1000.0, xtol=1e-12))
