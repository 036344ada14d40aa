"""The command `fedface device start`: a SuperNode, and the executor that answers its tasks with installed code."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from fedface.atomic_io import create_bytes
from fedface.cli.child_processes import (
    LOOPBACK,
    START_SECONDS,
    Child,
    listens,
    started,
    stopped_by_sigterm,
)
from fedface.cli.console import say
from fedface.device.config import (
    DeviceConfig,
    check_state_folder,
    is_accessible_to_others,
    read_device_config,
)
from fedface.errors import ConfigError, FederationError
from fedface.photos.photo_index import default_cache
from fedface.sandbox import restrict
from fedface.transport.executor import Executor, installed_app

CONNECTED = "SuperNode ID:"  # what the SuperNode logs when the server has accepted it
REACH_SECONDS = 10.0  # for the server to answer at the start
MAX_AHEAD, MAX_BEHIND = 4.0, 300.0  # seconds of a device's clock; SuperLink refuses more than 5 and 305


def device_start(path: Path) -> None:
    """Start the device of an owner's file; returns after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The device file or one of its files is wrong, or this version of Flower is not supported.
        FederationError: The server cannot be reached, or the SuperNode ended.
    """
    config = read_device_config(path)
    _check_files(path, config)
    _check_server(path, config)
    check_state_folder(path, config.state)
    _log_to_stderr()
    try:
        with stopped_by_sigterm(), _supernode(config) as (node, port, secret):
            say("Code that a server sends is never run: this device answers with its installed fedface.")
            _restrict(config, path.resolve().parent, port)
            try:
                node.wait_until(lambda: CONNECTED in node.output())
                say(
                    f"{_now()} {config.name} is connected to {config.server} and waits for tasks; Ctrl-C stops it."
                )
            except FederationError as error:
                raise FederationError(_why_ended(node, config.server)) from error
            executor = Executor(f"{LOOPBACK}:{port}", secret, installed_app(path))
            executor.run(running=lambda: node.running, report=lambda text: say(f"{_now()} {text}"))
            raise FederationError(_why_ended(node, config.server))
    except KeyboardInterrupt:
        say("stopped; the ledger and stored replies stay in the state folder")


def _check_files(path: Path, config: DeviceConfig) -> None:
    certificate, key = config.certificate, config.node_key
    if not certificate.is_file():
        raise ConfigError(
            f"{path}: certificate: there is no file {certificate}; ask the server's operator for its ca.crt"
        )
    if not key.is_file():
        raise ConfigError(
            f"{path}: node_key: there is no file {key}; join the server again, with another "
            "folder and a new invitation from its operator"
        )
    if is_accessible_to_others(key):
        raise ConfigError(f"{path}: node_key: other users can read {key}; run chmod 600 on it")


def _check_server(path: Path, config: DeviceConfig) -> None:
    """Ask the server once, for a reason in one sentence where the SuperNode would try for ever or give a number."""
    server, certificate = config.server, config.certificate
    found = re.fullmatch(r"\[?([^\s\[\]/]+)\]?:(\d{1,5})", server)
    if found is None:
        raise ConfigError(
            f"{path}: server: expected HOST:PORT such as fedface.example.org:443, got {server!r}"
        )
    try:
        trusted = ssl.create_default_context(cafile=str(certificate))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{path}: certificate: {certificate} is not a certificate in PEM format") from error
    connection = HTTPSConnection(found[1], int(found[2]), context=trusted, timeout=REACH_SECONDS)
    try:
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
        ahead = 0.0 if date is None else time.time() - parsedate_to_datetime(date).timestamp()
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"{server} is not the server that {certificate} belongs to ({error.verify_message}); nothing was sent"
        ) from error
    except (OSError, OverflowError, HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FederationError(
            f"the server {server} cannot be reached ({reason}); check the address, the network, or try again later"
        ) from error
    finally:
        connection.close()
    if not -MAX_BEHIND < ahead < MAX_AHEAD:
        side = "ahead of" if ahead > 0 else "behind"
        raise FederationError(
            f"this device's clock is {abs(ahead):.0f} s {side} the server's, which would refuse it; "
            "set the clock that is wrong"
        )


@contextmanager
def _supernode(config: DeviceConfig) -> Iterator[tuple[Child, int, bytes]]:
    """Flower's SuperNode; yields it, and port and secret of its runtime endpoint. It ends on leaving."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = int(free.getsockname()[1])
    secret = secrets.token_hex(32).encode()
    certificate, key = config.certificate, config.node_key
    secret_file = config.state / f"runtime-{secrets.token_hex(4)}.secret"
    command = [
        "flower-supernode", "--superlink", config.server,
        "--root-certificates", str(certificate), "--auth-supernode-private-key", str(key),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        "--host", LOOPBACK, "--port", str(port),
    ]  # fmt: skip
    create_bytes(secret_file, secret)
    try:
        with started(
            command,
            config.state / "supernode.log",
            prepare=lambda: restrict(read=[certificate, key, secret_file], write=[], connect=None),
        ) as node:
            node.wait_until(lambda: listens(port), seconds=START_SECONDS)
            secret_file.unlink()  # it was read at the start
            yield node, port, secret
    finally:
        secret_file.unlink(missing_ok=True)


def _why_ended(node: Child, server: str) -> str:
    """With what an owner can do where the server does not accept the device."""
    unknown = (
        "; ask the server's operator to register this device's public key, and after a crash wait a minute"
    )
    return f"the connection to {server} has ended: {node.why_ended()}{unknown if 'activate' in node.output() else ''}"


def _restrict(config: DeviceConfig, home: Path, port: int) -> None:
    """Take from this process what answering tasks does not need, before anything is received, and say what it was."""
    index = default_cache(config.photos).parent
    temporary = config.state / "tmp"  # torch insists on one, and /tmp is open to others
    for folder in (index, temporary):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["TMPDIR"] = str(temporary)
    # An editor may replace the device file, so its folder is needed.
    read, write = [config.photos, home], [config.state, index]
    if config.detector is not None:
        read.append(config.detector)
    if config.witness is not None:
        config.witness.mkdir(exist_ok=True, mode=0o700)
        write.append(config.witness)
    given = restrict(read=read, write=write, connect=[port])
    if given.enforced:
        say(f"The system keeps from the code that sees photos: {', '.join(given.enforced)}.")
    if given.missing:
        say(f"This system cannot keep from it: {', '.join(given.missing)}.")
    readable, writable = (", ".join(map(str, places)) for places in (read, write))
    say(f"Beside programs, its own files to read are {readable}; to write: {writable}.")


def _log_to_stderr() -> None:
    """Warnings of this process, as plain lines; the SuperNode's output goes to its own file."""
    log = logging.getLogger("fedface")
    log.addHandler(logging.StreamHandler())
    log.propagate = False


def _now() -> str:
    return time.strftime("%H:%M:%S")
