"""The one door for files that fedface writes: a new file or one of its own, written whole or not at all.

A file is written beside its name and then renamed: a reader, a full disk and a power cut find the old bytes or the new,
never half. A process that is killed in the middle leaves a draft, which the next process that works in that folder
removes. What fedface wrote is known by content, never by name: a file by the mark near its beginning, a folder by the
text of its lock.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedface.errors import ConfigError, RunError
from fedface.platforms import BINARY, lock, open_to_lock, sync_folder

_DRAFT = re.compile(r"\.fedface-[0-9a-f]{16}\.draft")
_MARK_WITHIN = 2000  # bytes from the beginning of a file
_NO_SUCH_THING = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES}  # as a folder's fsync


def write_output(path: Path, data: bytes, mark: str, *, mode: int | None = None) -> None:
    """Write a file that a user named: a new one, or in place of one with the same mark.

    Args:
        path: The file, in a folder that exists.
        data: All that it contains from now on, with the mark in its first 2000 bytes.
        mark: What the files of this kind that fedface wrote have in common.
        mode: As for `replace_bytes`.

    Raises:
        ConfigError: The file exists and does not have the mark; it is as it was.
        OSError: It cannot be written; what was there is as it was.
    """
    check_output(path, mark)
    replace_bytes(path, data, mode=mode)


def check_output(path: Path, mark: str) -> None:
    """Raise ConfigError where `write_output` would; for callers with hours of work ahead."""
    if not path.is_dir() and path.exists() and not has_mark(path, mark):
        raise ConfigError(
            f"{path}: exists and will not be replaced, because fedface did not write it; name another"
        )


def has_mark(path: Path, mark: str) -> bool:
    """Whether a file has a mark near its beginning; False for a pipe or a device."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(_MARK_WITHIN)


def create_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a new file, on the disk on return.

    Raises:
        ConfigError: There is a file at this path already.
        OSError: It cannot be written; then there is none.
    """
    try:
        os.close(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, mode)
        )  # the name is ours from here on
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already and is never overwritten; name another") from error
    try:
        replace_bytes(path, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a file of a folder that is ours; it and its name are on the disk on return, if the file system can do that.

    A link stays, and the file that it points to is replaced.

    Args:
        path: The file, in a folder that exists.
        data: All that it contains from now on.
        mode: Its rights; None: those of the file that was there, or the process's default.

    Raises:
        OSError: It cannot be written, by the file's own name; what was there is as it was.
    """
    target = path.resolve()
    draft = target.parent / f".fedface-{secrets.token_hex(8)}.draft"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY
        handle = os.open(draft, flags, 0o666 if mode is None else mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is None and target.exists():
            os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
        os.replace(draft, target)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # the draft is not the path of the caller
        raise
    try:
        sync_folder(target.parent)
    except OSError as error:
        if error.errno not in _NO_SUCH_THING:
            raise


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


@contextmanager
def locked_folder(folder: Path, kind: str) -> Iterator[None]:
    """Create a folder for a run or the like, or enter one created here; one process at a time.

    Args:
        folder: New, empty, or created by this function for the same kind.
        kind: Such as "run".

    Raises:
        RunError: It contains other files, which stay as they are, or another process works in it.
    """
    mark, place = f"fedface {kind}\n".encode(), folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = place.read_bytes()[: len(mark) + 1] if place.is_file() else b""
        others = [entry for entry in folder.iterdir() if not _DRAFT.fullmatch(entry.name) and entry != place]
        if found != mark and (found or others):
            name = others[0].name if others else place.name
            raise RunError(
                f"{folder}: contains {name}, and is not the folder of a {kind}; nothing in it is replaced. Name a new "
                "or an empty folder"
            )
        handle = os.open(place, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
    except OSError as error:
        raise RunError(f"{folder}: cannot be the folder of a {kind} ({error.strerror})") from error
    try:
        try:
            lock(handle, wait=False)
        except OSError as error:
            raise RunError(f"{folder}: another process is working on this {kind}") from error
        if not found:
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, mark)
        for inside in (folder, folder / "rounds"):
            remove_drafts(inside)
        yield
    finally:
        os.close(handle)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other thread or process is inside for the same folder."""
    handle = open_to_lock(folder)
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def remove_drafts(folder: Path) -> None:
    """Remove what processes that were killed left in a folder; call it while no other process works there."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if _DRAFT.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
