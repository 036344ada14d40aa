"""`fedface server status` and `report`, with a `flwr` that has no SuperLink."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import caller
from server_folder import server_folder
from tiny import tiny_experiment

from fedface.atomic_io import locked_folder
from fedface.cli.server_flower import environment
from fedface.coordinator.run import initialize_run
from fedface.coordinator.run_state import RunState, weights_path
from fedface.measurements import NotMeasured
from fedface.reports.run_record import RefusalRecord, RoundRecord
from fedface.transport.run_progress import ReportedProgress

ROUND = RoundRecord(
    round=1, participants=("cellar",), epsilon=NotMeasured(not_measured="none"), bytes_up=1, bytes_down=1,
    bytes_reveal=0, seconds=1.0, seconds_protect=0.0, seconds_combine=0.0, seconds_reveal=0.0,
    weights_hash="0" * 64, metrics={},
    refusals=(RefusalRecord(device="attic", reason="this run needs epsilon 8; 1.5 of 8 are left"),),
    dropped=(RefusalRecord(device="device 2", reason=f"no answer within 60 s (node {2**63})"),),
)  # fmt: skip


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server` in this process."""
    return caller(monkeypatch, capsys, "server")


@pytest.fixture
def server(
    fedface: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Path]:
    """A server whose run tiny waits for one of three devices in its second round, and devices hall and attic."""
    with server_folder(fedface, monkeypatch, tmp_path) as folder:
        for name, key in (("hall", "a.pub"), ("attic", "b.pub")):
            assert fedface("register", "server", name, key).code == 0
        run = folder / "runs" / "tiny"
        with locked_folder(run, "run"):
            initialize_run(tiny_experiment(tmp_path), run)
        RunState.read(run).with_round(ROUND)
        progress = ReportedProgress(run)
        progress.stage("round 2 of 6: devices train", 3)
        progress.advance(2)
        assert capsys.readouterr().out.endswith("fedface: round 2 of 6: devices train\n")
        (folder / "started").mkdir()
        record = {"version": 1, "name": "tiny", "flower": "7", "folder": str(run), "started": "2026-11-30"}
        (folder / "started/tiny.json").write_text(json.dumps(record))
        change(folder, lambda state: state["nodes"][0].update({"status": "online", "online-at": "noon"}))
        run_is(folder, "running")
        yield folder


def change(server: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what Flower knows."""
    file = server / "flwr/fake.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))


def run_is(server: Path, status: str, details: str = "N/A") -> None:
    """Flower's state of the run."""
    change(
        server,
        lambda state: state.update(runs=[{"run-id": "7", "status": status, "status-details": details}]),
    )


def test_the_status_names_devices_stage_and_refusals(fedface: Callable, server: Path) -> None:
    """In their words; nothing is computed from them."""
    printed = fedface("status", "server").out
    assert "server: running; devices connect to localhost:8443" in printed
    assert "364 days\n  certificates/ca.key is on this machine: move it away" in printed
    (server / "certificates/ca.key").rename(server.parent / "ca.key")
    assert "ca.key" not in fedface("status", "server").out
    assert "2 registered, 1 online\n  not online: attic (never connected)" in printed
    assert "run tiny: going on\n  round 2 of 6: devices train, 2 of 3 done, since 20" in printed
    assert "round 1 finished with cellar" in printed
    assert "refused: attic: this run needs epsilon 8; 1.5 of 8 are left" in printed
    assert f"no usable answer: hall: no answer within 60 s (node {2**63})" in printed

    status = json.loads(fedface("status", "server", "--json").out)
    assert status["devices"] == {"attic": "never connected", "hall": "online"}
    run = status["run"]
    assert (run["state"], run["round"], run["progress"]["done"]) == ("going on", 1, 2)
    assert list(run["dropped"]) == ["hall"]


def test_a_failed_run_gives_its_reason(fedface: Callable, server: Path) -> None:
    """In one line, and no stage that has ended."""
    run_is(server, "finished:failed", "ServerApp failed with exception: round 2:\n1 of 3")
    printed = fedface("status", "server").out
    assert "run tiny: failed: round 2: 1 of 3\n" in printed and "devices train" not in printed
    run_is(server, "finished:stopped")
    assert "run tiny: stopped\n" in fedface("status", "server").out


def test_a_server_that_does_not_run_has_a_status(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its files, with exit code 0; who is online is unknown."""
    monkeypatch.setattr("fedface.cli.server_flower.listens", lambda port: False)
    done = fedface("status", "server")
    assert done.code == 0
    assert "server: not running" in done.out and "2 registered\n" in done.out and "online" not in done.out
    assert "run tiny: unknown\n  round 2 of 6" in done.out
    assert json.loads(fedface("status", "server", "--json").out)["devices"] == {"attic": None, "hall": None}
    assert "is not the folder of a server" in fedface("status", ".").sentence


def test_a_damaged_state_is_one_sentence(fedface: Callable, server: Path) -> None:
    (server / "runs/tiny/state.json").write_text("{")
    assert "the state of this run is damaged" in fedface("status", "server").sentence


def test_a_new_server_has_a_status(fedface: Callable, server: Path) -> None:
    """Without devices and runs."""
    (server / "started/tiny.json").unlink()
    change(server, lambda state: state["nodes"].clear())
    for file in (server / "devices").glob("*.json"):
        file.unlink()
    printed = fedface("status", "server").out
    assert "0 registered, 0 online\nruns: none was started" in printed
    assert "no run was started here" in fedface("report", "server").sentence


def test_a_run_that_is_going_on_has_a_report_of_its_rounds_so_far(
    fedface: Callable, server: Path, tmp_path: Path
) -> None:
    """Of the latest run, or the named one. A round whose model is not stored yet is left out; a ranking has a chart."""
    run = server / "runs/tiny"
    (run / "experiment.yaml").write_text((tmp_path / "tiny.yaml").read_text())
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with locked_folder(run, "run"):  # by the process that runs it
        assert f"so far, open {run / 'report-so-far.html'}" in fedface("report", "server").out
    page = (run / "report-so-far.html").read_text()
    assert "So far: 0 of 2 rounds, without audits. This run is not finished" in page
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name in before} == before
    assert not (run / "report.html").exists() and not (run / "model-card.md").exists()
    shutil.copy(weights_path(run, 0), weights_path(run, 1))
    assert fedface("report", "server").code == 0
    page = (run / "report-so-far.html").read_text()
    assert (
        "So far: 1 of 2 rounds" in page and "<th>cellar</th>" in page and "attic refused in round 1" in page
    )
    assert "no run other was started here" in fedface("report", "server", "other").sentence
    (run / "metrics.json").write_text('{"records": {"base": {}}, "order": ["base", "other", "third"]}')
    assert "so far 1 of 3 models are evaluated" in fedface("report", "server", "tiny").out
    (run / "ranking.png").touch()
    assert "ranking.png" in fedface("report", "server", "tiny").out


def test_flowers_programs_find_each_other_without_an_activated_environment(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flower-superexec` starts `flwr-serverapp` by its name; both are beside this Python."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("flwr-serverapp", path=environment(server)["PATH"]) is not None
