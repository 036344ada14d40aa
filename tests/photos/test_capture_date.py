"""Capture date and place of photos: read in all common formats, and unknown if only partly readable."""

from __future__ import annotations

import io
import struct
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedface.photos.capture_date import Precision, iptc_dates, parse_date, xmp_dates
from fedface.photos.exif import read_exif
from fedface.photos.face_alignment import Face
from fedface.photos.image_io import read_photo
from fedface.photos.library import summary
from fedface.photos.scan import scan_library

AFTERNOON = datetime(2016, 5, 4, 13, 35, 20)
DAY = datetime(2016, 5, 4)
EDITED = "2021:01:01 10:00:00"
SYDNEY = {1: "S", 2: (33.0, 51.0, 30.0), 3: "E", 4: (151.0, 12.0, 0.0)}
GPS, DETAIL = 0x8825, 0x8769


@pytest.mark.parametrize(
    "text",
    [
        "2016:05:04 13:35:20", "2016-05-04 13:35:20", "2016/05/04 13:35:20", "2016.05.04 13.35.20",
        "2016:5:4 13:35:20", "2016: 5: 4 13:35:20", "2016:05:04:13:35:20", "20160504 133520", "20160504133520",
        "20160504T133520", "2016-05-04T13:35:20", "2016-05-04T13:35:20.125", "2016-05-04T13:35:20+10:00",
        "2016-05-04T13:35:20.5-0700", "20160504 133520+1000", "2016:05:04 01:35:20 PM", "2016:05:04 1:35:20pm",
        "2016:05:04 PM 01:35:20", "2016:05:04 01:35:20 p.m.",
    ],
)  # fmt: skip
def test_a_date_is_read_in_every_common_format(text: str) -> None:
    date = parse_date(text)
    assert (date.taken, date.precision) == (AFTERNOON, "exact")


@pytest.mark.parametrize(
    ("text", "taken", "precision"),
    [
        ("2016:05:04 12:05:00 AM", datetime(2016, 5, 4, 0, 5), "exact"),
        ("2016:05:04 12:05:00 PM", datetime(2016, 5, 4, 12, 5), "exact"),
        ("2016:05:04 13:35", datetime(2016, 5, 4, 13, 35), "exact"),
        ("2016-05-04T13:35:20Z", AFTERNOON, "utc"),
        ("2016:05:04 13:35:20 UTC", AFTERNOON, "utc"),
        ("2016:05:04", DAY, "day"),
        ("2016:05:04   :  :  ", DAY, "day"),
        ("2016:05:04 24:00:00", DAY, "day"),
        ("2016:05:04 12:60:00", DAY, "day"),
        ("2016:05:04 12:35:75", DAY, "day"),
        ("2016:05:04 13:35:20 PM", DAY, "day"),
        ("2016:05:04 00:35:20 AM", DAY, "day"),
        ("2016:05:04 \uc624\ud6c4 1:35:20", DAY, "day"),
        ("2016-05-04+10:00", DAY, "day"),
        ("2016:05:04 noon", DAY, "day"),
    ],
)
def test_a_partly_readable_date_is_partly_known(text: str, taken: datetime, precision: Precision) -> None:
    """Of half a date the day, of one in UTC no local time."""
    date = parse_date(text)
    assert (date.taken, date.precision) == (taken, precision)


UNREADABLE = [
    "1970:01:01 09:00:00", "1904-01-01", "1980:01:01 00:00:12",
    "", "    :  :     :  :  ", "0000:00:00 00:00:00", "2016:13:01 12:00:00", "2016:02:30 12:00:00",
    "2016:00:00 12:00:00", "2559:05:04 12:00:00", "16:05:04 12:00:00", "04/05/2016 12:00:00", "2016",
    "2016:05", "2016:05:123", "yesterday", "x" * 10_000, "2016#05#04 12:35:00", b"\xff\xfe", 7, (2016, 5, 4),
]  # fmt: skip


@pytest.mark.parametrize("tag", UNREADABLE)
def test_an_unreadable_date_is_not_replaced_by_the_modification_date(tag: object) -> None:
    found = read_exif({0x0132: EDITED}, {0x9003: tag, 0x9004: EDITED}, {})
    assert (found.taken, found.date_precision) == (None, "unreadable")
    assert read_exif({0x0132: EDITED}, {0x9004: tag}, {}).taken is None
    readable = read_exif({0x0132: EDITED}, {0x9003: tag}, {}, xmp=xmp("exif:DateTimeOriginal"))
    assert (readable.taken, readable.date_precision) == (AFTERNOON, "exact")


def test_a_modification_date_is_not_a_capture_date() -> None:
    """All eight photos of the sample library that have no other date were saved by an editor."""
    for detail in ({}, {0xA001: 1, 0xA002: 640}):
        assert read_exif({0x0132: EDITED}, detail, {}) == read_exif({}, {}, {})


def test_a_missing_date_is_not_an_unreadable_one() -> None:
    assert read_exif({}, {}, {}).date_precision == "exact" and read_exif({}, {}, {}).taken is None


def xmp(name: str, value: str = "2016-05-04T13:35:20+10:00", *, element: bool = False) -> bytes:
    """An XMP packet with one property, and an edit years later."""
    prefix = name.split(":")[0]
    inside = f"<{name}>{value}</{name}>" if element else ""
    attribute = "" if element else f' {name}="{value}"'
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:{prefix}="urn:{prefix}" xmp:ModifyDate="2021-01-01T10:00:00"{attribute}>\n {inside}\n '
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize(
    "name", ["exif:DateTimeOriginal", "photoshop:DateCreated", "exif:DateTimeDigitized", "xmp:CreateDate"]
)
def test_a_date_in_xmp_is_read(name: str, element: bool) -> None:
    assert read_exif({0x0132: EDITED}, {}, {}, xmp=xmp(name, element=element)).taken == AFTERNOON


@pytest.mark.parametrize(
    "value",
    [
        "<exif:DateTimeOriginal/>",
        '<exif:DateTimeOriginal rdf:resource="2016-05-04"/>',
        '<exif:DateTimeOriginal rdf:parseType="Resource"><rdf:value>2016-05-04</rdf:value></exif:DateTimeOriginal>',
        f"<exif:DateTimeOriginal>2016-05-04T13:35:20.{'0' * 80}</exif:DateTimeOriginal>",
        "<photoshop:DateCreated><rdf:Seq><rdf:li>2016</rdf:li></rdf:Seq></photoshop:DateCreated>",
    ],
)
def test_a_date_that_xmp_writes_in_another_way_is_not_replaced_by_a_later_one(value: str) -> None:
    packet = xmp("xmp:CreateDate", EDITED, element=True).replace(
        b"<xmp:CreateDate>", value.encode() + b"<xmp:CreateDate>"
    )
    found = read_exif({}, {}, {}, xmp=packet)
    assert (found.taken, found.date_precision) == (None, "unreadable")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("element", ['exif:DateTimeOriginal xml:lang="x-default"', "DateTimeOriginal"])
def test_a_date_in_xmp_is_read_in_every_encoding_with_qualifiers_and_without_a_prefix(
    encoding: str, element: str
) -> None:
    packet = f"<{element}>2016-05-04T13:35:20</{element.split()[0]}>".encode(encoding)
    assert read_exif({}, {}, {}, xmp=packet).taken == AFTERNOON


def test_xmp_is_bounded_and_no_entity_is_expanded() -> None:
    """An entity bomb remains text; two values of one property are no date."""
    bomb = b'<!DOCTYPE x [<!ENTITY a "' + b"2016" * 10 + b'">' + b'<!ENTITY b "&a;&a;&a;">' * 100 + b"]>"
    packet = bomb + xmp("exif:DateTimeOriginal", "&b;", element=True)
    assert (
        xmp_dates(packet) == (["&b;"], [])
        and read_exif({}, {}, {}, xmp=packet).date_precision == "unreadable"
    )
    both = xmp("exif:DateTimeOriginal") + xmp("exif:DateTimeOriginal", "2019-01-01")
    assert xmp_dates(both) == ([""], [])
    assert xmp_dates(b" " * 1_000_000 + xmp("exif:DateTimeOriginal")) == ([], [])
    assert xmp_dates(xmp("exif:DateTimeOriginal").decode().encode("utf-16"))[0] == [
        "2016-05-04T13:35:20+10:00"
    ]
    assert xmp_dates(b"a:DateCreated" * 80_000 + b"=" * 100_000) == ([], [])


@pytest.mark.parametrize(
    ("tags", "taken", "precision"),
    [
        ({(2, 55): b"20160504", (2, 60): b"133520+1000"}, AFTERNOON, "exact"),
        ({(2, 62): b"20160504", (2, 63): b"133520"}, AFTERNOON, "exact"),
        ({(2, 55): b"20160504"}, DAY, "day"),
        ({(2, 55): b"20160504", (2, 60): b"256199"}, DAY, "day"),
        ({(2, 55): b"20160500"}, None, "unreadable"),
        ({(2, 55): [b"20160504", b"20190101"]}, None, "unreadable"),
    ],
)
def test_a_date_in_iptc_is_read(tags: dict, taken: datetime | None, precision: Precision) -> None:
    found = read_exif({0x0132: EDITED}, {}, {}, iptc=tags)
    assert (found.taken, found.date_precision) == (taken, precision)
    assert len(iptc_dates(tags)[0]) + len(iptc_dates(tags)[1]) == 1


BAD_PLACES: list[dict[int, Any]] = [
    {1: None}, {3: None}, {1: ""}, {3: " "}, {1: "X"}, {3: "N"}, {1: "E"}, {1: "north-ish"}, {1: 7}, {1: b"\0\0"},
    {9: "V"}, {9: b"V\0"}, {9: ""}, {9: "?"}, {2: (33.0, 60.0, 0.0)}, {4: (151.0, 75.0, 0.0)},
    {2: (33.0, 51.0, 60.0)}, {4: (151.0, 12.0, 3000.0)}, {2: (-33.0, 51.0, 30.0)}, {2: (91.0, 0.0, 0.0)},
    {4: (180.0, 0.0, 1.0)}, {2: (33.86, 51.0, 30.0)}, {4: (151.0, 12.5, 30.0)},
    {2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}, {2: (0.0, 0.0, 0.0)}, {4: (0.0, 0.0, 0.0)},
    {2: (float("nan"), 0.0, 0.0)}, {2: None}, {2: (33.0, 51.0, 30.0, 1.0)}, {31: 20_000.0}, {31: float("nan")},
]  # fmt: skip


def gps_of(changes: dict[int, Any]) -> dict[int, Any]:
    return {tag: value for tag, value in (SYDNEY | changes).items() if value is not None}


@pytest.mark.parametrize("changes", BAD_PLACES)
def test_a_partly_readable_or_void_place_is_unknown(changes: dict[int, Any]) -> None:
    assert read_exif({}, {}, gps_of(changes)).place is None


@pytest.mark.parametrize(
    "changes",
    [{}, {1: b"S\0"}, {1: "s "}, {9: "A"}, {31: 12.0}, {2: (33.858333333,)}, {2: (33.0, 51.5, 0.0)}],
)
def test_a_complete_place_is_known(changes: dict[int, Any]) -> None:
    assert read_exif({}, {}, gps_of(changes)).place == pytest.approx((-33.858333333, 151.2))


class OneFace:
    """Detects a face in the centre of every photo."""

    name = "one face"

    def find(self, pixels: np.ndarray) -> list[Face]:
        points = np.array([[60.0, 80], [140, 80], [100, 110], [70, 150], [130, 150]])
        return [Face((40.0, 40.0, 160.0, 180.0), points, 1.0)]


def blobs(seed: int) -> Image.Image:
    """An image that differs from that of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 200), Image.Resampling.BICUBIC)


def photo(
    path: Path, seed: int, *, original: Any = None, changed: Any = None, gps: dict | None = None, **more: Any
) -> None:
    """A JPEG with the given dates and place."""
    exif = Image.Exif()
    if changed is not None:
        exif[0x0132] = changed
    if original is not None:
        exif.get_ifd(DETAIL)[0x9003] = original
    if gps:
        exif.get_ifd(GPS).update(gps)
    path.parent.mkdir(exist_ok=True)
    blobs(seed).save(path, exif=exif, quality=90, **more)


def occasions(folder: Path) -> int:
    """The number of occasions in the folder, counting photos with and without a face."""
    cache = folder.parent / "index.sqlite"
    scan_library(folder, detector=OneFace(), cache=cache)
    return summary(folder, cache=cache).occasions


FIRST = {"original": "2016:05:04 12:34:00", "changed": "2016:05:04 18:00:00"}


@pytest.mark.parametrize(
    "second",
    [
        {"original": "2016-05-04 12:35:00", "changed": EDITED},
        {"original": "2016-05-04T12:35:00+10:00", "changed": EDITED},
        {"original": "2016-05-04T03:35:00Z", "changed": EDITED},
        {"original": "2016:05:04 12:35:00 PM"},
        {"original": "2016:05:04 25:61:00", "changed": EDITED},
        {"original": "0000:00:00 00:00:00", "changed": EDITED},
        {"original": "    :  :     :  :  ", "changed": EDITED},
        {"original": "                   ", "changed": EDITED},
        {"original": "last summer", "changed": EDITED},
        {"changed": EDITED, "xmp": xmp("exif:DateTimeOriginal", "2016-05-04T12:35:00")},
        {"original": "?", "changed": EDITED, "xmp": xmp("photoshop:DateCreated", "2016-05-04")},
    ],
)
def test_two_photos_of_one_event_are_one_occasion_however_their_dates_are_written(
    tmp_path: Path, second: dict[str, Any]
) -> None:
    photo(tmp_path / "photos" / "1.jpg", 1, **FIRST)
    photo(tmp_path / "photos" / "2.jpg", 2, **second)
    assert occasions(tmp_path / "photos") == 1


@pytest.mark.parametrize(
    "changes", [{1: None}, {1: "", 3: ""}, {9: "V", 2: (0.0, 1.0, 0.0)}, {2: (33.0, 99.0, 0.0)}]
)
def test_two_photos_of_one_event_are_one_occasion_however_their_places_are_written(
    tmp_path: Path, changes: dict[int, Any]
) -> None:
    photo(tmp_path / "photos" / "1.jpg", 1, original="2016:05:04 12:34:00", gps=SYDNEY)
    photo(tmp_path / "photos" / "2.jpg", 2, original="2016:05:04 12:35:00", gps=gps_of(changes))
    assert occasions(tmp_path / "photos") == 1


def test_two_events_stay_two_occasions(tmp_path: Path) -> None:
    """The negative control."""
    photo(tmp_path / "photos" / "1.jpg", 1, original="2016:05:04 12:34:00", gps=SYDNEY)
    photo(tmp_path / "photos" / "2.jpg", 2, original="2016:05:04 12:35:00", gps=SYDNEY | {1: "N"})
    photo(tmp_path / "photos" / "3.jpg", 3, original="2016-05-06T12:35:00", gps=SYDNEY)
    assert occasions(tmp_path / "photos") == 3


def iptc_block(day: bytes, time: bytes) -> bytes:
    """An APP13 segment with the IPTC date and time of creation."""
    records = b"".join(
        b"\x1c\x02" + bytes([number]) + struct.pack(">H", len(value)) + value
        for number, value in ((55, day), (60, time))
    )
    resource = b"8BIM" + struct.pack(">H", 0x0404) + b"\0\0" + struct.pack(">I", len(records)) + records
    data = b"Photoshop 3.0\0" + resource + b"\0" * (len(records) % 2)
    return b"\xff\xed" + struct.pack(">H", len(data) + 2) + data


def test_dates_are_found_in_the_files_of_every_kind(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 1, changed=EDITED, xmp=xmp("exif:DateTimeOriginal"))
    blobs(1).save(tmp_path / "a.webp", xmp=xmp("exif:DateTimeOriginal"))
    blobs(1).save(tmp_path / "a.heic", xmp=xmp("exif:DateTimeOriginal"))
    plain = io.BytesIO()
    blobs(1).save(plain, "JPEG")
    whole = plain.getvalue()
    (tmp_path / "iptc.jpg").write_bytes(whole[:2] + iptc_block(b"20160504", b"133520+0000") + whole[2:])
    for name in ("a.jpg", "a.webp", "a.heic", "iptc.jpg"):
        assert read_photo(tmp_path / name).metadata.taken == AFTERNOON, name


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 7])
def test_an_exif_block_with_a_damaged_header_may_have_held_a_date(tmp_path: Path, place: int) -> None:
    """Byte order, magic number, and where the first directory begins."""
    photo(tmp_path / "a.jpg", 1, original="2016:05:04 13:35:20", changed=EDITED)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    content[content.index(b"Exif\0\0") + 6 + place] ^= 0x7F
    (tmp_path / "a.jpg").write_bytes(content)
    found = read_photo(tmp_path / "a.jpg").metadata
    assert (found.taken, found.date_precision) == (None, "unreadable")


def test_a_truncated_exif_block_has_no_usable_date(tmp_path: Path) -> None:
    """The modification date before the cut is not the capture date."""
    photo(tmp_path / "whole.jpg", 1, original="2016:05:04 13:35:20", changed=EDITED)
    content = (tmp_path / "whole.jpg").read_bytes()
    start = content.index(b"2016:05:04")
    assert read_photo(tmp_path / "whole.jpg").metadata.taken == AFTERNOON
    marker = content.index(b"\xff\xe1")
    length = struct.unpack(">H", content[marker + 2 : marker + 4])[0]
    cut = struct.pack(">H", start + 4 - marker - 2)
    (tmp_path / "cut.jpg").write_bytes(
        content[: marker + 2] + cut + content[marker + 4 : start + 4] + content[marker + 2 + length :]
    )
    found = read_photo(tmp_path / "cut.jpg").metadata
    assert (found.taken, found.date_precision) == (None, "unreadable")
