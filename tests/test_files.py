"""Atomic file replacement: a reader sees the old or the new file, with concurrent writers too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedface.atomic_io import locked_folder, remove_drafts, replace_bytes, replace_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    replace_text(tmp_path / "saved", "old")
    replace_text(tmp_path / "saved", "né")
    assert (tmp_path / "saved").read_bytes() == b"n\xc3\xa9"
    assert os.listdir(tmp_path) == ["saved"]


def test_concurrent_writers_do_not_interfere(tmp_path: Path) -> None:
    """Each reader sees one writer's bytes, complete; with one draft for all, the later rename would find no file."""
    path = tmp_path / "saved"
    wholes = [bytes([number]) * 200_000 for number in range(8)]
    replace_bytes(path, wholes[0])

    def write_and_read(data: bytes) -> bytes:
        replace_bytes(path, data)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write_and_read, wholes * 10))
    assert set(seen) <= set(wholes)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_text(tmp_path / "saved", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "saved", "new")
    assert (tmp_path / "saved").read_text() == "old"
    assert os.listdir(tmp_path) == ["saved"]


def test_mode_and_symbolic_links_are_preserved(tmp_path: Path) -> None:
    replace_text(tmp_path / "private", "old")
    (tmp_path / "private").chmod(0o600)
    (tmp_path / "link").symlink_to("private")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "private").read_text() == "new"
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrong", ["folder", "none/file", "a" * 300])
def test_a_write_error_names_the_file(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as found:
        replace_text(tmp_path / wrong, "new")
    assert found.value.filename == str(tmp_path / wrong) and "draft" not in str(found.value)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_name_of_maximum_length_works(tmp_path: Path) -> None:
    replace_text(tmp_path / ("a" * 255), "saved")
    assert os.listdir(tmp_path) == ["a" * 255]


def test_folders_that_cannot_be_synced_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems return EINVAL; the file itself is already written."""

    def none(folder: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fedface.atomic_io.sync_folder", none)
    replace_text(tmp_path / "saved", "new")
    assert (tmp_path / "saved").read_text() == "new"


def test_drafts_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """Killed between writing the draft and renaming it."""
    script = (
        "import os, signal, sys; from pathlib import Path; from fedface.atomic_io import replace_text\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_text(Path(sys.argv[1]) / 'state.json', 'device-00')"
    )
    with locked_folder(tmp_path, "run"):
        (tmp_path / "mine.draft").write_text("saved")
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 3
    with locked_folder(tmp_path, "run"):
        assert sorted(os.listdir(tmp_path)) == ["lock", "mine.draft"]
    remove_drafts(tmp_path / "none")  # nothing to do where there is no folder
