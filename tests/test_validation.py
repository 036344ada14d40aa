"""Ranges declared with the fields: checked at every construction, before conditions between fields."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest

from fedface.validation import Above, AtLeast, In, PowerOfTwo, checked


@dataclass(frozen=True, kw_only=True)
@checked
class Oven:
    """A field of each kind, and one condition between two of them."""

    heat: Annotated[float, Above(0)] = 180.0
    trays: Annotated[int, AtLeast(1)] = 2
    fan: Annotated[float, In("[0, 1)")] = 0.5
    sides: tuple[Annotated[float, In("(0, 1]")], ...] = ()
    width: Annotated[int, PowerOfTwo(8, 64)] = 16
    timer: Annotated[int, AtLeast(1)] | None = None
    fuel: Literal["gas", "wood"] = "gas"
    free_text: str = ""

    def __post_init__(self) -> None:
        if self.trays > self.width:
            raise ValueError(f"trays must be at most the width, got {self.trays}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heat", 0, "heat must be a finite number above 0, got 0"),
        ("heat", math.inf, "heat must be a finite number above 0, got inf"),
        ("heat", math.nan, "heat must be a finite number above 0, got nan"),
        ("trays", 0, "trays must be at least 1, got 0"),
        ("fan", 1.0, "fan must lie in [0, 1), got 1.0"),
        ("fan", -0.1, "fan must lie in [0, 1), got -0.1"),
        ("fan", math.nan, "fan must lie in [0, 1), got nan"),
        ("sides", (1.0, 0.0), "sides must lie in (0, 1], got 0.0"),
        ("width", 24, "width must be a power of two from 8 to 64, got 24"),
        ("width", 128, "width must be a power of two from 8 to 64, got 128"),
        ("timer", 0, "timer must be at least 1, got 0"),
        ("fuel", "coal", "fuel must be one of gas, wood, got 'coal'"),
        ("trays", 17, "trays must be at most the width, got 17"),
    ],
)
def test_a_value_out_of_range_is_refused_at_construction(field: str, value: object, message: str) -> None:
    """With the field's name, the range and the value; also through `dataclasses.replace`."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Oven(**{field: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(Oven(), **{field: value})


def test_values_at_the_closed_ends_are_accepted() -> None:
    """And None where the field allows it."""
    Oven(heat=1e-9, trays=1, fan=0.0, sides=(1.0,), width=8, timer=1)
    Oven(width=64, timer=None, fuel="wood")


def test_an_interval_is_written_as_in_mathematics() -> None:
    """An error in the declaration fails at import."""
    assert In("[1e-6, 1e6]").problem(1e6) == ""
    with pytest.raises(ValueError, match="expected an interval"):
        In("0 to 1")
