"""A server as a joining device sees it: TLS, the certificate of its authority, a signed plan, enrolment by a token."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.messages.invite import Invite
from fedface.messages.run_plan import SignedPlan

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = OPERATOR.public_key().public_bytes_raw()
TOKEN = bytes(range(16))


class TLSServer(ThreadingHTTPServer):
    """Each connection begins with a handshake, which a device may refuse."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    def handle_error(self, *_: object) -> None:
        """A device may end a connection at any time."""

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        return self.tls.wrap_socket(connection, server_side=True), peer


class FakeServer:
    """The paths that a joining device asks for; each request is noted."""

    def __init__(self, certificates: Path, signed: SignedPlan) -> None:
        self.authority = (certificates / "ca.crt").read_bytes()
        self.plan = signed.to_bytes()
        self.requests: list[str] = []
        self.enrolled: dict[str, str] = {}  # token -> public key
        self.silent_at = ""  # the path at which the connection ends without an answer
        self.name = "kitchen"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: bytes | None) -> None:
                server.requests.append(self.path)
                status, content = server.respond(self.path, body)
                if server.silent_at and self.path.startswith(server.silent_at):
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        self.http = TLSServer(("127.0.0.1", 0), Handler)
        self.use(certificates)

    def use(self, certificates: Path) -> None:
        """Prove its identity with these from now on."""
        self.http.tls.load_cert_chain(certificates / "server.crt", certificates / "server.key")

    def respond(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        """As nginx and the enrolment service do."""
        if path == "/join/ca.crt":
            return 200, self.authority
        if path.startswith("/join/plans/"):
            return (200, self.plan) if self.plan else (404, b"not here")
        if path != "/join/enrol":
            return 403, b"not here"
        request = json.loads(body or b"")
        known = self.enrolled.setdefault(request["token"], request["public_key"])
        if known != request["public_key"]:
            return 403, json.dumps({"error": "this invitation was used by another device"}).encode()
        return 200, json.dumps({"device": self.name}).encode()

    def invite(self, plan_hash: str) -> Invite:
        """An invitation of this server."""
        return Invite(
            address=f"localhost:{self.http.server_port}",
            authority=hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.authority.decode())).digest(),
            operator=PUBLIC,
            plan=bytes.fromhex(plan_hash),
            token=TOKEN,
        )


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """The server answers until the end of the block."""
    thread = threading.Thread(target=fake.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.http.shutdown()
    thread.join()
    fake.http.server_close()
