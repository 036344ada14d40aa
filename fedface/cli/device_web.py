"""The command `fedface device web`: the owner's page of a device, in a browser on this computer.

It shows, and changes nothing but the pause. Its address contains a secret, so that other users of this computer and
other pages in the browser neither read it nor press its button. It runs with what a device installs, and loads nothing
that trains: admitted run plans, which need that, are read by a process that ends.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import webbrowser
from collections.abc import Hashable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from fedface.cli.child_processes import LOOPBACK, stopped_by_sigterm
from fedface.cli.console import one_line, say
from fedface.cli.device_status import admitted_hashes, existing_device, pause, read_working_state, resume
from fedface.device.config import check_state_folder, is_accessible_to_others
from fedface.device.state import DeviceState, device_state
from fedface.errors import ConfigError, FedfaceError
from fedface.privacy.budget import overspending
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.ledger import LedgerSnapshot
from fedface.privacy.ledger_records import RecordedRun
from fedface.reports import device_log_text
from fedface.reports.device_log import BudgetStatus, make_log, page_style, style_hash
from fedface.reports.device_log_text import moment
from fedface.reports.templates import html_template
from fedface.web.local_only_middleware import HEADERS, refusal

TEMPLATE = Path(__file__).with_name("device_web.html")
STYLE = Path(__file__).with_name("device_web.css")  # beside that of the log
ACTIONS = {"pause": pause, "resume": resume}
MOST = 30  # records on the page, the newest; `fedface device log` has all
AGAIN_SECONDS, READING_SECONDS = 60, 3  # after which the browser asks again; while run plans are being read
TIMEOUT = 10.0  # seconds for a request to arrive
HTML = "text/html; charset=utf-8"


class AdmittedRuns:
    """The run plans that the owner has admitted, in words."""

    def __init__(self, device: Path) -> None:
        self._device, self._lock = device, Lock()
        self._key: Hashable = None
        self._runs: list[dict[str, Any]] | str | None = None

    def read(self, key: Hashable) -> list[dict[str, Any]] | str | None:
        """The runs, as `fedface device plans --json` has them, or a sentence; None while they are being read.

        Args:
            key: All that they depend on; they are read again when it changes.
        """
        with self._lock:
            if key != self._key:
                self._key, self._runs = key, None
                Thread(target=self._load, args=(key,), daemon=True).start()
            return self._runs

    def _load(self, key: Hashable) -> None:
        command = [sys.executable, "-m", "fedface.cli", "device", "plans", str(self._device), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        found = json.loads(done.stdout) if done.returncode == 0 else one_line(done.stderr)
        with self._lock:
            if key == self._key:
                self._runs = found


def device_web(device: Path, port: int, *, open_browser: bool) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The device file or its state folder is missing or wrong, or the port cannot be used.
    """
    existing_device(device)
    server = listening(device, port)
    address = f"http://{LOOPBACK}:{server.server_port}{server.path}"
    say(f"open {address}")
    say("only this computer can reach it, and only with this address; Ctrl-C ends the page, not the device")
    if open_browser:
        webbrowser.open(address)
    try:
        with server, stopped_by_sigterm():
            server.serve_forever()
    except KeyboardInterrupt:
        say("stopped; the device itself goes on")


class PageServer(ThreadingHTTPServer):
    daemon_threads = True
    path: str  # of the page, with its secret


def listening(device: Path, port: int) -> PageServer:
    """The server of a device's page. Raises ConfigError if the port cannot be used."""
    runs, path = AdmittedRuns(device), f"/{secrets.token_urlsafe(16)}/"

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT

        def do_GET(self) -> None:
            if self._is_for(path):
                try:
                    self._send(200, page(device_state(device), device, runs))
                except (FedfaceError, OSError) as error:
                    self._send(500, error_page(error))

        def do_POST(self) -> None:
            action = ACTIONS.get(self.path.rpartition("/")[2])
            if action is not None and self._is_for(f"{path}{self.path.rpartition('/')[2]}"):
                try:
                    state = device_state(device)
                    check_state_folder(device, state.config.state)
                    action(state)
                except (FedfaceError, OSError) as error:
                    self._send(500, error_page(error))
                else:
                    self._send(303, "", location=path)
            elif action is None:
                self._send(404, "not found")

        def _is_for(self, expected: str) -> bool:
            """Whether the request is for this path and from this page; otherwise it is answered."""
            if not secrets.compare_digest(self.path.encode(), expected.encode()):
                self._send(404, "not found")
                return False
            if (reason := refusal(self.command, self.headers.items(), server.server_port)) is not None:
                self._send(403, reason)
                return False
            return True

        def _send(self, status: int, body: str, *, location: str | None = None) -> None:
            content = body.encode()
            # With "no-referrer" a browser would not say which page a pressed button is on.
            headers = {
                **{name.decode(): text.decode() for name, text in HEADERS},
                "referrer-policy": "same-origin",
            }
            headers |= {"content-type": HTML, "content-length": str(len(content))}
            headers |= {} if location is None else {"location": location}
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Silent: the path is a secret."""

    try:
        server = PageServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used ({error.strerror}); choose another one, or --port 0 for any free port"
        ) from error
    server.path = path
    return server


def page(state: DeviceState, device: Path, runs: AdmittedRuns) -> str:
    """The page of a device now; a ledger that cannot be read is a sentence on it.

    Raises:
        ConfigError: There is no state folder.
    """
    config, now = state.config, utc_now()
    check_state_folder(device, config.state)
    problem, log, plans = None, None, None
    try:
        snapshot = state.ledger.read()
        log = make_log(config.name, config.policy, snapshot, receiver=config.server, now=now)
    except FedfaceError as error:
        problem, snapshot = str(error), LedgerSnapshot()
    if config.operator is not None:
        begun = sum(isinstance(record, RecordedRun) for record in snapshot.records)
        plans = runs.read((admitted_hashes(state), config, begun))
    style = page_style() + STYLE.read_text(encoding="utf-8")
    reading = config.operator is not None and plans is None
    return html_template(TEMPLATE.read_text(encoding="utf-8")).render(
        style=style,
        style_hash=style_hash(style),
        again=READING_SECONDS if reading else AGAIN_SECONDS,
        created=moment(now.isoformat()),
        device=device,
        state=read_working_state(state),
        accessible=is_accessible_to_others(config.state),
        problem=problem,
        log=log,
        most=MOST,
        budgets=[] if log is None else [_budget(each, config.policy.allow_no_dp) for each in log.budgets],
        kinds=[] if log is None else device_log_text.kinds(log.transmissions),
        not_covered=[] if log is None else device_log_text.not_covered(log.without_noise),
        planned=config.operator is not None,
        plans=plans,
    )


def error_page(error: Exception) -> str:
    """The page of a device that cannot be read."""
    style = page_style()
    return html_template(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fedface</title><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><style>{{ style | safe }}</style><main><h1>This device '
        'cannot be read</h1><p class="summary">{{ error }}</p></main>'
    ).render(style=style, error=str(error))


def _budget(status: BudgetStatus, no_dp_allowed: bool) -> dict[str, Any]:
    over = overspending(status.spent.upper, status.budget, no_dp_allowed=no_dp_allowed)
    return {
        "status": status,
        "used": min(100.0, 100 * status.spent.upper / status.budget.epsilon),  # percent
        "over": None if over is None else f"{over[0].upper()}{over[1:]}.",
    }
