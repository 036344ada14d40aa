"""A SuperLink of Flower's own for slow stories, with TLS and registered keys, and devices' folders beside it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedface.cli.child_processes import started
from fedface.cli.server_certificates import make_certificates
from fedface.device.node_key import node_public_key

ROOT = Path(__file__).resolve().parents[1]
FLWR = Path(sys.executable).with_name("flwr")


@contextmanager
def superlink(
    folder: Path, names: Sequence[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Path]]:
    """The files of devices whose keys are registered at a SuperLink that runs, which `flwr` calls "here".

    Args:
        folder: Everything is written below it; a device NAME has the folder NAME.
        device: The content of a device file; NAME and PORT are replaced.
    """
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FLWR_HOME", str(folder / "flwr"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "indexes"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    certificates = folder / "certificates"
    make_certificates(certificates, ["localhost"])
    files = [folder / name / "device.yaml" for name in names]
    for name, file in zip(names, files, strict=True):
        for inside in ("photos", "state"):
            (file.parent / inside).mkdir(parents=True, mode=0o700)
        shutil.copy(certificates / "ca.crt", file.parent)
        file.write_text(device.replace("PORT", str(port)).replace("NAME", name))
        file.with_name("node.pub").write_text(node_public_key(file.with_name("node")))
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{certificates / "ca.crt"}"\n'
    )
    command = [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
        "--ssl-ca-certfile", str(certificates / "ca.crt"), "--ssl-certfile", str(certificates / "server.crt"),
        "--ssl-keyfile", str(certificates / "server.key"),
    ]  # fmt: skip
    with started(command, folder / "superlink.log", folder=folder) as running:
        running.wait_until(lambda: _listens(port), seconds=60)
        for file in files:
            register = [FLWR, "supernode", "register", file.with_name("node.pub"), "here"]
            subprocess.run(register, check=True, timeout=60)
        yield files


def _listens(port: int) -> bool:
    """Whether SuperLink accepts connections."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
