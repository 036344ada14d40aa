"""Devices score models on their own photos: asked, summed and opened like updates, read with the noise in mind.

Called by coordinator.py (the model before and after a run) and tournament.py (many candidates). The server learns
one noised sum over all devices for each question, and nothing else; but under a promise per library, where it is
trusted, it sees each device's mean and adds the noise to their sum itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedface.audits.private_figures import FiguresConfig
from fedface.audits.private_reading import PrivateFigures, read_figures
from fedface.experiment import Experiment
from fedface.federation.cohort import Cohort
from fedface.federation.figures import figure_ranges
from fedface.federation.rounds import Forgetting, Watcher
from fedface.federation.state import State
from fedface.federation.summing import Gathered, gather, noised_sum
from fedface.federation.task import EvaluateTask, Question
from fedface.models.family import Model
from fedface.models.weights import buffers_of, vector_of, weights_hash
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import Plan, Terms
from fedface.privacy.target import PrivacyTarget
from fedface.randomness import Streams
from fedface.reports.filling import epsilon_record, private_record
from fedface.reports.private_record import PrivateRecord
from fedface.reports.quantities import Epsilon, NotMeasured
from fedface.shapes import Vector
from fedface.upsampling.methods import title_of


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the devices told of one model."""

    total: Vector  # noised, (d,)
    record: PrivateRecord
    gathered: Gathered


def ask_figures(
    experiment: Experiment,
    terms: Terms,
    figures: FiguresConfig,
    cohort: Cohort,
    members: Sequence[int],
    model: Model,
    *,
    run: str,
    number: int,
    name: str,
    held_out: float,
    watcher: Watcher,
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
        held_out: Which share of the units is asked; 0: all.
        watcher: Told how many have answered.
        gone: Told who has left.

    Raises:
        FederationError: Too few usable answers, or nobody could open the sum.
    """
    figures = figures.for_unit(terms.unit)
    question = Question(
        terms=terms,
        shape=model.shape,
        method=experiment.method_for(model),
        downscale=experiment.upsampling.downscale,
        figures=figures,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        held_out=held_out,
    )
    task = EvaluateTask(
        run=run,
        round=number,
        cohort=len(members),
        seed=Streams(experiment.seed).child("figures").seed,
        question=question,
        weights=vector_of(*model.modules()),
        buffers=buffers_of(*model.modules()),
        model=weights_hash(*model.modules()),
    )
    ranges = figure_ranges(question)
    gathered = gather(experiment, cohort, members, task, len(ranges), watcher.step, gone)
    total = noised_sum(gathered.total, terms) * ranges
    read = read_told(total, terms, figures, gathered.count)
    record = private_record(
        read,
        when=name,
        weights_hash=task.model,
        method=title_of(question.method),
        devices=gathered.count,
        answered=gathered.devices,
        refusals=tuple(r.reason for r in (*gathered.refusals, *gathered.dropped)),
        epsilon=_price(experiment, terms),
        noise_multiplier=terms.noise_multiplier,
    )
    return Scores(total=total, record=record, gathered=gathered)


def read_told(total: Vector, terms: Terms, figures: FiguresConfig, devices: int) -> PrivateFigures:
    """The figures in a noised total: it holds one noise of each device, or one of the server.

    Args:
        total: (d,), as kept.
        terms: What the question released.
        figures: What was measured, as the recipe says it.
        devices: How many answers are in it.

    Raises:
        AggregationError: No sum of figures with this noise looks like this total.
    """
    return read_figures(
        total,
        config=figures.for_unit(terms.unit),
        clip_norm=terms.schedule.clip_norm,
        noise_multiplier=terms.noise_multiplier,
        devices=devices,
        noises=1 if terms.noise_at == "server" else None,
    )


def _price(experiment: Experiment, terms: Terms) -> Epsilon | NotMeasured:
    """What one question costs one unit."""
    if isinstance(experiment.promise, PrivacyTarget):
        delta = experiment.promise.delta
        return epsilon_record(epsilon_of(terms.event(1), delta), delta=delta, unit=terms.unit)
    return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def score_run(
    experiment: Experiment, plan: Plan, cohort: Cohort, folder: Path, models: Sequence[tuple[str, Model]],
    state: State, watcher: Watcher, away: set[int],
) -> State:  # fmt: skip
    """Ask about each model of a run that has not been asked about yet, such as ("before", base).

    Members in `away` have left and are not asked; those who leave now join it.

    Raises:
        FederationError: Too few usable answers; the run can be resumed.
    """
    config = experiment.evaluation
    if config is None:
        return state
    (terms,) = plan.beside
    everybody = cohort.members(experiment.devices.count)[: experiment.devices.count]
    for number, (name, model) in enumerate(models, start=1):
        if any(record.when == name for record in state.private):
            continue
        members = [member for member in everybody if member not in away]
        watcher.stage(f"devices score the model {name} the run on their own photos", len(members))
        forgetting = Forgetting(state, plan, away)
        scores = ask_figures(
            experiment, terms, config.figures, cohort, members, model, run=folder.name, number=number,
            name=name, held_out=config.held_out, watcher=watcher, gone=forgetting.forget,
        )  # fmt: skip
        state = forgetting.state.scored(scores.record)
    return state
