"""The same experiment gives the same model in one process and in Ray's actors. Both use the same ClientApp and
coordinator; only the transport differs. Runs without DP use reproducible streams only, so the models must be equal.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def in_ray(experiment: Experiment, folder: Path, init_args: dict[str, Any], seen: Path) -> Sequence[Vector]:
    """Through Flower's simulation, one CPU for an actor; each device leaves the id of its Ray node in `seen`."""
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
        import ray

        with seen.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        return simulated_device(experiment, int(context.node_config["partition-id"]), devices_folder(folder))

    run_simulation(
        server,
        client_app(device_for),
        num_supernodes=experiment.devices.count,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init_args},
    )
    return found


@contextmanager
def ray_node(folder: Path, *arguments: str) -> Iterator[None]:
    """A Ray node of one CPU in processes of its own, as `ray start` on another machine would be."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *arguments]
    path = folder / f"ray-{len(arguments)}.log"
    with path.open("wb") as log:
        node = subprocess.Popen(
            [*command, "--object-store-memory=80000000"], stdout=log, stderr=log,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while "Ray runtime started" not in path.read_text():
            assert node.poll() is None and time.monotonic() < end, path.read_text()
            time.sleep(0.2)
        yield
    finally:
        node.terminate()
        node.wait(60)


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
    here = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    theirs = in_ray(experiment, tmp_path / "there" / "everywhere", here, tmp_path / "seen")
    assert torch.get_num_threads() == threads
    assert furthest(ours, theirs) < 1e-6


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_model_as_this_process(
    plain: tuple[Experiment, Sequence[Vector]], tmp_path: Path
) -> None:
    """Two nodes on this machine in place of two machines, as docs/scale.md starts them; both train devices."""
    pytest.importorskip("ray")
    experiment, ours = plain
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = ("--head", "--node-ip-address=127.0.0.1", f"--port={address[10:]}", "--include-dashboard=false")
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short,  # names of sockets are short
        ray_node(tmp_path, *head, f"--temp-dir={short}"),
        ray_node(tmp_path, f"--address={address}", "--node-ip-address=127.0.0.1"),
    ):
        theirs = in_ray(
            experiment, tmp_path / "there" / "everywhere", {"address": address}, tmp_path / "seen"
        )
    assert len(set((tmp_path / "seen").read_text().split())) == 2
    assert furthest(ours, theirs) < 1e-6
