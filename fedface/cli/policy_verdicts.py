"""Whether an owner's policy would admit the runs of an experiment, and at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedface.cli.policy_report import CombinedVerdict, PolicyReport, Price, Verdict
from fedface.errors import PolicyRefusal
from fedface.experiment import Experiment, read_experiment
from fedface.number_format import format_delta
from fedface.privacy.budget import Budget, describe_briefly
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters, Plan
from fedface.privacy.policy import EVALUATION, DevicePolicy, Purpose
from fedface.privacy.privacy_target import NoPrivacy
from fedface.privacy_units import Unit


def answer_experiment(
    experiment: Path, changes: Mapping[str, str], allowed: DevicePolicy, book: Ledger
) -> PolicyReport:
    """Whether a policy admits an experiment with some changes, beside what a ledger holds; nothing is recorded."""
    recipe = read_experiment(experiment, changes=changes)
    plan = recipe.plan()
    asked: list[tuple[str, str, DPParameters]] = [("training", recipe.training.objective, plan.dp_parameters)]
    if plan.evaluation is not None:
        asked.append(("evaluation", EVALUATION, plan.evaluation))
    # Hours and power are another matter: the run may ask again later.
    whenever = replace(allowed, hours=(), require_ac_power=False, min_battery=0.0, max_load=None)
    verdicts = tuple(_verdict(what, word, terms, recipe, whenever, book) for what, word, terms in asked)
    priced = plan.dp_parameters.is_private and all(verdict.prices for verdict in verdicts)
    return PolicyReport(
        experiment=experiment,
        verdicts=verdicts,
        together=_together(plan, whenever, book, verdicts) if priced and len(verdicts) > 1 else None,
        privacy=_other_promise(plan, allowed) if any(verdict.prices for verdict in verdicts) else None,
    )


def _verdict(
    what: str, objective: str, terms: DPParameters, recipe: Experiment, allowed: DevicePolicy, book: Ledger
) -> Verdict:
    refusal: str | None = None
    prices: tuple[Price, ...] = ()
    purpose = Purpose(recipe.devices.count, recipe.aggregation.kind, objective)
    try:
        allowed.check_static(terms, purpose)
        prices = tuple(
            replace(
                _price(terms.event(), terms.unit, limit, book),
                rounds_that_fit=book.rounds_that_fit(terms, limit),
            )
            for limit in allowed.budgets
        )
        allowed.admit(terms, purpose, book)
    except PolicyRefusal as error:
        refusal = error.reason
    return Verdict(
        what=what, objective=objective, unit=terms.unit, rounds=terms.schedule.rounds, refusal=refusal, prices=prices
    )  # fmt: skip


def _price(event: Event, unit: Unit, limit: Budget, book: Ledger) -> Price:
    alone, so_far, together = book.price(event, limit, run_unit=unit)
    return Price(
        limit=limit, asked=alone.upper, spent=so_far.upper, together=together.upper, rounds_that_fit=None
    )


def _together(
    plan: Plan, allowed: DevicePolicy, book: Ledger, verdicts: Sequence[Verdict]
) -> CombinedVerdict:
    """All requests of a run against the lifetime budget; a refusal of one request alone is not repeated here."""
    life, unit = allowed.budgets[0], plan.dp_parameters.unit
    short = book.check_budget(plan.total_event(), [life], run_unit=unit)
    alone = any(verdict.refusal is not None for verdict in verdicts)
    return CombinedVerdict(
        fits=short is None,
        refusal=None
        if short is None or alone
        else f"all requests together need {describe_briefly(short)}, and a run is admitted as a whole",
        price=_price(plan.total_event(), unit, life, book),
    )


def _other_promise(plan: Plan, allowed: DevicePolicy) -> str | None:
    """The recipe's own guarantee, where its delta or unit differs from this device's."""
    target = plan.privacy
    if isinstance(target, NoPrivacy) or (target.delta, target.unit) == (allowed.delta, allowed.unit):
        return None
    return (
        f"read at this device's delta {format_delta(allowed.delta)}, per {allowed.unit}; the experiment's guarantee is "
        f"epsilon at most {target.epsilon:g} at delta {format_delta(target.delta)}, per {target.unit}, over everything"
    )
