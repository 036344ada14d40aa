"""What a command meets besides good input: no home, narrow encodings, closed outputs, read-only disks, odd scalars."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import caller
from png_files import write_png
from tiny import (
    NO_PRIVACY,
    SilentProgress,
    answered_device,
    started,
    tiny_experiment,
    tiny_file,
    tiny_gan,
    train_task,
)

from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run_state import RunState, weights_path
from fedface.device.client import handle_task
from fedface.errors import ConfigError, LedgerError, LibraryError
from fedface.experiment import devices_folder, read_experiment
from fedface.models.checkpoint import load_model, save_model, weights_hash
from fedface.photos.photo_index import default_cache
from fedface.simulation.in_process import in_process_cohort

ROOT = Path(__file__).resolve().parents[1]
NO_HOME = """
import os, pwd, sys
def unknown(*_): raise KeyError("uid not found")
pwd.getpwuid = unknown
for name in ("HOME", "XDG_STATE_HOME"): os.environ.pop(name, None)
from fedface import cli
cli.main()
"""


@pytest.fixture
def fedface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return caller(monkeypatch, capsys)


def process(folder: Path, *words: str, script: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    """`fedface WORDS...` in a process of its own."""
    start = script or "from fedface import cli; cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.run(
        [sys.executable, "-c", start, *words], cwd=folder, env=environment, text=True, timeout=120, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def test_a_user_without_a_home_folder_gets_sentences(tmp_path: Path) -> None:
    """As in a container with --user and no passwd entry: what needs no home works, the rest says what to set."""
    (tmp_path / "library").mkdir()
    write_png(tmp_path / "library/a.png", np.full((8, 8, 3), 90, dtype=np.uint8))
    assert process(tmp_path, "--version", script=NO_HOME).stdout.startswith("fedface ")
    done = process(tmp_path, "photos", "scan", "library", script=NO_HOME)
    assert (
        done.returncode == 2
        and "set HOME or XDG_STATE_HOME" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = process(tmp_path, "photos", "scan", "library", "--cache", "index.sqlite", script=NO_HOME)
    assert done.returncode == 0 and "a.png" in done.stdout, done.stderr


def test_the_default_index_needs_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(LibraryError, match="no home folder"):
        default_cache(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_narrow_encodings_get_the_nearest_letters(tmp_path: Path, encoding: str) -> None:
    """A file's name, Monk's table and sizes with narrow spaces; no letter ends a command."""
    path = tmp_path / "n€é.yaml"
    path.write_text(tiny_file(tmp_path).read_text(), encoding="utf-8")
    words = ("plan", str(path), "--set", f"privacy={NO_PRIVACY}")
    done = process(tmp_path, *words, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert done.returncode == 0 and "32.2 kB" in done.stdout.replace("\xa0", " "), done.stderr
    done = process(
        tmp_path,
        "policy",
        "check",
        "n€é.yml",
        encoding=encoding,
        env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr


def test_a_closed_output_ends_a_command_quietly(tmp_path: Path) -> None:
    """`| head` that has seen enough; `>&-`; and a full disk, which is a sentence."""
    reading, writing = os.pipe()
    os.close(reading)
    done = process(tmp_path, "--help", stdout=writing)
    os.close(writing)
    assert done.stderr == "" and done.returncode == 1
    done = process(tmp_path, "--version", stdout=None, script="import os; os.close(1); import sys\n"
                   "sys.stdout = None\nfrom fedface import cli; cli.main()")  # fmt: skip
    assert done.stderr == "" and done.returncode == 0
    with open("/dev/full", "w") as full:
        done = process(tmp_path, "--help", stdout=full)
    assert done.stderr == "fedface: the disk: No space left on device\n" and done.returncode == 2


def test_an_empty_argument_is_no_path(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As of a shell variable that is not set; in a file, with its line."""
    path = tiny_file(tmp_path)
    for words in (["run", "tiny.yaml", "--out", ""], ["run", "tiny.yaml", "--out="], ["photos", "scan", ""]):
        assert "of the command is empty" in fedface(*words).sentence
    assert list(Path().glob("state*")) == []
    path.write_text(path.read_text().replace(str(tmp_path / "base.safetensors"), '""'))
    assert fedface("plan", "tiny.yaml").sentence.startswith('tiny.yaml:18: base: expected a path, got ""')


@pytest.mark.parametrize(
    "scalar",
    [
        "2027-02-30",
        "0x_",
        "0b_",
        "1_",
        "1__2",
        "+_1",
        "1_.5",
        "9" * 5000,
        "1:99999",
        '"\\ud800"',
        "!!float ''",
        "=",
    ],
)
def test_impossible_scalars_are_said_with_their_line(fedface, tmp_path: Path, scalar: str) -> None:  # type: ignore[no-untyped-def]
    """In numbers, dates, texts, keys and lists."""
    path = tiny_file(tmp_path)
    original = path.read_text()
    for key in ("seed", "devices", "holdout", "vary"):
        lines = [line for line in original.splitlines() if not line.startswith(f"{key}:")]
        path.write_text("\n".join([*lines, f"{key}: {scalar}"]))
        for command in ("plan", "compare"):
            result = fedface(command, "tiny.yaml")
            assert result.code == 2 and "tiny.yaml" in result.err and "Traceback" not in result.err
            if key in ("seed", "devices") or (key == "holdout" and command == "plan"):
                assert f"tiny.yaml:{len(lines) + 1}: {key}" in result.err
    policy = (
        (ROOT / "clients/policy.example.yaml")
        .read_text()
        .replace("# expires: 2027-12-31", f"expires: {scalar}")
    )
    Path("policy.yaml").write_text(policy)
    result = fedface("policy", "check", "policy.yaml").sentence
    assert result.startswith(f"policy.yaml:{len(policy.splitlines())}: expires: ")


def test_a_base_counts_from_the_files_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line from the current folder; `~` is the home folder."""
    path = tiny_file(tmp_path / "experiments")
    path.write_text(
        path.read_text().replace(str(tmp_path / "experiments/base.safetensors"), "base.safetensors")
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "experiments"))
    expected = weights_hash(*tiny_gan().modules())
    for changes in ({}, {"base": "~/base.safetensors"}, {"base": "../experiments/base.safetensors"}):
        assert weights_hash(*read_experiment(path, changes=changes).start().modules()) == expected
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(ConfigError, match="no home folder"):
        read_experiment(path)


def test_a_round_that_was_cut_is_asked_again(tmp_path: Path) -> None:
    """Cut anywhere, or emptied, alone or after others, recorded or not: as if its file had been deleted."""
    experiment = tiny_experiment(tmp_path, {"privacy": "{kind: no-privacy}"})
    folder = started(experiment, tmp_path / "run")
    cohort = in_process_cohort(experiment, devices_folder(folder))
    plan = experiment.plan()
    state = run_rounds(experiment, plan, cohort, RunState.read(folder), None, SilentProgress())
    last, whole = weights_path(folder, 2), weights_path(folder, 2).read_bytes()
    for size in (0, 7, len(whole) // 2):
        last.write_bytes(whole[:size])
        again = run_rounds(experiment, plan, cohort, RunState.read(folder), None, SilentProgress())
        assert [r.weights_hash for r in again.rounds] == [r.weights_hash for r in state.rounds]
        assert weights_hash(*load_model(last).modules()) == state.rounds[-1].weights_hash
    state = RunState.read(folder)
    for path in (weights_path(folder, 1), last):
        path.write_bytes(b"")
    again = run_rounds(experiment, plan, cohort, state, None, SilentProgress())
    assert [r.weights_hash for r in again.rounds] == [r.weights_hash for r in state.rounds]
    last.write_bytes(b"")
    run_rounds(experiment, plan, cohort, replace(state, rounds=state.rounds[:1]), None, SilentProgress())
    assert weights_hash(*load_model(last).modules()) == state.rounds[-1].weights_hash


def test_a_typo_beside_all_is_said(fedface) -> None:  # type: ignore[no-untyped-def]
    write_png(Path("a.png"), np.full((8, 8, 3), 90, dtype=np.uint8))
    result = fedface("upsample", "a.png", "--method", "all", "--method", "pulze").sentence
    assert 'got pulze; did you mean "pulse"?' in result


def test_plan_relates_the_batch_to_rate_and_library(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """24 photos at rate 0.5 are 12 a step; a divisor of 64 is warned of, one of 8 is not; and it is not silent."""
    path = str(tiny_file(tmp_path))
    result = fedface("plan", path)
    assert (
        "trains on 24 photos on average, of which about 12 join a step" in result.out
        and "expected_batch_size near" not in result.out
    )
    assert "computing the noise ..." in result.err
    result = fedface("plan", path, "--set", "training.expected_batch_size=64")
    assert "set training.expected_batch_size near 12, or training.sampling_rate near 1" in result.out


def test_a_ledger_on_a_read_only_disk_is_read_and_not_written(
    fedface,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    """show, verify, export and log do not touch a file; a device that would record there fails closed."""
    device, experiment = answered_device(tmp_path)
    ledger = device.ledger_path
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in ledger.parent.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for name in ("chmod", "replace", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    for words in (("ledger", "show", ledger), ("ledger", "verify", ledger), ("ledger", "export", ledger),
                  ("ledger", "show", "device.yaml"), ("device", "log", "device.yaml")):  # fmt: skip
        result = fedface(*words)
        assert result.code == 0, result.err
    with pytest.raises(LedgerError):
        handle_task(train_task(experiment, tiny_gan(), round=2), device)
    monkeypatch.undo()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in ledger.parent.iterdir()} == before


def test_names_that_are_no_utf8_stay_apart_in_the_record_of_sheets(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The byte 0xff, and the text that such a byte is often written as: two photos, two sheets."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"\xff.png", b"\\xff.png"):
        write_png(photos / os.fsdecode(name), np.full((8, 8, 3), 90, dtype=np.uint8))
    result = fedface("upsample", "photos", "--method", "nearest", "--out", "sheets")
    assert result.code == 0 and "2 photos, 2 sheets" in result.out, result.err
    assert (
        "2 of 2 photos already have their sheets"
        in fedface("upsample", "photos", "--method", "nearest", "--out", "sheets").out
    )


def test_a_model_is_saved_over_our_own_alone(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not ours")
    with pytest.raises(ConfigError, match="will not be replaced"):
        save_model(tmp_path / "a.safetensors", tiny_gan())
