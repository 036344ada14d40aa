"""`fedface ledger` and `fedface device`: what an owner reads, and what needs confirmation."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import caller
from tiny import first_device, tiny_experiment, tiny_gan, train_task

from fedface.cli import device_log
from fedface.device.client import handle_task
from fedface.device.state import device_state
from fedface.measurements import Epsilon
from fedface.messages.messages import Refusal, TrainResult
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.budget import format_upper_bound
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import TransmissionInfo
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.renyi_filter import filter_epsilon

EVENT = GaussianSum(sigma=6.0, clip_norm=1.0).event()
FILE = """
name: kitchen
photos: photos
state: STATE
server: fedface.example.org:8000
policy:
  max_epsilon: 100
  delta: 1e-3
  periods: [{days: 30, epsilon: 50}]
  protocols: [plain]
  min_cohort_size: 1
"""


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path):  # type: ignore[no-untyped-def]
    """Call the command line in this process, in the device's home."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "400")

    return caller(monkeypatch, capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device's file and a photo; no task was answered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"a photo")
    (tmp_path / "device.yaml").write_text(FILE.replace("STATE", "state"))
    return tmp_path


@pytest.fixture
def used(home: Path) -> Path:
    """The same after a round of "faces" that was answered twice, an evaluation of it, and a record of "others"."""
    state = device_state(home / "device.yaml")
    ledger = state.ledger.open()
    metadata = {"unit": "photo", "objective": "generator", "noise_multiplier": "6"}
    update = ledger.record(EVENT, run="faces", round=1, metadata=metadata)
    ledger.store_reply("faces", 1, b"update")
    info = TransmissionInfo(
        run="faces", round=1, kind="update", receiver="fedface.example.org:8000", protection="noise added here",
        entry=update.number,
    )  # fmt: skip
    for _ in range(2):
        ledger.record_transmission(b"update", info)
    metrics = ledger.record(
        EVENT, run="faces/metrics", round=1, metadata={**metadata, "objective": "evaluation"}
    )
    ledger.store_reply("faces/metrics", 1, b"metrics")
    ledger.record_transmission(b"metrics", replace(info, kind="metrics", entry=metrics.number))
    ledger.record(EVENT, run="others", round=1, metadata=metadata)
    state.key_path.write_bytes(b"a key")
    return home


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A user at a terminal who gives this answer."""

    def answering(answer: bool) -> None:
        monkeypatch.setattr(device_log.sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(device_log.typer, "confirm", lambda question: answer)

    return answering


def several(count: int) -> Epsilon:
    """What so many releases cost that were chosen one after the other."""
    upper = filter_epsilon([(EVENT, count)], 1e-3)
    return Epsilon(lower=epsilon_of(EVENT, 1e-3).lower, estimate=upper, upper=upper, delta=1e-3, unit="photo")


def files_in(folder: Path) -> dict[Path, bytes]:
    """All files below a folder with their content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_ledger_is_shown_at_the_policys_delta_and_unit(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """With run, noise, the cost of each entry alone and the running total, each with delta, unit and bounds."""
    result = fedface("ledger", "show", "device.yaml")
    alone, three = epsilon_of(EVENT, 1e-3), several(3)
    assert result.code == 0 and "every epsilon at delta 0.001, per photo" in result.out
    for words in ("update (generator)", "metrics", "faces/metrics", f"{alone.estimate:.3f}"):
        assert words in result.out
    assert str(three) in result.out
    assert "at delta 0.001 per photo" in result.out.splitlines()[-1]


def test_delta_and_unit_can_be_chosen_and_default_to_the_entries(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """The JSON has the delta and unit used."""
    for words, delta, unit in (
        (["device.yaml"], 1e-3, "photo"),
        (["device.yaml", "--delta", "1e-4", "--unit", "library"], 1e-4, "library"),
        (["state/ledger.sqlite"], 1e-5, "photo"),
    ):
        reported = json.loads(fedface("ledger", "show", *words, "--json").out)
        assert (reported["delta"], reported["unit"]) == (delta, unit)
        spent = Ledger.open(used / "state" / "ledger.sqlite").spent(delta, unit=unit)  # type: ignore[arg-type]
        upper = reported["spent"]["upper"]
        assert upper == ("infinite" if unit == "library" else spent.upper)
        assert reported["entries"][-1]["total"] == reported["spent"]
    assert (
        "--unit must be one of photo" in fedface("ledger", "show", "device.yaml", "--unit", "face").sentence
    )


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_inspecting_creates_no_ledger(fedface, home: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    """Neither for a device's file nor for a path."""
    before = files_in(home)
    for path in ("device.yaml", "state/ledger.sqlite"):
        assert "no ledger here" in fedface("ledger", command, path).sentence
    assert files_in(home) == before and not (home / "state").exists()


def test_verify_prints_counts_and_head_and_fails_on_damage(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """One sentence, whichever record was changed."""
    path = used / "state" / "ledger.sqlite"
    head = Ledger.open(path).read().head
    result = fedface("ledger", "verify", "device.yaml")
    assert result.code == 0
    assert "ok, 8 records, 3 releases recorded, 3 transmissions, " in result.out
    assert f"head {head}; it has no witness" in result.out
    found = json.loads(fedface("ledger", "verify", "state/ledger.sqlite", "--json").out)
    assert found == {
        "path": "state/ledger.sqlite",
        "ok": True,
        "records": 8,
        "entries": 3,
        "transmissions": 3,
        "head": head,
        "witness": None,
    }
    whole = path.read_bytes()
    for number in (1, 3):  # a release, and a transmission
        database = sqlite3.connect(path)
        database.execute("DROP TRIGGER records_no_update")
        database.execute(
            "UPDATE records SET written = '2020-01-01T00:00:00+00:00' WHERE number = ?", (number,)
        )
        database.commit()
        database.close()
        assert (
            f"altered: record {number} does not add up" in fedface("ledger", "verify", "device.yaml").sentence
        )
        path.write_bytes(whole)


def test_verify_detects_a_new_ledger_under_an_old_head(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """A ledger that was replaced while the head remained."""
    (used / "state" / "ledger.sqlite").unlink()
    Ledger.open(used / "other" / "ledger.sqlite").record(EVENT, run="faces", round=1)
    (used / "other" / "ledger.sqlite").rename(used / "state" / "ledger.sqlite")
    assert "was rolled back or replaced" in fedface("ledger", "verify", "device.yaml").sentence


def test_an_export_is_a_new_private_file(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """Mode 0600, never over another; without --out it is printed."""
    result = fedface("ledger", "export", "device.yaml", "--out", "copy.json")
    assert result.code == 0 and (used / "copy.json").stat().st_mode & 0o777 == 0o600
    reported = json.loads((used / "copy.json").read_text())
    assert [record["kind"] for record in reported["records"]].count("release") == 3
    assert reported["spent"]["delta"] == 1e-3
    assert "never overwritten" in fedface("ledger", "export", "device.yaml", "--out", "copy.json").sentence
    printed = json.loads(fedface("ledger", "export", "device.yaml").out)
    assert {**printed, "created": ""} == {**reported, "created": ""}


def test_the_log_is_printed_for_people(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """Content, size, receiver, protection and cost; and the remaining budgets."""
    result = fedface("device", "log", "device.yaml")
    alone, three = epsilon_of(EVENT, 1e-3), several(3)
    for words in (
        "An update of a network's weights, for faces, round 1",
        "6 bytes to fedface.example.org:8000; noise added here",
        f"cost: {alone}",
        "none: the same bytes as before, recorded as entry 1",
        "Metrics of how well a model serves these photos, for faces, evaluation 1",
        "Together: 19 bytes in 3 payloads.",
        f"Allowed for life: 100; remaining: {100 - three.upper:.3f}.",
        f"Allowed in any 30 days: 50; remaining: {50 - three.upper:.3f}.",
        "Recorded and not sent: entries 8.",
    ):
        assert words in result.out
    assert "Not covered by these numbers:\n  - that this device took part" in result.out


def test_a_log_without_transmissions_states_it(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """And creates only the requested page."""
    before = files_in(home)
    result = fedface("device", "log", "device.yaml", "--page", "log.html")
    assert result.code == 0 and "Nothing was sent." in result.out
    assert "Not covered" not in result.out
    assert "epsilon 0 at delta 0.001 per photo. Allowed for life: 100; remaining: 100.000." in result.out
    assert set(files_in(home)) - set(before) == {home / "log.html"}
    assert json.loads(fedface("device", "log", "device.yaml", "--json").out)["records"] == []


def test_a_log_can_be_of_one_run(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """An unknown name is an error that lists the known ones."""
    reported = json.loads(fedface("device", "log", "device.yaml", "--run", "others", "--json").out)
    assert reported["records"] == [] and reported["recorded_and_not_sent"] == [8] and reported["bytes"] == 0
    result = fedface("device", "log", "device.yaml", "--run", "fases").sentence
    assert result == "this device knows no run 'fases'; it knows faces, others"


def test_a_page_is_private_and_never_overwrites_another_kind_of_file(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """Rewritten each time, mode 0600; the device's file is safe."""
    for _ in range(2):
        assert fedface("device", "log", "device.yaml", "--page", "log.html").code == 0
    assert (used / "log.html").stat().st_mode & 0o777 == 0o600
    assert (used / "log.html").read_text().startswith("<!doctype html>")
    assert "ends in .html" in fedface("device", "log", "device.yaml", "--page", "device.yaml").sentence


def test_a_release_without_noise_is_reported_as_unbounded(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """Wherever a cost is shown."""
    device_state(used / "device.yaml").ledger.open().record(
        ClippedSum(clip_norm=1.0).event(), run="plain", round=1
    )
    assert "epsilon infinite at delta" in fedface("ledger", "show", "device.yaml").out
    result = fedface("device", "log", "device.yaml").out
    assert (
        "epsilon infinite at delta 0.001 per photo (no privacy guarantee). Allowed for life: 100; remaining: 0."
        in result
    )


def test_without_a_terminal_nothing_changes_without_yes(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """A script that omits --yes changes nothing."""
    before = files_in(used)
    for words, plan in (
        (["withdraw", "device.yaml", "--run", "faces"], "What cannot be undone:"),
        (["erase", "device.yaml"], "sum.key: the key of homomorphic sums"),
    ):
        result = fedface("device", *words)
        assert result.code == 2 and "there is no terminal to confirm on, so nothing was done" in result.err
        assert plan in result.out
    assert files_in(used) == before


def test_declining_the_confirmation_changes_nothing(fedface, used: Path, at_a_terminal) -> None:  # type: ignore[no-untyped-def]
    """After the consequences were printed."""
    at_a_terminal(False)
    before = files_in(used)
    result = fedface("device", "withdraw", "device.yaml", "--run", "faces")
    assert result.code == 1 and "What cannot be undone:" in result.out and "Nothing was done." in result.out
    result = fedface("device", "erase", "device.yaml", "--ledger", "--no-export")
    assert result.code == 1 and "THE LEDGER IS DELETED" in result.out
    assert files_in(used) == before


def test_withdrawing_prints_its_effects_and_what_cannot_be_undone(fedface, used: Path, at_a_terminal) -> None:  # type: ignore[no-untyped-def]
    """With the cost of the run's records; a second time with the date of the first."""
    at_a_terminal(True)
    two = several(2)
    result = fedface("device", "withdraw", "device.yaml", "--run", "faces", "--reason", "my own business")
    for words in (
        "sends only refusals to faces. This cannot be revoked.",
        "The server is informed at its next request.",
        "updates of round 1 and metrics of evaluation 1",
        str(two),
        "You have withdrawn from faces now; stored replies deleted: 2.",
    ):
        assert words in result.out
    assert (
        "You have withdrawn from faces already, on "
        in fedface("device", "withdraw", "device.yaml", "--run", "faces").out
    )
    assert "You withdrew from faces: my own business" in fedface("device", "log", "device.yaml").out
    assert (
        "its ledger has faces, others"
        in fedface("device", "withdraw", "device.yaml", "--run", "fases", "--yes").sentence
    )


def test_erasing_prints_what_is_deleted_and_that_photos_remain(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """The key and the stored replies are deleted, the ledger remains."""
    result = fedface("device", "erase", "device.yaml", "--yes")
    for words in (
        "Your photos are not touched.",
        "deleted, not overwritten",
        "The ledger remains",
        "sum.key",
    ):
        assert words in result.out
    assert "Stored replies deleted from the ledger: 2." in result.out
    assert not (used / "state" / "sum.key").exists()
    assert (used / "photos" / "me.jpg").read_bytes() == b"a photo"
    assert "3 releases recorded" in fedface("ledger", "verify", "device.yaml").out


def test_erasing_lists_each_file_and_which_are_missing(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """The index of photos that were never scanned, or by another user, is listed as missing."""
    result = fedface("device", "erase", "device.yaml", "--yes")
    index = device_state(used / "device.yaml").index
    assert f"{used / 'state' / 'sum.key'}: the key of homomorphic sums" in result.out
    assert f"\n{index}: the index of the photos in {used / 'photos'} - not found" in result.out
    assert f"- {index}" not in result.out and "The photo index" not in result.out
    assert "The key of homomorphic sums is deleted" in result.out and "Stop the device first" in result.out
    assert "was the device run as another user?" in result.out


def test_a_symbolic_link_is_not_erased(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """One sentence and code 2; its shared target remains, and so does everything else."""
    key = used / "state" / "sum.key"
    key.rename(used / "shared.key")
    key.symlink_to(used / "shared.key")
    before = files_in(used)
    result = fedface("device", "erase", "device.yaml", "--yes")
    (sentence,) = filter(None, result.err.splitlines())
    assert (
        result.code == 2 and f"{key} is a link to {used / 'shared.key'}, so nothing was deleted" in sentence
    )
    assert files_in(used) == before and key.is_symlink()


def test_the_ledger_is_erased_only_with_export_or_no_export(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """The copy is written before anything is deleted, never over another file."""
    (used / "there.json").write_text("mine")
    before = files_in(used)
    for words, reason in (
        (["--ledger"], "needs either --export FILE"),
        (["--ledger", "--export", "a.json", "--no-export"], "needs either --export FILE"),
        (["--export", "a.json"], "need --ledger"),
        (["--ledger", "--export", "there.json"], "not overwritten"),
    ):
        assert reason in fedface("device", "erase", "device.yaml", "--yes", *words).sentence
    assert files_in(used) == before
    result = fedface("device", "erase", "device.yaml", "--yes", "--ledger", "--export", "copy.json")
    assert result.code == 0 and "Treat these photos as spent" in result.out
    reported = json.loads((used / "copy.json").read_text())
    assert len(reported["records"]) == 8
    assert files_in(used / "state") == {} and (used / "photos" / "me.jpg").exists()


def test_two_rounds_a_withdrawal_and_a_refusal_are_in_the_log(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """Through commands only: bytes, digests and costs are those of what was sent."""
    experiment = tiny_experiment(home / "recipe")
    device = first_device(experiment, home / "devices")
    (home / "device.yaml").write_text(FILE.replace("STATE", str(device.state)))
    device = replace(device, policy=device_state(home / "device.yaml").config.policy)
    task = train_task(experiment, tiny_gan())
    payloads = []
    for number in (1, 2):
        reply = handle_task(replace(task, round=number), device)
        assert isinstance(reply, TrainResult)
        payloads.append(reply.payload)
    price = epsilon_of(experiment.plan().event(1), 1e-3)

    lines = json.loads(fedface("device", "log", "device.yaml", "--json").out)["records"]
    assert [(line["kind"], line["bytes"]) for line in lines] == [("update", len(payloads[0]))] * 2
    assert [line["payload_digest"] for line in lines] == [hashlib.sha256(p).hexdigest() for p in payloads]
    assert [line["price"]["upper"] for line in lines] == [price.upper] * 2
    assert fedface("device", "withdraw", "device.yaml", "--run", "tiny", "--yes").code == 0
    answer = handle_task(replace(task, round=3), device)
    assert isinstance(answer, Refusal) and answer.withdrawn
    reported = json.loads(fedface("device", "log", "device.yaml", "--json").out)
    assert [line.get("kind", line["record"]) for line in reported["records"]] == [
        "update",
        "update",
        "withdrawal",
        "refusal",
    ]
    assert list(reported["withdrawn"]) == ["tiny"] and reported["records"][3]["price"] is None
    spent = epsilon_of(experiment.plan().event(2), 1e-3)
    assert [budget["spent"]["upper"] for budget in reported["budgets"]] == [spent.upper] * 2
    assert [budget["remaining"] for budget in reported["budgets"]] == [100 - spent.upper, 50 - spent.upper]


def test_a_ledger_without_a_device_file_uses_the_unit_of_its_entries(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """Never per photo for occasions; if entries differ the error has the option to use; noise has four digits."""
    path = home / "plain.sqlite"
    ledger = Ledger.open(path)
    metadata = {"unit": "occasion", "noise_multiplier": "6.123456789"}
    ledger.record(EVENT, run="faces", round=1, metadata=metadata)
    result = fedface("ledger", "show", "plain.sqlite")
    assert "every epsilon at delta 1e-5, per occasion" in result.out and "6.123 " in result.out
    assert "fedface ledger show plain.sqlite --delta 1e-6 --unit photo" in result.out
    assert json.loads(fedface("ledger", "export", "plain.sqlite").out)["spent"]["unit"] == "occasion"
    ledger.record(EVENT, run="others", round=1, metadata={**metadata, "unit": "photo"})
    reported = fedface("ledger", "show", "plain.sqlite").sentence
    assert "several privacy units (photo, occasion)" in reported
    assert reported.endswith("fedface ledger show plain.sqlite --unit photo")
    assert fedface("ledger", "show", "plain.sqlite", "--unit", "photo").code == 0
    assert fedface("ledger", "verify", "plain.sqlite").code == 0


def test_a_state_folder_readable_by_others_gives_a_warning(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """On standard error; the output is the same."""
    commands = (
        ["device", "log", "device.yaml"],
        ["ledger", "show", "device.yaml"],
        ["ledger", "verify", "device.yaml"],
        ["ledger", "verify", "state/ledger.sqlite"],
    )
    quiet = [fedface(*words) for words in commands]
    (used / "state").chmod(0o755)
    for words, before in zip(commands, quiet, strict=True):
        result = fedface(*words)
        assert result.code == 0 and result.out == before.out and "warning" not in before.err
        assert "others can read" in result.err and "run chmod 700 on it" in result.err


def test_a_policy_file_is_not_a_device_file(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """The error lists the keys of a device file."""
    (home / "policy.yaml").write_text("max_epsilon: 8\ndelta: 1e-6\n")
    for words in (["device", "log"], ["device", "erase"], ["ledger", "show"]):
        assert fedface(*words, "policy.yaml").sentence == (
            "policy.yaml: this is a policy file; a device file has name, photos, state and policy"
        )


def test_an_overspent_device_has_nothing_left(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """Once for life, once for the month."""
    (used / "device.yaml").write_text(
        FILE.replace("STATE", "state").replace("100", "0.1").replace("epsilon: 50", "epsilon: 0.05")
    )
    result = fedface("device", "log", "device.yaml").out
    three = several(3).upper
    where = "at delta 0.001 per photo."
    assert (
        f"Nothing remains: everything will be refused; over by {format_upper_bound(three - 0.1)} {where}"
        in result
    )
    assert f"older than that; over by {format_upper_bound(three - 0.05)} {where}" in result


def test_a_folder_is_refused_as_a_ledger(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """Without a warning."""
    assert fedface("ledger", "verify", "photos").sentence.startswith("photos: is a folder; expected")


def test_an_interrupted_erasure_is_completed_by_the_same_command(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """While the ledger is complete the copy is recognised; when a part is missing, the error has the command."""
    command = ("device", "erase", "device.yaml", "--yes", "--ledger", "--export", "copy.json")
    copy = fedface("ledger", "export", "device.yaml").out
    (used / "copy.json").write_text(copy)
    ledger = (used / "state" / "ledger.sqlite").read_bytes()
    result = fedface(*command)
    assert result.code == 0 and "is an export of the ledger as it is" in result.out
    assert (used / "copy.json").read_text() == copy and not (used / "state" / "ledger.sqlite").exists()
    (used / "state" / "ledger.sqlite").write_bytes(ledger[:-1])
    (used / "state" / "ledger.sqlite.head").write_text("f" * 64)
    assert "--no-export in place of --export ends it" in fedface(*command).sentence
    assert fedface("device", "erase", "device.yaml", "--yes", "--ledger", "--no-export").code == 0


def test_deltas_are_written_in_one_way(fedface, used: Path) -> None:  # type: ignore[no-untyped-def]
    """1e-4, in each of these commands."""
    (used / "device.yaml").write_text(FILE.replace("STATE", "state").replace("1e-3", "1e-4"))
    for words in (["device", "log"], ["ledger", "show"], ["policy", "check"]):
        result = fedface(*words, "device.yaml").out
        assert "delta 1e-4" in result and "0.0001" not in result and "1e-04" not in result


def test_help_and_suggestions_are_plain_text(fedface) -> None:  # type: ignore[no-untyped-def]
    """No backslash for markup, and one suggestion."""
    for words in (["device", "keygen"], ["policy", "check"], ["ledger", "show"], ["run"]):
        result = fedface(*words, "--help")
        assert "[required]" in result.out and "\\" not in result.out
    assert fedface("polcy").err.count("Did you mean") == 1
    assert fedface("policy", "chek").err.count("Did you mean") == 1


WAITING = """
import time, typer
from fedface.cli.console import call, progress_bars
app = typer.Typer(rich_markup_mode=None)
@app.command()
def wait():
    with progress_bars() as bars:
        bars.stage("waiting", 3)
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.2)
            print("kept", flush=True)
call(app)
"""


# The thread runs before the test reads "ready": an interrupt in between would find nothing to wait for.
STUCK = (
    WAITING.replace(
        "import time, typer", "import time, typer\nfrom concurrent.futures import ThreadPoolExecutor"
    )
    .replace(
        "        try:", "        with ThreadPoolExecutor(1) as pool:\n            pool.submit(time.sleep, 60)"
    )
    .replace("        finally:\n            time.sleep(0.2)\n", "")
)


def test_a_slow_interrupt_is_reported_and_a_second_one_ends_it_at_once() -> None:
    """A computing thread is waited for; ending at once loses nothing that was finished."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as stuck:
        assert stuck.stdout is not None and stuck.stdout.readline() == "ready\n"
        stuck.send_signal(signal.SIGINT)
        assert stuck.stderr is not None and stuck.stderr.readline() == "waiting ...\n"
        assert "stopping, which can take a minute" in stuck.stderr.readline()
        assert stuck.poll() is None
        time.sleep(0.5)
        stuck.send_signal(signal.SIGINT)
        assert stuck.wait(timeout=20) == -signal.SIGINT


def test_several_interrupts_in_quick_succession_are_one() -> None:
    """The second does not interrupt the cleanup; one sentence, no traceback."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == "ready\n"
        for _ in range(5):
            waiting.send_signal(signal.SIGINT)
            time.sleep(0.01)
        out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130 and out == "kept\n"
    assert "Traceback" not in err and err.count("interrupted; finished work is stored") == 1
    assert "--resume and the same options" in err
