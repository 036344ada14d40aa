"""Labelled faces: read, aligned, grouped, with counts of the faces that are left out."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedface.errors import LibraryError
from fedface.photos.detection_rates import measure_detection
from fedface.photos.face_alignment import Face
from fedface.photos.image_io import png_bytes
from fedface.photos.labelled_faces import COORDINATES, labelled_sets, read_face_folder

POINTS = np.array([[20.0, 24.0], [44.0, 24.0], [32.0, 34.0], [22.0, 46.0], [42.0, 46.0]])


def picture() -> bytes:
    """A grey square with red eyes and a blue mouth."""
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    colours = ((250, 0, 0), (250, 0, 0), (0, 0, 250), (0, 0, 250))
    for (x, y), colour in zip(POINTS[[0, 1, 3, 4]].astype(int), colours, strict=True):
        pixels[y - 2 : y + 3, x - 2 : x + 3] = colour
    return png_bytes(pixels)


def make_set(root: Path, name: str, rows: list[tuple[str, str, str]], *, packed: bool) -> Path:
    """A set of (file, group, kind); kind is "whole", "undetected" (no landmarks) or "broken" (no picture)."""
    lines = [",".join(["file", "race", "gender", *COORDINATES])]
    files: dict[str, bytes] = {}
    for file, group, kind in rows:
        numbers = ["" if kind == "undetected" else f"{number:.1f}" for number in POINTS.reshape(-1)]
        lines.append(",".join([file, group, "Female", *numbers]))
        files[file] = b"broken" if kind == "broken" else picture()
    (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    if packed:
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content)
        return root / f"{name}.zip"
    (root / name).mkdir()
    for file, content in files.items():
        (root / name / file).write_bytes(content)
    return root / name


ROWS = [
    ("1.png", "x", "whole"),
    ("2.png", "y", "whole"),
    ("3.png", "y", "undetected"),
    ("4.png", "x", "broken"),
    ("5.png", "y", "whole"),
]


@pytest.mark.parametrize("packed", [False, True])
def test_faces_are_read_aligned_and_counted_by_group(tmp_path: Path, packed: bool) -> None:
    probe = read_face_folder(make_set(tmp_path, "s", ROWS, packed=packed), size=64)
    assert probe.groups == ("x", "y", "y") and probe.files == ("s/1.png", "s/2.png", "s/5.png")
    assert (probe.missed, probe.unreadable) == ({"y": 1}, {"x": 1})
    assert probe.images.shape == (3, 3, 64, 64) and probe.images.dtype == torch.float32
    assert 0 <= probe.images.min() and probe.images.max() <= 1
    for point, channel in zip((0, 1, 3, 4), (0, 0, 2, 2), strict=True):
        x, y = probe.landmarks[0, point].round().int().tolist()
        assert probe.images[0, channel, y, x] > 0.6 > 0.4 > probe.images[0, 1, y, x]


def test_the_eyes_are_level_in_every_crop_and_the_mouth_is_below(tmp_path: Path) -> None:
    landmarks = read_face_folder(make_set(tmp_path, "s", ROWS, packed=False), size=64).landmarks
    assert torch.allclose(landmarks[:, 0, 1], landmarks[:, 1, 1], atol=1e-4)
    assert bool((landmarks[:, 3, 1] > landmarks[:, 0, 1] + 10).all())


def test_a_folder_a_zip_and_a_csv_all_identify_their_set(tmp_path: Path) -> None:
    one = make_set(tmp_path, "one", ROWS, packed=False)
    two = make_set(tmp_path, "two", ROWS, packed=True)
    assert [faces.name for faces in labelled_sets(tmp_path)] == ["one", "two"]
    for path in (one, one.with_name("one.csv")):
        assert [faces.name for faces in labelled_sets(path)] == ["one"]
    for path in (two, two.with_suffix(".csv")):
        assert [faces.name for faces in labelled_sets(path)] == ["two"]
    both = read_face_folder(tmp_path, size=16)
    assert len(both) == 6 and both.missed == {"y": 2}


def test_a_plain_folder_has_no_labelled_sets(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "accounts.csv").write_text("no,faces\n1,2\n")
    assert labelled_sets(tmp_path) == []
    with pytest.raises(LibraryError, match="no labelled faces"):
        read_face_folder(tmp_path, size=16)


def test_per_group_counts_the_undetected_too(tmp_path: Path) -> None:
    """Otherwise detected faces would replace those that the detector misses."""
    probe = read_face_folder(make_set(tmp_path, "s", ROWS, packed=False), size=16, per_group=2)
    assert probe.groups == ("x", "y") and probe.missed == {"y": 1}


def test_a_selection_keeps_images_groups_and_files_together(tmp_path: Path) -> None:
    probe = read_face_folder(make_set(tmp_path, "s", ROWS, packed=False), size=16)
    part = probe.select([2, 0])
    assert (part.groups, part.files) == (("y", "x"), ("s/5.png", "s/1.png"))
    assert torch.equal(part.images, probe.images[[2, 0]]) and part.missed == probe.missed


def test_errors_in_a_set_are_reported(tmp_path: Path) -> None:
    good = make_set(tmp_path, "s", ROWS, packed=False)
    with pytest.raises(LibraryError, match="'mood'.*gender, race"):
        read_face_folder(good, size=16, label="mood")
    with pytest.raises(LibraryError, match="there is no"):
        labelled_sets(tmp_path / "absent")
    table = tmp_path / "s.csv"
    whole = table.read_text()
    for text, message in {
        whole.replace("re_x", "eye", 1): "lacks the column 're_x'",
        whole.split("\n")[0] + "\n": "has no rows",
        whole.split("\n")[0] + "\n,x\n": "s.csv:2: file must be a plain name",
    }.items():
        table.write_text(text)
        with pytest.raises(LibraryError, match=message):
            labelled_sets(good)


def landmark_row(first: str, rest: str | None = None) -> str:
    """The row of 1.png with these landmarks: one, or the first and all others."""
    numbers = [f"{number:.1f}" for number in POINTS.reshape(-1)]
    return ",".join(["1.png", "x", "Female", first, *(numbers[1:] if rest is None else [rest] * 9)])


@pytest.mark.parametrize(
    ("row", "message", "counted"),
    [
        (landmark_row("0", "0"), "s.csv:2: eyes and mouth must be a pixel apart", "missed"),
        (landmark_row("-1", "-1"), "s.csv:2: eyes and mouth must be a pixel apart", "missed"),
        (landmark_row("3e7"), "s.csv:2: landmarks must lie within 100000 pixels", "missed"),
        (landmark_row("-1e300"), "s.csv:2: landmarks must lie within", "missed"),
        (landmark_row("left"), "s.csv:2: landmarks must be numbers", "missed"),
        (landmark_row(""), "s.csv:2: landmarks must be numbers", "missed"),
        (landmark_row("nan"), "s.csv:2: landmarks must be finite", "missed"),
        (landmark_row("inf"), "s.csv:2: landmarks must be finite", "missed"),
        (landmark_row("90000"), "s.csv:2: 1.png: the landmarks make a face of .* pixels", "unreadable"),
        ("1.png,x", "s.csv:2: 2 cells instead of 13", "missed"),
        ("1.png,x,Female,1,2", "s.csv:2: landmarks must be numbers", "missed"),
        ("1", "s.csv:2: 1 cells instead of 13", "missed"),
        (",x,Female", "s.csv:2: file must be a plain name", "left out"),
        ("../1.png,x,Female", "s.csv:2: file must be a plain name", "left out"),
        ("a\0b.png,x,Female", "s.csv:2: file must be a plain name", "left out"),
        (landmark_row("20.0") + ",more,and,more", None, "used"),
        ('"' + landmark_row("20.0"), "s.csv:2: 1 cells instead of 13", "missed"),
        ('1.png,"x,Female,1', "s.csv:2: 2 cells instead of 13", "missed"),
        ("x" * 200_000 + ",x,Female", "s.csv:2: file must be a plain name", "left out"),
        ("\x00\xff\x1b,x,Female", "s.csv:2: file must be a plain name", "left out"),
    ],
)
def test_one_bad_row_is_skipped_and_named(
    tmp_path: Path, row: str, message: str | None, counted: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_set(tmp_path, "s", ROWS, packed=False)
    table = tmp_path / "s.csv"
    lines = table.read_text().split("\n")
    table.write_text("\n".join([lines[0], row, *lines[2:]]))
    probe = read_face_folder(good, size=64)
    assert set(probe.files) - {"s/1.png"} == {"s/2.png", "s/5.png"}
    assert ("s/1.png" in probe.files) == (counted == "used")
    group = "x" if row.startswith("1.png,x") else "x,Female,1" if row.startswith("1.png") else "unknown"
    assert probe.missed == ({"y": 1, group: 1} if counted == "missed" else {"y": 1})
    assert probe.unreadable == ({"x": 2} if counted == "unreadable" else {"x": 1})
    if message:
        assert re.search(message, caplog.text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    good = make_set(tmp_path, "s", ROWS, packed=False)
    table = tmp_path / "s.csv"
    table.write_text(table.read_text(), encoding=encoding)
    assert len(read_face_folder(good, size=16)) == 3


def damaged_zip(content: bytes, how: str) -> bytes:
    """A zip that is cut short, changed in the middle, no zip at all, or inside another one."""
    if how == "nested":
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as archive:
            archive.writestr("1.png", content)
            archive.writestr("inner.zip", content)
        return outer.getvalue()
    changed = bytearray(content)
    for place in range(60, len(content) // 2, 40):
        changed[place] ^= 0xFF
    return {"cut": content[: len(content) // 2], "changed": bytes(changed), "text": b"<html>quota</html>"}[
        how
    ]


@pytest.mark.parametrize("how", ["cut", "changed", "text", "nested"])
def test_a_damaged_zip_costs_its_own_set_and_no_other(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_set(tmp_path, "a", ROWS, packed=True)
    make_set(tmp_path, "b", ROWS, packed=True)
    (tmp_path / "a.zip").write_bytes(damaged_zip((tmp_path / "a.zip").read_bytes(), how))
    probe = read_face_folder(tmp_path, size=16)
    assert {"b/1.png", "b/2.png", "b/5.png"} <= set(probe.files)
    assert sum(probe.unreadable.values()) == 8 - len(probe) and "a.csv:2: 1.png: " in caplog.text
    if how != "changed":
        with pytest.raises(LibraryError, match=r"none of the faces .* the first problem: .*a\.csv:2: 1\.png"):
            read_face_folder(tmp_path / "a.zip", size=16)


def test_many_bad_rows_are_counted_and_the_first_of_them_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_set(tmp_path, "s", ROWS, packed=False)
    with (tmp_path / "s.csv").open("a") as table:
        table.write("".join(f"{number}.png,x,Female" + ",0" * 10 + "\n" for number in range(300)))
    assert read_face_folder(good, size=16).missed == {"y": 1, "x": 300}
    assert len(caplog.records) <= 10 and "and 296 more rows" in caplog.text


def test_a_detector_that_fails_on_a_photo_misses_its_face_and_the_others_are_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unreadable picture says nothing about a detector and is left out."""

    class Fails:
        name = "fails once"
        calls = 0

        def find(self, pixels: np.ndarray) -> list[Face]:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("stride")
            return [Face((0, 0, 9, 9), POINTS, 1.0)]

    rates = measure_detection(make_set(tmp_path, "s", ROWS, packed=False), Fails())
    assert [(rate.group, rate.found, rate.count) for rate in rates if rate.group == "all"] == [("all", 3, 4)]
    assert "fails once failed on a photo" in caplog.text and "s.csv:5: 4.png" in caplog.text


def test_a_zip_without_labels_is_explained(tmp_path: Path) -> None:
    packed = make_set(tmp_path, "s", ROWS, packed=True)
    (tmp_path / "s.csv").unlink()
    with pytest.raises(LibraryError, match="has no labels"):
        labelled_sets(packed)


@pytest.mark.slow
def test_the_public_sets_are_read_with_their_undetected_faces_counted(shared: Path) -> None:
    faces = shared / "data" / "faces"
    known = {"fairface_eval128": (1400, 3), "fairface_train64": (4200, 21), "london256": (204, 0)}
    sets = {one.name: one.rows for one in labelled_sets(faces)}
    undetected = {name: (len(sets[name]), sum(row.landmarks is None for row in sets[name])) for name in known}
    assert undetected == known
    probe = read_face_folder(faces / "fairface_train64.zip", size=32, per_group=40)
    assert len(probe) + sum(probe.missed.values()) == 7 * 40 and not probe.unreadable
    london = read_face_folder(faces / "london256", size=64, label="ethnicity", per_group=3)
    assert "black" in london.groups
