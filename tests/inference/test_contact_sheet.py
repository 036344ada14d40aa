"""Contact sheets of one photo and of folders, which can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from png_files import write_png
from tiny import GENERATOR, STYLES

from fedface.atomic_io import has_mark
from fedface.audits.bias import tone_histogram
from fedface.errors import ConfigError, LibraryError
from fedface.inference.contact_sheet import MethodRunner, contact_sheet, describe_output, show
from fedface.inference.pipeline import (
    SheetFolder,
    SheetRecord,
    SheetSettings,
    SkippedPhoto,
    check_sheet,
    images_in,
    run_pipeline,
)
from fedface.models.model import GeneratorArchitecture, Model, StyleEncoderArchitecture, build_model
from fedface.photos.face_alignment import Detector, Face
from fedface.photos.face_crops import FaceCrop
from fedface.photos.image_io import PICTURE_MARK, read_photo_bytes
from fedface.randomness import Streams
from fedface.upsampling.degradation import Area, Chain, Degradation, Noise
from fedface.upsampling.feedforward import NearestConfig, StyleEncoderConfig
from fedface.upsampling.methods import Method
from fedface.upsampling.pulse import PulseConfig
from fedface.upsampling.upsampler import pixel_std, squared_difference

STREAMS = Streams(4)
PULSE = PulseConfig(steps=3, mapping_samples=200)
METHODS: list[tuple[Method, Model | None]] = [
    (PULSE, build_model(GeneratorArchitecture(generator=GENERATOR), STREAMS.generator("alone"))),
    (
        StyleEncoderConfig(),
        build_model(
            StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES), STREAMS.generator("styled")
        ),
    ),
    (NearestConfig(), None),
]
SETTINGS = SheetSettings(degradation=Area(4), size=16, faces=2, max_faces=1)


class Blind:
    """A detector that finds nothing."""

    name = "blind"

    def find(self, pixels: np.ndarray) -> list[Face]:
        return []


def blind() -> Detector:
    """Created on first use."""
    return Blind()


class Silent:
    """Discards progress."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def message(self, sentence: str) -> None:
        """Nothing."""


def runner(degradation: Degradation = SETTINGS.degradation) -> MethodRunner:
    """PULSE, an encoder and nearest at 16 px."""
    return MethodRunner(METHODS, degradation, size=16, seed=0)


def face_crop(side: int, *, people: int = 0) -> FaceCrop:
    """A face of random pixels."""
    pixels = (torch.rand(side, side, 3, generator=STREAMS.generator("pixels")) * 255).byte().numpy()
    return FaceCrop(crop=pixels, number=1, people=people, rotation=0, side=float(side))


def test_a_picture_of_the_input_size_is_the_input() -> None:
    """Four by four pixels of a picture that is already a face, factor 4, 16 px: nothing is downscaled."""
    small = face_crop(4)
    shown = show(small, Area(4), size=16)
    expected = torch.from_numpy(small.crop).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(shown.low, expected) and shown.truth.shape == (1, 3, 16, 16)


def test_a_face_is_degraded_as_the_methods_assume() -> None:
    face = face_crop(16, people=1)
    shown = show(face, Area(4), size=16)
    assert torch.allclose(shown.low, Area(4).apply(shown.truth))
    noisy = Chain((Area(4), Noise(0.1)))
    once, again = (show(face, noisy, size=16, seed=seed).low for seed in (1, 1))
    assert torch.equal(once, again) and not torch.equal(once, shown.low)


def test_every_method_reports_the_consistency_error_of_its_faces() -> None:
    content = runner().run(show(face_crop(16, people=1), Area(4), size=16), faces=2)
    assert [output.upsampled.faces_per_photo for output in content.outputs] == [2, 1, 1]
    for output in content.outputs:
        again = squared_difference(Area(4).apply(output.upsampled.images[0]), content.shown.low)
        torch.testing.assert_close(output.upsampled.consistency_error[0], again, atol=1e-6, rtol=1e-3)
    assert "of 2 faces fit" in describe_output(content.outputs[0])
    assert describe_output(content.outputs[2]).startswith(
        "nearest: one face, fits, smallest consistency error 0.00000"
    )


def test_the_standard_deviation_of_two_faces_is_half_their_distance() -> None:
    """Dividing by their number; equal faces have 0."""
    faces = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.6)])
    torch.testing.assert_close(pixel_std(faces), torch.full((4, 4), 0.3))
    assert float(pixel_std(faces[:1].expand(3, 3, 4, 4)).max()) == 0.0


def test_the_sheet_is_a_picture_that_grows_with_methods_and_faces() -> None:
    content = runner().run(show(face_crop(16, people=1), Area(4), size=16), faces=2)
    tones = tone_histogram(torch.rand(20, 3, 16, 16, generator=STREAMS.generator("tones")))
    with_tones, without = (
        read_photo_bytes(contact_sheet(content, reported)).pixels for reported in (tones, None)
    )
    assert with_tones.shape == without.shape and (with_tones != without).any()
    more = runner().run(content.shown, faces=5)
    wider = read_photo_bytes(contact_sheet(more)).pixels
    assert wider.shape[1] > without.shape[1] and wider.shape[0] == without.shape[0]


def folder_of_photos(place: Path) -> Path:
    """Two small faces, one photo without a face, one broken file, and one that is not a picture."""
    photos = place / "photos"
    (photos / "deep").mkdir(parents=True)
    write_png(photos / "a.png", face_crop(16).crop)
    write_png(photos / "deep" / "a.png", face_crop(8).crop)
    write_png(photos / "empty.png", np.full((90, 120, 3), 128, dtype=np.uint8))
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (photos / "notes.txt").write_text("no picture")
    return photos


def work(photos: Path, sheets: SheetFolder) -> list[SheetRecord | SkippedPhoto]:
    """Process everything that is left."""
    left = sheets.pending(images_in(photos)[0])
    found: list[SheetRecord | SkippedPhoto] = []
    for path, result in run_pipeline(left, sheets.place, SETTINGS, runner(), blind, None, Silent()):
        sheets.store(path, result)
        found += [result] if isinstance(result, SkippedPhoto) else result
    return found


def test_a_folder_gives_a_sheet_for_every_face_and_a_reason_for_every_other_photo(tmp_path: Path) -> None:
    """Sheets mirror the photos' paths, so that names do not collide."""
    photos = folder_of_photos(tmp_path)
    assert [path.name for path in images_in(photos)[0]] == ["a.png", "broken.jpg", "empty.png", "a.png"]
    out = tmp_path / "out"
    found = work(photos, SheetFolder(out, photos, {"seed": 0}))
    generated = [result for result in found if isinstance(result, SheetRecord)]
    skipped = {Path(r.photo).name: r.reason for r in found if isinstance(r, SkippedPhoto)}
    places = sorted(result.sheet.relative_to(out).as_posix() for result in generated)
    assert places == ["a.png.png", "deep/a.png.png"]
    assert all(has_mark(result.sheet, PICTURE_MARK) for result in generated)
    assert set(skipped) == {"broken.jpg", "empty.png"} and "no face found" in skipped["empty.png"]
    stored = json.loads((out / "faces.json").read_text())
    assert len(stored["photos"]) == 4 and stored["settings"]["seed"] == 0


def test_interrupted_work_continues(tmp_path: Path) -> None:
    """A second start does nothing; only deleted or replaced photos are processed again."""
    photos, out = folder_of_photos(tmp_path), tmp_path / "out"
    work(photos, SheetFolder(out, photos, {"seed": 0}))
    assert work(photos, SheetFolder(out, photos, {"seed": 0})) == []
    (out / "a.png.png").unlink()
    (photos / "broken.jpg").unlink()
    write_png(photos / "empty.png", face_crop(8).crop)
    again = work(photos, SheetFolder(out, photos, {"seed": 0}))
    assert [Path(result.photo).name for result in again] == [
        "a.png",
        "empty.png",
    ]
    assert set(json.loads((out / "faces.json").read_text())["photos"]) == {"a.png", "deep/a.png", "empty.png"}


def test_sheets_of_other_settings_are_never_mixed_and_photos_never_replaced(tmp_path: Path) -> None:
    photos, out = folder_of_photos(tmp_path), tmp_path / "out"
    work(photos, SheetFolder(out, photos, {"seed": 0}))
    with pytest.raises(ConfigError, match="holds sheets of other photos or settings"):
        SheetFolder(out, photos, {"seed": 1})
    for broken in ("{", '{"settings": {}, "photos": {"a": {}}}', '{"settings": {}, "photos": [1]}'):
        (out / "faces.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"faces\.json: damaged"):
            SheetFolder(out, photos, {"seed": 0})
    with pytest.raises(ConfigError, match="holds the photos"):
        SheetFolder(photos, photos / "deep" / "..", {"seed": 0})
    for path in (photos / "a.png", photos / "empty.png"):
        with pytest.raises(ConfigError, match="exists and will not be replaced"):
            check_sheet(path, photos / "a.png")
    with pytest.raises(ConfigError, match="expected a name that ends in .png"):
        check_sheet(tmp_path / "new.jpg", photos / "a.png")


def test_sheets_among_the_photos_are_not_read_as_photos(tmp_path: Path) -> None:
    photos = folder_of_photos(tmp_path)
    work(photos, SheetFolder(photos / "sheets", photos, {"seed": 0}))
    pictures, skipped = images_in(photos)
    assert len(pictures) == 4 and skipped["pictures made by fedface"] == 2


def test_a_folder_with_another_programs_faces_json_is_read(tmp_path: Path) -> None:
    photos = folder_of_photos(tmp_path)
    (photos / "deep" / "faces.json").write_text('{"from": "another program"}')
    (photos / "deep" / "@eaDir").mkdir()
    write_png(photos / "deep" / "@eaDir" / "a.png", face_crop(8).crop)
    pictures, skipped = images_in(photos)
    assert [path.relative_to(photos).as_posix() for path in pictures][-1] == "deep/a.png" and len(
        pictures
    ) == 4
    assert skipped == {"folders of thumbnails or deleted photos": 1, "files that are not pictures": 2}


class FailsOnGrey:
    """A detector that breaks on a picture of one colour."""

    name = "fails on grey"

    def find(self, pixels: np.ndarray) -> list[Face]:
        """No face, or an error."""
        if pixels.std() == 0:
            raise RuntimeError("division by zero")
        return []


def test_an_unusable_photo_is_skipped_and_the_others_are_processed(tmp_path: Path) -> None:
    """A spacer of 40 x 1 pixels, a photo on which the detector fails, a raw file; the others have their sheets."""
    photos = folder_of_photos(tmp_path)
    write_png(photos / "0.png", np.full((1, 40, 3), 9, dtype=np.uint8))
    (photos / "raw.CR3").write_bytes(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100))
    pictures, _ = images_in(photos)
    place = SheetFolder(tmp_path / "out", photos, {"seed": 0}).place
    results = dict(run_pipeline(pictures, place, SETTINGS, runner(), FailsOnGrey, None, Silent()))
    reasons = {path.name: one.reason for path, one in results.items() if isinstance(one, SkippedPhoto)}
    assert len(results) == 6 and set(reasons) == {"0.png", "raw.CR3", "broken.jpg", "empty.png"}
    assert reasons["0.png"].startswith("only 40 x 1 pixels")
    assert reasons["raw.CR3"] == "kind not read: CR3"
    assert reasons["empty.png"] == "the face detector failed on it (RuntimeError)"


def test_a_folder_without_a_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(LibraryError, match=r"no picture in this folder \(1 files that are not pictures\)"):
        images_in(tmp_path)
    with pytest.raises(LibraryError, match="there is no photo or folder"):
        images_in(tmp_path / "nowhere")
