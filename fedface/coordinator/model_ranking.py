"""Which of several models serves people's own photos best: the models travel, private scores come back.

Called by `fedface rank-models` and server/app.py. Every device scores every candidate on all its photos; each answer
is clipped, noised, booked and summed like any other figure, and the whole promise of the recipe pays for all answers
together. Blind both ways: devices see weights without a name, in an order drawn by secret chance, and the server sees
one noised sum over all devices for each candidate (per library it is trusted: it sees bare means and adds the noise).
Each answer is on disk before the next question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import torch

from fedface.atomic_io import replace_text
from fedface.audits.dp_metric_estimates import DPMetricEstimates
from fedface.audits.dp_model_ranking import Ranking, rank_overall, rank_worst_group
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import dumps, encode, load
from fedface.coordinator.device_evaluation import decode_total, request_metrics
from fedface.coordinator.rounds import ProgressListener
from fedface.errors import ConfigError, FederationError, RunError
from fedface.experiment import Experiment, metrics_dp_parameters
from fedface.messages.cohort import Cohort
from fedface.models.checkpoint import load_model, weights_hash
from fedface.models.model import GeneratorArchitecture, Model
from fedface.privacy.plan import DPParameters
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.randomness import SecretNoise
from fedface.reports import model_ranking_report
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.model_ranking_report import RankingRecord, RankingReport
from fedface.upsampling.methods import check_method

BASE = "base"  # the word for the model that the recipe itself starts from


def load_candidates(words: Sequence[str], experiment: Experiment) -> dict[str, Model]:
    """The models by name: files of weights, or the word "base" for the recipe's own.

    Raises:
        ConfigError: Fewer than two, two of one name, or a model that the recipe's method cannot ask.
        WeightsError: A file cannot be read.
    """
    if len(words) < 2:
        raise ConfigError(f"a tournament needs at least two candidates, got {len(words)}")
    models: dict[str, Model] = {}
    for word in words:
        model = experiment.start() if word == BASE else load_model(Path(word))
        name = word if word == BASE else _name_of(Path(word))
        if name in models:
            raise ConfigError(f"two candidates are called {name}; rename one of the files")
        if isinstance(model.architecture, GeneratorArchitecture):
            raise ConfigError(
                f"{word}: devices score models of families that they could also train, see docs"
            )
        try:
            check_method(
                experiment.method_for(model), model, experiment.upsampling.downscale, size=model.size
            )
        except ConfigError as error:
            raise ConfigError(f"{word}: {error}") from error
        models[name] = model
    return models


def _name_of(file: Path) -> str:
    """A file's own name; of a run's weights with that of the run, since all runs number their rounds."""
    home = file.resolve().parent
    return f"{home.parent.name}-{file.stem}" if home.name == "rounds" else file.stem


def ranking_parameters(experiment: Experiment, count: int) -> DPParameters:
    """What each question releases: the whole promise pays for `count` of them.

    Raises:
        PrivacyError: No amount of noise keeps the promise.
    """
    config, promise = experiment.evaluation, experiment.privacy
    if config is None or not isinstance(promise, PrivacyTarget):
        raise ConfigError("a tournament needs a promise and an evaluation; see experiment.for_ranking")
    return metrics_dp_parameters(promise, count, config.sampling_rate)


def run_ranking(
    experiment: Experiment,
    models: Mapping[str, Model],
    cohort: Cohort,
    folder: Path,
    *,
    watcher: ProgressListener,
    command: str = "",
) -> RankingReport:
    """Ask about each model that has not been asked about yet, and rank them all.

    Args:
        experiment: Of `experiment.for_ranking`.
        models: Of `load_candidates`.
        cohort: Who is asked.
        folder: Of the tournament; what is finished in it stays.
        watcher: Told how far it is.
        command: What a reader types to do it again.

    Raises:
        FederationError: Too few usable answers; the tournament can be resumed.
        RunError: The folder holds another tournament.
    """
    config = experiment.evaluation
    if config is None:
        raise ConfigError("a tournament needs an evaluation; see experiment.for_ranking")
    terms = ranking_parameters(experiment, len(models))
    state = RankingState.opened(folder, experiment, models)
    members = cohort.members(experiment.devices.count)[: experiment.devices.count]
    away: set[int] = set()  # members whose owners have left
    for number, name in enumerate(state.order, start=1):
        if name in state.totals:
            continue
        watcher.stage(f"devices score candidate {number} of {len(models)}", len(members))
        scores = request_metrics(
            experiment, terms, config.metrics, cohort, [member for member in members if member not in away],
            models[name], run=folder.name, number=number, name=name, holdout_fraction=0.0, watcher=watcher,
            gone=away.update,
        )  # fmt: skip
        # Who answered is nobody's business here, and so there is no name to forget when somebody leaves.
        nameless = replace(scores.record, answered=())
        state = state.with_answer(name, scores.total, scores.gathered.count, nameless)
    trusted = (
        "The server is trusted: it reads each device's bare figures, adds the noise to their sum, and could keep them; "
        "the promise bounds what is published, not what the server could learn.",
    )
    figures = {name: _read(state, name, experiment, terms) for name in models}
    record = RankingReport(
        name=folder.name,
        question=experiment.question,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        experiment=encode(experiment),
        candidates=tuple(state.records[name] for name in models),
        rankings=tuple(_rankings(figures)),
        notes=(
            "All candidates were asked about the same photos, each with noise of its own.",
            "The promise of the recipe covers all answers of a device together.",
            *(trusted if terms.noise_at == "server" else ()),
            "Tone is read from pixels, so light and camera are mixed into every group.",
            "Devices whose owners refuse are missing, and nothing here says how their photos are served.",
        ),
    )
    model_ranking_report.write(record, folder)
    return record


@dataclass(frozen=True, kw_only=True)
class RankingState:
    """What of a ranking is on disk: the order of the evaluations, and the noised total of each answer."""

    version: ClassVar[int] = 2

    path: Path
    digest: str  # of recipe and candidates
    order: tuple[str, ...]
    totals: dict[str, list[float]]
    counts: dict[str, int]
    records: dict[str, DeviceMetricsRecord]

    @staticmethod
    def opened(folder: Path, experiment: Experiment, models: Mapping[str, Model]) -> RankingState:
        """The state in a folder, or a new one with a secret order."""
        names = list(models)
        hashes = [f"{name} {weights_hash(*models[name].modules())}" for name in sorted(names)]
        path, digest = folder / "answers.json", f"{experiment.digest()} {', '.join(hashes)}"
        if not path.exists():
            order = tuple(names[i] for i in SecretNoise().permutation(len(names)).tolist())
            return RankingState(
                path=path, digest=digest, order=order, totals={}, counts={}, records={}
            ).saved()
        try:
            found = load(RankingState, path, given={"path": path})
        except RunError as error:
            raise RunError(f"{error}; the answers are damaged, start a new ranking") from error
        if found.digest != digest:
            raise RunError(f"{folder}: holds a ranking of other candidates or of another recipe")
        return found

    def with_answer(
        self, name: str, total: torch.Tensor, count: int, record: DeviceMetricsRecord
    ) -> RankingState:
        """With the answer about one more candidate, saved."""
        return replace(
            self,
            totals={**self.totals, name: total.tolist()},
            counts={**self.counts, name: count},
            records={**self.records, name: record},
        ).saved()

    def saved(self) -> RankingState:
        """Itself, on the disk before it returns."""
        replace_text(self.path, dumps(self, leave_out=("path",)))
        return self


def _read(state: RankingState, name: str, experiment: Experiment, terms: DPParameters) -> DPMetricEstimates:
    assert experiment.evaluation is not None
    told = torch.tensor(state.totals[name])
    return decode_total(told, terms, experiment.evaluation.metrics, state.counts[name])


def _rankings(figures: Mapping[str, DPMetricEstimates]) -> list[RankingRecord]:
    """Every measure over all units and for the worst served group; those without enough units are left out."""
    found = []
    for measure in DP_METRICS:
        for rank in (rank_overall, rank_worst_group):
            try:
                found.append(_ranking_record(rank(figures, measure)))
            except FederationError:
                continue
    if not found:
        raise FederationError(
            "the devices hold too few photos for any figure under this noise; ask more devices, fewer candidates, "
            "or promise a larger epsilon"
        )
    return found


def _ranking_record(ranking: Ranking) -> RankingRecord:
    return RankingRecord(
        measure=ranking.measure,
        by=ranking.by,
        order=ranking.order,
        ties=ranking.ties,
        sentences=tuple(ranking.sentences()),
    )
