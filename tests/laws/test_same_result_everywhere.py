"""The same experiment gives the same model in one process and in Ray's actors. Both use the same ClientApp and
coordinator; only the transport differs. Runs without DP use reproducible streams only, so the models must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import SilentProgress

from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run import initialize_run
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import ReferenceSet
from fedface.device.device import Device
from fedface.experiment import Experiment, devices_folder, read_experiment
from fedface.messages.cohort import Cohort
from fedface.models.checkpoint import flatten_parameters, load_model, save_model
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.model import GanArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.public_data.device_photos import device_faces
from fedface.randomness import Streams
from fedface.simulation.devices import prepare, simulated_device
from fedface.simulation.in_process import in_process_cohort
from fedface.tensor_types import Vector
from fedface.training.gan import GanRound
from fedface.transport.client import client_app
from fedface.transport.server import GridCohort

RECIPE = """
question: does it matter where it runs?
name: everywhere
privacy: {kind: no-privacy}
devices: {kind: synthetic-devices, light_fractions: [0.9, 0.5, 0.1], photos_per_device: 12}
training: {kind: gan-training, rounds: 2, steps_per_round: 2, sampling_rate: 0.5, expected_batch_size: 4,
  fake_batch_size: 4}
aggregation: {kind: AGGREGATION}
base: BASE
"""


def tiny(folder: Path, aggregation: str) -> Experiment:
    """Three devices, two rounds, networks of some thousand weights."""
    architecture = GanArchitecture(
        generator=StyleGAN2Config(
            size=16, latent_width=8, style_width=8, mapping_layers=1, channel_base=64, channel_max=8
        ),
        discriminator=DiscriminatorConfig(size=16, channel_base=64, channel_max=8),
    )
    save_model(folder / "base.safetensors", build_model(architecture, Streams(1).generator("pretrain")))
    recipe = RECIPE.replace("BASE", str(folder / "base.safetensors")).replace("AGGREGATION", aggregation)
    (folder / "everywhere.yaml").write_text(recipe)
    return read_experiment(folder / "everywhere.yaml")


def start(experiment: Experiment, folder: Path) -> None:
    """The run's folder and its simulated devices."""
    initialize_run(experiment, folder)
    prepare(experiment, devices_folder(folder))


def models(experiment: Experiment, cohort: Cohort, folder: Path) -> Sequence[Vector]:
    """The global model after each round."""
    faces = device_faces(experiment, 48, 16)
    assert faces is not None
    like = ReferenceSet(faces=faces, inputs=faces, downscale=experiment.upsampling.downscale)
    run_rounds(experiment, experiment.plan(), cohort, RunState.read(folder), like, SilentProgress())
    rounds = range(1, experiment.rounds + 1)
    return [flatten_parameters(*load_model(weights_path(folder, number)).modules()) for number in rounds]


def in_this_process(experiment: Experiment, folder: Path) -> Sequence[Vector]:
    """Without Ray, a port or a bundle."""
    start(experiment, folder)
    return models(experiment, in_process_cohort(experiment, devices_folder(folder)), folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Sequence[Vector]]:
    """The experiment with plain sums, and its models in this process."""
    home = tmp_path_factory.mktemp("plain")
    experiment = tiny(home, "plain")
    return experiment, in_this_process(experiment, home / "everywhere")


def in_ray(experiment: Experiment, folder: Path) -> Sequence[Vector]:
    """Through Flower's simulation with one actor."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    start(experiment, folder)
    found: list[Vector] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found.extend(models(experiment, GridCohort(grid), folder))

    def device_for(context: Context) -> Device:
        return simulated_device(experiment, int(context.node_config["partition-id"]), devices_folder(folder))

    run_simulation(
        server,
        client_app(device_for),
        num_supernodes=experiment.devices.count,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000},
        },
    )
    return found


def furthest(ours: Sequence[Vector], theirs: Sequence[Vector]) -> float:
    """The largest difference of any weight after any round."""
    assert len(ours) == len(theirs) > 0
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_two_runs_in_this_process_give_the_same_bits(
    plain: tuple[Experiment, Sequence[Vector]], tmp_path: Path
) -> None:
    """Without DP, nothing depends on a clock, a global seed or the order of a set."""
    experiment, first = plain
    second = in_this_process(experiment, tmp_path / "second" / "everywhere")
    assert furthest(first, second) == 0.0
    assert float((first[0] - flatten_parameters(*experiment.start().modules())).abs().max()) > 1e-4


def test_encrypted_sums_give_the_same_model_up_to_quantisation(
    plain: tuple[Experiment, Sequence[Vector]], tmp_path: Path
) -> None:
    """No update changes by more than a step of the quantiser."""
    experiment, ours = plain
    theirs = in_this_process(tiny(tmp_path, "homomorphic"), tmp_path / "everywhere")
    method = GanRound(experiment.start(), experiment.training, experiment.plan().dp_parameters)
    step = float(method.ranges().max()) / 2**15
    assert 0 < furthest(ours[:1], theirs[:1]) < step


@pytest.mark.slow
def test_ray_actors_give_the_same_model_as_this_process(
    plain: tuple[Experiment, Sequence[Vector]], tmp_path: Path
) -> None:
    """The result does not depend on where a device computes."""
    pytest.importorskip("ray")
    threads = torch.get_num_threads()
    experiment, ours = plain
    theirs = in_ray(experiment, tmp_path / "there" / "everywhere")
    assert torch.get_num_threads() == threads
    assert furthest(ours, theirs) < 1e-6
