"""Which files of a folder are photos: by content, without thumbnails and our own pictures; what is skipped counts."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fedface.photos.detectors import EmbeddedDetector, HogDetector, NetworkDetector, _landmark_model
from fedface.photos.face_alignment import Face, align
from fedface.photos.image_io import SOFTWARE, classify_file, png_bytes
from fedface.photos.library import summary
from fedface.photos.scan import scan_library
from fedface.reports.charts import face_grid, figure_png
from fedface.web.image_encoding import data_uri

PIXELS = np.full((40, 40, 3), 90, dtype=np.uint8)


class OneFace:
    """Sees one face in every photo."""

    name = "one face"

    def find(self, pixels: np.ndarray) -> list[Face]:
        """As large as the photo."""
        shape = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.38, 0.75], [0.62, 0.75]])
        height, width = pixels.shape[:2]
        return [Face((0.0, 0.0, width - 1.0, height - 1.0), shape * np.array([width, height]), 1.0)]


WRITERS: dict[str, Callable[[], bytes]] = {
    "a grid of faces": lambda: face_grid([("row", torch.rand(2, 3, 8, 8))], ["1", "2"]),
    "a chart": lambda: figure_png(Figure()),
    "a picture of the page": lambda: base64.b64decode(data_uri(PIXELS).split(",")[1]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_picture_that_fedface_writes_is_known_whatever_its_name(tmp_path: Path, writer: str) -> None:
    (tmp_path / "holiday.jpg").write_bytes(WRITERS[writer]())
    assert classify_file(tmp_path / "holiday.jpg") == "made by fedface"


def test_a_picture_of_ours_is_known_where_a_program_moved_the_mark_to_its_end(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    ours, end = png_bytes(noise, software=SOFTWARE), b"\0\0\0\0IEND"
    start, length = ours.index(b"tEXt") - 4, 12 + len("Software\0" + SOFTWARE)
    chunk, rest = ours[start : start + length], ours[:start] + ours[start + length :]
    (tmp_path / "a.png").write_bytes(rest.replace(end, chunk + end))
    assert rest.index(end) > 20_000 and classify_file(tmp_path / "a.png") == "made by fedface"


def test_only_the_mark_makes_a_picture_ours(tmp_path: Path) -> None:
    for software in (None, "Matplotlib", "not fedface", "fedfaceswap 2.1", "fedface"):
        (tmp_path / "a.png").write_bytes(png_bytes(PIXELS, software=software))
        assert classify_file(tmp_path / "a.png") == "picture"


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir",
        ".@__thumb",
        ".thumbnails",
        "Thumbs",
        "thumbnails",
        "#recycle",
        "@Recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "Network Trash Folder",
        "trashbox",
        "@Transcode",
    ],
)
def test_thumbnails_of_nas_systems_are_left_out_and_counted(tmp_path: Path, name: str) -> None:
    root = tmp_path / "photos"
    for place in (root, root / name / "IMG_1.JPG", root / "2019" / name):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(png_bytes(PIXELS + len(place.parts)))
    report = scan_library(root, detector=OneFace(), cache=tmp_path / "index.sqlite")
    assert (report.files, report.read) == (1, 1)
    assert report.skipped == {"folders of thumbnails or deleted photos": 2}


def test_all_that_a_scan_passes_over_is_counted(tmp_path: Path) -> None:
    root, cache = tmp_path / "photos", tmp_path / "index.sqlite"
    (root / "sheets").mkdir(parents=True)
    (root / "a.png").write_bytes(png_bytes(PIXELS))
    (root / "sheets" / "faces.json").write_text('{"from": "another program"}')
    (root / "sheets" / "b.png").write_bytes(png_bytes(PIXELS + 9))
    (root / "sheets" / "ours.png").write_bytes(WRITERS["a grid of faces"]())
    (root / ".hidden.png").write_bytes(png_bytes(PIXELS))
    (root / "link.png").symlink_to(root / "a.png")
    for _ in range(2):
        report = scan_library(root, detector=OneFace(), cache=cache)
        found = summary(root, cache=cache)
        assert (found.photos, found.made_by_fedface, found.other) == (2, 1, 1)
        assert report.skipped["hidden files and folders"] == report.skipped["links and special files"] == 1


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (1, 1), (2, 3), (7, 2000), (1, 1000)])
@pytest.mark.parametrize("detector", [HogDetector, NetworkDetector, EmbeddedDetector])
def test_a_detector_finds_no_face_in_a_spacer(detector: type, height: int, width: int) -> None:
    assert detector().find(np.full((height, width, 3), 128, dtype=np.uint8)) == []


def test_a_detector_for_metrics_reads_its_landmarks_before_the_first_face() -> None:
    """A rehearsal on grey images finds no face, and would not take the time of the first."""
    _landmark_model.cache_clear()
    NetworkDetector()
    assert _landmark_model.cache_info().currsize == 1


@pytest.mark.parametrize("factor", [1e3, 1e6, 3e7])
@pytest.mark.parametrize("shape", [(64, 64), (1, 4000), (4000, 1), (1, 1)])
def test_no_landmarks_ask_for_more_memory_than_a_picture_can_fill(
    shape: tuple[int, int], factor: float
) -> None:
    """One point far away, and a face that is far away as a whole."""
    points = np.array([[20.0, 24.0], [44.0, 24.0], [32.0, 34.0], [22.0, 46.0], [42.0, 46.0]])
    apart = points.copy()
    apart[0, 0] = factor
    for landmarks in (apart, points + factor, points * factor):
        with pytest.raises(ValueError, match="make a face of"):
            align(np.zeros((*shape, 3), dtype=np.uint8), landmarks, 64)
