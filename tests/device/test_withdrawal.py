"""Inspecting a device's state, withdrawing from a run, and erasing the state."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import first_device, tiny_experiment, tiny_gan, train_task

from fedface.device.client import handle_task
from fedface.device.config import DeviceConfig
from fedface.device.device import Device
from fedface.device.state import (
    DeviceState,
    LedgerFiles,
    device_state,
    export,
    known_runs,
)
from fedface.device.withdrawal import erase, files_to_erase, withdraw, withdrawal_impact
from fedface.errors import ConfigError, LedgerError
from fedface.experiment import Experiment
from fedface.messages.messages import Refusal, TrainResult
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.hash_chain import FORMAT, GENESIS, Record, utc_now
from fedface.privacy.ledger_records import Transmission, TransmissionInfo, Withdrawal, metrics_ledger_key
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.reports.device_log import make_log

FILE = """
name: kitchen
photos: photos
state: state
policy: {max_epsilon: 8, delta: 1e-6}
"""
EVENT = GaussianSum(sigma=6.0, clip_norm=1.0).event()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a device file and a photo; indexes are stored within it; no task was answered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"a photo")
    (tmp_path / "device.yaml").write_text(FILE)
    return tmp_path


def used(home: Path, *, witness: Path | None = None) -> DeviceState:
    """The device after two rounds of "faces", an evaluation of it, and a round of "others"."""
    if witness is not None:
        (home / "device.yaml").write_text(FILE + f"witness: {witness}\n")
    stored = device_state(home / "device.yaml")
    ledger = stored.ledger.open()
    for run, round in (("faces", 1), ("faces", 2), (metrics_ledger_key("faces"), 1), ("others", 1)):
        entry = ledger.record(EVENT, run=run, round=round, metadata={"unit": "photo"})
        payload = f"{run} {round}".encode()
        ledger.store_reply(run, round, payload)
        info = TransmissionInfo(
            run=run.removesuffix("/metrics"), round=round, kind="update", receiver="home", protection="noise",
            entry=entry.number,
        )  # fmt: skip
        ledger.record_transmission(payload, info)
    stored.key_path.write_bytes(b"a key")
    stored = device_state(home / "device.yaml")
    stored.index.parent.mkdir(parents=True)
    stored.index.write_bytes(b"dates and places")
    return stored


def everything_in(folder: Path) -> dict[Path, bytes]:
    """All files below a folder with their content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_inspecting_an_unused_device_creates_nothing(home: Path) -> None:
    """No folder, no ledger, no index; also once a state folder exists."""
    before = everything_in(home)
    for _ in range(2):
        stored = device_state(home / "device.yaml")
        snapshot = stored.ledger.read()
        assert (snapshot.records, known_runs(snapshot)) == ((), [])
        with pytest.raises(ConfigError, match="no ledger here"):
            stored.ledger.verify()
        assert everything_in(home) == before
        (home / "state").mkdir(exist_ok=True)


def test_inspecting_changes_no_byte(home: Path) -> None:
    """Of a ledger and a head that are intact."""
    stored = used(home)
    before = everything_in(home)
    snapshot = stored.ledger.verify()
    assert len(snapshot.entries) == len(snapshot.transmissions) == 4
    assert known_runs(snapshot) == ["faces", "others"]
    assert everything_in(home) == before


def test_inspecting_does_not_create_a_witness(home: Path) -> None:
    """Only the running device does."""
    used(home)
    (home / "device.yaml").write_text(FILE + "witness: disk\n")
    stored = device_state(home / "device.yaml")
    stored.ledger.verify()
    assert not stored.ledger.witnessed and not (home / "disk").exists()


def test_a_witness_is_found_by_the_name_that_the_chain_gave_it(home: Path) -> None:
    """The chain names its witness by its path, and erasing must report that file."""
    stored = used(home, witness=home / "disk")
    assert {stored.ledger.witness_file} == set(everything_in(home / "disk"))
    unnamed = LedgerFiles.at(stored.ledger.path)
    unnamed.verify()
    assert unnamed.witnessed and unnamed.witness_file == stored.ledger.witness_file


def test_a_missing_ledger_is_detected_and_not_created_anew(home: Path) -> None:
    """By its head, and by its witness if the head is missing too."""
    stored = used(home, witness=home / "disk")
    stored.ledger.path.unlink()
    for _ in range(2):
        with pytest.raises(LedgerError, match="has gone but"):
            device_state(home / "device.yaml").ledger.read()
        assert not stored.ledger.path.exists()
        stored.ledger.head.unlink(missing_ok=True)


def test_an_export_has_every_record_the_head_and_the_cost(home: Path) -> None:
    """Each record can be checked against its digest."""
    stored = used(home)
    snapshot = stored.ledger.verify()
    exported = json.loads(export(snapshot, delta=1e-6, unit="photo", now=utc_now()))
    assert exported["records"] == snapshot.export() and exported["head"] == snapshot.chain[-1].digest
    assert exported["format"] == FORMAT
    parent = GENESIS
    for row in exported["records"]:
        content = json.dumps(row["content"], sort_keys=True, separators=(",", ":"))
        assert row["digest"] == Record.digest_of(
            row["number"], row["written"], row["kind"], row["entry"], content, parent
        )
        parent = row["digest"]
    upper = filter_epsilon([(EVENT, 4)], 1e-6)
    assert exported["spent"] == {
        "lower": epsilon_of(EVENT, 1e-6).lower, "estimate": upper, "upper": upper, "delta": 1e-6, "unit": "photo"
    }  # fmt: skip


def test_the_impact_lists_recorded_updates_and_evaluations(home: Path) -> None:
    mine = withdrawal_impact(used(home), "faces")
    assert (mine.rounds, mine.evaluations, mine.withdrawn) == ((1, 2), (1,), None)
    assert mine.price.upper == filter_epsilon([(EVENT, 3)], 1e-6)
    assert "updates of rounds 1, 2 and metrics of evaluation 1" in mine.lasting()[0]
    assert str(mine.price) in mine.lasting()[1]


def test_withdrawing_deletes_the_runs_replies_and_no_record(home: Path) -> None:
    """Of its updates and evaluations; those of the other run remain."""
    stored = used(home)
    assert withdraw(stored, "faces", "my reason") == 2
    ledger = stored.ledger.open()
    assert ledger.load_reply("faces", 2) is None and ledger.load_reply("faces/metrics", 1) is None
    assert ledger.load_reply("others", 1) == b"others 1"
    assert len(ledger.entries()) == 4
    last = ledger.read().records[-1]
    assert isinstance(last, Withdrawal) and (last.run, last.reason) == ("faces", "my reason")


def test_withdrawing_again_deletes_a_reply_stored_meanwhile(home: Path) -> None:
    """By a device that was killed between storing and recording it, while its owner withdrew."""
    stored = used(home)
    withdraw(stored, "faces")
    ledger = stored.ledger.open()
    entry = ledger.record(EVENT, run="faces", round=3)
    ledger.store_reply("faces", 3, b"no further request", attempt=entry.attempt)
    assert withdraw(stored, "faces") == 1 and ledger.load_reply("faces", 3) is None
    assert b"no further request" not in stored.ledger.path.read_bytes()


def test_withdrawing_twice_has_no_further_effect(home: Path) -> None:
    stored = used(home)
    withdraw(stored, "faces")
    before = stored.ledger.read()
    assert withdraw(stored, "faces", "again") == 0 and stored.ledger.read() == before
    assert withdrawal_impact(stored, "faces").withdrawn == before.withdrawals["faces"]


def test_withdrawing_from_an_unknown_run_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="ledger has no runs"):
        withdraw(device_state(home / "device.yaml"), "faces")
    stored = used(home)
    with pytest.raises(ConfigError, match="no run 'fases' on this device; its ledger has faces, others"):
        withdraw(stored, "fases")
    assert stored.ledger.read().withdrawals == {}


def test_a_run_that_was_only_refused_can_be_withdrawn_from(home: Path) -> None:
    """The ledger has it, and there is nothing to undo."""
    stored = device_state(home / "device.yaml")
    refusal = TransmissionInfo(
        run="odd", round=1, kind="refusal", receiver="home", protection="", reason="no"
    )
    stored.ledger.open().record_transmission(b"no", refusal)
    stored = device_state(home / "device.yaml")
    assert "so there is nothing to undo" in withdrawal_impact(stored, "odd").lasting()[0]
    assert withdraw(stored, "odd") == 0 and stored.ledger.open().has_withdrawn("odd")
    assert stored.ledger.read().entries == []


def test_a_device_refuses_after_its_owner_withdrew(tmp_path: Path) -> None:
    """Sizes, digests and costs in the log are those of the bytes that were sent, and the refusal is in it too."""
    experiment = tiny_experiment(tmp_path / "recipe")
    device = roomy(experiment, tmp_path)
    config = DeviceConfig(name="d", photos=tmp_path / "photos", state=device.state, policy=device.policy)
    stored = DeviceState(config=config, ledger=LedgerFiles.at(device.ledger_path))
    task = train_task(experiment, tiny_gan())
    payloads = []
    for number in (1, 2):
        reply = handle_task(replace(task, round=number), device)
        assert isinstance(reply, TrainResult)
        payloads.append(reply.payload)
    assert withdraw(stored, "tiny", "enough") == 1
    answer = handle_task(replace(task, round=3), device)
    assert isinstance(answer, Refusal) and answer.withdrawn

    snapshot = stored.ledger.read()
    log = make_log("d", device.policy, snapshot, receiver="home", now=utc_now())
    first, second, left, refused = log.records
    for logged, payload in zip((first, second), payloads, strict=True):
        assert isinstance(logged.record, Transmission) and logged.price is not None
        assert logged.record.bytes == len(payload)
        assert logged.record.payload_digest == hashlib.sha256(payload).hexdigest()
        assert logged.price == epsilon_of(experiment.plan().event(1), device.policy.delta)
    assert isinstance(left.record, Withdrawal) and left.record.reason == "enough"
    assert isinstance(refused.record, Transmission)
    assert (refused.record.kind, refused.record.round) == ("refusal", 3)
    assert refused.record.payload_digest == hashlib.sha256(answer.reason.encode()).hexdigest()
    assert refused.price is None and len(snapshot.entries) == 2


def roomy(experiment: Experiment, folder: Path) -> Device:
    """The run's first device, with budget for a third round, so that cost is not why it refuses."""
    device = first_device(experiment, folder / "devices")
    return replace(device, policy=replace(device.policy, max_epsilon=100.0))


def test_erasing_keeps_ledger_and_photos(home: Path) -> None:
    """Replies, key and index are deleted; the ledger's bytes contain no reply any more."""
    stored = used(home)
    assert b"others 1" in stored.ledger.path.read_bytes()
    done = erase(stored, ledger=False)
    assert done.replies == 3 and set(done.files) == {stored.key_path, stored.index}
    assert not stored.key_path.exists() and not stored.index.exists()
    assert b"others 1" not in stored.ledger.path.read_bytes()
    snapshot = stored.ledger.read()
    assert len(snapshot.entries) == 4 and len(snapshot.transmissions) == 4
    assert everything_in(home / "photos") == {home / "photos" / "me.jpg": b"a photo"}


def test_erasing_everything_leaves_photos_and_unrelated_files(home: Path) -> None:
    stored = used(home)
    (home / "state" / "notes.txt").write_text("mine")
    done = erase(stored, ledger=True)
    assert done.witness is None and set(everything_in(home)) == {
        home / "device.yaml",
        home / "photos" / "me.jpg",
        home / "state" / "notes.txt",
    }
    assert stored.ledger.open().entries() == []


def test_a_missing_index_is_listed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the state folder of the user who scanned the photos, who may be another."""
    stored = used(home)
    named = next(one for one in files_to_erase(stored, ledger=False) if one.file == stored.index)
    assert str(named) == f"{stored.index}: the index of the photos in {stored.config.photos}"
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "of-another-user"))
    other = next(one for one in files_to_erase(stored, ledger=False) if one.file == stored.index)
    assert other.file != named.file and not other.found
    assert str(other).endswith(" - not found (was the device run as another user?)")
    assert named.file not in erase(stored, ledger=False).files and named.file.exists()


@pytest.mark.parametrize("name", ["sum.key", "ledger.sqlite", "ledger.sqlite.head", "index"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_is_refused(home: Path, name: str, dangling: bool) -> None:
    """Its target would remain, and may be shared: nothing is deleted."""
    stored = used(home)
    place = stored.index if name == "index" else home / "state" / name
    place.rename(home / "elsewhere")
    place.symlink_to(home / "elsewhere")
    if dangling:
        (home / "elsewhere").unlink()
    before = everything_in(home)
    with pytest.raises(
        ConfigError, match=f"{place} is a link to {home / 'elsewhere'}, so nothing was deleted"
    ):
        erase(stored, ledger=True)
    assert everything_in(home) == before and place.is_symlink()


def test_a_witness_blocks_a_new_start_after_erasing_until_it_is_deleted(home: Path) -> None:
    """The owner learns which files to delete."""
    stored = used(home, witness=home / "disk")
    done = erase(stored, ledger=True)
    assert {done.witness} == set(everything_in(home / "disk"))
    with pytest.raises(LedgerError, match="has gone but"):
        stored.ledger.open()
    assert done.witness is not None and str(done.witness) in " ".join(done.describe())
    done.witness.unlink()
    assert stored.ledger.open().entries() == []


def found(stored: DeviceState) -> list[Path]:
    """The existing files that erasing everything deletes."""
    return [one.file for one in files_to_erase(stored, ledger=True) if one.found]


@pytest.mark.parametrize("deleted", range(1, 5))
def test_a_partly_erased_device_does_not_start_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """Interrupted after any file but the last, the device still refuses; erasing again completes it."""
    stored = used(home)
    files = found(stored)
    assert len(files) == 4
    unlink, left = Path.unlink, [deleted]

    def failing(path: Path, missing_ok: bool = False) -> None:
        if left[0] == 0:
            raise OSError(5, "Input/output error", str(path))
        left[0] -= 1
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        if deleted < len(files):
            with pytest.raises(OSError, match="Input/output"):
                erase(stored, ledger=True)
        else:
            erase(stored, ledger=True)
    if 3 <= deleted < len(files):  # key, index and the ledger are deleted
        with pytest.raises(LedgerError):
            stored.ledger.open()
    erase(stored, ledger=True)
    assert found(stored) == []


def test_a_damaged_ledger_can_only_be_erased_completely(home: Path) -> None:
    """If it is to remain, nothing is deleted, because its replies could not be."""
    stored = used(home)
    stored.ledger.path.write_bytes(b"once upon a time, " * 100)
    with pytest.raises(LedgerError):
        erase(stored, ledger=False)
    assert stored.key_path.exists() and stored.index.exists()
    erase(stored, ledger=True)
    assert found(stored) == []


def test_a_damaged_head_can_be_erased_too(home: Path) -> None:
    stored = used(home)
    stored.ledger.head.write_text("torn")
    with pytest.raises(LedgerError, match="damaged"):
        device_state(home / "device.yaml").ledger.read()
    erase(device_state(home / "device.yaml"), ledger=True)
    assert found(stored) == []


def test_another_database_is_not_a_ledger(home: Path) -> None:
    """Such as an index of photos, named by mistake."""
    stored = used(home)
    other = home / "index.sqlite"
    sql = sqlite3.connect(other)
    sql.execute("CREATE TABLE photos (number INTEGER)")
    sql.commit()
    sql.close()
    with pytest.raises(LedgerError, match="another kind of file"):
        replace(stored.ledger, path=other, witness=None).open_existing()
