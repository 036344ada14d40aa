"""Occasions: compared with a slow reference, with real photos, and at the limits of the rule."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import jpeg_round_trip

from fedface.photos.capture_date import Precision
from fedface.photos.image_io import read_photo
from fedface.photos.occasions import (
    DEFAULT_RULE,
    OccasionRule,
    PhotoSignature,
    fingerprint,
    group,
    numbered,
)

HERE = Path("here")
NOON = datetime(2024, 6, 1, 12)
PARIS, VERSAILLES, LYON = (48.8566, 2.3522), (48.8049, 2.1204), (45.7640, 4.8357)
ALONE = OccasionRule(undated="alone")


def at(hours: float, place: tuple[float, float] | None = None) -> PhotoSignature:
    return PhotoSignature(folder=HERE, taken=NOON + timedelta(hours=hours), place=place)


def linked(one: PhotoSignature, other: PhotoSignature, rule: OccasionRule) -> bool:
    """The rule for two photos, written out; the distance by the haversine formula."""
    if one.content and one.content == other.content:
        return True
    if one.taken is not None and other.taken is not None:
        (first, last), (begin, end) = span(one), span(other)
        soon = max(first, begin) - min(last, end) <= timedelta(hours=rule.gap_hours)
        unplaced = {one.date_precision, other.date_precision} != {"exact"} or None in (one.place, other.place)
        if soon and (unplaced or km(one.place, other.place) <= rule.radius_km):
            return True
    if one.fingerprint is not None and other.fingerprint is not None:
        both = int.from_bytes(one.fingerprint, "big") ^ int.from_bytes(other.fingerprint, "big")
        if both.bit_count() <= rule.max_fingerprint_distance:
            return True
    undated = one.taken is None and other.taken is None
    unknown = undated or "unreadable" in (one.date_precision, other.date_precision)
    return rule.undated == "by-folder" and unknown and one.folder == other.folder


def span(photo: PhotoSignature) -> tuple[datetime, datetime]:
    """The time interval in which a dated photo was taken."""
    assert photo.taken is not None
    before, after = {"exact": (0, 0), "day": (0, 24), "utc": (12, 14)}[photo.date_precision]
    return photo.taken - timedelta(hours=before), photo.taken + timedelta(hours=after)


def dated(taken: datetime | None, precision: Precision, folder: Path, place, fingerprint, content):
    """A photo whose date has this precision."""
    known = precision if taken is not None else ("unreadable" if precision == "unreadable" else "exact")
    return PhotoSignature(
        folder=folder,
        taken=None if precision == "unreadable" else taken,
        place=place,
        fingerprint=fingerprint,
        date_precision=known,
        content=content,
    )


def km(one: tuple[float, float], other: tuple[float, float]) -> float:
    (a, b), (c, d) = ((math.radians(degrees) for degrees in place) for place in (one, other))
    square = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * 6371.0 * math.asin(math.sqrt(min(1.0, square)))


def slowly(shots: list[PhotoSignature], rule: OccasionRule) -> list[int]:
    """Traversal along links from each photo, one pair at a time."""
    groups = [-1] * len(shots)
    for start in range(len(shots)):
        if groups[start] >= 0:
            continue
        number, reached = max(groups) + 1, [start]
        while reached:
            here = reached.pop()
            groups[here] = number
            reached += [
                there
                for there in range(len(shots))
                if groups[there] < 0 and linked(shots[here], shots[there], rule)
            ]
    return groups


def flipped(bits: list[int]) -> bytes:
    return sum(1 << bit for bit in set(bits)).to_bytes(16, "big")


PRINTS = st.lists(st.integers(0, 127), max_size=12).map(flipped)
SHOTS = st.builds(
    dated,
    precision=st.sampled_from(["exact", "exact", "exact", "day", "utc", "unreadable"]),
    content=st.sampled_from([b"", b"", b"", b"", b"one", b"two"]),
    folder=st.sampled_from([HERE, HERE / "deeper", Path("there")]),
    taken=st.none() | st.integers(0, 90 * 3600).map(lambda second: NOON + timedelta(seconds=second)),
    place=st.none() | st.tuples(st.floats(48.8, 49.0), st.floats(2.2, 2.5)) | st.just(LYON),
    fingerprint=st.none() | PRINTS,
)
RULES = st.builds(
    OccasionRule,
    gap_hours=st.floats(0.5, 6),
    radius_km=st.floats(0.1, 20),
    max_fingerprint_distance=st.integers(0, 12),
    undated=st.sampled_from(["by-folder", "alone"]),
)
LIBRARIES = st.lists(SHOTS, max_size=14)


@settings(deadline=None, max_examples=300)
@given(LIBRARIES, RULES)
def test_the_occasions_equal_the_slow_reference(shots: list[PhotoSignature], rule: OccasionRule) -> None:
    assert group(shots, rule).tolist() == slowly(shots, rule)


def test_a_library_larger_than_one_block_equals_the_slow_reference() -> None:
    """Seven hundred photos of every kind, so that links cross blocks."""
    rng = np.random.default_rng(0)
    shots = [
        PhotoSignature(
            folder=Path(str(rng.integers(300))),
            taken=NOON + timedelta(hours=float(rng.uniform(0, 4000))) if rng.random() < 0.7 else None,
            place=tuple(rng.uniform((48, 2), (48.5, 2.5))) if rng.random() < 0.5 else None,
            fingerprint=flipped(rng.integers(0, 128, 9).tolist()) if rng.random() < 0.8 else None,
        )
        for _ in range(700)
    ]
    groups = group(shots)
    assert groups.tolist() == slowly(shots, DEFAULT_RULE)
    assert 50 < groups.max() < 650


@settings(deadline=None, max_examples=200)
@given(LIBRARIES, RULES)
def test_removing_one_occasion_leaves_the_others_unchanged(
    shots: list[PhotoSignature], rule: OccasionRule
) -> None:
    """The theorem: libraries that differ by one occasion are neighbours, for any occasion."""
    groups = group(shots, rule)
    for gone in range(int(groups.max(initial=-1)) + 1):
        left = [shot for shot, number in zip(shots, groups, strict=True) if number != gone]
        assert group(left, rule).tolist() == numbered(groups[groups != gone]).tolist()


@settings(deadline=None, max_examples=200)
@given(LIBRARIES, SHOTS, RULES)
def test_one_photo_more_only_merges_occasions(
    shots: list[PhotoSignature], more: PhotoSignature, rule: OccasionRule
) -> None:
    before, after = group(shots, rule), group([*shots, more], rule)
    for number in range(int(before.max(initial=-1)) + 1):
        assert len(set(after[:-1][before == number].tolist())) == 1


@settings(deadline=None, max_examples=100)
@given(LIBRARIES, RULES, st.randoms(use_true_random=False))
def test_the_order_of_the_photos_does_not_matter(
    shots: list[PhotoSignature], rule: OccasionRule, rng
) -> None:
    order = list(range(len(shots)))
    rng.shuffle(order)
    shuffled = group([shots[number] for number in order], rule)
    assert numbered(group(shots, rule)[order]).tolist() == shuffled.tolist()


def test_no_photos_have_no_occasions() -> None:
    assert group([]).shape == (0,) and group([]).dtype == np.int64


def test_the_gap_is_exact_to_the_second() -> None:
    second = 1 / 3600
    assert group([at(0), at(4)]).tolist() == [0, 0]
    assert group([at(0), at(4 + second)]).tolist() == [0, 1]


def test_midnight_does_not_split_an_occasion() -> None:
    assert group([at(11.9), at(12.1)]).tolist() == [0, 0]


def test_a_chain_of_photos_is_one_occasion_however_long() -> None:
    """Thirty photos three hours apart, whose first and last are almost four days apart."""
    assert set(group([at(3.0 * step) for step in range(30)])) == {0}


def test_two_places_at_once_are_two_occasions_unless_a_photo_without_a_place_joins_them() -> None:
    both = [at(0, PARIS), at(1, LYON), at(2, PARIS), at(3, LYON)]
    assert group(both).tolist() == [0, 1, 0, 1]
    assert set(group([*both, at(1.5)])) == {0}


def test_the_radius_is_in_kilometres_also_across_the_date_line() -> None:
    """From Paris to Versailles it is 17.9 km; a fiftieth of a degree at the equator is 2.2 km."""
    assert group([at(0, PARIS), at(0, VERSAILLES)], OccasionRule(radius_km=17.5)).tolist() == [0, 1]
    assert group([at(0, PARIS), at(0, VERSAILLES)], OccasionRule(radius_km=18.5)).tolist() == [0, 0]
    assert group([at(0, (0.0, 179.99)), at(0, (0.0, -179.99))]).tolist() == [0, 0]
    assert group([at(0, (90.0, 10.0)), at(0, (90.0, -100.0))]).tolist() == [0, 0]
    assert group([at(0, (0.0, 0.5)), at(0, (0.0, -179.5))], OccasionRule(radius_km=20_100)).tolist() == [0, 0]


def test_undated_photos_of_one_folder_are_one_occasion_by_default() -> None:
    shots = [PhotoSignature(folder=Path(name)) for name in ("a", "b", "a", "a/b")]
    assert group(shots).tolist() == [0, 1, 0, 2]
    assert group(shots, ALONE).tolist() == [0, 1, 2, 3]
    assert group([PhotoSignature(folder=HERE), at(0)]).tolist() == [0, 1]


def test_a_photo_with_an_unreadable_date_is_linked_with_its_folder() -> None:
    """It may have been taken with any of them; photos of other folders are not linked."""
    unknown = PhotoSignature(folder=HERE, date_precision="unreadable")
    elsewhere = [PhotoSignature(folder=Path("there")), replace(at(500), folder=Path("there"))]
    shots = [at(0), at(100), PhotoSignature(folder=HERE), *elsewhere]
    assert group(shots).tolist() == [0, 1, 2, 3, 4]
    assert group([*shots, unknown]).tolist() == [0, 0, 0, 1, 2, 0]
    assert group([*shots, unknown], ALONE).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_photo_with_only_a_day_is_linked_with_the_whole_day() -> None:
    """Noon of the first of June; the day ends twelve hours later, and the gap is four hours."""
    day = PhotoSignature(folder=HERE, taken=NOON - timedelta(hours=12), date_precision="day", place=LYON)
    for hours, together in ((0, True), (16, True), (-16, True), (16.01, False), (-16.01, False)):
        assert (len(set(group([at(hours, PARIS), day]).tolist())) == 1) == together
    utc = replace(day, taken=NOON, date_precision="utc")
    for hours, together in ((18, True), (-16, True), (18.01, False), (-16.01, False)):
        assert (len(set(group([at(hours, PARIS), utc]).tolist())) == 1) == together


def test_files_of_equal_bytes_are_one_occasion_also_without_a_fingerprint() -> None:
    shots = [replace(at(hours), folder=Path(str(hours)), content=b"wall") for hours in (0, 100)]
    assert group([*shots, at(200)]).tolist() == [0, 0, 1]


def test_similar_photos_are_one_occasion_whatever_their_dates() -> None:
    """Ten of 128 bits apart is similar, eleven is not, at any position."""
    for bits in (range(10), range(60, 70), range(118, 128)):
        shots = [replace(at(0), fingerprint=bytes(16)), replace(at(999), fingerprint=flipped(list(bits)))]
        assert group(shots).tolist() == [0, 0]
        assert group(shots, OccasionRule(max_fingerprint_distance=9)).tolist() == [0, 1]


def test_many_photos_at_one_time_and_place_do_not_need_quadratic_memory() -> None:
    """Six thousand photos, all linked: eighteen million links, at most two million in memory."""
    rng = np.random.default_rng(1)
    party = [at(0, tuple(rng.normal(PARIS, 0.001))) for _ in range(6000)]
    assert set(group(party)) == {0}


def blobs(seed: int, height: int = 300, width: int = 400) -> np.ndarray:
    """An image with bright and dark regions, float (h, w, 3) in 0..255."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width] / height
    light = np.zeros((height, width))
    for _ in range(12):
        y, x, reach, strength = rng.uniform((0, 0, 0.05, -90), (1, width / height, 0.3, 90))
        light += strength * np.exp(-((down - y) ** 2 + (across - x) ** 2) / reach**2)
    return np.repeat((128 + light).clip(0, 255)[:, :, None], 3, axis=2)


def print_of(pixels: np.ndarray) -> bytes:
    generated = fingerprint(np.asarray(pixels.round(), dtype=np.uint8))
    assert generated is not None and len(generated) == 16
    return generated


def apart(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def test_a_burst_without_dates_is_one_occasion_and_another_motif_is_not() -> None:
    """Five frames, each shifted by a pixel, with its own noise, light and JPEG; in five folders."""
    rng = np.random.default_rng(2)
    motif, frames = blobs(3, 310, 410), []
    for number in range(5):
        view = motif[number : number + 300, number : number + 400] * (0.9 + 0.05 * number)
        noisy = (view + rng.normal(0, 5, view.shape)).clip(0, 255).round().astype(np.uint8)
        frames.append(jpeg_round_trip(noisy, 60 + 8 * number))
    shots = [
        PhotoSignature(folder=Path(str(number)), fingerprint=fingerprint(f))
        for number, f in enumerate(frames)
    ]
    other = PhotoSignature(folder=HERE, fingerprint=print_of(blobs(4)))
    assert group([*shots, other]).tolist() == [0, 0, 0, 0, 0, 1]


def test_a_fingerprint_encodes_where_brightness_rises() -> None:
    """Light in the centre: up on the left, down on the right, and the same from top to bottom."""
    down, across = np.mgrid[-1:1:90j, -1:1:90j]
    hill = np.repeat((200 * np.exp(-(down**2) - across**2))[:, :, None], 3, axis=2)
    bits = np.unpackbits(np.frombuffer(print_of(hill), dtype=np.uint8)).reshape(2, 8, 8)
    assert (bits[0, :, :4] == 1).all() and (bits[0, :, 4:] == 0).all()
    assert (bits[1, :4] == 1).all() and (bits[1, 4:] == 0).all()


def test_cells_share_the_pixels_on_their_borders() -> None:
    """An image and the same enlarged by an integer factor have equal cells, for any size."""
    small = blobs(5, 61, 47).round()
    assert print_of(small) == print_of(small.repeat(7, axis=0).repeat(7, axis=1))


@pytest.mark.parametrize("what", ["black", "white", "wall", "sky", "noise in the dark", "one pixel"])
def test_a_picture_without_contrast_has_no_fingerprint_and_links_nothing(what: str) -> None:
    rng = np.random.default_rng(6)
    pixels = {
        "black": np.zeros((300, 400, 3)),
        "white": np.full((300, 400, 3), 255.0),
        "wall": rng.normal(180, 4, (300, 400, 3)),
        "sky": np.broadcast_to(np.linspace(120, 220, 300)[:, None, None], (300, 400, 3)),
        "noise in the dark": rng.uniform(0, 12, (300, 400, 3)),
        "one pixel": np.full((1, 1, 3), 99.0),
    }[what]
    assert fingerprint(pixels.round().astype(np.uint8)) is None


def test_two_dark_pictures_with_different_spots_are_not_similar() -> None:
    """The darkest images that still have a fingerprint: a spot each, in different corners."""
    prints = []
    for top, left in ((50, 60), (170, 230)):
        dark = np.zeros((300, 400, 3))
        dark[top : top + 90, left : left + 120] = 200.0
        prints.append(print_of(dark))
    assert apart(*prints) > DEFAULT_RULE.max_fingerprint_distance


PORTRAITS = (
    "obama.jpg",
    "biden.jpg",
    "astronaut.jpg",
    "ivan.jpg",
    "lisa1.jpg",
    "solvay.jpg",
    "group_six.jpg",
)


@pytest.mark.parametrize("name", PORTRAITS)
def test_a_smaller_or_worse_copy_of_a_real_photo_is_similar(shared: Path, name: str) -> None:
    path = shared / "data" / "library" / "people" / name
    whole = read_photo(path, longest_side=800).pixels
    copies = [read_photo(path, longest_side=max(whole.shape) // 3).pixels, jpeg_round_trip(whole, 30)]
    copies.append(jpeg_round_trip(copies[0], 70))
    prints = [fingerprint(picture) for picture in (whole, *copies)]
    shots = [PhotoSignature(folder=Path(str(number)), fingerprint=one) for number, one in enumerate(prints)]
    assert None not in prints and set(group(shots)) == {0}


def test_different_real_photos_are_not_similar(shared: Path) -> None:
    people = shared / "data" / "library" / "people"
    prints = [fingerprint(read_photo(people / name, longest_side=800).pixels) for name in PORTRAITS]
    shots = [PhotoSignature(folder=HERE, fingerprint=one) for one in prints]
    assert None not in prints and group(shots, ALONE).tolist() == list(range(len(PORTRAITS)))


def test_1400_portraits_of_different_people_are_1400_occasions(shared: Path) -> None:
    """No link among 979,300 pairs, though each is one face in the centre of a small square."""
    faces = sorted((shared / "data" / "faces" / "fairface_eval128").glob("*.jpg"))
    prints = [fingerprint(read_photo(path).pixels) for path in faces]
    assert len(faces) == 1400 and None not in prints
    shots = [PhotoSignature(folder=HERE, fingerprint=one) for one in prints]
    assert group(shots, ALONE).tolist() == list(range(1400))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gap_hours": 0}, r"gap_hours must lie in \(0, 8760\], got 0"),
        ({"gap_hours": math.nan}, "gap_hours"),
        ({"radius_km": -1.0}, "radius_km must be a finite number above 0, got -1.0"),
        ({"max_fingerprint_distance": 129}, r"max_fingerprint_distance must lie in \[0, 128\], got 129"),
        ({"undated": "together"}, "by-folder"),
    ],
)
def test_errors_in_a_rule_are_reported(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OccasionRule(**wrong)
