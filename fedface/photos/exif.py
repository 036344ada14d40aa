"""When, where and with which camera a photo was taken, from EXIF tags that may be missing, broken or hostile.

A tag that cannot be parsed counts as missing; the photo and its other tags are used.
Source: CIPA DC-008 (Exif 2.32), tables 4 to 15.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

Tags = Mapping[int, object]

MAKE, MODEL, CHANGED = 0x010F, 0x0110, 0x0132
TAKEN, DIGITIZED = 0x9003, 0x9004
LATITUDE_REF, LATITUDE, LONGITUDE_REF, LONGITUDE = 1, 2, 3, 4
MAX_TEXT_LENGTH = 80  # characters of a camera's name


@dataclass(frozen=True)
class ExifMetadata:
    """The metadata of a photo; `None` where it is missing or cannot be parsed."""

    taken: datetime | None = None  # local time of the camera, without a zone
    place: tuple[float, float] | None = None  # latitude and longitude in degrees, north and east positive
    camera: str | None = None


def read_exif(main: Tags, detail: Tags, gps: Tags) -> ExifMetadata:
    """Read the date, the place and the camera from the three directories of an EXIF block.

    Args:
        main: IFD 0 (make, model, date of change).
        detail: The Exif sub-directory (date taken, date digitized).
        gps: The GPS sub-directory.
    """
    dates = (_date(detail.get(TAKEN)), _date(detail.get(DIGITIZED)), _date(main.get(CHANGED)))
    return ExifMetadata(next((date for date in dates if date is not None), None), _place(gps), _camera(main))


def _text(tag: object) -> str:
    """A tag as printable text; bytes are read as Latin-1, the text ends at the first zero byte."""
    if isinstance(tag, bytes):
        tag = tag.decode("latin-1")
    if not isinstance(tag, str):
        return ""
    printable = "".join(letter for letter in tag.split("\0")[0] if letter.isprintable())
    return " ".join(printable.split())[:MAX_TEXT_LENGTH]


def _date(tag: object) -> datetime | None:
    """`YYYY:MM:DD HH:MM:SS`; years outside 1900 to 2100 and dates that do not exist are missing."""
    try:
        date = datetime.strptime(_text(tag)[:19], "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    return date if 1900 <= date.year <= 2100 else None


def _degrees(tag: object, reference: object, negative: str) -> float | None:
    """Degrees, minutes and seconds as one signed number."""
    if not isinstance(tag, Sequence) or isinstance(tag, str | bytes) or not 1 <= len(tag) <= 3:
        return None
    try:
        parts = [float(part) for part in tag]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not all(math.isfinite(part) and part >= 0 for part in parts):
        return None
    angle = sum(part * unit for part, unit in zip(parts, (1.0, 1 / 60, 1 / 3600), strict=False))
    return -angle if _text(reference).upper().startswith(negative) else angle


def _place(gps: Tags) -> tuple[float, float] | None:
    """Latitude and longitude; exactly (0, 0) is what cameras write for "unknown"."""
    latitude = _degrees(gps.get(LATITUDE), gps.get(LATITUDE_REF), "S")
    longitude = _degrees(gps.get(LONGITUDE), gps.get(LONGITUDE_REF), "W")
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    return None if latitude == longitude == 0 else (latitude, longitude)


def _camera(main: Tags) -> str | None:
    """Maker and model; the maker once."""
    make, model = _text(main.get(MAKE)), _text(main.get(MODEL))
    name = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    return name[:MAX_TEXT_LENGTH] or None
