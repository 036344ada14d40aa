"""Rounds with honest and dishonest devices: what is applied, named, stored and accounted for."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NO_PRIVACY, TARGET, SilentProgress, first_device, started, tiny_experiment, tiny_gan

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.aggregation.masked import EXCHANGES as MASKED_EXCHANGES
from fedface.aggregation.payload import HomomorphicConfig, Payload
from fedface.aggregation.plain import PlainAggregation
from fedface.coordinator.rounds import ProgressListener, run_rounds
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import ReferenceSet, sample_metrics
from fedface.device.client import handle_task
from fedface.device.state import LedgerFiles
from fedface.errors import FederationError, RunError, WeightsError
from fedface.experiment import Experiment, devices_folder
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.messages.messages import (
    ExchangeResult,
    ExchangeTask,
    Failure,
    Refusal,
    Reply,
    Task,
    TrainResult,
    to_message,
)
from fedface.messages.parsing import read_reply, read_task
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, load_model, weights_hash
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger, LedgerSnapshot
from fedface.public_data.device_photos import device_faces, device_photos
from fedface.simulation.devices import simulated_device
from fedface.tensor_types import Vector
from fedface.training.gan import GanRound
from fedface.upsampling.degradation import Area

Tamper = Callable[[int, Task, Reply], Reply | Failure]
THREE = {"devices.light_fractions": "[0.9, 0.5, 0.1]"}


def ranges_of(experiment: Experiment) -> Vector:
    """The public ranges of the tiny GAN's weights."""
    return GanRound(tiny_gan(), experiment.training, experiment.plan().dp_parameters).ranges()


def honest(member: int, task: Task, reply: Reply) -> Reply | Failure:
    """Changes nothing."""
    return reply


class LocalCohort:
    """Simulated devices that answer through bytes, which a test may change."""

    def __init__(self, experiment: Experiment, folder: Path, tamper: Tamper = honest, more: int = 0) -> None:
        self.experiment, self.folder, self.tamper = experiment, folder, tamper
        self.count = experiment.devices.count + more
        self.asked: list[tuple[str, int, tuple[int, ...]]] = []
        self.replies: dict[tuple[str, int, int], Reply] = {}

    def members(self, required: int) -> Sequence[int]:
        return range(self.count)

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        task = next(iter(tasks.values()))
        name = task.exchange if isinstance(task, ExchangeTask) else type(task).__name__
        self.asked.append((name, task.round, tuple(tasks)))
        for member, task in tasks.items():
            device = simulated_device(self.experiment, member, devices_folder(self.folder))
            reply = read_reply(to_message(handle_task(read_task(to_message(task)), device)))
            self.replies[name, task.round, member] = reply
            yield member, self.tamper(member, task, reply)


class Heard(SilentProgress):
    """Stores the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, sentence: str) -> None:
        """One line."""
        self.messages.append(sentence)


def rounds(experiment: Experiment, cohort: LocalCohort, progress: ProgressListener | None = None) -> RunState:
    """All rounds that are not on disk yet."""
    faces = device_faces(experiment, 48, 16)
    assert faces is not None
    like = ReferenceSet(faces=faces, inputs=faces, downscale=experiment.upsampling.downscale)
    return run_rounds(
        experiment,
        experiment.plan(),
        cohort,
        RunState.read(cohort.folder),
        like,
        progress or SilentProgress(),
    )


def cohort_of(
    tmp_path: Path, changes: Mapping[str, str], tamper: Tamper = honest, more: int = 0
) -> LocalCohort:
    """A started run of one round with its devices, without DP unless the changes say otherwise."""
    experiment = tiny_experiment(tmp_path, {"training.rounds": "1", "privacy": NO_PRIVACY, **changes})
    return LocalCohort(experiment, started(experiment, tmp_path / "runs" / "tiny"), tamper, more)


def weights_after(folder: Path, round: int) -> Vector:
    """The global model after a round."""
    return flatten_parameters(*load_model(weights_path(folder, round)).modules())


def update_of(reply: Reply | Failure) -> Vector:
    """The numbers of a plain update."""
    assert isinstance(reply, TrainResult)
    return PlainAggregation(max_devices=9).reveal(Payload.from_bytes(reply.payload))


def plain_bytes(values: Vector, round: int = 1) -> bytes:
    """Numbers as a plain payload."""
    return PlainAggregation(max_devices=9).protect(values, round).to_bytes()


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_a_round_applies_the_mean_of_the_updates(tmp_path: Path, server_lr: float) -> None:
    """weights + rate * mean(update) * range, coordinate by coordinate."""
    cohort = cohort_of(tmp_path, {**THREE, "training.server_lr": str(server_lr)})
    state = rounds(cohort.experiment, cohort)
    updates = [update_of(cohort.replies["TrainTask", 1, member]) for member in range(3)]
    start = flatten_parameters(*tiny_gan().modules())
    required = start + server_lr * torch.stack(updates).mean(0) * ranges_of(cohort.experiment)
    assert torch.allclose(weights_after(cohort.folder, 1), required, atol=1e-6)
    assert not torch.allclose(required, start, atol=1e-4)
    assert state.rounds[0].participants == ("device-00", "device-01", "device-02")
    assert state.rounds[0].weights_hash == weights_hash(*load_model(weights_path(cohort.folder, 1)).modules())


def spoilt(kind: str, reply: TrainResult) -> Reply | Failure:
    """What a faulty or hostile device sends instead of its update."""
    good = update_of(reply)
    match kind:
        case "noise":
            return replace(reply, payload=random.Random(1).randbytes(500))
        case "empty":
            return replace(reply, payload=b"")
        case "cut":
            return replace(reply, payload=reply.payload[:-1])
        case "shorter":
            return replace(reply, payload=plain_bytes(good[:-1]))
        case "yesterday":
            return replace(reply, payload=plain_bytes(good, round=7))
        case "nan":
            values = plain_bytes(good)
            body = Payload.from_bytes(values)
            part = b"\x00\x00\xc0\x7f" + body.parts[0][4:]
            return replace(reply, payload=replace(body, parts=(part,)).to_bytes())
        case "huge":
            return replace(reply, payload=plain_bytes(torch.full_like(good, -1e30)))
        case "sum":
            pair = [Payload.from_bytes(reply.payload)] * 2
            return replace(reply, payload=PlainAggregation(max_devices=9).combine(pair).to_bytes())
        case "gone":
            return Failure("no answer within 1 s")
        case "refuses":
            return Refusal(device=reply.device, reason="not today")
        case _:
            return ExchangeResult(device=reply.device, content=b"")


@pytest.mark.parametrize(
    ("kind", "named", "words"),
    [
        ("noise", "device-01", "payload cannot be read"),
        ("empty", "device-01", "payload cannot be read"),
        ("cut", "device-01", "damaged or truncated"),
        ("shorter", "device-01", "weights, got 1 of round 1"),
        ("yesterday", "device-01", "of round 7"),
        ("nan", "device-01", "not finite"),
        ("huge", "device-01", "1000 at most, got 1e+30"),
        ("sum", "device-01", "got 2 of round"),
        ("gone", "device 1", "no answer within"),
        ("refuses", "device-01", "not today"),
        ("opened", "device 1", "replied to another task"),
    ],
)
def test_a_faulty_device_is_named_and_the_round_continues_without_it(
    tmp_path: Path, kind: str, named: str, words: str
) -> None:
    """The result is the mean of the two others, as if it had not been there."""

    def tamper(member: int, task: Task, reply: Reply) -> Reply | Failure:
        return spoilt(kind, reply) if member == 1 and isinstance(reply, TrainResult) else reply

    cohort = cohort_of(tmp_path, THREE, tamper)
    heard = Heard()
    (record,) = rounds(cohort.experiment, cohort, heard).rounds
    assert record.participants == ("device-00", "device-02")
    assert heard.messages[-1].startswith(f"{named} did not take part: ") and words in heard.messages[-1]
    away = record.refusals if kind == "refuses" else record.dropped
    assert len(record.refusals) + len(record.dropped) == 1
    assert away[0].device == named and words in away[0].reason
    others = torch.stack([update_of(cohort.replies["TrainTask", 1, member]) for member in (0, 2)]).mean(0)
    required = flatten_parameters(*tiny_gan().modules()) + others * ranges_of(cohort.experiment)
    assert torch.allclose(weights_after(cohort.folder, 1), required, atol=1e-6)


def test_with_the_median_a_dishonest_device_does_not_move_the_model(tmp_path: Path) -> None:
    """An update of 900 public ranges: each weight moves with an honest one."""

    def tamper(member: int, task: Task, reply: Reply) -> Reply | Failure:
        if member != 1 or not isinstance(reply, TrainResult):
            return reply
        return replace(reply, payload=plain_bytes(torch.full_like(update_of(reply), 900.0)))

    cohort = cohort_of(tmp_path, {**THREE, "aggregation": "{kind: plain, rule: median}"}, tamper)
    (record,) = rounds(cohort.experiment, cohort).rounds
    assert len(record.participants) == 3
    honest_ones = torch.stack([update_of(cohort.replies["TrainTask", 1, member]) for member in (0, 2)])
    required = flatten_parameters(*tiny_gan().modules()) + honest_ones.amax(0) * ranges_of(cohort.experiment)
    assert torch.allclose(weights_after(cohort.folder, 1), required, atol=1e-6)


def test_too_few_replies_apply_nothing_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    """Two are needed and one came: no checkpoint, and an error with names; the second try costs no further epsilon."""

    def tamper(member: int, task: Task, reply: Reply) -> Reply | Failure:
        return Failure("its network is down") if member == 1 else reply

    cohort = cohort_of(tmp_path, {}, tamper)
    with pytest.raises(
        FederationError, match=r"1 of 2 devices .* 2 are needed \(device 1: its network is down\)"
    ):
        rounds(cohort.experiment, cohort)
    assert not weights_path(cohort.folder, 1).exists() and RunState.read(cohort.folder).rounds == ()
    lost = dict(cohort.replies)
    cohort.tamper = honest
    (record,) = rounds(cohort.experiment, cohort).rounds
    assert record.participants == ("device-00", "device-01")
    assert {
        key: reply.payload for key, reply in cohort.replies.items() if isinstance(reply, TrainResult)
    } == {key: reply.payload for key, reply in lost.items() if isinstance(reply, TrainResult)}
    for member in range(2):
        device = simulated_device(cohort.experiment, member, devices_folder(cohort.folder))
        assert [(e.round, e.attempt) for e in Ledger.open(device.ledger_path).entries()] == [(1, 1)]


def test_a_run_continues_after_its_last_round_on_disk(tmp_path: Path) -> None:
    """Killed between a checkpoint and its record: the round is requested again, and the same bytes are sent."""
    cohort = cohort_of(tmp_path, {"training.rounds": "2"})
    first = rounds(cohort.experiment, cohort)
    hashes = [weights_hash(*load_model(weights_path(cohort.folder, number)).modules()) for number in (1, 2)]
    RunState(cohort.folder, first.started, first.rounds[:1]).save()
    cohort.asked.clear()
    again = rounds(cohort.experiment, cohort)
    assert cohort.asked == [("TrainTask", 2, (0, 1))]
    assert [record.weights_hash for record in again.rounds] == hashes
    assert again.rounds[0] == first.rounds[0]
    cohort.asked.clear()
    assert rounds(cohort.experiment, cohort) == again and cohort.asked == []


def test_bytes_and_epsilon_are_recorded(tmp_path: Path) -> None:
    """Up: the payloads. Down: four bytes per weight or buffer and device. Epsilon: the plan's, increasing."""
    cohort = cohort_of(tmp_path, {"training.rounds": "2", "privacy": TARGET})
    experiment = cohort.experiment
    records = rounds(experiment, cohort).rounds
    modules = tiny_gan().modules()
    length = len(flatten_parameters(*modules)) + len(flatten_buffers(*modules))
    for number, record in enumerate(records, start=1):
        sent = [cohort.replies["TrainTask", number, member] for member in range(2)]
        assert record.bytes_up == sum(len(reply.payload) for reply in sent if isinstance(reply, TrainResult))
        assert record.bytes_down == 2 * 4 * length
        assert record.bytes_reveal == 0
        price = epsilon_of(experiment.plan().event(number), 1e-3)
        assert isinstance(record.epsilon, Epsilon)
        assert (record.epsilon.lower, record.epsilon.upper) == (price.lower, price.upper)
        assert (record.epsilon.delta, record.epsilon.unit) == (1e-3, "photo")
        assert set(record.metrics) == {"distance", "monk", "dark_fraction"}
    spent = [record.epsilon.upper for record in records if isinstance(record.epsilon, Epsilon)]
    assert 0 < spent[0] < spent[1] <= 8.0


def test_a_run_without_dp_reports_that_there_is_no_bound(tmp_path: Path) -> None:
    """Not zero, and not a large number."""
    cohort = cohort_of(tmp_path, {})
    assert isinstance(rounds(cohort.experiment, cohort).rounds[0].epsilon, NotMeasured)


ENCRYPTED_EXCHANGES = (*MASKED_EXCHANGES[:3], "decrypt", MASKED_EXCHANGES[3])
EXCHANGES = {"plain": (), "homomorphic": ENCRYPTED_EXCHANGES, "masked": MASKED_EXCHANGES}


def test_plain_and_protected_sums_give_the_same_model_up_to_half_a_step(tmp_path: Path) -> None:
    """The mean of n rounded updates is within half a grid step, range / (2^15 - 1) / 2, and float32's rounding."""
    changes = {"training.r2_weight": "0", "training.expected_batch_size": "24"}
    ends = {}
    for kind, exchanges in EXCHANGES.items():
        cohort = cohort_of(tmp_path / kind, {**changes, "aggregation": f"{{kind: {kind}}}"})
        (record,) = rounds(cohort.experiment, cohort).rounds
        ends[kind] = weights_after(cohort.folder, 1)
        asked = [(name, 1, 1 if name == "decrypt" else 2) for name in ("TrainTask", *exchanges)]
        assert [(name, round, len(members)) for name, round, members in cohort.asked] == asked
        assert record.participants == ("device-00", "device-01")
        assert not list((cohort.folder / "sums").glob("*"))
    ranges = ranges_of(cohort.experiment)
    rounding = torch.finfo(torch.float32).eps * ends["plain"].abs()
    for kind in ("homomorphic", "masked"):
        apart = (ends["plain"] - ends[kind]).abs()
        assert bool((apart <= 0.5001 * ranges / (2**15 - 1) + rounding).all())
        assert 0 < float(apart.max())


MASKED = {**THREE, "aggregation": "{kind: masked}", "min_responses": "2"}


def ledger_of(cohort: LocalCohort, member: int) -> LedgerSnapshot:
    """The verified ledger of a device."""
    return LedgerFiles.at(devices_folder(cohort.folder) / f"device-{member:02d}" / "ledger.sqlite").verify()


@pytest.mark.parametrize("lost_in", MASKED_EXCHANGES)
def test_a_round_with_masks_survives_a_device_that_is_lost_in_any_exchange(
    lost_in: str, tmp_path: Path
) -> None:
    """The model is that of the updates that arrived; the lost device is named, and paid once."""

    def lose(member: int, task: Task, reply: Reply) -> Reply | Failure:
        late = isinstance(task, ExchangeTask) and MASKED_EXCHANGES.index(task.exchange) >= at  # type: ignore[arg-type]
        return Failure("no answer") if member == 2 and late else reply

    at = MASKED_EXCHANGES.index(lost_in)  # type: ignore[arg-type]
    cohort = cohort_of(tmp_path, MASKED, lose)
    (record,) = rounds(cohort.experiment, cohort).rounds
    arrived = lost_in in ("survivors", "reveal")
    assert record.participants == ("device-00", "device-01", *(["device-02"] if arrived else []))
    assert [each.reason for each in record.dropped] == ([] if arrived else ["no answer"])
    assert [len(ledger_of(cohort, member).entries) for member in range(3)] == [1, 1, 1]


def test_a_server_that_opens_a_sum_again_with_fewer_devices_gets_nothing(tmp_path: Path) -> None:
    """The difference of the two sums would be one device's update: every device answers for its first list alone."""
    cohort = cohort_of(tmp_path, MASKED)
    rounds(cohort.experiment, cohort)
    opened = weights_after(cohort.folder, 1)
    weights_path(cohort.folder, 1).unlink()  # the server forgets the round, and that device 2 was in it

    def forget(member: int, task: Task, reply: Reply) -> Reply | Failure:
        return Failure("no answer") if member == 2 else reply

    cohort.tamper = forget
    with pytest.raises(FederationError, match="asked for with other devices before; it is answered once"):
        rounds(cohort.experiment, cohort)
    heard = Heard()
    (record,) = rounds(cohort.experiment, cohort, heard).rounds
    assert record.participants == () and any("the round is given up" in line for line in heard.messages)
    assert torch.equal(weights_after(cohort.folder, 1), weights_after(cohort.folder, 0))
    assert not torch.equal(opened, weights_after(cohort.folder, 0))
    assert [len(ledger_of(cohort, member).entries) for member in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(("lost_in", "back"), [("TrainTask", 4), ("shares", 2), ("masked", 4)])
def test_a_round_is_resumed_by_fewer_or_more_devices_than_it_was_begun_with(
    lost_in: str, back: int, tmp_path: Path
) -> None:
    """Stored keys are signed for a sum of three. Once the list of participants is fixed, a fourth cannot join."""
    changes = {**MASKED, "devices.light_fractions": "[0.5, 0.5, 0.5, 0.5]"}
    cohort = cohort_of(tmp_path, {**changes, "aggregation": "{kind: masked, corrupt_share: 0}"})
    connected = [3, back]

    def lose(member: int, task: Task, reply: Reply) -> Reply | Failure:
        name = task.exchange if isinstance(task, ExchangeTask) else type(task).__name__
        return Failure("no answer") if member and name == lost_in else reply

    cohort.tamper = lose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "members", lambda required: range(connected.pop(0)))
        with pytest.raises(FederationError):
            rounds(cohort.experiment, cohort)
        cohort.tamper = honest
        (record,) = rounds(cohort.experiment, cohort).rounds
    joined = back if lost_in == "TrainTask" else min(back, 3)
    assert record.participants == tuple(f"device-{member:02d}" for member in range(joined))
    assert not (cohort.folder / "sums").exists()


def test_a_sum_whose_participants_do_not_come_back_is_given_up(tmp_path: Path) -> None:
    """Two of three must: one came back, beside a device that was not there when the sum was begun."""
    cohort = cohort_of(tmp_path, {**MASKED, "devices.light_fractions": "[0.5, 0.5, 0.5, 0.5]"})
    connected = [[0, 1, 2], [0, 3]]

    def lose(member: int, task: Task, reply: Reply) -> Reply | Failure:
        return Failure("no answer") if isinstance(task, ExchangeTask) and task.exchange == "masked" else reply

    cohort.tamper = lose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "members", lambda required: connected.pop(0))
        with pytest.raises(FederationError, match="resume to try again, once more"):
            rounds(cohort.experiment, cohort)
        cohort.tamper = honest
        (record,) = rounds(cohort.experiment, cohort).rounds
    assert record.participants == ()
    assert torch.equal(weights_after(cohort.folder, 1), weights_after(cohort.folder, 0))


def test_nothing_of_an_update_stays_on_a_device_after_its_sum(tmp_path: Path) -> None:
    """Its stored reply is the keys that it sent."""
    cohort = cohort_of(tmp_path, MASKED)
    rounds(cohort.experiment, cohort)
    with Ledger.open(devices_folder(cohort.folder) / "device-00" / "ledger.sqlite") as ledger:
        stored = ledger.load_reply("tiny", 1)
    reply = cohort.replies["TrainTask", 1, 0]
    assert isinstance(reply, TrainResult) and stored == reply.payload and len(stored) < 1000


@pytest.mark.parametrize(
    ("kind", "killed_in"),
    [*(("masked", name) for name in MASKED_EXCHANGES), ("homomorphic", "decrypt"), ("homomorphic", "reveal")],
)
def test_a_server_killed_in_an_exchange_reveals_the_same_sum_when_it_resumes(
    kind: str, killed_in: str, tmp_path: Path
) -> None:
    """No device computes anything again, and each has recorded one release."""
    changes = {**MASKED, "aggregation": f"{{kind: {kind}}}"}
    calm = cohort_of(tmp_path / "calm", changes)
    rounds(calm.experiment, calm)

    def kill(member: int, task: Task, reply: Reply) -> Reply | Failure:
        if isinstance(task, ExchangeTask) and task.exchange == killed_in and member in (1, *asked_to_decrypt):
            raise KeyboardInterrupt
        return reply

    asked_to_decrypt = range(3) if killed_in == "decrypt" else ()
    cohort = cohort_of(tmp_path / "killed", changes, kill)
    with pytest.raises(KeyboardInterrupt):
        rounds(cohort.experiment, cohort)
    cohort.tamper = honest
    (record,) = rounds(cohort.experiment, cohort).rounds
    assert record.participants == ("device-00", "device-01", "device-02")
    assert torch.allclose(weights_after(cohort.folder, 1), weights_after(calm.folder, 1), atol=1e-6)
    assert [len(ledger_of(cohort, member).entries) for member in range(3)] == [1, 1, 1]


def test_the_log_of_a_masked_round_has_one_update_and_four_messages_without_a_photo(tmp_path: Path) -> None:
    """Keys, shares, the masked update with its entry, a signature, shares of masks: each is in the ledger."""
    cohort = cohort_of(tmp_path, MASKED)
    rounds(cohort.experiment, cohort)
    sent = ledger_of(cohort, 0).transmissions
    assert [each.kind for each in sent] == ["exchange", "exchange", "update", "exchange", "exchange"]
    assert [each.entry is not None for each in sent] == [False, False, True, False, False]
    assert "masked" in sent[2].protection and sent[2].masked


def test_more_devices_than_a_sum_has_room_for_take_turns(tmp_path: Path) -> None:
    """A sum has headroom for the announced number alone; a device that comes late has its turn in a later round."""
    cohort = cohort_of(tmp_path, {**THREE, "training.rounds": "2"})
    connected = [2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "members", lambda required: range(connected.pop(0)))
        patch.setattr(type(cohort.experiment), "most_devices", 2)
        rounds(cohort.experiment, cohort)
    assert [members for _, _, members in cohort.asked] == [(0, 1), (0, 2)]


def test_a_device_with_another_key_is_named_and_the_round_continues(tmp_path: Path) -> None:
    """The key that most devices have is the run's."""
    cohort = cohort_of(tmp_path, {**THREE, "aggregation": "{kind: homomorphic}"})
    experiment = cohort.experiment
    assert isinstance(config := experiment.aggregation, HomomorphicConfig)
    key = devices_folder(cohort.folder) / "device-00" / "sum.key"
    key.unlink()
    HomomorphicKeys.make(config, experiment.agreement).save(key)
    (record,) = rounds(experiment, cohort).rounds
    assert record.participants == ("device-01", "device-02")
    assert record.dropped[0].device == "device-00" and "another key" in record.dropped[0].reason


def test_with_a_public_key_one_device_decrypts_and_without_it_the_sum_stays_closed(tmp_path: Path) -> None:
    """The other devices have no secret key. A sum that none decrypts is not applied."""
    changes = {**MASKED, "aggregation": "{kind: homomorphic, public_key: true}"}
    cohort = cohort_of(tmp_path / "calm", changes)
    (record,) = rounds(cohort.experiment, cohort).rounds
    assert record.participants == ("device-00", "device-01", "device-02")
    assert [members for name, _, members in cohort.asked if name == "decrypt"] == [(0,)]

    def lose(member: int, task: Task, reply: Reply) -> Reply | Failure:
        return (
            Failure("no answer") if isinstance(task, ExchangeTask) and task.exchange == "decrypt" else reply
        )

    cohort = cohort_of(tmp_path / "lost", changes, lose)
    with pytest.raises(FederationError, match="no device with the secret key decrypted the sum"):
        rounds(cohort.experiment, cohort)


def test_replies_are_summed_as_they_arrive_and_not_stored(tmp_path: Path) -> None:
    """When the next reply arrives, none but the one before is in memory: a round needs as much for 1,000 devices."""
    alive: list[int] = []

    class Counting(LocalCohort):
        def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
            sent: list[weakref.ref[Reply | Failure]] = []
            for member, reply in super().ask(tasks):
                self.replies.clear()
                sent.append(weakref.ref(reply))
                yield member, reply
                del reply
                alive.append(sum(known() is not None for known in sent))

    changes = {
        "privacy": NO_PRIVACY,
        "training.rounds": "1",
        "devices.light_fractions": "[0.5, 0.5, 0.5, 0.5]",
    }
    experiment = tiny_experiment(tmp_path, changes)
    (record,) = rounds(
        experiment, Counting(experiment, started(experiment, tmp_path / "runs" / "tiny"))
    ).rounds
    assert len(record.participants) == 4
    assert len(alive) == 4 and max(alive) <= 1


@pytest.mark.parametrize("liars", [1, 2])
def test_a_sum_that_one_device_cannot_decrypt_is_decrypted_by_the_next(tmp_path: Path, liars: int) -> None:
    """Wrong length, then no device left: an error, and no checkpoint."""

    def tamper(member: int, task: Task, reply: Reply) -> Reply | Failure:
        decrypts = isinstance(task, ExchangeTask) and task.exchange == "decrypt"
        if decrypts and isinstance(reply, ExchangeResult) and len(lied | {member}) <= liars:
            lied.add(member)
            return replace(reply, content=reply.content[:-4])
        return reply

    lied: set[int] = set()

    cohort = cohort_of(tmp_path, {"aggregation": "{kind: homomorphic}"}, tamper)
    if liars == 1:
        assert len(rounds(cohort.experiment, cohort).rounds) == 1
    else:
        with pytest.raises(FederationError, match="no device with the secret key decrypted the sum"):
            rounds(cohort.experiment, cohort)
        assert not weights_path(cohort.folder, 1).exists()
    asked = [members for name, _, members in cohort.asked if name == "decrypt"]
    assert sorted(asked) == [(0,), (1,)]


def test_updates_whose_sum_overflows_leave_no_broken_checkpoint(tmp_path: Path) -> None:
    """Two times 3e38 is not a float32: both devices are named, and nothing unreadable is written."""

    def tamper(member: int, task: Task, reply: Reply) -> Reply | Failure:
        if not isinstance(reply, TrainResult):
            return reply
        return replace(reply, payload=plain_bytes(torch.full_like(update_of(reply), 3e38)))

    cohort = cohort_of(tmp_path, {}, tamper)
    with pytest.raises(FederationError, match=r"device-00: expected .* got 3e\+38; device-01: expected"):
        rounds(cohort.experiment, cohort)
    assert not weights_path(cohort.folder, 1).exists()


def test_a_model_without_finite_pictures_ends_a_run_with_a_sentence() -> None:
    """Training that has diverged: no device spends more on it."""
    gan = tiny_gan()
    for module in gan.modules():
        for weights in module.parameters():
            weights.data.fill_(1e30)
    faces = torch.rand(48, 3, 16, 16)
    with pytest.raises(WeightsError, match="pictures that are not finite: its training has diverged"):
        sample_metrics(gan, ReferenceSet(faces=faces, inputs=faces, downscale=Area(4)), 0)


def test_a_damaged_or_missing_state_is_reported(tmp_path: Path) -> None:
    """With the file's name."""
    with pytest.raises(RunError, match="no run to resume"):
        RunState.read(tmp_path)
    for text in ("", "{", "{}", '{"started": "x", "rounds": [{}]}', '{"started": "x", "rounds": 3}', "[]"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(RunError, match="state.json|missing"):
            RunState.read(tmp_path)


def test_a_distance_needs_forty_faces_and_reports_it(tmp_path: Path) -> None:
    """Remote devices are compared with the probe, which may be small; the run continues."""
    faces = torch.rand(48, 3, 16, 16)
    few, enough = (
        sample_metrics(tiny_gan(), ReferenceSet(faces=faces[:n], inputs=faces, downscale=Area(4)), 0)[
            "distance"
        ]
        for n in (39, 40)
    )
    assert isinstance(few, NotMeasured) and isinstance(enough, Interval)


def test_photos_of_a_simulated_device_are_rendered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are read from its folder: the same numbers, of which a change by one round reaches no other."""
    experiment = tiny_experiment(tmp_path)
    device = first_device(experiment, tmp_path / "devices")
    rendered = device_photos(experiment, 0, 16)
    first = device.photos(16).images
    assert torch.equal(first, rendered)
    first.zero_()
    monkeypatch.setattr("fedface.simulation.devices.device_photos", None)
    assert torch.equal(device.photos(16).images, rendered)
