"""A real device: its owner's file, its photos, and what happens when the file says no."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedface.aggregation.protocol import Agreement, PlainConfig
from fedface.errors import ConfigError
from fedface.federation.device import serve
from fedface.federation.owner import owner_device
from fedface.federation.task import Agreed, Refusal, TrainTask
from fedface.models.critic import Critic, CriticConfig
from fedface.models.family import GanShape
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2
from fedface.models.weights import buffers_of, vector_of
from fedface.photos.drawn import ToneMix, draw, sample_faces
from fedface.photos.pixels import write_png
from fedface.photos.scan import scan_library
from fedface.privacy.plan import make_plan
from fedface.privacy.target import NoPromise
from fedface.randomness import Streams
from fedface.training.generator import GanTrainingConfig

FILE = """
name: kitchen
photos: photos
state: state
policy:
  max_epsilon: 2
  delta: 1e-6
"""


def draw_photos(folder: Path, count: int, name: str) -> None:
    """Drawn faces of 128 px, saved as a camera would."""
    folder.mkdir(exist_ok=True)
    streams = Streams(3).child(name)
    faces = sample_faces(count, ToneMix(light_share=0.5), streams.generator("faces"))
    for i, face in enumerate(draw(faces, 128, noise=streams.generator("camera"))):
        pixels = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        write_png(folder / f"{name}-{i}.png", np.ascontiguousarray(pixels))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a device file and three photos; indexes are kept within it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    draw_photos(tmp_path / "photos", 3, "old")
    (tmp_path / "device.yaml").write_text(FILE)
    return tmp_path


def test_photos_are_found_scanned_and_cut_to_size(home: Path) -> None:
    """Paths count from the file's own folder; a photo added later takes part in the next round."""
    device = owner_device(home / "device.yaml")
    assert (device.name, device.policy.max_epsilon, device.state) == ("kitchen", 2.0, home / "state")
    first = device.photos(16).images
    assert first.shape == (3, 3, 16, 16) and float(first.min()) >= 0 and float(first.max()) <= 1
    draw_photos(home / "photos", 1, "new")
    assert device.photos(16).images.shape == (4, 3, 16, 16)


def test_a_folder_without_a_face_gives_none_and_a_photo_that_goes_is_left_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error that a server could tell from an answer: noise hides one photo more or less, also the first."""
    device = owner_device(home / "device.yaml")

    def scanned(folder: Path, **more: object) -> None:
        scan_library(folder, **more)  # type: ignore[arg-type]
        (folder / "old-1.png").unlink()

    with monkeypatch.context() as patch:
        patch.setattr("fedface.federation.owner.scan_library", scanned)
        assert device.photos(16).images.shape == (2, 3, 16, 16)
    for photo in (home / "photos").iterdir():
        photo.unlink()
    assert device.photos(16).images.shape == (0, 3, 16, 16)
    write_png(home / "photos" / "wall.png", np.full((64, 64, 3), 200, np.uint8))
    assert device.photos(16).images.shape == (0, 3, 16, 16)


def test_the_state_folder_is_the_owners_alone(home: Path) -> None:
    """Made so, and refused when it was opened since."""
    assert owner_device(home / "device.yaml").state.stat().st_mode & 0o777 == 0o700
    (home / "state").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        owner_device(home / "device.yaml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("photos: photos", "photos: elsewhere", "wanted a folder"),
        ("max_epsilon", "max_epsilom", 'did you mean "max_epsilon"'),
        ("delta: 1e-6", "delta: 2", "device.yaml:7: policy.delta: must lie in"),
        ("name: kitchen", 'name: "a\\tb"', "device.yaml:2: name: must be a text"),
        ("policy:", "privacy:", "unknown key"),
    ],
)
def test_a_mistake_in_the_file_is_said_where_it_stands(home: Path, old: str, new: str, words: str) -> None:
    """An owner mends it without reading our code."""
    (home / "device.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        owner_device(home / "device.yaml")


def test_a_run_that_the_policy_refuses_reads_no_photo_and_books_nothing(home: Path) -> None:
    """Without noise, in the open: this owner allows neither, and the folder is not even listed."""
    shapes = GeneratorConfig(size=16, channel_base=64, channel_max=8), CriticConfig(size=16, channel_base=64)
    training = GanTrainingConfig(rounds=1, steps_per_round=1)
    task = TrainTask(
        run="r",
        round=1,
        cohort=3,
        seed=0,
        agreed=Agreed(
            terms=make_plan(NoPromise(), training.schedule()).terms,
            training=training,
            shape=GanShape(generator=shapes[0], critic=shapes[1]),
            aggregation=PlainConfig(),
            agreement=Agreement(value_range=1.0, most_devices=3),
        ),
        weights=vector_of(StyleGAN2(shapes[0]), Critic(shapes[1])),
        buffers=buffers_of(StyleGAN2(shapes[0]), Critic(shapes[1])),
        model="m",
    )
    answer = serve(task, owner_device(home / "device.yaml"))
    assert isinstance(answer, Refusal) and answer.device == "kitchen" and "plain" in answer.reason
    assert not (home / "indexes").exists()
