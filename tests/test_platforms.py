"""What Windows and macOS do not have is taken away on Linux: every module still imports, and locks still lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedface import platforms
from fedface.atomic_io import locked_folder, one_at_a_time
from fedface.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "sched_getaffinity",
    "fork",
    "killpg",
    "O_NONBLOCK",
    "O_CLOEXEC",
    "pwrite",
    "fchmod",
    "getloadavg",
    "sysconf",
)
IMPORT_ALL = f"""
import importlib, os, pkgutil, signal, sys
import psutil, tenseal, torch, flwr.app  # their own editions for other systems need none of it
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # an import of it fails
for name in {ABSENT!r}:
    delattr(os, name)
for name in ("SIGSTOP", "SIGCONT", "SIGKILL"):
    delattr(signal, name)
import fedface
modules = [each.name for each in pkgutil.walk_packages(fedface.__path__, "fedface.")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
from fedface import platforms
assert platforms.usable_cores() == os.cpu_count()
platforms.limit("CPU", 1)
print(len(modules))
"""


def test_every_module_imports_without_what_other_systems_lack() -> None:
    """Neither fcntl nor resource, processors of a process, stop signals, nor the calls of POSIX."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150


SPAWNED = """
import multiprocessing, os, signal
from pathlib import Path
from types import SimpleNamespace
from fedface import platforms, sandbox
platforms.PROCESSES = multiprocessing.get_context("spawn")
from fedface.cli.child_processes import started_function
from fedface.errors import FederationError
from fedface.transport.worker import WorkerProcess

if __name__ != "__main__":  # in the processes that it starts
    for module, names in ((os, ("nice", "setsid", "fork")), (signal, ("SIGKILL", "SIGSTOP", "SIGCONT"))):
        for name in names:
            delattr(module, name)
    sandbox.sys = SimpleNamespace(platform="win32")
else:
    with started_function(print, "here", log=Path("log"), name="printer") as child:
        child.wait_until(lambda: not child.running or "here" in child.output(), seconds=60)
        child.wait_until(lambda: "here" in child.output(), seconds=5)
    said = []
    with WorkerProcess("127.0.0.1:1", Path("device.yaml"), ledger=Path("none"), paused=Path("paused"),
                       report=said.append) as worker:
        worker.start()
        print(worker.answer("a token"))
"""


@pytest.mark.slow
def test_functions_run_in_processes_that_are_not_forked(tmp_path: Path) -> None:
    """As on Windows, and without what it lacks: a program writes to its file, and a worker answers."""
    (tmp_path / "main.py").write_text(SPAWNED)
    done = subprocess.run(
        [sys.executable, "main.py"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a task could not be answered: ")
    assert (tmp_path / "log").read_text() == "here\n"


def windows_locks() -> SimpleNamespace:
    """Windows's msvcrt for one process: a byte of a file is locked until the file is closed."""
    held: dict[tuple[int, int, int], int] = {}

    def locking(handle: int, mode: int, count: int) -> None:
        status = os.fstat(handle)
        byte = status.st_dev, status.st_ino, os.lseek(handle, 0, os.SEEK_CUR)
        if held.get(byte, handle) != handle and is_open(held[byte], status):
            raise PermissionError(13, "Permission denied")
        held[byte] = handle

    return SimpleNamespace(LK_NBLCK=2, locking=locking)


def is_open(handle: int, status: os.stat_result) -> bool:
    """Whether a handle is still that of the file."""
    try:
        return os.path.samestat(os.fstat(handle), status)
    except OSError:
        return False


def test_windows_locks_a_byte_behind_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run at a time works in a folder, and the mark in its lock can be read."""
    monkeypatch.setattr(platforms, "fcntl", None)
    monkeypatch.setattr(platforms, "msvcrt", windows_locks())
    with locked_folder(tmp_path, "run"):
        assert (tmp_path / "lock").read_bytes() == b"fedface run\n"
        with pytest.raises(RunError, match="another process is working"), locked_folder(tmp_path, "run"):
            pass
    with locked_folder(tmp_path, "run"), one_at_a_time(tmp_path):
        assert (tmp_path / "folder.lock").exists()


def test_a_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes at once could otherwise spend a budget twice."""
    monkeypatch.setattr(platforms, "fcntl", None)
    with pytest.raises(OSError, match="no locks"), one_at_a_time(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
def test_a_freed_block_does_not_decide_where_the_next_one_lies() -> None:
    """Without fixed thresholds glibc maps the first block of 16 MB separately, and takes the second from its heap."""
    program = """if True:
        import ctypes, fedface.platforms
        fedface.platforms.fix_allocator_thresholds()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        if not hasattr(libc, "mallinfo2"):
            print([[0, 1]] * 2)
            raise SystemExit
        class Info(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks a b c d e f".split()]
        libc.mallinfo2.restype = Info
        def mapped(size):
            before = libc.mallinfo2().hblks
            block = libc.malloc(size)
            more = libc.mallinfo2().hblks - before
            libc.free(block)
            return more
        print([[mapped(1 << 24), mapped(1 << 26)] for _ in range(2)])
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[[0, 1], [0, 1]]"
