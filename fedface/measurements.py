"""Measured numbers: an interval, a privacy loss, or the reason why there is none.

An interval has its count, an epsilon its bounds, delta and unit. They are stored in JSON and printed by `str()`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

from fedface.number_format import SPACE, format_delta, interval_texts, number, rounded_down, rounded_up
from fedface.privacy_units import Unit

LEVEL = 0.95  # coverage of every interval
SMALL_COUNT = 10  # an estimate from fewer photos is flagged, and left out of gaps where larger groups exist


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval (95 % unless stated otherwise) and the number of samples behind it.

    Raises:
        ValueError: A number is not finite, the ends are in the wrong order, or nothing was counted.
    """

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

    @property
    def is_small(self) -> bool:
        """Whether the estimate rests on fewer than ten samples."""
        return self.count < SMALL_COUNT

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high

    def overlaps(self, other: Interval) -> bool:
        return max(self.low, other.low) <= min(self.high, other.high)

    def mirrored(self) -> Interval:
        """The same with the opposite sign."""
        return Interval(-self.estimate, -self.high, -self.low, self.count)

    def texts(self) -> tuple[str, str]:
        """The estimate and `[low, high]`."""
        return interval_texts(self.estimate, self.low, self.high)

    def __str__(self) -> str:
        return f"{' '.join(self.texts())}, n{SPACE}={SPACE}{self.count:,}"


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """A number that does not exist, and why."""

    kind: ClassVar[str] = "not-measured"

    not_measured: str  # the reason, a phrase that can follow "not measured: "

    def __post_init__(self) -> None:
        if not self.not_measured.strip():
            raise ValueError("not_measured must say why, got an empty text")

    def __str__(self) -> str:
        return f"not measured: {self.not_measured}"


Measurement = Interval | NotMeasured


def rate_interval(successes: float, count: int) -> Interval:
    """Wilson's 95 % interval of a rate (1927); inside [0, 1] and never of zero width.

    Args:
        successes: How many photos, 0 <= successes <= count. Shares of several faces of one photo may be
            summed; the interval is then a little too wide, never too narrow.
        count: Photos, >= 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if not 0 <= successes <= count:
        raise ValueError(f"successes must lie in [0, {count}], got {successes}")
    p, z2 = successes / count, NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * p * (1 - p) / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), count)


def table_cell(value: Measurement) -> str:
    """`3.21 [2.80, 3.70]` or `not measured`, for tables that state counts and reasons elsewhere."""
    return " ".join(value.texts()) if isinstance(value, Interval) else "not measured"


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """A privacy loss at some delta for one unit: `lower <= truth <= upper`; `upper` is what is guaranteed.

    All three are infinite where nothing bounds the loss, such as a release without noise.

    Raises:
        ValueError: The bounds are not ordered, or delta is not a probability.
    """

    kind: ClassVar[str] = "epsilon"

    lower: float  # >= 0
    estimate: float
    upper: float
    delta: float  # inside (0, 1)
    unit: Unit  # what the guarantee covers

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.estimate <= self.upper:
            raise ValueError(
                f"epsilon must be ordered, got lower {self.lower}, estimate {self.estimate}, upper {self.upper}"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")

    def measured(self) -> Epsilon | NotMeasured:
        """Itself if it is finite: JSON has no infinity, and an infinite epsilon guarantees nothing."""
        if math.isfinite(self.upper):
            return self
        return NotMeasured(not_measured="epsilon is infinite, because no noise was added")

    def to_record(self) -> dict[str, float | str]:
        """Plain values for JSON, which has no infinity: "infinite" stands for it."""
        ends = {"lower": self.lower, "estimate": self.estimate, "upper": self.upper}
        plain = {name: "infinite" if math.isinf(end) else end for name, end in ends.items()}
        return {**plain, "delta": self.delta, "unit": self.unit}

    def bounds(self) -> str:
        """`between 7.998 and 8.000`, rounded outwards."""
        return f"between {rounded_down(self.lower)} and {rounded_up(self.upper)}"

    def at_most(self) -> str:
        """`epsilon at most 8.000 at delta 1e-5 per photo`, rounded up."""
        value = "infinite" if math.isinf(self.upper) else f"at most {rounded_up(self.upper)}"
        return f"epsilon {value} {self._where}"

    def __str__(self) -> str:
        if math.isinf(self.upper):
            return f"epsilon infinite {self._where} (no privacy guarantee)"
        if self.upper == 0:
            return f"epsilon 0 {self._where}"
        return f"epsilon {number(self.estimate, 4)} ({self.bounds()}) {self._where}"

    @property
    def _where(self) -> str:
        return f"at delta {format_delta(self.delta)} per {self.unit}"
