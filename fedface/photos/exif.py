"""When, where and with which camera a photo was taken, from metadata that may be missing, broken or hostile.

Values that are incomplete, or marked invalid by the camera, count as unknown.
Source: CIPA DC-008 (Exif 2.32), tables 4 to 15.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fedface.photos.capture_date import IptcTags, Precision, best_date, iptc_dates, xmp_dates

Tags = Mapping[int, object]

MAKE, MODEL = 0x010F, 0x0110
TAKEN, DIGITIZED = 0x9003, 0x9004
LATITUDE_REF, LATITUDE, LONGITUDE_REF, LONGITUDE, STATUS, ERROR_METRES = 1, 2, 3, 4, 9, 31
MAX_ERROR_METRES = 1000.0  # a position that the camera itself knows less well is unknown
MAX_TEXT_LENGTH = 80  # characters of a camera's name


@dataclass(frozen=True)
class ExifMetadata:
    """The metadata of a photo; `None` where it is missing or cannot be parsed."""

    taken: datetime | None = None  # local time of the camera, without a zone
    place: tuple[float, float] | None = None  # latitude and longitude in degrees, north and east positive
    camera: str | None = None
    date_precision: Precision = "exact"  # of `taken`


def read_exif(
    main: Tags,
    detail: Tags,
    gps: Tags,
    *,
    xmp: bytes = b"",
    iptc: IptcTags | None = None,
    damaged: bool = False,
) -> ExifMetadata:
    """Read the date, the place and the camera of a photo.

    Args:
        main: IFD 0 of the EXIF block (make, model). Its date is that of the last change, and not used.
        detail: The Exif sub-directory (date taken, date digitized).
        gps: The GPS sub-directory.
        xmp: The XMP packet.
        iptc: IPTC data by record and number.
        damaged: Parts of the EXIF block could not be read: a date that is not among the tags may have been there.
    """
    (xmp_taken, xmp_digitized), (iptc_taken, iptc_digitized) = xmp_dates(xmp), iptc_dates(iptc or {})
    date = best_date(
        (_date(detail, TAKEN), *xmp_taken, *iptc_taken, "" if damaged else None),
        (_date(detail, DIGITIZED), *xmp_digitized, *iptc_digitized),
    )
    return ExifMetadata(date.taken, _place(gps), _camera(main), date.precision)


def _text(tag: object) -> str:
    """A tag as printable text; bytes are read as Latin-1, the text ends at the first zero byte."""
    if isinstance(tag, bytes):
        tag = tag.decode("latin-1")
    if not isinstance(tag, str):
        return ""
    printable = "".join(letter for letter in tag.split("\0")[0] if letter.isprintable())
    return " ".join(printable.split())[:MAX_TEXT_LENGTH]


def _date(tags: Tags, tag: int) -> str | None:
    """The text of a date; empty where the tag is there and holds none."""
    return _text(tags[tag]) if tag in tags else None


def _degrees(tag: object, reference: object, positive: str, negative: str) -> float | None:
    """Degrees, minutes and seconds with their hemisphere as one signed number; None unless all of it is plausible."""
    letter = _text(reference).upper()
    if letter not in (positive, negative):
        return None
    if not isinstance(tag, Sequence) or isinstance(tag, str | bytes) or not 1 <= len(tag) <= 3:
        return None
    try:
        degrees, minutes, seconds = (*(float(part) for part in tag), 0.0, 0.0)[:3]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    parts = (degrees, minutes, seconds)
    if not all(math.isfinite(part) and part >= 0 for part in parts) or minutes >= 60 or seconds >= 60:
        return None
    if (degrees % 1 and (minutes or seconds)) or (minutes % 1 and seconds):
        return None  # a fraction and a finer part beside it: one of them is wrong
    angle = degrees + minutes / 60 + seconds / 3600
    return -angle if letter == negative else angle


def _place(gps: Tags) -> tuple[float, float] | None:
    """Latitude and longitude; exactly 0 is what cameras write for "unknown", for both or for the one that is."""
    if STATUS in gps and _text(gps[STATUS]).upper() != "A":
        return None  # void: the receiver had no position when the photo was taken
    if ERROR_METRES in gps and not _at_most(gps[ERROR_METRES], MAX_ERROR_METRES):
        return None
    latitude = _degrees(gps.get(LATITUDE), gps.get(LATITUDE_REF), "N", "S")
    longitude = _degrees(gps.get(LONGITUDE), gps.get(LONGITUDE_REF), "E", "W")
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    return None if 0 in (latitude, longitude) else (latitude, longitude)


def _at_most(tag: object, limit: float) -> bool:
    """Whether a tag is a number of at most the limit."""
    try:
        return float(tag) <= limit  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return False


def _camera(main: Tags) -> str | None:
    """Maker and model; the maker once."""
    make, model = _text(main.get(MAKE)), _text(main.get(MODEL))
    name = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    return name[:MAX_TEXT_LENGTH] or None
