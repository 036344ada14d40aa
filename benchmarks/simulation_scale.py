"""What a simulation in one process costs beside its private steps, as the number of devices grows.

    python benchmarks/simulation_scale.py [--devices 50 200 1000] [--method gan] [--photos 20] [--rounds 2]

For each number of devices, two processes: the plain loop, which does nothing but the private steps of each device and
adds up their updates, for at most 100 devices, because its cost does not depend on their number; and the simulation as
`fedface run` does it, with messages, policies, ledgers, stored replies and checked sums. Photos are rendered before
both, and what a process does once is done before. Times are CPU seconds of the whole process, for one device and round;
other programs on the machine change them little. "Once a round" is what a round costs besides: pricing, applying,
storing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run import initialize_run
from fedface.coordinator.run_state import RunState
from fedface.experiment import Experiment, devices_folder, read_experiment
from fedface.models.model import Model
from fedface.privacy.plan import Plan
from fedface.randomness import SecretNoise, Streams
from fedface.simulation.devices import simulated_device
from fedface.simulation.in_process import in_process_cohort
from fedface.tensor_types import Images
from fedface.training.training_methods import common_streams, prepare_round

MOST_PLAIN = 100
METHODS = {
    "gan": "kind: gan-training, fake_batch_size: 8",
    "flow": "kind: flow-training",
    "super-resolution": "kind: upsampler-training, learner: super-resolution",
}
RECIPE = """
question: What does a simulation cost beside its private steps?
name: scale
privacy: {{kind: privacy-target, epsilon: 8, delta: 1e-3}}
devices: {{kind: synthetic-devices, light_fractions: {light}, photos_per_device: {photos}}}
training: {{{method}, rounds: {rounds}, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: {batch}}}
aggregation: {{kind: plain}}
"""


def resident() -> float:
    """Memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@dataclass
class Meter:
    """CPU seconds between the request of each round and its last reply, and memory meanwhile."""

    devices: int
    requests: float = 0.0
    memory: list[float] = field(default_factory=list)
    begun: float = 0.0

    def stage(self, name: str, steps: int) -> None:
        """A round begins."""
        self.begun = time.process_time()

    def advance(self, done: int) -> None:
        """A reply was added to the sum."""
        self.memory.append(resident())
        if done == self.devices:
            self.requests += time.process_time() - self.begun

    def message(self, sentence: str) -> None:
        """Nothing."""


def recipe(arguments: argparse.Namespace, devices: int, folder: Path) -> Experiment:
    """So many devices with few photos each."""
    text = RECIPE.format(
        light=[round(i / devices, 3) for i in range(devices)],
        photos=arguments.photos,
        method=METHODS[arguments.method],
        rounds=arguments.rounds,
        batch=max(1, arguments.photos // 2),
    )
    (folder / "scale.yaml").write_text(text)
    return read_experiment(folder / "scale.yaml")


def plain_loop(experiment: Experiment, plan: Plan, model: Model, photos: list[Images], rounds: int) -> float:
    """CPU seconds for one device and round of the private steps alone."""
    began = time.process_time()
    for number in range(1, rounds + 1):
        work = prepare_round(model, experiment.training, plan.dp_parameters, common_streams(0, number))
        ranges = work.ranges()
        total = torch.zeros_like(ranges)
        for device, images in enumerate(photos):
            streams = Streams(0).child(f"{device}/{number}")
            total += work.update(images, rng=SecretNoise(), streams=streams) / ranges
        model = work.apply(total, len(photos), Streams(0).generator("mean style"))
    return (time.process_time() - began) / len(photos) / rounds


def one(arguments: argparse.Namespace) -> dict[str, float]:
    """One number of devices, in this process."""
    torch.set_num_threads(1)
    (devices,) = arguments.devices
    with tempfile.TemporaryDirectory() as home:
        experiment, run = recipe(arguments, devices, Path(home)), Path(home) / "run"
        plan, model = experiment.plan(), experiment.start()
        initialize_run(experiment, run)
        cohort = in_process_cohort(experiment, devices_folder(run), arguments.workers)

        def photos(number: int) -> Images:
            found = simulated_device(experiment, number, devices_folder(run)).photos(model.size).images
            assert found.dtype == torch.float32
            return found

        plain_loop(experiment, plan, model, [photos(0)], 1)  # what a process does once
        if arguments.part == "plain":
            held = [photos(number) for number in range(min(devices, MOST_PLAIN))]
            return {"cpu": plain_loop(experiment, plan, model, held, arguments.rounds)}
        for number in range(devices):
            photos(number)
        before, meter, began = resident(), Meter(devices), time.process_time()
        clock = time.perf_counter()
        state = run_rounds(experiment, plan, cohort, RunState.read(run), None, meter)
        whole = time.process_time() - began
        assert all(len(record.participants) == devices for record in state.rounds)
        stored = sum(path.stat().st_blocks * 512 for path in devices_folder(run).rglob("*"))
        tenth = len(meter.memory) // 10
        return {
            "cpu": meter.requests / devices / arguments.rounds,
            "once": (whole - meter.requests) / arguments.rounds,
            "clock": (time.perf_counter() - clock) / devices / arguments.rounds,
            "before": before,
            "early": max(meter.memory[: tenth + 1]),
            "late": max(meter.memory[-tenth - 1 :]),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "disk": stored / devices / 2**20,
            "weights": sum(weight.numel() for module in model.modules() for weight in module.parameters()),
        }


def main() -> None:
    """Parse, measure each number of devices in processes of its own, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--method", choices=METHODS, default="gan")
    parser.add_argument("--photos", type=int, default=20, help="of each device")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="devices that work at a time")
    parser.add_argument("--part", choices=("plain", "simulation"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(one(arguments)))
        return
    heads = (
        "devices", "plain loop, CPU s", "simulation, CPU s", "ratio", "once a round, CPU s", "clock, s",
        "MiB before", "MiB in the first tenth", "in the last tenth", "peak", "MiB of disk per device",
    )  # fmt: skip
    print(
        f"{arguments.method}, {arguments.photos} photos per device, {arguments.rounds} rounds of one step, ",
        end="",
    )
    print(f"{arguments.workers} at a time\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for devices in arguments.devices:
        found = {}
        for part in ("plain", "simulation"):
            command = [sys.executable, __file__, "--part", part, "--devices", str(devices)]
            for name in ("method", "photos", "rounds", "workers"):
                command += [f"--{name}", str(getattr(arguments, name))]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[part] = json.loads(printed.splitlines()[-1])
        plain, ours = found["plain"]["cpu"], found["simulation"]
        cells = (
            f"{devices}", f"{plain:.3f}", f"{ours['cpu']:.3f}", f"{ours['cpu'] / plain:.2f}", f"{ours['once']:.1f}",
            f"{ours['clock']:.2f}", f"{ours['before']:.0f}", f"{ours['early']:.0f}", f"{ours['late']:.0f}",
            f"{ours['peak']:.0f}", f"{ours['disk']:.1f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nThe model has {ours['weights']:.0f} weights.")


if __name__ == "__main__":
    main()
