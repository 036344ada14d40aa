"""What a simulation in one process costs beside its private steps, as the number of devices grows.

    python benchmarks/simulation_scale.py [--devices 50 200 1000] [--method gan] [--photos 20] [--rounds 2]

The simulation is that of `fedface run`, with messages, policies, ledgers, stored replies and checked sums. The plain
loop does nothing but the private steps of a device and adds up the updates. About fifty of its steps are spread over
each round of the simulation, so that both meet the same load of the machine. Times are CPU seconds for one device and
round. Photos are rendered before, and what a process does once is done before. "Once a round" is what a round costs
besides: pricing, applying, storing. Each number of devices has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedface.coordinator.rounds import run_rounds
from fedface.coordinator.run import initialize_run
from fedface.coordinator.run_state import RunState
from fedface.experiment import Experiment, devices_folder, read_experiment
from fedface.randomness import SecretNoise, Streams
from fedface.simulation.devices import simulated_device
from fedface.simulation.in_process import in_process_cohort
from fedface.tensor_types import StoredImages
from fedface.training.training_methods import common_streams, prepare_round

PLAIN_STEPS = 50  # in each round
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
aggregation: {{kind: {sums}}}
"""


def resident() -> float:
    """Memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@dataclass(kw_only=True)
class Meter:
    """CPU seconds between each request and its last reply, and memory meanwhile."""

    devices: int
    plain_step: Callable[[int], None]
    requests: float = 0.0  # without the plain steps
    plain: list[float] = field(default_factory=list)  # of each plain step
    memory: list[float] = field(default_factory=list)
    begun: float = 0.0
    training: bool = True  # not an exchange of a masked sum

    def stage(self, name: str, steps: int) -> None:
        """A round begins, or the exchanges of its sum."""
        self.begun, self.training = time.process_time(), "train" in name

    def advance(self, done: int) -> None:
        """A reply was added to the sum."""
        self.memory.append(resident())
        if self.training and done % max(1, self.devices // PLAIN_STEPS) == 0:
            began = time.thread_time()
            self.plain_step(done - 1)
            self.plain.append(time.thread_time() - began)
            self.begun += self.plain[-1]
        if done == self.devices:
            now = time.process_time()
            self.requests, self.begun = self.requests + now - self.begun, now

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
        sums=arguments.sums,
    )
    (folder / "scale.yaml").write_text(text)
    return read_experiment(folder / "scale.yaml")


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """One number of devices, in this process."""
    torch.set_num_threads(1)
    (devices,) = arguments.devices
    with tempfile.TemporaryDirectory() as home:
        experiment, run = recipe(arguments, devices, Path(home)), Path(home) / "run"
        plan, model = experiment.plan(), experiment.start()
        initialize_run(experiment, run)
        cohort = in_process_cohort(experiment, devices_folder(run), arguments.workers)
        work = prepare_round(model, experiment.training, plan.dp_parameters, common_streams(0, 1))
        ranges = work.ranges()
        total = torch.zeros_like(ranges)

        def photos(number: int) -> StoredImages:
            return simulated_device(experiment, number, devices_folder(run)).photos(model.size).images

        def plain_step(number: int) -> None:
            streams = Streams(0).child(str(number))
            total.add_(work.update(photos(number), rng=SecretNoise(), streams=streams) / ranges)

        for number in range(devices):
            photos(number)
        plain_step(0)
        before, meter = resident(), Meter(devices=devices, plain_step=plain_step)
        began, clock = time.process_time(), time.perf_counter()
        state = run_rounds(experiment, plan, cohort, RunState.read(run), None, meter)
        whole = time.process_time() - began - sum(meter.plain)
        assert all(len(record.participants) == devices for record in state.rounds)
        stored = sum(path.stat().st_blocks * 512 for path in devices_folder(run).rglob("*"))
        tenth = len(meter.memory) // 10
        return {
            "plain": statistics.fmean(meter.plain),
            "cpu": meter.requests / devices / arguments.rounds,
            "once": (whole - meter.requests) / arguments.rounds,
            "clock": (time.perf_counter() - clock) / arguments.rounds,
            "before": before,
            "early": max(meter.memory[: tenth + 1]),
            "late": max(meter.memory[-tenth - 1 :]),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "disk": stored / devices / 2**20,
            "weights": sum(weight.numel() for module in model.modules() for weight in module.parameters()),
        }


def main() -> None:
    """Parse, measure each number of devices in a process of its own, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--method", choices=METHODS, default="gan")
    parser.add_argument("--sums", choices=("plain", "masked"), default="masked")
    parser.add_argument("--photos", type=int, default=20, help="of each device")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="devices that work at a time")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measured(arguments)))
        return
    heads = (
        "devices", "plain loop, CPU s", "simulation, CPU s", "ratio", "once a round, CPU s", "a round by the clock, s",
        "MiB before", "in the first tenth", "in the last tenth", "peak", "MiB of disk per device",
    )  # fmt: skip
    options = [
        f"--{name}={getattr(arguments, name)}" for name in ("method", "sums", "photos", "rounds", "workers")
    ]
    print(f"{' '.join(options)}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for devices in arguments.devices:
        command = [sys.executable, __file__, "--here", f"--devices={devices}", *options]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        cells = (
            f"{devices}", f"{found['plain']:.3f}", f"{found['cpu']:.3f}", f"{found['cpu'] / found['plain']:.2f}",
            f"{found['once']:.1f}", f"{found['clock']:.0f}", f"{found['before']:.0f}", f"{found['early']:.0f}",
            f"{found['late']:.0f}", f"{found['peak']:.0f}", f"{found['disk']:.1f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nThe model has {found['weights']:,.0f} weights.")


if __name__ == "__main__":
    main()
