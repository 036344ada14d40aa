"""No foreign file is overwritten: every command that writes leaves it unchanged."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from command_line import Result, caller
from png_files import write_png
from tiny import tiny_file, tiny_gan

from fedface.atomic_io import create_bytes, locked_folder, write_output
from fedface.errors import ConfigError, RunError
from fedface.models.checkpoint import load_gan, model_bytes, save_model


@pytest.fixture
def fedface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return caller(monkeypatch, capsys)


def refused(result: Result) -> str:
    """The one sentence of a refusal."""
    assert result.code == 2 and "Traceback" not in result.err, (result.code, result.out, result.err)
    return [line for line in result.err.splitlines() if line.startswith("fedface: ")][0]


FILES = [
    "photos synthesize FILE --size 16",
    "weights sample --count 1 --out FILE",
    "weights import given.pkl --out FILE",
    "weights import given.pkl --out new.safetensors --sheet FILE",
    "pretrain gan --step-fraction 0.0001 --out FILE",
    "pretrain flow --step-fraction 0.0001 --out FILE",
    "pretrain encoder --step-fraction 0.0001 --out FILE",
    "pretrain style-encoder --step-fraction 0.0001 --out FILE",
    "pretrain super-resolution --step-fraction 0.0001 --out FILE",
    "photos scan library --cache FILE",
    "upsample library/a.png --method nearest --out FILE",
    "device keygen FILE --experiment tiny.yaml --set aggregation.kind=homomorphic",
]


@pytest.mark.parametrize("words", FILES)
def test_a_foreign_file_is_left_as_it_is(fedface, tmp_path: Path, words: str) -> None:  # type: ignore[no-untyped-def]
    """A photo, a text, and a file that mentions fedface; refused before any work."""
    Path("library").mkdir()
    write_png(Path("library/a.png"), np.full((8, 8, 3), 90, dtype=np.uint8))
    Path("given.pkl").write_bytes(b"no checkpoint")
    tiny = tiny_file(tmp_path)
    tiny.write_text(tiny.read_text().replace("{kind: plain}", "{kind: homomorphic}"))
    words = words.replace(" --set aggregation.kind=homomorphic", "")
    for content in (b"\xff\xd8\xff my only photo", b"notes about the fedface picture of mine", b"x" * 5000):
        Path("mine.png").write_bytes(content)
        if b"fedface picture" in content and ("synthesize" in words or "sample" in words or "sheet" in words):
            continue  # the mark itself: no other program writes it
        result = refused(fedface(*words.replace("FILE", "mine.png").split()))
        assert "mine.png: exists" in result
        assert Path("mine.png").read_bytes() == content


def test_tables_of_a_foreign_database_stay(fedface) -> None:  # type: ignore[no-untyped-def]
    """Also those that are called as ours are."""
    Path("library").mkdir()
    write_png(Path("library/a.png"), np.full((8, 8, 3), 90, dtype=np.uint8))
    with sqlite3.connect("mine.sqlite") as sql:
        sql.execute("CREATE TABLE photo (words TEXT)")
        sql.execute("INSERT INTO photo VALUES ('precious')")
    before, mode = Path("mine.sqlite").read_bytes(), Path("mine.sqlite").stat().st_mode
    assert "is not an index of fedface" in refused(
        fedface("photos", "scan", "library", "--cache", "mine.sqlite")
    )
    assert Path("mine.sqlite").read_bytes() == before and Path("mine.sqlite").stat().st_mode == mode
    for _ in range(2):
        assert fedface("photos", "scan", "library", "--cache", "own.sqlite").code == 0


@pytest.mark.parametrize("name", ["mine.sqlite-journal", "mine.sqlite-wal", "mine.sqlite-shm"])
def test_a_foreign_file_with_the_name_of_a_journal_stays(fedface, name: str) -> None:  # type: ignore[no-untyped-def]
    """SQLite would delete it; beside a new index, and beside one of ours, whose own journal it rolls back."""
    Path("library").mkdir()
    write_png(Path("library/a.png"), np.full((8, 8, 3), 90, dtype=np.uint8))
    scan = ("photos", "scan", "library", "--cache", "mine.sqlite")
    Path(name).write_text("precious")
    assert f"would replace {name}" in refused(fedface(*scan)) and not Path("mine.sqlite").exists()
    Path(name).unlink()
    Path("mine.sqlite-journal").write_bytes(b"")
    assert fedface(*scan).code == 0
    Path(name).write_text("precious")
    assert f"would replace {name}" in refused(fedface(*scan)) and Path(name).read_text() == "precious"


def test_keys_and_ledgers_of_an_earlier_run_are_not_used_by_a_new_one(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its folder was removed, or emptied."""
    tiny_file(tmp_path)
    Path("mine.private").mkdir()
    for make in (lambda: None, Path("mine").mkdir):
        make()
        assert "belongs to an earlier run" in refused(fedface("run", "tiny.yaml", "--out", "mine"))
    assert os.listdir("mine.private") == os.listdir("mine") == []


FOLDERS = [
    "run tiny.yaml --out FOLDER",
    "run tiny.yaml --resume --out FOLDER",
    "compare tiny.yaml --out FOLDER",
    "rank-models tiny.yaml base base.safetensors --out FOLDER",
    "benchmark --method nearest --out FOLDER",
    "report FOLDER",
]


@pytest.mark.parametrize("words", FOLDERS)
@pytest.mark.parametrize("file", ["experiment.yaml", "lock", "report.html", "faces.png", "state.json"])
def test_a_foreign_folder_is_left_as_it_is(fedface, tmp_path: Path, words: str, file: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever its files are called: nothing is rewritten, emptied or added."""
    tiny = tiny_file(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("# my notes\n" + tiny.read_text())
    before = (tmp_path / "mine" / file).read_text()
    refused(fedface(*words.replace("FOLDER", "mine").split()))
    assert os.listdir("mine") == [file] and (tmp_path / "mine" / file).read_text() == before


def test_a_folder_of_one_kind_is_not_one_of_another(tmp_path: Path) -> None:
    """A run does not overwrite a benchmark; a folder of fedface is reused; a draft is not a foreign file."""
    for _ in range(2):
        with locked_folder(tmp_path / "ours", "run"):
            (tmp_path / "ours" / "state.json").write_text("{}")
    with (
        pytest.raises(RunError, match="not the folder of a benchmark"),
        locked_folder(tmp_path / "ours", "benchmark"),
    ):
        pass
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / f".fedface-{'0' * 16}.draft").write_text("half")
    with locked_folder(tmp_path / "empty", "run"):
        assert os.listdir(tmp_path / "empty") == ["lock"]


def test_our_own_files_are_replaced(fedface) -> None:  # type: ignore[no-untyped-def]
    """The same command twice: pictures, checkpoints and benchmarks are known by their content."""
    for words in ("photos synthesize a.png --size 16", "weights sample --count 1 --out a.png"):
        for _ in range(2):
            assert fedface(*words.split()).code == 0
    save_model(Path("a.safetensors"), tiny_gan())
    save_model(Path("a.safetensors"), load_gan())
    assert Path("a.safetensors").read_bytes() == model_bytes(load_gan())


def test_sheets_of_two_photos_with_one_name_are_both_kept(fedface) -> None:  # type: ignore[no-untyped-def]
    """The second is refused, for the default name and for --out; the same photo's sheet is replaced."""
    for name, grey in (("a.png", 90), ("b/a.png", 30)):
        Path(name).parent.mkdir(exist_ok=True)
        write_png(Path(name), np.full((8, 8, 3), grey, dtype=np.uint8))
    for _ in range(2):
        assert fedface("upsample", "a.png", "--method", "nearest").code == 0
    before = Path("a-faces.png").read_bytes()
    assert "a-faces.png: exists" in refused(fedface("upsample", "b/a.png", "--method", "nearest"))
    assert Path("a-faces.png").read_bytes() == before


def test_a_new_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves neither half a file nor an empty one; what was there stays."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    write_output(tmp_path / "ours", b"mark old", "mark")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            create_bytes(tmp_path / "new", b"secret")
        with pytest.raises(OSError, match="No space"):
            write_output(tmp_path / "ours", b"mark new", "mark")
    assert os.listdir(tmp_path) == ["ours"] and (tmp_path / "ours").read_bytes() == b"mark old"
    create_bytes(tmp_path / "new", b"secret")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never overwritten"):
        create_bytes(tmp_path / "new", b"other")
