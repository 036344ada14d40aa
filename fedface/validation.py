"""Ranges declared beside the fields they hold for, and checked whenever a dataclass is constructed.

    @dataclass(frozen=True, kw_only=True)
    @checked
    class PrivacyTarget:
        epsilon: Annotated[float, Above(0)]
        delta: Annotated[float, In("(0, 1)")]
        unit: Literal["photo", "device"]

`PrivacyTarget(epsilon=1, delta=1.5, unit="photo")` raises `RangeError("delta must lie in (0, 1), got 1.5")`. The
codec adds the file and the line. Conditions between fields stay in `__post_init__`, which runs after the ranges.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fedface.errors import RangeError

T = TypeVar("T")

_INTERVAL = re.compile(r"([\[(])\s*(\S+),\s*(\S+?)\s*([\])])")


@dataclass(frozen=True)
class AtLeast:
    """A finite number, not below `low`."""

    low: float

    def problem(self, value: float) -> str:
        """Empty for a finite value >= low."""
        if value == math.inf:
            return "must be finite"
        return "" if value >= self.low else f"must be at least {self.low}"


@dataclass(frozen=True)
class Above:
    """A finite number greater than `low`."""

    low: float
    hint: str = ""  # what to do instead, such as "; for any time leave hours out"

    def problem(self, value: float) -> str:
        """Empty for a finite value > low."""
        return "" if self.low < value < math.inf else f"must be a finite number above {self.low}"


@dataclass(frozen=True)
class Digits:
    """A number with at most `most` significant decimal digits: one of a public grid."""

    most: int

    def problem(self, value: float) -> str:
        """Empty for such a number."""
        rounded = float(f"{value:.{self.most}g}") if math.isfinite(value) else value
        return (
            "" if value == rounded else f"must have at most {self.most} significant digits, such as {rounded}"
        )


class In:
    """An interval as mathematics writes it: `In("[0, 1)")`, `In("(0, 1024]")`, `In("[1e-6, 1e6]")`."""

    def __init__(self, interval: str) -> None:
        parts = _INTERVAL.fullmatch(interval)
        if parts is None:
            raise ValueError(f"expected an interval such as [0, 1), got {interval!r}")
        self.interval = interval
        self.low, self.high = float(parts[2]), float(parts[3])
        self.with_low, self.with_high = parts[1] == "[", parts[4] == "]"

    def problem(self, value: float) -> str:
        """Empty for a value in the interval."""
        above = self.low <= value if self.with_low else self.low < value
        below = value <= self.high if self.with_high else value < self.high
        return "" if above and below else f"must lie in {self.interval}"


@dataclass(frozen=True)
class PowerOfTwo:
    """A power of two from `low` to `high`."""

    low: int
    high: int

    def problem(self, value: int) -> str:
        """Empty for a power of two between the bounds."""
        fits = self.low <= value <= self.high and value & (value - 1) == 0
        return "" if fits else f"must be a power of two from {self.low} to {self.high}"


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, In("[0, 1]")]


def checked(cls: type[T]) -> type[T]:
    """Class decorator, below `@dataclass`: check `Annotated` ranges and `Literal` choices before `__post_init__`."""
    after: Callable[[T], None] | None = getattr(cls, "__post_init__", None)

    def __post_init__(self: T) -> None:
        for name, hint in _constrained_fields(cls):  # type: ignore[arg-type]  # every class is hashable
            check(name, hint, getattr(self, name))
        if after is not None:
            after(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def check(name: str, hint: Any, value: Any) -> None:
    """Raise RangeError unless a value satisfies the constraints of a type such as `Annotated[float, In("(0, 1)")]`."""
    if problem := next(_problems(hint, value), ""):
        raise RangeError(f"{name} {problem}")


@functools.cache
def _constrained_fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """The fields with something to check; resolved at the first construction, when every name in a hint exists."""
    hints = typing.get_type_hints(cls, include_extras=True)
    own = [name for base in reversed(cls.__mro__) for name in base.__dict__.get("__annotations__", ())]
    return tuple((name, hints[name]) for name in dict.fromkeys(own) if _is_constrained(hints[name]))


def _is_constrained(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Annotated, Literal):
        return True
    parts = (typing.Union, types.UnionType, tuple)
    return typing.get_origin(hint) in parts and any(map(_is_constrained, typing.get_args(hint)))


def _problems(hint: Any, value: Any) -> Iterator[str]:
    """What is wrong with a value, as "must be ..., got ..."."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        for constraint in arguments[1:]:
            if hasattr(constraint, "problem") and (problem := constraint.problem(value)):
                yield f"{problem}, got {value!r:.80}{getattr(constraint, 'hint', '')}"
        yield from _problems(arguments[0], value)
    elif origin is Literal and value not in arguments:
        yield f"must be one of {', '.join(map(str, arguments))}, got {value!r:.80}"
    elif origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            inner = [list(_problems(argument, value)) for argument in arguments if argument is not type(None)]
            if all(inner):
                yield from inner[0]
    elif origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        for item in value:
            yield from _problems(arguments[0], item)
