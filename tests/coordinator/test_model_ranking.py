"""Ranking of models by devices: weights are sent, noised metrics come back, and an interrupted ranking continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from pytest import approx
from tiny import SilentProgress, tiny_file, tiny_gan
from typer.testing import CliRunner

from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.cli import app
from fedface.codec import loads
from fedface.coordinator.model_ranking import load_candidates, ranking_parameters, ranking_plan, run_ranking
from fedface.errors import ConfigError, FederationError, FedfaceError, RunError
from fedface.experiment import Experiment, devices_folder, for_ranking, ranking_name, read_experiment
from fedface.messages.cohort import Cohort
from fedface.messages.messages import EvaluateTask, Failure, Reply, Task, to_message
from fedface.models.checkpoint import save_model
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import GaussianSum
from fedface.randomness import SecretNoise
from fedface.reports.model_ranking_report import RankingReport
from fedface.simulation.devices import prepare
from fedface.simulation.in_process import in_process_cohort

pytestmark = pytest.mark.usefixtures("quick_detection")

CHANGES = {
    "privacy": "{kind: privacy-target, epsilon: 60, delta: 1e-3}",
    "devices": "{kind: synthetic-devices, light_fractions: [0.5, 0.5], photos_per_device: 14}",
    "evaluation": "{metrics: {tone_upper_bounds: [10], min_group_size: 5}}",
    "upsampling": "{method: {kind: pulse, steps: 1, mapping_samples: 64}}",
}


@pytest.fixture
def recipe(tmp_path: Path) -> Experiment:
    """Two devices of fourteen photos, and hardly any noise."""
    save_model(tmp_path / "other.safetensors", tiny_gan("other"))
    return for_ranking(read_experiment(tiny_file(tmp_path), changes=CHANGES))


class Counting:
    """A cohort that counts requests and fails at a given one."""

    def __init__(self, cohort: Cohort, breaks_at: int = 99) -> None:
        self.cohort, self.breaks_at = cohort, breaks_at
        self.asked: list[EvaluateTask] = []

    def members(self, expected: int) -> Sequence[int]:
        """As they are."""
        return self.cohort.members(expected)

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        """Forward the task, up to the one that fails."""
        task = next(iter(tasks.values()))
        assert isinstance(task, EvaluateTask)
        self.asked.append(task)
        if len(self.asked) == self.breaks_at:
            raise FederationError("the line is cut")
        return self.cohort.ask(tasks)


def ready(recipe: Experiment, folder: Path) -> Cohort:
    """The devices of a ranking in this folder."""
    folder.mkdir(exist_ok=True)
    prepare(recipe, devices_folder(folder))
    return in_process_cohort(recipe, devices_folder(folder))


def test_an_interrupted_ranking_requests_only_what_is_missing(recipe: Experiment, tmp_path: Path) -> None:
    """One request per candidate, also over two runs; both devices spend the privacy budget together and not more."""
    models = load_candidates(["base", str(tmp_path / "other.safetensors")], recipe)
    folder = tmp_path / ranking_name(recipe)
    first = Counting(ready(recipe, folder), breaks_at=2)
    with pytest.raises(FederationError, match="line is cut"):
        run_ranking(recipe, models, first, folder, progress=SilentProgress())
    second = Counting(ready(recipe, folder))
    record = run_ranking(recipe, models, second, folder, progress=SilentProgress())
    assert len(first.asked) == 2 and len(second.asked) == 1
    plan = ranking_plan(recipe, list(models.values()))  # what an owner admits covers all requests
    assert [plan.difference(task) for task in (*first.asked, *second.asked)] == ["", "", ""]
    assert [reported.when for reported in record.candidates] == ["base", "other"]
    assert {reported.weights_hash for reported in record.candidates} == {
        first.asked[0].model,
        second.asked[0].model,
    }
    for name in ("ranking.json", "ranking.md", "ranking.png", "metrics.json"):
        assert (folder / name).stat().st_size > 0
    assert loads(RankingReport, (folder / "ranking.json").read_text()) == record
    for number in range(2):
        ledger = Ledger.open(devices_folder(folder) / f"device-{number:02d}" / "ledger.sqlite")
        assert len(ledger.entries()) == 2
        assert ledger.spent(1e-3).upper == approx(60.0, abs=5e-2)  # noise has four digits


def test_per_library_the_server_adds_noise_and_the_report_says_that_it_saw_the_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two candidates, two noise draws of sigma times one device's norm; the guarantee covers what is published."""
    save_model(tmp_path / "other.safetensors", tiny_gan("other"))
    reported = {
        **CHANGES,
        "privacy": "{kind: privacy-target, epsilon: 300, delta: 1e-3, unit: library, noise: central}",
        "evaluation": "{metrics: {tone_upper_bounds: [10], min_group_size: 1}}",
    }
    recipe = for_ranking(read_experiment(tiny_file(tmp_path), changes=reported))
    models = load_candidates(["base", str(tmp_path / "other.safetensors")], recipe)
    noised = []

    def noted(total: torch.Tensor, mechanism: GaussianSum, secret: SecretNoise) -> torch.Tensor:
        noised.append(mechanism)
        return add_noise(total, mechanism, secret)

    monkeypatch.setattr("fedface.coordinator.aggregate.add_noise", noted)
    folder = tmp_path / "ranking"
    record = run_ranking(recipe, models, ready(recipe, folder), folder, progress=SilentProgress())
    terms = ranking_parameters(recipe, 2)
    assert noised == [GaussianSum(clip_norm=1.0, sigma=terms.noise_multiplier)] * 2
    assert "trusted server publishes" in record.privacy_sentence()
    page = (folder / "ranking.md").read_text()
    assert "receives each device's metrics without noise" in page and "The server is trusted" in page
    assert record.epsilon.upper == approx(300.0, abs=0.1)


def test_devices_receive_weights_without_a_name(recipe: Experiment, tmp_path: Path) -> None:
    """The task has no candidate's name, and the order is random for each ranking."""
    save_model(tmp_path / "quokka.safetensors", tiny_gan("quokka"))
    models = load_candidates(
        [str(tmp_path / "other.safetensors"), str(tmp_path / "quokka.safetensors")], recipe
    )
    orders = set()
    for number in range(12):
        folder = tmp_path / f"ranking-{number}"
        cohort = Counting(ready(recipe, folder), breaks_at=1)
        with pytest.raises(FederationError):
            run_ranking(recipe, models, cohort, folder, progress=SilentProgress())
        (task,) = cohort.asked
        assert "quokka" not in to_message(task).header
        orders.add(task.model)
    assert len(orders) == 2  # fails once in 2,000


def test_the_privacy_budget_covers_all_candidates(recipe: Experiment) -> None:
    for count in (2, 5):
        event = ranking_parameters(recipe, count).event()
        assert epsilon_of(event, 1e-3).upper == approx(60.0, abs=5e-2)  # noise has four digits


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["base"], "at least two"),
        (["base", "base"], "called base"),
        (["base", "nowhere.safetensors"], "nowhere"),
    ],
)
def test_invalid_candidates_are_refused(recipe: Experiment, words: list[str], printed: str) -> None:
    with pytest.raises(FedfaceError, match=printed):
        load_candidates(words, recipe)


def test_a_folder_of_another_ranking_is_refused(recipe: Experiment, tmp_path: Path) -> None:
    models = load_candidates(["base", str(tmp_path / "other.safetensors")], recipe)
    folder = tmp_path / "ranking"
    cohort = Counting(ready(recipe, folder), breaks_at=1)
    with pytest.raises(FederationError):
        run_ranking(recipe, models, cohort, folder, progress=SilentProgress())
    renamed = {"base": models["base"], "another": models["other"]}
    with pytest.raises(RunError, match="other candidates"):
        run_ranking(recipe, renamed, cohort, folder, progress=SilentProgress())


def test_a_ranking_needs_a_privacy_target(tmp_path: Path) -> None:
    recipe = read_experiment(tiny_file(tmp_path), changes={"privacy": "{kind: no-privacy}"})
    with pytest.raises(ConfigError, match="always noised"):
        for_ranking(recipe)


def test_the_command_prints_which_models_cannot_be_distinguished(recipe: Experiment, tmp_path: Path) -> None:
    """The table of orders, epsilon with delta and unit, and the path of the chart; --json prints the record."""
    sets = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}")]
    asked = ["rank-models", str(tmp_path / "tiny.yaml"), "base", str(tmp_path / "other.safetensors"), *sets]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for words in ("Best first", "at delta 0.001 per photo", "ranking.png"):
        assert words in result.output
    again = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, RunError)
    record = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert len(record["candidates"]) == 2 and record["command"].startswith("fedface rank-models")


def test_metrics_of_one_group_have_eight_numbers() -> None:
    """One table cell, three pairs of ranged metrics, and detection."""
    assert LocalMetricsConfig(tone_upper_bounds=(10,)).width == 8
