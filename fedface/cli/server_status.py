"""The commands `fedface server status` and `report`: what is known of a server, its devices and its latest run.

Numbers are Flower's, the run's own records, or words of the devices' refusals; what no device said is not estimated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedface.cli.console import print_json, say
from fedface.cli.server_certificates import read_certificate
from fedface.cli.server_devices import device_rows, read_devices
from fedface.cli.server_flower import is_running, read_ports
from fedface.cli.server_run import StartedRun, failure_of, finished, flower_run, started_runs
from fedface.codec import CodecError, load, read_json
from fedface.errors import RunError
from fedface.transport.run_progress import FILE, RunProgress


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The latest run that was started from the server's folder."""

    name: str
    folder: str
    state: str  # "going on", "finished", "stopped", "failed", or "unknown" while the server does not run
    reason: str  # of a failure; otherwise empty
    progress: RunProgress | None  # None before the first stage
    round: int  # the last finished one; 0: none
    participants: tuple[str, ...]  # of that round
    refusals: dict[str, str]  # by device, in its words, of that round
    dropped: dict[str, str]  # without a usable answer, by device, of that round


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    running: bool
    address: str  # HOST:PORT for devices
    certificate_until: str  # ISO 8601, UTC
    certificate_days: int  # until then; below 0: expired
    authority_key_here: bool  # whether ca.key is still in the folder, which a container mounts
    devices: dict[str, str | None]  # name -> state; None while the server does not run
    run: RunStatus | None  # None: none was started


def server_status(folder: Path, *, as_json: bool) -> None:
    """Print the status of a server, which need not run. Raises ConfigError if the folder is not a server's."""
    status = read_status(folder)
    if as_json:
        print_json(status)
        return
    for line in _lines(status):
        say(line)


def read_status(folder: Path) -> ServerStatus:
    """As `server_status`."""
    ports, running = read_ports(folder), is_running(folder)
    until = read_certificate(folder / "certificates/server.crt").not_valid_after_utc
    known: dict[str, str | None] = {device.name: None for device in read_devices(folder)}
    if running:
        known = {row["name"] or f"node {row['node']}": row["state"] for row in device_rows(folder)}
    started = started_runs(folder)
    return ServerStatus(
        running=running,
        address=ports.address,
        certificate_until=until.isoformat(timespec="seconds"),
        certificate_days=(until - datetime.now(UTC)).days,
        authority_key_here=(folder / "certificates/ca.key").exists(),
        devices=known,
        run=_run_status(folder, started[-1], running=running) if started else None,
    )


def server_report(folder: Path, name: str | None) -> None:
    """Write the report of a run again, or of its rounds so far, and print its path.

    Raises:
        RunError: No such run was started, or it has no round yet.
    """
    from fedface.cli.run import report

    read_ports(folder)
    runs = [run for run in started_runs(folder) if name in (None, run.name)]
    if not runs:
        raise RunError(
            f"{folder}: {'no run' if name is None else f'no run {name}'} was started here with `fedface server run`"
        )
    place = Path(runs[-1].folder)
    if (place / "ranking.png").exists():
        say(f"open {place / 'ranking.png'}")
    elif (ranking := place / "metrics.json").exists():
        stored = read_json(ranking.read_text(encoding="utf-8"))
        say(
            f"so far {len(stored['records'])} of {len(stored['order'])} models are evaluated; the ranking is "
            "written when all are"
        )
    else:
        report(place)


def _run_status(folder: Path, run: StartedRun, *, running: bool) -> RunStatus:
    place = Path(run.folder)
    row = flower_run(folder, run.flower) if running else {"status": "unknown", "status-details": ""}
    words = {"finished:completed": "finished", "finished:stopped": "stopped", "unknown": "unknown"}
    state = words.get(str(row["status"]), "failed" if finished(row) else "going on")
    last = _last_round(place)
    return RunStatus(
        name=run.name,
        folder=run.folder,
        state=state,
        reason=failure_of(row) if state == "failed" else "",
        progress=load(RunProgress, place / FILE) if (place / FILE).exists() else None,
        round=last.get("round", 0),
        participants=tuple(last.get("participants", ())),
        refusals={each["device"]: each["reason"] for each in last.get("refusals", ())},
        dropped={_named(folder, each): each["reason"] for each in last.get("dropped", ())},
    )


def _named(folder: Path, missing: dict[str, str]) -> str:
    """The operator's name of a device that did not answer, by the node in the reason; otherwise its number."""
    node = re.search(r"\(node (\d+)\)$", missing["reason"])
    names = {device.node: device.name for device in read_devices(folder)}
    return names.get(node[1], missing["device"]) if node else missing["device"]


def _last_round(run: Path) -> dict[str, Any]:
    """The record of the last finished round as plain data, which needs no torch; empty: there is none."""
    file = run / "state.json"
    try:
        rounds = read_json(file.read_text(encoding="utf-8"))["rounds"] if file.exists() else []
    except CodecError as error:
        raise RunError(f"{file}: {error}; the state of this run is damaged") from error
    return dict(rounds[-1]) if rounds else {}


def _lines(status: ServerStatus) -> Iterator[str]:
    if status.running:
        yield f"server: running; devices connect to {status.address}"
    else:
        yield "server: not running; start it with `fedface server up`"
    left = status.certificate_days
    yield f"certificate: valid until {status.certificate_until[:10]}, {left} days" + (
        "; replace it with `fedface server renew`" if left < 30 else ""
    )
    if status.authority_key_here:
        yield "  certificates/ca.key is on this machine: move it away, whoever has it can impersonate the server"
    states = list(status.devices.values())
    others = [
        f"{name} ({state})"
        for name, state in status.devices.items()
        if state not in ("online", "revoked", None)
    ]
    yield f"devices: {len(states) - states.count('revoked')} registered" + (
        f", {states.count('online')} online" if status.running else ""
    )
    if others:
        yield f"  not online: {', '.join(others)}"
    if status.run is None:
        yield "runs: none was started"
        return
    run = status.run
    yield f"run {run.name}: {run.state}" + (f": {run.reason}" if run.reason else "")
    if run.progress is not None and run.state in ("going on", "unknown"):
        steps = f", {run.progress.done} of {run.progress.steps} done" if run.progress.steps > 1 else ""
        yield f"  {run.progress.stage}{steps}, since {run.progress.since}"
    if run.round:
        yield f"  round {run.round} finished with {', '.join(run.participants)}"
    for name, reason in run.refusals.items():
        yield f"  refused: {name}: {reason}"
    for name, reason in run.dropped.items():
        yield f"  no usable answer: {name}: {reason}"
    yield f"  folder: {run.folder}"
