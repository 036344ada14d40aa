"""What the requests of a run contain beside weights, rounds and seeds, and the run plan of all of them."""

from __future__ import annotations

from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.experiment import Experiment
from fedface.messages.messages import EvaluationRequest, RoundConfig
from fedface.messages.run_plan import RunPlan
from fedface.models.model import Model
from fedface.privacy.plan import DPParameters, Plan


def round_config(experiment: Experiment, plan: Plan, model: Model) -> RoundConfig:
    """What every training request of a run contains."""
    return RoundConfig(
        dp=plan.dp_parameters,
        training=experiment.training,
        architecture=model.architecture,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        holdout_fraction=experiment.holdout_fraction,
    )


def evaluation_request(
    experiment: Experiment,
    dp: DPParameters,
    metrics: LocalMetricsConfig,
    model: Model,
    *,
    holdout_fraction: float,
) -> EvaluationRequest:
    """What every evaluation request of a run contains.

    Args:
        dp: Of one evaluation; its schedule counts all of the run.
        holdout_fraction: Share of each device's units that is evaluated; 0: all.
    """
    return EvaluationRequest(
        dp=dp,
        architecture=model.architecture,
        method=experiment.method_for(model),
        downscale=experiment.upsampling.downscale,
        metrics=metrics.for_unit(dp.unit),
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        holdout_fraction=holdout_fraction,
    )


def run_plan(experiment: Experiment) -> RunPlan:
    """The plan of an experiment's run; calibrating its noise takes a second or two."""
    model, plan, config = experiment.start(), experiment.plan(), experiment.evaluation
    evaluations: tuple[EvaluationRequest, ...] = ()
    if config is not None and plan.evaluation is not None:
        evaluations = (
            evaluation_request(
                experiment, plan.evaluation, config.metrics, model, holdout_fraction=config.holdout_fraction
            ),
        )
    return RunPlan(
        name=experiment.name,
        question=experiment.question,
        training=round_config(experiment, plan, model),
        evaluations=evaluations,
    )
