"""`fedface device start`: what is wrong is one sentence and exit code 2, before a SuperNode starts."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command_line import caller

from fedface.cli import device_start
from fedface.cli.child_processes import started_function
from fedface.cli.device_start import check_registration
from fedface.cli.server_certificates import make_certificates
from fedface.device.node_key import key_name, node_public_key
from fedface.errors import FederationError
from fedface.privacy.ledger import Ledger

FILE = "name: kitchen\nphotos: photos\nstate: state\nserver: SERVER\npolicy: {max_epsilon: 8, delta: 1e-6}\n"


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path):  # type: ignore[no-untyped-def]
    """Call the command line in this process; a SuperNode must not start."""
    monkeypatch.setattr(device_start, "started_function", None)
    return caller(monkeypatch, capsys, "device", "start")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device's folder with everything that it needs to start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    make_certificates(tmp_path / "certificates", ["fedface.example.org"])
    (tmp_path / "certificates" / "ca.crt").rename(tmp_path / "ca.crt")
    node_public_key(tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "device.yaml").write_text(FILE.replace("SERVER", f"localhost:{port}"))
    return tmp_path


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("ca.crt", "certificate: there is no file {}; ask the server's operator"),
        ("node", "node_key: there is no file {}; join the server again"),
    ],
)
def test_a_missing_file_is_named_with_its_remedy(fedface, home: Path, lost: str, words: str) -> None:  # type: ignore[no-untyped-def]
    (home / lost).unlink()
    assert words.format(home / lost, home / lost) in fedface("device.yaml").sentence


def test_a_key_that_others_can_read_is_refused(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    (home / "node").chmod(0o644)
    assert "other users can read" in fedface("device.yaml").sentence


def test_an_address_without_a_port_is_refused(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    (home / "device.yaml").write_text(FILE.replace("SERVER", "the university"))
    assert "server: expected HOST:PORT" in fedface("device.yaml").sentence


def test_a_certificate_that_is_none_is_refused(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    (home / "ca.crt").write_text("a letter")
    assert "is not a certificate in PEM format" in fedface("device.yaml").sentence


def test_a_server_that_cannot_be_reached_is_named(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    assert "cannot be reached (Connection refused)" in fedface("device.yaml").sentence
    assert not list((home / "state").iterdir())


class Clock(BaseHTTPRequestHandler):
    """A server whose clock is `offset` seconds from this one."""

    offset = 0.0
    visitor = ""  # what the last one said of itself

    def do_GET(self) -> None:
        type(self).visitor = self.headers["User-Agent"]
        self.send_response_only(403)
        self.send_header("Date", self.date_time_string(time.time() + self.offset))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def server(home: Path) -> Iterator[type[Clock]]:
    """The server of the device's file."""
    clock = type("Clock", (Clock,), {})
    running = HTTPServer(("127.0.0.1", 0), clock)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(home / "certificates/server.crt", home / "certificates/server.key")
    running.socket = tls.wrap_socket(running.socket, server_side=True)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    (home / "device.yaml").write_text(FILE.replace("SERVER", f"localhost:{running.server_port}"))
    yield clock
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(("offset", "words"), [(-20, "20 s ahead of"), (600, "600 s behind")])
def test_a_wrong_clock_is_named(  # type: ignore[no-untyped-def]
    fedface, server: type[Clock], home: Path, offset: float, words: str
) -> None:
    """The server would refuse every request, with the words of an unknown key."""
    server.offset = offset
    assert re.search(words.replace(str(abs(offset)), r"\d+"), fedface("device.yaml").sentence)
    said, clock = server.visitor.rsplit(" ", 1)  # for the operator
    assert re.fullmatch(f"fedface/[0-9.]+ {key_name(node_public_key(home / 'node'))}", said)
    assert abs(int(clock) - time.time()) < 60


def test_another_server_is_not_trusted(fedface, server: type[Clock], home: Path) -> None:  # type: ignore[no-untyped-def]
    """Its certificate is signed by another authority."""
    make_certificates(home / "others", ["fedface.example.org"])
    (home / "others" / "ca.crt").rename(home / "ca.crt")
    assert "is not the server that" in fedface("device.yaml").sentence


def test_a_supernode_that_ends_is_named_with_its_words(  # type: ignore[no-untyped-def]
    fedface, server: type[Clock], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret stays behind."""

    def ending(arguments: list[str], needed: list[Path]) -> None:
        os.write(1, b"Exit Code: 305\nthe key is unknown\n")
        raise SystemExit(1)

    monkeypatch.setattr(device_start, "started_function", started_function)
    monkeypatch.setattr(device_start, "_run_supernode", ending)
    words = "flower-supernode ended with exit code 1: Exit Code: 305 the key is unknown"
    assert words in fedface("device.yaml").sentence
    assert not list((home / "state").glob("*.secret"))


def test_a_revoked_device_says_so(server: type[Clock], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SuperNode ends itself as by Ctrl-C when the server no longer knows it."""

    def ending(arguments: list[str], needed: list[Path]) -> None:
        with socket.create_server(("127.0.0.1", int(arguments[arguments.index("--port") + 1]))):
            time.sleep(1)
        os.write(1, b"INFO : SuperNode terminated gracefully.\n")

    monkeypatch.setattr(device_start, "_run_supernode", ending)
    with pytest.raises(FederationError, match="no longer accepts this device: its operator has revoked it"):
        check_registration(home / "device.yaml")


def test_an_older_ledger_that_was_restored_is_noticed_at_the_start(  # type: ignore[no-untyped-def]
    fedface, server: type[Clock], home: Path
) -> None:
    """Before the server sees this device."""
    path = home / "state" / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        ledger.withdraw("one")
    backup = path.read_bytes()
    with Ledger.open(path) as ledger:
        ledger.withdraw("another")
    path.write_bytes(backup)
    assert "was rolled back or replaced" in fedface("device.yaml").sentence
