"""A file that is replaced in one step is whole for every reader, whoever else writes it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedface.files import replace_bytes, replace_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    replace_text(tmp_path / "kept", "old")
    replace_text(tmp_path / "kept", "né")
    assert (tmp_path / "kept").read_bytes() == b"n\xc3\xa9"
    assert os.listdir(tmp_path) == ["kept"]


def test_writers_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    """Each reader sees one writer's bytes, whole; with one draft for all, the later rename finds no file."""
    path = tmp_path / "kept"
    wholes = [bytes([number]) * 200_000 for number in range(8)]
    replace_bytes(path, wholes[0])

    def write_and_read(data: bytes) -> bytes:
        replace_bytes(path, data)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write_and_read, wholes * 10))
    assert set(seen) <= set(wholes)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_text(tmp_path / "kept", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old"
    assert os.listdir(tmp_path) == ["kept"]


def test_a_new_file_may_be_kept_from_others(tmp_path: Path) -> None:
    replace_bytes(tmp_path / "key", b"secret", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
