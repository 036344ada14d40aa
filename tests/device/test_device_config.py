"""A real device: its owner's file, its photos, and errors in the file."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from png_files import write_png

from fedface.aggregation.payload import AggregationParameters, PlainConfig
from fedface.config import parse
from fedface.device.client import handle_task
from fedface.device.config import check_kind, missing_policy_folders, read_device_config
from fedface.device.device import load_device
from fedface.device.state import device_state
from fedface.device.withdrawal import erase
from fedface.errors import ConfigError
from fedface.messages.messages import Refusal, RoundConfig, TrainTask
from fedface.models.checkpoint import flatten_buffers, flatten_parameters
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.model import GanArchitecture
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.photos.photo_index import PhotoIndex, default_cache
from fedface.photos.scan import scan_library
from fedface.privacy.participation_conditions import ConditionsNotMet
from fedface.privacy.plan import make_plan
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.privacy_target import NoPrivacy
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.training.gan import GanTrainingConfig

FILE = """
name: kitchen
photos: photos
state: state
answer_seconds: 0
policy:
  max_epsilon: 2
  delta: 1e-6
"""

POLICY = "max_epsilon: 2\ndelta: 1e-6\nexclude_folders: [Private]\n"


def save_photos(folder: Path, count: int, name: str) -> None:
    """Synthetic faces of 128 px, saved as a camera would."""
    folder.mkdir(exist_ok=True)
    streams = Streams(3).child(name)
    faces = sample_faces(count, ToneMix(light_fraction=0.5), streams.generator("faces"))
    for i, face in enumerate(render(faces, 128, noise=streams.generator("camera"))):
        pixels = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        write_png(folder / f"{name}-{i}.png", np.ascontiguousarray(pixels))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a device file and three photos; indexes are stored within it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    save_photos(tmp_path / "photos", 3, "old")
    (tmp_path / "device.yaml").write_text(FILE)
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path


def test_photos_are_scanned_and_cropped(home: Path) -> None:
    """Paths are relative to the file; a photo added later takes part; a face takes three bytes per pixel."""
    device = load_device(home / "device.yaml")
    assert (device.name, device.policy.max_epsilon, device.state) == ("kitchen", 2.0, home / "state")
    first = device.photos(16).images
    assert first.shape == (3, 3, 16, 16) and first.nbytes == 3 * 3 * 16 * 16
    assert first.float().std() > 10  # of 255: faces, not one colour
    save_photos(home / "photos", 1, "new")
    assert device.photos(16).images.shape == (4, 3, 16, 16)


def test_a_library_of_more_than_max_photos_takes_part(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Anything else would make one photo decide about all others; the owner's log says what to change."""
    (home / "device.yaml").write_text(FILE.replace("answer_seconds", "max_photos: 3\nanswer_seconds"))
    device = load_device(home / "device.yaml")
    assert len(device.photos(16)) == 3 and "max_photos" not in caplog.text
    save_photos(home / "photos", 1, "new")
    assert len(device.photos(16)) == 4
    device.ready()
    assert "4 photos with a face are more than max_photos (3)" in caplog.text


def test_a_folder_without_faces_and_a_deleted_photo_are_no_errors(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server must not distinguish them from other replies: noise hides one photo more or less, also the first."""
    device = load_device(home / "device.yaml")

    def scanned(folder: Path, **more: object) -> None:
        scan_library(folder, **more)  # type: ignore[arg-type]
        (folder / "old-1.png").unlink()

    with monkeypatch.context() as patch:
        patch.setattr("fedface.device.device.scan_library", scanned)
        assert device.photos(16).images.shape == (2, 3, 16, 16)
    for photo in (home / "photos").iterdir():
        photo.unlink()
    assert device.photos(16).images.shape == (0, 3, 16, 16)
    write_png(home / "photos" / "wall.png", np.full((64, 64, 3), 200, np.uint8))
    assert device.photos(16).images.shape == (0, 3, 16, 16)


def test_the_state_folder_is_private(home: Path) -> None:
    """Never created by an answering device, whose disk may not be mounted; refused if it is open to others."""
    assert load_device(home / "device.yaml").state == home / "state"
    (home / "state").rmdir()
    with pytest.raises(ConfigError, match="mount or restore it"):
        load_device(home / "device.yaml")
    (home / "state").mkdir(mode=0o700)
    (home / "state").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        load_device(home / "device.yaml")


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("exclude_folders: [private, work/Documents]", []),  # capitals do not matter to what is barred
        ("exclude_folders: [Privat]", ["exclude_folders: there is no folder Privat in PHOTOS; did you mean Private?"]),
        ("exclude_folders: [Work/Docments]", ["exclude_folders: there is no folder "
         "Work/Docments in PHOTOS; did you mean Work/Documents?"]),
        ("exclude_folders: [Deleted, 2018]", ["exclude_folders: there is no folder Deleted in PHOTOS.",
                                    "exclude_folders: there is no folder 2018 in PHOTOS."]),
        ("folders: [Work, 2019]", []),
        ("folders: [work]", ["folders: there is no folder work in PHOTOS; did you mean Work?"]),
    ],
)  # fmt: skip
def test_missing_policy_folders_are_detected(home: Path, line: str, lost: list[str]) -> None:
    """Compared as the library compares them; different digits are another folder, not a typo."""
    photos = home / "photos"
    for name in ("Private", "Work/Documents", "2019"):
        (photos / name).mkdir(parents=True)
    policy = parse(f"max_epsilon: 2\ndelta: 1e-6\n{line}", DevicePolicy, name="p.yaml")
    found = [one.describe().replace(str(photos), "PHOTOS") for one in missing_policy_folders(policy, photos)]
    assert found == lost


def test_a_device_stops_while_an_excluded_folder_seems_mistyped(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A deleted folder is a warning; a name similar to an existing folder was meant to exclude it."""
    (home / "device.yaml").write_text(FILE + "  exclude_folders: [Private]\n")
    assert load_device(home / "device.yaml").name == "kitchen"
    assert "policy.exclude_folders: there is no folder Private in" in caplog.text
    (home / "photos" / "Privat").mkdir()
    with pytest.raises(
        ConfigError, match=r"policy.exclude_folders: .*did you mean Privat\? Correct the line"
    ):
        load_device(home / "device.yaml")


def test_folders_of_which_none_exists_are_refused(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If one of several is missing, that is a warning, and the others are used."""
    (home / "photos" / "Family").mkdir()
    (home / "device.yaml").write_text(FILE + "  folders: [Family, Gone]\n")
    assert load_device(home / "device.yaml").name == "kitchen"
    assert "policy.folders: there is no folder Gone in" in caplog.text
    (home / "device.yaml").write_text(FILE + "  folders: [Famly]\n")
    with pytest.raises(ConfigError, match=r"policy.folders: .*did you mean Family\? No photo may be used"):
        load_device(home / "device.yaml")


def test_reading_a_device_file_creates_nothing(home: Path) -> None:
    """Neither the state folder nor an index."""
    before = sorted(home.rglob("*"))
    assert read_device_config(home / "device.yaml").name == "kitchen"
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "expected", "result"),
    [
        (POLICY, "device", "this is a policy file; a device file has name, photos, state and policy"),
        (FILE, "policy", "this is a device file; a policy file has max_epsilon and delta"),
        (FILE, "experiment", "this is a device file; an experiment file has question and privacy"),
        ("question: q\nname: n\nprivacy: {}", "policy", "this is an experiment file; a policy file has"),
    ],
)
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, text: str, expected: Literal["device", "policy", "experiment"], result: str
) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(result)):
        check_kind(tmp_path / "f.yaml", expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FILE, "device"),
        (POLICY, "policy"),
        ("name: n", "device"),
        ("", "policy"),
        ("spoons: 3", "experiment"),
    ],
)
def test_a_file_that_may_be_of_its_kind_is_left_to_its_reader(
    tmp_path: Path, text: str, expected: Literal["device", "policy", "experiment"]
) -> None:
    """An incomplete file lacks a key; it is not reported as another file."""
    (tmp_path / "f.yaml").write_text(text)
    check_kind(tmp_path / "f.yaml", expected)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("photos: photos", "photos: elsewhere", "photos: there is no folder"),
        ("max_epsilon", "max_epsilom", 'did you mean "max_epsilon"'),
        ("delta: 1e-6", "delta: 2", "device.yaml:8: policy.delta: must lie in"),
        ("name: kitchen", 'name: "a\\tb"', "device.yaml:2: name: must be a text"),
        ("policy:", "privacy:", "unknown key"),
    ],
)
def test_an_error_in_the_file_is_reported_with_its_line(home: Path, old: str, new: str, words: str) -> None:
    """With file, line and key."""
    (home / "device.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        load_device(home / "device.yaml")


def test_a_run_that_the_policy_refuses_reads_no_photo_and_records_nothing(home: Path) -> None:
    """Without noise and unencrypted: this owner allows neither, and the folder is not listed."""
    shapes = (
        StyleGAN2Config(size=16, channel_base=64, channel_max=8),
        DiscriminatorConfig(size=16, channel_base=64),
    )
    training = GanTrainingConfig(rounds=1, steps_per_round=1)
    task = TrainTask(
        run="r",
        round=1,
        cohort=3,
        seed=0,
        config=RoundConfig(
            dp=make_plan(NoPrivacy(), training.schedule()).dp_parameters,
            training=training,
            architecture=GanArchitecture(generator=shapes[0], discriminator=shapes[1]),
            aggregation=PlainConfig(),
            agreement=AggregationParameters(value_range=1.0, max_devices=3),
        ),
        weights=flatten_parameters(StyleGAN2(shapes[0]), Discriminator(shapes[1])),
        buffers=flatten_buffers(StyleGAN2(shapes[0]), Discriminator(shapes[1])),
        model="m",
    )
    answer = handle_task(task, load_device(home / "device.yaml"))
    assert isinstance(answer, Refusal) and answer.device == "kitchen" and "plain" in answer.reason
    assert not (home / "indexes").exists()


def test_a_manual_scan_postpones_rounds_until_it_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round would be recorded and use no photo."""
    device = load_device(home / "device.yaml")
    device.ready()
    assert len(device.photos(16)) == 3
    index = PhotoIndex(default_cache(home / "photos"))
    monkeypatch.setattr("fedface.photos.photo_index.BUSY_SECONDS", 0.05)
    with index.writing("another"):
        scanning = sqlite3.connect(index.path, isolation_level=None)
        scanning.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConditionsNotMet):
            device.ready()
        scanning.execute("ROLLBACK")
        scanning.close()
    device.ready()


def test_an_index_of_a_folder_that_was_moved_is_erased_too(home: Path) -> None:
    """It contains dates, places and face positions, under the old folder's name."""
    load_device(home / "device.yaml").photos(16)
    first = default_cache(home / "photos")
    (home / "photos").rename(home / "pictures")
    (home / "device.yaml").write_text(FILE.replace("photos: photos", "photos: pictures"))
    load_device(home / "device.yaml").photos(16)
    second = default_cache(home / "pictures")
    assert first.exists() and second.exists()
    stored = device_state(home / "device.yaml")
    assert set(stored.indexes) == {first, second}
    erase(stored, ledger=False)
    assert not first.exists() and not second.exists() and not (home / "state" / "indexes.json").exists()
