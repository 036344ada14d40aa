"""The federated rounds: request, check, sum, decrypt, apply, measure, store. Survives a kill at any moment.

A round is complete once its record in `state.json` and its checkpoint are on disk. An interrupted round is requested
again, and devices that had replied send their stored bytes, at no further privacy cost. Where the server adds the
noise, such a round gets fresh noise, and the same sum must never be persisted with two different noise draws. So the
checkpoint is written last: if it exists, so does the record, and the round is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from fedface.coordinator.aggregate import RoundSum, SumListener, collect_and_sum, noised_sum
from fedface.coordinator.requests import round_config
from fedface.coordinator.run_state import RunState, sums_folder, weights_path
from fedface.coordinator.server_metrics import ReferenceSet, sample_metrics
from fedface.errors import WeightsError
from fedface.experiment import Experiment
from fedface.measurements import Epsilon, NotMeasured
from fedface.messages.cohort import Cohort
from fedface.messages.messages import TrainTask
from fedface.models.checkpoint import (
    flatten_buffers,
    flatten_parameters,
    load_model,
    save_model,
    weights_hash,
)
from fedface.models.model import Model
from fedface.number_format import format_delta, rounded_up
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy.releases import compose
from fedface.randomness import Streams
from fedface.reports.run_record import RoundRecord
from fedface.training.training_methods import common_streams, prepare_round


class ProgressListener(Protocol):
    """Receives the progress of a run."""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins that will take `steps` steps."""

    def advance(self, done: int) -> None:
        """`done` steps of the stage are done."""

    def message(self, sentence: str) -> None:
        """A message to print."""


def run_rounds(
    experiment: Experiment,
    plan: Plan,
    cohort: Cohort,
    state: RunState,
    reference: ReferenceSet | None,
    progress: ProgressListener,
    withdrawn: set[int] | None = None,
) -> RunState:
    """Run the rounds that are not on disk yet, and measure each round's model against the reference set, if any.

    Members whose owners withdraw get no further requests, and are added to `withdrawn`; a resumed run sends one more.

    Raises:
        FederationError: Too few usable replies in a round, or its sum could not be revealed. The run can be resumed; a
            sum that cannot be revealed then either is given up, and the model stays as it was.
    """
    total = experiment.rounds
    state = _with_metrics(_without_partial_rounds(state, progress), experiment, reference)
    if len(state.rounds) >= total:
        return state
    withdrawn = set() if withdrawn is None else withdrawn
    for number in range(len(state.rounds) + 1, total + 1):
        members = participants(experiment, cohort, number, withdrawn)
        model = load_model(weights_path(state.folder, number - 1))
        progress.stage(f"round {number} of {total}: devices train", len(members))
        task = _train_task(experiment, plan, model, state.folder.name, number, len(members))
        streams = common_streams(task.seed, number)
        work = prepare_round(model, experiment.training, plan.dp_parameters, streams)
        ranges = work.ranges()
        handler = WithdrawalHandler(state, plan, withdrawn)
        listener = SumListener(
            progress=progress.advance,
            revealing=partial(progress.stage, f"round {number} of {total}: devices reveal their sum"),
            withdrawn=handler.drop,
            given_up=lambda why: progress.message(
                f"{why}; the round is given up, and the model stays as it is"
            ),
            folder=sums_folder(state.folder),
        )
        round_sum, after = collect_and_sum(experiment, cohort, members, task, len(ranges), listener), model
        if round_sum.total is not None:
            update = noised_sum(round_sum.total, plan.dp_parameters) * ranges
            after = work.apply(update, round_sum.count, Streams(experiment.seed).generator("mean style"))
        after = replace(after, notes={"run": state.folder.name, "round": number})
        record = _round_record(plan, task, round_sum, weights_hash(*after.modules()))
        for name in round_sum.withdrawn.values():
            record = record.without(name)
            progress.message("a device has withdrawn from the run; its name is deleted from the run's files")
        state = handler.state.with_round(record)
        path = weights_path(state.folder, number)
        path.unlink(missing_ok=True)  # what an interrupted round left, and may be cut
        save_model(path, after)
        listener.forget("updates", number)
        state = _with_metrics(state, experiment, reference, after)
        progress.message(_summary(record, total, with_metrics=plan.evaluation is not None))
        for missing in (*record.refusals, *record.dropped):
            progress.message(f"{missing.device} did not take part: {missing.reason}")
    return state


def participants(
    experiment: Experiment, cohort: Cohort, number: int, withdrawn: Collection[int]
) -> list[int]:
    """The members of one round: all that are connected, or of more than a sum has room for the next ones in turn.

    Raises:
        FederationError: Too few connected in time.
    """
    connected = cohort.members(experiment.devices.count)
    there, most = [member for member in connected if member not in withdrawn], experiment.most_devices
    if len(there) <= most:
        return there
    first = (number - 1) * most % len(there)
    return sorted((there[first:] + there[:first])[:most])


def _without_partial_rounds(state: RunState, progress: ProgressListener) -> RunState:
    """The state without the last rounds whose checkpoints are not on disk."""
    while state.rounds and not _is_stored(state):
        progress.message(
            f"round {len(state.rounds)} was interrupted before it was stored and is requested again"
        )
        state = replace(state, rounds=state.rounds[:-1])
    return state


def _is_stored(state: RunState) -> bool:
    """Whether the checkpoint of the last round is on disk; it may be missing, or cut by a crash of the machine."""
    last = state.rounds[-1]
    try:
        model = load_model(weights_path(state.folder, last.round))
    except WeightsError:
        return False
    return weights_hash(*model.modules()) == last.weights_hash


def _with_metrics(
    state: RunState, experiment: Experiment, reference: ReferenceSet | None, model: Model | None = None
) -> RunState:
    """The state with the metrics of the last round's model, which is loaded if not given.

    They are computed after the round is stored, because they can be computed again.
    """
    if reference is None or not state.rounds or state.rounds[-1].metrics:
        return state
    if model is None:
        model = load_model(weights_path(state.folder, state.rounds[-1].round))
    return state.with_round_metrics(sample_metrics(model, reference, experiment.seed))


class WithdrawalHandler:
    """The state of a run while replies arrive: a withdrawal is on disk before anything else can fail."""

    def __init__(self, state: RunState, plan: Plan, withdrawn: set[int]) -> None:
        """Members whose owners withdraw are added to `withdrawn`."""
        self.state, self._plan, self._withdrawn = state, plan, withdrawn

    def drop(self, names: Mapping[int, str]) -> None:
        """Remove these members and their names from the run."""
        for member, name in names.items():
            self._withdrawn.add(member)
            self.state = self.state.without(
                name, self._plan.dp_parameters.noise, partial(epsilon_spent, self._plan)
            )


def _train_task(
    experiment: Experiment, plan: Plan, model: Model, run: str, number: int, cohort: int
) -> TrainTask:
    return TrainTask(
        run=run,
        round=number,
        cohort=cohort,
        seed=Streams(experiment.seed).child("training").seed,
        config=round_config(experiment, plan, model),
        evaluation_dp=plan.evaluation,
        weights=flatten_parameters(*model.modules()),
        buffers=flatten_buffers(*model.modules()),
        model=weights_hash(*model.modules()),
    )


def _round_record(plan: Plan, task: TrainTask, round_sum: RoundSum, model: str) -> RoundRecord:
    """The record without metrics; `model` is the hash of the weights after the round."""
    return RoundRecord(
        round=task.round,
        participants=round_sum.devices,
        refusals=round_sum.refusals,
        dropped=round_sum.dropped,
        epsilon=epsilon_spent(plan, task.round),
        bytes_up=round_sum.bytes_up,
        bytes_down=4 * (len(task.weights) + len(task.buffers)) * task.cohort,
        bytes_reveal=round_sum.bytes_reveal,
        seconds=round_sum.seconds,
        seconds_protect=round_sum.seconds_protect,
        seconds_combine=round_sum.seconds_combine,
        seconds_reveal=round_sum.seconds_reveal,
        weights_hash=model,
        metrics={},
    )


def epsilon_spent(plan: Plan, rounds: int, evaluations: int | None = None) -> Epsilon | NotMeasured:
    """Epsilon of the first `rounds` rounds and of `evaluations` evaluations (None: all), or why there is no bound."""
    match plan.privacy:
        case PrivacyTarget(delta=delta, unit=unit):
            events = [plan.event(rounds)] if rounds else []
            if evaluations != 0 and plan.evaluation is not None:
                events.append(plan.evaluation.event(evaluations))
            return epsilon_of(compose(events), delta, unit=unit).measured()
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def _summary(record: RoundRecord, total: int, *, with_metrics: bool) -> str:
    missing = len(record.refusals) + len(record.dropped)
    parts = [f"round {record.round} of {total}: {len(record.participants)} devices took part"]
    if missing:
        parts[0] += f", {missing} did not"
    if isinstance(epsilon := record.epsilon, Epsilon):
        covers = ", with all evaluations of this run" if with_metrics else ""
        parts.append(
            f"epsilon so far at most {rounded_up(epsilon.upper)} "
            f"(delta {format_delta(epsilon.delta)}, per {epsilon.unit}{covers})"
        )
    names = Counter(record.participants)
    if shared := [name for name, count in names.items() if count > 1]:
        parts.append(f"several devices are named {', '.join(shared)}: a withdrawal of one removes that name")
    return "; ".join([*parts, f"{record.seconds:.0f} s"])
