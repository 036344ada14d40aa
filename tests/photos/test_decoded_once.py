"""A photo is decoded once, in the sandbox, for the scan and for all rounds; nothing of a file is parsed elsewhere."""

from __future__ import annotations

import json
import math
import sqlite3
import stat
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import jpeg_bytes
from PIL import Image, ImageCms

from fedface.device.device import load_device
from fedface.errors import PhotoError
from fedface.inference.contact_sheet import MethodRunner
from fedface.inference.pipeline import SheetSettings, SkippedPhoto, run_pipeline
from fedface.photos import image_io, sandboxed_decoder
from fedface.photos.face_alignment import Face, align, alignment_side
from fedface.photos.image_io import png_bytes, read_photo
from fedface.photos.library import PhotoLibrary
from fedface.photos.photo_index import PhotoIndex, default_cache, records
from fedface.photos.sandboxed_decoder import SandboxedDecoder, parse_reply
from fedface.photos.scan import DECODED_SIDE, scan_library
from fedface.photos.training_crops import MAX_STORED_SIDE, PhotoSelection
from fedface.randomness import Streams
from fedface.reports.charts import pixels_of
from fedface.synthetic.faces import render_people
from fedface.upsampling.degradation import Area
from fedface.upsampling.feedforward import NearestConfig
from fedface.web.upload import Reader

SHAPE = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.38, 0.75], [0.62, 0.75]])
DEVICE = """\
name: kitchen
photos: photos
state: state
policy:
  max_epsilon: 2.0
  delta: 1e-5
"""


class FixedFace:
    """Detects one face in every photo, of a given fraction of its sides."""

    def __init__(self, share: float = 1.0) -> None:
        self.name = "fixed face"
        self.share = share

    def find(self, pixels: np.ndarray) -> list[Face]:
        height, width = pixels.shape[:2]
        size = self.share * np.array([width, height])
        return [Face((0.0, 0.0, size[0] - 1, size[1] - 1), SHAPE * size, 1.0)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index.sqlite"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three synthetic faces of 96 pixels, in two kinds of files and two folders."""
    root = tmp_path / "photos"
    (root / "trip").mkdir(parents=True)
    first, second, third = (pixels_of(face) for face in render_people(3, 0.5, 96, Streams(5)))
    (root / "a.png").write_bytes(png_bytes(first))
    (root / "b.jpg").write_bytes(jpeg_bytes(second, quality=90))
    (root / "trip" / "c.png").write_bytes(png_bytes(third))
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of times each file is sent to the sandbox."""
    counts: Counter[str] = Counter()
    send = SandboxedDecoder._send

    def counted(decoder: SandboxedDecoder, photo: Path | bytes, longest_side: int | None) -> None:
        counts["bytes" if isinstance(photo, bytes) else photo.name] += 1
        send(decoder, photo, longest_side)

    monkeypatch.setattr(SandboxedDecoder, "_send", counted)
    return counts


@pytest.fixture
def sandbox_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes decoding a photo, EXIF or a colour profile in this process an error."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a photo was decoded or parsed outside of the sandbox")

    monkeypatch.setattr(image_io.Image, "open", forbidden)
    monkeypatch.setattr(image_io.ImageCms, "ImageCmsProfile", forbidden)
    monkeypatch.setattr(image_io, "read_exif", forbidden)
    with pytest.raises(AssertionError):
        image_io.read_photo_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8)))


def crops(folder: Path, cache: Path, size: int, selection: PhotoSelection | None = None) -> list[np.ndarray]:
    """One round: scan, and the crops of all photos."""
    scan_library(folder, detector=FixedFace(), cache=cache, crop_size=size, selection=selection)
    found = []
    for crop in PhotoLibrary(folder, cache=cache, selection=selection).crops(size):
        assert isinstance(crop, np.ndarray)
        found.append(crop)
    return found


def stored(cache: Path) -> dict[str, int]:
    """The sides of the stored crops by path."""
    query = "SELECT path, size FROM crop JOIN photo ON crop.photo = photo.number"
    with closing(sqlite3.connect(cache)) as connection:
        return {path.decode(): size for path, size in connection.execute(query)}


@pytest.mark.usefixtures("sandbox_only")
def test_a_scan_and_two_rounds_decode_each_photo_once(
    folder: Path, cache: Path, decoded: Counter[str]
) -> None:
    first, second = crops(folder, cache, 32), crops(folder, cache, 32)
    assert decoded == {"a.png": 1, "b.jpg": 1, "c.png": 1}
    assert len(first) == 3 and all(map(np.array_equal, first, second))


@pytest.mark.usefixtures("sandbox_only")
def test_a_device_decodes_each_photo_once_and_only_its_owner_may_read_the_crops(
    tmp_path: Path, folder: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    (tmp_path / "device.yaml").write_text(DEVICE)
    (tmp_path / "state").mkdir(mode=0o700)
    rounds = [load_device(tmp_path / "device.yaml").photos(32) for _ in range(2)]
    assert len(rounds[0]) > 0 and rounds[0].images.equal(rounds[1].images)
    assert decoded == {"a.png": 1, "b.jpg": 1, "c.png": 1}
    index = default_cache(folder)
    assert stat.S_IMODE(index.stat().st_mode) == 0o600 and stat.S_IMODE(index.parent.stat().st_mode) == 0o700


def test_crops_are_those_of_the_file_to_the_last_bit(folder: Path, cache: Path) -> None:
    """Known answer: the file decoded at two pixels for each of the crop's, and aligned."""
    landmarks = SHAPE * 96
    needed = max(64, math.ceil(96 * 2 * 16 / alignment_side(landmarks)))
    assert needed < 96
    for name, crop in zip(("a.png", "b.jpg", "trip/c.png"), crops(folder, cache, 16), strict=True):
        pixels = read_photo(folder / name, longest_side=needed).pixels
        expected = align(pixels, (landmarks + 0.5) * len(pixels) / 96 - 0.5, 16)
        assert np.array_equal(crop, expected), name


@pytest.mark.usefixtures("sandbox_only")
def test_another_size_is_cropped_again_and_a_large_one_is_not_stored(
    folder: Path, cache: Path, decoded: Counter[str]
) -> None:
    """One size is stored at a time: at most 197 kB per photo on disk, for any requested sizes."""
    crops(folder, cache, 32)
    assert stored(cache) == {"a.png": 32, "b.jpg": 32, "trip/c.png": 32}
    crops(folder, cache, 16)
    crops(folder, cache, 16)
    assert set(stored(cache).values()) == {16} and set(decoded.values()) == {2}
    large = crops(folder, cache, MAX_STORED_SIDE + 1)
    assert large[0].shape == (MAX_STORED_SIDE + 1, MAX_STORED_SIDE + 1, 3)
    assert set(stored(cache).values()) == {16} and set(decoded.values()) == {3}


@pytest.mark.usefixtures("sandbox_only")
def test_a_manual_scan_stores_no_crop_and_its_faces_are_used(
    folder: Path, cache: Path, decoded: Counter[str]
) -> None:
    """The command does not know which photos the owner's policy allows."""
    scan_library(folder, detector=FixedFace(), cache=cache)
    assert stored(cache) == {}
    report = scan_library(folder, detector=FixedFace(), cache=cache, crop_size=16)
    assert (report.reused, report.read, report.faces) == (3, 0, 0) and len(stored(cache)) == 3
    assert set(decoded.values()) == {2}


def test_excluded_photos_have_no_crop_and_an_existing_one_is_deleted(folder: Path, cache: Path) -> None:
    crops(folder, cache, 16)
    barred = PhotoSelection(exclude_folders=(Path("Trip"),))
    crops(folder, cache, 16, barred)
    assert set(stored(cache)) == {"a.png", "b.jpg"}
    fresh = cache.with_name("fresh.sqlite")
    crops(folder, fresh, 16, barred)
    assert set(stored(fresh)) == {"a.png", "b.jpg"}
    scan_library(
        folder, detector=FixedFace(), cache=fresh, crop_size=16, selection=PhotoSelection(min_face_side=1000)
    )
    assert "trip/c.png" not in stored(fresh)


def test_the_crop_of_a_changed_photo_is_replaced_and_of_a_deleted_one_overwritten(
    folder: Path, cache: Path
) -> None:
    before = crops(folder, cache, 32)
    assert all(crop.tobytes()[:300] in cache.read_bytes() for crop in before)
    (folder / "a.png").write_bytes(png_bytes(np.full((90, 90, 3), 77, np.uint8)))
    (folder / "b.jpg").unlink()
    after = crops(folder, cache, 32)
    assert len(after) == 2 and (after[0] == 77).all()
    content = cache.read_bytes()
    assert before[0].tobytes()[:300] not in content and before[1].tobytes()[:300] not in content
    assert before[2].tobytes()[:300] in content


def test_a_small_face_in_a_large_photo_is_decoded_a_second_time_in_the_sandbox(
    tmp_path: Path, cache: Path, decoded: Counter[str]
) -> None:
    """Known answer: at full resolution, where the scan's picture has too few pixels for the crop."""
    root = tmp_path / "photos"
    root.mkdir()
    noise = np.random.default_rng(3).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    large = noise.repeat(40, axis=0).repeat(40, axis=1)  # 2000 pixels a side
    (root / "large.png").write_bytes(png_bytes(large))
    scan_library(root, detector=FixedFace(0.05), cache=cache, crop_size=64)
    (crop,) = PhotoLibrary(root, cache=cache).crops(64)
    assert len(large) > DECODED_SIDE and decoded == {"large.png": 2} and isinstance(crop, np.ndarray)
    with PhotoIndex(cache).reading() as connection:
        (record,) = records(connection, "fixed face")
    assert np.array_equal(crop, align(large, record.faces[0].landmarks, 64))
    crops_again = PhotoLibrary(root, cache=cache).crops(64)
    assert all(isinstance(one, np.ndarray) for one in crops_again) and decoded == {"large.png": 2}


def hostile_files(root: Path) -> list[Path]:
    """Photos with hostile metadata: EXIF that points outside itself, ICC profiles with impossible counts."""
    root.mkdir()
    pixels = pixels_of(render_people(1, 0.5, 96, Streams(6))[0])
    loop = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" * 50
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[128:132] = b"\xff\xff\xff\xff"
    Image.fromarray(pixels).save(root / "exif.jpg", exif=loop)
    Image.fromarray(pixels).save(root / "icc.png", icc_profile=bytes(profile))
    Image.fromarray(pixels).save(root / "both.webp", exif=loop, icc_profile=bytes(profile), lossless=True)
    return sorted(root.iterdir())


def test_hostile_metadata_reaches_only_the_sandbox(
    tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    """Scan and training, `fedface upsample` and the page."""
    files = hostile_files(tmp_path / "photos")
    request.getfixturevalue("sandbox_only")
    assert len(crops(tmp_path / "photos", cache, 32)) == len(files) == 3
    settings = SheetSettings(degradation=Area(4), size=16, faces=1, max_faces=1, detect="at the whole")
    runner = MethodRunner([(NearestConfig(), None)], Area(4), size=16, seed=0)
    sheets = dict(
        run_pipeline(
            files, lambda path, _: tmp_path / f"{path.name}.png", settings, runner, FixedFace, None, Quiet()
        )
    )
    assert not [result for result in sheets.values() if isinstance(result, SkippedPhoto)]
    reader = Reader(32, FixedFace)
    try:
        assert [reader.read(path.read_bytes()).found for path in files] == [1, 1, 1]
    finally:
        reader.close()


class Quiet:
    """Ignores progress."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def message(self, sentence: str) -> None:
        """Nothing."""


REPLY: dict[str, Any] = {
    "shape": [2, 3, 3], "width": 30, "height": 20, "kind": "PNG", "taken": "2024-06-01T12:00:00",
    "place": [48.0, 16.0], "camera": "Box", "date_precision": "exact",
}  # fmt: skip


def test_a_reply_of_the_sandbox_is_a_photo() -> None:
    photo = parse_reply(REPLY, bytearray(range(18)))
    assert not isinstance(photo, PhotoError)
    assert photo.pixels.shape == (2, 3, 3) and photo.pixels.flatten().tolist() == list(range(18))
    assert (photo.width, photo.height, photo.kind, photo.metadata.camera) == (30, 20, "PNG", "Box")
    assert photo.metadata.place == (48.0, 16.0)
    assert photo.metadata.taken is not None and photo.metadata.taken.year == 2024


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2, 3, 4]}, {"shape": [2, 4, 3]}, {"shape": [-2, -3, 3]}, {"shape": [18]}, {"shape": "233"},
        {"shape": [2.0, 3, 3]}, {"width": 0}, {"width": True}, {"height": 10**12}, {"height": "20"},
        {"kind": "GIF"}, {"kind": ["PNG"]}, {"taken": "yesterday"}, {"taken": 5}, {"place": [91.0, 0.0]},
        {"place": [float("nan"), 0.0]}, {"place": [1.0]}, {"place": "here"}, {"camera": "x" * 81},
        {"camera": "\x1b[2J"}, {"camera": {}}, {"refused": "x" * 1000}, {"refused": None},
        {"unavailable": "a\nb"}, {"date_precision": "about"}, {"date_precision": ["day"]},
        {"date_precision": "unreadable"}, {"taken": None, "date_precision": "day"},
        {"taken": "2024-06-01T12:00:00+00:00"}, {"taken": "0001-01-01T12:00:00"}, {"taken": "9999-12-31T12:00:00"},
    ],
)  # fmt: skip
def test_a_compromised_sandbox_can_send_only_bounded_fields(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        parse_reply(REPLY | changes, bytearray(18))


def test_an_invalid_reply_loses_the_photo_and_ends_the_child(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SandboxedDecoder() as decoder:
        with monkeypatch.context() as patch:
            patch.setattr(sandboxed_decoder, "parse_reply", lambda *_: json.loads("{"))
            assert "invalid reply" in str(decoder.read(folder / "a.png"))
        assert decoder.restarts == 1 and not isinstance(decoder.read(folder / "a.png"), PhotoError)
        monkeypatch.setattr(sandboxed_decoder, "MAX_JSON", 10)
        assert "too long" in str(decoder.read(folder / "a.png"))
