"""What a report is made of: a measured number with its interval, one that was not measured, a privacy loss.

Used by every record in reports/. No number stands alone: an interval has its count, an epsilon its delta and unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured number with its 95 % interval and how many things were counted."""

    kind: ClassVar[str] = "interval"

    estimate: float
    low: float
    high: float
    count: int  # >= 1

    def __post_init__(self) -> None:
        for name in ("estimate", "low", "high"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}; use NotMeasured")
        if not self.low <= self.high:
            raise ValueError(f"low must be at most high, got {self.low} and {self.high}")
        if self.count < 1:
            raise ValueError(f"count must be >= 1, got {self.count}; use NotMeasured")


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """A number that does not exist, and why."""

    kind: ClassVar[str] = "not-measured"

    not_measured: str  # the reason, a phrase that can follow "not measured: "

    def __post_init__(self) -> None:
        if not self.not_measured.strip():
            raise ValueError("not_measured must say why, got an empty text")


Measurement = Interval | NotMeasured


def measurement(values: Mapping[str, Any], *, otherwise: str) -> Measurement:
    """An `Interval` from the mapping of one, or `NotMeasured` where there is none to speak of.

    Args:
        values: With estimate, low, high and count, such as `dataclasses.asdict` of an audit's interval.
        otherwise: The reason to give when the estimate is missing or not finite, or nothing was counted.
            Ends of the interval that are not finite count as missing too.
    """
    names = ("estimate", "low", "high")
    numbers = [values.get(name) for name in names]
    count = values.get("count") or 0
    finite = [float(number) for number in numbers if number is not None and math.isfinite(number)]
    if len(finite) < 3 or count < 1:
        return NotMeasured(not_measured=otherwise)
    return Interval(estimate=finite[0], low=finite[1], high=finite[2], count=int(count))


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """A privacy loss with what it needs to mean something: bounds, delta and unit."""

    kind: ClassVar[str] = "epsilon"

    lower: float
    estimate: float
    upper: float  # the number to promise
    delta: float  # 0 < delta < 1
    unit: str  # what one promise covers: photo, occasion or library

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.estimate <= self.upper < math.inf:
            raise ValueError(
                "epsilon must be finite and ordered, got "
                f"lower {self.lower}, estimate {self.estimate}, upper {self.upper}"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")


def rounded_up(value: float, digits: int = 4) -> str:
    """An upper bound to read, with so many significant digits: what is printed is never below the bound."""
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 4) -> str:
    """A lower bound to read, with so many significant digits: what is printed is never above the bound."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    exact = Decimal(repr(float(value)))  # as it is written: 7.92 stays 7.92
    if not exact:
        return "0"
    text = format(exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding), "f")
    return text if "." in text else text.rstrip(".")
