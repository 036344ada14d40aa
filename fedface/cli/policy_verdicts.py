"""Whether an owner's policy would admit the runs of an experiment, and at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedface.aggregation.payload import purpose_of
from fedface.cli.policy_report import CombinedVerdict, PolicyReport, Price, Verdict
from fedface.errors import PolicyRefusal
from fedface.experiment import read_experiment
from fedface.number_format import format_delta
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters, Plan
from fedface.privacy.policy import EVALUATION, DevicePolicy, Purpose
from fedface.privacy.privacy_target import NoPrivacy
from fedface.privacy.releases import compose
from fedface.privacy_units import Unit


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one kind of request of a run asks for."""

    what: str  # "training", "evaluation"
    purpose: Purpose
    dp: DPParameters


def judge_experiment(
    experiment: Path, changes: Mapping[str, str], allowed: DevicePolicy, ledger: Ledger
) -> PolicyReport:
    """Whether a policy admits an experiment with some changes, beside what a ledger holds; nothing is recorded."""
    recipe = read_experiment(experiment, changes=changes)
    plan = recipe.plan()
    sums, cohort = recipe.aggregation, recipe.devices.count
    purpose = purpose_of(sums, cohort, recipe.training.objective)
    requests = [Request(what="training", purpose=purpose, dp=plan.dp_parameters)]
    if plan.evaluation is not None:
        purpose = purpose_of(sums, cohort, EVALUATION)
        requests.append(Request(what="evaluation", purpose=purpose, dp=plan.evaluation))
    report = judge(str(experiment), requests, allowed, ledger)
    priced = any(verdict.prices for verdict in report.verdicts)
    return replace(report, privacy=_other_guarantee(plan, allowed) if priced else None)


def judge(run: str, requests: Sequence[Request], allowed: DevicePolicy, ledger: Ledger) -> PolicyReport:
    """Whether a policy admits a run, beside what a ledger holds; nothing is recorded.

    Args:
        run: Its name in the report.
        requests: One of training, one of evaluation, or both, of one privacy unit.
    """
    # Hours and power are not considered: the run may request again later.
    unconditional = replace(allowed, hours=(), require_ac_power=False, min_battery=0.0, max_load=None)
    verdicts = tuple(_verdict(request, unconditional, ledger) for request in requests)
    priced = requests[0].dp.is_private and all(verdict.prices for verdict in verdicts)
    together = None
    if priced and len(verdicts) > 1:
        together = _together([request.dp for request in requests], unconditional, ledger, verdicts)
    return PolicyReport(run=run, verdicts=verdicts, together=together)


def _verdict(request: Request, allowed: DevicePolicy, ledger: Ledger) -> Verdict:
    terms, purpose = request.dp, request.purpose
    refusal: str | None = None
    prices: tuple[Price, ...] = ()
    try:
        allowed.check_static(terms, purpose)
        prices = tuple(
            replace(
                _price(terms.event(), terms.unit, limit, ledger),
                rounds_that_fit=ledger.rounds_that_fit(terms, limit),
            )
            for limit in allowed.budgets
        )
        allowed.admit(terms, purpose, ledger)
    except PolicyRefusal as error:
        refusal = error.reason
    return Verdict(
        what=request.what,
        objective=purpose.objective,
        unit=terms.unit,
        rounds=terms.schedule.rounds,
        refusal=refusal,
        prices=prices,
    )


def _price(event: Event, unit: Unit, limit: Budget, ledger: Ledger) -> Price:
    alone, so_far, together = ledger.price(event, limit, run_unit=unit)
    return Price(limit=limit, requested=alone.upper, spent=so_far.upper, together=together.upper)


def _together(
    parts: Sequence[DPParameters], allowed: DevicePolicy, ledger: Ledger, verdicts: Sequence[Verdict]
) -> CombinedVerdict:
    """All requests of a run against the lifetime budget; a refusal of one request alone is not repeated here."""
    life, unit, event = allowed.budgets[0], parts[0].unit, compose(part.event() for part in parts)
    short = ledger.check_budget(event, [life], run_unit=unit)
    alone = any(verdict.refusal is not None for verdict in verdicts)
    return CombinedVerdict(
        fits=short is None,
        refusal=None
        if short is None or alone
        else f"all requests together need {short.describe()}, and a run is admitted as a whole",
        price=_price(event, unit, life, ledger),
    )


def _other_guarantee(plan: Plan, allowed: DevicePolicy) -> str | None:
    """The recipe's own guarantee, where its delta or unit differs from this device's."""
    target = plan.privacy
    if isinstance(target, NoPrivacy) or (target.delta, target.unit) == (allowed.delta, allowed.unit):
        return None
    return (
        f"read at this device's delta {format_delta(allowed.delta)}, per {allowed.unit}; the experiment's guarantee is "
        f"epsilon at most {target.epsilon:g} at delta {format_delta(target.delta)}, per {target.unit}, over everything"
    )
