"""The Flower ServerApp: runs the experiment of the run config with the installed fedface.

It runs in a simulation or on a SuperLink (see server/README.md). An interrupted run continues when it is started again
with the same experiment and folder.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedface.atomic_io import locked_folder
from fedface.coordinator.model_ranking import load_candidates, run_ranking
from fedface.coordinator.run import initialize_run, run_experiment
from fedface.experiment import RemoteDevices, devices_folder
from fedface.simulation.devices import prepare
from fedface.transport.run_config import read_run_config
from fedface.transport.server import GridCohort

HOME = Path(__file__).resolve().parents[1]

app = ServerApp()


class PrintedProgress:
    """A ProgressListener that prints a line for each stage; `flwr run --stream` shows them, and Flower logs them."""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins."""
        self.message(name)

    def advance(self, done: int) -> None:
        """Not printed: a log has no progress bar."""

    def message(self, sentence: str) -> None:
        """One line."""
        print(sentence, flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config to its report, or rank the candidates that it names."""
    config = read_run_config(context.run_config, HOME)
    experiment, folder = config.experiment, config.folder
    cohort = GridCohort(grid, come_within=600 if isinstance(experiment.devices, RemoteDevices) else 60)
    progress = PrintedProgress()
    command = f"flwr run . --run-config \"experiment='{context.run_config['experiment']}'\""
    models = load_candidates(config.candidates, experiment) if config.candidates else {}
    with locked_folder(folder, "ranking" if models else "run"):
        prepare(experiment, devices_folder(folder))
        if models:
            command += f" --run-config \"candidates='{';'.join(config.candidates)}'\""
            run_ranking(experiment, models, cohort, folder, progress=progress, command=command)
            progress.message(f"the chart is {folder / 'ranking.png'}")
            return
        if not (folder / "state.json").exists():
            initialize_run(experiment, folder)
        run_experiment(experiment, cohort, folder, progress=progress, command=command)
        progress.message(f"the report is {folder / 'report.html'}")
