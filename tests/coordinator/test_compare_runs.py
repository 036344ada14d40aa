"""A comparison runs every combination once, continues after an interruption, and detects that a model has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import WAYS, SilentProgress, tiny_file

from fedface.coordinator.compare_runs import compare_runs
from fedface.errors import RunError
from fedface.experiment import NO_DP_LABEL
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.models.checkpoint import save_model
from fedface.models.model import build_model
from fedface.randomness import Streams
from fedface.reports import comparison_report
from fedface.reports.comparison_report import METRICS, UNTRAINED, ComparisonRecord
from fedface.simulation.in_process import in_process_cohort
from fedface.sweep import Sweep, read_sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny experiment that varies method and privacy, with a checkpoint for each family."""
    folder = tmp_path_factory.mktemp("comparison")
    file = tiny_file(folder)
    axes = ["vary:", "  way:"]
    for way in ("full", "flow"):
        training, shape = WAYS[way]
        save_model(folder / f"{way}.safetensors", build_model(shape, Streams(5).generator(way)))
        axes.append(f"    {way}: {{training: {training}, base: {folder / way}.safetensors}}")
    axes += ["  epsilon:", '    "8": {privacy.epsilon: 8}', "    infinity: {privacy: {kind: no-privacy}}"]
    file.write_text(file.read_text() + "\n".join(axes) + "\n")
    return folder


def run(sweep: Sweep, folder: Path) -> ComparisonRecord:
    """The whole comparison, with few faces."""
    return compare_runs(sweep, folder, in_process_cohort, progress=SilentProgress(), faces=48)


@pytest.fixture(scope="module")
def finished(home: Path) -> ComparisonRecord:
    """Two methods at two levels, and the two untrained models."""
    return run(read_sweep(home / "tiny.yaml"), home / "out")


@pytest.mark.slow
def test_each_method_is_run_at_each_level_and_untrained(finished: ComparisonRecord) -> None:
    assert finished.methods() == ("full", "flow") and finished.levels() == (UNTRAINED, "8", NO_DP_LABEL)
    assert all(
        len(finished.chosen(way, level)) == 1 for way in finished.methods() for level in finished.levels()
    )


def test_epsilon_is_recorded_or_the_reason_why_there_is_none(finished: ComparisonRecord) -> None:
    """At most the target of 8, with delta and unit; no number without a guarantee."""
    for run_ in finished.runs:
        if run_.level == "8":
            assert isinstance(run_.epsilon, Epsilon) and 7 < run_.epsilon.upper <= 8
            assert (run_.epsilon.delta, run_.epsilon.unit) == (1e-3, "photo") and run_.noise_multiplier > 0
        else:
            assert isinstance(run_.epsilon, NotMeasured) and run_.noise_multiplier == 0


def test_training_changes_the_weights_and_untrained_models_are_unchanged(finished: ComparisonRecord) -> None:
    for way in finished.methods():
        hashes = {finished.chosen(way, level)[0].model.weights_hash for level in finished.levels()}
        assert len(hashes) == 3


def test_the_devices_own_faces_score_better_than_models_with_random_weights(
    finished: ComparisonRecord,
) -> None:
    """The reference set is near, every untrained model is far."""
    good = finished.reference.metric("kernel")
    assert isinstance(good, Interval)
    for run_ in finished.runs:
        bad = run_.model.metric("kernel")
        assert isinstance(bad, Interval) and bad.low > good.high


def test_the_record_is_read_back_and_its_table_has_a_row_for_each_run(
    home: Path, finished: ComparisonRecord
) -> None:
    assert comparison_report.read(home / "out") == finished
    table = (home / "out" / "comparison.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| full |") or line.startswith("| flow |")]
    assert len(rows) == 6 * (1 + 3)  # all faces, then three measures by group
    for picture in ("against-epsilon", "tones", "by-group", "samples"):
        assert (home / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert all(isinstance(finished.runs[0].model.metric(name), Interval) for name in METRICS)


def test_a_finished_comparison_sends_no_task(home: Path, finished: ComparisonRecord) -> None:
    """Resuming reads metrics from the disk: a cohort that cannot answer is never used."""

    def no_cohort(*_: object) -> object:
        raise AssertionError("a device was asked")

    again = compare_runs(
        read_sweep(home / "tiny.yaml"),
        home / "out",
        no_cohort,
        progress=SilentProgress(),
        faces=48,  # type: ignore[arg-type]
    )
    assert again.runs == finished.runs


def test_a_folder_of_another_experiment_is_refused(home: Path, finished: ComparisonRecord) -> None:
    """A changed rate is another experiment; its metrics must not be mixed with the old ones."""
    other = read_sweep(home / "tiny.yaml", changes={"vary.way": "[full]", "training.clip_norm": "2"})
    with pytest.raises(RunError, match="another experiment"):
        run(other, home / "out")


def test_a_folder_without_a_comparison_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fedface compare"):
        comparison_report.read(tmp_path)
