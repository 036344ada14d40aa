"""Runs with a guarantee per occasion and per library, metrics of devices, and a device that withdraws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest import approx
from tiny import SilentProgress, first_device, started, tiny_experiment, tiny_gan, train_task

from fedface.aggregation.homomorphic import HomomorphicConfig
from fedface.aggregation.payload import Payload
from fedface.aggregation.plain import PlainAggregation
from fedface.audits.dp_metric_estimates import DPMetricEstimates, GroupEstimates, estimate_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig, PhotoMetrics, decode_sums, metric_vectors
from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run import run_experiment
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import ReferenceSet
from fedface.device.client import handle_task
from fedface.errors import ConfigError, FederationError, PrivacyError
from fedface.experiment import devices_folder
from fedface.measurements import Epsilon, NotMeasured
from fedface.messages.messages import EvaluateTask, EvaluationRequest, Refusal, TrainResult, TrainTask
from fedface.models.checkpoint import flatten_parameters, load_model
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import GaussianSum, round_floor
from fedface.privacy.plan import Schedule, make_plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy.releases import compose
from fedface.randomness import Streams
from fedface.reports import html_report
from fedface.reports.device_metrics_record import WithdrawalRecord
from fedface.reports.run_record import WITHDRAWN
from fedface.simulation.in_process import in_process_cohort
from fedface.synthetic.faces import render_people
from fedface.upsampling.pulse import PulseConfig

pytestmark = pytest.mark.usefixtures("quick_detection", "quick_charts")

LIBRARY = {
    "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: central}",
    "update_clip_norm": "2.0",
}
FEW = "{epsilon_fraction: 0.5, holdout_fraction: 0.5, metrics: {min_group_size: 2}}"
OCCASION = {
    "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-2, unit: occasion}",
    "devices": "{kind: synthetic-devices, light_fractions: [0.9, 0.1], photos_per_device: 24, photos_per_occasion: 4}",
}


Noised = list[tuple[GaussianSum, torch.Tensor]]


@pytest.fixture
def noised(monkeypatch: pytest.MonkeyPatch) -> Noised:
    """Every sum to which noise is added, with its mechanism; the sums are not changed."""
    seen: Noised = []

    def noise(total: torch.Tensor, mechanism: GaussianSum, secret: object) -> torch.Tensor:
        seen.append((mechanism, total.clone()))
        return total

    for module in ("coordinator.aggregate", "training.dp_sgd"):
        monkeypatch.setattr(f"fedface.{module}.add_noise", noise)
    return seen


def sent_vector(reply: object) -> torch.Tensor:
    """The content of a plain payload, in public ranges."""
    assert isinstance(reply, TrainResult), reply
    return PlainAggregation(max_devices=2).reveal(Payload.from_bytes(reply.payload))


# Per library.


def test_a_guarantee_per_library_costs_one_gaussian_per_round() -> None:
    """Two rounds at sigma s cost what one costs at s / sqrt 2, and their floors, whatever the steps on a device."""
    schedule = Schedule(rounds=2, steps_per_round=9, sampling_rate=0.3, expected_batch_size=8, clip_norm=1.0)
    target = PrivacyTarget(epsilon=3.0, delta=1e-5, unit="library", noise="central")
    plan = make_plan(target, schedule, update_clip_norm=2.0)
    one = compose([GaussianSum(clip_norm=1.0, sigma=plan.noise_multiplier / 2**0.5).event(), round_floor(2)])
    assert epsilon_of(plan.event(), 1e-5).upper == approx(epsilon_of(one, 1e-5).upper, rel=1e-6)
    assert plan.dp_parameters.sum_mechanism() == GaussianSum(clip_norm=2.0, sigma=plan.noise_multiplier)
    assert not isinstance(plan.mechanism(), GaussianSum)  # the device itself adds none
    assert "trusted" in " ".join(plan.describe())


def test_a_device_clips_its_whole_update_and_an_empty_library_sends_zero(tmp_path: Path) -> None:
    """The largest update has the clipping norm; without photos it is zero."""
    experiment = tiny_experiment(tmp_path / "recipe", {**LIBRARY, "update_clip_norm": "0.01"})
    device = first_device(experiment, tmp_path / "devices")
    whole = sent_vector(handle_task(train_task(experiment, tiny_gan()), device))
    assert float(whole.norm()) == approx(0.01, rel=1e-3)
    (entry,) = device.ledger().entries()
    marks = entry.metadata
    assert (marks["unit"], marks["noise"], marks["update_clip_norm"]) == ("library", "central", "0.01")
    empty = replace(
        first_device(experiment, tmp_path / "others"),
        photos=lambda size: DeviceDataset.independent(torch.zeros(0, 3, size, size)),
    )
    nothing = sent_vector(handle_task(train_task(experiment, tiny_gan()), empty))
    assert not nothing.any()


def test_the_server_adds_noise_to_each_sum_once(tmp_path: Path, noised: Noised) -> None:
    """With updates clipped to zero, the server's noise is applied: standard deviation sigma * clip in public ranges."""
    experiment = tiny_experiment(tmp_path / "recipe", {**LIBRARY, "training.rounds": "1"})
    folder = started(experiment, tmp_path / "run")
    plan = experiment.plan()
    cohort = in_process_cohort(experiment, devices_folder(folder))
    run_rounds(experiment, plan, cohort, RunState.read(folder), None, SilentProgress())
    ((mechanism, total),) = noised  # not on the two devices, and once on the server
    assert mechanism == GaussianSum(clip_norm=2.0, sigma=plan.noise_multiplier)
    assert float(total.norm()) <= 2 * 2.0 * (1 + 1e-3)


def test_noise_of_the_server_is_in_the_weights(tmp_path: Path) -> None:
    """With updates clipped to zero, the weights move by noise alone, several times the updates' norm."""
    quiet = {**LIBRARY, "update_clip_norm": "1e-6", "training.rounds": "1"}
    loud = {**LIBRARY, "training.rounds": "1"}
    moves = []
    for name, changes in (("quiet", quiet), ("loud", loud)):
        experiment = tiny_experiment(tmp_path / name / "recipe", changes)
        folder = started(experiment, tmp_path / name / "run")
        cohort = in_process_cohort(experiment, devices_folder(folder))
        run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), None, SilentProgress())
        before, after = (flatten_parameters(*load_model(weights_path(folder, n)).modules()) for n in (0, 1))
        moves.append(float((after - before).norm()))
    assert moves[1] > 1000 * moves[0]


def test_a_device_that_does_not_trust_the_server_refuses_library_runs(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path / "recipe", LIBRARY)
    device = first_device(experiment, tmp_path / "devices")
    reply = handle_task(
        train_task(experiment, tiny_gan()),
        replace(device, policy=replace(device.policy, trust_server=False)),
    )
    assert isinstance(reply, Refusal) and "trust" in reply.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": "{kind: homomorphic}"}, "aggregation: must be plain with central noise"),
        ({"evaluation": "{sampling_rate: 0.5}"}, "sampling_rate must be 1"),
        ({"evaluation": "{}"}, "groups smaller than min_group_size=20 are suppressed"),
        ({"privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library}"}, "noise must be"),
        (
            {"privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, noise: central}"},
            "each device adds all of it in each step",
        ),
        (
            {"privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: distributed}"},
            "aggregation: must be masked with distributed noise",
        ),
    ],
)
def test_impossible_guarantees_are_refused_in_the_experiment(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_experiment(tmp_path, {**LIBRARY, **changes})


def test_metrics_per_library_are_noised_once_by_the_server(tmp_path: Path, noised: Noised) -> None:
    """Two devices, two evaluations, one round: three noise draws on three sums, each part of norm at most 1."""
    overrides = {**LIBRARY, "training.rounds": "1", "evaluation": FEW}
    experiment = tiny_experiment(tmp_path / "recipe", overrides)
    plan = experiment.plan()
    terms = plan.evaluation
    assert terms is not None
    assert epsilon_of(terms.event(), 1e-3).upper == approx(4.0, abs=1e-2)
    assert plan.epsilon().upper == approx(8.0, abs=1e-2)  # type: ignore[union-attr]
    folder = started(experiment, tmp_path / "run")
    cohort = in_process_cohort(experiment, devices_folder(folder))
    record = run_experiment(experiment, cohort, folder, progress=SilentProgress())
    questions = [total for mechanism, total in noised if mechanism == terms.sum_mechanism()]
    assert len(noised) == 3 and len(questions) == 2
    config = experiment.evaluation.metrics  # type: ignore[union-attr]
    for total in questions:
        # The counts of two libraries: each is one, shared out over its photos' groups.
        assert float(decode_sums(total, config, clip_norm=1.0).table.sum()) == approx(2.0, abs=1e-5)
    assert [
        metrics.epsilon.unit for metrics in record.device_metrics if isinstance(metrics.epsilon, Epsilon)
    ] == ["library"] * 2
    text = (folder / html_report.FILE).read_text(encoding="utf-8")
    assert "libraries, noised" in text and "one mean over photos" in text
    ledger = Ledger.open(devices_folder(folder) / "device-00" / "ledger.sqlite")
    assert ledger.spent(1e-3, unit="library").upper <= 8.0


def test_withdrawing_from_a_library_run_reports_that_the_server_saw_the_replies() -> None:
    """The device's own noise bounds nothing, because it added none."""
    price = Epsilon(lower=0.9, estimate=1.0, upper=1.0, delta=1e-3, unit="library")
    record = WithdrawalRecord(rounds=(1,), evaluations=0, epsilon=price, noise="central")
    sentence = record.sentence()
    assert "the server saw them without noise" in sentence and "published" in sentence
    shared = replace(record, noise="distributed")
    assert "without noise" not in shared.sentence()


def test_metrics_per_library_are_estimated_with_one_noise_draw(tmp_path: Path) -> None:
    """The interval of the number of libraries is that of one noise draw, not of one per device."""
    overrides = {**LIBRARY, "evaluation": FEW}
    terms = tiny_experiment(tmp_path / "recipe", overrides).plan().evaluation
    assert terms is not None
    config = LocalMetricsConfig(tone_upper_bounds=(10,))
    row = metric_vectors(
        PhotoMetrics(
            group=torch.zeros(1, dtype=torch.int64),
            output_group=torch.zeros(1, dtype=torch.int64),
            consistency_error=torch.zeros(1),
            skin_difference=torch.zeros(1),
            lightness_shift=torch.zeros(1),
            detected=torch.ones(1, dtype=torch.bool),
        ),
        config,
        clip_norm=1.0,
    )

    def read(total: torch.Tensor, devices: int) -> DPMetricEstimates:
        return estimate_metrics(
            total,
            config=config.for_unit(terms.unit),
            clip_norm=terms.schedule.clip_norm,
            noise_multiplier=terms.noise_multiplier,
            devices=devices,
            noises=1,
            unit="library",
        )

    units = read(400 * row[0], 400).overall.count
    half = 1.959964 * terms.noise_multiplier / config.shares.table**0.5
    assert (units.estimate, units.low, units.high) == approx((400, 400 - half, 400))  # there are no more
    few = read(30 * row[0], 19)  # noise may make a few devices look like more
    assert isinstance(few.overall, NotMeasured) and not few.reported and few.suppressed == config.groups


def test_one_sum_is_never_stored_with_two_noise_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before its checkpoint, a round is requested again; after it, it is complete."""
    experiment = tiny_experiment(tmp_path / "recipe", {**LIBRARY, "training.rounds": "1"})
    folder = started(experiment, tmp_path / "run")
    plan, cohort = experiment.plan(), in_process_cohort(experiment, devices_folder(folder))
    faces = render_people(48, 0.5, 16, Streams(1))
    like = ReferenceSet(faces=faces, inputs=faces, downscale=experiment.upsampling.downscale)
    stored = weights_path(folder, 1)

    def run(*, cut_short_in: str) -> None:
        def stop(*asked: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"fedface.coordinator.rounds.{cut_short_in}", stop)
            run_rounds(experiment, plan, cohort, RunState.read(folder), like, SilentProgress())

    run(cut_short_in="save_model")
    assert not stored.exists()
    run(cut_short_in="sample_metrics")
    noised = stored.read_bytes()
    assert RunState.read(folder).rounds[0].metrics == {}
    ended = run_rounds(experiment, plan, cohort, RunState.read(folder), like, SilentProgress())
    assert stored.read_bytes() == noised and "distance" in ended.rounds[0].metrics
    assert len(ended.rounds) == 1 and RunState.read(folder) == ended
    ledger = Ledger.open(devices_folder(folder) / "device-00" / "ledger.sqlite")
    assert len(ledger.entries()) == 1


@pytest.mark.parametrize("asked", ["training", "evaluation"])
def test_a_device_refuses_encrypted_sums_for_a_guarantee_per_library(tmp_path: Path, asked: str) -> None:
    """Nothing is recorded, and no photo is read."""
    overrides = {**LIBRARY, "evaluation": FEW}
    experiment = tiny_experiment(tmp_path / "recipe", overrides)
    device = first_device(experiment, tmp_path / "devices")
    task = train_task(experiment, tiny_gan())
    agreed = replace(task.config, aggregation=HomomorphicConfig())
    terms = experiment.plan().evaluation
    assert terms is not None
    question = EvaluationRequest(
        dp=terms,
        architecture=agreed.architecture,
        method=PulseConfig(steps=3, mapping_samples=64),
        downscale=experiment.upsampling.downscale,
        metrics=LocalMetricsConfig(),
        aggregation=HomomorphicConfig(),
        agreement=experiment.agreement,
        holdout_fraction=0.5,
    )
    wrong: TrainTask | EvaluateTask = replace(task, config=agreed)
    if asked == "evaluation":
        wrong = EvaluateTask(
            run="run",
            round=1,
            cohort=2,
            seed=3,
            request=question,
            weights=task.weights,
            buffers=task.buffers,
            model=task.model,
        )
    with pytest.raises(PrivacyError, match="plain sums"):
        handle_task(wrong, replace(device, photos=lambda size: pytest.fail("a photo was read")))
    assert not device.ledger().entries()


# Per occasion.


def test_a_round_per_occasion_changes_little_for_one_birthday(tmp_path: Path) -> None:
    """All 24 photos are one occasion: without noise, the photos contribute one clipped vector per step."""
    overrides = {
        **OCCASION,
        "training.steps_per_round": "1",
        "training.rounds": "1",
        "training.sampling_rate": "1",
    }
    experiment = tiny_experiment(tmp_path / "recipe", overrides)
    plan = experiment.plan()
    assert plan.dp_parameters.unit == "occasion"
    device = first_device(experiment, tmp_path / "devices")
    handle_task(train_task(experiment, tiny_gan()), device)
    (entry,) = device.ledger().entries()
    assert entry.metadata["unit"] == "occasion"
    assert device.ledger().spent(1e-2, unit="occasion").upper == approx(8.0, abs=1e-2)
    # A policy per photo is charged for a changed occasion; a policy per library has no guarantee.
    assert device.ledger().spent(1e-2, unit="photo").upper > 8.0
    assert device.ledger().spent(1e-2, unit="library").upper == float("inf")


def test_held_out_units_are_not_trained_on(tmp_path: Path) -> None:
    """Evaluated and training photos share no occasion, and together they are all photos."""
    experiment = tiny_experiment(tmp_path / "recipe", {**OCCASION, "evaluation": "{holdout_fraction: 0.4}"})
    own = first_device(experiment, tmp_path / "devices").photos(16)
    mine, asked = own.split(experiment.holdout_fraction, "occasion")
    assert len(mine) + len(asked) == 24 and len(asked) > 0
    assert not set(mine.occasions.tolist()) & set(asked.occasions.tolist())
    task = train_task(experiment, tiny_gan())
    assert task.config.holdout_fraction == 0.4  # the device leaves as many out of training


# Metrics and withdrawal.


def test_a_run_with_metrics_accounts_for_everything_together(tmp_path: Path) -> None:
    """Two evaluations and two rounds cost the privacy target; the record's groups have intervals or a reason."""
    overrides = {**OCCASION, "evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.5}"}
    experiment = tiny_experiment(tmp_path / "recipe", overrides)
    plan = experiment.plan()
    terms = plan.evaluation
    assert terms is not None
    alone = epsilon_of(terms.event(), 1e-2).upper
    assert alone == approx(4.0, abs=1e-2)
    price = plan.epsilon()
    assert price is not None and price.upper == approx(8.0, abs=1e-2)
    folder = started(experiment, tmp_path / "run")
    record = run_experiment(
        experiment, in_process_cohort(experiment, devices_folder(folder)), folder, progress=SilentProgress()
    )
    assert [metrics.when for metrics in record.device_metrics] == ["before", "after"]
    for metrics in record.device_metrics:
        assert isinstance(metrics.epsilon, Epsilon) and metrics.epsilon.unit == "occasion"
        assert metrics.estimates.devices == 2
        for group in (metrics.estimates.overall, *metrics.estimates.groups.values()):
            assert isinstance(group, GroupEstimates | NotMeasured)
    assert isinstance(record.rounds[-1].epsilon, Epsilon) and record.rounds[-1].epsilon.upper <= 8.0
    text = (folder / html_report.FILE).read_text(encoding="utf-8")
    assert (
        "the devices&#39; own photos" in text.replace("devices' own", "devices&#39; own")
        and "forty photos of one birthday" in text
    )
    for number in range(2):
        ledger = Ledger.open(devices_folder(folder) / f"device-{number:02d}" / "ledger.sqlite")
        assert sorted({entry.run for entry in ledger.entries()}) == ["run", "run/metrics"]
        assert ledger.spent(1e-2, unit="occasion").upper <= 8.0


def test_a_device_that_refuses_evaluation_still_trains(tmp_path: Path) -> None:
    """If all refuse evaluation, the run reports it and can be resumed."""
    policy = "{max_epsilon: 8, delta: 1e-2, unit: occasion, protocols: [plain], min_cohort_size: 1}"
    experiment = tiny_experiment(tmp_path / "recipe", {**OCCASION, "policy": policy})
    device = first_device(experiment, tmp_path / "devices")
    assert isinstance(handle_task(train_task(experiment, tiny_gan()), device), TrainResult)


def test_a_device_that_withdraws_gets_no_tasks_and_its_name_is_deleted(tmp_path: Path) -> None:
    """After round 1 its owner withdraws: round 2 continues; the record states what cannot be undone."""
    experiment = tiny_experiment(tmp_path / "recipe", {"min_responses": "1", "training.rounds": "3"})
    folder = started(experiment, tmp_path / "run")
    state = devices_folder(folder) / "device-00"

    class Watcher(SilentProgress):
        def message(self, sentence: str) -> None:
            if sentence.startswith("round 1"):
                Ledger.open(state / "ledger.sqlite").withdraw("run", "changed my mind")

    cohort = in_process_cohort(experiment, devices_folder(folder))
    ended = run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), None, Watcher())
    assert [record.participants for record in ended.rounds] == [
        (WITHDRAWN, "device-01"),
        ("device-01",),
        ("device-01",),
    ]
    assert [len(record.refusals) for record in ended.rounds] == [0, 1, 0]
    (left,) = ended.withdrawals
    assert left.rounds == (1,) and "cannot be undone" in left.sentence() and "at most" in left.sentence()
    assert isinstance(left.epsilon, Epsilon)
    assert left.epsilon.upper == approx(epsilon_of(experiment.plan().event(1), 1e-3).upper)
    stored = (folder / "state.json").read_text()
    assert "device-00" not in stored and "changed my mind" not in stored
    assert RunState.read(folder) == ended
    assert len(Ledger.open(state / "ledger.sqlite").entries()) == 1


@pytest.mark.slow
def test_withdrawing_after_an_evaluation_reports_its_cost_without_the_name(tmp_path: Path) -> None:
    """The device answered one evaluation and no round."""
    overrides = {
        **OCCASION,
        "evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.5}",
        "min_responses": "1",
    }
    experiment = tiny_experiment(tmp_path / "recipe", overrides)
    folder = started(experiment, tmp_path / "run")
    state = devices_folder(folder) / "device-00"

    class Watcher(SilentProgress):
        def stage(self, name: str, steps: int) -> None:
            if name.startswith("round 1"):
                Ledger.open(state / "ledger.sqlite").withdraw("run")

    record = run_experiment(
        experiment, in_process_cohort(experiment, devices_folder(folder)), folder, progress=Watcher()
    )
    (left,) = record.withdrawals
    assert (left.rounds, left.evaluations) == ((), 1) and "1 set of metrics" in left.sentence()
    terms = experiment.plan().evaluation
    assert terms is not None
    assert isinstance(left.epsilon, Epsilon)
    assert left.epsilon.upper == approx(epsilon_of(terms.event(1), 1e-2).upper)
    assert [metrics.participants for metrics in record.device_metrics] == [
        (WITHDRAWN, "device-01"),
        ("device-01",),
    ]
    refused = [
        line for line in Ledger.open(state / "ledger.sqlite").read().transmissions if line.kind == "refusal"
    ]
    assert len(refused) == 1  # reported once, by the first round


def test_a_withdrawn_name_is_deleted_even_if_the_round_fails(tmp_path: Path) -> None:
    """Two replies are needed and one device withdrew after round 1: every resumption fails, and its name is deleted."""
    experiment = tiny_experiment(tmp_path / "recipe", {"min_responses": "2"})
    folder = started(experiment, tmp_path / "run")
    state = devices_folder(folder) / "device-00"

    class Watcher(SilentProgress):
        def message(self, sentence: str) -> None:
            if sentence.startswith("round 1"):
                Ledger.open(state / "ledger.sqlite").withdraw("run")

    cohort = in_process_cohort(experiment, devices_folder(folder))
    with pytest.raises(FederationError, match="2 are needed"):
        run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), None, Watcher())
    stored = RunState.read(folder)
    assert "device-00" not in (folder / "state.json").read_text()
    assert stored.rounds[0].participants == (WITHDRAWN, "device-01") and stored.withdrawals[0].rounds == (1,)
