"""The federated rounds: ask, check, sum, open, apply, measure, keep. Survives a kill at any moment.

Called by coordinator.py. A round counts once its checkpoint and its line in `state.json` are on disk; a round
cut short is asked again, and devices that had answered send the bytes that they kept, at no further cost.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fedface.aggregation.encrypted import make_server
from fedface.aggregation.protocol import Aggregation, Payload, PlainConfig
from fedface.errors import AggregationError, FederationError, RunError
from fedface.experiment import Experiment
from fedface.federation.cohort import Cohort
from fedface.federation.findings import Yardstick, sample_figures
from fedface.federation.task import Agreed, Fault, Refusal, Revealed, RevealTask, Trained, TrainTask
from fedface.models.family import Model
from fedface.models.weights import buffers_of, load_model, save_model, vector_of, weights_hash
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.plan import Plan
from fedface.privacy.target import PrivacyTarget
from fedface.randomness import Streams
from fedface.reports import strict
from fedface.reports.filling import epsilon_record
from fedface.reports.run import Epsilon, NotMeasured, RefusalRecord, RoundRecord
from fedface.shapes import Vector
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


def weights_path(folder: Path, round: int) -> Path:
    """The checkpoint after a round; round 0 is the base."""
    return folder / "rounds" / f"{round:03d}.safetensors"


@dataclass(frozen=True)
class State:
    """What of a run is on disk."""

    folder: Path
    started: str  # ISO 8601, UTC
    rounds: tuple[RoundRecord, ...]

    def save(self) -> None:
        """In one step, so that a reader never sees half of it, and on the disk before it returns."""
        rounds = [json.loads(strict.dumps(record)) for record in self.rounds]
        replace_text(self.folder / "state.json", json.dumps({"started": self.started, "rounds": rounds}))

    def then(self, record: RoundRecord) -> State:
        """With one more round, saved."""
        state = State(self.folder, self.started, (*self.rounds, record))
        state.save()
        return state

    @staticmethod
    def read(folder: Path) -> State:
        """Raises RunError if there is no run here, or its state is damaged."""
        path = folder / "state.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            rounds = tuple(strict.loads(RoundRecord, json.dumps(record)) for record in kept["rounds"])
            return State(folder, str(kept["started"]), rounds)
        except FileNotFoundError as error:
            raise RunError(f"{folder}: no run was begun here, so there is nothing to resume") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}); start a new run") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: the old text or the new, never half, also after a power cut."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def run_rounds(
    experiment: Experiment,
    plan: Plan,
    cohort: Cohort,
    state: State,
    yardstick: Yardstick | None,
    watcher: Watcher,
) -> State:
    """Run the rounds that are not on disk yet; each round's model is measured by the yardstick, if any.

    Raises:
        FederationError: Too few usable answers in a round, or nobody could open the sum. The run can be
            resumed.
    """
    total = experiment.rounds
    if len(state.rounds) >= total:
        return state
    # Those who came first: a sum has no room for more devices than the recipe names.
    members = cohort.members(experiment.devices.count)[: experiment.devices.count]
    for number in range(len(state.rounds) + 1, total + 1):
        model = load_model(weights_path(state.folder, number - 1))
        watcher.stage(f"round {number} of {total}: devices train", len(members))
        record = _one_round(
            experiment, plan, cohort, members, model, number, state.folder, yardstick, watcher
        )
        state = state.then(record)
        watcher.say(_line(record, total))
    return state


def _one_round(
    experiment: Experiment, plan: Plan, cohort: Cohort, members: Sequence[int], model: Model, number: int,
    folder: Path, yardstick: Yardstick | None, watcher: Watcher,
) -> RoundRecord:  # fmt: skip
    started = time.perf_counter()
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
        ),
        weights=weights,
        buffers=buffers_of(*model.modules()),
        model=weights_hash(*model.modules()),
    )
    heard: set[int] = set()

    def hear(member: int) -> None:
        heard.add(member)
        watcher.step(len(heard))

    answers = cohort.ask(task, members, hear)
    server = make_server(experiment.aggregation, experiment.agreement)
    usable, refusals, dropped = _sorted_answers(answers, server, number, len(ranges))
    if len(usable) < experiment.fewest_answers:
        reasons = "; ".join(f"{r.device}: {r.reason}" for r in (*refusals, *dropped))
        raise FederationError(
            f"round {number}: {len(usable)} of {len(members)} devices gave a usable answer, "
            f"{experiment.fewest_answers} are needed ({reasons or 'no reasons given'}). "
            "Nothing was applied; mend the cause and resume the run."
        )
    combining = time.perf_counter()
    total = server.combine([payload for _, payload in usable.values()])
    combined = time.perf_counter()
    opened = _open(experiment, cohort, server, total, list(usable), number, folder.name)
    revealed = time.perf_counter()
    after = work.apply(opened * ranges, total.count, Streams(experiment.seed).generator("mean style"))
    notes = {"run": folder.name, "round": number}
    # Kept before the figures are taken: measuring again is cheap, asking again is not.
    save_model(weights_path(folder, number), replace(after, notes=notes))
    hidden = not isinstance(experiment.aggregation, PlainConfig)
    return RoundRecord(
        round=number,
        answered=tuple(trained.device for trained, _ in usable.values()),
        refusals=tuple(refusals),
        dropped=tuple(dropped),
        epsilon=spent(plan, number),
        bytes_up=sum(len(t.payload) for t, _ in usable.values()),
        bytes_down=4 * (len(weights) + len(task.buffers)) * len(members),
        bytes_reveal=total.nbytes + 4 * len(ranges) if hidden else 0,
        seconds=revealed - started,
        seconds_protect=max(trained.seconds_protect for trained, _ in usable.values()),
        seconds_combine=combined - combining,
        seconds_reveal=revealed - combined,
        weights_hash=weights_hash(*after.modules()),
        figures={} if yardstick is None else sample_figures(after, yardstick, experiment.seed),
    )


def _sorted_answers(
    answers: Mapping[int, Any], server: Aggregation, number: int, length: int
) -> tuple[dict[int, tuple[Trained, Payload]], list[RefusalRecord], list[RefusalRecord]]:
    """Usable answers by member, refusals, and what was dropped; every device is named."""
    usable: dict[int, tuple[Trained, Payload]] = {}
    refusals, dropped = [], []
    for member, answer in sorted(answers.items()):
        name = f"device {member}"
        match answer:
            case Refusal(device=device, reason=reason):
                refusals.append(RefusalRecord(device=device, reason=reason))
            case Trained(device=device, payload=written):
                try:
                    usable[member] = (answer, _checked(written, server, number, length))
                except AggregationError as error:
                    dropped.append(RefusalRecord(device=device, reason=str(error)))
            case Fault(reason=reason):
                dropped.append(RefusalRecord(device=name, reason=reason))
            case _:
                dropped.append(RefusalRecord(device=name, reason="answered another question"))
    strangers = _under_another_key(usable)
    dropped += [
        RefusalRecord(device=usable.pop(member)[0].device, reason=why) for member, why in strangers.items()
    ]
    return usable, refusals, dropped


def _under_another_key(usable: Mapping[int, tuple[Trained, Payload]]) -> dict[int, str]:
    """Members whose update cannot be added to the others', and why: the key that most devices hold decides."""
    keys = {member: str(payload.header.get("key", "")) for member, (_, payload) in usable.items()}
    if len(set(keys.values())) < 2:
        return {}
    most = Counter(keys.values()).most_common(1)[0][0]
    why = f"its update is under another key than {most}, which most devices hold; give it a copy of that key"
    return {member: why for member, key in keys.items() if key != most}


def _checked(written: bytes, server: Aggregation, number: int, length: int) -> Payload:
    """One update of this round and size, that the server can add. Raises AggregationError."""
    payload = Payload.from_bytes(written)
    if (payload.round, payload.length, payload.count) != (number, length, 1):
        raise AggregationError(
            f"wanted one update of round {number} with {length} weights, got {payload.count} of round "
            f"{payload.round} with {payload.length}"
        )
    server.combine([payload])
    return payload


def _open(
    experiment: Experiment, cohort: Cohort, server: Aggregation, total: Payload, members: list[int],
    number: int, run: str,
) -> Vector:  # fmt: skip
    """The sum, opened by the server if it was never hidden, otherwise by the first device that can."""
    if isinstance(experiment.aggregation, PlainConfig):
        opened = server.reveal(total)
        if not bool(torch.isfinite(opened).all()):
            raise FederationError(
                f"round {number}: the sum of the updates is not finite; nothing was applied"
            )
        return opened
    task = RevealTask(
        run=run,
        round=number,
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
        total=total.to_bytes(),
    )
    reasons = []
    for member in members:
        answer = cohort.ask(task, [member], lambda done: None)[member]
        match answer:
            case Revealed(total=vector) if vector.shape == (total.length,) and bool(
                torch.isfinite(vector).all()
            ):
                return vector
            case Refusal(reason=reason) | Fault(reason=reason):
                reasons.append(f"device {member}: {reason}")
            case _:
                reasons.append(f"device {member}: opened something else")
    raise FederationError(
        f"round {number}: no device opened the sum ({'; '.join(reasons)}); resume to try again"
    )


def spent(plan: Plan, rounds: int) -> Epsilon | NotMeasured:
    """The price of the first `rounds` rounds of a plan, or why there is none."""
    match plan.promise:
        case PrivacyTarget(delta=delta, unit=unit):
            return epsilon_record(epsilon_of(plan.event(rounds), delta), delta=delta, unit=unit)
        case _:
            return NotMeasured(not_measured="the run adds no noise, so there is no bound")


def _line(record: RoundRecord, total: int) -> str:
    away = len(record.refusals) + len(record.dropped)
    said = f"round {record.round} of {total}: {len(record.answered)} devices answered"
    said += f", {away} did not" if away else ""
    if isinstance(record.epsilon, Epsilon):
        spent = record.epsilon
        said += f"; epsilon so far at most {spent.upper:.2f} (delta {spent.delta:g}, per {spent.unit})"
    return f"{said}; {record.seconds:.0f} s"
