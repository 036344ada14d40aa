"""What a device would answer to a run, in sentences: each thing asked, its price, and what would be enough.

Called from cli/policy.py, which computes what stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedface.privacy.budget import Budget, format_upper_bound
from fedface.privacy_units import Unit


@dataclass(frozen=True, kw_only=True)
class Price:
    """What is asked beside what is spent, by one limit; every epsilon is an upper bound."""

    limit: Budget
    asked: float
    spent: float
    together: float
    rounds_that_fit: int | None  # of the run's rounds; None: its parts differ in rounds

    def in_words(self) -> str:
        """Asked, spent and allowed."""
        room = "" if self.rounds_that_fit is None else f"; room for {self.rounds_that_fit} of its rounds"
        return (
            f"asks for {format_upper_bound(self.asked)}; with what is spent ({format_upper_bound(self.spent)}): {format_upper_bound(self.together)}; "
            f"allowed: {self.limit}{room}"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What this device would answer to one thing that a run asks."""

    what: str  # "training", "evaluation"
    objective: str  # in the policy's word
    unit: Unit  # whom the run promises to
    rounds: int
    refusal: str | None  # None: it would take part
    prices: tuple[Price, ...]  # none where it is refused whatever it costs

    def in_words(self, said: str | None) -> list[str]:
        """A sentence, without the reason if it was said above, then a line for each limit."""
        answer = "would take part" if self.refusal is None else _refused(self.refusal, said)
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        return [
            f'{self.what} ("{self.objective}", {rounds}, per {self.unit}): {answer}',
            *(f"  {price.in_words()}" for price in self.prices),
        ]


@dataclass(frozen=True, kw_only=True)
class CombinedVerdict:
    """What a device would answer to everything that a run asks, which it must be able to pay for life."""

    fits: bool
    refusal: str | None  # None also where a part does not fit by itself, which is said there
    price: Price

    def in_words(self, said: str | None) -> list[str]:
        """Like a verdict."""
        answer = "fits" if self.fits else _refused(self.refusal, said)
        return [f"training and evaluation together: {answer}", f"  {self.price.in_words()}"]


@dataclass(frozen=True, kw_only=True)
class PolicyReport:
    """What a device would answer to a run."""

    experiment: Path
    verdicts: tuple[Verdict, ...]
    together: (
        CombinedVerdict | None
    )  # None: the run asks for one thing, or something is refused whatever it costs
    privacy: str | None  # what the recipe promises, where that reads otherwise than this device's prices

    @property
    def refusal(self) -> str | None:
        """The first reason against taking part; None: it would take part."""
        reasons = [verdict.refusal for verdict in self.verdicts]
        reasons += [] if self.together is None else [self.together.refusal]
        return next((reason for reason in reasons if reason is not None), None)

    def in_words(self) -> list[str]:
        """The answer, then what it rests on."""
        return [
            f"this device would take part in {self.experiment}"
            if self.refusal is None
            else f"this device would refuse {self.experiment}: {self.refusal}",
            *(f"  {line}" for verdict in self.verdicts for line in verdict.in_words(self.refusal)),
            *(
                []
                if self.together is None
                else [f"  {line}" for line in self.together.in_words(self.refusal)]
            ),
            *([] if self.privacy is None else [f"  {self.privacy}"]),
            *(
                []
                if (enough := self.sufficient_budget) is None
                else [
                    f"  all of it would fit with max_epsilon: {enough:g}, an epsilon of at most that at the same delta"
                ]
            ),
        ]

    @property
    def sufficient_budget(self) -> float | None:
        """The budget for life that would be enough, rounded up; None where that is not what is missing."""
        priced = [verdict.prices[0] for verdict in self.verdicts if verdict.prices]
        if self.together is not None:
            priced = [self.together.price]
        most = max((price.together for price in priced), default=0.0)
        if self.refusal is None or len(priced) == 0 or math.isinf(most) or most <= priced[0].limit.epsilon:
            return None
        return math.ceil(most * 100) / 100


def _refused(reason: str | None, said: str | None) -> str:
    return "would refuse" if reason in (None, said) else f"would refuse: {reason}"
