"""Decoding one file: what is read, what is refused and why; a hostile file can only end a child process."""

from __future__ import annotations

import csv
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg_bytes
from PIL import Image, ImageCms
from png_files import write_png

from fedface.errors import PhotoError
from fedface.photos.exif import read_exif
from fedface.photos.image_io import (
    PhotoUnreadable,
    classify_file,
    png_bytes,
    read_photo,
    sniff,
)
from fedface.photos.sandboxed_decoder import Limits, SandboxedDecoder

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def four_corners() -> np.ndarray:
    """Upper left red, upper right green, lower left blue, lower right white; 40 wide, 20 high."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20], pixels[10:, 20:] = RED, GREEN, BLUE, WHITE
    return pixels


def corners_of(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours near the four corners, clockwise from the upper left."""
    height, width = pixels.shape[:2]
    places = [(2, 2), (2, width - 3), (height - 3, width - 3), (height - 3, 2)]
    return [tuple(int(value > 127) * 255 for value in pixels[place]) for place in places]


def save_exif(path: Path, pixels: np.ndarray, tags: dict[int, object], **options: object) -> Path:
    exif = Image.Exif()
    exif.update(tags)
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


# How a camera held in each of the eight ways stores the upright picture (CIPA DC-008, tag 0x0112).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_back_upright(tmp_path: Path, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](four_corners()))
    path = save_exif(tmp_path / "a.jpg", stored, {0x0112: orientation}, quality=95)
    photo = read_photo(path)
    assert corners_of(photo.pixels) == [RED, GREEN, WHITE, BLUE]
    assert (photo.width, photo.height) == (40, 20)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_counts_as_upright(tmp_path: Path, orientation: int) -> None:
    path = save_exif(tmp_path / "a.jpg", four_corners(), {0x0112: orientation})
    assert read_photo(path).pixels.shape == (20, 40, 3)


def test_every_file_of_the_sample_library_is_read_or_refused_as_pillow_would(shared: Path) -> None:
    """Also refused: unsupported formats. Nothing crashes or hangs."""
    root = shared / "data" / "library"
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = {"JPEG", "MPO", "PNG", "WEBP", "HEIF"}
    for row in rows:
        readable = row["status"] == "ok" and row["fmt"] in ours
        try:
            photo = read_photo(root / row["file"], longest_side=400)
        except PhotoError as refusal:
            assert not readable, f"{row['file']}: {refusal}"
            assert str(refusal)
        else:
            assert readable, row["file"]
            assert photo.pixels.dtype == np.uint8 and photo.pixels.shape[2] == 3
            assert max(photo.pixels.shape) <= 400
            listed = sorted(int(length) for length in row["size"].split("x"))
            assert sorted((photo.width, photo.height)) == listed, row["file"]
            # Of two photos the manifest lists the date of an edit: one has another in IPTC, the other has none.
            edited = row["file"] in ("camera/long_description.jpg", "odd/pil_sample_cmyk.jpg")
            if row["date"] and not edited and not row["file"].startswith("corrupt/"):
                assert photo.metadata.taken is not None and photo.metadata.date_precision == "exact"
                assert f"{photo.metadata.taken:%Y:%m:%d %H:%M:%S}" == row["date"]


def test_date_place_and_camera_of_a_photo_are_read(shared: Path) -> None:
    photo = read_photo(shared / "data" / "library" / "made" / "face.heic")
    assert (photo.metadata.taken, photo.metadata.camera) == (
        datetime(2024, 5, 6, 7, 8, 9),
        "ExampleCam Model 1",
    )
    assert photo.metadata.place == pytest.approx((51.507, -0.128), abs=1e-3)


def test_degrees_minutes_and_seconds_become_signed_degrees() -> None:
    gps = {1: "S", 2: (33, 30, 36), 3: "W", 4: (70, 15, 0)}
    assert read_exif({}, {}, gps).place == pytest.approx((-33.51, -70.25))


@pytest.mark.parametrize(
    "gps",
    [
        {1: "N", 2: (91, 0, 0), 3: "E", 4: (0, 0, 0)},
        {1: "N", 2: (float("nan"), 0, 0), 3: "E", 4: (1, 0, 0)},
        {1: "N", 2: b"\xff\xff", 3: "E", 4: (1, 0, 0)},
        {1: "N", 2: (), 3: "E", 4: (1, 0, 0)},
        {1: "N", 2: (0, 0, 0), 3: "E", 4: (0, 0, 0)},
        {2: None},
    ],
)
def test_an_invalid_place_is_missing(gps: dict[int, object]) -> None:
    assert read_exif({}, {}, gps).place is None


@pytest.mark.parametrize(
    "text", ["0000:00:00 00:00:00", "    :  :     :  :  ", "2024:13:01 00:00:00", "x", b"\xff", 7]
)
def test_an_invalid_date_is_missing(text: object) -> None:
    assert read_exif({}, {0x9003: text}, {}).taken is None


def test_a_date_is_taken_from_the_next_best_tag() -> None:
    reported = read_exif({}, {0x9004: b"2020:01:02 03:04:05\0"}, {})
    assert (reported.taken, reported.date_precision) == (datetime(2020, 1, 2, 3, 4, 5), "exact")


def test_a_bomb_is_refused_by_its_header(shared: Path) -> None:
    with pytest.raises(PhotoError, match="100 megapixels"):
        read_photo(shared / "data" / "library" / "made" / "bomb_30000x30000_1bit.png")


@pytest.mark.parametrize(("height", "longest_side", "limit"), [(10_000, None, 100), (22_500, 1000, 225)])
def test_a_picture_just_above_the_limit_is_refused_before_decoding(
    tmp_path: Path, height: int, longest_side: int | None, limit: int
) -> None:
    """Its data is missing: a decoder would report that instead."""
    whole = png_bytes(np.zeros((1, 1), dtype=np.uint8))
    claimed = whole[:16] + (10_001).to_bytes(4, "big") + height.to_bytes(4, "big") + whole[24:29]
    header = whole[:8] + claimed[8:29]
    (tmp_path / "a.png").write_bytes(header + zlib.crc32(claimed[12:29]).to_bytes(4, "big") + whole[33:])
    with pytest.raises(PhotoError, match=rf"more than {limit} megapixels \(10001 x {height}\)"):
        read_photo(tmp_path / "a.png", longest_side=longest_side)


def test_a_file_above_the_size_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(200_000_001)
    with pytest.raises(PhotoError, match="larger than 200 MB"):
        read_photo(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(kind, kind.upper()))
    (tmp_path / f"a.{kind}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(PhotoError, match="broken"):
        read_photo(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a.png", "a.jpg", "a.webp", "a.tif", "a.CR3", "a.txt", "a"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "HEIF"])
def test_a_photo_is_read_by_its_first_bytes_whatever_its_name(tmp_path: Path, name: str, kind: str) -> None:
    pixels = four_corners().repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(pixels).save(tmp_path / name, kind, quality=95)
    photo = read_photo(tmp_path / name)
    assert photo.kind == kind and corners_of(photo.pixels) == [RED, GREEN, WHITE, BLUE]
    assert classify_file(tmp_path / name) == "picture"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("a.gif", "GIF", "kind not read: GIF"),
        ("a.jpg", "GIF", "kind not read: GIF"),
        ("a.bmp", "BMP", "kind not read: BMP"),
        ("a", "TIFF", "kind not read: TIFF"),
        ("a.NEF", "TIFF", "kind not read: NEF"),
        ("a.dng", "TIFF", "kind not read: DNG"),
        ("a.arw", "TIFF", "kind not read: ARW"),
        ("a.jpg", "JPEG2000", "kind not read: JP2"),
    ],
)
def test_an_unsupported_format_is_refused_with_the_reason(
    tmp_path: Path, name: str, kind: str, reason: str
) -> None:
    Image.fromarray(four_corners()).save(tmp_path / name, kind)
    with pytest.raises(PhotoError, match=reason):
        read_photo(tmp_path / name)
    assert classify_file(tmp_path / name) == "picture"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "CR3"), (b"FUJIFILMCCD-RAW 0201FF", "RAF"),
        (b"IIU\0\x18\0\0\0", "RW2"),
        (b"IIRO\x08\0\0\0", "ORF"), (b"IIRS\x08\0\0\0", "ORF"), (b"MMOR\0\0\0\x08", "ORF"),
        (b"\xff\x0a\xfa\x1f", "JXL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"), (b"\0\0\0\x0cjP  \r\n\x87\n", "JP2"), (b"\xff\x4f\xff\x51\0", "JP2"),
        (b"8BPS\0\1", "PSD"), (b"FOVb", "X3F"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["named.jpg", "unnamed"])
def test_raw_and_modern_kinds_are_named_whatever_the_name(
    tmp_path: Path, head: bytes, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(head + bytes(100))
    with pytest.raises(PhotoError, match=f"^kind not read: {kind}$"):
        read_photo(tmp_path / name)
    assert classify_file(tmp_path / name) == "picture"


@pytest.mark.parametrize(("width", "height"), [(12000, 9000), (16320, 12240)])
def test_a_phone_photo_of_108_or_200_megapixels_is_read_at_a_reduced_scale(
    tmp_path: Path, width: int, height: int
) -> None:
    """Also where more pixels are requested than are decoded; whole, it would need too much memory."""
    picture = Image.new("L", (width, height), 128)
    picture.paste(255, (0, 0, width // 2, height // 2))
    picture.save(tmp_path / "a.jpg", quality=50)
    with SandboxedDecoder(longest_side=1000) as decoder:
        photo, closer = decoder.read(tmp_path / "a.jpg"), decoder.read(tmp_path / "a.jpg", longest_side=9000)
    for found, side in ((photo, 1000), (closer, width // 2)):
        assert not isinstance(found, PhotoError), found
        assert (found.width, found.height, found.pixels.shape[1]) == (width, height, side)
        assert corners_of(found.pixels) == [WHITE, WHITE, WHITE, WHITE]
        assert found.pixels[-2, -2, 0] == 128
    with pytest.raises(PhotoError, match="100 megapixels"):
        read_photo(tmp_path / "a.jpg")


def test_a_jpeg_above_400_megapixels_is_refused_by_its_header(tmp_path: Path) -> None:
    content = jpeg_bytes(four_corners(), quality=90)
    size = content.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(
        content[:size] + struct.pack(">HH", 20_001, 20_000) + content[size + 4 :]
    )
    with pytest.raises(PhotoError, match=r"400 megapixels \(20000 x 20001\)"):
        read_photo(tmp_path / "a.jpg", longest_side=100)


def test_text_empty_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {
        "text": "holds no picture",
        "empty": "empty file",
        "pipe": "not a regular file",
        "absent": "cannot be opened",
    }
    for name, reason in expected.items():
        with pytest.raises(PhotoError, match=reason):
            read_photo(tmp_path / f"{name}.jpg")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_file_cut_short_in_its_header_is_named_as_such(tmp_path: Path, length: int) -> None:
    """Not as a file that holds no picture."""
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png")):
        content = io.BytesIO()
        Image.new("RGB", (40, 30)).save(content, kind)
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content.getvalue()[:length])
        with pytest.raises(PhotoError, match=f"{kind}.* cut short"):
            read_photo(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_colour_mode_becomes_the_same_grey(tmp_path: Path, mode: str) -> None:
    """A mid-grey image, except in mode 1, which has only black and white."""
    value = 255 if mode == "1" else 128
    grey = Image.new("L", (8, 8), value)
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), value * 257, dtype=np.uint16))
    elif mode == "CMYK":
        image = Image.merge("CMYK", [Image.new("L", (8, 8), 0)] * 3 + [Image.new("L", (8, 8), 255 - value)])
    else:
        image = grey.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.abs(read_photo(path).pixels.astype(int) - value).max() <= 2


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert np.unique(read_photo(tmp_path / "a.png").pixels).tolist() == [204]


def linear_light_profile() -> bytes:
    """The sRGB profile with its three tone curves replaced by the identity: values are linear light."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    identity = b"para" + bytes(8) + (1 << 16).to_bytes(4, "big")  # ICC.1:2010, 10.16: x to the power 1
    for entry in range(int.from_bytes(profile[128:132], "big")):
        tag = profile[132 + 12 * entry : 144 + 12 * entry]
        if tag[1:4] == b"TRC":
            start = int.from_bytes(tag[4:8], "big")
            profile[start : start + len(identity)] = identity
    return bytes(profile)


def test_a_colour_profile_is_applied_and_a_broken_one_is_ignored(tmp_path: Path) -> None:
    """Linear light 100/255 is sRGB 1.055 * (100/255)^(1/2.4) - 0.055, of 255: 168 (IEC 61966-2-1)."""
    pixels = np.full((8, 8, 3), 100, dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {"broken": b"broken", "empty": b"", "srgb": srgb, "linear": linear_light_profile()}
    expected = {"broken": 100, "empty": 100, "srgb": 100, "linear": 168}
    for name, profile in profiles.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.abs(read_photo(tmp_path / f"{name}.png").pixels.astype(int) - expected[name]).max() <= 1


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    for name in ("a.webp", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
        assert corners_of(read_photo(tmp_path / name).pixels) == [RED] * 4


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_downscaling_preserves_the_image_and_reports_the_original_size(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.repeat(np.repeat(four_corners(), 50, 0), 50, 1)).save(tmp_path / name)
    photo = read_photo(tmp_path / name, longest_side=100)
    assert photo.pixels.shape == (50, 100, 3) and (photo.width, photo.height) == (2000, 1000)
    assert corners_of(photo.pixels) == [RED, GREEN, WHITE, BLUE]


def test_a_pixel_survives_a_png(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(read_photo(tmp_path / "a.png").pixels, pixels)


def test_formats_are_detected_by_their_first_bytes() -> None:
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(8)) == "HEIF"
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(8)) == "AVIF"
    assert sniff(b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(8)) is None
    assert sniff(b"PK\x03\x04" + bytes(28)) is None


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file that is just within the limits and takes the better part of a second to decode."""
    path = tmp_path_factory.mktemp("heavy") / "heavy.png"
    write_png(path, np.zeros((9000, 11000), dtype=np.uint8))
    return path


def test_a_file_that_takes_too_long_is_refused_and_the_next_one_is_read(tmp_path: Path, heavy: Path) -> None:
    light = tmp_path / "a.png"
    write_png(light, four_corners())
    with SandboxedDecoder(longest_side=100, limits=Limits(seconds=0.1)) as reader:
        answer = reader.read(heavy)
        assert not isinstance(answer, PhotoUnreadable) and "longer than 0.1 s" in str(answer)
    with SandboxedDecoder(longest_side=100) as reader:
        read = [photo for _, photo in reader.read_all([light, heavy, light])]
        assert [getattr(photo, "width", None) for photo in read] == [40, 11000, 40]


STOPPED = """
import sys
from pathlib import Path
from fedface.photos.sandboxed_decoder import Limits, SandboxedDecoder
with SandboxedDecoder(longest_side=100, limits=Limits(seconds=2)) as reader:
    print("reading", flush=True)
    print(getattr(reader.read(Path(sys.argv[1])), "width", "refused"))
"""


def test_no_time_of_a_photo_passes_while_its_reader_is_stopped(heavy: Path) -> None:
    """An owner who pauses a device for hours loses no photo by it."""
    reader = subprocess.Popen([sys.executable, "-c", STOPPED, heavy], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
    os.kill(reader.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(reader.pid, signal.SIGCONT)
    assert reader.communicate(timeout=60)[0] == "11000\n"


def test_a_file_that_needs_too_much_memory_is_refused(heavy: Path) -> None:
    with SandboxedDecoder(longest_side=None, limits=Limits(memory=256 << 20)) as reader:
        answer = reader.read(heavy)
        assert isinstance(answer, PhotoError) and "memory" in str(answer)


def test_a_crash_of_the_decoder_loses_one_file(tmp_path: Path, heavy: Path) -> None:
    light = tmp_path / "a.png"
    write_png(light, four_corners())
    with SandboxedDecoder(longest_side=100) as reader:
        reader.read(light)
        child = reader.process
        assert child is not None
        killer = threading.Timer(0.1, lambda: os.kill(child, signal.SIGSEGV))
        killer.start()
        answer = reader.read(heavy)
        killer.join()
        assert isinstance(answer, PhotoError) and "signal 11" in str(answer)
        assert not isinstance(reader.read(light), PhotoError)
        assert reader.restarts == 1


def test_the_child_process_returns_the_same_as_this_process(shared: Path) -> None:
    names = ["made/face.heic", "made/face_orient6.jpg", "odd/transparent.png", "odd/sugarshack.mpo"]
    names.append("made/zero.jpg")
    with SandboxedDecoder(longest_side=300) as reader:
        for name in names:
            path = shared / "data" / "library" / name
            answer = reader.read(path)
            if isinstance(answer, PhotoError):
                assert name == "made/zero.jpg"
                continue
            here = read_photo(path, longest_side=300)
            assert np.array_equal(answer.pixels, here.pixels)
            assert answer.metadata == here.metadata
