"""A run from experiment to report, and its interruptions."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import PROCESSES
from tiny import tiny_file

from fedface import cli
from fedface.experiment import devices_folder
from fedface.models.checkpoint import load_model, weights_hash
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import LedgerEntry
from fedface.reports import run_record


def fedface(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedface", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def attempts(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Round and attempt of every record, by device."""
    return {
        state.name: [(entry.round, entry.attempt) for entry in Ledger.open(state / "ledger.sqlite").entries()]
        for state in sorted(devices_folder(folder).iterdir())
    }


def test_a_run_ends_with_a_record_a_page_and_a_card_that_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; the record has the hash of the weights on disk, and the page is one file without requests."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_file(tmp_path)
    recipe.write_text(recipe.read_text().replace("{kind: plain}", "{kind: masked}"))
    assert fedface(monkeypatch, "run", str(recipe)) == 0
    result = capsys.readouterr().out
    folder = Path("runs/tiny")
    assert str(folder / "report.html") in result

    record = run_record.read(folder)
    assert record.name == "tiny" and record.question == "Does a small run end?"
    assert [round.participants for round in record.rounds] == [("device-00", "device-01")] * 2
    assert record.base_hash == weights_hash(*load_model(tmp_path / "base.safetensors").modules())
    assert record.final_hash == weights_hash(*load_model(folder / "rounds" / "002.safetensors").modules())
    assert record.final_hash == record.rounds[-1].weights_hash != record.base_hash
    assert {entry.protocol for entry in record.aggregation} == {"plain", "masked", "homomorphic"}
    assert len(record.attacks) == 2
    assert record.command == "fedface run tiny.yaml"
    assert attempts(folder) == {f"device-0{i}": [(1, 1), (2, 1)] for i in range(2)}

    page = (folder / "report.html").read_text(encoding="utf-8")
    card = (folder / "model-card.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert record.final_hash in text and "Does a small run end?" in text
    assert 'src="http' not in page and "<script src" not in page and "@import" not in page
    for picture in record.pictures.values():
        assert (folder / picture.file).read_bytes()[:4] == b"\x89PNG"

    assert fedface(monkeypatch, "report", str(folder)) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("quick_charts")
def test_a_new_run_gets_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If runs/tiny exists, the same command creates runs/tiny-2; --json prints only the record."""
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny").mkdir(parents=True)
    words = [
        "run",
        str(tiny_file(tmp_path)),
        "--set",
        "training.rounds=1",
        "--set",
        "privacy={kind: no-privacy}",
    ]
    assert fedface(monkeypatch, *words, "--json") == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["name"] == "tiny-2"
    assert run_record.read(Path("runs/tiny-2")).final_hash == reported["final_hash"]
    assert list(Path("runs/tiny").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick_charts")
def test_a_run_interrupted_while_measuring_only_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rounds on disk, no report: --resume sends no task."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_file(tmp_path)

    def killed(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedface.coordinator.run.audit_update_leakage", killed)
        assert fedface(monkeypatch, "run", str(recipe)) == 130
    folder = Path("runs/tiny")
    rounds = json.loads((folder / "state.json").read_text())["rounds"]
    before = attempts(folder)
    assert len(rounds) == 2 and not (folder / "run.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("fedface.device.client.prepare_round", killed)
        assert fedface(monkeypatch, "run", str(recipe), "--resume") == 0
    assert attempts(folder) == before
    assert [round.weights_hash for round in run_record.read(folder).rounds] == [
        r["weights_hash"] for r in rounds
    ]


def stored(folder: Path, name: str, round: int) -> bytes | None:
    """The reply to a round that a device still has."""
    return Ledger.open(devices_folder(folder) / name / "ledger.sqlite").load_reply(folder.name, round)


def asked_for(ledger: Path, round: int) -> bool:
    """Whether a device has recorded a round, without disturbing it."""
    if not ledger.is_file():
        return False
    database = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=0.2)
    try:
        count = "SELECT count(*) FROM records WHERE kind = ? AND json_extract(content, '$.round') = ?"
        return bool(database.execute(count, (LedgerEntry.KIND, round)).fetchone()[0])
    except sqlite3.Error:
        return False
    finally:
        database.close()


def _command(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    sys.argv = ["fedface", *words]
    cli.main()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_charts")
def test_a_run_killed_in_the_middle_of_a_round_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while devices train: rounds on disk remain, stored replies are sent again unchanged. Exactly the devices
    that had a record and no reply record a second time; their owners allowed that.
    """
    monkeypatch.chdir(tmp_path)
    recipe = tiny_file(tmp_path)
    words = ["run", str(recipe), "--set", "training.rounds=2", "--set", "training.steps_per_round=8"]
    words += ["--set", "devices.light_fractions=[0.9, 0.5, 0.1]", "--set", "aggregation={kind: homomorphic}"]
    words += ["--set", "policy={max_epsilon: 30, delta: 1e-3, protocols: [homomorphic], min_cohort_size: 2}"]
    folder = tmp_path / "runs" / "tiny"
    work = PROCESSES.Process(target=_command, args=(tmp_path, words))
    work.start()
    try:
        until = time.monotonic() + 120
        while not asked_for(devices_folder(folder) / "device-01" / "ledger.sqlite", 2):
            assert work.is_alive() and time.monotonic() < until, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        work.kill()
        work.join()
    begun = json.loads((folder / "state.json").read_text())["rounds"]
    assert len(begun) == 1 and not (folder / "run.json").exists()
    recorded = attempts(folder)

    assert fedface(monkeypatch, *words, "--resume") == 0
    record = run_record.read(folder)
    assert [round.weights_hash for round in record.rounds][: len(begun)] == [r["weights_hash"] for r in begun]
    assert [round.round for round in record.rounds] == [1, 2]
    after = attempts(folder)
    for name, entries in after.items():
        assert entries[: len(recorded[name])] == recorded[name]
        times = Counter(round for round, _ in entries)
        assert times == {1: 1, 2: 1}
