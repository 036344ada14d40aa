"""`fedface server run` and `stop`, with a `flwr` that has no SuperLink: what is checked, sent to Flower and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import caller
from server_folder import server_folder
from tiny import tiny_file

from fedface.cli import server_run
from fedface.coordinator.run import initialize_run
from fedface.experiment import read_experiment
from fedface.transport.run_config import read_run_config

REMOTE = "devices: {kind: remote-devices, at_least: 2}\n"


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Call `fedface server` in this process."""
    return caller(monkeypatch, capsys, "server")


@pytest.fixture
def server(fedface: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A server, and beside it tiny.yaml for remote devices, whose base is relative to it."""
    file = tiny_file(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    text = "".join(REMOTE if line.startswith("devices:") else line for line in lines)
    file.write_text(text.replace(str(tmp_path / "base"), "base"))
    with server_folder(fedface, monkeypatch, tmp_path) as folder:
        yield folder


def runs(server: Path) -> list[dict[str, Any]]:
    """Flower's runs, the latest first."""
    file = server / "flwr/fake.json"
    return json.loads(file.read_text())["runs"] if file.exists() else []


def end_with(server: Path, status: str, details: str = "N/A") -> None:
    """How the next run ends."""
    (server / "flwr/ending.json").write_text(json.dumps({"status": status, "status-details": details}))


def test_a_run_gets_the_experiment_that_was_checked(fedface: Callable, server: Path) -> None:
    """With changes and the base's path: its copy is the same experiment; the rounds are shown."""
    done = fedface("run", "server", "tiny.yaml", "--set", "training.rounds=1", "--set", "seed=7")
    assert done.code == 0, done.err
    assert "\nround 1 of 2\nround 2 of 2\n" in done.out and "Traceback" not in done.out
    (run,) = runs(server)
    config = run["app"]["config"]
    assert run["app"]["components"]["serverapp"] == "fedface.server_app:app"
    assert config["command"] == "fedface server run server tiny.yaml --set training.rounds=1 --set seed=7"
    sent = read_run_config(config, Path("/"))
    assert sent.folder == server / "runs/tiny"
    here = read_experiment(Path("tiny.yaml").absolute(), changes={"training.rounds": "1", "seed": "7"})
    assert (
        "refuse it until their owners" in done.err
        and len(list((server / "public/plans").glob("*.plan"))) == 1
    )
    assert sent.experiment == here and sent.experiment.digest() == here.digest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: tiny", "nam: tiny"), 'tiny.yaml:3: nam: unknown key; did you mean "name"?'),
        (
            (REMOTE, "devices: {kind: synthetic-devices, light_fractions: [0.9, 0.1]}\n"),
            "expected remote-devices",
        ),
        (("base: base", "base: lost"), "lost.safetensors"),
        (("per_group: 2", "per_group: 1"), "per_group"),
    ],
)
def test_a_wrong_experiment_starts_nothing(
    fedface: Callable, server: Path, change: tuple[str, str], words: str
) -> None:
    """Its error is one sentence, before Flower is asked."""
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace(*change))
    assert words in fedface("run", "server", "tiny.yaml").sentence
    assert runs(server) == [] and not (server / "experiments").exists()


def test_a_run_needs_the_running_server(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedface.cli.server_flower.listens", lambda port: False)
    assert "start it with `fedface server up server`" in fedface("run", "server", "tiny.yaml").sentence
    assert "start it with `fedface server up server`" in fedface("stop", "server").sentence


def test_the_exit_code_says_how_a_run_ended(fedface: Callable, server: Path) -> None:
    """A failure with Flower's reason in one line; the same command starts it again in the same folder."""
    end_with(
        server,
        "finished:failed",
        f"ServerApp failed with exception: round 1: too few devices\n (device 1: gone (node {2**63}))",
    )
    assert fedface("register", "server", "hall", "a.pub").code == 0
    failed = fedface("run", "server", "tiny.yaml")
    assert failed.code == 2
    assert (
        "run tiny failed: round 1: too few devices (device 1: gone (hall)). Finished rounds are stored"
        in failed.err
    )
    end_with(server, "finished:stopped")
    assert fedface("run", "server", "tiny.yaml").code == 1
    end_with(server, "finished:completed")
    done = fedface("run", "server", "tiny.yaml")
    assert (done.code, done.err) == (0, "")  # the run plan is known by now
    assert {run["app"]["config"]["folder"] for run in runs(server)} == {str(server / "runs")}
    assert len(runs(server)) == 3


def test_leaving_the_display_leaves_the_run(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command shows it again instead of starting a second one; `stop` ends it, by name or as the only one."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(server_run, "_follow", interrupted)
        left = fedface("run", "server", "tiny.yaml")
        assert left.code == 3 and "run tiny goes on" in left.out and "--resume" not in left.err
    shown = fedface("run", "server", "tiny.yaml")
    assert shown.code == 0 and "run tiny is going on" in shown.out and len(runs(server)) == 1

    with monkeypatch.context() as patched:
        patched.setattr(server_run, "_follow", interrupted)
        assert fedface("run", "server", "tiny.yaml").code == 3
    assert "no run other is going on; there is tiny" in fedface("stop", "server", "other").sentence
    assert "run tiny is stopped" in fedface("stop", "server").out
    assert runs(server)[0]["status"] == "finished:stopped"
    assert "no run tiny is going on" in fedface("stop", "server", "tiny").sentence
    assert "no run is going on" in fedface("stop", "server").sentence


def test_a_run_whose_serverapp_was_killed_is_started_again(
    fedface: Callable, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of the server Flower finds that out only after a minute."""
    monkeypatch.setattr(server_run, "_follow", lambda folder, number: server_run.flower_run(folder, number))
    monkeypatch.setattr(server_run, "_ended", lambda folder, name, row: 0)
    assert fedface("run", "server", "tiny.yaml").code == 0
    monkeypatch.setattr(
        server_run,
        "_follow",
        lambda *_: {"status": "finished:failed", "status-details": "No heartbeat received"},
    )
    assert fedface("run", "server", "tiny.yaml").code == 0
    assert len(runs(server)) == 2


def test_another_experiment_does_not_continue_a_run(fedface: Callable, server: Path) -> None:
    """Nor does it replace the stored experiment, which a restart needs."""
    assert fedface("run", "server", "tiny.yaml").code == 0
    stored = (server / "experiments/tiny.yaml").read_bytes()
    run = server / "runs/tiny"
    initialize_run(read_experiment(Path("tiny.yaml")), run)
    changed = fedface("run", "server", "tiny.yaml", "--set", "training.rounds=1")
    assert "started with another experiment" in changed.sentence
    elsewhere = fedface("run", "server", "tiny.yaml", "--runs", "other").sentence
    assert f"a run tiny was started in {server / 'runs'}" in elsewhere
    assert (server / "experiments/tiny.yaml").read_bytes() == stored and len(runs(server)) == 1

    (run / "run.json").write_text("{}")  # finished
    assert fedface("run", "server", "tiny.yaml").code == 0
    assert (server / "started/tiny-2.json").exists()


def test_a_ranking_gets_its_candidates(fedface: Callable, server: Path) -> None:
    """As absolute paths; one that cannot be read is named first."""
    assert "lost" in fedface("run", "server", "tiny.yaml", "--rank", "base", "--rank", "lost").sentence
    done = fedface("run", "server", "tiny.yaml", "--rank", "base", "--rank", "base.safetensors")
    assert done.code == 2 and "two candidates are called base" in done.err
    Path("better.safetensors").hardlink_to("base.safetensors")
    done = fedface("run", "server", "tiny.yaml", "--rank", "base", "--rank", "better.safetensors")
    assert done.code == 0, done.err
    (plan,) = (server / "public/plans").glob("*.plan")  # of the ranking: owners admit it like any other
    assert plan.stem in done.err and '"training":null' in plan.read_text()
    sent = read_run_config(runs(server)[0]["app"]["config"], Path("/"))
    assert sent.candidates == ("base", str(server.parent / "better.safetensors"))
    assert sent.folder == server / "runs/tiny-ranking"
