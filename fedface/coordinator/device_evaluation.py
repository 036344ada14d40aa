"""Evaluation of models by the devices on their own photos: requested, summed and decrypted like updates.

For each evaluation the server learns one noised sum over all devices. Only with the privacy unit library, where it is
trusted, does it see each device's mean and add the noise to their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fedface.audits.dp_metric_estimates import estimate_metrics, missing_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.coordinator.aggregate import SumListener, collect_and_sum, noised_sum
from fedface.coordinator.requests import evaluation_request
from fedface.coordinator.rounds import ProgressListener, WithdrawalHandler, participants
from fedface.coordinator.run_state import RunState, sums_folder
from fedface.experiment import Experiment
from fedface.measurements import Epsilon, NotMeasured
from fedface.messages.cohort import Cohort
from fedface.messages.messages import EvaluateTask
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, weights_hash
from fedface.models.model import Model
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import DPParameters, Plan, RunReleases
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.randomness import Streams
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.upsampling.methods import title_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of one model by the devices."""

    run: str
    number: int  # which evaluation of the run, from 1
    name: str  # the model's name in reports; not sent to devices
    model: Model
    releases: RunReleases  # of the whole run
    config: LocalMetricsConfig  # which metrics
    holdout_fraction: float  # share of each device's units that is evaluated; 0: all

    @property
    def dp(self) -> DPParameters:
        """The DP parameters of each evaluation; their schedule counts all evaluations of the run."""
        if self.releases.evaluation is None:
            raise ValueError("the run releases no metrics")
        return self.releases.evaluation

    def task(self, experiment: Experiment, cohort: int) -> EvaluateTask:
        """The task for each of `cohort` devices."""
        return EvaluateTask(
            run=self.run,
            round=self.number,
            cohort=cohort,
            seed=Streams(experiment.seed).child("metrics").seed,
            request=evaluation_request(
                experiment, self.dp, self.config, self.model, holdout_fraction=self.holdout_fraction
            ),
            training_dp=self.releases.training,
            weights=flatten_parameters(*self.model.modules()),
            buffers=flatten_buffers(*self.model.modules()),
            model=weights_hash(*self.model.modules()),
        )


def request_metrics(
    experiment: Experiment,
    evaluation: Evaluation,
    cohort: Cohort,
    members: Sequence[int],
    listener: SumListener,
) -> DeviceMetricsRecord:
    """Have every member evaluate a model on its own photos.

    Args:
        experiment: Gives the degradation, the upsampling method and the aggregation protocol.
        evaluation: The request.

    Raises:
        FederationError: Too few usable replies, or the sum could not be revealed for the first time.
        AggregationError: The sum cannot be one of these metrics with this noise.
    """
    dp, task = evaluation.dp, evaluation.task(experiment, len(members))
    ranges = task.request.ranges()
    round_sum = collect_and_sum(experiment, cohort, members, task, len(ranges), listener)
    if round_sum.total is None:
        estimates = missing_metrics(
            evaluation.config, "the sum of the devices' metrics could not be revealed"
        )
    else:
        estimates = estimate_metrics(
            noised_sum(round_sum.total, dp) * ranges,
            config=task.request.metrics,
            clip_norm=dp.schedule.clip_norm,
            noise_multiplier=dp.noise_multiplier,
            devices=round_sum.count,
            noises=dp.noises_in_sum(round_sum.count),
            unit=dp.unit,
        )
    return DeviceMetricsRecord(
        when=evaluation.name,
        weights_hash=task.model,
        method=title_of(task.request.method),
        participants=round_sum.devices,
        refusals=tuple(r.reason for r in (*round_sum.refusals, *round_sum.dropped)),
        epsilon=_epsilon(experiment, dp),
        noise_multiplier=dp.noise_multiplier,
        estimates=estimates,
    )


def _epsilon(experiment: Experiment, dp: DPParameters) -> Epsilon | NotMeasured:
    """Privacy loss of one evaluation for one unit."""
    if isinstance(experiment.privacy, PrivacyTarget):
        return epsilon_of(dp.event(1), experiment.privacy.delta, unit=dp.unit).measured()
    return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def report_missing_metrics(progress: ProgressListener, why: str) -> None:
    """Say that the sum of metrics is given up."""
    progress.message(f"{why}; these metrics are given up, and the report lacks them")


def evaluate_on_devices(
    experiment: Experiment,
    plan: Plan,
    cohort: Cohort,
    models: Sequence[tuple[str, Model]],
    state: RunState,
    progress: ProgressListener,
    withdrawn: set[int],
) -> RunState:
    """Have the devices evaluate each model, such as ("before", base), that the run's state does not contain yet.

    Members in `withdrawn` get no request; those whose owners withdraw now are added to it.

    Raises:
        FederationError: Too few usable replies; the run can be resumed.
    """
    config = experiment.evaluation
    if config is None:
        return state
    assert plan.evaluation is not None  # Experiment.plan makes it of the experiment's evaluation
    for number, (name, model) in enumerate(models, start=1):
        if any(record.when == name for record in state.device_metrics):
            continue
        members = participants(experiment, cohort, number, withdrawn)
        progress.stage(f"devices evaluate the model {name} the run on their own photos", len(members))
        evaluation = Evaluation(
            run=state.folder.name,
            number=number,
            name=name,
            model=model,
            releases=plan.releases,
            config=config.metrics,
            holdout_fraction=config.holdout_fraction,
        )
        handler = WithdrawalHandler(state, plan, withdrawn)
        listener = SumListener(
            progress=progress.advance,
            revealing=partial(progress.stage, f"devices reveal the sum of their metrics, {name} the run"),
            withdrawn=handler.drop,
            given_up=partial(report_missing_metrics, progress),
            folder=sums_folder(state.folder),
        )
        record = request_metrics(experiment, evaluation, cohort, members, listener)
        state = handler.state.with_device_metrics(record)
        listener.forget("metrics", number)
    return state
