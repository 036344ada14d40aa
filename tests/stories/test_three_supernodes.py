"""Three devices with SuperNodes of their own, and masked sums: the same model as with plain sums in one process.

SuperLink and SuperNodes are Flower's own, with TLS and registered keys; only nginx is missing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hostile_bundle import project
from superlink import FLWR, superlink
from test_deployment import save_photos
from tiny import SilentProgress, tiny_gan

from fedface.cli.child_processes import started
from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run import initialize_run
from fedface.coordinator.run_state import RunState, weights_path
from fedface.device.client import handle_task
from fedface.device.device import Device, load_device
from fedface.experiment import read_experiment
from fedface.messages.messages import Failure, Reply, Task
from fedface.models.checkpoint import flatten_parameters, load_model, save_model
from fedface.tensor_types import Vector
from fedface.training.gan import GanRound

DEVICE = """
name: NAME
photos: photos
state: state
server: localhost:PORT
answer_seconds: 0
policy: {max_epsilon: 8, delta: 1e-6, min_cohort_size: 3, protocols: [masked, plain], allow_no_dp: true}
"""
EXPERIMENT = """
question: do three machines end with the same model?
name: three
privacy: {kind: no-privacy}
devices: {kind: remote-devices, at_least: 3}
min_responses: 3
probe: {kind: synthetic-probe, per_group: 8}
training: {kind: gan-training, rounds: 1, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: 4,
  fake_batch_size: 4, r2_weight: 0}
upsampling: {method: {kind: pulse, steps: 2}}
attack: {photos: 2, iterations: 1, candidates: 2, trials: 2}
aggregation: {kind: masked, min_devices: 3}
base: base.safetensors
"""
APP = """
from flwr.clientapp import ClientApp
from fedface import server_app
app = server_app.app
client = ClientApp()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The experiment, and its base."""
    save_model(tmp_path / "base.safetensors", tiny_gan())
    path = tmp_path / "three.yaml"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Of three devices whose keys are registered at a SuperLink that runs."""
    with superlink(tmp_path, ["one", "two", "three"], DEVICE, monkeypatch) as files:
        for file in files:
            file.with_name("photos").rmdir()
            save_photos(file.with_name("photos"), 8, 0.5, file.parent.name)
        yield [file.parent for file in files]


class Local:
    """The same devices in this process, with ledgers of their own."""

    def __init__(self, devices: list[Device]) -> None:
        self.devices = devices

    def members(self, expected: int) -> list[int]:
        """All."""
        return list(range(len(self.devices)))

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        """One after the other."""
        for member, task in tasks.items():
            yield member, handle_task(task, self.devices[member])


def trained_here(recipe: Path, folders: list[Path]) -> Vector:
    """The model after a round of plain sums."""
    experiment = read_experiment(recipe, changes={"aggregation": "{kind: plain}"})
    devices = []
    for folder in folders:
        copy = folder.with_name(f"{folder.name}-here")
        shutil.copytree(folder, copy, ignore=lambda *_: ["state"])
        (copy / "state").mkdir(mode=0o700)
        devices.append(load_device(copy / "device.yaml"))
    run = recipe.parent / "here" / experiment.name
    initialize_run(experiment, run)
    run_rounds(experiment, experiment.plan(), Local(devices), RunState.read(run), None, SilentProgress())
    return flatten_parameters(*load_model(weights_path(run, 1)).modules())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_supernodes_with_masked_sums_end_with_the_model_of_plain_sums(
    folders: list[Path], recipe: Path, tmp_path: Path
) -> None:
    """Up to half a grid step of each device; all three take part, and each ledger has what left."""
    app = tmp_path / "app"
    app.mkdir()
    described = project("app.py", server="app:app", client="app:client")
    (app / "pyproject.toml").write_text(f'{described}[tool.flwr.app.config]\nexperiment = ""\nfolder = ""\n')
    (app / "app.py").write_text(APP)
    (app / "LICENSE").touch()
    weights = weights_path(tmp_path / "runs" / "three", 1)
    with ExitStack() as running:
        for folder in folders:
            command = ["python", "-m", "fedface.cli", "device", "start", str(folder / "device.yaml")]
            child = running.enter_context(started(command, folder / "device.log"))
            child.wait_until(lambda child=child: "is connected to" in child.output(), seconds=120)  # type: ignore[misc]
        config = f"experiment='{recipe}' folder='{tmp_path / 'runs'}'"
        subprocess.run([FLWR, "run", app, "here", "--run-config", config], check=True, timeout=120)
        child.wait_until(weights.exists, seconds=240)
    found = flatten_parameters(*load_model(weights).modules())
    expected = trained_here(recipe, folders)
    experiment = read_experiment(recipe)
    ranges = GanRound(tiny_gan(), experiment.training, experiment.plan().dp_parameters).ranges()  # type: ignore[arg-type]
    rounding = torch.finfo(torch.float32).eps * expected.abs()
    assert bool(((found - expected).abs() <= 0.5001 * ranges / (2**15 - 1) + rounding).all())
    assert not torch.equal(expected, flatten_parameters(*tiny_gan().modules()))
    for folder in folders:
        sent = load_device(folder / "device.yaml").ledger().read().transmissions
        assert [line.kind for line in sent] == ["exchange", "exchange", "update", "exchange", "exchange"]
