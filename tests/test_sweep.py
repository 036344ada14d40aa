"""Sweeps: a varied experiment is the product of its axes, and an invalid axis is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import RECIPE

from fedface.errors import ConfigError
from fedface.experiment import read_experiment
from fedface.models.lora import Full, Lora
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.sweep import read_sweep
from fedface.training.gan import GanTrainingConfig

VARY = """
vary:
  way:
    full: {training.adapt: {kind: full}}
    lora: {training.adapt: {kind: lora, rank: 2}}
  epsilon:
    "3": {privacy.epsilon: 3}
    infinity: {privacy: {kind: no-privacy}}
  seed: [0, 1]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The tiny experiment, varied; its checkpoint is not read here."""
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("base: BASE\n", "") + VARY)
    return file


def test_a_sweep_is_the_product_of_its_axes(path: Path) -> None:
    """Two methods, two privacy targets, two seeds: eight runs with their own folders."""
    sweep = read_sweep(path)
    assert sweep.axes == ("way", "epsilon", "seed")
    assert len({variant.folder for variant in sweep.variants}) == len(sweep.variants) == 8
    assert [v.names for v in sweep.variants][:3] == [
        ("full", "3", "0"), ("full", "3", "1"), ("full", "infinity", "0"),
    ]  # fmt: skip


def test_each_run_has_its_own_values_and_name(path: Path) -> None:
    """The last of the eight is low-rank, without DP, with seed 1."""
    last = read_sweep(path).variants[-1]
    training = last.experiment.training
    assert isinstance(training, GanTrainingConfig) and training.adapt == Lora(rank=2)
    assert isinstance(last.experiment.privacy, NoPrivacy) and last.experiment.seed == 1
    assert last.method == "lora"
    first = read_sweep(path).variants[0].experiment
    assert isinstance(first.training, GanTrainingConfig) and first.training.adapt == Full()
    assert isinstance(first.privacy, PrivacyTarget) and first.privacy.epsilon == 3


def test_an_axis_can_be_narrowed_and_other_keys_changed_from_the_command_line(path: Path) -> None:
    """`--set vary.way=[lora]` picks, `--set training.rounds=1` changes every run."""
    sweep = read_sweep(path, changes={"vary.way": "[lora]", "vary.seed": "1", "training.rounds": "1"})
    assert [variant.names for variant in sweep.variants] == [("lora", "3", "1"), ("lora", "infinity", "1")]
    assert {variant.experiment.rounds for variant in sweep.variants} == {1}


def test_a_rate_may_be_written_without_a_point(path: Path) -> None:
    """8e-4 is a number on an axis, as elsewhere in a file."""
    path.write_text(
        path.read_text().replace("{kind: lora, rank: 2}}", "{kind: lora}, training.generator_lr: 8e-4}")
    )
    training = read_sweep(path, changes={"vary.way": "[lora]"}).variants[0].experiment.training
    assert isinstance(training, GanTrainingConfig) and training.generator_lr == 8e-4


def test_a_file_without_vary_is_one_run(path: Path) -> None:
    path.write_text(path.read_text().replace(VARY, ""))
    sweep = read_sweep(path)
    assert [variant.experiment for variant in sweep.variants] == [read_experiment(path)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: [0, 1]", "seed: [2026-01-01]", "seed: expected a whole number"),
        ("seed: [0, 1]", "day: 2026-01-01", "expected a list of values"),
        ("lora: {", '"..": {', "names are letters"),
        ("lora: {", '"a b": {', "names are letters"),
        ("seed: [0, 1]", "seed: {a: {seed: 1}, b: {seed: 1}}", "could not be distinguished"),
        ("seed: [0, 1]", "privacy.delta: [1e-4, 1e-3]", "no-privacy|unknown key|could not be distinguished"),
        ("seed: [0, 1]", "devices.photos_per_device: [24, 30]", "devices must be the same"),
        ("seed: [0, 1]", "seed: []", "vary.seed: expected a list of values"),
        ("seed: [0, 1]", "seed: 3", "vary.seed: expected a list of values"),
        ("seed: [0, 1]", "seed: {a: {seed: -1}}", "seed: must be at least 0"),
        ("full: {training.adapt: {kind: full}}", "full: 3", "vary.way.full: expected keys with values"),
        ("{kind: lora, rank: 2}", "{kind: lora, rank: 0}", "rank: must lie in"),
        ("seed: [0, 1]", "sed: [0, 1]", "unknown key"),
    ],
)
def test_an_invalid_axis_is_refused(path: Path, old: str, new: str, words: str) -> None:
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=words):
        read_sweep(path)


def test_values_that_are_not_on_an_axis_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="has no blur; it has full, lora"):
        read_sweep(path, changes={"vary.way": "[blur]"})
    with pytest.raises(ConfigError, match="has no axis ways"):
        read_sweep(path, changes={"vary.ways": "[full]"})


def test_what_an_axis_sets_cannot_be_overridden_from_the_command_line(path: Path) -> None:
    """Otherwise a run called "full" would train low-rank changes, and two seeds would be one."""
    for change in ({"training.adapt": "{kind: full}"}, {"training": "{kind: prior-training}"}, {"seed": "7"}):
        with pytest.raises(ConfigError, match="would override what vary sets"):
            read_sweep(path, changes=change)


def test_a_varied_experiment_is_not_a_single_run(path: Path) -> None:
    """`fedface run` names the command to use instead."""
    with pytest.raises(ConfigError, match="fedface compare"):
        read_experiment(path)
