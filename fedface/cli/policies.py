"""`fedface policy check`: what an owner's file allows, in sentences, and whether this device would take part in a run.

Nothing is written: no ledger is begun, and none is booked in. Exit code 0 says that the device would take part (or
that no run was named), 1 that it would refuse something that the run asks, 2 that a file or an option is wrong, or
that the ledger cannot be trusted: it is damaged, or has gone while its head or its witness remembers it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from fedface.cli.runs import SetOption, changes_of
from fedface.cli.terminal import JsonOption, console
from fedface.config import plain, read, section
from fedface.errors import ConfigError, PolicyRefusal
from fedface.experiment import Experiment, read_experiment
from fedface.federation.belongings import Kept, belongings
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.conditions import NotNow, ThisMachine
from fedface.privacy.ledger import FORM, LONGEST_PERIOD, Ledger
from fedface.privacy.limits import Limit
from fedface.privacy.mechanism import Event
from fedface.privacy.neighbours import seen_by
from fedface.privacy.plan import Terms
from fedface.privacy.policy import EVALUATION, DevicePolicy
from fedface.training.ways import objective_of
from fedface.units import Unit

policy = typer.Typer(help="What the owner of a device allows.", no_args_is_help=True, rich_markup_mode=None)

DEVICE_KEYS = ("policy", "photos", "state")  # any of them at the top makes a file a device's


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A policy, and the ledger that was named, or that its device keeps if the file is a device's."""

    policy: DevicePolicy
    ledger: Path | None  # None: there is none, nor a trace of one
    book: Ledger | None  # the same, verified


@dataclass(frozen=True, kw_only=True)
class Price:
    """What is asked beside what is spent, by one limit; every epsilon is an upper bound."""

    limit: Limit
    asked: float
    spent: float
    together: float
    rounds_that_fit: int  # how many of the run's rounds the limit has room for now

    def in_words(self) -> str:
        """Asked, spent and allowed."""
        return (
            f"asks for epsilon {self.asked:.3f}, spent {self.spent:.3f}, together {self.together:.3f}; "
            f"allowed: {self.limit}; room for {self.rounds_that_fit} of its rounds"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What this device would answer to one thing that a run asks."""

    what: str  # "training", "evaluation"
    objective: str  # in the policy's word
    unit: Unit  # whom the run promises to
    rounds: int
    refusal: str | None  # None: it would take part
    prices: tuple[Price, ...]

    def in_words(self) -> list[str]:
        """A sentence, then a line for each limit."""
        answer = "would take part" if self.refusal is None else f"would refuse: {self.refusal}"
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        return [
            f'{self.what} ("{self.objective}", {rounds}, per {self.unit}): {answer}',
            *(f"  {price.in_words()}" for price in self.prices),
        ]


@policy.command("check")
def policy_check(
    file: Annotated[Path, typer.Argument(help="A policy file, or a device file with a policy section.")],
    experiment: Annotated[
        Path | None, typer.Option(help="Would this device take part in this experiment? Exit code 1 if not.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="What is spent; a device file's own ledger, or nothing, otherwise.")
    ] = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Say in sentences what a policy allows, and whether its device would take part in a run."""
    if experiment is None and set:
        raise ConfigError("--set changes an experiment; name one with --experiment")
    owned = _owned(file, ledger)
    recipe = None if experiment is None else read_experiment(experiment, changes=changes_of(set))
    with _book(owned) as book:
        verdicts = [] if recipe is None else _verdicts(recipe, owned.policy, book)
        together = None if recipe is None else _too_much(recipe, owned.policy, book, verdicts)
        spent = [
            book.spent(limit.delta, unit=limit.unit, since=_since(limit)).upper
            for limit in owned.policy.limits
        ]
    refused = together is not None or any(verdict.refusal is not None for verdict in verdicts)
    if json_out:
        _print_json(owned, spent, verdicts, together, refused)
    else:
        _print(file, experiment, owned, spent, verdicts, together, refused)
    if refused:
        raise typer.Exit(1)


def _owned(file: Path, ledger: Path | None) -> Owned:
    """What a file says, and its ledger: looked for, never begun, and missed where its head or witness remembers it."""
    if all(section(file, key) is None for key in DEVICE_KEYS):
        allowed, own = read(file, DevicePolicy), None
    else:
        kept = belongings(file)
        allowed, own = kept.device.policy, kept.ledger
    if ledger is None:
        book = None if own is None else own.look(Ledger.open)
        path = None if own is None or book is None else own.path
        return Owned(policy=allowed, ledger=path, book=book)
    named = own if own is not None and own.path.resolve() == ledger.resolve() else Kept.at(ledger, FORM, None)
    book = named.look(Ledger.open)
    if book is None:
        raise ConfigError(f"{ledger}: no ledger here")
    return Owned(policy=allowed, ledger=ledger, book=book)


@contextmanager
def _book(owned: Owned) -> Iterator[Ledger]:
    """The ledger that there is, or an empty one that nobody keeps."""
    if owned.book is not None:
        yield owned.book
        return
    with TemporaryDirectory() as folder:
        yield Ledger.open(Path(folder) / "ledger.sqlite")


def _verdicts(recipe: Experiment, allowed: DevicePolicy, book: Ledger) -> list[Verdict]:
    plan = recipe.plan()
    asked = [("training", objective_of(recipe.training), plan.terms)]
    asked += [("evaluation", EVALUATION, terms) for terms in plan.beside]
    # Hours and power are another matter: the run may ask again later.
    whenever = replace(allowed, hours=(), on_mains=False, least_battery=0.0, most_load=None)
    return [_verdict(what, objective, terms, recipe, whenever, book) for what, objective, terms in asked]


def _verdict(
    what: str, objective: str, terms: Terms, recipe: Experiment, allowed: DevicePolicy, book: Ledger
) -> Verdict:
    refusal = None
    try:
        allowed.admit(terms, recipe.devices.count, recipe.aggregation.kind, objective, book)
    except PolicyRefusal as reason:
        refusal = str(reason)
    return Verdict(
        what=what,
        objective=objective,
        unit=terms.unit,
        rounds=terms.schedule.rounds,
        refusal=refusal,
        prices=tuple(_price(terms, limit, book) for limit in allowed.limits),
    )


def _price(terms: Terms, limit: Limit, book: Ledger) -> Price:
    since, event = _since(limit), terms.event()
    both = book.would_spend(event, limit.delta, told=terms.unit, unit=limit.unit, since=since)
    return Price(
        limit=limit,
        asked=epsilon_of(seen_by(event, told=terms.unit, wanted=limit.unit), limit.delta).upper,
        spent=book.spent(limit.delta, unit=limit.unit, since=since).upper,
        together=both.upper,
        rounds_that_fit=_rounds_that_fit(terms, limit, book),
    )


def _rounds_that_fit(terms: Terms, limit: Limit, book: Ledger) -> int:
    """By halving: more rounds never cost less."""

    def fits(rounds: int) -> bool:
        event: Event = terms.event(rounds)
        return book.room_for(event, [limit], told=terms.unit) is None

    fitting, too_many = 0, terms.schedule.rounds + 1
    if fits(terms.schedule.rounds):
        return terms.schedule.rounds
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def _too_much(recipe: Experiment, allowed: DevicePolicy, book: Ledger, verdicts: list[Verdict]) -> str | None:
    """Why everything that a run asks does not fit for life, though each thing does; None if it fits."""
    if len(verdicts) < 2 or any(verdict.refusal is not None for verdict in verdicts):
        return None
    plan = recipe.plan()
    if not plan.terms.promises:
        return None
    short = book.room_for(plan.whole_event(), allowed.limits[:1], told=plan.terms.unit)
    return None if short is None else f"everything together asks for {short.in_words()}"


def _since(limit: Limit) -> datetime | None:
    if limit.days is None:
        return None
    return datetime.now(UTC) - timedelta(days=min(limit.days, LONGEST_PERIOD))


def _now(allowed: DevicePolicy) -> str | None:
    """Why the owner's conditions do not hold at this moment, for the owner."""
    try:
        allowed.conditions.check(ThisMachine())
    except NotNow as reason:
        return reason.private
    return None


def _print(
    file: Path, experiment: Path | None, owned: Owned, spent: list[float], verdicts: list[Verdict],
    together: str | None, refused: bool,
) -> None:  # fmt: skip
    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    say(f"{file} allows:")
    for line in owned.policy.in_words():
        say(f"  {line}")
    if owned.ledger is None:
        say("no ledger: nothing is spent")
    else:
        for epsilon, limit in zip(spent, owned.policy.limits, strict=True):
            say(f"spent so far, as {owned.ledger} says: epsilon {epsilon:.3f}; allowed: {limit}")
    if experiment is not None:
        say(f"{experiment} asks for:")
    for verdict in verdicts:
        for line in verdict.in_words():
            say(f"  {line}")
    if together is not None:
        say(f"  would refuse its last rounds: {together}")
    if experiment is not None:
        say("this device would refuse" if refused else "this device would take part")
    if (reason := _now(owned.policy)) is not None:
        say(f"not at this moment: {reason}")


def _print_json(
    owned: Owned, spent: list[float], verdicts: list[Verdict], together: str | None, refused: bool
) -> None:
    told = {
        "policy": plain(owned.policy),
        "ledger": None if owned.ledger is None else str(owned.ledger),
        "spent": [
            {**asdict(limit), "spent": epsilon}
            for epsilon, limit in zip(spent, owned.policy.limits, strict=True)
        ],
        "asked": [asdict(verdict) for verdict in verdicts],
        "together": together,
        "would_take_part": not refused if verdicts else None,
        "not_at_this_moment": _now(owned.policy),
    }
    print(json.dumps(_finite(told), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no infinity: an epsilon without a bound is null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value
