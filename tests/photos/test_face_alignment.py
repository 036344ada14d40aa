"""Face positions and crops: known landmarks land at known places, at every rotation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from png_files import write_png

from fedface.errors import LibraryError
from fedface.measurements import rate_interval
from fedface.photos.detection_rates import (
    measure_detection,
    padded,
    padded_faces,
)
from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector
from fedface.photos.face_alignment import (
    Detector,
    Face,
    align,
    alignment_side,
    alignment_square,
    landmarks_in_crop,
    usable,
)
from fedface.photos.image_io import read_photo
from fedface.photos.labelled_faces import COORDINATES

UPRIGHT = np.array([[140.0, 150.0], [180.0, 150.0], [160.0, 172.0], [145.0, 195.0], [175.0, 195.0]])


def spotted(landmarks: np.ndarray, shape: tuple[int, int] = (320, 320)) -> np.ndarray:
    """A grey photo with soft coloured spots: red eyes, blue mouth corners."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    pixels = np.full((*shape, 3), 40.0)
    for (px, py), channel in zip(landmarks[[0, 1, 3, 4]], (0, 0, 2, 2), strict=True):
        pixels[:, :, channel] += 200 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18)
    return pixels.clip(0, 255).astype(np.uint8)


def spots(crop: np.ndarray, channel: int) -> list[np.ndarray]:
    """The centres of mass of a colour's spots in the left and the right half; x, y."""
    light = crop[:, :, channel].astype(float) - 40
    light[light < 20] = 0
    y, x = np.mgrid[: crop.shape[0], : crop.shape[1]]
    halves = []
    for side in (x < crop.shape[1] / 2, x >= crop.shape[1] / 2):
        mass = light * side
        halves.append(np.array([(mass * x).sum(), (mass * y).sum()]) / mass.sum())
    return halves


def turned(landmarks: np.ndarray, degrees: float, about: tuple[float, float] = (160.0, 160.0)) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (landmarks - about) @ turn.T + about


def test_the_square_of_a_symmetric_face_is_known() -> None:
    """Eyes 40 apart, mouth 45 below: half side max(80, 81) = 81, centre a tenth of the way down."""
    corners = alignment_square(UPRIGHT)
    left, top, right, bottom = 160 - 81, 154.5 - 81, 160 + 81, 154.5 + 81
    np.testing.assert_allclose(corners, [(left, top), (left, bottom), (right, bottom), (right, top)])


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 180.0, -75.0])
def test_eyes_are_level_and_mouth_below_at_known_places(degrees: float) -> None:
    landmarks = turned(UPRIGHT, degrees)
    crop = align(spotted(landmarks), landmarks, 128)
    expected = landmarks_in_crop(landmarks, 128)
    np.testing.assert_allclose(expected, landmarks_in_crop(UPRIGHT, 128), atol=1e-9)
    for seen, required in zip([*spots(crop, 0), *spots(crop, 2)], expected[[0, 1, 3, 4]], strict=True):
        np.testing.assert_allclose(seen, required, atol=0.35)
    assert expected[0, 1] == pytest.approx(expected[1, 1])
    assert expected[3, 1] > expected[0, 1] + 30


@pytest.mark.parametrize("size", [16, 32, 256])
def test_positions_in_the_crop_scale_with_its_size(size: int) -> None:
    big = landmarks_in_crop(UPRIGHT, 512)
    np.testing.assert_allclose((landmarks_in_crop(UPRIGHT, size) + 0.5) * 512 / size - 0.5, big)
    crop = align(spotted(UPRIGHT), UPRIGHT, size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8


def test_beyond_the_border_the_picture_is_mirrored_and_fades_into_its_median() -> None:
    """A ramp of grey from 100 at the top: just beyond the border as just inside, then nearer the median."""
    ramp = np.tile(np.arange(100, 200, dtype=np.uint8)[:, None, None], (1, 100, 3))
    landmarks = np.array([[30.0, 10.0], [70.0, 10.0], [50.0, 20.0], [40.0, 40.0], [60.0, 40.0]])
    crop = align(ramp, landmarks, 80).astype(int)
    border = round(float(landmarks_in_crop(landmarks, 80)[0, 1]) - 10 * 80 / 160)  # row 0 of the photo
    assert crop.min() >= 100
    np.testing.assert_allclose(crop[border + 3, 40], crop[border - 3, 40], atol=6)
    median = np.median(crop)
    assert abs(crop[1, 40, 0] - median) < abs(crop[border, 40, 0] - median)


def test_a_mirrored_eye_is_blurred_away_but_the_true_one_is_not() -> None:
    pixels = np.full((64, 64, 3), 100, dtype=np.uint8)
    pixels[15:18, 20:23] = 255
    landmarks = np.array([[21.0, 16.0], [43.0, 16.0], [32.0, 27.0], [24.0, 43.0], [40.0, 43.0]])
    crop = align(pixels, landmarks, 128).astype(int)
    x, y = landmarks_in_crop(landmarks, 128)[0].round().astype(int)
    border = round(y - 16.5 * 128 / alignment_side(landmarks))
    assert crop[y, x, 0] > 230
    mirrored = 2 * border - y
    assert mirrored > 3
    assert crop[mirrored - 3 : mirrored + 4, x - 3 : x + 4, 0].max() < 180


def test_a_crop_within_the_photo_is_not_extended() -> None:
    """Noise keeps its strength up to the border of the crop."""
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    crop = align(noise, UPRIGHT, 162).astype(float)
    assert crop[:8].std() == pytest.approx(crop[70:90].std(), rel=0.15)


def test_antialiasing_turns_a_fine_checkerboard_into_grey() -> None:
    board = ((np.indices((800, 800)).sum(0) % 2) * 255).astype(np.uint8)[:, :, None].repeat(3, 2)
    crop = align(board, (UPRIGHT - 160) * 4 + 400, 16)
    assert np.abs(crop.astype(int) - 127).max() <= 8


def test_a_face_of_a_few_pixels_still_gives_a_crop() -> None:
    tiny = UPRIGHT / 20
    assert align(spotted(tiny, (16, 16)), tiny, 64).shape == (64, 64, 3)


def test_a_face_without_an_orientation_is_refused() -> None:
    point = np.full((5, 2), 7.0)
    with pytest.raises(ValueError, match="coincide"):
        align(np.zeros((16, 16, 3), np.uint8), point, 8)
    assert usable([Face((0, 0, 9, 9), point, 1.0)]) == []


def test_the_largest_face_comes_first() -> None:
    small, large = Face((0, 0, 5, 5), UPRIGHT, 9.0), Face((0, 0, 9, 9), UPRIGHT, 1.0)
    assert usable([small, large]) == [large, small]


def test_scaling_a_face_keeps_pixel_centres() -> None:
    """The centre of a 2x2 block of pixels (0, 0)..(1, 1) is (0.5, 0.5)."""
    face = Face((0, 0, 3, 3), np.zeros((5, 2)), 1.0).scaled(2.0)
    assert np.allclose(face.landmarks, 0.5)


@pytest.fixture(scope="module")
def default() -> EmbeddedDetector:
    return EmbeddedDetector()


@pytest.fixture(scope="module")
def yunet(shared: Path) -> YuNetDetector:
    pytest.importorskip("cv2")
    return YuNetDetector(shared / "data" / "models" / "face_detection_yunet_2023mar.onnx")


@pytest.mark.parametrize("which", ["default", "yunet"])
def test_one_face_two_faces_no_face(which: str, shared: Path, request: pytest.FixtureRequest) -> None:
    detector: Detector = request.getfixturevalue(which)
    for name, expected in {"obama.jpg": 1, "two_people.jpg": 2, "no_face.jpg": 0, "astronaut.jpg": 1}.items():
        photo = read_photo(shared / "data" / "library" / "people" / name, longest_side=800)
        assert len(detector.find(photo.pixels)) == expected, name


def test_the_two_detectors_agree_where_eyes_and_mouth_are(
    default: EmbeddedDetector, yunet: YuNetDetector, shared: Path
) -> None:
    """To within 15 % of the distance between the eyes."""
    pixels = read_photo(shared / "data" / "library" / "people" / "obama.jpg").pixels
    ours, theirs = default.find(pixels)[0].landmarks, yunet.find(pixels)[0].landmarks
    apart = np.hypot(*(theirs[1] - theirs[0]))
    assert np.hypot(*(ours - theirs)[[0, 1, 3, 4]].T).max() < 0.15 * apart


@pytest.mark.slow
def test_the_network_finds_a_face_that_the_cheap_detector_misses(
    default: EmbeddedDetector, shared: Path
) -> None:
    faces = padded_faces(shared / "data" / "faces" / "fairface_eval128", ["race"], per_group=3)
    missed = next(pixels for _, pixels in faces if not HogDetector().find(pixels))
    assert default.find(missed)


def test_a_photo_turned_by_its_exif_gives_the_same_crop(default: EmbeddedDetector, shared: Path) -> None:
    crops = []
    for orientation in (1, 3, 6, 8):
        photo = read_photo(shared / "data" / "library" / "made" / f"face_orient{orientation}.jpg")
        crops.append(align(photo.pixels, default.find(photo.pixels)[0].landmarks, 64).astype(int))
    for crop in crops[1:]:
        assert np.abs(crop - crops[0]).mean() < 4.0
    assert np.abs(crops[0][::-1] - crops[0]).mean() > 20.0


def test_detections_match_the_listed_boxes(yunet: YuNetDetector, shared: Path) -> None:
    with (shared / "data" / "library" / "people_faces.csv").open() as file:
        for row in csv.DictReader(file):
            if row["faces_expected"] != "1":
                continue
            left, top, width, height = (float(number) for number in row["boxes"].split(";")[0].split())
            photo = read_photo(shared / "data" / "library" / "people" / row["file"])
            (face,) = yunet.find(photo.pixels)
            centre = ((face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2)
            assert abs(centre[0] - left - width / 2) < 0.15 * width, row["file"]
            assert abs(centre[1] - top - height / 2) < 0.15 * height, row["file"]


def test_a_missing_or_wrong_model_file_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    with pytest.raises(LibraryError, match="no YuNet model at"):
        YuNetDetector(tmp_path / "absent.onnx")
    (tmp_path / "wrong.onnx").write_bytes(b"no model")
    with pytest.raises(LibraryError, match="not a YuNet model"):
        YuNetDetector(tmp_path / "wrong.onnx")


class FindsDark:
    """A detector that detects only dark images."""

    name = "finds dark"

    def find(self, pixels: np.ndarray) -> list[Face]:
        return [Face((0, 0, 9, 9), UPRIGHT, 1.0)] if pixels.mean() < 110 else []


def test_each_label_is_counted_over_the_same_balanced_photos(tmp_path: Path) -> None:
    """Three dark and one light photo, balanced to one of each pair of labels."""
    header = ",".join(["file", "race", "gender", *COORDINATES])
    rows = [("1.png", "a", "f", 0), ("2.png", "a", "f", 0), ("3.png", "a", "m", 0), ("4.png", "b", "f", 250)]
    (tmp_path / "s").mkdir()
    for file, _, _, shade in rows:
        write_png(tmp_path / "s" / file, np.full((8, 8, 3), shade, dtype=np.uint8))
    lines = [header, *(f"{file},{race},{gender}{',' * 10}" for file, race, gender, _ in rows)]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    rates = measure_detection(tmp_path / "s", FindsDark(), per_cell=1)
    counts = [(rate.group, rate.found, rate.count) for rate in rates]
    assert counts == [("a", 2, 2), ("b", 0, 1), ("f", 1, 2), ("m", 1, 1), ("all", 2, 3)]


@pytest.mark.parametrize(
    ("found", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_match_published_values(found: int, count: int, low: float, high: float) -> None:
    """81 of 263: Newcombe (1998), table 1, method 3; the others by hand from the formula."""
    interval = rate_interval(found, count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-4)


def test_padding_keeps_the_picture_in_the_middle(tmp_path: Path) -> None:
    picture = np.asarray(Image.new("RGB", (10, 6), (255, 0, 0)))
    canvas = padded(picture)
    assert canvas.shape == (12, 20, 3)
    assert np.array_equal(canvas[3:9, 5:15], picture) and canvas[0, 0].tolist() == [128] * 3
