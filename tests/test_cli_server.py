"""`fedface server init`: what it writes, and which requests nginx lets through with it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command_line import caller
from cryptography import x509
from cryptography.hazmat.primitives import serialization


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server init` in this process."""
    return caller(monkeypatch, capsys, "server", "init")


def test_a_server_gets_certificates_a_secret_and_a_proxy(fedface: Callable, tmp_path: Path) -> None:
    """Private files are readable by their owner alone; the certificate is for the hosts named."""
    folder = tmp_path / "server"
    printed = fedface(folder, "fedface.example.org", "192.0.2.7").out
    assert "reach it at fedface.example.org:8443" in printed and "ca.key off this machine" in printed
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("certificates/ca.key", "certificates/server.key", "superexec.secret", "operator.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    authority, server = (
        x509.load_pem_x509_certificate((folder / f"certificates/{name}.crt").read_bytes())
        for name in ("ca", "server")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fedface.example.org", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1"]
    secret = (folder / "superexec.secret").read_bytes()
    assert len(secret) == 64

    assert "nothing in it is replaced" in fedface(folder, "fedface.example.org").sentence
    assert (folder / "superexec.secret").read_bytes() == secret


class Echo(BaseHTTPRequestHandler):
    """In SuperLink's place: answers with the path that reaches it."""

    def do_POST(self) -> None:
        length = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode() + b" " * length)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def address(fedface: Callable, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of nginx with the written configuration in front of a SuperLink that answers everything; its folder."""
    if (nginx := shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or shutil.which("nginx")) is None:
        pytest.skip("nginx is not installed here")
    folder = tmp_path / "server"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    superlink, enrolment = (HTTPServer(("127.0.0.1", 0), Echo) for _ in range(2))
    ports = {
        "--port": port,
        "--superlink-port": superlink.server_port,
        "--enrolment-port": enrolment.server_port,
        "--listen": "127.0.0.1",
    }
    assert fedface(folder, "localhost", *(word for pair in ports.items() for word in pair)).code == 0
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "certificates/server.crt", folder / "certificates/server.key")
    superlink.socket = tls.wrap_socket(superlink.socket, server_side=True)
    threads = [threading.Thread(target=server.serve_forever) for server in (superlink, enrolment)]
    for thread in threads:
        thread.start()
    proxy = subprocess.Popen([nginx, "-p", folder, "-c", "nginx.conf", "-g", "daemon off;"])
    try:
        while proxy.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert proxy.poll() is None
        yield port, folder
    finally:
        proxy.terminate()
        proxy.wait(20)
        for server, thread in zip((superlink, enrolment), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def ask(port: int, folder: Path, method: str, path: str, *, body: bytes = b"") -> tuple[int, bytes]:
    """Status and content of one request, with a path that nothing has tidied."""
    trusted = ssl.create_default_context(cafile=folder / "certificates/ca.crt")
    connection = HTTPSConnection("localhost", port, context=trusted, timeout=20)
    try:
        connection.putrequest(method, path)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_the_proxy_passes_the_fleet_api_and_nothing_else(address: tuple[int, Path]) -> None:
    """Not the control interface, by which anyone could start runs, however its path is written."""
    for path in ("pull-messages", "push-messages", "get-fab", "send-node-heartbeat"):
        assert ask(*address, "POST", f"/v1/fleet/{path}") == (200, f"/v1/fleet/{path}".encode())
    upload = ask(*address, "POST", "/v1/fleet/push-object", body=bytes(6_000_000))
    assert upload[0] == 200 and len(upload[1]) > 6_000_000
    tidied = ask(*address, "POST", "/v1/control/start-run/../../fleet/pull-messages")
    assert tidied == (200, b"/v1/fleet/pull-messages")
    for path in (
        "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/", "/health",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/pull-messages/../../control/start-run", "/v1/fleet/a/b", "/V1/FLEET/pull-messages", "/v1/fleet/",
    ):  # fmt: skip
        assert ask(*address, "POST", path)[0] == 403, path
    assert ask(*address, "GET", "/v1/fleet/pull-messages")[0] == 403


def test_the_proxy_passes_what_a_device_needs_to_join(address: tuple[int, Path]) -> None:
    """Three paths to the enrolment service, which here answers everything, and only small requests."""
    plan = f"/join/plans/{'0a' * 32}.plan"
    for method, path in (("GET", "/join/ca.crt"), ("GET", plan), ("POST", "/join/enrol")):
        assert ask(*address, method, path, body=b"123") == (200, path.encode() + b"   ")
    assert ask(*address, "POST", "/join/enrol", body=bytes(5000))[0] == 413
    for method, path in (
        ("PUT", plan), ("DELETE", "/join/ca.crt"), ("GET", "/join/plans/"), ("GET", "/join/plans/draft"),
        ("GET", "/join/"), ("POST", "/join/enrol/x"), ("GET", "/join/plans/../../operator.key"), ("GET", "/a"),
        ("GET", "/operator.key"), ("GET", "/join/plans/..%2f..%2foperator.key"), ("GET", "/invites/"),
    ):  # fmt: skip
        assert ask(*address, method, path)[0] == 403, (method, path)


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server up` in this process."""
    return caller(monkeypatch, capsys, "server", "up")


def test_another_folder_is_not_started(up: Callable, tmp_path: Path) -> None:
    """With the command that makes one."""
    assert "is not the folder of a server; `fedface server init` makes one" in up(tmp_path).sentence


def test_a_taken_port_is_named(fedface: Callable, up: Callable, tmp_path: Path) -> None:
    """Instead of SuperLink's traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert fedface(tmp_path / "server", "localhost", "--superlink-port", port).code == 0
        assert f"port {port} is taken" in up(tmp_path / "server").sentence


def test_a_renewed_certificate_is_trusted_by_devices_and_keeps_its_hosts(
    fedface: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the authority's key alone; another key, or a file that is none, changes nothing."""
    folder = tmp_path / "server"
    fedface(folder, "fedface.example.org")
    certificates = folder / "certificates"
    before = x509.load_pem_x509_certificate((certificates / "server.crt").read_bytes())
    renew = caller(monkeypatch, capsys, "server", "renew", str(folder), "--authority-key")
    assert "is not the key of" in renew(certificates / "server.key").sentence
    assert "expected the authority's private key" in renew(certificates / "ca.crt").sentence
    assert (certificates / "server.crt").read_bytes() == before.public_bytes(serialization.Encoding.PEM)

    assert "restart the server" in renew(certificates / "ca.key").out
    after = x509.load_pem_x509_certificate((certificates / "server.crt").read_bytes())
    after.verify_directly_issued_by(x509.load_pem_x509_certificate((certificates / "ca.crt").read_bytes()))
    assert (
        after.serial_number != before.serial_number
        and after.not_valid_after_utc >= before.not_valid_after_utc
    )
    names = x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(names) == before.extensions.get_extension_for_class(names)
    assert (certificates / "server.key").stat().st_mode & 0o777 == 0o600
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        certificates / "server.crt", certificates / "server.key"
    )


def test_a_host_that_is_no_name_is_refused(fedface: Callable, tmp_path: Path) -> None:
    """Certificates hold ASCII names."""
    assert (
        "host: expected a name in ASCII or an address"
        in fedface(tmp_path / "server", "bücher.example").sentence
    )
