"""What Linux, macOS and Windows do differently: locks, folders on the disk, processors, new processes and their limits.

Only Linux has been run. Tests take away what the others lack, and check what is left.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal


def _module(name: str) -> Any:
    """A module of the standard library, or None on a system that does not have it."""
    try:
        return import_module(name)
    except ImportError:
        return None


fcntl, msvcrt, resource = map(_module, ("fcntl", "msvcrt", "resource"))
BINARY: int = getattr(os, "O_BINARY", 0)  # for os.open: without it Windows translates the ends of lines
NO_WAITING: int = getattr(os, "O_NONBLOCK", 0)  # for os.open: return at once for a pipe without a writer
# How a function runs in a process of its own. Linux shares the memory of what is imported already; macOS ends processes
# that are forked and then use its libraries, and Windows forks none.
PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
LOCKED_BYTE = 1 << 30  # behind the end of any locked file: Windows refuses to read a byte that is locked
LOCK_POLL_SECONDS = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LOW_PRIORITY = 10  # added to the niceness, of 19 at most


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file or folder against other processes, until it is closed.

    Raises:
        OSError: It is locked, and `wait` is false; or this system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    if msvcrt is None:
        raise OSError(errno.ENOTSUP, "this system has no locks for files")
    while True:
        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            return
        except OSError:
            if not wait:
                raise
        time.sleep(LOCK_POLL_SECONDS)


def open_to_lock(folder: Path) -> int:
    """A handle of a folder, or of a file in it on Windows, which opens no folders."""
    if fcntl is not None:
        return os.open(folder, os.O_RDONLY)
    return os.open(folder / "folder.lock", os.O_RDWR | os.O_CREAT | BINARY, 0o600)


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk; Windows does so by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usable_cores() -> int:
    """How many processors this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fix_allocator_thresholds() -> None:
    """Let no freed block decide how later ones are allocated, as glibc does: at its own upper bound, for all sizes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none, and no thresholds that move
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, 1 << 26)


def lower_priority() -> None:
    """Let other programs of this machine go first, where that is possible; on Windows nothing."""
    if hasattr(os, "nice"):
        with suppress(OSError):
            os.nice(LOW_PRIORITY)


def limit(kind: Literal["AS", "CORE", "CPU", "FSIZE"], amount: int) -> None:
    """Lower a soft limit of this process (setrlimit(2)) as far as its hard limit allows; on Windows nothing."""
    if resource is None:
        return
    number = getattr(resource, f"RLIMIT_{kind}")
    hard = resource.getrlimit(number)[1]
    resource.setrlimit(number, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))
