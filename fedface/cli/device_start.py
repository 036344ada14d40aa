"""The command `fedface device start`: a SuperNode, and the executor that answers its tasks with installed code."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

import fedface
from fedface.atomic_io import create_bytes
from fedface.cli.child_processes import (
    LOOPBACK,
    START_SECONDS,
    Child,
    listens,
    started_function,
    stopped_by_sigterm,
)
from fedface.cli.console import say
from fedface.errors import ConfigError, FederationError
from fedface.platforms import PROCESSES
from fedface.sandbox import restrict
from fedface.text import host_and_port
from fedface.transport.executor import SUPERNODE, Executor, run_supernode
from fedface.transport.worker import WorkerProcess, log_to_stderr

CONNECTED = "SuperNode ID:"  # what the SuperNode logs when the server has accepted it
TEMPORARY = "tmp"  # in the state folder
REACH_SECONDS = 10.0  # for the server to answer at the start
MAX_AHEAD, MAX_BEHIND = 4.0, 300.0  # seconds of a device's clock; SuperLink refuses more than 5 and 305


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a waiting device needs of its device file."""

    name: str
    server: str
    certificate: Path
    node_key: Path
    state: Path
    ledger: Path
    paused: Path  # exists while the device is paused
    read: tuple[Path, ...]  # files and folders for the code that sees photos
    write: tuple[Path, ...]


def device_start(path: Path) -> None:
    """Start the device of an owner's file; returns after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The device file or one of its files is wrong, or this version of Flower is not supported.
        LedgerError: The ledger is damaged or was rolled back.
        FederationError: The server cannot be reached, or the SuperNode ended.
    """
    # In a process that ends: what reads a policy needs 70 MB, and a waiting device does without.
    with ProcessPoolExecutor(1, PROCESSES, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as checking:
        setup = checking.submit(_checked, path).result()
    log_to_stderr()
    try:
        with (
            stopped_by_sigterm(),
            _supernode(setup) as (node, port, secret),
            WorkerProcess(
                f"{LOOPBACK}:{port}", path, ledger=setup.ledger, paused=setup.paused, report=_report
            ) as worker,
        ):
            say("Code that a server sends is never run: this device answers with its installed fedface.")
            _restrict(setup, port)
            try:
                node.wait_until(lambda: CONNECTED in node.output())
                say(
                    f"{_now()} {setup.name} is connected to {setup.server} and waits for tasks; Ctrl-C stops it."
                )
            except FederationError as error:
                raise FederationError(_why_ended(node, setup.server)) from error
            executor = Executor(f"{LOOPBACK}:{port}", secret, worker)
            executor.run(running=lambda: node.running, report=_report)
            raise FederationError(_why_ended(node, setup.server))
    except KeyboardInterrupt:
        say("stopped; the ledger and stored replies stay in the state folder")


def _checked(path: Path) -> Setup:
    """A device file, of a device that could work with its server; creates folders that code which sees photos needs."""
    from fedface.device.config import LEDGER_FILE, PAUSED_FILE, check_state_folder, read_device_config
    from fedface.device.state import device_state
    from fedface.photos.photo_index import default_cache

    config = read_device_config(path)
    check_files(path, config.certificate, config.node_key)
    check_server(path, config.server, config.certificate, config.node_key)
    check_state_folder(path, config.state)
    device_state(path).ledger.read()
    index = default_cache(config.photos).parent
    for folder in (index, config.state / TEMPORARY):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # An editor may replace the device file, so its folder is needed.
    read, write = [config.photos, path.resolve().parent], [config.state, index]
    if config.detector is not None:
        read.append(config.detector)
    if config.witness is not None:
        config.witness.mkdir(exist_ok=True, mode=0o700)
        write.append(config.witness)
    return Setup(
        name=config.name,
        server=config.server,
        certificate=config.certificate,
        node_key=config.node_key,
        state=config.state,
        ledger=config.state / LEDGER_FILE,
        paused=config.state / PAUSED_FILE,
        read=tuple(read),
        write=tuple(write),
    )


def check_registration(path: Path) -> None:
    """Connect the device of an owner's file once, without answering anything.

    Raises:
        ConfigError: As for `device_start`.
        FederationError: The server does not accept it, or cannot be reached.
    """
    setup = _checked(path)
    with _supernode(setup) as (node, _, _):
        try:
            node.wait_until(lambda: CONNECTED in node.output(), seconds=START_SECONDS)
        except FederationError as error:
            raise FederationError(_why_ended(node, setup.server)) from error


def check_files(path: Path, certificate: Path, key: Path) -> None:
    """Raises ConfigError unless the certificate and a private key that others cannot read are there."""
    from fedface.device.config import is_accessible_to_others

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


def check_server(path: Path, server: str, certificate: Path, node_key: Path) -> float:
    """Ask the server once; returns by how many seconds this device's clock is ahead of the server's.

    The reason of a failure is one sentence, where the SuperNode would try for ever or give a number. The server's
    operator sees this device's version and clock in the request (cli/server_devices.py), even if it is refused.

    Raises:
        ConfigError: The address, the certificate or the key is invalid.
        FederationError: The server cannot be reached, is another one, or would refuse this device's clock.
    """
    from fedface.device.node_key import key_name, node_public_key

    try:
        host, port = host_and_port(server)
    except ConfigError as error:
        raise ConfigError(f"{path}: server: {error}") from error
    try:
        trusted = ssl.create_default_context(cafile=str(certificate))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{path}: certificate: {certificate} is not a certificate in PEM format") from error
    key = key_name(node_public_key(node_key))
    connection = HTTPSConnection(host, port, context=trusted, timeout=REACH_SECONDS)
    try:
        connection.request(
            "GET", "/", headers={"User-Agent": f"fedface/{fedface.__version__} {key} {time.time():.0f}"}
        )
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
    return ahead


@contextmanager
def _supernode(setup: Setup) -> Iterator[tuple[Child, int, bytes]]:
    """Flower's SuperNode; yields it, and port and secret of its runtime endpoint. It ends on leaving."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = int(free.getsockname()[1])
    secret = secrets.token_hex(32).encode()
    secret_file = setup.state / f"runtime-{secrets.token_hex(4)}.secret"
    arguments = [
        "--superlink", setup.server,
        "--root-certificates", str(setup.certificate), "--auth-supernode-private-key", str(setup.node_key),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        "--host", LOOPBACK, "--port", str(port),
    ]  # fmt: skip
    needed = [setup.certificate, setup.node_key, secret_file]
    create_bytes(secret_file, secret)
    try:
        log = setup.state / "supernode.log"
        with started_function(_run_supernode, arguments, needed, log=log, name=SUPERNODE) as node:
            node.wait_until(lambda: listens(port), seconds=START_SECONDS)
            secret_file.unlink()  # it was read at the start
            yield node, port, secret
    finally:
        secret_file.unlink(missing_ok=True)


def _run_supernode(arguments: list[str], needed: list[Path]) -> None:
    restrict(read=needed, write=[], connect=None)
    run_supernode(arguments)


def _why_ended(node: Child, server: str) -> str:
    """With what an owner can do where the server does not accept the device."""
    if not node.running and "terminated gracefully" in node.output():
        return f"{server} no longer accepts this device: its operator has revoked it, or a clock was set"
    unknown = (
        "; the server's operator has to register this device's public key, and only one device at a time can be "
        "connected with it; after a crash wait a minute"
    )
    return f"the connection to {server} has ended: {node.why_ended()}{unknown if 'activate' in node.output() else ''}"


def _restrict(setup: Setup, port: int) -> None:
    """Take from this process what answering tasks does not need, before anything is received, and say what it was."""
    os.environ["TMPDIR"] = str(setup.state / TEMPORARY)  # torch insists on one, and /tmp is open to others
    given = restrict(read=setup.read, write=setup.write, connect=[port])
    if given.enforced:
        say(f"The system keeps from the code that sees photos: {', '.join(given.enforced)}.")
    if given.missing:
        say(f"This system cannot keep from it: {', '.join(given.missing)}.")
    readable, writable = (", ".join(map(str, places)) for places in (setup.read, setup.write))
    say(f"Beside programs, its own files to read are {readable}; to write: {writable}.")


def _report(text: str) -> None:
    say(f"{_now()} {text}")


def _now() -> str:
    return time.strftime("%H:%M:%S")
