"""The commands `fedface server register`, `devices` and `revoke`: which devices may connect.

A device is a file, devices/NAME.json, and a node in Flower, which accepts each public key once for ever. The file gives
the node its name; whether it may connect and is connected, Flower knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedface.atomic_io import one_at_a_time, replace_text
from fedface.cli.console import print_json, say, table_of
from fedface.cli.server_flower import flower, read_ports
from fedface.codec import dumps, load
from fedface.config import text_of
from fedface.device.node_key import key_name
from fedface.errors import ConfigError, FederationError

FOLDER = "devices"  # in the server's folder
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # the curves that Flower accepts
REVOKED = "unregistered"  # Flower's word
ACCESS_LOG = "nginx-access.log"
# What a device says of itself when it starts or is checked (cli/device_start.check_server), also if it is refused then.
REPORT = re.compile(
    r'\[(?P<received>[^]]+)\] "GET / HTTP/1.1" \d+ \d+ "-" '
    r'"fedface/(?P<version>[\w.+-]{1,40}) (?P<key>[0-9a-f]{16}) (?P<clock>\d{1,11})"'
)


@dataclass(frozen=True, kw_only=True)
class RegisteredDevice:
    """The file of a device."""

    version: ClassVar[int] = 1

    name: str
    public_key: str  # in OpenSSH's format, without a comment
    node: str  # Flower's id, a whole number below 2^64
    registered: str  # ISO 8601, UTC


def register_device(folder: Path, name: str, public_key: str) -> int:
    """Let a device connect; the same name and key again change nothing.

    Args:
        folder: The server's.
        name: By which the operator knows the device: letters, digits, "-", "_" and ".".
        public_key: Of a NIST curve, in OpenSSH's format.

    Returns:
        Flower's id of the device's node.

    Raises:
        ConfigError: The name or the key is invalid, or the folder is not a server's.
        FederationError: The name or the key is another device's, the key was revoked, or the server does not run.
    """
    key = public_key_text(public_key)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name: expected letters, digits, '-', '_' and '.', 80 at most, got {name!r:.90}")
    read_ports(folder)
    (folder / FOLDER).mkdir(mode=0o700, exist_ok=True)
    with one_at_a_time(folder / FOLDER):
        for device in read_devices(folder):
            same_name = device.name.casefold() == name.casefold()
            if not same_name and device.public_key != key:
                continue
            state = _nodes(folder).get(device.node, {}).get("status")
            if device.public_key != key:
                if state not in (None, REVOKED):
                    raise FederationError(
                        f"the name {name} is that of another registered device; choose another"
                    )
            elif state == REVOKED:
                raise FederationError(
                    f"this key was revoked, as that of device {device.name}; it needs a new key"
                )
            elif not same_name:
                raise FederationError(f"this key is that of device {device.name}")
            elif state is not None:
                return int(device.node)
        attempt = (folder / FOLDER / f"{name}.pub").resolve()
        node = _register(folder, key, attempt)
        device = RegisteredDevice(
            name=name, public_key=key, node=node, registered=datetime.now(UTC).isoformat(timespec="seconds")
        )
        replace_text(folder / FOLDER / f"{name}.json", dumps(device))
        attempt.unlink()
    return int(node)


def read_devices(folder: Path) -> list[RegisteredDevice]:
    """The devices that were registered in a server's folder, by name, also those that were revoked since."""
    return [load(RegisteredDevice, path) for path in sorted((folder / FOLDER).glob("*.json"))]


def with_names(folder: Path, text: str) -> str:
    """A text of a run in which each node that is a device's is replaced by the operator's name of that device."""
    names = {f"node {device.node}": device.name for device in read_devices(folder)}
    return re.sub(r"\bnode \d+\b", lambda node: names.get(node[0], node[0]), text)


def server_register(folder: Path, name: str, key: Path) -> None:
    """Register a device whose public key came by hand."""
    node = register_device(folder, name, text_of(key))
    say(f"device {name} may connect; Flower's id of its node is {node}")


def server_devices(folder: Path, *, as_json: bool) -> None:
    """Print the devices of a running server, and nodes of Flower that have no device file."""
    rows = device_rows(folder)
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("no device is registered")
        return
    say(table_of(("device", "state", "since", "version", "clock", "node"), (row.values() for row in rows)))


def device_rows(folder: Path) -> list[dict[str, str | None]]:
    """The name, state, time of the last change and node of each device; a name is None if the folder has none.

    Version and clock, such as "+20 s" for one that is ahead of the server's, are what the device said at its last start
    or check, which nothing proves; None if it has said nothing.
    """
    nodes, reports = _nodes(folder), _reports(folder)
    rows: list[dict[str, str | None]] = []

    def add(name: str | None, state: str, since: str, node: str, key: str = "") -> None:
        version, clock = reports.get(key, (None, None))
        rows.append(
            {"name": name, "state": state, "since": since, "version": version, "clock": clock, "node": node}
        )

    for device in read_devices(folder):
        node = nodes.pop(device.node, None)
        state, since = ("unknown to the server", device.registered) if node is None else _state(node)
        add(device.name, state, since, device.node, key_name(device.public_key))
    for number, node in nodes.items():
        state, since = _state(node)
        if state != "revoked":
            add(None, state, since, number)
    return rows


def _reports(folder: Path) -> dict[str, tuple[str, str]]:
    """The last version and clock that each device reported, by the name of its key."""
    log, reports = folder / ACCESS_LOG, dict[str, tuple[str, str]]()
    for found in REPORT.finditer(log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""):
        received = datetime.strptime(found["received"], "%d/%b/%Y:%H:%M:%S %z").timestamp()
        reports[found["key"]] = (found["version"], f"{int(found['clock']) - received:+.0f} s")
    return reports


def server_revoke(folder: Path, name: str) -> None:
    """Forbid a device to connect, for good.

    Raises:
        ConfigError: There is no such device.
        FederationError: The server does not run.
    """
    read_ports(folder)
    devices = {device.name: device for device in read_devices(folder)}
    if name not in devices:
        raise ConfigError(f"{name}: no such device; registered are {', '.join(devices) or 'none'}")
    node = devices[name].node
    state = _nodes(folder).get(node, {}).get("status")
    if state not in (None, REVOKED):
        flower(folder, "supernode", "unregister", node)
    say(f"device {name} can no longer connect; its key is refused for good")
    say(
        "Not undone: what it sent stays in the sums and models of the runs that it took part in, and it may still have "
        "the key for encrypted sums; let the others generate a new one before the next run"
    )


def _register(folder: Path, key: str, file: Path) -> str:
    """Register a key in Flower, and return its node's id.

    Args:
        file: The key is in it until the device's own file is written. If it is there from before, an earlier attempt
            was killed, and may have registered the key.
    """
    earlier = file.stat().st_mtime if file.exists() and file.read_text(encoding="utf-8") == key else None
    if earlier is None:
        replace_text(file, key)  # Flower reads keys from files
    try:
        return str(flower(folder, "supernode", "register", str(file))["node-id"])
    except FederationError as error:
        if "already in use" not in str(error):
            raise
        if earlier is not None and (node := _unnamed_since(folder, earlier)) is not None:
            return node
        file.unlink()
        raise FederationError(
            "Flower knows this key already: it was revoked, or registered by hand; the device needs a new key"
        ) from error


def _unnamed_since(folder: Path, earlier: float) -> str | None:
    """The only node without a device file that was registered since a time (Unix seconds); None: there are others."""
    named = {device.node for device in read_devices(folder)}
    found = [
        number
        for number, node in _nodes(folder).items()
        if number not in named
        and node["status"] != REVOKED
        and datetime.fromisoformat(node["created-at"]).timestamp() >= int(earlier)
    ]
    return found[0] if len(found) == 1 else None


def _nodes(folder: Path) -> dict[str, dict[str, Any]]:
    """What Flower knows of each node, by id."""
    return {node["node-id"]: node for node in flower(folder, "supernode", "list")["nodes"]}


def _state(node: dict[str, Any]) -> tuple[str, str]:
    """A node's state in words, and since when."""
    words = {
        "registered": ("never connected", "created-at"),
        "online": ("online", "online-at"),
        "offline": ("offline", "offline-at"),
        REVOKED: ("revoked", "deleted-at"),
    }
    word, since = words.get(node["status"], (str(node["status"]), "created-at"))
    return word, str(node[since])


def public_key_text(text: str) -> str:
    """A public key in OpenSSH's format without its comment. Raises ConfigError if it is something else."""
    try:
        key = serialization.load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("public key: expected one in OpenSSH's format, such as node.pub") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        raise ConfigError("public key: expected one of the curves P-256, P-384 and P-521")
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(encoding, form).decode()
