"""The command `fedface server up`: SuperLink for this machine alone, its executor, and the proxy for devices."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedface.cli.child_processes import LOOPBACK, START_SECONDS, listens, started, stopped_by_sigterm
from fedface.cli.console import say, warn
from fedface.cli.server_certificates import read_certificate
from fedface.cli.server_flower import environment, read_ports
from fedface.errors import FederationError

CERTIFICATES = (
    "--ssl-ca-certfile", "certificates/ca.crt", "--ssl-certfile", "certificates/server.crt",
    "--ssl-keyfile", "certificates/server.key",
)  # fmt: skip
WARN_BEFORE = timedelta(days=30)
SECRET = ("--superexec-auth-secret-file", "superexec.secret")


def server_up(folder: Path) -> None:
    """Run the server whose folder `fedface server init` wrote; returns after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The folder is not that of a server.
        FederationError: A port is taken, or one of the programs ended.
    """
    ports = read_ports(folder)
    left = read_certificate(folder / "certificates/server.crt").not_valid_after_utc - datetime.now(UTC)
    if left < WARN_BEFORE:
        warn(f"the server's certificate expires in {left.days} days; replace it with `fedface server renew`")
    for port in (ports.superlink, ports.enrolment, ports.devices):
        if listens(port):
            raise FederationError(f"port {port} is taken by another program; is this server running already?")
    os.environ.update(environment(folder))  # for the programs below: bundles are unpacked in this folder
    superlink = (
        "flower-superlink", "--host", LOOPBACK, "--port", str(ports.superlink), "--database", "superlink.db",
        "--enable-supernode-auth", "--isolation", "process", *SECRET, *CERTIFICATES,
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    superexec = (
        "flower-superexec", "--runtime-api-address", f"localhost:{ports.superlink}",
        "--root-certificates", "certificates/ca.crt", *SECRET,
    )  # fmt: skip
    enrolment = ("fedface", "server", "enrolment", str(folder.resolve()))
    nginx = ("nginx", "-p", str(folder.resolve()), "-c", "nginx.conf", "-g", "daemon off;")
    try:
        with stopped_by_sigterm(), ExitStack() as running:
            children = [running.enter_context(started(superlink, folder / "superlink.log", folder=folder))]
            children[0].wait_until(lambda: listens(ports.superlink), seconds=START_SECONDS)
            say(f"SuperLink listens on {LOOPBACK}:{ports.superlink}, for this machine alone")
            children.append(
                running.enter_context(started(superexec, folder / "superexec.log", folder=folder))
            )
            children.append(
                running.enter_context(started(enrolment, folder / "enrolment.log", folder=folder))
            )
            children[2].wait_until(lambda: listens(ports.enrolment), seconds=START_SECONDS)
            try:
                children.append(running.enter_context(started(nginx, folder / "nginx.log", folder=folder)))
                children[3].wait_until(lambda: listens(ports.devices), seconds=START_SECONDS)
                say(f"devices can connect to port {ports.devices}; Ctrl-C stops the server")
            except FederationError as error:
                warn(f"only devices of this machine can connect, to port {ports.superlink}: {error}")
                del children[3:]
            while all(child.running for child in children):
                time.sleep(1)
            raise FederationError(next(child for child in children if not child.running).why_ended())
    except KeyboardInterrupt:
        say("stopped; registrations and runs stay in the folder")
