"""`fedface device start`: what is wrong is one sentence and exit code 2, before a SuperNode starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from command_line import caller

from clients.node_key import make_node_key
from fedface.cli import child_processes
from fedface.cli.server_certificates import make_certificates

FILE = "name: kitchen\nphotos: photos\nstate: state\nserver: SERVER\npolicy: {max_epsilon: 8, delta: 1e-6}\n"


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path):  # type: ignore[no-untyped-def]
    """Call the command line in this process; a SuperNode must not start."""
    monkeypatch.setattr(child_processes.subprocess, "Popen", None)
    return caller(monkeypatch, capsys, "device", "start")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device's folder with everything that it needs to start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    make_certificates(tmp_path / "certificates", ["fedface.example.org"])
    (tmp_path / "certificates" / "ca.crt").rename(tmp_path / "ca.crt")
    make_node_key(tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "device.yaml").write_text(FILE.replace("SERVER", f"localhost:{port}"))
    return tmp_path


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("ca.crt", "certificate: there is no file {}; ask the server's operator"),
        ("node", "node_key: there is no file {}; generate it with python clients/node_key.py {}"),
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
