"""Rank several models by the devices' own photos.

Every device evaluates every candidate on all its photos. The metrics are clipped, noised, recorded and summed like
other metrics, and the experiment's privacy guarantee covers all of them together. Devices see weights without a name,
in a secret random order; the server sees one noised sum over all devices for each candidate (unit library: the trusted
server receives means without noise and adds it). Each result is on disk before the next evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ClassVar

from fedface.atomic_io import replace_text
from fedface.audits.dp_metric_estimates import DPMetricEstimates
from fedface.audits.dp_model_ranking import Ranking, rank_overall, rank_worst_group
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import dumps, encode, load
from fedface.coordinator.aggregate import SumListener
from fedface.coordinator.device_evaluation import Evaluation, report_missing_metrics, request_metrics
from fedface.coordinator.requests import evaluation_request
from fedface.coordinator.rounds import ProgressListener, participants
from fedface.coordinator.run_state import sums_folder
from fedface.errors import ConfigError, FederationError, RunError
from fedface.experiment import EvaluationConfig, Experiment, metrics_dp_parameters, ranking_name
from fedface.messages.cohort import Cohort
from fedface.messages.run_plan import RunPlan
from fedface.models.checkpoint import load_model, weights_hash
from fedface.models.model import GeneratorArchitecture, Model
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import DPParameters, RunReleases
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.randomness import SecretNoise
from fedface.reports import model_ranking_report
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.model_ranking_report import RankingReport
from fedface.upsampling.methods import check_method

BASE = "base"  # the model that the experiment starts from


def load_candidates(candidates: Sequence[str], experiment: Experiment) -> dict[str, Model]:
    """The models by name: checkpoints, or "base" for the experiment's own.

    Raises:
        ConfigError: Fewer than two, two of one name, or a model that the experiment's method cannot use.
        WeightsError: A file cannot be read.
    """
    if len(candidates) < 2:
        raise ConfigError(f"a ranking needs at least two candidates, got {len(candidates)}")
    models: dict[str, Model] = {}
    for candidate in candidates:
        model = experiment.start() if candidate == BASE else load_model(Path(candidate))
        name = candidate if candidate == BASE else _name_of(Path(candidate))
        if name in models:
            raise ConfigError(f"two candidates are called {name}; rename one of the files")
        if isinstance(model.architecture, GeneratorArchitecture):
            raise ConfigError(
                f"{candidate}: devices evaluate only models that they could also train, see docs"
            )
        try:
            check_method(
                experiment.method_for(model), model, experiment.upsampling.downscale, size=model.size
            )
        except ConfigError as error:
            raise ConfigError(f"{candidate}: {error}") from error
        models[name] = model
    return models


def _name_of(file: Path) -> str:
    """A file's name; for weights in a run folder with the run's name, because all runs number their rounds."""
    home = file.resolve().parent
    return f"{home.parent.name}-{file.stem}" if home.name == "rounds" else file.stem


def ranking_parameters(experiment: Experiment, count: int) -> DPParameters:
    """The parameters with which `count` evaluations cost the whole privacy target.

    Raises:
        PrivacyError: No amount of noise meets the target.
    """
    config, target = _evaluation_and_target(experiment)
    return metrics_dp_parameters(
        target, count, config.sampling_rate, honest_devices=experiment.honest_devices
    )


def _evaluation_and_target(experiment: Experiment) -> tuple[EvaluationConfig, PrivacyTarget]:
    config, target = experiment.evaluation, experiment.privacy
    if config is None or not isinstance(target, PrivacyTarget):
        raise ConfigError("a ranking needs a privacy target and an evaluation; see experiment.for_ranking")
    return config, target


def ranking_plan(experiment: Experiment, models: Sequence[Model]) -> RunPlan:
    """The run plan of a ranking. Models that devices evaluate alike have one request; requests are sorted by content.

    Args:
        experiment: Of `experiment.for_ranking`.
        models: Of `load_candidates`.

    Raises:
        PrivacyError: No amount of noise meets the privacy target.
    """
    config, _ = _evaluation_and_target(experiment)
    dp = ranking_parameters(experiment, len(models))
    requests = [
        evaluation_request(experiment, dp, config.metrics, model, holdout_fraction=0.0) for model in models
    ]
    return RunPlan(
        name=ranking_name(experiment),
        question=experiment.question,
        evaluations=tuple(each for _, each in sorted({dumps(each): each for each in requests}.items())),
    )


def run_ranking(
    experiment: Experiment,
    models: Mapping[str, Model],
    cohort: Cohort,
    folder: Path,
    *,
    progress: ProgressListener,
    command: str = "",
) -> RankingReport:
    """Have the devices evaluate each model that is not evaluated yet, and rank them all.

    Args:
        experiment: Of `experiment.for_ranking`.
        models: Of `load_candidates`.
        folder: Of the ranking; finished evaluations in it are reused.

    Raises:
        FederationError: Too few usable replies; the ranking can be resumed.
        RunError: The folder holds another ranking.
    """
    config, target = _evaluation_and_target(experiment)
    dp = ranking_parameters(experiment, len(models))
    path = folder / "metrics.json"
    state = RankingState.opened(path, experiment, models)
    withdrawn: set[int] = set()  # members whose owners have withdrawn
    for number, name in enumerate(state.order, start=1):
        if name in state.records:
            continue
        evaluation = Evaluation(
            run=folder.name,
            number=number,
            name=name,
            model=models[name],
            releases=RunReleases(evaluation=dp),
            config=config.metrics,
            holdout_fraction=0.0,
        )
        requested = participants(experiment, cohort, number, withdrawn)
        progress.stage(f"devices evaluate candidate {number} of {len(models)}", len(requested))
        listener = SumListener(
            progress=progress.advance,
            revealing=partial(progress.stage, f"devices reveal the sum of candidate {number}"),
            withdrawn=withdrawn.update,
            given_up=partial(report_missing_metrics, progress),
            folder=sums_folder(folder),
        )
        metrics = request_metrics(experiment, evaluation, cohort, requested, listener)
        # A ranking stores no names of devices, so a withdrawal has none to remove.
        state = replace(state, records={**state.records, name: replace(metrics, participants=())})
        replace_text(path, dumps(state))
        listener.forget("metrics", number)
    trusted = (
        "The server is trusted: it receives each device's metrics without noise, adds the noise to "
        "their sum, and could "
        "keep them; the privacy guarantee bounds what is published, not what the server could learn.",
    )
    estimates = {name: found for name in models if (found := state.records[name].estimates).devices}
    if len(estimates) < 2:
        raise FederationError("fewer than two candidates have metrics; start a new ranking")
    record = RankingReport(
        name=folder.name,
        question=experiment.question,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        experiment=encode(experiment),
        candidates=tuple(state.records[name] for name in models),
        rankings=tuple(_rankings(estimates)),
        epsilon=epsilon_of(dp.event(), target.delta, unit=dp.unit),
        noise=dp.noise,
        notes=(
            "All candidates were evaluated on the same photos, each with independent noise.",
            "The privacy guarantee of the experiment covers all metrics of a device together.",
            *(trusted if dp.noise == "central" else ()),
            "Skin tone is measured from pixels, so light and camera affect every group.",
            "Devices whose owners refuse are missing; this ranking does not describe their photos.",
        ),
    )
    model_ranking_report.write(record, folder)
    return record


@dataclass(frozen=True, kw_only=True)
class RankingState:
    """The state of a ranking on disk: the order of the evaluations, and the record of each finished one."""

    version: ClassVar[int] = 2

    digest: str  # of experiment and candidates
    order: tuple[str, ...]
    records: dict[str, DeviceMetricsRecord]

    @staticmethod
    def opened(path: Path, experiment: Experiment, models: Mapping[str, Model]) -> RankingState:
        """The state in a file, or a new state with a secret random order.

        Raises:
            RunError: The file is damaged, or of other candidates or another experiment.
        """
        names = list(models)
        hashes = [f"{name} {weights_hash(*models[name].modules())}" for name in sorted(names)]
        digest = f"{experiment.digest()} {', '.join(hashes)}"
        if not path.exists():
            order = tuple(names[i] for i in SecretNoise().permutation(len(names)).tolist())
            state = RankingState(digest=digest, order=order, records={})
            replace_text(path, dumps(state))
            return state
        try:
            state = load(RankingState, path)
        except RunError as error:
            raise RunError(f"{error}; the stored metrics are damaged, start a new ranking") from error
        if state.digest != digest:
            raise RunError(f"{path.parent}: holds a ranking of other candidates or of another experiment")
        return state


def _rankings(estimates: Mapping[str, DPMetricEstimates]) -> list[Ranking]:
    """Rankings by each metric over all units and for the worst-served group; those without enough units are omitted."""
    found = []
    for metric in DP_METRICS:
        for rank in (rank_overall, rank_worst_group):
            try:
                found.append(rank(estimates, metric))
            except FederationError:
                continue
    if not found:
        raise FederationError(
            "the devices have too few photos for any metric under this noise; use more devices, fewer candidates "
            "or a larger epsilon"
        )
    return found
