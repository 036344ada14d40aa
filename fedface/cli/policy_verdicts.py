"""Whether an owner's policy would admit the runs of an experiment, and at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedface.cli.policy_report import CombinedVerdict, PolicyReport, Price, Verdict
from fedface.errors import PolicyRefusal
from fedface.experiment import Experiment, read_experiment
from fedface.number_format import format_delta
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters, Plan
from fedface.privacy.policy import EVALUATION, DevicePolicy, Purpose
from fedface.privacy.privacy_target import NoPrivacy
from fedface.privacy_units import Unit


def judge_experiment(
    experiment: Path, changes: Mapping[str, str], allowed: DevicePolicy, ledger: Ledger
) -> PolicyReport:
    """Whether a policy admits an experiment with some changes, beside what a ledger holds; nothing is recorded."""
    recipe = read_experiment(experiment, changes=changes)
    plan = recipe.plan()
    requests: list[tuple[str, str, DPParameters]] = [
        ("training", recipe.training.objective, plan.dp_parameters)
    ]
    if plan.evaluation is not None:
        requests.append(("evaluation", EVALUATION, plan.evaluation))
    # Hours and power are not considered: the run may request again later.
    unconditional = replace(allowed, hours=(), require_ac_power=False, min_battery=0.0, max_load=None)
    verdicts = tuple(
        _verdict(what, word, terms, recipe, unconditional, ledger) for what, word, terms in requests
    )
    priced = plan.dp_parameters.is_private and all(verdict.prices for verdict in verdicts)
    return PolicyReport(
        experiment=experiment,
        verdicts=verdicts,
        together=_together(plan, unconditional, ledger, verdicts) if priced and len(verdicts) > 1 else None,
        privacy=_other_guarantee(plan, allowed) if any(verdict.prices for verdict in verdicts) else None,
    )


def _verdict(
    what: str, objective: str, terms: DPParameters, recipe: Experiment, allowed: DevicePolicy, ledger: Ledger
) -> Verdict:
    refusal: str | None = None
    prices: tuple[Price, ...] = ()
    purpose = Purpose(recipe.devices.count, recipe.aggregation.kind, objective)
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
        what=what, objective=objective, unit=terms.unit, rounds=terms.schedule.rounds, refusal=refusal, prices=prices
    )  # fmt: skip


def _price(event: Event, unit: Unit, limit: Budget, ledger: Ledger) -> Price:
    alone, so_far, together = ledger.price(event, limit, run_unit=unit)
    return Price(
        limit=limit, requested=alone.upper, spent=so_far.upper, together=together.upper, rounds_that_fit=None
    )


def _together(
    plan: Plan, allowed: DevicePolicy, ledger: Ledger, verdicts: Sequence[Verdict]
) -> CombinedVerdict:
    """All requests of a run against the lifetime budget; a refusal of one request alone is not repeated here."""
    life, unit = allowed.budgets[0], plan.dp_parameters.unit
    short = ledger.check_budget(plan.total_event(), [life], run_unit=unit)
    alone = any(verdict.refusal is not None for verdict in verdicts)
    return CombinedVerdict(
        fits=short is None,
        refusal=None
        if short is None or alone
        else f"all requests together need {short.describe()}, and a run is admitted as a whole",
        price=_price(plan.total_event(), unit, life, ledger),
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
