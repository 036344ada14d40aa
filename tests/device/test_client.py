"""One device: checks its policy, records the release, reads photos and stores its reply, in this order."""

from __future__ import annotations

import gc
import sqlite3
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import NO_PRIVACY, first_device, tiny_experiment, tiny_gan, tiny_way, train_task

from fedface.aggregation.payload import (
    AggregationConfig,
    Exchange,
    HomomorphicConfig,
    MaskedConfig,
    Payload,
    PlainConfig,
)
from fedface.aggregation.protocols import server_sum
from fedface.aggregation.sums import ServerSum
from fedface.device.client import handle_task
from fedface.device.config import PAUSED_FILE
from fedface.device.device import Device
from fedface.device.reply_time import ReplyTime
from fedface.errors import AggregationError, LedgerError, PrivacyError, WeightsError
from fedface.experiment import Experiment
from fedface.messages.messages import (
    ExchangeResult,
    ExchangeTask,
    Refusal,
    Reply,
    TrainResult,
    TrainTask,
    sum_context,
    to_message,
)
from fedface.messages.parsing import read_task
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, weights_hash
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.model import GanArchitecture
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.discrete_gaussian import DiscreteGaussian
from fedface.privacy.hash_chain import Chain
from fedface.privacy.ledger import Ledger
from fedface.privacy.participation_conditions import NOT_NOW_MESSAGE, ConditionsNotMet
from fedface.privacy.policy import Period
from fedface.randomness import SecretNoise
from fedface.simulation.devices import simulated_device
from fedface.tensor_types import Images, Vector
from fedface.training.gan import GanRound


class Disturbed(Exception):
    """A device that fails while it reads photos."""


class Killed(BaseException):
    """A device that is switched off while it reads photos."""


def unreadable(size: int) -> Images:
    """Photos on a disk that has failed."""
    raise Disturbed


def switched_off(size: int) -> Images:
    """The end of the process, which nothing catches."""
    raise Killed


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rounds under epsilon 8."""
    return tiny_experiment(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def device(experiment: Experiment, tmp_path: Path) -> Device:
    """Its first device, with a fresh ledger."""
    return first_device(experiment, tmp_path)


@pytest.fixture(scope="module")
def task(experiment: Experiment) -> TrainTask:
    """Its first round."""
    return train_task(experiment, tiny_gan())


def recorded(device: Device) -> list[tuple[str, int, int]]:
    """Run, round and attempt of each entry."""
    return [(entry.run, entry.round, entry.attempt) for entry in Ledger.open(device.ledger_path).entries()]


def test_a_reply_is_one_update_recorded_at_the_devices_own_cost(
    device: Device, task: TrainTask, experiment: Experiment
) -> None:
    """One entry; its run is paid as a whole; the payload has the model's length."""
    reply = handle_task(task, device)
    assert isinstance(reply, TrainResult) and reply.device == "device-00"
    payload = Payload.from_bytes(reply.payload)
    assert (payload.kind, payload.round, payload.count) == ("plain", 1, 1)
    assert payload.length == len(task.weights)
    assert recorded(device) == [("tiny", 1, 1)]
    spent = Ledger.open(device.ledger_path).spent(1e-3)
    assert spent == epsilon_of(experiment.plan().total_event(), 1e-3)


def test_a_repeated_task_gets_the_same_bytes_at_no_cost(device: Device, task: TrainTask) -> None:
    """A second computation would be a second release; photos are not read."""
    first = handle_task(task, device)
    second = handle_task(task, replace(device, photos=unreadable))
    assert isinstance(first, TrainResult) and isinstance(second, TrainResult)
    assert second.payload == first.payload
    assert recorded(device) == [("tiny", 1, 1)]


def test_a_stored_reply_is_not_sent_for_other_weights(device: Device, task: TrainTask) -> None:
    """A new run with an old run's name: the old update is not for the new model."""
    handle_task(task, device)
    other = tiny_gan("other")
    again = replace(task, weights=flatten_parameters(*other.modules()), model="another")
    with pytest.raises(LedgerError, match="has a reply already, for a different release"):
        handle_task(again, device)
    assert recorded(device) == [("tiny", 1, 1)]


@pytest.mark.parametrize("before", [False, True], ids=["new", "computed already"])
def test_a_paused_device_refuses_every_task(
    device: Device, task: TrainTask, caplog: pytest.LogCaptureFixture, before: bool
) -> None:
    """The server sees what it sees of any other condition; nothing is recorded as spent, and no reply is sent again."""
    if before:
        handle_task(task, device)
    entries = recorded(device)
    (device.state / PAUSED_FILE).touch()
    reply = handle_task(task, replace(device, photos=unreadable))
    assert isinstance(reply, Refusal) and reply.reason == NOT_NOW_MESSAGE and not reply.withdrawn
    assert "paused by its owner" in caplog.text
    assert recorded(device) == entries
    (device.state / PAUSED_FILE).unlink()
    assert isinstance(handle_task(task, device), TrainResult)


def test_the_release_is_recorded_before_a_photo_is_read(device: Device, task: TrainTask) -> None:
    """A crash while reading leaves the record, which covers the next attempt, because nothing was sent."""
    seen = []

    def look(size: int) -> Images:
        seen.append(recorded(device))
        raise Killed

    with pytest.raises(Killed):
        handle_task(task, replace(device, photos=look))
    assert seen == [[("tiny", 1, 1)]]
    assert isinstance(handle_task(task, device), TrainResult)
    assert recorded(device) == [("tiny", 1, 1)]


def test_a_device_without_its_state_folder_answers_nothing_and_begins_no_new_ledger(
    device: Device, task: TrainTask
) -> None:
    """A disk that is not mounted while the device runs: a new ledger would not know what was spent."""
    device.state.rename(device.state.with_name("elsewhere"))
    with pytest.raises(LedgerError, match="there is no state folder"):
        handle_task(task, device)
    assert not device.state.exists()


def test_a_spent_budget_is_a_refusal_with_three_numbers(device: Device, task: TrainTask) -> None:
    """Requested, spent, allowed; nothing is recorded and no photo is read."""
    poor = replace(device, photos=unreadable, policy=replace(device.policy, max_epsilon=0.5))
    answer = handle_task(task, poor)
    assert isinstance(answer, Refusal) and answer.device == "device-00"
    assert "requests epsilon" in answer.reason and "of 0.5 is already spent" in answer.reason
    assert recorded(device) == []


def test_a_round_that_failed_is_closed(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure may depend on the photos: it is not tried again."""

    def broken(*_: object, **__: object) -> None:
        raise Disturbed

    with monkeypatch.context() as patch:
        patch.setattr(GanRound, "update", broken)
        with pytest.raises(Disturbed):
            handle_task(task, device)
    again = handle_task(task, device)
    assert isinstance(again, Refusal) and "closed" in again.reason
    assert recorded(device) == [("tiny", 1, 1)]


def test_a_round_whose_photos_could_not_be_read_is_answered_with_noise_alone(
    device: Device, task: TrainTask
) -> None:
    """Readability may depend on the photos' content: the server learns nothing of it, and the round is recorded."""
    reply = handle_task(task, replace(device, photos=unreadable))
    assert isinstance(reply, TrainResult)
    assert handle_task(task, device) == replace(reply, seconds_protect=0.0)
    assert recorded(device) == [("tiny", 1, 1)]
    assert isinstance(handle_task(replace(task, round=2), device), TrainResult)


def test_a_failure_on_one_photo_is_answered_with_noise(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile network that fails on a certain face learns nothing: the reply is noise, and recorded."""
    real = GanRound.update

    def breaks(self: GanRound, photos: Images, **more: object) -> Vector:
        if len(photos):
            raise Disturbed
        return real(self, photos, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(GanRound, "update", breaks)
    reply = handle_task(task, device)
    assert isinstance(reply, TrainResult)
    assert Payload.from_bytes(reply.payload).length == len(task.weights)
    assert recorded(device) == [("tiny", 1, 1)]


def test_photos_are_freed_before_the_reply_without_them(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for lack of memory must not fail again because the photos are still in memory."""
    held: list[weakref.ref[DeviceDataset]] = []
    alive = []
    real = GanRound.update

    def breaks(self: GanRound, photos: Images, **more: object) -> Vector:
        if len(photos):
            raise MemoryError
        gc.collect()
        alive.append(held[0]() is not None)
        return real(self, photos, **more)  # type: ignore[arg-type]

    def photos(size: int) -> DeviceDataset:
        own = device.photos(size)
        held.append(weakref.ref(own))
        return own

    monkeypatch.setattr(GanRound, "update", breaks)
    assert isinstance(handle_task(task, replace(device, photos=photos)), TrainResult)
    assert alive == [False]


def test_three_killed_computations_are_free_and_a_fourth_is_recorded(device: Device, task: TrainTask) -> None:
    """Crashes are free because power fails; but a network that kills devices depending on photos must not be free
    forever.
    """
    rich = replace(device, policy=replace(device.policy, max_epsilon=100.0))
    for _ in range(4):
        with pytest.raises(Killed):
            handle_task(task, replace(rich, photos=switched_off))
    assert recorded(device) == [("tiny", 1, 1), ("tiny", 1, 2)]


@pytest.mark.parametrize(
    ("stricter", "words"),
    [
        ({"protocols": ("homomorphic",)}, "requests updates as"),
        ({"objectives": ()}, "requests training of"),
        ({"min_cohort_size": 5}, "only among 5"),
        ({"expires": "2020-01-01"}, "ended"),
    ],
)
def test_a_stricter_policy_applies_to_stored_replies(
    device: Device, task: TrainTask, stricter: dict[str, object], words: str
) -> None:
    """A reply computed under an earlier policy is not sent against today's."""
    handle_task(task, device)
    reply = handle_task(task, replace(device, policy=replace(device.policy, **stricter)))  # type: ignore[arg-type]
    assert isinstance(reply, Refusal) and words in reply.reason


def test_sums_are_decrypted_only_until_the_policy_expires(device: Device, task: TrainTask) -> None:
    """From the day after the last one everything is refused."""
    handle_task(task, device)
    ended = replace(device, policy=replace(device.policy, expires="2020-01-01"))
    asked = ExchangeTask(
        run="tiny",
        round=1,
        aggregation=task.config.aggregation,
        agreement=task.config.agreement,
        exchange="decrypt",
        content=b"",
    )
    reply = handle_task(asked, ended)
    assert isinstance(reply, Refusal) and "ended" in reply.reason


def test_a_rolled_back_ledger_is_detected_by_its_head_or_its_witness(
    device: Device, task: TrainTask, tmp_path: Path
) -> None:
    """If file and head are rolled back together, only the witness detects it."""
    device = replace(device, witness=tmp_path / "disk")
    handle_task(task, device)
    stored = [(path, path.read_bytes()) for path in sorted(device.state.glob("ledger.sqlite*"))]
    handle_task(replace(task, round=2), device)
    for path, content in stored:
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="rolled back"):
            handle_task(replace(task, round=3), replace(device, photos=unreadable))


def test_weights_with_a_false_hash_are_refused_before_anything_is_recorded(
    device: Device, task: TrainTask
) -> None:
    """The device computes the hash that the ledger records."""
    other = replace(task, weights=flatten_parameters(*tiny_gan("other").modules()))
    with pytest.raises(WeightsError, match=f"states weights {task.model}"):
        handle_task(other, replace(device, photos=unreadable))
    assert recorded(device) == []


def test_a_recorded_round_without_a_reply_covers_only_the_same_task(device: Device, task: TrainTask) -> None:
    """Another rate at the same cost, or other weights, are recorded again; the original task is not."""
    other = tiny_gan("other")
    weights = replace(
        task,
        weights=flatten_parameters(*other.modules()),
        buffers=flatten_buffers(*other.modules()),
        model=weights_hash(*other.modules()),
    )
    training = replace(task.config.training, discriminator_lr=1e-5)  # type: ignore[call-arg]
    recipe = replace(task, config=replace(task.config, training=training))
    rich = replace(device, photos=switched_off, policy=replace(device.policy, max_epsilon=100.0))
    for asked, attempts in ((task, 1), (task, 1), (weights, 2), (recipe, 3), (recipe, 3)):
        with pytest.raises(Killed):
            handle_task(asked, rich)
        assert recorded(device) == [("tiny", 1, attempt + 1) for attempt in range(attempts)]


def test_huge_networks_are_refused_before_memory_is_allocated(device: Device, task: TrainTask) -> None:
    """A terabyte of weights in a header, with the vector of a tiny model; also through the wire."""
    shape = GanArchitecture(
        generator=StyleGAN2Config(size=1024, channel_base=2**24, channel_max=2**14),
        discriminator=DiscriminatorConfig(size=1024, channel_base=2**24, channel_max=2**14),
    )
    huge = read_task(to_message(replace(task, config=replace(task.config, architecture=shape))))
    with pytest.raises(WeightsError, match="got a vector of shape"):
        handle_task(huge, replace(device, photos=unreadable))
    assert recorded(device) == []


def test_the_last_affordable_round_is_answered_and_the_next_is_not(
    device: Device, task: TrainTask, experiment: Experiment
) -> None:
    """Two rounds fit the budget; a crash in each costs nothing more, and a third round is refused."""
    crashed = replace(device, photos=switched_off)
    for number in (1, 2):
        with pytest.raises(Killed):
            handle_task(replace(task, round=number), crashed)
        assert isinstance(handle_task(replace(task, round=number), device), TrainResult)
    answer = handle_task(replace(task, round=3), device)
    assert isinstance(answer, Refusal) and "round 3 of tiny, which announces 2" in answer.reason
    longer = replace(task.config.dp, schedule=replace(task.config.dp.schedule, rounds=3))
    training = replace(task.config.training, rounds=3)
    answer = handle_task(
        replace(task, round=3, config=replace(task.config, dp=longer, training=training)), device
    )
    assert isinstance(answer, Refusal) and "was recorded with other" in answer.reason
    assert recorded(device) == [("tiny", 1, 1), ("tiny", 2, 1)]
    spent = Ledger.open(device.ledger_path).spent(1e-3).upper
    assert spent <= device.policy.max_epsilon


@pytest.mark.parametrize(
    ("policy", "cohort", "words"),
    [
        ({"protocols": ("homomorphic",)}, 2, 'requests updates as "plain"; this device allows homomorphic'),
        ({"min_cohort_size": 3}, 2, "may sum only 2 devices; this device takes part only among 3 or more"),
        ({"objectives": ("upsampler",)}, 2, 'requests training of "generator"; this device allows upsampler'),
    ],
)
def test_what_the_owner_did_not_allow_is_refused(
    device: Device, task: TrainTask, policy: dict[str, object], cohort: int, words: str
) -> None:
    """A refusal with a reason; nothing is read and nothing is recorded."""
    strict = replace(device, photos=unreadable, policy=replace(device.policy, **policy))  # type: ignore[arg-type]
    answer = handle_task(replace(task, cohort=cohort), strict)
    assert isinstance(answer, Refusal) and words in answer.reason
    assert recorded(device) == []


def test_a_sum_that_this_device_would_not_decrypt_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    """Eight devices are asked, but a sum of two may be opened: the owner's three are stated at once."""
    _, device, task = hidden_round(tmp_path)
    careful = replace(device, policy=replace(device.policy, min_cohort_size=3))
    answer = handle_task(replace(task, cohort=8), careful)
    assert isinstance(answer, Refusal) and "may sum only 2 devices" in answer.reason
    assert recorded(device) == []
    three = replace(task.config, aggregation=HomomorphicConfig(min_devices=3))
    assert isinstance(handle_task(replace(task, cohort=8, config=three), careful), TrainResult)


def test_a_run_without_dp_is_refused_unless_allowed(tmp_path: Path, device: Device) -> None:
    """Epsilon infinite, and the owner's limit."""
    no_dp_allowed = tiny_experiment(tmp_path / "recipe", {"privacy": NO_PRIVACY})
    answer = handle_task(train_task(no_dp_allowed, tiny_gan()), replace(device, photos=unreadable))
    assert isinstance(answer, Refusal) and "requests epsilon inf" in answer.reason
    assert recorded(device) == []


@pytest.mark.parametrize(
    "change", [{"steps_per_round": 9}, {"sampling_rate": 1.0}, {"clip_norm": 1e6}, {"rounds": 1}]
)
def test_forged_parameters_are_refused(device: Device, task: TrainTask, change: dict[str, float]) -> None:
    """DP parameters of low cost with a training schedule of high cost: nothing is computed."""
    training = replace(task.config.training, **change)  # type: ignore[arg-type]
    forged = replace(task, config=replace(task.config, training=training))
    with pytest.raises(PrivacyError, match="differ"):
        handle_task(forged, replace(device, photos=unreadable))
    assert recorded(device) == []


def test_the_cost_is_computed_from_the_noise_of_the_task(device: Device, task: TrainTask) -> None:
    """A server that sends less noise is charged for it."""
    quiet = replace(task.config.dp, noise_multiplier=0.01)
    assert quiet.noise_multiplier < task.config.dp.noise_multiplier
    answer = handle_task(
        replace(task, config=replace(task.config, dp=quiet)), replace(device, photos=unreadable)
    )
    assert isinstance(answer, Refusal)


def test_weights_that_do_not_fit_cost_nothing(device: Device, task: TrainTask) -> None:
    """A wrong vector is refused before anything is recorded."""
    with pytest.raises(WeightsError, match="weights, got a vector"):
        handle_task(replace(task, weights=torch.zeros(3)), replace(device, photos=unreadable))
    assert recorded(device) == []


def test_a_missing_key_costs_nothing(device: Device, task: TrainTask) -> None:
    """An encrypted run on a device that was not given its key."""
    hidden = replace(task, config=replace(task.config, aggregation=HomomorphicConfig()))
    open_minded = replace(
        device, photos=unreadable, policy=replace(device.policy, protocols=("homomorphic",))
    )
    with pytest.raises(AggregationError, match="cannot read this key file"):
        handle_task(hidden, open_minded)
    assert recorded(device) == []


def test_the_update_does_not_depend_on_the_global_seed(tmp_path: Path) -> None:
    """Without DP everything is reproducible: two devices of one name send the same bytes."""
    experiment = tiny_experiment(tmp_path / "recipe", {"privacy": NO_PRIVACY})
    sent = []
    for place in ("a", "b"):
        torch.rand(3)
        reply = handle_task(train_task(experiment, tiny_gan()), first_device(experiment, tmp_path / place))
        assert isinstance(reply, TrainResult)
        sent.append(reply.payload)
    assert sent[0] == sent[1]


def hidden_round(tmp_path: Path) -> tuple[Experiment, Device, TrainTask]:
    """A device of an encrypted run."""
    experiment = tiny_experiment(tmp_path / "recipe", {"aggregation": "{kind: homomorphic}"})
    return experiment, first_device(experiment, tmp_path / "states"), train_task(experiment, tiny_gan())


def exchange_task(task: TrainTask, exchange: Exchange, content: bytes) -> ExchangeTask:
    """One exchange of the sum of a round."""
    return ExchangeTask(
        run=task.run,
        round=task.round,
        aggregation=task.config.aggregation,
        agreement=task.config.agreement,
        exchange=exchange,
        content=content,
    )


def test_a_device_decrypts_one_sum_of_a_round_that_it_took_part_in(tmp_path: Path) -> None:
    """Its own update and another device's; the server reads their sum, and no request after it is answered."""
    experiment, device, task = hidden_round(tmp_path)
    devices = device, simulated_device(experiment, 1, tmp_path / "states")
    context = sum_context(task)
    server = server_sum(experiment.aggregation, experiment.agreement, context, len(task.weights))
    for member, each in enumerate(devices):
        reply = handle_task(replace(task, cohort=2), each)
        assert isinstance(reply, TrainResult) and len(reply.payload) < 1000  # keys alone
        server.accept(member, Payload.from_bytes(reply.payload), each.name)
    decrypted: dict[Device, ExchangeTask] = {}
    for request in server.exchanges():
        for member, content in request.contents.items():
            asked = exchange_task(task, request.exchange, content)
            answer = handle_task(asked, devices[member])
            assert isinstance(answer, ExchangeResult)
            request.receive(member, answer.content)
            if request.exchange == "decrypt":
                decrypted[devices[member]] = asked
    result = server.result()
    assert result.members == {0, 1} and float(result.total.abs().max()) <= 2
    ((holder, asked),) = decrypted.items()
    for changed, reason in (
        (replace(asked, run="another"), "no part in the sum of round 1 of another"),
        (replace(asked, content=asked.content + b"0"), "it is answered once"),
        (replace(asked, aggregation=HomomorphicConfig(min_devices=3)), "other settings than agreed"),
    ):
        refused = handle_task(changed, holder)
        assert isinstance(refused, Refusal) and reason in refused.reason


@pytest.fixture
def masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MaskedRounds:
    """Two devices of runs with masked sums, and their clock."""
    experiment = tiny_experiment(tmp_path / "recipe", {"aggregation": "{kind: masked}"})
    first = first_device(experiment, tmp_path / "states")
    found = MaskedRounds(experiment, [first, simulated_device(experiment, 1, tmp_path / "states")])
    monkeypatch.setattr(Device, "ledger", lambda self: Ledger.open(self.ledger_path, now=lambda: found.now))
    return found


@dataclass
class MaskedRounds:
    """Sums that a server leaves waiting before it asks for the vectors."""

    experiment: Experiment
    devices: list[Device]
    now: datetime = datetime(2027, 1, 1, tzinfo=UTC)

    def begun(self, run: str) -> tuple[TrainTask, ServerSum]:
        """The devices have computed their vectors, and sent keys."""
        task = replace(train_task(self.experiment, tiny_gan(), run=run), cohort=2)
        server = server_sum(
            self.experiment.aggregation, self.experiment.agreement, sum_context(task), len(task.weights)
        )
        for member, device in enumerate(self.devices):
            reply = handle_task(task, device)
            assert isinstance(reply, TrainResult), reply
            server.accept(member, Payload.from_bytes(reply.payload), device.name)
        return task, server

    def asked(self, task: TrainTask, server: ServerSum) -> Iterator[tuple[Exchange, Reply]]:
        """Each exchange and the reply to it, of one device after the other."""
        for request in server.exchanges():
            for member, content in request.contents.items():
                reply = handle_task(exchange_task(task, request.exchange, content), self.devices[member])
                yield request.exchange, reply
                if isinstance(reply, ExchangeResult):
                    request.receive(member, reply.content)

    def until(self, exchange: Exchange, task: TrainTask, server: ServerSum) -> Reply:
        """The first reply to an exchange."""
        return next(reply for name, reply in self.asked(task, server) if name == exchange)


def test_masked_vectors_of_three_weeks_do_not_leave_in_one(masked: MaskedRounds) -> None:
    """A budget for one run in any seven days: a server that hoards sums and asks for all at once gets the last one."""
    price = epsilon_of(masked.experiment.plan().total_event(), 1e-3).upper
    policy = replace(
        masked.devices[0].policy, max_epsilon=100.0, periods=(Period(days=7, epsilon=price + 1e-6),)
    )
    masked.devices = [replace(device, policy=policy) for device in masked.devices]
    sums = []
    for run in ("a", "b", "c"):
        masked.now += timedelta(days=9)
        sums.append(masked.begun(run))
    assert isinstance(masked.until("masked", *sums[2]), ExchangeResult)
    for task, server in sums[:2]:
        for exchange in ("masked", "survivors", "reveal", "masked"):
            if exchange == "masked":
                reply = masked.until("masked", task, server)
                assert isinstance(reply, Refusal) and "was computed in an earlier period" in reply.reason
            else:  # what follows the vector would close the round
                reply = handle_task(exchange_task(task, exchange, b""), masked.devices[0])  # type: ignore[arg-type]
                assert isinstance(reply, Refusal) and "this device's vector is not in the sum" in reply.reason
    sent = Ledger.open(masked.devices[0].ledger_path).read().transmissions
    assert [line.run for line in sent if line.kind == "update"] == ["c"]


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_masked_vector_stays_where_the_owner_has_changed_the_policy(
    masked: MaskedRounds, asked_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer was stored, and the power failed before it was sent. A larger budget changes nothing."""
    task, server = masked.begun("a")
    allowed = masked.devices[0].policy
    generous = replace(allowed, max_epsilon=99.0, hours=("00:00-23:59",))
    masked.devices = [replace(device, policy=generous) for device in masked.devices]
    replies = masked.asked(task, server)
    if asked_before:
        with monkeypatch.context() as patch, pytest.raises(Killed):

            def killed(*given: object) -> None:
                if given[2].entry is not None:  # type: ignore[attr-defined]
                    raise Killed

            patch.setattr(Ledger, "record_transmission", lambda *given: killed(*given))
            list(replies)
    strict = replace(allowed, exclude_folders=(Path("private"),))
    masked.devices = [replace(device, policy=strict) for device in masked.devices]
    with pytest.raises(AggregationError, match="the owner has changed the policy"):
        list(masked.asked(task, server))
    sent = Ledger.open(masked.devices[0].ledger_path).read().transmissions
    assert "update" not in [line.kind for line in sent]


def test_a_device_that_slept_for_more_than_a_day_before_it_could_reply_sends_nothing(
    masked: MaskedRounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger says when: a period counts the reply from then."""

    def sleep(self: ReplyTime) -> None:
        masked.now += timedelta(days=1, seconds=1)

    monkeypatch.setattr(ReplyTime, "wait", sleep)
    with pytest.raises(LedgerError, match="slept for more than a day"):
        masked.begun("a")


def test_a_device_decrypts_nothing_before_its_own_vector_has_left(tmp_path: Path) -> None:
    """Straight after training: what follows the vector is answered to those that have it."""
    _, device, task = hidden_round(tmp_path)
    reply = handle_task(task, device)
    assert isinstance(reply, TrainResult)
    for exchange in ("survivors", "decrypt", "reveal"):
        refused = handle_task(exchange_task(task, exchange, reply.payload), device)  # type: ignore[arg-type]
        assert isinstance(refused, Refusal) and "this device's vector is not in the sum" in refused.reason


def test_a_device_tries_to_decrypt_once(tmp_path: Path) -> None:
    """Attempts that fail tell a server about the key; the right sum after a false one is refused."""
    experiment, device, task = hidden_round(tmp_path)
    devices = device, simulated_device(experiment, 1, tmp_path / "states")
    server = server_sum(experiment.aggregation, experiment.agreement, sum_context(task), len(task.weights))
    for member, each in enumerate(devices):
        reply = handle_task(replace(task, cohort=2), each)
        assert isinstance(reply, TrainResult)
        server.accept(member, Payload.from_bytes(reply.payload), each.name)
    for request in server.exchanges():
        for member, content in request.contents.items():
            asked = exchange_task(task, request.exchange, content)
            if request.exchange == "decrypt":
                with pytest.raises(AggregationError):
                    handle_task(replace(asked, content=content[:-1]), devices[member])
                again = handle_task(replace(asked, content=content[:-1]), devices[member])
                assert isinstance(again, Refusal) and "could not decrypt" in again.reason
                other = handle_task(asked, devices[member])
                assert isinstance(other, Refusal) and "it is answered once" in other.reason
                return
            answer = handle_task(asked, devices[member])
            assert isinstance(answer, ExchangeResult)
            request.receive(member, answer.content)


def test_a_ledger_rolled_back_to_before_a_reply_is_detected(
    device: Device, task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied between record and reply, and restored: one record would cover two replies."""
    device = replace(device, witness=tmp_path / "disk")
    copies: dict[Path, bytes] = {}
    begin = Ledger.record_attempt

    def copied(self: Ledger, run: str, round: int, *, attempt: int) -> None:
        for file in (device.ledger_path, device.ledger_path.with_name("ledger.sqlite.head")):
            copies[file] = file.read_bytes()
        begin(self, run, round, attempt=attempt)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record_attempt", copied)
        assert isinstance(handle_task(task, device), TrainResult)
    assert len(copies) == 2
    for file, content in copies.items():
        file.write_bytes(content)
        with pytest.raises(LedgerError, match="rolled back"):
            handle_task(task, device)


def test_one_task_opens_and_verifies_the_ledger_once(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy, release, attempt, reply and transmission share one connection and one verification."""
    handle_task(task, device)
    connections, passes = [], []
    connect, verify = sqlite3.connect, Chain._verify_records

    def connecting(*args: object, **more: object) -> sqlite3.Connection:
        connections.append(args)
        return connect(*args, **more)  # type: ignore[call-overload, no-any-return]

    def verifying(self: Chain, sql: sqlite3.Connection) -> None:
        verify(self, sql)
        passes.append(len(self._records))

    monkeypatch.setattr(sqlite3, "connect", connecting)
    monkeypatch.setattr(Chain, "_verify_records", verifying)
    assert isinstance(handle_task(replace(task, round=2), device), TrainResult)
    assert len(connections) == 1 and passes == [
        5
    ]  # run, release, attempt, answer and transmission of round 1


def test_a_round_while_photos_cannot_be_read_is_postponed_at_no_cost(device: Device, task: TrainTask) -> None:
    def scanning() -> None:
        raise ConditionsNotMet("the photos are being scanned")

    reply = handle_task(task, replace(device, ready=scanning))
    assert (
        isinstance(reply, Refusal) and "scanned" not in reply.reason and "not take part now" in reply.reason
    )
    assert not device.ledger().entries()


@pytest.mark.parametrize("way", ["full", "lora", "prior", "flow", "styles", "resolver"])
def test_noise_does_not_follow_from_the_task(tmp_path: Path, way: str) -> None:
    """The same task, name and photos on two fresh devices give different bytes: no seed of the run keys the noise."""
    experiment = tiny_way(tmp_path / "recipe", way)
    task = train_task(experiment, experiment.start())
    payloads = []
    for state in ("one", "two"):
        reply = handle_task(task, first_device(experiment, tmp_path / state))
        assert isinstance(reply, TrainResult)
        payloads.append(reply.payload)
    assert payloads[0] != payloads[1]


def test_a_device_computes_one_reply_at_a_time(device: Device, task: TrainTask) -> None:
    """Two at once would see each other's work in the load, in waiting times and in the lock of a scan."""
    inside, most = [0], [0]

    def photos(size: int) -> DeviceDataset:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return device.photos(size)

    with ThreadPoolExecutor(2) as pool:
        busy = replace(device, photos=photos)
        replies = list(pool.map(lambda round: handle_task(replace(task, round=round), busy), (1, 2)))
    assert all(isinstance(reply, TrainResult) for reply in replies) and most == [1]


def test_a_device_whose_noise_is_not_what_is_priced_records_nothing(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedface.training.dp_sgd.add_noise", lambda *given: 0.9 * add_noise(*given))
    with pytest.raises(PrivacyError, match="the noise has mean"):
        handle_task(task, device)
    assert not device.ledger().entries()


def with_distributed_noise(
    task: TrainTask, device: Device, aggregation: AggregationConfig
) -> tuple[TrainTask, Device]:
    """A round whose noise the devices share, per library, and a device whose owner admits it."""
    dp = replace(task.config.dp, unit="library", noise="distributed", honest_devices=1)
    policy = replace(device.policy, protocols=(aggregation.kind,), max_epsilon=1e4)
    shared = replace(task, config=replace(task.config, dp=dp, aggregation=aggregation))
    return shared, replace(device, policy=policy)


@pytest.mark.parametrize("aggregation", [PlainConfig(), HomomorphicConfig()])
def test_a_device_sends_no_share_of_noise_where_single_updates_can_be_seen(
    device: Device, task: TrainTask, aggregation: AggregationConfig
) -> None:
    """By the server in plain sums, in homomorphic ones by all who have the key; nothing is recorded."""
    shared, willing = with_distributed_noise(task, device, aggregation)
    with pytest.raises(PrivacyError, match=f"distributed noise needs masked sums.*got {aggregation.kind}"):
        handle_task(shared, replace(willing, photos=unreadable))
    assert recorded(device) == []


def test_a_device_whose_share_of_the_noise_is_not_what_is_priced_records_nothing(
    device: Device, task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes part with its whole share, and not with nine tenths of it."""
    shared, willing = with_distributed_noise(task, device, MaskedConfig())
    sample = DiscreteGaussian.sample

    def quieter(self: DiscreteGaussian, count: int, rng: SecretNoise) -> np.ndarray:
        return sample(self, count, rng) * 9 // 10

    with monkeypatch.context() as patch:
        patch.setattr(DiscreteGaussian, "sample", quieter)
        with pytest.raises(PrivacyError, match="this device's share of the noise has standard deviation"):
            handle_task(shared, willing)
    assert recorded(device) == []
    assert isinstance(handle_task(shared, willing), TrainResult)
