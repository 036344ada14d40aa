"""Files that are replaced in one step: a reader, and a power cut, find the old bytes or the new, never half.

Two processes may write one file at the same moment: the last one wins, and neither breaks the other. A process that is
killed in the middle leaves a draft, which the next process that works in that folder removes.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from pathlib import Path

_DRAFT = re.compile(r"\.fedface-[0-9a-f]{16}\.draft")
_NO_SUCH_THING = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES}  # as a folder's fsync


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole; it and its name are on the disk on return, where the file system keeps such promises.

    A file that was there keeps its rights; a link stays, and the file that it points to is replaced.

    Args:
        path: The file, in a folder that exists.
        data: All that it holds from now on.

    Raises:
        OSError: It cannot be written, by the file's own name; what was there is as it was.
    """
    target = path.resolve()
    draft = target.parent / f".fedface-{secrets.token_hex(8)}.draft"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
        os.replace(draft, target)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # of the draft nobody has heard
        raise
    try:
        sync_folder(target.parent)
    except OSError as error:
        if error.errno not in _NO_SUCH_THING:
            raise


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def remove_drafts(folder: Path) -> None:
    """Remove what processes that were killed left in a folder; call it while no other process works there."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if _DRAFT.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk; Windows, which has no such call, does it by itself."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
