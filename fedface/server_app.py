"""The Flower ServerApp: runs the experiment of a run config with the installed fedface.

It runs in a simulation or on a SuperLink (docs/fifty-devices.md). An interrupted run continues when it is started again
with the same experiment and folder.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedface.atomic_io import locked_folder
from fedface.coordinator.model_ranking import load_candidates, run_ranking
from fedface.coordinator.run import initialize_run, run_experiment
from fedface.experiment import Experiment, RemoteDevices, devices_folder
from fedface.simulation.devices import prepare
from fedface.transport.run_config import read_run_config
from fedface.transport.run_progress import ReportedProgress
from fedface.transport.server import GridCohort


def server_app(home: Path) -> ServerApp:
    """The app that runs the experiment of the run config to its report, or ranks the candidates that it names.

    Args:
        home: Relative paths of experiments are relative to this folder.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = read_run_config(context.run_config, home)
        experiment, folder = config.experiment, config.folder
        models = load_candidates(config.candidates, experiment) if config.candidates else {}
        with locked_folder(folder, "ranking" if models else "run"):
            progress = ReportedProgress(folder)
            cohort = _cohort(grid, experiment, progress)
            prepare(experiment, devices_folder(folder))
            if models:
                run_ranking(experiment, models, cohort, folder, progress=progress, command=config.command)
                progress.message(f"the chart is {folder / 'ranking.png'}")
                return
            if not (folder / "state.json").exists():
                initialize_run(experiment, folder)
            run_experiment(experiment, cohort, folder, progress=progress, command=config.command)
            progress.message(f"the report is {folder / 'report.html'}")

    return app


def _cohort(grid: Grid, experiment: Experiment, progress: ReportedProgress) -> GridCohort:
    devices = experiment.devices
    if not isinstance(devices, RemoteDevices):
        return GridCohort(grid, come_within=60.0)
    seconds = 60 * devices.wait_minutes, 60 * devices.answer_minutes
    return GridCohort(grid, come_within=seconds[0], answer_within=seconds[1], report=progress.message)


app = server_app(Path("/"))  # for `fedface server run`, which names absolute paths
