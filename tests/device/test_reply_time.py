"""Replies leave at times that follow from public numbers: photos, their number and a failure on them show nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binom
from tiny import evaluate_task, first_device, tiny_experiment, tiny_gan, train_task

from fedface.device import client, reply_time
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.device.reply_time import OVERFLOW_PROBABILITY, ReplyTime, photos_per_step, reading_seconds
from fedface.errors import ConfigError, WeightsError
from fedface.experiment import Experiment
from fedface.messages.messages import ExchangeTask, Refusal, TrainResult, TrainTask
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.mechanism import ROUND_FLOOR_MULTIPLIER
from fedface.training import per_example_gradients

MICROBATCH = 16  # of photos that are differentiated together


class VirtualClock:
    """Time that passes only in work and sleep."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.set_forward = 0.0

    def time(self) -> float:
        return self.now + self.set_forward

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """A clock on which each microbatch of gradients takes 7 seconds, and nothing else takes any time."""
    clock, padded = VirtualClock(), per_example_gradients._padded

    def slow(images: torch.Tensor, microbatch: int) -> torch.Tensor:
        clock.sleep(7.0)
        return padded(images, microbatch)

    monkeypatch.setattr(per_example_gradients, "_padded", slow)
    monkeypatch.setattr(reply_time, "time", clock)
    monkeypatch.setattr(client, "time", clock)
    return clock


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """One in which every photo joins every step, so that a photo more is a photo more in each."""
    return tiny_experiment(
        tmp_path_factory.mktemp("recipe"), changes={"training.sampling_rate": "1.0", "training.rounds": "3"}
    )


@pytest.fixture
def task(experiment: Experiment) -> TrainTask:
    """Its first round."""
    return train_task(experiment, tiny_gan())


@pytest.fixture
def device_of(experiment: Experiment, tmp_path: Path) -> Callable[[int], Device]:
    """A fresh real device with that many photos."""

    def make(count: int) -> Device:
        images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        own = DeviceDataset.independent(images)
        device = first_device(experiment, tmp_path / str(count))
        return replace(device, photos=lambda size: own, answer_seconds=60.0, max_photos=40)

    return make


def auc(without: list[float], with_photo: list[float]) -> float:
    """The probability that a reply with the photo takes longer, ties counted half."""
    pairs = list(product(without, with_photo))
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


def durations(device: Device, task: TrainTask, clock: VirtualClock, rounds: int = 2) -> list[float]:
    """Seconds from a request at the start of a minute to its reply, for each round."""
    times = []
    for number in range(1, rounds + 1):
        clock.now = 60.0 * (clock.now // 60.0 + 1)
        started = clock.now
        assert isinstance(handle_task(replace(task, round=number), device), TrainResult)
        times.append(clock.now - started)
    return times


def test_one_photo_more_changes_the_work_and_not_the_time(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """As a test for the 17th photo, the time has AUC 1 at once, and 0.5 where replies wait, which the price allows."""
    at_once = [
        durations(replace(device_of(n), answer_seconds=0.0), task, clock)
        for n in (MICROBATCH, MICROBATCH + 1)
    ]
    allowed = NormalDist().cdf(
        1 / (ROUND_FLOOR_MULTIPLIER * math.sqrt(2))
    )  # of a Gaussian release: Dong et al. 2019
    assert auc(*at_once) == 1.0 > allowed
    waited = [durations(device_of(n), task, clock) for n in (MICROBATCH - 1, MICROBATCH + 2, 0, 40)]
    assert auc(*waited[:2]) == 0.5 <= allowed and waited[2] == waited[3] == waited[0]


@dataclass
class Stops:
    """A process that its owner stops while the clock goes on."""

    clock: VirtualClock
    seconds: float = 0.0

    def stop(self, seconds: float) -> None:
        """From now on, for so long."""
        self.clock.now += seconds
        self.seconds += seconds


@pytest.mark.parametrize(
    "moment", ["rehearsal", "work", "wait"], ids=["in the rehearsal", "in the work", "while it waits"]
)
def test_a_reply_is_later_by_the_slots_in_which_its_device_was_stopped(
    device_of: Callable[[int], Device],
    task: TrainTask,
    monkeypatch: pytest.MonkeyPatch,
    clock: VirtualClock,
    moment: str,
) -> None:
    """Neither the rehearsal nor the next round takes a stop for slow work, whose time would be doubled for good."""
    expected = durations(device_of(3), task, clock)
    stops = Stops(clock)
    device = replace(device_of(4), stopped_seconds=lambda: stops.seconds)
    padded, announced, sleep = per_example_gradients._padded, [], clock.sleep
    begin_work = ReplyTime.begin_work
    monkeypatch.setattr(
        ReplyTime, "begin_work", lambda self, seconds: announced.append(1) or begin_work(self, seconds)
    )

    def computing(images: torch.Tensor, microbatch: int) -> torch.Tensor:
        if not stops.seconds and moment == ("work" if announced else "rehearsal"):
            stops.stop(1000.0)
        return padded(images, microbatch)

    def waiting(seconds: float) -> None:
        if not stops.seconds and moment == "wait" and seconds > 10:
            stops.stop(1000.0)
            seconds = max(0.0, seconds - 1000.0)
        sleep(seconds)

    monkeypatch.setattr(per_example_gradients, "_padded", computing)
    monkeypatch.setattr(clock, "sleep", waiting)
    times = durations(device, task, clock)
    assert times[0] == expected[0] + 17 * 60.0  # 1000 s, in whole minutes
    assert times[1] == expected[1]


@pytest.mark.parametrize("moment", ["work", "wait"], ids=["in the work", "while it waits"])
@pytest.mark.parametrize("days", [400, -400])
def test_a_laptop_that_sleeps_and_a_clock_that_is_set_delay_no_reply(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock, moment: str, days: int
) -> None:
    """The time that neither the work nor the wait took is not doubled, and later rounds do not take as long."""
    expected = durations(device_of(3), task, clock)
    device, sleep = device_of(4), clock.sleep

    def jump() -> None:
        clock.set_forward = days * 86_400.0

    def photos(size: int) -> DeviceDataset:
        if moment == "work":
            jump()
        return device.photos(size)

    def waiting(seconds: float) -> None:
        if moment == "wait" and seconds > 10:
            jump()
        sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "sleep", waiting)
        assert durations(replace(device, photos=photos), task, clock) == expected


def test_a_failed_computation_leaves_when_any_other_does(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """Photos on which the computation fails are answered with noise alone, not sooner or later."""

    def broken(size: int) -> DeviceDataset:
        raise MemoryError

    failing = replace(device_of(3), photos=broken)
    assert durations(failing, task, clock) == durations(device_of(4), task, clock)


def test_an_exchange_leaves_at_a_whole_second(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """A sum needs four of them, and none works on a photo."""
    agreed = task.config
    exchange = ExchangeTask(
        run="x", round=1, aggregation=agreed.aggregation, agreement=agreed.agreement, exchange="shares", content=b""
    )  # fmt: skip
    clock.now = 1_000.25
    assert isinstance(handle_task(exchange, device_of(2)), Refusal)
    assert clock.now == 1_002.0


def test_an_error_leaves_at_a_public_time_too(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """Weights other than those that the task states: the reply does not show how long the ledger took to say more."""
    clock.now = started = 60.0 * (clock.now // 60.0 + 1)
    with pytest.raises(WeightsError, match="the task states weights"):
        handle_task(replace(task, model="another"), device_of(3))
    assert clock.now - started == 60.0


def test_a_round_that_fails_on_grey_images_is_refused_before_it_is_recorded(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """A lack of memory shows without a photo, and costs nothing."""

    def no_memory(images: torch.Tensor, microbatch: int) -> torch.Tensor:
        raise MemoryError("no memory")

    monkeypatch.setattr(per_example_gradients, "_padded", no_memory)
    device = device_of(3)
    with pytest.raises(ConfigError, match="fails already on 40 grey images: no memory"):
        handle_task(task, device)
    assert not device.ledger().entries()


def test_each_round_is_rehearsed_with_its_own_weights(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """Weights decide how fast a network is: those near 3e38 overflow, and photos are then computed one by one."""
    times = []
    for photos in (11, 12):
        device = device_of(photos)
        durations(device, task, clock, rounds=1)
        with monkeypatch.context() as patch:
            patch.setattr(
                "fedface.training.gan.with_deterministic_microbatch",
                lambda problem, shape: replace(problem, microbatch=1),
            )
            clock.now = 60.0 * (clock.now // 60.0 + 1)
            started = clock.now
            assert isinstance(handle_task(replace(task, round=2), device), TrainResult)
            times.append(clock.now - started)
    assert times[0] == times[1]


def test_a_library_that_does_not_fit_into_memory_is_refused_before_it_is_recorded(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """There must be room for all faces that the device file allows, not only for those of a step."""
    grey = client._grey_images

    def in_little_memory(count: int, size: int) -> DeviceDataset:
        if count > 79:
            raise MemoryError("no memory")
        return grey(count, size)

    monkeypatch.setattr(client, "_grey_images", in_little_memory)
    assert isinstance(handle_task(task, replace(device_of(3), max_photos=39)), TrainResult)
    device = device_of(4)
    with pytest.raises(ConfigError, match="grey images: no memory"):
        handle_task(task, device)
    assert not device.ledger().entries()


def test_rehearsal_and_round_use_one_decision(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """How many photos are differentiated at once, which decides the time, where a second check would differ."""
    found, used, padded = iter([True, False, False]), set(), per_example_gradients._padded
    monkeypatch.setattr(per_example_gradients, "_deterministic", {})
    monkeypatch.setattr(
        per_example_gradients, "_is_deterministic", lambda *given, zero_shows: not zero_shows or next(found)
    )
    monkeypatch.setattr(
        per_example_gradients, "_padded", lambda images, size: used.add(size) or padded(images, size)
    )
    assert isinstance(handle_task(task, device_of(3)), TrainResult)
    assert used == {MICROBATCH}


def test_a_round_of_a_day_is_refused(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """A stored reply expires after a day, which would show how long the work took."""
    monkeypatch.setattr(per_example_gradients, "_padded", lambda images, size: clock.sleep(9_000) or images)
    with pytest.raises(ConfigError, match="at most 12 are allowed"):
        handle_task(task, device_of(3))


def test_a_reply_stored_before_a_power_failure_leaves_no_sooner(
    device_of: Callable[[int], Device], task: TrainTask, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """Whether the work had ended when the power failed does not show."""

    class PowerFailure(BaseException):
        pass

    def fails(self: ReplyTime) -> None:
        raise PowerFailure

    device, times = device_of(3), []
    for number, when in (
        (1, "fedface.device.client.ReplyTime.wait"),
        (2, "fedface.privacy.ledger.Ledger.store_reply"),
    ):
        with monkeypatch.context() as patch, pytest.raises(PowerFailure):
            patch.setattr(when, lambda *given, **more: fails(given[0]))
            patch.setattr(ReplyTime, "wait", fails if number == 1 else lambda self: None)
            handle_task(replace(task, round=number), device)
        clock.now = 60.0 * (clock.now // 60.0 + 1)
        started = clock.now
        assert isinstance(handle_task(replace(task, round=number), device), TrainResult)
        times.append(clock.now - started)
    assert abs(times[0] - times[1]) <= 60.0  # but for the rehearsal, which is public


def test_a_reply_leaves_after_twice_the_time_of_all_steps_and_that_of_reading(
    tmp_path: Path, clock: VirtualClock
) -> None:
    """One image first, 7 s; a step on 40 takes 21 s, and a round has 3; 40 photos are read in 20 s."""
    changes = {"training.sampling_rate": "1.0", "training.steps_per_round": "3"}
    experiment = tiny_experiment(tmp_path / "recipe", changes=changes)
    device = first_device(experiment, tmp_path / "devices")
    started = clock.now
    handle_task(train_task(experiment, tiny_gan()), replace(device, answer_seconds=1.0, max_photos=40))
    assert clock.now - started == 7.0 + 21.0 + 2 * 3 * 21.0 + 20.0


def test_occasions_are_rehearsed_with_more_photos_than_single_photos_would_be(
    tmp_path: Path, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Photos of an occasion join a step together, so that their number varies more."""
    changes = {
        "training.sampling_rate": "0.02",
        "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: occasion}",
    }
    experiment = tiny_experiment(tmp_path / "recipe", changes=changes)
    device = first_device(experiment, tmp_path / "devices")
    caplog.set_level("INFO", "fedface.device")
    handle_task(train_task(experiment, tiny_gan()), replace(device, answer_seconds=1.0, max_photos=100))
    steps = experiment.training.schedule().steps_per_round
    most = photos_per_step(100, 0.02, steps=steps, in_units=True)
    assert f"rehearsing a step on {most} grey images" in caplog.text
    assert most > photos_per_step(100, 0.02, steps=steps, in_units=False)


def test_training_is_rehearsed_with_the_photos_of_a_library_without_held_out_ones(
    tmp_path: Path, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Which photos are held out is random, and they may be few."""
    changes = {
        "training.sampling_rate": "0.02",
        "evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.3}",
    }
    experiment = tiny_experiment(tmp_path / "recipe", changes=changes)
    device = first_device(experiment, tmp_path / "devices")
    caplog.set_level("INFO", "fedface.device")
    handle_task(train_task(experiment, tiny_gan()), replace(device, answer_seconds=1.0, max_photos=60))
    steps = experiment.training.schedule().steps_per_round
    assert f"a step on {photos_per_step(60, 0.02, steps=steps, in_units=False)} grey images" in caplog.text


@pytest.mark.parametrize(("size", "seconds"), [(16, 20.0), (256, 20.0), (257, 320.0), (1024, 320.0)])
def test_reading_the_library_has_a_public_time(size: int, seconds: float) -> None:
    """40 photos: half a second each, and eight where crops are too large to be stored."""
    assert reading_seconds(40, size) == seconds


def test_a_network_that_fails_on_grey_images_is_refused(tmp_path: Path, clock: VirtualClock) -> None:
    """A rehearsal that ends early, on images that a hostile encoder rejects, would announce too short a time."""
    changes = {"evaluation": "{epsilon_fraction: 0.5, holdout_fraction: 0.5, metrics: {min_group_size: 2}}"}
    experiment = tiny_experiment(tmp_path / "recipe", changes=changes)
    device = replace(first_device(experiment, tmp_path / "devices"), answer_seconds=60.0)
    task = evaluate_task(experiment)

    def fails(self: object, photos: torch.Tensor, **more: object) -> None:
        raise ValueError("not finite")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedface.device.client.check_request", lambda *given: None)
        patch.setattr("fedface.upsampling.pulse.PulseUpsampler.upsample", fails)
        with pytest.raises(ConfigError, match="grey images: not finite"):
            handle_task(task, device)
    assert not device.ledger().entries()


def test_work_that_overruns_delays_the_later_replies_too(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """A library that takes very long to read shows that once in a run, not in every round."""
    device = device_of(17)
    first = durations(device, task, clock, rounds=1)[0]

    def slow(size: int) -> DeviceDataset:
        clock.sleep(1_000.0)
        return device.photos(size)

    times = []
    for number, photos in ((2, slow), (3, device.photos)):
        clock.now = 60.0 * (clock.now // 60.0 + 1)
        started = clock.now
        assert isinstance(
            handle_task(replace(task, round=number), replace(device, photos=photos)), TrainResult
        )
        times.append(clock.now - started)
    assert times[0] > first and times[1] == times[0]


@pytest.mark.parametrize(
    ("work", "used", "leaves"),
    [
        (0.0, 0.0, 1080.0),
        (0.0, 59.0, 1080.0),
        (0.0, 80.0, 1080.0),
        (0.0, 80.1, 1140.0),
        (0.0, 300.0, 1500.0),
        (100.0, 1.0, 1140.0),
        (100.0, 140.0, 1140.0),
        (100.0, 141.0, 1260.0),
    ],
)
def test_replies_leave_at_whole_minutes(clock: VirtualClock, work: float, used: float, leaves: float) -> None:
    """The first whole minute after the announced work, counted from the next minute; more work doubles it."""
    time = ReplyTime(60.0)
    time.begin_work(work)
    clock.sleep(used)
    time.wait()
    assert clock.now == pytest.approx(leaves)


def test_a_simulated_device_does_not_wait(clock: VirtualClock) -> None:
    """With answer_seconds 0 replies leave at once."""
    time = ReplyTime(0.0)
    clock.sleep(5.0)
    time.wait()
    assert clock.now == 1_005.0


@pytest.mark.parametrize(("library", "rate", "steps"), product((20, 200, 5_000), (0.01, 0.1, 0.5), (1, 20)))
@pytest.mark.parametrize("size", [1, 16])
def test_more_photos_than_rehearsed_are_as_rare_as_stated(
    library: int, rate: float, steps: int, size: int
) -> None:
    """The exact binomial tail is below 1e-12, for photos and for occasions of 16; the bound is not far above it."""
    bound = photos_per_step(library, rate, steps=steps, in_units=size > 1)
    units = steps * -(-library // size)
    assert bound == library or binom.sf(bound * steps // size, units, rate) <= OVERFLOW_PROBABILITY
    exact = size * binom.isf(OVERFLOW_PROBABILITY, units, rate) / steps
    assert bound <= 2.0 * exact + 10 * size


def test_a_step_that_takes_everybody_has_the_whole_library() -> None:
    """Rate 1 needs no margin."""
    assert photos_per_step(123, 1.0, steps=4, in_units=False) == 123


def test_a_server_does_not_see_how_long_protecting_took(
    device_of: Callable[[int], Device], task: TrainTask, clock: VirtualClock
) -> None:
    """A real device reports 0 seconds."""
    reply = handle_task(task, device_of(3))
    assert isinstance(reply, TrainResult) and reply.seconds_protect == 0.0
    assert not isinstance(reply, Refusal)
