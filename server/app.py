"""The Flower ServerApp: reads which experiment is asked for and lets the installed fedface coordinate it.

Called by Flower, in a simulation or on a SuperLink (see server/README.md). A run that was cut short goes on
where it stopped when it is started again with the same experiment and folder.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedface.coordinator.model_ranking import load_candidates, run_ranking
from fedface.coordinator.rounds import ProgressListener
from fedface.coordinator.run import initialize_run, run_experiment
from fedface.coordinator.run_folder import locked
from fedface.experiment import RemoteDevices
from fedface.simulation.devices import prepare
from fedface.transport.run_config import RunConfig, devices_folder, read_run_config
from fedface.transport.server import GridCohort

HOME = Path(__file__).resolve().parents[1]

app = ServerApp()


class LineWatcher:
    """Prints a line for each stage: Flower shows them with `flwr run --stream` and keeps them in its log."""

    def stage(self, name: str, steps: int) -> None:
        """A stage begins."""
        self.message(name)

    def advance(self, done: int) -> None:
        """Nothing: a log has no progress bar."""

    def message(self, sentence: str) -> None:
        """One line."""
        print(sentence, flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config to its report."""
    order = read_run_config(context.run_config, HOME)
    real = isinstance(order.experiment.devices, RemoteDevices)
    cohort = GridCohort(grid, come_within=600 if real else 60)
    watcher: ProgressListener = LineWatcher()
    command = f"flwr run . --run-config \"experiment='{context.run_config['experiment']}'\""
    if order.candidates:
        _tournament(
            order, cohort, watcher, f"{command} --run-config \"candidates='{';'.join(order.candidates)}'\""
        )
        return
    with locked(order.folder):
        if not (order.folder / "state.json").exists():
            initialize_run(order.experiment, order.folder)
        prepare(order.experiment, devices_folder(order.folder))
        run_experiment(order.experiment, cohort, order.folder, watcher=watcher, command=command)
    watcher.message(f"the report is in {order.folder / 'report.html'}")


def _tournament(order: RunConfig, cohort: GridCohort, watcher: ProgressListener, command: str) -> None:
    models = load_candidates(order.candidates, order.experiment)
    with locked(order.folder):
        prepare(order.experiment, devices_folder(order.folder))
        run_ranking(order.experiment, models, cohort, order.folder, watcher=watcher, command=command)
    watcher.message(f"the picture is {order.folder / 'tournament.png'}")
