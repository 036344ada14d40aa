"""The federated rounds: ask, check, sum, open, apply, measure, keep. Survives a kill at any moment.

Called by coordinator.py. A round counts once its checkpoint and its line in `state.json` are on disk; a round
cut short is asked again, and devices that had answered send the bytes that they kept, at no further cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fedface.experiment import Experiment
from fedface.federation.cohort import Cohort
from fedface.federation.findings import Yardstick, sample_figures
from fedface.federation.state import State, weights_path
from fedface.federation.summing import gather, noised_sum
from fedface.federation.task import Agreed, TrainTask
from fedface.models.family import Model
from fedface.models.weights import buffers_of, load_model, save_model, vector_of, weights_hash
from fedface.privacy.accounting import compose, epsilon_of
from fedface.privacy.plan import Plan
from fedface.privacy.target import PrivacyTarget, delta_in_words
from fedface.randomness import Streams
from fedface.reports.filling import epsilon_record
from fedface.reports.quantities import Epsilon, NotMeasured
from fedface.reports.run import RoundRecord
from fedface.training.ways import begin_round, common_streams


class Watcher(Protocol):
    """Who is told how far a run is."""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins that will take `steps` steps."""
        ...

    def step(self, done: int) -> None:
        """`done` steps of the stage are done."""
        ...

    def say(self, sentence: str) -> None:
        """Something worth a line."""
        ...


class SilentWatcher:
    """Tells nobody."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def step(self, done: int) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""


def run_rounds(
    experiment: Experiment,
    plan: Plan,
    cohort: Cohort,
    state: State,
    yardstick: Yardstick | None,
    watcher: Watcher,
    away: set[int] | None = None,
) -> State:
    """Run the rounds that are not on disk yet; each round's model is measured by the yardstick, if any.

    Members whose owners leave are asked no more, and join `away`; a run that is resumed asks each once again.

    Raises:
        FederationError: Too few usable answers in a round, or nobody could open the sum. The run can be
            resumed.
    """
    total = experiment.rounds
    if len(state.rounds) >= total:
        return state
    # Those who came first: a sum has no room for more devices than the recipe names.
    away = set() if away is None else away
    everybody = cohort.members(experiment.devices.count)[: experiment.devices.count]
    members = [member for member in everybody if member not in away]
    for number in range(len(state.rounds) + 1, total + 1):
        model = load_model(weights_path(state.folder, number - 1))
        watcher.stage(f"round {number} of {total}: devices train", len(members))
        forgetting = Forgetting(state, plan, away)
        record, left = _one_round(
            experiment,
            plan,
            cohort,
            members,
            model,
            number,
            state.folder,
            yardstick,
            watcher,
            forgetting.forget,
        )
        for name in left.values():
            record = record.without(name)
            watcher.say("a device has left the run; its name is gone from the run's files")
        state = forgetting.state.then(record)
        members = [member for member in members if member not in away]
        watcher.say(_line(record, total))
    return state


class Forgetting:
    """A run's state while answers come in: who leaves is forgotten on disk before anything else can fail."""

    def __init__(self, state: State, plan: Plan, away: set[int]) -> None:
        """Members who leave join `away`."""
        self.state, self._plan, self._away = state, plan, away

    def forget(self, left: Mapping[int, str]) -> None:
        """These members have left, under these names."""
        for member, name in left.items():
            self._away.add(member)
            self.state = self.state.without(name, partial(answers_price, self._plan))


def _one_round(
    experiment: Experiment, plan: Plan, cohort: Cohort, members: Sequence[int], model: Model, number: int,
    folder: Path, yardstick: Yardstick | None, watcher: Watcher, gone: Callable[[Mapping[int, str]], None],
) -> tuple[RoundRecord, Mapping[int, str]]:  # fmt: skip
    """The round's record, and the members whose owners have left."""
    weights = vector_of(*model.modules())
    seed = Streams(experiment.seed).child("training").seed
    work = begin_round(model, experiment.training, plan.terms, common_streams(seed, number))
    ranges = work.ranges()
    task = TrainTask(
        run=folder.name,
        round=number,
        cohort=len(members),
        seed=seed,
        agreed=Agreed(
            terms=plan.terms,
            training=experiment.training,
            shape=model.shape,
            aggregation=experiment.aggregation,
            agreement=experiment.agreement,
            held_out=experiment.held_out,
        ),
        weights=weights,
        buffers=buffers_of(*model.modules()),
        model=weights_hash(*model.modules()),
    )
    gathered = gather(experiment, cohort, members, task, len(ranges), watcher.step, gone)
    total = noised_sum(gathered.total, plan.terms)
    after = work.apply(total * ranges, gathered.count, Streams(experiment.seed).generator("mean style"))
    notes = {"run": folder.name, "round": number}
    # Kept before the figures are taken: measuring again is cheap, asking again is not.
    save_model(weights_path(folder, number), replace(after, notes=notes))
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
        figures={} if yardstick is None else sample_figures(after, yardstick, experiment.seed),
    )
    return record, gathered.left


def spent(plan: Plan, rounds: int) -> Epsilon | NotMeasured:
    """The price of the first `rounds` rounds of a plan and of all that is asked beside them, or why there is none."""
    match plan.promise:
        case PrivacyTarget(delta=delta, unit=unit):
            told = compose([plan.event(rounds), *(terms.event() for terms in plan.beside)])
            return epsilon_record(epsilon_of(told, delta), delta=delta, unit=unit)
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def answers_price(plan: Plan, rounds: int, questions: int) -> Epsilon | NotMeasured:
    """The price of what one device answered: so many rounds, so many sets of figures."""
    match plan.promise:
        case PrivacyTarget(delta=delta, unit=unit):
            parts = [plan.event(rounds)] if rounds else []
            parts += [terms.event(questions) for terms in plan.beside if questions]
            return epsilon_record(epsilon_of(compose(parts), delta), delta=delta, unit=unit)
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def _line(record: RoundRecord, total: int) -> str:
    away = len(record.refusals) + len(record.dropped)
    said = f"round {record.round} of {total}: {len(record.answered)} devices answered"
    said += f", {away} did not" if away else ""
    if isinstance(record.epsilon, Epsilon):
        spent = record.epsilon
        said += f"; epsilon so far at most {spent.upper:.2f} (delta {delta_in_words(spent.delta)}, per {spent.unit})"
    return f"{said}; {record.seconds:.0f} s"
