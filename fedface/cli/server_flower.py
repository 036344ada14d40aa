"""Calls of Flower's command `flwr` on the SuperLink of one server folder.

`flwr` finds its connection in `flwr/config.toml` of the folder (FLWR_HOME), never in the operator's home. Its options
and JSON are the same in Flower 1.41 and 1.42.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedface.atomic_io import replace_text
from fedface.cli.child_processes import LOOPBACK, listens, path_of
from fedface.cli.console import one_line
from fedface.config import read
from fedface.errors import ConfigError, FederationError

PORTS_FILE = "ports.yaml"
FLWR_HOME = "flwr"  # in the server's folder
CONNECTION = "fedface"  # name of the SuperLink in its config.toml
CALL_SECONDS = 120.0
CONFIG = f"""\
# Where `flwr` finds this server: FLWR_HOME=FOLDER flwr ls, with the folder of this file.
# Written by `fedface server`, and again when the server's folder has been moved.
[superlink]
default = "{CONNECTION}"

[superlink.{CONNECTION}]
address = "{LOOPBACK}:PORT"
root-certificates = CERTIFICATE
"""


@dataclass(frozen=True, kw_only=True)
class Ports:
    host: str  # a name or address of this machine, for devices
    listen: str = "*"  # the address of this machine on which nginx listens; "*": all
    devices: int  # of nginx
    superlink: int  # on this machine alone
    enrolment: int  # on this machine alone

    @property
    def address(self) -> str:
        """HOST:PORT for devices."""
        return f"[{self.host}]:{self.devices}" if ":" in self.host else f"{self.host}:{self.devices}"


def read_ports(folder: Path) -> Ports:
    """The ports of a server. Raises ConfigError if the folder is not one of `fedface server init`."""
    if not (folder / PORTS_FILE).is_file():
        raise ConfigError(f"{folder}: is not the folder of a server; `fedface server init` makes one")
    return read(folder / PORTS_FILE, Ports)


def write_config(folder: Path) -> Path:
    """Write the configuration of `flwr`, if it is not there already; returns the folder for FLWR_HOME."""
    home = folder.resolve() / FLWR_HOME
    certificate = json.dumps(
        str(home.parent / "certificates/ca.crt"), ensure_ascii=False
    )  # Flower demands it absolute
    content = CONFIG.replace("PORT", str(read_ports(folder).superlink)).replace("CERTIFICATE", certificate)
    file = home / "config.toml"
    home.mkdir(mode=0o700, exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != content:
        replace_text(file, content)
    return home


def is_running(folder: Path) -> bool:
    """Whether SuperLink listens. Raises ConfigError if the folder is not a server's."""
    return listens(read_ports(folder).superlink)


def check_running(folder: Path) -> None:
    """Raise FederationError if the server does not run, ConfigError if the folder is not a server's."""
    if not is_running(folder):
        raise FederationError(
            f"{folder}: the server is not running; start it with `fedface server up {folder}`"
        )


def environment(folder: Path) -> Mapping[str, str]:
    """The environment of Flower's programs: the folder's connection, and no proxy for this machine.

    They find each other in PATH, also where this Python's environment is not activated.
    """
    stored = {key: value for key, value in os.environ.items() if key.upper() != "NO_PROXY"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    home = str(write_config(folder))
    return {**stored, "FLWR_HOME": home, "NO_PROXY": f"{LOOPBACK},localhost", "PATH": path}


def flower(folder: Path, *words: str) -> dict[str, Any]:
    """The JSON that `flwr WORDS` prints.

    Raises:
        ConfigError: The folder is not a server's.
        FederationError: The server does not run, or `flwr` reports an error.
    """
    check_running(folder)
    command = [path_of("flwr"), *words, CONNECTION, "--format", "json"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=CALL_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise FederationError("flwr is not installed here; reinstall fedface") from error
    except subprocess.TimeoutExpired as error:
        raise FederationError(f"flwr {words[0]}: no answer within {CALL_SECONDS:.0f} s") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and answer.get("success") is True:
        return answer
    reason = answer.get("error-message") if isinstance(answer, dict) else None
    lines = [line for line in str(reason or done.stderr or done.stdout).splitlines() if line.strip()]
    raise FederationError(f"flwr {' '.join(words[:2])}: {one_line(lines[-1] if lines else 'no answer')}")


@contextmanager
def log_lines(folder: Path, number: str) -> Iterator[Iterator[str]]:
    """The lines that a run of Flower has printed and prints, until it ends."""
    process = subprocess.Popen(
        [path_of("flwr"), "log", number, CONNECTION, "--stream"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True,
        env={**environment(folder), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield iter(process.stdout)
    finally:
        process.kill()
        process.wait()
