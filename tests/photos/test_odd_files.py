"""A file with odd properties costs itself, and never the device's other photos."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from png_files import write_png

from fedface.photos import library, scan
from fedface.photos.face_alignment import Face
from fedface.photos.library import PhotoLibrary
from fedface.photos.photo_index import FileStamp
from fedface.photos.scan import scan_library
from fedface.photos.training_crops import PhotoSelection

POINTS = np.array([(20.0, 20.0), (40.0, 20.0), (30.0, 30.0), (22.0, 42.0), (38.0, 42.0)])


class Finds:
    """A detector that finds one face in every photo."""

    name = "finds"

    def find(self, pixels: np.ndarray) -> list[Face]:
        return [Face((0, 0, 60, 60), POINTS, 1.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(3):
        write_png(root / f"{number}.png", np.full((64, 64, 3), 60 + 20 * number, dtype=np.uint8))
    return root


def usable(folder: Path, cache: Path) -> int:
    """How many photos a device would use."""
    scan_library(folder, detector=Finds(), cache=cache)
    return len(PhotoLibrary(folder, cache=cache, selection=PhotoSelection(min_face_side=0)))


@pytest.mark.parametrize("seconds", [10_413_792_000, -10_413_792_000, 2**62 // 10**9])
def test_a_time_outside_the_index_costs_no_photo(folder: Path, tmp_path: Path, seconds: int) -> None:
    """A year of 2300 does not fit into 63 bits of nanoseconds; the file need not even be a picture."""
    (folder / "late.txt").write_text("no picture")
    for name in ("late.txt", "0.png"):
        os.utime(folder / name, (seconds, seconds))
    assert usable(folder, tmp_path / "index") == 3
    assert usable(folder, tmp_path / "index") == 3  # and again, from the index


def test_a_file_that_cannot_be_examined_is_refused_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = FileStamp.of

    def odd(status: os.stat_result) -> FileStamp:
        if status.st_size == (folder / "notes.txt").stat().st_size:
            raise OverflowError("odd")
        return stamp(status)

    (folder / "notes.txt").write_text("x")
    monkeypatch.setattr(scan.FileStamp, "of", odd)
    report = scan_library(folder, detector=Finds(), cache=tmp_path / "index")
    assert (report.files, report.read, report.refused) == (4, 3, 1)


def test_photos_whose_labels_collide_count_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two crafted files may share 63 bits of their hash: one of them is left out, and the others stay."""
    label = library._label

    def colliding(content: bytes) -> int:
        return min(label(content), 2**62)

    monkeypatch.setattr(library, "_label", lambda content: 7)
    assert usable(folder, tmp_path / "index") == 1
    monkeypatch.setattr(library, "_label", colliding)
    found = PhotoLibrary(folder, cache=tmp_path / "index", selection=PhotoSelection(min_face_side=0))
    assert len(set(found.photo_labels().tolist())) == len(found)
