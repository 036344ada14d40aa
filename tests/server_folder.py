"""The folder of a server that seems to run: a port listens in SuperLink's place, and `flwr` is tests/fake_flwr.py."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedface.cli import server_flower
from fedface.device.node_key import node_public_key

FAKE = Path(__file__).with_name("fake_flwr.py")


@contextmanager
def server_folder(fedface: Callable, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """`fedface` calls `fedface server`; beside the server's folder are `flwr` and keys a.pub, b.pub and c.pub."""
    program = folder / "flwr"
    program.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
    program.chmod(0o755)
    monkeypatch.setattr(server_flower, "path_of", lambda name: str(folder / name))
    for name in "abc":
        (folder / f"{name}.pub").write_text(node_public_key(folder / name) + " kitchen\n")
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as superlink, socket.create_server(("127.0.0.1", 0)) as free:
        ports = superlink.getsockname()[1], free.getsockname()[1]
        free.close()
        given = ("--listen", "127.0.0.1", "--superlink-port", ports[0], "--enrolment-port", ports[1])
        assert fedface("init", "server", "localhost", *given).code == 0
        yield folder / "server"
