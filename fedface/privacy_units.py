"""The privacy unit: a photo, an occasion, or all that one device holds. Neighbouring libraries differ by one unit."""

from __future__ import annotations

from typing import Literal, assert_never

Unit = Literal["photo", "occasion", "library"]
UNITS: tuple[Unit, ...] = ("photo", "occasion", "library")  # from the finest to the coarsest
PLURALS: dict[str, str] = {"photo": "photos", "occasion": "occasions", "library": "libraries"}


def unit_named(name: str) -> Unit:
    """The unit of that name. Raises ValueError if there is none."""
    for unit in UNITS:
        if unit == name:
            return unit
    raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {name!r}")


def unit_in_words(unit: Unit) -> str:
    """What one promise covers, a phrase that can follow "the promise covers"."""
    match unit:
        case "photo":
            return "one photo; somebody with many photos on a device is protected less"
        case "occasion":
            return (
                "one occasion: all photos taken together, close in time and place or nearly alike, "
                "so that forty photos of one birthday count once"
            )
        case "library":
            return "one library: everything that one device holds; that the device took part is public"
        case _:
            assert_never(unit)


def covers(promised: Unit, wanted: Unit) -> bool:
    """Whether a promise of one unit says anything about another: a coarser one does, a finer one does not."""
    return UNITS.index(promised) >= UNITS.index(wanted)
