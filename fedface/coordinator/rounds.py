"""The federated rounds: ask, check, sum, open, apply, measure, keep. Survives a kill at any moment.

Called by coordinator.py. A round counts once its line in `state.json` and its checkpoint are on disk; a round cut
short is asked again, and devices that had answered send the bytes that they kept, at no further cost. Where the server
adds the noise, such a round gets fresh noise, and no disk may ever hold one sum under two noises. So the checkpoint is
written last: if it is there, so is its line, and the round is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fedface.coordinator.aggregate import collect_and_sum, noised_sum
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import ReferenceSet, sample_metrics
from fedface.experiment import Experiment
from fedface.measurements import Epsilon, NotMeasured
from fedface.messages.cohort import Cohort
from fedface.messages.messages import RoundConfig, TrainTask
from fedface.models.checkpoint import (
    flatten_buffers,
    flatten_parameters,
    load_model,
    save_model,
    weights_hash,
)
from fedface.models.model import Model
from fedface.number_format import format_delta
from fedface.privacy.accounting import compose, epsilon_of
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.randomness import Streams
from fedface.reports.run_record import RoundRecord
from fedface.training.training_methods import common_streams, prepare_round


class ProgressListener(Protocol):
    """Who is told how far a run is."""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins that will take `steps` steps."""
        ...

    def advance(self, done: int) -> None:
        """`done` steps of the stage are done."""
        ...

    def message(self, sentence: str) -> None:
        """Something worth a line."""
        ...


class SilentProgress:
    """Tells nobody."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""

    def message(self, sentence: str) -> None:
        """Nothing."""


def run_rounds(
    experiment: Experiment,
    plan: Plan,
    cohort: Cohort,
    state: RunState,
    yardstick: ReferenceSet | None,
    watcher: ProgressListener,
    away: set[int] | None = None,
) -> RunState:
    """Run the rounds that are not on disk yet; each round's model is measured by the yardstick, if any.

    Members whose owners leave are asked no more, and join `away`; a run that is resumed asks each once again.

    Raises:
        FederationError: Too few usable answers in a round, or nobody could open the sum. The run can be
            resumed.
    """
    total = experiment.rounds
    state = _measured(_whole(state, watcher), experiment, yardstick)
    if len(state.rounds) >= total:
        return state
    # Those who came first: a sum has no room for more devices than the recipe names.
    away = set() if away is None else away
    everybody = cohort.members(experiment.devices.count)[: experiment.devices.count]
    members = [member for member in everybody if member not in away]
    for number in range(len(state.rounds) + 1, total + 1):
        model = load_model(weights_path(state.folder, number - 1))
        watcher.stage(f"round {number} of {total}: devices train", len(members))
        forgetting = WithdrawalHandler(state, plan, away)
        record, after, left = _one_round(
            experiment, plan, cohort, members, model, number, state.folder, watcher, forgetting.drop
        )
        for name in left.values():
            record = record.without(name)
            watcher.message("a device has left the run; its name is gone from the run's files")
        state = forgetting.state.with_round(record)
        save_model(weights_path(state.folder, number), after)
        state = _measured(state, experiment, yardstick, after)
        members = [member for member in members if member not in away]
        watcher.message(_line(record, total, figures=bool(plan.additional_releases)))
    return state


def _whole(state: RunState, watcher: ProgressListener) -> RunState:
    """Without a last round whose checkpoint did not reach the disk."""
    if not state.rounds:
        return state
    last = state.rounds[-1]
    path = weights_path(state.folder, last.round)
    if path.exists() and weights_hash(*load_model(path).modules()) == last.weights_hash:
        return state
    watcher.message(f"round {last.round} was cut short while it was kept, and is asked again")
    return replace(state, rounds=state.rounds[:-1])


def _measured(
    state: RunState, experiment: Experiment, yardstick: ReferenceSet | None, model: Model | None = None
) -> RunState:
    """With the last round's figures: they are taken once it is kept, since measuring again is cheap.

    Its model is read from the disk if it is not at hand.
    """
    if yardstick is None or not state.rounds or state.rounds[-1].metrics:
        return state
    if model is None:
        model = load_model(weights_path(state.folder, state.rounds[-1].round))
    return state.with_initial_metrics(sample_metrics(model, yardstick, experiment.seed))


class WithdrawalHandler:
    """A run's state while answers come in: who leaves is forgotten on disk before anything else can fail."""

    def __init__(self, state: RunState, plan: Plan, away: set[int]) -> None:
        """Members who leave join `away`."""
        self.state, self._plan, self._away = state, plan, away

    def drop(self, left: Mapping[int, str]) -> None:
        """These members have left, under these names."""
        for member, name in left.items():
            self._away.add(member)
            self.state = self.state.without(name, partial(evaluations_price, self._plan))


def _one_round(
    experiment: Experiment, plan: Plan, cohort: Cohort, members: Sequence[int], model: Model, number: int,
    folder: Path, watcher: ProgressListener, gone: Callable[[Mapping[int, str]], None],
) -> tuple[RoundRecord, Model, Mapping[int, str]]:  # fmt: skip
    """The round's record without figures, the model after it, and the members whose owners have left."""
    weights = flatten_parameters(*model.modules())
    seed = Streams(experiment.seed).child("training").seed
    work = prepare_round(model, experiment.training, plan.dp_parameters, common_streams(seed, number))
    ranges = work.ranges()
    task = TrainTask(
        run=folder.name,
        round=number,
        cohort=len(members),
        seed=seed,
        config=RoundConfig(
            dp=plan.dp_parameters,
            training=experiment.training,
            architecture=model.architecture,
            aggregation=experiment.aggregation,
            agreement=experiment.agreement,
            holdout_fraction=experiment.holdout_fraction,
        ),
        weights=weights,
        buffers=flatten_buffers(*model.modules()),
        model=weights_hash(*model.modules()),
    )
    gathered = collect_and_sum(experiment, cohort, members, task, len(ranges), watcher.advance, gone)
    total = noised_sum(gathered.total, plan.dp_parameters)
    after = work.apply(total * ranges, gathered.count, Streams(experiment.seed).generator("mean style"))
    record = RoundRecord(
        round=number,
        answered=gathered.devices,
        refusals=gathered.refusals,
        dropped=gathered.dropped,
        epsilon=spent(plan, number),
        bytes_up=gathered.bytes_up,
        bytes_down=4 * (len(weights) + len(task.buffers)) * len(members),
        bytes_reveal=gathered.bytes_reveal,
        seconds=gathered.seconds,
        seconds_protect=gathered.seconds_protect,
        seconds_combine=gathered.seconds_combine,
        seconds_reveal=gathered.seconds_reveal,
        weights_hash=weights_hash(*after.modules()),
        metrics={},
    )
    notes = {"run": folder.name, "round": number}
    return record, replace(after, notes=notes), gathered.left


def spent(plan: Plan, rounds: int) -> Epsilon | NotMeasured:
    """The price of the first `rounds` rounds of a plan and of all that is asked beside them, or why there is none."""
    match plan.privacy:
        case PrivacyTarget(delta=delta, unit=unit):
            told = compose([plan.event(rounds), *(terms.event() for terms in plan.additional_releases)])
            return epsilon_of(told, delta, unit=unit).measured()
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def planned_epsilon(plan: Plan) -> Epsilon | NotMeasured:
    """The privacy loss of everything that a plan releases, or why there is no bound."""
    return spent(plan, plan.schedule.rounds)


def evaluations_price(plan: Plan, rounds: int, questions: int) -> Epsilon | NotMeasured:
    """The price of what one device answered: so many rounds, so many sets of figures."""
    match plan.privacy:
        case PrivacyTarget(delta=delta, unit=unit):
            parts = [plan.event(rounds)] if rounds else []
            parts += [terms.event(questions) for terms in plan.additional_releases if questions]
            return epsilon_of(compose(parts), delta, unit=unit).measured()
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def _line(record: RoundRecord, total: int, *, figures: bool) -> str:
    away = len(record.refusals) + len(record.dropped)
    said = f"round {record.round} of {total}: {len(record.answered)} devices answered"
    said += f", {away} did not" if away else ""
    if isinstance(record.epsilon, Epsilon):
        spent = record.epsilon
        said += (
            f"; epsilon so far at most {spent.upper:.2f} (delta {format_delta(spent.delta)}, per {spent.unit}"
        )
        said += ", with all figures that devices tell in this run)" if figures else ")"
    return f"{said}; {record.seconds:.0f} s"
