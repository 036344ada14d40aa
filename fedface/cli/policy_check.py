"""Whether an owner's policy admits a run, computed without writing: no ledger is created, nothing is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fedface.cli.console import cell, print_json, say
from fedface.cli.policy_report import CombinedVerdict, PolicyReport, Price, Verdict
from fedface.codec import encode
from fedface.config import read, section
from fedface.device.config import (
    check_kind,
    is_accessible_to_others,
    missing_policy_folders,
    read_device_config,
)
from fedface.device.state import DeviceState, LedgerFiles, device_state
from fedface.errors import ConfigError, PolicyRefusal
from fedface.experiment import Experiment, read_experiment
from fedface.number_format import format_delta
from fedface.privacy.budget import Budget, describe_briefly, format_upper_bound, overspending
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import Event
from fedface.privacy.participation_conditions import ConditionsNotMet, SystemEnvironment
from fedface.privacy.plan import DPParameters, Plan
from fedface.privacy.policy import EVALUATION, DevicePolicy, Purpose
from fedface.privacy.privacy_target import NoPrivacy
from fedface.privacy_units import Unit

DEVICE_KEYS = ("policy", "photos", "state")  # any of them at the top level makes a file a device file


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A policy, and the ledger that was named, or that its device keeps if the file is a device's."""

    policy: DevicePolicy
    ledger: Path | None  # None: there is none, nor a trace of one
    book: Ledger | None  # the same, verified
    doubts: Sequence[str]  # what is probably not meant, one sentence each


def check_policy(
    file: Path, experiment: Path | None, ledger: Path | None, changes: dict[str, str]
) -> tuple[Owned, list[float], PolicyReport | None]:
    """The policy of a file, the epsilon spent of each of its budgets, and the answer to an experiment."""
    owned = _owned(file, ledger)
    recipe = None if experiment is None else read_experiment(experiment, changes=changes)
    with _book(owned) as book:
        answer = (
            None if experiment is None or recipe is None else _answer(experiment, recipe, owned.policy, book)
        )
        spent = [book.spent_against(budget).upper for budget in owned.policy.budgets]
    return owned, spent, answer


def _owned(file: Path, ledger: Path | None) -> Owned:
    """The policy of a file and its ledger; a missing ledger is an error where its head or witness exists."""
    doubts: list[str] = []
    if all(section(file, key) is None for key in DEVICE_KEYS):
        check_kind(file, "policy")
        allowed, own = read(file, DevicePolicy), None
    else:
        state = _working(file)
        allowed, own = state.device.policy, state.ledger
        if is_accessible_to_others(own.path):  # opening a ledger does it by itself
            doubts = [f"others could read {own.path}; run chmod 600 on it"]
    doubts = [*allowed.warnings(), *doubts]
    if ledger is None:
        book = None if own is None else own.open_existing()
        path = None if own is None or book is None else own.path
        return Owned(policy=allowed, ledger=path, book=book, doubts=doubts)
    named = own if own is not None and own.path.resolve() == ledger.resolve() else LedgerFiles.at(ledger)
    book = named.open_existing()
    if book is None:
        raise ConfigError(f"{ledger}: no ledger here")
    return Owned(policy=allowed, ledger=ledger, book=book, doubts=doubts)


def _working(file: Path) -> DeviceState:
    """The state of a device file, after checking that the device could work and that its policy's folders exist."""
    read_device_config(file)
    state = device_state(file)
    lost = missing_policy_folders(state.device.policy, state.photos)
    if lost:
        raise ConfigError(f"{file}: policy.{lost[0].describe()}")
    return state


@contextmanager
def _book(owned: Owned) -> Iterator[Ledger]:
    """The existing ledger, or an empty temporary one."""
    if owned.book is not None:
        yield owned.book
        return
    with TemporaryDirectory() as folder:
        yield Ledger.open(Path(folder) / "ledger.sqlite")


def _answer(experiment: Path, recipe: Experiment, allowed: DevicePolicy, book: Ledger) -> PolicyReport:
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


def _now(allowed: DevicePolicy) -> str | None:
    """Why the owner's conditions do not hold now."""
    try:
        allowed.conditions.check(SystemEnvironment())
    except ConditionsNotMet as reason:
        return reason.private
    return None


def _left(owned: Owned, spent: Sequence[float]) -> list[str]:
    """What is spent of each budget, and where nothing is left."""
    if owned.ledger is None:
        return ["no ledger yet: nothing is spent"]
    lines = []
    for epsilon, limit in zip(spent, owned.policy.budgets, strict=True):
        lines.append(f"spent according to {owned.ledger}: {format_upper_bound(epsilon)}; allowed: {limit}")
        over = overspending(epsilon, limit, unpromised=owned.policy.allow_no_dp)
        lines += [] if over is None else [over]
    return lines


def print_answer(file: Path, owned: Owned, spent: Sequence[float], answer: PolicyReport | None) -> None:
    ended = owned.policy.ended(SystemEnvironment())
    lines = [
        *([] if answer is None else answer.in_words()),
        *([] if ended is None else [ended]),
        f"{file} allows:",
        *(f"  {line}" for line in owned.policy.describe()),
        *_left(owned, spent),
        *(f"warning: {doubt}" for doubt in owned.doubts),
    ]
    if (reason := _now(owned.policy)) is not None:
        lines.append(f"not now: {reason}")
    for line in lines:
        say(cell(line))


def print_as_json(owned: Owned, spent: Sequence[float], answer: PolicyReport | None) -> None:
    record = {
        "policy": encode(owned.policy),
        "ledger": None if owned.ledger is None else str(owned.ledger),
        "spent": [
            {
                **asdict(limit),
                "spent": epsilon,
                "nothing_left": overspending(epsilon, limit, unpromised=owned.policy.allow_no_dp),
            }
            for epsilon, limit in zip(spent, owned.policy.budgets, strict=True)
        ],
        "asked": [] if answer is None else [asdict(verdict) for verdict in answer.verdicts],
        "together": None if answer is None or answer.together is None else asdict(answer.together),
        "privacy": None if answer is None else answer.privacy,
        "would_take_part": None if answer is None else answer.refusal is None,
        "refusal": None if answer is None else answer.refusal,
        "ended": owned.policy.ended(SystemEnvironment()),
        "warnings": list(owned.doubts),
        "not_at_this_moment": _now(owned.policy),
    }
    print_json(record)
