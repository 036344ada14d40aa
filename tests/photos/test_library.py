"""Scanning a folder: bounded, resumable, read-only; and the library that training reads."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import subprocess
import sys
import tracemalloc
import unicodedata
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg_bytes
from PIL import Image

from fedface.errors import LibraryError
from fedface.photos.detectors import YuNetDetector
from fedface.photos.face_alignment import Face
from fedface.photos.image_io import png_bytes
from fedface.photos.library import PhotoLibrary, scan_table, summary
from fedface.photos.occasions import DEFAULT_RULE, OccasionRule
from fedface.photos.photo_index import PhotoIndex, all_read, default_cache
from fedface.photos.scan import ScanReport, scan_library
from fedface.photos.training_crops import PhotoSelection

SHAPE = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.38, 0.75], [0.62, 0.75]])


class FillsThePhoto:
    """Detects one face as large as the photo in every photo that is not black; counts its calls."""

    def __init__(self, name: str = "fills the photo") -> None:
        self.name = name
        self.calls = 0

    def find(self, pixels: np.ndarray) -> list[Face]:
        self.calls += 1
        height, width = pixels.shape[:2]
        landmarks = SHAPE * np.array([width, height])
        return [Face((0.0, 0.0, width - 1.0, height - 1.0), landmarks, 1.0)] if pixels.any() else []


def crops_of(library: PhotoLibrary, size: int) -> np.ndarray:
    """All crops, uint8 (n, size, size, 3); raises the error of the first that cannot be used."""
    found = []
    for crop in library.crops(size):
        if isinstance(crop, LibraryError):
            raise crop
        found.append(crop)
    return np.stack(found)


def shade(value: int, side: int = 40) -> bytes:
    return png_bytes(np.full((side, side, 3), value, dtype=np.uint8))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index.sqlite"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos with a face, one without, one broken, and other files."""
    root = tmp_path / "photos"
    (root / "2024" / "summer").mkdir(parents=True)
    bright = jpeg_bytes(np.full((40, 40, 3), 200, np.uint8), quality=90)
    (root / "a.png").write_bytes(shade(100))
    (root / "2024" / "b.png").write_bytes(shade(150))
    (root / "2024" / "summer" / "c.jpg").write_bytes(bright)
    (root / "2024" / "dark.png").write_bytes(shade(0))
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(shade(1))
    return root


def test_a_scan_counts_everything_and_the_library_has_the_faces(folder: Path, cache: Path) -> None:
    report = scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert (report.files, report.read, report.refused, report.other, report.faces) == (6, 4, 1, 1, 3)
    library = PhotoLibrary(folder, cache=cache)
    assert [str(library.record(index).path) for index in range(len(library))] == [
        "2024/b.png",
        "2024/summer/c.jpg",
        "a.png",
    ]
    images = crops_of(library, 16)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert images[2].mean() == pytest.approx(100, abs=2.5)
    assert images[0].mean() == pytest.approx(150, abs=2.5)
    found = summary(folder, cache=cache)
    assert (found.photos, found.with_face, found.without_face, found.other) == (4, 3, 1, 1)
    assert list(found.refused.values()) == [1] and next(iter(found.refused)).startswith("broken JPEG")


def test_a_second_scan_reads_only_what_is_new_or_changed(folder: Path, cache: Path) -> None:
    detector = FillsThePhoto()
    scan_library(folder, detector=detector, cache=cache)
    again = scan_library(folder, detector=detector, cache=cache)
    assert (again.reused, again.read, again.refused, again.other) == (6, 0, 0, 0)
    (folder / "a.png").write_bytes(shade(90, side=50))
    (folder / "2024" / "b.png").unlink()
    (folder / "new.png").write_bytes(shade(30))
    third = scan_library(folder, detector=detector, cache=cache)
    assert (third.reused, third.read, third.gone) == (4, 2, 1)
    assert detector.calls == 6
    assert len(PhotoLibrary(folder, cache=cache)) == 3


def test_another_detector_rescans_all_photos_and_both_results_remain(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto("one"), cache=cache)
    assert scan_library(folder, detector=FillsThePhoto("two"), cache=cache).read == 4
    assert scan_library(folder, detector=FillsThePhoto("one"), cache=cache).read == 0
    assert len(PhotoLibrary(folder, cache=cache, detector="two")) == 3


class Interrupted(Exception):
    """Stands in for a keyboard interrupt."""


def many(root: Path, count: int) -> Path:
    """Tiny photos, one in fifty of them broken, a hundred per folder."""
    content = shade(120, side=8)
    for number in range(count):
        place = root / f"{number // 100:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(
            content[:-30] if number % 50 == 0 else content + b"%d" % number
        )
    return root


@pytest.mark.slow
def test_an_interrupted_scan_of_many_files_resumes_in_bounded_memory(tmp_path: Path, cache: Path) -> None:
    """Three thousand files, stopped after a thousand. A list of them would take more than a megabyte."""
    root = many(tmp_path / "photos", 3000)
    detector = FillsThePhoto()

    def stop(report: ScanReport) -> None:
        if report.read + report.refused >= 1000:
            raise Interrupted

    with pytest.raises(Interrupted):
        scan_library(root, detector=detector, cache=cache, progress=stop)
    held: list[int] = []

    def weigh(report: ScanReport) -> None:
        # Blocks of a megabyte apart: the interpreter's own table of names may grow in the middle of anything.
        if report.files % 250 == 0:
            traces = tracemalloc.take_snapshot().traces
            held.append(sum(trace.size for trace in traces if trace.size < 1_000_000))

    tracemalloc.start()
    report = scan_library(root, detector=detector, cache=cache, progress=weigh)
    tracemalloc.stop()
    assert (report.files, report.reused, report.read + report.refused) == (3000, 1000, 2000)
    assert detector.calls == 2940  # no photo was looked at twice, and the 60 broken ones never
    assert len(held) >= 10 and max(held) < 1_000_000
    assert len(PhotoLibrary(root, cache=cache, selection=PhotoSelection(min_face_side=0))) == 2940
    assert sum(summary(root, cache=cache).refused.values()) == 60


def test_a_killed_scan_leaves_an_index_that_the_next_one_completes(tmp_path: Path, cache: Path) -> None:
    root = many(tmp_path / "photos", 60)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fedface.photos import scan\n"
        "from fedface.photos.face_alignment import Face\n"
        "scan.SAVE_EVERY = 0.0\n"
        "class Finder:\n"
        "    name = 'finder'\n"
        "    def find(self, pixels): return []\n"
        "def stop(report):\n"
        "    if report.read == 30: os.kill(os.getpid(), 9)\n"
        "scan.scan_library(Path(sys.argv[1]), detector=Finder(), cache=Path(sys.argv[2]), progress=stop)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root), str(cache)], timeout=60).returncode == -9
    report = scan_library(root, detector=FillsThePhoto("finder"), cache=cache)
    assert report.reused >= 29 and report.reused + report.read + report.refused == 60


def test_nothing_in_the_folder_changes(folder: Path, cache: Path) -> None:
    def state() -> dict[str, tuple[int, int, bytes]]:
        return {
            str(path): (
                path.stat().st_mtime_ns,
                path.stat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in [folder, *folder.rglob("*")]
        }

    before = state()
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    crops_of(PhotoLibrary(folder, cache=cache), 16)
    assert state() == before
    with pytest.raises(LibraryError, match="among the photos"):
        scan_library(folder, detector=FillsThePhoto(), cache=folder / "index.sqlite")


def test_files_of_equal_bytes_are_one_photo(folder: Path, cache: Path) -> None:
    """A uniform grey image, which has no fingerprint, saved three times."""
    before = scan_library(folder, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(folder, cache=cache)
    labels, occasions = library.photo_labels(), summary(folder, cache=cache).occasions
    (folder / "0").mkdir()
    (folder / "00").mkdir()
    for name in ("0/copy.png", "00/again.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).files == before.files + 2
    library, found = PhotoLibrary(folder, cache=cache), summary(folder, cache=cache)
    assert (found.photos, found.with_face, found.copies, found.occasions) == (4, 3, 2, occasions)
    assert names_of(library) == ["0/copy.png", "2024/b.png", "2024/summer/c.jpg"]
    assert set(library.photo_labels()) == set(labels) and len(crops_of(library, 16)) == 3
    reasons = {row.file: row.reason for row in scan_table(folder, cache=cache)}
    assert (reasons["a.png"], reasons["0/copy.png"]) == ("a copy of 0/copy.png", "")
    only = PhotoSelection(folders=(Path("00"),))
    assert "00/again.png" in names_of(PhotoLibrary(folder, cache=cache, selection=only))


def test_a_photos_label_has_63_bits_of_its_hash(folder: Path, cache: Path) -> None:
    """With 31 bits two of 100,000 photos share a label more often than not, and one of them is never used."""
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(folder, cache=cache)
    hashes = (hashlib.sha256((folder / name).read_bytes()).digest() for name in names_of(library))
    assert library.photo_labels().tolist() == [int.from_bytes(each[:8], "big") >> 1 for each in hashes]


def test_only_the_owner_may_read_the_index(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


def test_links_pipes_and_hidden_files_are_skipped(folder: Path, cache: Path, tmp_path: Path) -> None:
    """A link out of the folder, a circular link, a named pipe that would block a reader."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(shade(77))
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "2024" / "round").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe.jpg")
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).files == 6


def test_undecodable_names_are_read_and_printed_safely(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for value, name in enumerate(
        (b"\xff\xfe.png", "snö 雪.png".encode(), b"new\nline\x1b[2J.png"), start=100
    ):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(shade(value))
    assert scan_library(root, detector=FillsThePhoto(), cache=cache).read == 3
    assert crops_of(PhotoLibrary(root, cache=cache), 8).shape == (3, 8, 8, 3)
    names = [row.file for row in scan_table(root, cache=cache)]
    assert sorted(names) == sorted(["??.png", "snö 雪.png", "new?line?[2J.png"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused_and_retried_later(folder: Path, cache: Path) -> None:
    (folder / "a.png").chmod(0)
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).refused == 2
    (folder / "a.png").chmod(0o600)
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).read == 1


def test_the_table_has_the_metadata_of_each_photo(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    rows = {row.file: row for row in scan_table(folder, cache=cache)}
    assert set(rows) == {"a.png", "broken.jpg", "2024/b.png", "2024/dark.png", "2024/summer/c.jpg"}
    assert (rows["a.png"].kind, rows["a.png"].size, rows["a.png"].faces) == ("PNG", "40 x 40", 1)
    assert rows["2024/dark.png"].faces == 0 and rows["2024/dark.png"].reason == ""
    assert "broken JPEG" in rows["broken.jpg"].reason


def test_a_changed_or_removed_photo_is_not_served_from_the_old_scan(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(folder, cache=cache)
    (folder / "a.png").write_bytes(shade(9, side=60))
    with pytest.raises(LibraryError, match="changed since the scan"):
        crops_of(library, 16)
    (folder / "a.png").unlink()
    with pytest.raises(LibraryError, match="cannot be read any more"):
        crops_of(library, 16)
    first, second, third = library.crops(16)
    assert (
        isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and isinstance(third, LibraryError)
    )


def test_faces_too_small_for_training_are_left_out(folder: Path, cache: Path) -> None:
    """A face that fills a photo of 40 pixels gives a crop of about 50 pixels a side."""
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert len(PhotoLibrary(folder, cache=cache, selection=PhotoSelection(min_face_side=30))) == 3
    with pytest.raises(LibraryError, match="no face"):
        PhotoLibrary(folder, cache=cache, selection=PhotoSelection(min_face_side=200))


def test_missing_empty_unscanned_and_faceless_folders_are_explained(tmp_path: Path, cache: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LibraryError, match="there is no folder"):
        scan_library(tmp_path / "absent", detector=FillsThePhoto(), cache=cache)
    with pytest.raises(LibraryError, match="no files in"):
        scan_library(empty, detector=FillsThePhoto(), cache=cache)
    with pytest.raises(LibraryError, match="not been scanned"):
        PhotoLibrary(empty, cache=tmp_path / "other.sqlite")
    (empty / "dark.png").write_bytes(shade(0))
    scan_library(empty, detector=FillsThePhoto(), cache=cache)
    with pytest.raises(LibraryError, match="no face"):
        PhotoLibrary(empty, cache=cache)
    assert summary(empty, cache=cache).without_face == 1


def test_an_emptied_folder_does_not_wipe_the_index(folder: Path, cache: Path) -> None:
    """An unmounted disk looks like an empty folder."""
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    moved = folder.rename(folder.with_name("away"))
    folder.mkdir()
    with pytest.raises(LibraryError, match="no files in"):
        scan_library(folder, detector=FillsThePhoto(), cache=cache)
    folder.rmdir()
    moved.rename(folder)
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).read == 0


def test_a_damaged_index_is_explained(folder: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(b"this is no database, whatever its name may say" * 50)
    with pytest.raises(LibraryError, match="is not an index of fedface"):
        scan_library(folder, detector=FillsThePhoto(), cache=cache)
    cache.unlink()
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    cache.write_bytes(cache.read_bytes()[:200] + b"\xff" * 5000)
    with pytest.raises(LibraryError, match="delete it"):
        scan_library(folder, detector=FillsThePhoto(), cache=cache)


def test_a_database_without_our_application_id_is_not_overwritten(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    with closing(sqlite3.connect(cache)) as connection:
        connection.execute("PRAGMA application_id = 0")
    before = cache.read_bytes()
    with pytest.raises(LibraryError, match="is not an index of fedface; it stays as it is"):
        scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert cache.read_bytes() == before


def test_each_folder_has_its_own_index_outside_of_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    places = {default_cache(folder), default_cache(folder / "2024")}
    assert len(places) == 2
    assert all(not place.is_relative_to(folder) for place in places)
    scan_library(folder, detector=FillsThePhoto())
    assert len(PhotoLibrary(folder)) == 3


def dated(path: Path, value: int, when: str | None = None) -> None:
    """A picture of one colour, black without a face; `when` is an hour and minute of one day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if when is not None:
        exif.get_ifd(0x8769)[0x9003] = f"2024:06:01 {when}:00"
    Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(path, exif=exif, quality=90)


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """Noon, three in the afternoon without a face, six, midnight before; two undated, one elsewhere."""
    root = tmp_path / "day"
    for name, value, when in (
        ("a/noon.jpg", 100, "12:00"), ("a/three.jpg", 0, "15:00"), ("b/six.jpg", 120, "18:00"),
        ("b/midnight.jpg", 130, "00:00"), ("a/undated.jpg", 140, None), ("a/unknown.jpg", 150, None),
        ("anna/undated.jpg", 160, None),
    ):  # fmt: skip
        dated(root / name, value, when)
    return root


def names_of(library: PhotoLibrary) -> list[str]:
    return [str(library.record(index).path) for index in range(len(library))]


def occasions_of(library: PhotoLibrary, rule: OccasionRule = DEFAULT_RULE) -> list[set[str]]:
    """The photos of each occasion, in the order of their first photo."""
    members: dict[int, set[str]] = {}
    for name, label in zip(names_of(library), library.occasion_labels(rule).tolist(), strict=True):
        members.setdefault(label, set()).add(name)
    return list(members.values())


def test_occasions_use_the_whole_folder_and_list_the_faces(day: Path, cache: Path) -> None:
    """The photo at three has no face and still links noon with six."""
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(day, cache=cache)
    assert occasions_of(library) == [
        {"a/noon.jpg", "b/six.jpg"},
        {"a/undated.jpg", "a/unknown.jpg"},
        {"anna/undated.jpg"},
        {"b/midnight.jpg"},
    ]
    assert summary(day, cache=cache).occasions == 4
    assert len(occasions_of(library, OccasionRule(undated="alone"))) == 5
    (day / "a" / "three.jpg").unlink()
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    assert len(occasions_of(PhotoLibrary(day, cache=cache))) == 5


def test_labels_are_stable_and_an_occasion_has_the_smallest_of_its_photos(day: Path, cache: Path) -> None:
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(day, cache=cache)
    photos, occasions = library.photo_labels(), library.occasion_labels()
    assert photos.dtype == occasions.dtype == np.int64 and (photos >= 0).all() and len(set(photos)) == 6
    alone = library.occasion_labels(OccasionRule(undated="alone"))
    names = names_of(library)
    for index in (names.index("anna/undated.jpg"), names.index("b/midnight.jpg")):
        assert photos[index] == occasions[index] == alone[index]
    undated = [names.index("a/undated.jpg"), names.index("a/unknown.jpg")]
    assert (
        set(occasions[undated]) == {min(photos[undated])}
        and alone[undated].tolist() == photos[undated].tolist()
    )
    (day / "b" / "midnight.jpg").unlink()
    dated(day / "0.jpg", 99, "06:00")
    scan_library(day, detector=FillsThePhoto("other"), cache=cache)
    later = PhotoLibrary(day, cache=cache, selection=PhotoSelection(min_face_side=0))
    still = [name for name in names_of(later) if name in names]
    assert len(still) == 5
    for name in still:
        before, after = names.index(name), names_of(later).index(name)
        assert (photos[before], occasions[before]) == (
            later.photo_labels()[after],
            later.occasion_labels()[after],
        )


def test_a_part_of_a_library_has_the_occasions_of_the_whole(day: Path, cache: Path) -> None:
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    whole = PhotoLibrary(day, cache=cache)
    known = dict(zip(names_of(whole), whole.occasion_labels(), strict=True))
    for folder in ("a", "b", "anna"):
        part = PhotoLibrary(day, cache=cache, selection=PhotoSelection(folders=(Path(folder),)))
        assert dict(zip(names_of(part), part.occasion_labels(), strict=True)).items() <= known.items()


def test_a_library_reports_photos_deleted_by_a_later_scan(day: Path, cache: Path) -> None:
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(day, cache=cache)
    (day / "b" / "six.jpg").unlink()
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    with pytest.raises(LibraryError, match="open the library again"):
        library.occasion_labels()


def test_a_scan_stores_fingerprints_and_an_older_index_is_rescanned(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    stripes = np.repeat(np.repeat(np.tile([40, 200], (1, 30))[:, :, None], 3, axis=2), 60, axis=0)
    corner = stripes.astype(np.uint8)
    corner[20:40] = 255 - corner[20:40]
    (root / "picture.png").write_bytes(png_bytes(corner.repeat(5, axis=0).repeat(5, axis=1)))
    (root / "plain.png").write_bytes(shade(90))
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    scan_library(root, detector=FillsThePhoto(), cache=cache)
    with PhotoIndex(cache).reading() as connection:
        _, paths, shots = all_read(connection, "fills the photo")
    stored = {str(path): shot.fingerprint for path, shot in zip(paths, shots, strict=True)}
    assert set(stored) == {"picture.png", "plain.png"} and stored["plain.png"] is None
    assert stored["picture.png"] is not None and len(stored["picture.png"]) == 16
    with closing(sqlite3.connect(cache)) as connection:
        connection.execute("PRAGMA user_version = 1")
    with pytest.raises(LibraryError, match="another version"):
        PhotoLibrary(root, cache=cache)
    again = scan_library(root, detector=FillsThePhoto(), cache=cache)
    assert (again.reused, again.read, again.refused) == (0, 2, 1)


def test_a_copy_saved_smaller_elsewhere_belongs_to_the_occasion_of_the_photo(
    shared: Path, tmp_path: Path, cache: Path
) -> None:
    root = tmp_path / "photos"
    dated(root / "party" / "first.jpg", 100, "12:00")
    dated(root / "party" / "other.jpg", 100, "20:00")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:06:01 13:00:00"
    portrait = Image.open(shared / "data" / "library" / "people" / "obama.jpg")
    portrait.save(root / "party" / "portrait.jpg", exif=exif, quality=90)
    (root / "received").mkdir()
    portrait.resize((portrait.width // 4, portrait.height // 4)).save(
        root / "received" / "x.webp", quality=60
    )
    scan_library(root, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(root, cache=cache)
    assert occasions_of(library) == [
        {"party/first.jpg", "party/portrait.jpg", "received/x.webp"},
        {"party/other.jpg"},
    ]


def test_included_and_excluded_folders_are_respected(day: Path, cache: Path) -> None:
    """By whole names: `a` does not match `anna`."""
    scan_library(day, detector=FillsThePhoto(), cache=cache)

    def stored(*, folders: tuple[str, ...] = (), exclude_folders: tuple[str, ...] = ()) -> list[str]:
        selection = PhotoSelection(
            folders=tuple(map(Path, folders)), exclude_folders=tuple(map(Path, exclude_folders))
        )
        return names_of(PhotoLibrary(day, cache=cache, selection=selection))

    assert stored(folders=("a",)) == ["a/noon.jpg", "a/undated.jpg", "a/unknown.jpg"]
    assert stored(exclude_folders=("a",)) == ["anna/undated.jpg", "b/midnight.jpg", "b/six.jpg"]
    assert stored(folders=("a/", "./b"), exclude_folders=("b",)) == stored(folders=("a",))
    assert stored(folders=(".",), exclude_folders=("B", "Anna")) == stored(folders=("a",))
    assert stored(folders=("a",), exclude_folders=("a/noon.jpg",)) == ["a/undated.jpg", "a/unknown.jpg"]
    for wrong in (
        {"folders": ("A",)},
        {"exclude_folders": (".",)},
        {"folders": ("a",), "exclude_folders": ("a",)},
    ):
        with pytest.raises(LibraryError, match="that may be used"):
            stored(**wrong)
    for outside in ("/etc", "..", "a/../../b", "~/Pictures"):
        for side in ({"folders": (outside,)}, {"exclude_folders": (outside,)}):
            with pytest.raises(LibraryError, match="a folder inside the library"):
                stored(**side)


def test_excluded_photos_still_link_occasions(day: Path, cache: Path) -> None:
    """Fewer photos never give more units: noon and six are linked by an excluded photo."""
    (day / "private").mkdir()
    (day / "a" / "three.jpg").rename(day / "private" / "three.jpg")
    scan_library(day, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(day, cache=cache, selection=PhotoSelection(exclude_folders=(Path("private"),)))
    assert len(occasions_of(library)) == 4


def test_names_are_compared_after_unicode_normalisation(tmp_path: Path, cache: Path) -> None:
    """A disk may store `u` with two dots where the owner types `ü`."""
    root = tmp_path / "photos"
    dated(root / unicodedata.normalize("NFD", "Müller") / "x.jpg", 100)
    dated(root / "y.jpg", 100)
    scan_library(root, detector=FillsThePhoto(), cache=cache)
    typed = Path(unicodedata.normalize("NFC", "Müller"))
    assert names_of(PhotoLibrary(root, cache=cache, selection=PhotoSelection(exclude_folders=(typed,)))) == [
        "y.jpg"
    ]
    assert len(PhotoLibrary(root, cache=cache, selection=PhotoSelection(folders=(typed,)))) == 1


def test_the_sample_library_scans_to_the_known_portraits(shared: Path, cache: Path) -> None:
    pytest.importorskip("cv2")
    root = shared / "data" / "library" / "people"
    detector = YuNetDetector(shared / "data" / "models" / "face_detection_yunet_2023mar.onnx")
    report = scan_library(root, detector=detector, cache=cache)
    assert (report.read, report.refused) == (15, 0)
    library = PhotoLibrary(root, cache=cache)
    assert len(library) == 14
    counts = {row.file: row.faces for row in scan_table(root, cache=cache)}
    assert (counts["obama.jpg"], counts["two_people.jpg"], counts["no_face.jpg"]) == (1, 2, 0)
    assert crops_of(library, 32).shape == (14, 32, 32, 3)
