"""Scanning a folder: bounded, resumable, hands off the folder; and the library that training reads."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fedface.errors import LibraryError
from fedface.photos.detectors import YuNetDetector
from fedface.photos.faces import Face
from fedface.photos.index import default_cache
from fedface.photos.library import PhotoLibrary, scan_table, summary
from fedface.photos.pixels import jpeg_bytes, png_bytes
from fedface.photos.scan import ScanReport, scan_library

SHAPE = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.38, 0.75], [0.62, 0.75]])


class FillsThePhoto:
    """Sees one face as large as the photo in every photo that is not black; counts its calls."""

    def __init__(self, name: str = "fills the photo") -> None:
        self.name = name
        self.calls = 0

    def find(self, pixels: np.ndarray) -> list[Face]:
        self.calls += 1
        height, width = pixels.shape[:2]
        landmarks = SHAPE * np.array([width, height])
        return [Face((0.0, 0.0, width - 1.0, height - 1.0), landmarks, 1.0)] if pixels.any() else []


def shade(value: int, side: int = 40) -> bytes:
    return png_bytes(np.full((side, side, 3), value, dtype=np.uint8))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index.sqlite"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos with a face, one without, one broken, and clutter."""
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


def test_a_scan_counts_everything_and_the_library_holds_the_faces(folder: Path, cache: Path) -> None:
    report = scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert (report.files, report.read, report.refused, report.other, report.faces) == (6, 4, 1, 1, 3)
    library = PhotoLibrary(folder, cache=cache)
    assert [str(library.record(index).path) for index in range(len(library))] == [
        "2024/b.png",
        "2024/summer/c.jpg",
        "a.png",
    ]
    images = library.images([2, 0], 16)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert images[0].mean() == pytest.approx(100 / 255, abs=0.01)
    assert images[1].mean() == pytest.approx(150 / 255, abs=0.01)
    told = library.summary()
    assert (told.photos, told.with_face, told.without_face, told.other) == (4, 3, 1, 1)
    assert list(told.refused.values()) == [1] and next(iter(told.refused)).startswith("broken JPEG")


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


def test_another_detector_looks_at_every_photo_again_and_both_results_stay(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto("one"), cache=cache)
    assert scan_library(folder, detector=FillsThePhoto("two"), cache=cache).read == 4
    assert scan_library(folder, detector=FillsThePhoto("one"), cache=cache).read == 0
    assert len(PhotoLibrary(folder, cache=cache, detector="two")) == 3


class Interrupted(Exception):
    """Stands in for a keyboard interrupt."""


def many(root: Path, count: int) -> Path:
    """Tiny photos, one in fifty of them broken, a hundred to a folder."""
    content = shade(120, side=8)
    for number in range(count):
        place = root / f"{number // 100:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(content[: -30 if number % 50 == 0 else None])
    return root


def test_an_interrupted_scan_of_many_files_resumes_in_bounded_memory(tmp_path: Path, cache: Path) -> None:
    """Five thousand files, stopped after two thousand. A list of them would take three megabytes."""
    root = many(tmp_path / "photos", 5000)
    detector = FillsThePhoto()

    def stop(report: ScanReport) -> None:
        if report.read + report.refused >= 2000:
            raise Interrupted

    with pytest.raises(Interrupted):
        scan_library(root, detector=detector, cache=cache, progress=stop)
    tracemalloc.start()
    report = scan_library(root, detector=detector, cache=cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.files, report.reused, report.read + report.refused) == (5000, 2000, 3000)
    assert detector.calls == 4900  # no photo was looked at twice, and the 100 broken ones never
    assert peak < 1_000_000
    assert len(PhotoLibrary(root, cache=cache, smallest=0)) == 4900
    assert sum(summary(root, cache=cache).refused.values()) == 100


def test_a_killed_scan_leaves_an_index_that_the_next_one_completes(tmp_path: Path, cache: Path) -> None:
    root = many(tmp_path / "photos", 60)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fedface.photos import scan\n"
        "from fedface.photos.faces import Face\n"
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
    PhotoLibrary(folder, cache=cache).images([0, 1, 2], 16)
    assert state() == before
    with pytest.raises(LibraryError, match="among the photos"):
        scan_library(folder, detector=FillsThePhoto(), cache=folder / "index.sqlite")


def test_only_the_owner_may_read_the_index(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


def test_links_pipes_and_hidden_files_are_passed_over(folder: Path, cache: Path, tmp_path: Path) -> None:
    """A link out of the folder, a link in a circle, a named pipe that would block a reader for ever."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(shade(77))
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "2024" / "round").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe.jpg")
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).files == 6


def test_names_that_are_no_text_are_read_and_printed_harmlessly(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name in (b"\xff\xfe.png", "snö 雪.png".encode(), b"new\nline\x1b[2J.png"):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(shade(100))
    assert scan_library(root, detector=FillsThePhoto(), cache=cache).read == 3
    assert PhotoLibrary(root, cache=cache).images([0, 1, 2], 8).shape == (3, 3, 8, 8)
    names = [row.file for row in scan_table(root, cache=cache)]
    assert sorted(names) == sorted(["??.png", "snö 雪.png", "new?line?[2J.png"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused_now_and_tried_again_later(folder: Path, cache: Path) -> None:
    (folder / "a.png").chmod(0)
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).refused == 2
    (folder / "a.png").chmod(0o600)
    assert scan_library(folder, detector=FillsThePhoto(), cache=cache).read == 1


def test_the_table_says_what_is_known_of_each_picture(folder: Path, cache: Path) -> None:
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
        library.images(2, 16)
    (folder / "a.png").unlink()
    with pytest.raises(LibraryError, match="cannot be read any more"):
        library.images(2, 16)


def test_crops_are_cut_once(folder: Path, cache: Path) -> None:
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    library = PhotoLibrary(folder, cache=cache)
    first = library.images([0, 1, 2], 16)
    for path in folder.rglob("*.png"):
        path.unlink()
    assert torch.equal(library.images(torch.tensor([0, 1, 2]), 16), first)


def test_a_split_is_disjoint_covers_all_and_survives_new_photos(tmp_path: Path, cache: Path) -> None:
    root = many(tmp_path / "photos", 200)

    def names(library: PhotoLibrary) -> set[str]:
        return {str(library.record(index).path) for index in range(len(library))}

    scan_library(root, detector=FillsThePhoto(), cache=cache)
    kept, held = PhotoLibrary(root, cache=cache, smallest=0).split(0.25, seed=7)
    assert not names(kept) & names(held) and len(kept) + len(held) == 196
    assert 25 <= len(held) <= 75  # 49 expected, standard deviation 6
    many(root, 300)
    scan_library(root, detector=FillsThePhoto(), cache=cache)
    more_kept, more_held = PhotoLibrary(root, cache=cache, smallest=0).split(0.25, seed=7)
    assert names(kept) <= names(more_kept) and names(held) <= names(more_held)
    assert names(PhotoLibrary(root, cache=cache, smallest=0).split(0.25, seed=8)[1]) != names(more_held)


def test_faces_too_small_to_learn_from_are_left_out(folder: Path, cache: Path) -> None:
    """A face that fills a photo of 40 pixels gives a crop of about 50 pixels a side."""
    scan_library(folder, detector=FillsThePhoto(), cache=cache)
    assert len(PhotoLibrary(folder, cache=cache, smallest=30)) == 3
    with pytest.raises(LibraryError, match="no face"):
        PhotoLibrary(folder, cache=cache, smallest=200)


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
    with pytest.raises(LibraryError, match="delete it"):
        scan_library(folder, detector=FillsThePhoto(), cache=cache)


def test_each_folder_has_its_own_index_outside_of_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    places = {default_cache(folder), default_cache(folder / "2024")}
    assert len(places) == 2
    assert all(not place.is_relative_to(folder) for place in places)
    scan_library(folder, detector=FillsThePhoto())
    assert len(PhotoLibrary(folder)) == 3


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
    assert library.images(range(14), 32).shape == (14, 3, 32, 32)
