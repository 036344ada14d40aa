"""Two devices that start with one key, as after a folder was copied: one is connected, the other ends with a sentence.

SuperLink and SuperNodes are Flower's own, with TLS and registered keys; only nginx is missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from superlink import superlink

from fedface.cli.child_processes import Child, started

DEVICE = "name: kitchen\nphotos: photos\nstate: state\nserver: localhost:PORT\npolicy: {max_epsilon: 8, delta: 1e-6}\n"
CONNECTED = "kitchen is connected to"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a device whose key is registered at a SuperLink that runs."""
    with superlink(tmp_path, ["one"], DEVICE, monkeypatch) as files:
        yield files[0]


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
