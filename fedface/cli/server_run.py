"""The commands `fedface server run` and `stop`: a run on the connected devices, by Flower.

Flower wants an app bundle. The one written here names the ServerApp of the installed fedface and holds no code, so no
checkout is needed; devices use no bundle.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from fedface.atomic_io import replace_text
from fedface.cli.console import one_line, say, warn
from fedface.cli.options import RunRequest, shell_command
from fedface.cli.server_devices import with_names
from fedface.cli.server_flower import FLWR_HOME, check_running, flower, log_lines
from fedface.cli.server_invites import PLANS
from fedface.codec import dumps, load
from fedface.errors import FederationError, RunError

STARTED = "started"  # in the server's folder: a file for each run
STOPPED, LEFT = 1, 3  # exit codes
DEAD = "No heartbeat"  # Flower's details of a run whose ServerApp was killed
BUNDLE = """\
# The app that `fedface server run` gives to Flower: code and paths of this machine alone.
[project]
name = "fedface"
version = "VERSION"

[tool.flwr.app]
publisher = "fedface"

[tool.flwr.app.components]
serverapp = "fedface.server_app:app"
clientapp = "fedface.server_app:app"  # Flower demands one; devices answer with their own fedface

[tool.flwr.app.config]
"""


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """What the server's folder records of a run that was started or continued."""

    version: ClassVar[int] = 1

    name: str  # of the run and its folder
    flower: str  # Flower's id of its latest start
    folder: str
    started: str  # the latest start: ISO 8601, UTC


def server_run(folder: Path, request: RunRequest, runs: Path) -> int:
    """Start or continue a run, and show it until it ends.

    Args:
        folder: The server's.
        request: Which run.
        runs: The folder of runs.

    Returns:
        The exit code: 0, 1 if the operator stopped the run, 3 if the display was left.

    Raises:
        FedfaceError: The experiment is invalid or not for remote devices, the server does not run, or the run failed.
    """
    from fedface.transport.run_config import run_config

    recipe, plan = _checked_experiment(request)
    config = run_config(recipe, runs, request.candidates)
    check_running(folder)
    name = config.folder.name
    known = {run.name: run for run in started_runs(folder)}.get(name)
    if known is not None and known.folder != str(config.folder):
        raise RunError(
            f"a run {name} was started in {Path(known.folder).parent}, and devices remember its name; "
            f"give --runs {Path(known.folder).parent}, or change the name in {request.experiment}"
        )
    if not request.candidates and (config.folder / "state.json").exists():
        from fedface.coordinator.run import check_same

        check_same(recipe, config.folder)
    try:
        if known is not None and not finished(row := flower_run(folder, known.flower)):
            say(f"run {name} is going on; Ctrl-C leaves this display, not the run")
            row = _follow(folder, known.flower)
            if DEAD not in str(row["status-details"]):
                return _ended(folder, name, row)
        _publish(folder, plan)
        number = _start(folder, request, recipe, config.folder)
        say(f"run {name} has begun; Ctrl-C leaves this display, not the run")
        return _ended(folder, name, _follow(folder, number))
    except KeyboardInterrupt:
        say(f"run {name} goes on; the same command shows it again, `fedface server stop {folder}` stops it")
        return LEFT


def server_stop(folder: Path, name: str | None) -> None:
    """Stop a run, or the only one that is going on; its finished rounds stay, and it can be continued.

    Raises:
        FederationError: There is no such run, or there are several, or the server does not run.
    """
    names = {run.flower: run.name for run in started_runs(folder)}
    active = [row["run-id"] for row in flower(folder, "ls")["runs"] if not finished(row)]
    chosen = [number for number in active if name in (None, number, names.get(number))]
    listed = ", ".join(names.get(number, number) for number in active)
    if not chosen:
        what = "no run is going on" if name is None else f"no run {name} is going on"
        raise FederationError(f"{what}{f'; there is {listed}' if active else ''}")
    if len(chosen) > 1:
        raise FederationError(f"several runs are going on, name one: {listed}")
    flower(folder, "stop", chosen[0])
    say(
        f"run {names.get(chosen[0], chosen[0])} is stopped; its finished rounds are stored, and the same "
        "`fedface server run` continues it"
    )


def started_runs(folder: Path) -> list[StartedRun]:
    """The runs that were started from a server's folder, the latest last."""
    runs = [load(StartedRun, path) for path in (folder / STARTED).glob("*.json")]
    return sorted(runs, key=lambda run: run.started)


def flower_run(folder: Path, number: str) -> dict[str, Any]:
    """What Flower knows of one run; a run that it does not know has failed."""
    unknown = {"run-id": number, "status": "finished:failed", "status-details": "the server does not know it"}
    rows: list[dict[str, Any]] = flower(folder, "ls")["runs"]
    return next((row for row in rows if row["run-id"] == number), unknown)


def finished(row: dict[str, Any]) -> bool:
    return str(row["status"]).startswith("finished")


def failure_of(row: dict[str, Any]) -> str:
    """Why a run of Flower failed, in one line."""
    return one_line(str(row["status-details"])).removeprefix("ServerApp failed with exception: ")


def _checked_experiment(request: RunRequest) -> tuple[Any, Any]:
    """The experiment with absolute paths and its run plan, after checks of what would fail the run later.

    Raises:
        FedfaceError: The experiment cannot run.
    """
    from fedface.cli.server_plans import read_plan
    from fedface.experiment import LabelledProbe
    from fedface.public_data.labelled_sets import find_labelled_set

    recipe, plan = read_plan(request)
    # Flower runs it in another folder.
    recipe = replace(recipe, base=None if recipe.base is None else recipe.base.absolute())
    if isinstance(recipe.probe, LabelledProbe):
        find_labelled_set(recipe.probe.folder, recipe.probe.set)
        recipe = replace(recipe, probe=replace(recipe.probe, folder=recipe.probe.folder.absolute()))
    return recipe, plan


def _publish(folder: Path, plan: Any) -> None:
    """Publish the run's plan, and warn if it is new: devices that joined by invitation answer only admitted plans."""
    from fedface.cli.server_plans import publish_plan

    published = {path.stem for path in (folder / PLANS).glob("*.plan")}
    signed = publish_plan(folder, plan)
    if signed.hash not in published:
        warn(
            "no invitation named this run's plan; devices that joined by invitation refuse it until their owners run "
            f"`fedface device admit {signed.hash}`"
        )


def _start(folder: Path, request: RunRequest, recipe: Any, run: Path) -> str:
    """Write the experiment, complete, and the bundle; start it, and return Flower's id of the run."""
    from fedface.config import dump

    home = folder.resolve()
    experiment = home / "experiments" / f"{recipe.name}.yaml"
    bundle = home / FLWR_HOME / "bundle" / "pyproject.toml"
    for file in (experiment, bundle, home / STARTED / "name"):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_text(experiment, dump(recipe))
    config = {
        "experiment": str(experiment),
        "folder": str(run.parent),
        "photos": "",
        "changes": "",
        "candidates": ";".join(request.candidates),
        "command": shell_command(folder, request),
    }
    entries = "".join(f"{key} = {json.dumps(text, ensure_ascii=False)}\n" for key, text in config.items())
    replace_text(bundle, BUNDLE.replace("VERSION", version("fedface")) + entries)
    number = str(flower(folder, "run", str(bundle.parent))["run-id"])
    record = StartedRun(
        name=run.name,
        flower=number,
        folder=str(run),
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
    replace_text(home / STARTED / f"{run.name}.json", dumps(record))
    return number


def _follow(folder: Path, number: str) -> dict[str, Any]:
    """Print what a run reports until it ends; returns what Flower knows of it then."""
    from fedface.transport.run_progress import MARK

    shown = 0
    while True:
        with log_lines(folder, number) as lines:
            ours = (line for line in lines if line.startswith(MARK))
            for count, line in enumerate(ours, start=1):
                if count > shown:  # the log begins anew when it is asked for again
                    say(one_line(with_names(folder, line.removeprefix(MARK))))
                    shown = count
        if finished(row := flower_run(folder, number)):
            return row
        time.sleep(1)


def _ended(folder: Path, name: str, row: dict[str, Any]) -> int:
    """The exit code of an ended run. Raises FederationError if it failed."""
    match str(row["status"]):
        case "finished:completed":
            return 0
        case "finished:stopped":
            say(f"run {name} was stopped; the same command continues it")
            return STOPPED
        case _:
            reason = with_names(folder, failure_of(row)).rstrip(".")
            raise FederationError(
                f"run {name} failed: {reason}. Finished rounds are stored; the same command continues it"
            )
