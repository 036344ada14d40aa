"""`fedface server register`, `devices` and `revoke`, with a `flwr` that has no SuperLink."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import caller
from server_folder import server_folder

from fedface.cli import server_devices, server_flower
from fedface.device.node_key import key_name


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server` in this process."""
    return caller(monkeypatch, capsys, "server")


@pytest.fixture
def server(fedface: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a server that seems to run."""
    with server_folder(fedface, monkeypatch, tmp_path) as folder:
        yield folder


def states(fedface: Callable) -> dict[str | None, str]:
    """The state of each device by name."""
    return {row["name"]: row["state"] for row in json.loads(fedface("devices", "server", "--json").out)}


def test_a_registered_device_is_listed_by_name(fedface: Callable, server: Path) -> None:
    """Registering it again changes nothing; its node's id survives as text, beyond JSON's exact numbers."""
    assert "no device" in fedface("devices", "server").out
    first = fedface("register", "server", "kitchen", "a.pub").out
    assert f"its node is {2**63}" in first
    assert fedface("register", "server", "kitchen", "a.pub").out == first
    assert fedface("register", "server", "hall", "b.pub").code == 0
    assert states(fedface) == {"hall": "never connected", "kitchen": "never connected"}
    listed = fedface("devices", "server").out
    assert "kitchen" in listed and str(2**63) in listed
    stored = json.loads((server / "devices/kitchen.json").read_text())
    assert stored["public_key"] == " ".join(Path("a.pub").read_text().split()[:2])


def test_a_device_is_listed_with_the_version_and_the_clock_of_its_last_start(
    fedface: Callable, server: Path
) -> None:
    """Of nginx's log, in which others may write what they like; the last report of a key counts."""
    assert fedface("register", "server", "kitchen", "a.pub").code == 0
    own = key_name(" ".join(Path("a.pub").read_text().split()[:2]))
    line = '192.0.2.7 - - [01/Dec/2026:03:00:45 +0000] "GET / HTTP/1.1" 403 146 "-" "{}"\n'
    said = [f"fedface/0.1.0 {own} 1796094045", f"fedface/0.2.0 {own} 1796094065", "fedface/9 x 1", "curl/8"]
    (server / "nginx-access.log").write_bytes("".join(map(line.format, said)).encode() + b"\x00\xff")
    (row,) = json.loads(fedface("devices", "server", "--json").out)
    assert (row["version"], row["clock"]) == ("0.2.0", "+20 s")
    assert "+20 s" in fedface("devices", "server").out


def test_a_name_and_a_key_are_of_one_device(fedface: Callable, server: Path) -> None:
    """Also where the file system or a reader does not distinguish case."""
    assert fedface("register", "server", "kitchen", "a.pub").code == 0
    assert "the name Kitchen is that of another" in fedface("register", "server", "Kitchen", "b.pub").sentence
    assert "this key is that of device kitchen" in fedface("register", "server", "hall", "a.pub").sentence
    assert states(fedface) == {"kitchen": "never connected"}


def test_a_revoked_device_stays_out_and_may_return_with_another_key(fedface: Callable, server: Path) -> None:
    """Flower accepts no key twice; another device is not touched."""
    for name, key in (("kitchen", "a.pub"), ("hall", "b.pub")):
        assert fedface("register", "server", name, key).code == 0
    before = (server / "devices/hall.json").read_bytes()
    printed = fedface("revoke", "server", "kitchen").out
    assert "can no longer connect" in printed and "stays in the sums and models" in printed
    assert states(fedface) == {"hall": "never connected", "kitchen": "revoked"}
    assert fedface("revoke", "server", "kitchen").code == 0
    assert "this key was revoked" in fedface("register", "server", "kitchen", "a.pub").sentence
    assert "this key was revoked" in fedface("register", "server", "attic", "a.pub").sentence

    assert fedface("register", "server", "kitchen", "c.pub").code == 0
    assert states(fedface) == {"hall": "never connected", "kitchen": "never connected"}
    assert (server / "devices/hall.json").read_bytes() == before
    assert "already: it was revoked" in fedface("register", "server", "attic", "a.pub").sentence
    assert (
        "attic: no such device; registered are hall, kitchen" in fedface("revoke", "server", "attic").sentence
    )


def test_a_lost_database_lets_devices_register_again(fedface: Callable, server: Path) -> None:
    """Their files remain; a node that has no file is listed without a name."""
    assert fedface("register", "server", "kitchen", "a.pub").code == 0
    (server / "flwr/fake.json").unlink()
    assert states(fedface) == {"kitchen": "unknown to the server"}
    assert fedface("register", "server", "kitchen", "a.pub").code == 0
    (server / "devices/kitchen.json").unlink()
    assert states(fedface) == {None: "never connected"}


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("../kitchen", "a.pub", "name: expected letters, digits"),
        ("kitchen", "a", "public key: expected one in OpenSSH's format"),
        ("kitchen", "none.pub", "none.pub: no such file"),
    ],
)
def test_a_wrong_name_or_key_is_refused(
    fedface: Callable, server: Path, name: str, key: str, words: str
) -> None:
    """Before Flower is asked; a private key is not a public one."""
    assert words in fedface("register", "server", name, key).sentence
    assert not list((server / "devices").glob("*")) if (server / "devices").exists() else True


def test_a_server_that_does_not_run_is_named(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that starts it; another folder with the command that makes one."""
    monkeypatch.setattr(server_flower, "listens", lambda port: False)
    for words in (("devices", "server"), ("register", "server", "kitchen", "a.pub")):
        assert "start it with `fedface server up server`" in fedface(*words).sentence
    assert "`fedface server init` makes one" in fedface("devices", ".").sentence
    assert "`fedface server init` makes one" in fedface("register", ".", "kitchen", "a.pub").sentence


def test_a_failing_flwr_is_one_sentence(fedface: Callable, server: Path) -> None:
    """Whether it prints JSON, something else, or is not installed."""
    program = server.parent / "flwr"
    program.write_text("#!/bin/sh\necho oops >&2; echo; exit 3\n")
    assert fedface("devices", "server").sentence == "flwr supernode list: oops"
    program.unlink()
    assert "flwr is not installed here" in fedface("devices", "server").sentence


def test_a_moved_server_finds_its_certificate(fedface: Callable, server: Path) -> None:
    """Flower demands an absolute path."""
    server.rename(server.parent / "moved")
    assert "no device" in fedface("devices", "moved").out
    config = (server.parent / "moved/flwr/config.toml").read_text()
    assert f'root-certificates = "{server.parent}/moved/certificates/ca.crt"' in config


def test_a_registration_that_was_killed_is_finished_by_the_next(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower accepts a key once, so the node that it has already is found again."""

    def killed(folder: Path, *words: str) -> None:
        server_flower.flower(folder, *words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(server_devices, "flower", killed)
        assert fedface("register", "server", "kitchen", "a.pub").code == 130
    assert states(fedface) == {None: "never connected"}
    assert f"its node is {2**63}" in fedface("register", "server", "kitchen", "a.pub").out
    assert states(fedface) == {"kitchen": "never connected"}
    assert [path.name for path in (server / "devices").iterdir()] == ["kitchen.json"]
