"""What a device keeps can be looked at without beginning it, and its owner can leave a run or have it erased."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import first_device, tiny_experiment, tiny_gan, train_task

from fedface.device.client import Device, handle_task
from fedface.device.state import (
    DeviceState,
    LedgerFiles,
    device_state,
    export,
    known_runs,
    state_of_device,
    write_new,
)
from fedface.device.withdrawal import erase, files_to_erase, withdraw, withdrawal_impact
from fedface.errors import ConfigError, LedgerError
from fedface.experiment import Experiment
from fedface.messages.messages import Refusal, TrainResult, metrics_ledger_key
from fedface.privacy.accounting import compose, epsilon_of
from fedface.privacy.hash_chain import FORMAT, GENESIS, Record, utc_now
from fedface.privacy.ledger_records import Transmission, TransmissionInfo, Withdrawal
from fedface.privacy.mechanism import GaussianSum
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
    """A folder with a device file and a photo; indexes are kept within it; nothing was ever asked."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"a photo")
    (tmp_path / "device.yaml").write_text(FILE)
    return tmp_path


def used(home: Path, *, witness: Path | None = None) -> DeviceState:
    """The device after two rounds of "faces", a question of it, and a round of "others"."""
    if witness is not None:
        (home / "device.yaml").write_text(FILE + f"witness: {witness}\n")
    device = device_state(home / "device.yaml").device
    ledger = device.ledger()
    for run, round in (("faces", 1), ("faces", 2), (metrics_ledger_key("faces"), 1), ("others", 1)):
        entry = ledger.record(EVENT, run=run, round=round, metadata={"unit": "photo"})
        payload = f"{run} {round}".encode()
        ledger.store_reply(run, round, payload)
        info = TransmissionInfo(
            run=run.removesuffix("/metrics"), round=round, kind="update", receiver="home", protection="noise",
            entry=entry.number,
        )  # fmt: skip
        ledger.record_transmission(payload, info)
    device.key_path.write_bytes(b"a key")
    kept = device_state(home / "device.yaml")
    kept.index.parent.mkdir(parents=True)
    kept.index.write_bytes(b"dates and places")
    return kept


def everything_in(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_looking_where_nothing_was_begun_begins_nothing(home: Path) -> None:
    """No folder, no ledger, no index; also once a state folder is there."""
    before = everything_in(home)
    for _ in range(2):
        kept = device_state(home / "device.yaml")
        snapshot = kept.ledger.read()
        assert (snapshot.records, known_runs(snapshot)) == ((), [])
        with pytest.raises(ConfigError, match="no ledger here"):
            kept.ledger.verify()
        assert everything_in(home) == before
        (home / "state").mkdir(exist_ok=True)


def test_looking_changes_no_byte(home: Path) -> None:
    """Of a ledger and a head that were left in order."""
    kept = used(home)
    before = everything_in(home)
    snapshot = kept.ledger.verify()
    assert len(snapshot.entries) == len(snapshot.transmissions) == 4
    assert known_runs(snapshot) == ["faces", "others"]
    assert everything_in(home) == before


def test_looking_does_not_begin_a_witness(home: Path) -> None:
    """Naming one in the device file is for the device to act on."""
    used(home)
    (home / "device.yaml").write_text(FILE + "witness: disk\n")
    kept = device_state(home / "device.yaml")
    kept.ledger.verify()
    assert not kept.ledger.witnessed and not (home / "disk").exists()


def test_a_witness_is_found_under_the_name_that_the_chain_gave_it(home: Path) -> None:
    """The chain names its witness by its path; whoever erases must be able to say which file that is."""
    kept = used(home, witness=home / "disk")
    assert {kept.ledger.witness_file} == set(everything_in(home / "disk"))
    unnamed = LedgerFiles.at(kept.ledger.path)
    unnamed.verify()
    assert unnamed.witnessed and unnamed.witness_file == kept.ledger.witness_file


def test_a_ledger_that_has_gone_is_missed_and_not_begun_anew(home: Path) -> None:
    """By its head, and by its witness where the head has gone too."""
    kept = used(home, witness=home / "disk")
    kept.ledger.path.unlink()
    for _ in range(2):
        with pytest.raises(LedgerError, match="has gone but"):
            device_state(home / "device.yaml").ledger.read()
        assert not kept.ledger.path.exists()
        kept.ledger.head.unlink(missing_ok=True)


def test_an_export_holds_every_record_the_head_and_the_price(home: Path) -> None:
    """Each record can be checked against its digest."""
    kept = used(home)
    snapshot = kept.ledger.verify()
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
    bounds = epsilon_of(compose([EVENT] * 4), 1e-6)
    assert exported["spent"] == {
        "lower": bounds.lower, "estimate": bounds.estimate, "upper": bounds.upper, "delta": 1e-6, "unit": "photo"
    }  # fmt: skip


def test_a_file_for_its_owner_alone_is_never_written_over_another(tmp_path: Path) -> None:
    write_new(tmp_path / "a.json", "1")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="not overwritten"):
        write_new(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "1"


def test_a_stake_is_what_was_booked_for_the_run_and_its_questions(home: Path) -> None:
    mine = withdrawal_impact(used(home), "faces")
    assert (mine.rounds, mine.evaluations, mine.withdrawn) == ((1, 2), (1,), None)
    assert mine.price == epsilon_of(compose([EVENT] * 3), 1e-6)
    assert "updates of rounds 1, 2 and metrics of evaluation 1" in mine.lasting()[0]
    assert str(mine.price) in mine.lasting()[1]


def test_leaving_drops_the_runs_own_answers_and_no_booking(home: Path) -> None:
    """Of its updates and of its questions; the other run's stay."""
    kept = used(home)
    assert withdraw(kept, "faces", "my reason") == 2
    ledger = kept.device.ledger()
    assert ledger.load_reply("faces", 2) is None and ledger.load_reply("faces/metrics", 1) is None
    assert ledger.load_reply("others", 1) == b"others 1"
    assert len(ledger.entries()) == 4
    last = ledger.read().records[-1]
    assert isinstance(last, Withdrawal) and (last.run, last.reason) == ("faces", "my reason")


def test_leaving_once_more_drops_an_answer_that_was_kept_meanwhile(home: Path) -> None:
    """By a device that was killed between keeping it and noting it, while its owner left."""
    kept = used(home)
    withdraw(kept, "faces")
    ledger = kept.device.ledger()
    entry = ledger.record(EVENT, run="faces", round=3)
    ledger.store_reply("faces", 3, b"nobody will ask for it", attempt=entry.attempt)
    assert withdraw(kept, "faces") == 1 and ledger.load_reply("faces", 3) is None
    assert b"nobody will ask for it" not in kept.ledger.path.read_bytes()


def test_leaving_twice_is_as_leaving_once(home: Path) -> None:
    kept = used(home)
    withdraw(kept, "faces")
    before = kept.ledger.read()
    assert withdraw(kept, "faces", "again") == 0 and kept.ledger.read() == before
    assert withdrawal_impact(kept, "faces").withdrawn == before.withdrawals["faces"]


def test_a_run_that_nobody_knows_is_not_left(home: Path) -> None:
    with pytest.raises(ConfigError, match="ledger has no runs"):
        withdraw(device_state(home / "device.yaml"), "faces")
    kept = used(home)
    with pytest.raises(ConfigError, match="no run 'fases' on this device; its ledger has faces, others"):
        withdraw(kept, "fases")
    assert kept.ledger.read().withdrawals == {}


def test_a_run_that_was_only_ever_refused_can_be_left(home: Path) -> None:
    """The ledger has it, and there is nothing to undo."""
    kept = device_state(home / "device.yaml")
    refusal = TransmissionInfo(
        run="odd", round=1, kind="refusal", receiver="home", protection="", reason="no"
    )
    kept.device.ledger().record_transmission(b"no", refusal)
    kept = device_state(home / "device.yaml")
    assert "so there is nothing to undo" in withdrawal_impact(kept, "odd").lasting()[0]
    assert withdraw(kept, "odd") == 0 and kept.device.ledger().has_withdrawn("odd")
    assert kept.ledger.read().entries == []


def test_a_device_that_answered_two_rounds_refuses_the_third_once_its_owner_has_left(tmp_path: Path) -> None:
    """Sizes, digests and prices of the log are those of the bytes that left, and the refusal is in it too."""
    experiment = tiny_experiment(tmp_path / "recipe")
    device = roomy(experiment, tmp_path)
    kept = state_of_device(device, tmp_path / "photos")
    task = train_task(experiment, tiny_gan())
    payloads = []
    for number in (1, 2):
        reply = handle_task(replace(task, round=number), device)
        assert isinstance(reply, TrainResult)
        payloads.append(reply.payload)
    assert withdraw(kept, "tiny", "enough") == 1
    answer = handle_task(replace(task, round=3), device)
    assert isinstance(answer, Refusal) and answer.withdrawn

    snapshot = kept.ledger.read()
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
    """The run's first device, with budget for a third round, so that the price is not why it refuses."""
    device = first_device(experiment, folder / "devices")
    return replace(device, policy=replace(device.policy, max_epsilon=100.0))


def test_erasing_keeps_ledger_and_photos(home: Path) -> None:
    """Answers, key and index go; the ledger's bytes hold no answer any more."""
    kept = used(home)
    assert b"others 1" in kept.ledger.path.read_bytes()
    done = erase(kept, ledger=False)
    assert done.replies == 3 and set(done.files) == {kept.device.key_path, kept.index}
    assert not kept.device.key_path.exists() and not kept.index.exists()
    assert b"others 1" not in kept.ledger.path.read_bytes()
    snapshot = kept.ledger.read()
    assert len(snapshot.entries) == 4 and len(snapshot.transmissions) == 4
    assert everything_in(home / "photos") == {home / "photos" / "me.jpg": b"a photo"}


def test_erasing_everything_leaves_the_photos_and_what_is_not_ours(home: Path) -> None:
    kept = used(home)
    (home / "state" / "notes.txt").write_text("mine")
    done = erase(kept, ledger=True)
    assert done.witness is None and set(everything_in(home)) == {
        home / "device.yaml",
        home / "photos" / "me.jpg",
        home / "state" / "notes.txt",
    }
    assert kept.device.ledger().entries() == []


def test_the_index_is_named_where_it_is_not_found_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where the user keeps state who scanned the photos; whoever erases may be another."""
    kept = used(home)
    named = next(one for one in files_to_erase(kept, ledger=False) if one.file == kept.index)
    assert str(named) == f"{kept.index}: the index of the photos in {kept.photos}"
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "of-another-user"))
    other = next(one for one in files_to_erase(kept, ledger=False) if one.file == kept.index)
    assert other.file != named.file and not other.found
    assert str(other).endswith(" - not found (was the device run as another user?)")
    assert named.file not in erase(kept, ledger=False).files and named.file.exists()


@pytest.mark.parametrize("name", ["sum.key", "ledger.sqlite", "ledger.sqlite.head", "index"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_not_taken_for_the_file(home: Path, name: str, dangling: bool) -> None:
    """Its file would stay, and may be of use to others: nothing at all is deleted, and no answer dropped."""
    kept = used(home)
    place = kept.index if name == "index" else home / "state" / name
    place.rename(home / "elsewhere")
    place.symlink_to(home / "elsewhere")
    if dangling:
        (home / "elsewhere").unlink()
    before = everything_in(home)
    with pytest.raises(
        ConfigError, match=f"{place} is a link to {home / 'elsewhere'}, so nothing was deleted"
    ):
        erase(kept, ledger=True)
    assert everything_in(home) == before and place.is_symlink()


def test_a_witness_remembers_what_was_erased_until_it_is_deleted_too(home: Path) -> None:
    """The device refuses to begin anew, and its owner is told which files to delete if that is meant."""
    kept = used(home, witness=home / "disk")
    done = erase(kept, ledger=True)
    assert {done.witness} == set(everything_in(home / "disk"))
    with pytest.raises(LedgerError, match="has gone but"):
        kept.device.ledger()
    assert done.witness is not None and str(done.witness) in " ".join(done.describe())
    done.witness.unlink()
    assert kept.device.ledger().entries() == []


def found(kept: DeviceState) -> list[Path]:
    """The files that are there for erasing everything."""
    return [one.file for one in files_to_erase(kept, ledger=True) if one.found]


@pytest.mark.parametrize("deleted", range(1, 5))
def test_a_device_that_was_half_erased_does_not_begin_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """Cut short after any file but the last, the device still refuses; erasing once more ends it."""
    kept = used(home)
    files = found(kept)
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
                erase(kept, ledger=True)
        else:
            erase(kept, ledger=True)
    if 3 <= deleted < len(files):  # key, index and the ledger have gone
        with pytest.raises(LedgerError):
            kept.device.ledger()
    erase(kept, ledger=True)
    assert found(kept) == []


def test_a_damaged_ledger_can_only_be_erased_with_the_rest(home: Path) -> None:
    """While it is to stay, nothing is deleted: its answers could not be dropped."""
    kept = used(home)
    kept.ledger.path.write_bytes(b"once upon a time, " * 100)
    with pytest.raises(LedgerError):
        erase(kept, ledger=False)
    assert kept.device.key_path.exists() and kept.index.exists()
    erase(kept, ledger=True)
    assert found(kept) == []


def test_a_damaged_head_can_be_erased_too(home: Path) -> None:
    kept = used(home)
    kept.ledger.head.write_text("torn")
    with pytest.raises(LedgerError, match="damaged"):
        device_state(home / "device.yaml").ledger.read()
    erase(device_state(home / "device.yaml"), ledger=True)
    assert found(kept) == []


def test_a_database_of_something_else_is_no_ledger(home: Path) -> None:
    """Such as an index of photos, named by mistake."""
    kept = used(home)
    other = home / "index.sqlite"
    sql = sqlite3.connect(other)
    sql.execute("CREATE TABLE photos (number INTEGER)")
    sql.commit()
    sql.close()
    with pytest.raises(LedgerError, match="another kind of file"):
        replace(kept.ledger, path=other, witness=None).open_existing()
