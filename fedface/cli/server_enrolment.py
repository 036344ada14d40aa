"""The enrolment service of a server, on this machine alone; nginx passes requests of devices.

`GET /join/ca.crt` and `GET /join/plans/HASH.plan` are public. `POST /join/enrol` has an invitation's token and the
device's public key. A token registers one key: the same request again, as after a lost answer, gives the same answer,
and another key is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedface.atomic_io import one_at_a_time, replace_text
from fedface.cli.child_processes import LOOPBACK
from fedface.cli.server_devices import FOLDER as DEVICES
from fedface.cli.server_devices import public_key_text, register_device
from fedface.cli.server_flower import FLWR_HOME, PORTS_FILE, read_ports
from fedface.cli.server_invites import INVITES, PUBLIC, InviteRecord
from fedface.codec import dumps, load
from fedface.errors import ConfigError, FederationError
from fedface.sandbox import restrict
from fedface.text import sanitize_text

ENROL = "/join/enrol"
FILES = re.compile(r"/join/(ca[.]crt|plans/[0-9a-f]{64}[.]plan)")  # in the public folder
MAX_BODY = 4096  # bytes
TIMEOUT = 10.0  # seconds for a request to arrive; nginx sends it whole

log = logging.getLogger("fedface.enrolment")


class EnrolmentRefused(FederationError):
    """The invitation does not hold for this request; the text is for its owner."""


def enrol(folder: Path, token: str, public_key: str) -> str:
    """Register the device of an invitation, and return the operator's name for it.

    Args:
        folder: The server's.
        token: 32 hexadecimal digits.
        public_key: In OpenSSH's format.

    Raises:
        EnrolmentRefused: The token is unknown, expired or used by another key.
        ConfigError: The key is invalid.
        FederationError: The server cannot register it now.
    """
    key = public_key_text(public_key)
    try:
        digest = hashlib.sha256(bytes.fromhex(token)).hexdigest()
    except ValueError:
        digest = ""
    path = folder / INVITES / f"{digest}.json"
    with one_at_a_time(folder / INVITES):
        if not digest or not path.is_file():
            raise EnrolmentRefused(
                "this invitation is not valid here; ask the server's operator for a new one"
            )
        invite = load(InviteRecord, path)
        if invite.public_key is not None and invite.public_key != key:
            raise EnrolmentRefused(
                "this invitation was used by another device; if that was not yours, tell the server's operator at once"
            )
        if invite.public_key is None and invite.is_expired:
            raise EnrolmentRefused("this invitation has expired; ask the server's operator for a new one")
        register_device(folder, invite.device, key)
        replace_text(path, dumps(replace(invite, public_key=key)))
    return invite.device


def serve(folder: Path) -> None:
    """Answer requests until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT

        def do_GET(self) -> None:
            found = FILES.fullmatch(self.path)
            file = folder / PUBLIC / (found[1] if found else "none")
            if file.is_file():
                self._send(200, file.read_bytes(), "application/octet-stream")
            else:
                self._send(404, b"not found\n", "text/plain")

        def do_POST(self) -> None:
            status, answer = self._answer()
            self._send(status, json.dumps(answer).encode(), "application/json")
            log.warning("%d %s", status, sanitize_text(str(answer), 300))

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, dict[str, str]]:
            try:
                length = int(self.headers.get("Content-Length", ""))
                if self.path != ENROL or not 0 < length <= MAX_BODY:
                    raise ValueError
                request = json.loads(self.rfile.read(length))
                token, key = str(request["token"]), str(request["public_key"])
            except (ValueError, KeyError, TypeError, RecursionError, OSError):
                return 400, {"error": "expected a token and a public key"}
            try:
                return 200, {"device": enrol(folder, token, key)}
            except EnrolmentRefused as error:
                return 403, {"error": str(error)}
            except ConfigError as error:
                return 400, {"error": str(error)}
            except Exception as error:
                # Of Flower, or a full disk: the text is the operator's.
                log.warning("could not enrol: %s", error)
                return 503, {"error": "the server cannot register a device now; try again later"}

        def log_message(self, format: str, *args: object) -> None:
            """`do_POST` logs what matters."""

    ports, home = read_ports(folder), folder / FLWR_HOME
    (folder / DEVICES).mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = str(home)  # of `flwr`, which may write nowhere else
    with ThreadingHTTPServer((LOOPBACK, ports.enrolment), Handler) as server:
        # Requests come from strangers: this process cannot read the keys of the authority and the operator.
        restrict(
            read=[folder / PORTS_FILE, folder / "certificates/ca.crt", folder / PUBLIC],
            write=[folder / DEVICES, folder / INVITES, home],
            connect=[ports.superlink],
        )
        server.serve_forever()
