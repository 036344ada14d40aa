"""The command `fedface device start`: a SuperNode, and the executor that answers its tasks with installed code."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedface.atomic_io import create_bytes
from fedface.cli.console import one_line, say
from fedface.config import local_path
from fedface.device.config import DeviceConfig, is_accessible_to_others, read_device_config
from fedface.errors import ConfigError, FederationError
from fedface.photos.photo_index import default_cache
from fedface.sandbox import Restrictions, end_with_parent, restrict
from fedface.transport.executor import Executor, installed_app

LOOPBACK = "127.0.0.1"
LOG = "supernode.log"  # in the state folder: the SuperNode's output since the last start
CONNECTED = b"SuperNode ID:"  # what the SuperNode logs when the server has accepted it
REACH_SECONDS = 10.0  # for the server to answer at the start
START_SECONDS = 60.0  # for the SuperNode to listen
STOP_SECONDS = 10.0  # for the SuperNode to sign off from the server


def device_start(path: Path) -> None:
    """Start the device of an owner's file; returns after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The device file or one of its files is wrong, or this version of Flower is not supported.
        FederationError: The server cannot be reached, or the SuperNode ended.
    """
    config, home = read_device_config(path), path.resolve().parent
    certificate, key = local_path(config.certificate, home), local_path(config.node_key, home)
    state = local_path(config.state, home)
    _check_files(path, certificate, key)
    _check_server(path, config.server, certificate)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    _log_to_stderr()
    try:
        with (
            _stopped_by_sigterm(),
            _supernode(config.server, certificate, key, state) as (node, address, secret),
        ):
            restrictions = _restrict(config, home, state, int(address.rpartition(":")[2]))
            say("Code that a server sends is never run: this device answers with its installed fedface.")
            _say_restrictions(restrictions)
            _wait_for_server(node, state / LOG, config.server)
            say(
                f"{_now()} {config.name} is connected to {config.server} and waits for tasks; Ctrl-C stops it."
            )
            executor = Executor(address, secret, installed_app(path))
            executor.run(running=lambda: node.poll() is None, report=lambda text: say(f"{_now()} {text}"))
            raise FederationError(_why_ended(node, state / LOG, config.server))
    except KeyboardInterrupt:
        say("stopped; the ledger and stored replies stay in the state folder")


def _check_files(path: Path, certificate: Path, key: Path) -> None:
    if not certificate.is_file():
        raise ConfigError(
            f"{path}: certificate: there is no file {certificate}; ask the server's operator for its ca.crt"
        )
    if not key.is_file():
        raise ConfigError(
            f"{path}: node_key: there is no file {key}; generate it with python clients/node_key.py {key} and send "
            f"{key}.pub to the server's operator"
        )
    if is_accessible_to_others(key):
        raise ConfigError(f"{path}: node_key: other users can read {key}; run chmod 600 on it")


def _check_server(path: Path, server: str, certificate: Path) -> None:
    """Connect once, for a reason in one sentence where the SuperNode would retry for ever."""
    found = re.fullmatch(r"\[?([^\s\[\]/]+)\]?:(\d{1,5})", server)
    if found is None:
        raise ConfigError(
            f"{path}: server: expected HOST:PORT such as fedface.example.org:443, got {server!r}"
        )
    try:
        trusted = ssl.create_default_context(cafile=str(certificate))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{path}: certificate: {certificate} is not a certificate in PEM format") from error
    try:
        with socket.create_connection((found[1], int(found[2])), REACH_SECONDS) as connection:
            trusted.wrap_socket(connection, server_hostname=found[1]).close()
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"{server} is not the server that {certificate} belongs to ({error.verify_message}); nothing was sent"
        ) from error
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FederationError(
            f"the server {server} cannot be reached ({reason}); check the address, the network, or try again later"
        ) from error


@contextmanager
def _supernode(
    server: str, certificate: Path, key: Path, state: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str, bytes]]:
    """Flower's SuperNode; yields its process, and address and secret of its runtime endpoint. It ends on leaving."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = int(free.getsockname()[1])
    secret = secrets.token_hex(32).encode()
    secret_file, log = state / f"runtime-{secrets.token_hex(4)}.secret", state / LOG
    command = [
        str(Path(sys.executable).with_name("flower-supernode")), "--superlink", server,
        "--root-certificates", str(certificate), "--auth-supernode-private-key", str(key),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        "--host", LOOPBACK, "--port", str(port),
    ]  # fmt: skip

    def prepare() -> None:  # between fork and exec; this process has no other threads yet
        end_with_parent()
        restrict(read=[certificate, key, secret_file], write=[], connect=None)

    create_bytes(secret_file, secret)
    node: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as out:
            node = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=prepare if os.name == "posix" else None,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if node.poll() is not None or time.monotonic() > deadline:
                raise FederationError(_why_ended(node, log, server))
            time.sleep(0.2)
        secret_file.unlink()  # it was read at the start
        yield node, f"{LOOPBACK}:{port}", secret
    finally:
        secret_file.unlink(missing_ok=True)
        if node is not None:
            _end(node)


def _wait_for_server(node: subprocess.Popen[bytes], log: Path, server: str) -> None:
    """Return when the server has accepted the SuperNode. Raises FederationError if it ends instead."""
    while CONNECTED not in log.read_bytes():
        if node.poll() is not None:
            raise FederationError(_why_ended(node, log, server))
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _end(node: subprocess.Popen[bytes]) -> None:
    node.terminate()
    try:
        node.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()


def _why_ended(node: subprocess.Popen[bytes], log: Path, server: str) -> str:
    text = re.sub(r"\x1b\[\d*m", "", log.read_text(encoding="utf-8", errors="replace"))
    if (reason := re.search(r"Exit Code: .*?(?=\n\n|\Z)", text, re.DOTALL)) is not None:
        text = reason[0]
    how = "did not start" if node.poll() is None else f"ended with exit code {node.returncode}"
    unknown = (
        "; ask the server's operator to register this device's public key, and after a crash wait a minute"
    )
    advice = unknown if "activate" in text else f"; its log is {log}"
    return f"flower-supernode, the connection to {server}, {how}: {one_line(text)[-600:]}{advice}"


def _restrict(config: DeviceConfig, home: Path, state: Path, port: int) -> Restrictions:
    """Take from this process what answering tasks does not need, before anything is received."""
    photos = local_path(config.photos, home)
    index = default_cache(photos).parent
    temporary = state / "tmp"  # torch insists on one, and /tmp is open to others
    for folder in (index, temporary):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["TMPDIR"] = str(temporary)
    read, write = (
        [photos, home],
        [state, index],
    )  # an editor may replace the device file, so its folder is needed
    if config.detector is not None:
        read.append(local_path(config.detector, home))
    if config.witness is not None:
        witness = local_path(config.witness, home)
        witness.mkdir(exist_ok=True, mode=0o700)
        write.append(witness)
    return restrict(read=read, write=write, connect=[port])


def _say_restrictions(restrictions: Restrictions) -> None:
    if restrictions.enforced:
        say(f"The system keeps from the code that sees photos: {', '.join(restrictions.enforced)}.")
    if restrictions.missing:
        say(f"This system cannot keep from it: {', '.join(restrictions.missing)}.")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A service is stopped as by Ctrl-C."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_stderr() -> None:
    """Warnings of this process, as plain lines; the SuperNode's output goes to its own file."""
    log = logging.getLogger("fedface")
    log.addHandler(logging.StreamHandler())
    log.propagate = False


def _now() -> str:
    return time.strftime("%H:%M:%S")
