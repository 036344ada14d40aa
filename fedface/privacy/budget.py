"""A budget: how much privacy loss of one kind of unit is allowed, for life or within the last days."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from fedface.number_format import SPACE, at_most_percent, format_delta
from fedface.privacy.privacy_target import Delta
from fedface.privacy_units import Unit
from fedface.validation import Above, checked


@dataclass(frozen=True, kw_only=True)
@checked
class Budget:
    """At most epsilon at delta for one unit, over everything recorded for life, or within the last `days` days.

    Raises:
        ValueError: A number outside its bounds.
    """

    epsilon: Annotated[float, Above(0)]
    delta: Delta  # fixed for life
    unit: Unit = "photo"
    days: Annotated[float, Above(0)] | None = None  # the period that counts back from now; None for life

    @property
    def period(self) -> str:
        """Over which time it counts, in words."""
        return "for life" if self.days is None else f"in any {self.days:g} days"

    def meaning(self) -> str:
        """What it bounds, in one sentence: the posterior of even odds, e^epsilon / (1 + e^epsilon)."""
        sure = at_most_percent(1 / (1 + math.exp(-self.epsilon))).replace(SPACE, " ")
        return (
            f"Epsilon {self.epsilon:g}: an observer of everything that leaves, who gives even odds that one "
            f"{self.unit} is among yours, can become at most {sure} sure (except with probability "
            f"{format_delta(self.delta)})."
        )

    def __str__(self) -> str:
        """Its epsilon with its delta, unit and period."""
        return f"epsilon {self.epsilon:g} at delta {format_delta(self.delta)} per {self.unit} {self.period}"


@dataclass(frozen=True, kw_only=True)
class BudgetExceeded:
    """The first limit that a release would break, and by how much; every number is an upper bound."""

    budget: Budget  # what is allowed, at which delta, of which unit and period
    requested: float  # what the release alone costs
    spent: float  # what counts in the limit's period
    together: float  # what both cost together, composed: less than their sum

    def describe(self) -> str:
        """All numbers in one phrase that can follow "requests"."""
        limit = self.budget
        return (
            f"{format_upper_bound(self.requested)}; {format_upper_bound(self.spent)} of {limit.epsilon:g} is already "
            f"spent (together {format_upper_bound(self.together)}; every epsilon here at delta "
            f"{format_delta(limit.delta)}, per {limit.unit} {limit.period})"
        )


def overspending(spent: float, limit: Budget, *, no_dp_allowed: bool) -> str | None:
    """That a budget is exhausted, as a sentence without full stop; None as long as it is not.

    `spent` is the upper bound of what is spent in the limit's period; runs without noise, if allowed, know no budget.
    """
    over = spent - limit.epsilon
    if over < 0:
        return None
    until = "" if limit.days is None else " until enough of it is older than that"
    what = "every run with noise" if no_dp_allowed else "everything"
    much = "without a bound" if math.isinf(over) else f"by {format_upper_bound(over)}"
    where = f"at delta {format_delta(limit.delta)} per {limit.unit}"
    return f"nothing remains: {what} will be refused{until}; over {much} {where}"


def format_upper_bound(epsilon: float) -> str:
    """An upper bound of an epsilon, as such, rounded up."""
    if math.isinf(epsilon):
        return "epsilon infinite"
    return "epsilon 0" if epsilon == 0 else f"epsilon at most {math.ceil(1000 * epsilon) / 1000:.3f}"
