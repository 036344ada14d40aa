"""`fedface device web`: what the owner's page shows, and who may press its button."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fedface.cli import device_web
from fedface.errors import ConfigError
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import TransmissionInfo
from fedface.privacy.mechanism import GaussianSum

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a device from which one update of a run left, and a refusal to a run with a hostile name."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    policy = "{max_epsilon: 8, delta: 1e-6, hours: ['00:00-00:01'], periods: [{days: 7, epsilon: 1}]}"
    (tmp_path / "device.yaml").write_text(f"name: kitchen\nphotos: photos\nstate: state\npolicy: {policy}\n")
    with Ledger.open(tmp_path / "state" / "ledger.sqlite") as ledger:
        event = GaussianSum(sigma=9.0, clip_norm=1.0).event()
        entry = ledger.record(
            event, run="family", round=1, metadata={"unit": "photo", "objective": "generator"}
        )
        ledger.store_reply("family", 1, b"x" * 2000)
        sent = TransmissionInfo(
            run="family",
            round=1,
            kind="update",
            receiver="host:1",
            protection="noise added here",
            entry=entry.number,
        )
        ledger.record_transmission(b"x" * 2000, sent)
        refused = replace(sent, run=HOSTILE, kind="refusal", entry=None, reason="its budget is spent")
        ledger.record_transmission(b"its budget is spent", refused)
    return tmp_path / "device.yaml"


class Page:
    """The page in a browser: an address with a secret."""

    def __init__(self, server: device_web.PageServer) -> None:
        self.port, self.path = server.server_port, server.path

    def ask(self, method: str = "GET", action: str = "", **headers: str) -> tuple[int, str]:
        """Status and content; headers such as `origin` are those of this page unless given."""
        own = {"host": f"127.0.0.1:{self.port}"}
        own |= {"origin": f"http://127.0.0.1:{self.port}"} if method == "POST" else {}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, f"{self.path}{action}", headers={**own, **headers})
        reply = connection.getresponse()
        assert reply.getheader("cache-control") == "no-store" and reply.getheader("x-frame-options") == "DENY"
        return reply.status, reply.read().decode()


@pytest.fixture
def page(file: Path) -> Iterator[Page]:
    """It is served until the end of the test."""
    with device_web.listening(file, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Page(server)
        server.shutdown()
        thread.join()


def test_the_page_shows_state_budget_and_what_left(page: Page) -> None:
    """Each epsilon with delta, unit and bounds; text of a server is text."""
    status, shown = page.ask()
    text = " ".join(shown.split())
    assert status == 200 and "<h1>kitchen</h1>" in text and "Not running" in text
    assert "the policy's hours are 00:00-00:01" in text.replace("&#39;", "'")
    for budget in (
        "of epsilon 8 for life",
        "of epsilon 1 in any 7 days",
        "at delta 1e−6 per photo",
        "(between ",
    ):
        assert budget in text
    assert "An update of a network's weights, for family, round 1." in text.replace("&#39;", "'")
    assert "kB to host:1: noise added here. Cost: epsilon 0." in text, text
    assert "1 update, 1 refusal" in text and "its budget is spent" in text
    assert HOSTILE not in text and "&lt;script&gt;" in text and "<script" not in text
    assert "names no operator" in text and 'action="pause"' in text


def test_the_button_pauses_and_resumes(page: Page, file: Path) -> None:
    """As the commands do; the browser is then sent back to the page."""
    paused = file.parent / "state" / "paused"
    assert page.ask("POST", "pause") == (303, "") and paused.exists()
    shown = page.ask()[1]
    assert "Every task is refused until you resume" in shown and 'action="resume"' in shown
    assert page.ask("POST", "resume")[0] == 303 and not paused.exists()


def test_neither_other_pages_nor_other_users_pause_or_read(page: Page, file: Path) -> None:
    """A foreign or hidden origin, another host name, a guessed address, a link instead of the button."""
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": f"evil.example:{page.port}"},
    ):
        assert page.ask("POST", "pause", **headers)[0] == 403
    assert page.ask(host="evil.example")[0] == 403
    assert page.ask(action="pause")[0] == 404 and page.ask("POST", "erase")[0] == 404
    page.path = "/guess/"
    for method, action in (("GET", ""), ("POST", "pause")):
        status, shown = page.ask(method, action)
        assert status == 404 and "kitchen" not in shown
    assert not (file.parent / "state" / "paused").exists()


def test_a_ledger_that_cannot_be_read_is_a_sentence_and_the_button_works(page: Page, file: Path) -> None:
    """Damaged, then missing beside its head; a device without a state folder says so too."""
    ledger = file.parent / "state" / "ledger.sqlite"
    for damage in (lambda: ledger.write_bytes(b"x" * 5000), ledger.unlink):
        damage()
        status, shown = page.ask()
        assert status == 200 and "Its record cannot be read" in shown and "ledger.sqlite" in shown
        assert "What is left of your budget" not in shown
    assert page.ask("POST", "pause")[0] == 303 and "resume" in page.ask()[1]
    (file.parent / "state").rename(file.parent / "elsewhere")
    for method, action in (("GET", ""), ("POST", "resume")):
        status, shown = page.ask(method, action)
        assert status == 500 and "there is no folder" in shown


def test_admitted_runs_are_described(page: Page, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they were read by a process of their own, and once only while nothing changes."""
    file.write_text(file.read_text() + f"operator: {'0' * 64}\n")
    plan = {
        "run": "family",
        "verdict": "fits the policy",
        "hash": "ab" * 32,
        "description": {"Training": "2 rounds"},
    }
    calls = []

    def answered(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command[-4:])
        return subprocess.CompletedProcess(command, 0, json.dumps([plan]), "")

    monkeypatch.setattr(device_web.subprocess, "run", answered)
    assert 'http-equiv="refresh"' in page.ask()[1]
    until = time.monotonic() + 20
    while "being read" in (shown := page.ask()[1]) and time.monotonic() < until:
        time.sleep(0.01)
    assert "This run fits the policy." in shown and "2 rounds" in shown and "--remove abababababab" in shown
    assert calls == [["device", "plans", str(file), "--json"]]


def test_a_taken_port_is_named(page: Page, file: Path) -> None:
    with pytest.raises(ConfigError, match=f"port {page.port} cannot be used"):
        device_web.listening(file, page.port)
