"""The privacy unit: a photo, an occasion, or everything on one device. Neighbouring libraries differ by one unit."""

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


def describe_unit(unit: Unit) -> str:
    """What a guarantee covers, a phrase that can follow "the guarantee covers"."""
    match unit:
        case "photo":
            return "one photo; a person with many photos on a device is protected less"
        case "occasion":
            return (
                "one occasion: all photos taken together, close in time and place or similar, "
                "so that forty photos of one birthday count once"
            )
        case "library":
            return "one library: everything on one device; that the device took part is public"
        case _:
            assert_never(unit)


def covers(unit: Unit, counted: Unit) -> bool:
    """Whether a guarantee per `unit` bounds what is released about one `counted`.

    A library covers all that it holds. An occasion covers no single photo: a photo may link two occasions, which
    without it are two units, each sampled and clipped by itself. A finer unit says nothing about a coarser one.
    """
    return unit in (counted, "library")
