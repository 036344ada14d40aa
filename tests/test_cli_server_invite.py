"""`fedface server invite` and `publish`, and the service that enrols each invited device once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml
from command_line import caller
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from server_folder import server_folder
from tiny import tiny_file

from fedface.cli.child_processes import listens
from fedface.messages.invite import Invite
from fedface.messages.run_plan import SignedPlan

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server` in this process."""
    return caller(monkeypatch, capsys, "server")


@pytest.fixture
def server(fedface: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a server that seems to run."""
    with server_folder(fedface, monkeypatch, tmp_path) as folder:
        yield folder


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment for three remote devices."""
    recipe = yaml.safe_load(tiny_file(tmp_path).read_text())
    recipe["devices"] = {"kind": "remote-devices", "at_least": 3}
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def invited(fedface: Callable, device: str, experiment: Path) -> Invite:
    """The invitation that the command prints."""
    printed = fedface("invite", "server", device, experiment).out
    return Invite.from_code(next(line for line in printed.splitlines() if line.startswith("FEDFACE1-")))


def test_an_invitation_names_the_server_its_authority_its_operator_and_the_plan(
    fedface: Callable,
    server: Path,
    experiment: Path,
) -> None:
    """All that a device needs to trust nothing else; the token itself is not stored."""
    printed = fedface("invite", "server", "kitchen", experiment).out
    assert "█" in printed and "Give it to the device's owner alone" in printed
    invite = invited(fedface, "kitchen", experiment)
    certificate = x509.load_pem_x509_certificate((server / "public/ca.crt").read_bytes())
    assert invite.address == "localhost:8443"
    assert invite.authority == certificate.fingerprint(hashes.SHA256())
    file = server / "public/plans" / f"{invite.plan.hex()}.plan"
    signed = SignedPlan.from_bytes(file.read_bytes(), invite.operator)
    assert signed.hash == invite.plan.hex() and signed.plan.name == "tiny"
    assert os.stat(file).st_mode & 0o777 == 0o644
    stored = "".join(path.read_text() for path in (server / "invites").iterdir())
    assert invite.token.hex() not in stored and stored.count('"device"') == 1  # the second replaces the first


def test_what_cannot_be_invited_to_is_one_sentence(fedface: Callable, server: Path, experiment: Path) -> None:
    assert (
        "expected remote-devices"
        in fedface("invite", "server", "kitchen", tiny_file(experiment.parent)).sentence
    )
    assert "expected a name" in fedface("invite", "server", "../kitchen", experiment).sentence
    assert fedface("register", "server", "kitchen", "a.pub").code == 0
    assert "is registered already" in fedface("invite", "server", "kitchen", experiment).sentence
    assert "is not the folder of a server" in fedface("invite", "elsewhere", "hall", experiment).sentence
    assert fedface("revoke", "server", "kitchen").code == 0
    assert invited(fedface, "kitchen", experiment).address == "localhost:8443"


def test_many_devices_are_invited_at_once(fedface: Callable, server: Path, experiment: Path) -> None:
    """A table for a mail merge; one name that cannot be invited, and no device is."""
    result = fedface("invite", "server", "hall", "attic", experiment, "--csv", "codes.csv")
    assert result.code == 0 and "FEDFACE1" not in result.out and "2 invitations to tiny" in result.out
    header, *rows = [line.split(",") for line in Path("codes.csv").read_text().splitlines()]
    assert header == ["device", "code", "expires"] and [row[0] for row in rows] == ["hall", "attic"]
    first, second = (Invite.from_code(row[1]) for row in rows)
    assert first.plan == second.plan and first.token != second.token
    assert os.stat("codes.csv").st_mode & 0o077 == 0
    before = sorted((server / "invites").iterdir())
    assert "twice" in fedface("invite", "server", "cellar", "hall", "Hall", experiment).sentence
    assert "exists" in fedface("invite", "server", "cellar", experiment, "--csv", "codes.csv").sentence
    assert sorted((server / "invites").iterdir()) == before


def test_a_changed_experiment_is_another_plan(fedface: Callable, server: Path, experiment: Path) -> None:
    """An owner who admitted one is asked again. So is a ranking of models, to which devices can be invited too."""
    first = fedface("publish", "server", experiment).out
    assert fedface("publish", "server", experiment).out == first
    assert fedface("publish", "server", experiment, "--set", "question=Another one?").out != first
    Path("other.safetensors").hardlink_to(experiment.with_name("base.safetensors"))
    ranked = [word for model in ("base", "other.safetensors") for word in ("--rank", model)]
    printed = fedface("invite", "server", "kitchen", experiment, *ranked).out
    assert "Invitation of device kitchen to tiny-ranking" in printed


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and content of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body)
    reply = connection.getresponse()
    return reply.status, reply.read()


def enrol(port: int, body: object) -> tuple[int, dict[str, str]]:
    """Status and answer of one request to enrol."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = ask(port, "POST", "/join/enrol", content)
    return status, json.loads(answer)


@pytest.fixture
def port(server: Path) -> Iterator[int]:
    """Of the running service."""
    port = yaml.safe_load((server / "ports.yaml").read_text())["enrolment"]
    script = "import sys; from fedface.cli import server_flower, server_enrolment; from pathlib import Path\n"
    script += "server_flower.path_of = lambda name: sys.argv[2]\nserver_enrolment.serve(Path(sys.argv[1]))"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            server,
            shutil.copy(server.parent / "flwr", server / "flwr" / "program"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"},
        stderr=(server / "enrolment.log").open("wb"),
    )

    try:
        while not listens(port):
            assert process.poll() is None, (server / "enrolment.log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def test_an_invited_device_enrols_once(
    fedface: Callable,
    server: Path,
    experiment: Path,
    port: int,
) -> None:
    """The same request again has the same answer, as after a lost one; another key is refused."""
    invite = invited(fedface, "kitchen", experiment)
    a, b = (Path(f"{name}.pub").read_text() for name in "ab")
    request = {"token": invite.token.hex(), "public_key": a}
    assert enrol(port, request) == (200, {"device": "kitchen"})
    assert enrol(port, request) == (200, {"device": "kitchen"})
    status, answer = enrol(port, {**request, "public_key": b})
    assert status == 403 and "was used by another device" in answer["error"]
    assert [row["name"] for row in json.loads(fedface("devices", "server", "--json").out)] == ["kitchen"]


def test_a_stranger_gets_the_authority_and_published_plans_and_no_other_file(
    fedface: Callable, server: Path, experiment: Path, port: int
) -> None:
    """The operator's key and the invitations are beside them."""
    (plan,) = (
        (server / "public/plans").glob("*") if fedface("publish", "server", experiment).code == 0 else ()
    )
    assert ask(port, "GET", "/join/ca.crt") == (200, (server / "certificates/ca.crt").read_bytes())
    assert ask(port, "GET", f"/join/plans/{plan.name}") == (200, plan.read_bytes())
    (server / "public/plans/draft").write_text("private")
    others = ("draft", "../../operator.key", f"{'0' * 64}.plan", "", f"{plan.name}/../../../operator.key")
    for path in ("/", "/join/enrol", "/join/ca.key", *(f"/join/plans/{other}" for other in others)):
        assert ask(port, "GET", path)[0] == 404, path


def test_hostile_requests_enrol_no_device(
    fedface: Callable,
    server: Path,
    experiment: Path,
    port: int,
) -> None:
    """Guessed, expired and replaced tokens, other keys, and what is not a request."""
    replaced = invited(fedface, "kitchen", experiment).token.hex()
    invite = invited(fedface, "kitchen", experiment)
    key, token = Path("a.pub").read_text(), invite.token.hex()
    for guess in ("00" * 16, "", "zz", "../../ports", replaced, invite.token_hash, "é"):
        assert enrol(port, {"token": guess, "public_key": key})[0] == 403, guess
    for other in ("", "ssh-ed25519 AAAA", "-----BEGIN PRIVATE KEY-----", key[:60], "\0"):
        assert enrol(port, {"token": token, "public_key": other})[0] == 400, other
    for body in (b"", b"{", b"[]", b"1", b"\xff", b"{}", b"[" * 4000, b" " * 5000):
        assert enrol(port, body)[0] == 400, body
    file = server / "invites" / f"{invite.token_hash}.json"
    file.write_text(file.read_text().replace('"expires": "20', '"expires": "19'))
    status, answer = enrol(port, {"token": token, "public_key": key})
    assert status == 403 and "has expired" in answer["error"]
    assert json.loads(fedface("devices", "server", "--json").out) == []


def test_a_server_that_cannot_register_says_so_and_keeps_the_invitation(
    fedface: Callable,
    server: Path,
    experiment: Path,
    port: int,
) -> None:
    """Its operator's files stay out of the answer."""
    invite = invited(fedface, "kitchen", experiment)
    request = {"token": invite.token.hex(), "public_key": Path("a.pub").read_text()}
    flwr = server / "flwr" / "program"
    stored = flwr.read_text()
    flwr.write_text("#!/bin/sh\necho broken /secret/path\n")
    assert enrol(port, request) == (
        503,
        {"error": "the server cannot register a device now; try again later"},
    )
    flwr.write_text(stored)
    assert enrol(port, request) == (200, {"device": "kitchen"})
