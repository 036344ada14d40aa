"""Events, recorded runs and the closed form that prices are compared with, for the tests of this folder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import dp_accounting as dp
from scipy.optimize import brentq
from scipy.stats import norm

from fedface.privacy.accounting import epsilon_of
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import LedgerEntry, PlannedRound, is_run_name
from fedface.privacy.plan import DPParameters, RunReleases, Schedule
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.privacy_units import Unit


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


DELTA = 1e-5
SIGMA = 4.0


def one_sum(rounds: int = 1, sigma: float = SIGMA, unit: Unit = "photo") -> DPParameters:
    """Rounds of one Gaussian sum each, over everybody."""
    schedule = Schedule(
        rounds=rounds, steps_per_round=1, sampling_rate=1.0, expected_batch_size=1, clip_norm=1.0
    )
    return DPParameters(schedule=schedule, noise_multiplier=sigma, unit=unit)


EVENT = one_sum().event()


def record_run(
    ledger: Ledger,
    limits: Sequence[Budget],
    *,
    run: str = "r",
    round: int = 1,
    terms: DPParameters | None = None,
) -> LedgerEntry:
    """Record a round of a run, by default of one round."""
    terms = one_sum() if terms is None else terms
    evaluates = not is_run_name(run)
    releases = RunReleases(evaluation=terms) if evaluates else RunReleases(training=terms)
    return ledger.record_round(PlannedRound(key=run, round=round, releases=releases), limits)


def cost_of(runs: int, event: dp.DpEvent = EVENT) -> float:
    """What so many runs of one round cost, with room for one rounding."""
    together = epsilon_of(event, DELTA).upper if runs == 1 else filter_epsilon([(event, runs)], DELTA)
    return together * (1 + 1e-5)
