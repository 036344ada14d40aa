"""Every message that leaves a device in a run with updates and metrics: what it contains and what it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
from tiny import SilentProgress, started, tiny_experiment

from fedface.aggregation.masked_server import MaskedServer
from fedface.aggregation.payload import Payload
from fedface.aggregation.sums import SumResult
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.coordinator.run import run_experiment
from fedface.experiment import Experiment, devices_folder
from fedface.messages.cohort import Cohort
from fedface.messages.messages import ExchangeTask, Failure, Message, Reply, Task, to_message
from fedface.photos.skin_tone import measure_tone
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger
from fedface.privacy.releases import event_from_json
from fedface.simulation.devices import simulated_device
from fedface.simulation.in_process import in_process_cohort

KEYS = {
    "train-result": {"kind", "version", "device", "seconds_protect"},
    "evaluate-result": {"kind", "version", "device", "seconds_protect"},
    "exchange-result": {"kind", "version", "device"},
    "refusal": {"kind", "version", "device", "reason", "withdrawn"},
}
CHANGES = {
    "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: occasion}",
    "evaluation": "{epsilon_fraction: 0.4, holdout_fraction: 0.4}",
    "aggregation": "{kind: homomorphic}",
    "upsampling": "{method: {kind: pulse, steps: 2, mapping_samples: 64}}",
}


@dataclass(frozen=True)
class Overheard:
    """A task and one device's reply."""

    task: Task
    member: int
    reply: Message


class Listening:
    """A cohort that records every reply."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort, self.heard = cohort, list[Overheard]()

    def members(self, expected: int) -> Sequence[int]:
        """As they are."""
        return self.cohort.members(expected)

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        """Forward the task and record the reply."""
        for member, answer in self.cohort.ask(tasks):
            assert not isinstance(answer, Failure), answer
            self.heard.append(Overheard(tasks[member], member, to_message(answer)))
            yield member, answer


def whole_run(folder: Path, photos_per_device: int) -> tuple[Experiment, Path, list[Overheard]]:
    """A run with updates and metrics, on devices with this many photos in occasions of three."""
    devices = (
        "{kind: synthetic-devices, light_fractions: [0.9, 0.1], "
        f"photos_per_device: {photos_per_device}, photos_per_occasion: 3}}"
    )
    experiment = tiny_experiment(folder / "recipe", {**CHANGES, "devices": devices})
    run = started(experiment, folder / "run")
    listening = Listening(in_process_cohort(experiment, devices_folder(run)))
    with quick.detection(), quick.charts():
        run_experiment(experiment, listening, run, progress=SilentProgress())
    return experiment, run, listening.heard


@pytest.fixture(scope="module")
def sums_of_metrics() -> list[np.ndarray]:
    """What the server reads of the metrics in `run`, public ranges."""
    return []


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, sums_of_metrics: list[np.ndarray]
) -> tuple[Experiment, Path, list[Overheard]]:
    """Two devices of 39 photos each."""
    read = MaskedServer.result

    def result(server: MaskedServer) -> SumResult:
        found = read(server)
        if server._context.sum_of == "metrics":
            sums_of_metrics.append(found.total.double().numpy())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedServer, "result", result)
        return whole_run(tmp_path_factory.mktemp("many"), 39)


def test_headers_contain_names_and_times_and_nothing_else(
    run: tuple[Experiment, Path, list[Overheard]],
) -> None:
    """An allow-list of keys for each kind of reply, and no number but version and seconds."""
    _, _, heard = run
    kinds = set()
    for overheard in heard:
        header = json.loads(overheard.reply.header)
        kinds.add(header["kind"])
        assert set(header) == KEYS[header["kind"]]
        assert re.fullmatch(r"device-0[01]", header["device"])
        assert set(overheard.reply.blobs) == (
            {"content"} if header["kind"] == "exchange-result" else {"payload"}
        )
    assert kinds == {"train-result", "evaluate-result", "exchange-result"}


def test_every_payload_was_recorded_with_noise_before_it_left(
    run: tuple[Experiment, Path, list[Overheard]],
) -> None:
    """One ledger entry of finite cost for each update and each evaluation; all together within the target."""
    experiment, folder, heard = run
    for number in range(2):
        ledger = Ledger.open(devices_folder(folder) / f"device-{number:02d}" / "ledger.sqlite")
        entries = {(entry.run, entry.round): entry for entry in ledger.entries()}
        answered = {(o.task.ledger_key, o.task.round) for o in heard if o.member == number and has_vector(o)}
        assert answered == set(entries) and len(entries) == len(ledger.entries()) == 4
        for entry in entries.values():
            assert 0 < epsilon_of(event_from_json(entry.event), 1e-3).lower < 8
            assert entry.metadata["unit"] == "occasion"
        assert ledger.spent(1e-3, unit="occasion").upper <= 8.0


def has_vector(overheard: Overheard) -> bool:
    """Whether the message has the device's vector, masked and encrypted."""
    return isinstance(overheard.task, ExchangeTask) and overheard.task.exchange == "masked"


def test_the_ledger_has_every_message_that_left(run: tuple[Experiment, Path, list[Overheard]]) -> None:
    """As many transmissions as replies, with the number of bytes and the entry of each."""
    _, folder, heard = run
    for number in range(2):
        ledger = Ledger.open(devices_folder(folder) / f"device-{number:02d}" / "ledger.sqlite")
        sent = ledger.read().transmissions
        answers = [o for o in heard if o.member == number]
        assert [line.bytes for line in sent] == [len(*o.reply.blobs.values()) for o in answers]
        assert [line.entry is not None for line in sent] == [has_vector(o) for o in answers]


def test_no_photo_no_name_and_no_count_is_in_any_message(
    run: tuple[Experiment, Path, list[Overheard]],
) -> None:
    """The bytes contain neither a row of a photo's pixels nor a path nor a number of photos."""
    experiment, folder, heard = run
    everything = b"".join(o.reply.header.encode() + b"".join(o.reply.blobs.values()) for o in heard)
    for number in range(2):
        own = simulated_device(experiment, number, devices_folder(folder)).photos(16)
        for photo in own.images[:: len(own) // 8]:
            row = photo[0, 8].contiguous()
            assert row.numpy().tobytes() not in everything
            assert (row * 255).round().to(torch.uint8).numpy().tobytes() not in everything
    assert str(folder).encode() not in everything
    headers = [re.sub(r'"seconds_protect": [0-9.e-]+', "", o.reply.header) for o in heard]
    assert not any(
        re.search(r"\b(39|13)\b", header) for header in headers
    )  # photos and occasions of a device


def test_messages_of_a_larger_library_have_the_same_form_and_size(
    run: tuple[Experiment, Path, list[Overheard]], tmp_path: Path
) -> None:
    """Thirty more photos change no key, no length and no order."""
    _, _, few = run
    _, _, many = whole_run(tmp_path, 69)

    def form(heard: list[Overheard]) -> list[object]:
        return [(o.member, json.loads(o.reply.header)["kind"], _parts(o.reply)) for o in heard]

    def _parts(reply: Message) -> object:
        payload = Payload.from_bytes(*reply.blobs.values())
        exchange, *parts = payload.header["exchange"], *payload.parts
        if exchange == "masked":
            # A ciphertext's length moves by a few bytes with its own randomness, which SEAL compresses.
            encrypted = Payload.from_bytes(parts.pop(0))
            return payload.header, encrypted.header.keys(), len(encrypted.parts), [*map(len, parts)]
        return {**payload.header, "sum_key": ""}, [*map(len, parts)]

    assert form(few) == form(many)


def true_rows(experiment: Experiment, folder: Path, config: LocalMetricsConfig) -> np.ndarray:
    """The number of held-out occasions of both devices in each tone group, fractional for mixed occasions."""
    edges = torch.tensor([last + 0.5 for last in config.tone_upper_bounds[:-1]])
    rows = np.zeros(3)
    for number in range(2):
        own = simulated_device(experiment, number, devices_folder(folder)).photos(16)
        _, asked = own.split(experiment.holdout_fraction, "occasion")
        units = asked.units("occasion")
        tones = torch.bucketize(measure_tone(asked.images).monk, edges, right=True)
        for unit in units.unique():
            mine = tones[units == unit].tolist()
            for tone in mine:
                rows[tone] += 1 / len(mine)
    return rows


def test_metrics_that_leave_have_noise(
    run: tuple[Experiment, Path, list[Overheard]], sums_of_metrics: list[np.ndarray]
) -> None:
    """The sums of metrics differ from integer counts by the noise of two devices."""
    experiment, folder, _ = run
    terms = experiment.plan().evaluation
    assert terms is not None
    assert experiment.evaluation is not None
    config = experiment.evaluation.metrics
    errors = []
    for total in sums_of_metrics:
        counts = total[:9] * config.max_units / np.sqrt(config.shares.table)
        # Only sums over a row are known without the model: how many originals a tone group has.
        spread = terms.noise_multiplier * np.sqrt(2) * np.sqrt(3) / np.sqrt(config.shares.table)
        errors.append((counts.reshape(3, 3).sum(axis=1) - true_rows(experiment, folder, config)) / spread)
    size = float(np.sqrt(np.square(np.concatenate(errors)).mean()))
    assert (
        len(errors) == 2 and 0.15 < size < 3
    )  # six normal numbers; without noise it is 0.02, by the grid's step
