"""Devices score models on their own photos: asked, summed and opened like updates, read with the noise in mind.

Called by coordinator.py (the model before and after a run) and tournament.py (many candidates). The server learns
one noised sum over all devices for each question, and nothing else; but under a promise per library, where it is
trusted, it sees each device's mean and adds the noise to their sum itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedface.audits.dp_metric_estimates import DPMetricEstimates, estimate_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.coordinator.aggregate import RoundSum, collect_and_sum, noised_sum
from fedface.coordinator.rounds import ProgressListener, WithdrawalHandler
from fedface.coordinator.run_state import RunState
from fedface.experiment import Experiment
from fedface.measurements import Epsilon, NotMeasured
from fedface.messages.cohort import Cohort
from fedface.messages.messages import EvaluateTask, EvaluationRequest
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, weights_hash
from fedface.models.model import Model
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import DPParameters, Plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.randomness import Streams
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.tensor_types import Vector
from fedface.upsampling.methods import title_of


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the devices told of one model."""

    total: Vector  # noised, (d,)
    record: DeviceMetricsRecord
    gathered: RoundSum


def request_metrics(
    experiment: Experiment,
    terms: DPParameters,
    figures: LocalMetricsConfig,
    cohort: Cohort,
    members: Sequence[int],
    model: Model,
    *,
    run: str,
    number: int,
    name: str,
    holdout_fraction: float,
    watcher: ProgressListener,
    gone: Callable[[Mapping[int, str]], None],
) -> Scores:
    """Have every member score a model on its own photos.

    Args:
        experiment: The recipe: how photos are shrunk and made large again, how sums are protected.
        terms: What each question releases; its schedule counts all questions of this run.
        figures: What is measured.
        cohort: Who carries messages.
        members: Whom to ask.
        model: The model in question.
        run: The run's name.
        number: Which question of the run, from 1.
        name: What reports call the model; the devices are not told.
        holdout_fraction: Which share of the units is asked; 0: all.
        watcher: Told how many have answered.
        gone: Told who has left.

    Raises:
        FederationError: Too few usable answers, or nobody could open the sum.
    """
    figures = figures.for_unit(terms.unit)
    question = EvaluationRequest(
        dp=terms,
        architecture=model.architecture,
        method=experiment.method_for(model),
        downscale=experiment.upsampling.downscale,
        metrics=figures,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        holdout_fraction=holdout_fraction,
    )
    task = EvaluateTask(
        run=run,
        round=number,
        cohort=len(members),
        seed=Streams(experiment.seed).child("figures").seed,
        request=question,
        weights=flatten_parameters(*model.modules()),
        buffers=flatten_buffers(*model.modules()),
        model=weights_hash(*model.modules()),
    )
    ranges = question.ranges()
    gathered = collect_and_sum(experiment, cohort, members, task, len(ranges), watcher.advance, gone)
    total = noised_sum(gathered.total, terms) * ranges
    record = DeviceMetricsRecord(
        when=name,
        weights_hash=task.model,
        method=title_of(question.method),
        answered=gathered.devices,
        refusals=tuple(r.reason for r in (*gathered.refusals, *gathered.dropped)),
        epsilon=_price(experiment, terms),
        noise_multiplier=terms.noise_multiplier,
        estimates=decode_total(total, terms, figures, gathered.count),
    )
    return Scores(total=total, record=record, gathered=gathered)


def decode_total(
    total: Vector, terms: DPParameters, figures: LocalMetricsConfig, devices: int
) -> DPMetricEstimates:
    """The figures in a noised total: it holds one noise of each device, or one of the server.

    Args:
        total: (d,), as kept.
        terms: What the question released.
        figures: What was measured, as the recipe says it.
        devices: How many answers are in it.

    Raises:
        AggregationError: No sum of figures with this noise looks like this total.
    """
    return estimate_metrics(
        total,
        config=figures.for_unit(terms.unit),
        clip_norm=terms.schedule.clip_norm,
        noise_multiplier=terms.noise_multiplier,
        devices=devices,
        noises=1 if terms.noise_at == "server" else None,
    )


def _price(experiment: Experiment, terms: DPParameters) -> Epsilon | NotMeasured:
    """What one question costs one unit."""
    if isinstance(experiment.privacy, PrivacyTarget):
        delta = experiment.privacy.delta
        return epsilon_of(terms.event(1), delta, unit=terms.unit).measured()
    return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def evaluate_on_devices(
    experiment: Experiment, plan: Plan, cohort: Cohort, folder: Path, models: Sequence[tuple[str, Model]],
    state: RunState, watcher: ProgressListener, away: set[int],
) -> RunState:  # fmt: skip
    """Ask about each model of a run that has not been asked about yet, such as ("before", base).

    Members in `away` have left and are not asked; those who leave now join it.

    Raises:
        FederationError: Too few usable answers; the run can be resumed.
    """
    config = experiment.evaluation
    if config is None:
        return state
    (terms,) = plan.additional_releases
    everybody = cohort.members(experiment.devices.count)[: experiment.devices.count]
    for number, (name, model) in enumerate(models, start=1):
        if any(record.when == name for record in state.device_metrics):
            continue
        members = [member for member in everybody if member not in away]
        watcher.stage(f"devices score the model {name} the run on their own photos", len(members))
        forgetting = WithdrawalHandler(state, plan, away)
        scores = request_metrics(
            experiment, terms, config.metrics, cohort, members, model, run=folder.name, number=number,
            name=name, holdout_fraction=config.holdout_fraction, watcher=watcher, gone=forgetting.drop,
        )  # fmt: skip
        state = forgetting.state.with_device_metrics(scores.record)
    return state
