"""Every experiment in the repository can be read and planned; missing photos are one error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedface.cli.plan_summary import Traffic, plan_lines
from fedface.config import section
from fedface.errors import ConfigError, LibraryError
from fedface.experiment import (
    VARY,
    Experiment,
    LabelledDevices,
    LabelledProbe,
    RemoteDevices,
    SyntheticDevices,
    read_experiment,
)
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.public_data.device_photos import describe_devices
from fedface.public_data.probe import public_faces
from fedface.sweep import read_sweep

EVERY = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.yaml"))
SWEEPS = [path for path in EVERY if section(path, VARY) is not None]
FILES = [path for path in EVERY if path not in SWEEPS]
each_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def test_there_are_experiments() -> None:
    """The README's demo among them."""
    assert "demo" in [path.stem for path in FILES]


@each_file
def test_a_question_comes_first(path: Path) -> None:
    """The first line of the file is a question."""
    first = next(line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#"))
    assert first.startswith("question: ")
    assert read_experiment(path).question.endswith("?")


@each_file
def test_a_file_is_named_like_its_run(path: Path) -> None:
    """runs/NAME is found again from experiments/NAME.yaml."""
    assert read_experiment(path).name == path.stem


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_run_of_a_varied_experiment_can_be_read(path: Path) -> None:
    """Named like its file, a question first, folders that do not collide, and a plan within the privacy target."""
    sweep = read_sweep(path)
    assert sweep.name == path.stem and sweep.question.endswith("?")
    assert len({variant.folder for variant in sweep.variants}) == len(sweep.variants) > 1
    for way in dict.fromkeys(variant.method for variant in sweep.variants):
        private = next(
            v.experiment
            for v in sweep.variants
            if v.method == way and isinstance(v.experiment.privacy, PrivacyTarget)
        )
        bounds = private.plan().epsilon()
        assert bounds is not None and isinstance(private.privacy, PrivacyTarget)
        assert 0.95 * private.privacy.epsilon < bounds.upper <= private.privacy.epsilon


@each_file
def test_the_plan_meets_the_privacy_target_and_the_devices_policies(path: Path) -> None:
    """Its upper bound is within the target; a simulated device of this run admits exactly it."""
    experiment = read_experiment(path)
    plan = experiment.plan()
    if isinstance(experiment.privacy, PrivacyTarget):
        bounds = plan.epsilon()
        assert bounds is not None and bounds.upper <= experiment.privacy.epsilon
        assert bounds.upper > 0.95 * experiment.privacy.epsilon
        assert experiment.device_policy().max_epsilon >= experiment.privacy.epsilon
    assert experiment.aggregation.kind in experiment.device_policy().protocols


@each_file
def test_the_expected_batch_size_is_near_the_units_that_join_a_step(path: Path) -> None:
    """`fedface plan` warns where a sum is divided by a very different number."""
    experiment = read_experiment(path)
    if not isinstance(experiment.devices, SyntheticDevices):
        pytest.skip("how many photos its devices hold is not in the file")
    traffic = Traffic(weights=1, numbers_up=1, bytes_up=1, bytes_decrypted=0, metric_bytes_up=0)
    lines = list(plan_lines(experiment, experiment.plan(), traffic, list_devices=True))
    assert not [line for line in lines if line.startswith("warning: each step's sum")]


@each_file
def test_a_stored_experiment_is_the_experiment(path: Path, tmp_path: Path) -> None:
    """The experiment.yaml in a run folder starts the same run."""
    from fedface.config import dump

    (tmp_path / "again.yaml").write_text(dump(read_experiment(path)))
    assert read_experiment(tmp_path / "again.yaml") == read_experiment(path)


def without_photos(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with its folders of photos pointing at a given place."""
    devices, probe = experiment.devices, experiment.probe
    if isinstance(devices, LabelledDevices):
        experiment = replace(experiment, devices=replace(devices, folder=folder))
    if isinstance(probe, LabelledProbe):
        experiment = replace(experiment, probe=replace(probe, folder=folder))
    return experiment


@each_file
def test_missing_photos_are_one_sentence(path: Path, tmp_path: Path) -> None:
    """No folder, then a folder without labels: each error says what is expected. Others need no photos."""
    experiment = read_experiment(path)
    if not isinstance(experiment.devices, LabelledDevices) and not isinstance(
        experiment.probe, LabelledProbe
    ):
        with pytest.raises(ConfigError, match="--photos needs labelled"):
            read_experiment(path, photos=tmp_path)
        return
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, words in ((tmp_path / "nowhere", "--photos FOLDER"), (empty, "expected labelled photos")):
        lost = without_photos(experiment, folder)
        with pytest.raises(LibraryError, match=words):
            public_faces(lost.probe, 0, 32)
        if isinstance(lost.devices, LabelledDevices):
            with pytest.raises(LibraryError, match=words):
                describe_devices(lost)
    assert read_experiment(path, photos=empty) == without_photos(experiment, empty)


@each_file
def test_remote_devices_are_described_without_a_photo_count(path: Path) -> None:
    """A real device's number of photos is private; a simulated one's is public."""
    experiment = read_experiment(path)
    if isinstance(experiment.devices, LabelledDevices):
        pytest.skip("its devices are described from its photos")
    described = describe_devices(experiment)
    assert len(described) == experiment.devices.count
    assert all((count is None) == isinstance(experiment.devices, RemoteDevices) for _, _, count in described)


def test_the_example_policy_is_read() -> None:
    """clients/policy.example.yaml is what an owner starts from."""
    from fedface.config import read

    policy = read(FILES[0].parents[1] / "clients" / "policy.example.yaml", DevicePolicy)
    assert not policy.allow_no_dp
