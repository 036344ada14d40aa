"""Takes rights away from this process, for good, with what the kernel offers to a user without root.

Linux: no new privileges (prctl), files and TCP ports (Landlock, kernel 5.13 and 6.7), and other sockets (seccomp).
Children inherit all of it. Elsewhere nothing is enforced, and the result says so.
Sources: prctl(2), landlock(7), seccomp(2); linux/landlock.h, ABI 7.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
PATH_BENEATH, NET_PORT = 1, 2
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READ = EXECUTE | READ_FILE | READ_DIR
WRITE_1 = (1 << 13) - 1 - READ  # write, remove and create everything, in ABI 1
REFER = 1 << 13
OF_FILES = (
    EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
)  # rights that a rule about a file, not a folder, may have
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_SOCKETS = 1
# Programs, libraries, devices (which have rights of their own) and what the kernel says about itself.
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/dev", "/proc", "/sys", "/run", "/nix")
ARCHITECTURES = {
    "x86_64": (0xC000003E, 41),
    "aarch64": (0xC00000B7, 198),
}  # AUDIT_ARCH_..., number of socket(2)
IO_URING_SETUP, X32 = 425, 0x40000000


@dataclass(frozen=True, kw_only=True)
class Restrictions:
    """What a process has given up, and what this system cannot enforce, as phrases for its owner."""

    enforced: tuple[str, ...]
    missing: tuple[str, ...]


def restrict(*, read: Iterable[Path], write: Iterable[Path], connect: Iterable[int] | None) -> Restrictions:
    """Restrict this thread and all threads and processes that it starts from now on. Call it before others start.

    Args:
        read: Files and folders to read, beside Python's and the system's own (`SYSTEM`).
        write: Files and folders, which must exist, to read and to write.
        connect: TCP ports to which connections are allowed, on any host, and no other network; None: any network.

    Raises:
        OSError: The kernel offers Landlock and refuses a rule; then the process should not go on.
    """
    files, tcp, sockets = "files outside its own", "TCP connections", "UDP and other sockets"
    requested = (files,) if connect is None else (files, tcp, sockets)
    if sys.platform != "linux":
        return Restrictions(enforced=(), missing=("new privileges", *requested))
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    abi = int(libc.syscall(CREATE_RULESET, None, 0, 1))  # below 1: no Landlock in this kernel
    done = ["new privileges"]
    if abi >= 1:
        ports = None if connect is None or abi < 4 else tuple(connect)
        _landlock(libc, abi, tuple(read), tuple(write), ports)
        done += [files] if ports is None else [files, tcp]
    if connect is not None and platform.machine() in ARCHITECTURES:
        done += [sockets] if _only_tcp_sockets(libc) else []
    return Restrictions(enforced=tuple(done), missing=tuple(each for each in requested if each not in done))


def end_with_parent(*, at_once: bool = False) -> None:
    """End this process when the process that started it ends, `at_once` even if it is stopped; on Linux alone."""
    if sys.platform == "linux":
        ending = signal.SIGKILL if at_once else signal.SIGTERM
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ending, 0, 0, 0)


def _landlock(
    libc: ctypes.CDLL,
    abi: int,
    read: tuple[Path, ...],
    write: tuple[Path, ...],
    ports: tuple[int, ...] | None,
) -> None:
    writing = WRITE_1 | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0)
    network = 0 if ports is None else BIND_TCP | CONNECT_TCP
    scope = SCOPE_ABSTRACT_SOCKETS if ports is not None and abi >= 6 else 0
    attributes = struct.pack("=QQQ", READ | writing, network, scope)[
        : 8 if abi < 4 else 16 if abi < 6 else 24
    ]
    ruleset = _checked(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0))
    try:
        _allow(libc, ruleset, (*map(Path, SYSTEM), *_python_folders(), *read), READ)
        _allow(libc, ruleset, (Path("/dev"),), READ | writing & OF_FILES)
        _allow(libc, ruleset, write, READ | writing)
        for port in ports or ():
            rule = struct.pack("=QQ", CONNECT_TCP, port)
            _checked(libc.syscall(ADD_RULE, ruleset, NET_PORT, rule, 0))
        _checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _python_folders() -> list[Path]:
    """Where this Python imports from, without a folder that all of the user's files lie in."""
    home = Path(os.path.expanduser("~")).resolve()
    own = Path(__file__).parent  # on no search path if it is installed with `pip install --editable`
    named = (sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), *filter(None, sys.path))
    return [place for place in (own, *map(Path, named)) if not home.is_relative_to(place.resolve())]


def _allow(libc: ctypes.CDLL, ruleset: int, places: Iterable[Path], rights: int) -> None:
    for place in places:
        try:
            handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # what cannot be opened needs no right
            continue
        try:
            own = rights if place.is_dir() else rights & OF_FILES
            _checked(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", own, handle), 0))
        finally:
            os.close(handle)


def _only_tcp_sockets(libc: ctypes.CDLL) -> bool:
    """Sockets of IPv4 and IPv6 with TCP alone, for Landlock to limit: neither UDP, Unix sockets nor io_uring.

    False if the kernel has no such filters.
    """
    architecture, socket = ARCHITECTURES[platform.machine()]
    load, equal, at_least, and_, end = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | 13  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EACCES
    # Operation, constant, instructions to skip if true and if false; 0: nr, 4: architecture, 16, 24, 32: arguments.
    program = (
        (load, 4, 0, 0),
        (equal, architecture, 0, 14),
        (load, 0, 0, 0),
        (at_least, X32, 12, 0),
        (equal, IO_URING_SETUP, 11, 0),
        (equal, socket, 0, 9),
        (load, 16, 0, 0),  # family
        (equal, 2, 1, 0),  # AF_INET
        (equal, 10, 0, 7),  # AF_INET6
        (load, 24, 0, 0),  # type, with flags above the low four bits
        (and_, 0xF, 0, 0),
        (equal, 1, 0, 4),  # SOCK_STREAM
        (load, 32, 0, 0),  # protocol: TCP is 0 or 6; Multipath TCP and SCTP would bypass Landlock
        (equal, 0, 1, 0),
        (equal, 6, 0, 1),
        (end, allow, 0, 0),
        (end, deny, 0, 0),
    )
    code = b"".join(
        struct.pack("=HBBI", operation, yes, no, constant) for operation, constant, yes, no in program
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, filter_, 0, 0) == 0)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel refused a restriction of this process ({os.strerror(number)})")
    return result
