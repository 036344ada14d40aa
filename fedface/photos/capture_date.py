"""When a photo was taken, from EXIF, XMP and IPTC dates in the dialects that cameras and programs write.

A date that is there and names no day is `unreadable`, never replaced by the date of an edit: a wrong date would part
an occasion and weaken its guarantee, an unknown one merges (docs/occasions.md). XMP is searched with bounded regular
expressions instead of an XML parser, so that no entity is ever expanded.
Sources: CIPA DC-008 (Exif 2.32); ISO 16684-1 (XMP); IPTC IIM 4.2; Metadata Working Group, Guidelines 2.0 (2010).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Literal

# exact: local time of the camera. day: only its day, at midnight. utc: to the second, in UTC, the local time unknown.
# unreadable: there is a date, but it names no day. A photo without any date is "exact", with `taken` None.
Precision = Literal["exact", "day", "utc", "unreadable"]
YEARS = range(1900, 2101)
# Where clocks start: what cameras and programs write that know no date (Mac, Unix, the same west of UTC, DOS).
CLOCK_STARTS = frozenset(
    {date(1900, 1, 1), date(1904, 1, 1), date(1970, 1, 1), date(1969, 12, 31), date(1980, 1, 1)}
)
MAX_XMP = 1_000_000  # bytes that are searched
MAX_DATE = 64  # characters

IptcTags = Mapping[tuple[int, int], object]

_DAY = re.compile(r"(\d{4})(?: ?[:\-/.] ?(\d{1,2}) ?[:\-/.] ?(\d{1,2})(?!\d)|(\d\d)(\d\d))[ Tt_,:.]*(.*)")
_TIME = re.compile(
    r"(?P<early>[ap]\.? ?m\.?)? ?"
    r"(?:(\d{1,2}) ?[:.] ?(\d{1,2})(?: ?[:.] ?(\d{1,2})(?:[.,]\d*)?)?|(\d\d)(\d\d)(\d\d)?) ?"
    r"(?P<late>[ap]\.? ?m\.?)? ?(?P<zone>z|utc|gmt|[+-]\d\d(?::?\d\d)?)?",
    re.IGNORECASE,
)
# An attribute's or an element's value; no value at all where XMP writes the date in yet another way.
_XMP_DATE = re.compile(
    r"(?:<|[<\s][\w.-]{1,32}:)(DateTimeOriginal|DateCreated|DateTimeDigitized|CreateDate)(?![\w.:-])"
    r"(?:\s{0,8}=\s{0,8}[\"']([^<>\"']{0,64})[\"']|[^<>]{0,128}>\s{0,8}([^<>]{0,64})<|)"
)


@dataclass(frozen=True)
class CaptureDate:
    """When a photo was taken; `taken` is None where that is not known."""

    taken: datetime | None = None
    precision: Precision = "exact"


UNREADABLE = CaptureDate(None, "unreadable")


def parse_date(text: str) -> CaptureDate:
    """The year-first dialects: any separator or none, 12-hour clocks, ISO 8601; an offset from UTC is left out.

    A time that cannot be read leaves the day; a day outside 1900 to 2100, not in the calendar or in
    `CLOCK_STARTS` is unreadable.
    """
    found = _DAY.fullmatch(" ".join(text[:MAX_DATE].split()))
    if found is None:
        return UNREADABLE
    year, month, day = int(found[1]), int(found[2] or found[4]), int(found[3] or found[5])
    try:
        midnight = datetime(year, month, day)
    except ValueError:
        return UNREADABLE
    if year not in YEARS or midnight.date() in CLOCK_STARTS:
        return UNREADABLE
    time = _TIME.fullmatch(found[6].strip())
    since = None if time is None else _since_midnight(time)
    if time is None or since is None:
        return CaptureDate(midnight, "day")
    zone = (time["zone"] or "").lower()
    return CaptureDate(midnight + since, "utc" if zone in ("z", "utc", "gmt") else "exact")


def _since_midnight(time: re.Match[str]) -> timedelta | None:
    """None for a time that no clock shows, such as 12:60 or 13:00 PM."""
    hour, minute, second = (
        int(separated or joined or 0)
        for separated, joined in zip(time.group(2, 3, 4), time.group(5, 6, 7), strict=True)
    )
    if half := (time["early"] or time["late"] or "").lower():
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * half.startswith("p")
    if hour > 23 or minute > 59 or second > 59:
        return None
    return timedelta(hours=hour, minutes=minute, seconds=second)


def best_date(*ranks: Sequence[object]) -> CaptureDate:
    """The first readable date of the first rank that has any date, readable or not.

    Args:
        ranks: Dates as they stand in the file, the most telling rank first; None where a tag is missing.
    """
    for rank in ranks:
        dates = [parse_date(tag) if isinstance(tag, str) else UNREADABLE for tag in rank if tag is not None]
        if dates:
            return next((date for date in dates if date.taken is not None), UNREADABLE)
    return CaptureDate()


def xmp_dates(packet: bytes) -> tuple[list[str], list[str]]:
    """The dates of an XMP packet: when the photo was taken, and when it was digitized.

    Two values of one property, as where a packet describes the parts of a montage, make it unreadable: an empty text.
    So does a value that is no plain text, or longer than a date.
    """
    found: dict[str, set[str]] = {}
    letters = packet[:MAX_XMP].replace(
        b"\0", b""
    )  # in UTF-16 and UTF-32 each letter of a date has zeros beside it
    for name, attribute, element in _XMP_DATE.findall(letters.decode("utf-8", "ignore")):
        found.setdefault(name, set()).add(attribute or element)
    dates = {name: texts.pop() if len(texts) == 1 else "" for name, texts in found.items()}
    taken, digitized = ("DateTimeOriginal", "DateCreated"), ("DateTimeDigitized", "CreateDate")
    return [dates[name] for name in taken if name in dates], [
        dates[name] for name in digitized if name in dates
    ]


def iptc_dates(tags: IptcTags) -> tuple[list[str], list[str]]:
    """The dates of IPTC record 2, each with its time: created (55, 60), digitized (62, 63)."""
    return list(_iptc(tags, 55, 60)), list(_iptc(tags, 62, 63))


def _iptc(tags: IptcTags, day: int, time: int) -> Iterator[str]:
    if (2, day) in tags:
        parts = [tags.get((2, number)) for number in (day, time)]
        yield " ".join(part.decode("latin-1") for part in parts if isinstance(part, bytes))
