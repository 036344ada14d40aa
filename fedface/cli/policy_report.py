"""A device's response to a run in sentences: each request, its privacy cost, and the budget that would allow it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedface.privacy.budget import Budget, format_upper_bound
from fedface.privacy_units import Unit


@dataclass(frozen=True, kw_only=True)
class Price:
    """The cost of a request against one budget; every epsilon is an upper bound."""

    limit: Budget
    requested: float
    spent: float
    together: float
    rounds_that_fit: int | None = None  # of the run's rounds; None where the requests differ in rounds

    def describe(self) -> str:
        """Requested, spent and allowed, in one line."""
        room = "" if self.rounds_that_fit is None else f"; enough for {self.rounds_that_fit} of its rounds"
        return (
            f"requests {format_upper_bound(self.requested)}; with the {format_upper_bound(self.spent)} already spent: "
            f"{format_upper_bound(self.together)}; allowed: {self.limit}{room}"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The response to one request of a run."""

    what: str  # "training", "evaluation"
    objective: str  # as the policy names it
    unit: Unit  # privacy unit of the run
    rounds: int
    refusal: str | None  # None: it would take part
    prices: tuple[Price, ...]  # empty where it is refused regardless of its cost

    def describe(self, stated: str | None) -> list[str]:
        """A sentence, without the reason if that is `stated` already, then one line per budget."""
        text = "would take part" if self.refusal is None else _refused(self.refusal, stated)
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        return [
            f'{self.what} ("{self.objective}", {rounds}, per {self.unit}): {text}',
            *(f"  {price.describe()}" for price in self.prices),
        ]


@dataclass(frozen=True, kw_only=True)
class CombinedVerdict:
    """The response to all requests together, which the lifetime budget must cover."""

    fits: bool
    refusal: str | None  # None also where one request alone does not fit: its own verdict says so
    price: Price

    def describe(self, stated: str | None) -> list[str]:
        text = "fits" if self.fits else _refused(self.refusal, stated)
        return [f"training and evaluation together: {text}", f"  {self.price.describe()}"]


@dataclass(frozen=True, kw_only=True)
class PolicyReport:
    run: str  # its name, or its experiment's file
    verdicts: tuple[Verdict, ...]
    together: CombinedVerdict | None  # None: one request, or one that is refused regardless of its cost
    privacy: str | None = None  # the recipe's guarantee, where its delta or unit differs from this device's

    @property
    def refusal(self) -> str | None:
        """The first reason against taking part; None: it would take part."""
        reasons = [verdict.refusal for verdict in self.verdicts]
        reasons += [] if self.together is None else [self.together.refusal]
        return next((reason for reason in reasons if reason is not None), None)

    def describe(self) -> list[str]:
        """The response, then the costs behind it."""
        refusal = self.refusal
        details = [line for verdict in self.verdicts for line in verdict.describe(refusal)]
        if self.together is not None:
            details += self.together.describe(refusal)
        if self.privacy is not None:
            details.append(self.privacy)
        if (enough := self.sufficient_budget) is not None:
            details.append(f"Setting max_epsilon to {enough:g} (same delta) would allow this run.")
        answer = f"take part in {self.run}" if refusal is None else f"refuse {self.run}: {refusal}"
        return [f"this device would {answer}", *(f"  {line}" for line in details)]

    @property
    def sufficient_budget(self) -> float | None:
        """The lifetime epsilon that would allow this run, rounded up; None where the budget is not the obstacle."""
        priced = [verdict.prices[0] for verdict in self.verdicts if verdict.prices]
        if self.together is not None:
            priced = [self.together.price]
        most = max((price.together for price in priced), default=0.0)
        if self.refusal is None or len(priced) == 0 or math.isinf(most) or most <= priced[0].limit.epsilon:
            return None
        return math.ceil(most * 100) / 100


def _refused(reason: str | None, stated: str | None) -> str:
    return "would refuse" if reason in (None, stated) else f"would refuse: {reason}"
