"""`fedface device check`: one sentence for each part, and which part will not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import Result, caller
from fake_server import OPERATOR, FakeServer, running
from png_files import write_png
from tiny import tiny_experiment

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.aggregation.payload import AggregationParameters, HomomorphicConfig
from fedface.cli import device_check
from fedface.cli.child_processes import started
from fedface.coordinator.requests import run_plan
from fedface.errors import FederationError
from fedface.messages.run_plan import SignedPlan
from fedface.photos.detectors import EmbeddedDetector
from fedface.photos.scan import scan_library


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SignedPlan:
    """Of a run with encrypted sums."""
    changes = {"aggregation.kind": "homomorphic"}
    return run_plan(tiny_experiment(tmp_path_factory.mktemp("recipe"), changes)).signed(OPERATOR)


@pytest.fixture
def server(certificates: Path, signed: SignedPlan) -> Iterator[FakeServer]:
    """It runs until the end of the test."""
    with running(FakeServer(certificates, signed)) as fake:
        yield fake


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `fedface device ...` in this process; the server accepts every key."""
    monkeypatch.setattr(device_check, "check_registration", lambda path: None)
    return caller(monkeypatch, capsys, "device")


@pytest.fixture
def device(
    fedface, server: FakeServer, signed: SignedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:  # type: ignore[no-untyped-def]
    """The file of a device that has joined and has everything."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "index"))
    photos, file = tmp_path / "photos", tmp_path / "fedface" / "device.yaml"
    photos.mkdir()
    code = server.invite(signed.hash).code()
    assert fedface("join", code, file.parent, "--photos", photos, "--yes", "--no-service").code == 0
    assert fedface("keygen", file.parent / "state" / "sum.key", "--device", file).code == 0
    return file


def line(result: Result, heading: str) -> str:
    """The line of one part."""
    (found,) = [text for text in result.out.splitlines() if text[7:].startswith(heading)]
    return found


def test_a_device_that_works_is_said_so(fedface, device: Path) -> None:  # type: ignore[no-untyped-def]
    """Seven sentences; nothing is written."""
    before = sorted(device.parent.rglob("*"))
    result = fedface("check", device)
    assert result.code == 0, result.out
    assert "proves itself by ca.crt; this device's clock agrees" in line(result, "server")
    assert "accepts this device's key" in line(result, "key")
    assert "no face is indexed yet" in line(result, "photos")
    assert "the run tiny fits the policy" in line(result, "policy")
    assert "its ledger is intact, with 0 releases" in line(result, "state")
    assert "every device of the run must have the same" in line(result, "sum.key")
    assert "free at" in line(result, "disk")
    assert result.out.splitlines()[-1] == "Everything works."
    assert sorted(device.parent.rglob("*")) == before


def changed(device: Path, old: str, new: str) -> None:
    """Edit the device file."""
    assert old in device.read_text()
    device.write_text(device.read_text().replace(old, new))


def another_key(device: Path) -> None:
    """A key for sums of another run."""
    key = device.parent / "state" / "sum.key"
    key.unlink()
    HomomorphicKeys.make(
        HomomorphicConfig(bits=8), AggregationParameters(value_range=1.0, max_devices=3)
    ).save(key)


def removed_plan(device: Path) -> None:
    """The owner has taken back the admission."""
    for plan in (device.parent / "state" / "plans").iterdir():
        plan.unlink()


def damaged_plan(device: Path) -> None:
    """A plan of another version, or of a disk that lost it."""
    for plan in (device.parent / "state" / "plans").iterdir():
        plan.write_bytes(plan.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "heading", "words"),
    [
        (damaged_plan, "policy", "state/plans/"),
        (lambda device: (device.parent / "state" / "sum.key").unlink(), "sum.key", "copy it from another device"),
        (another_key, "sum.key", "does not fit the encryption of the run tiny"),
        (lambda device: (device.parent / "state" / "sum.key").chmod(0o644), "sum.key", "others may read this key"),
        (removed_plan, "policy", "no run plan is admitted"),
        (lambda device: changed(device, "max_epsilon: ", "max_epsilon: 1 # "), "policy", "would be refused"),
        (lambda device: changed(device, "# expires: 2027", "expires: 2020"), "policy", "ended on 2020"),
        (lambda device: (device.parent / "state" / "paused").touch(), "state", "this device is paused"),
        (lambda device: (device.parent / "state" / "ledger.sqlite").write_text("x" * 5000), "state", "ledger"),
        (lambda device: (device.parent / "node").chmod(0o644), "server", "other users can read"),
        (lambda device: changed(device, "server: \"localhost:", "server: \"localhost:1#"), "server", "HOST:PORT"),
    ],
)  # fmt: skip
def test_what_will_not_work_is_named(  # type: ignore[no-untyped-def]
    fedface, device: Path, change: Callable[[Path], object], heading: str, words: str
) -> None:
    """With exit code 2, and after it the other parts."""
    change(device)
    result = fedface("check", device)
    assert result.code == 2 and "Traceback" not in result.err
    assert line(result, heading).startswith("FAILS") and words in line(result, heading), result.out
    assert line(result, "disk").startswith("ok") and result.out.splitlines()[-1].endswith("will not work.")


def test_a_key_that_is_not_registered_is_named(  # type: ignore[no-untyped-def]
    fedface, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real SuperNode is refused in tests/stories/test_deployment.py."""

    def refused(path: Path) -> None:
        raise FederationError("ask the server's operator to register this device's public key")

    monkeypatch.setattr(device_check, "check_registration", refused)
    result = fedface("check", device)
    assert result.code == 2 and "register this device's public key" in line(result, "key")


@pytest.mark.parametrize(("logged", "works"), [("SuperNode ID: 7", True), ("retrying in 3 seconds", False)])
def test_a_device_that_runs_is_not_connected_twice(  # type: ignore[no-untyped-def]
    fedface, device: Path, monkeypatch: pytest.MonkeyPatch, logged: str, works: bool
) -> None:
    """The server would turn away one of the two."""
    monkeypatch.setattr(device_check, "check_registration", None)
    log = device.parent / "state" / "supernode.log"
    with started(["python", "-c", "import time; time.sleep(60)"], log):
        with log.open("a") as out:
            out.write(logged)
        assert line(fedface("check", device), "key").startswith("ok" if works else "FAILS")


def test_indexed_faces_are_counted(fedface, device: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A folder without a face works: its replies are noise alone."""
    write_png(tmp_path / "photos" / "grey.png", np.full((64, 64, 3), 90, dtype=np.uint8))
    scan_library(tmp_path / "photos", detector=EmbeddedDetector())
    assert "no photo with a face: replies are noise alone" in line(fedface("check", device), "photos")


def test_a_server_that_is_away_fails_its_line_alone(fedface, device: Path, server: FakeServer) -> None:  # type: ignore[no-untyped-def]
    changed(device, f'"localhost:{server.http.server_port}"', '"localhost:1"')
    result = fedface("check", device)
    assert result.code == 2 and "cannot be reached" in line(result, "server")
    assert line(result, "photos").startswith("ok")


def test_a_file_that_is_not_a_device_file_is_one_sentence(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "device.yaml").write_text("name: a\n")
    assert "device.yaml" in fedface("check", tmp_path / "device.yaml").sentence
