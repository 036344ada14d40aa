"""Files that are replaced in one step: a reader, and a power cut, find the old bytes or the new, never half.

Called by every room that keeps something. Two processes may write one file at the same moment: the last one wins, and
neither breaks the other.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_bytes(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file whole; it and its name are on the disk on return.

    Args:
        path: The file, in a folder that exists.
        data: All that it holds from now on.
        mode: The rights of a new file, less the process's umask.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.draft")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk; systems that cannot (Windows) do it by themselves."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
