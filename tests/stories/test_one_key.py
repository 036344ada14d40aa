"""Two devices that start with one key, as after a folder was copied: one is connected, the other ends with a sentence.

SuperLink and SuperNodes are Flower's own, with TLS and registered keys; only nginx is missing.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedface.cli.child_processes import Child, started
from fedface.cli.server_certificates import make_certificates
from fedface.device.node_key import node_public_key

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "name: kitchen\nphotos: photos\nstate: state\nserver: localhost:PORT\npolicy: {max_epsilon: 8, delta: 1e-6}\n"
CONNECTED = "kitchen is connected to"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a device whose key is registered at a SuperLink that runs."""
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "indexes"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    certificates = tmp_path / "certificates"
    make_certificates(certificates, ["localhost"])
    folder = tmp_path / "one"
    for inside in ("photos", "state"):
        (folder / inside).mkdir(parents=True, mode=0o700)
    shutil.copy(certificates / "ca.crt", folder)
    (folder / "device.yaml").write_text(DEVICE.replace("PORT", str(port)))
    (tmp_path / "node.pub").write_text(node_public_key(folder / "node"))
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{certificates / "ca.crt"}"\n'
    )
    command = [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
        "--ssl-ca-certfile", str(certificates / "ca.crt"), "--ssl-certfile", str(certificates / "server.crt"),
        "--ssl-keyfile", str(certificates / "server.key"),
    ]  # fmt: skip
    with started(command, tmp_path / "superlink.log", folder=tmp_path) as superlink:
        superlink.wait_until(lambda: listens(port), seconds=60)
        flwr = Path(sys.executable).with_name("flwr")
        subprocess.run([flwr, "supernode", "register", tmp_path / "node.pub", "here"], check=True, timeout=60)
        yield folder / "device.yaml"


def listens(port: int) -> bool:
    """Whether SuperLink accepts connections."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(file: Path) -> Iterator[Child]:
    """`fedface device start` in a process of its own, which is connected."""
    command = ["python", "-m", "fedface.cli", "device", "start", str(file)]
    with started(command, file.with_name("device.log")) as child:
        child.wait_until(lambda: CONNECTED in child.output(), seconds=60)
        yield child


def refused(file: Path) -> str:
    """What a device says that is not accepted."""
    command = [sys.executable, "-m", "fedface.cli", "device", "start", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.slow
def test_of_two_devices_with_one_key_one_is_connected_and_the_other_says_why_not(device: Path) -> None:
    """Once the first has stopped, the second takes its place, and the first is refused. Nothing is recorded."""
    other = device.parent.with_name("two") / "device.yaml"
    shutil.copytree(device.parent, other.parent)
    with ExitStack() as first:
        child = first.enter_context(running(device))
        assert "is running already" in refused(device)  # the same folder
        assert "only one device at a time can be connected with it" in refused(other)
        time.sleep(5)
        assert child.running
    with running(other):
        assert "only one device at a time can be connected with it" in refused(device)
    for folder in (device.parent, other.parent):
        assert not (folder / "state" / "ledger.sqlite").exists() and not list(
            (folder / "state").glob("*.secret")
        )
