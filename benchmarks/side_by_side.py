"""How many faces a second PULSE searches as the batch grows, on one core and on two.

    python benchmarks/side_by_side.py [--sizes 32 64] [--batches 1 2 4 8 16] [--rounds 3] [--json FILE]

Three ways to search the same faces: one thread; torch's two threads within each operation; and two workers
(`PulseConfig(workers=2)`), each a thread that searches half of the faces by itself. They take turns, several rounds of
it, and the table has the median round.

Seconds are those of the clock, less the seconds in which the searching threads were ready to run and other programs
had the cores, as Linux counts them (/proc/.../schedstat); without other programs that is the clock. Within one
operation a thread also waits for the other one, which is not counted: while other programs run that column is too low.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from plain_stylegan2 import searched

from fedface.models.generator_protocol import sample
from fedface.models.stylegan2 import StyleGAN2
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.upsampling.upsampler import StepSnapshot

STEPS = {32: 20, 64: 3, 256: 3}
WAYS = {"1 thread": (1, 1), "2 threads in an operation": (2, 1), "2 workers": (1, 2)}  # threads, workers


def waited() -> float:
    """Seconds in which this thread was ready to run and had no core; 0 where the system does not count them."""
    counted = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(counted.read_text().split()[1]) / 1e9 if counted.exists() else 0.0


@dataclass
class Worker:
    """The steps of one searching thread."""

    faces: int = 0
    marks: list[float] = field(default_factory=list)  # seconds of the clock, less those without a core

    def rate(self) -> float:
        """Faces times steps a second, the first step left out."""
        return self.faces * (len(self.marks) - 1) / (self.marks[-1] - self.marks[0])


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Face-steps a second of one batch, searched in one way; the median of several rounds."""

    size: int
    batch: int
    way: str
    rate: float
    rounds: list[float]


def once(generator: StyleGAN2, batch: int, threads: int, workers: int) -> float:
    """Face-steps a second of all workers together."""
    torch.set_num_threads(threads)
    factor = generator.size // min(16, generator.size // 4)
    photos = BicubicPulse(factor).apply(sample(generator, batch, Streams(1).generator("truth"))).clamp(0, 1)
    seen: dict[int, Worker] = {}

    def note(snapshot: StepSnapshot) -> None:
        worker = seen.setdefault(threading.get_native_id(), Worker())
        worker.faces = len(snapshot.faces)
        worker.marks.append(time.perf_counter() - waited())

    config = PulseConfig(
        steps=STEPS[generator.size] + 1,
        stop="end",
        selection="last",
        mapping_samples=100,
        faces_at_once=batch,
        workers=workers,
    )
    search = PulseUpsampler(generator, BicubicPulse(factor), config, Streams(2), watch=note)
    search.upsample(photos, faces_per_photo=1)
    return sum(worker.rate() for worker in seen.values())


def measure(size: int, batch: int, rounds: int) -> list[Scaled]:
    """All ways in turn."""
    generator = searched(size, 16384).requires_grad_(False)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (threads, workers) in WAYS.items():
            if workers <= batch:
                found[way].append(once(generator, batch, threads, workers))
    return [
        Scaled(size=size, batch=batch, way=way, rate=statistics.median(rates), rounds=rates)
        for way, rates in found.items()
        if rates
    ]


def scaling_table(
    sizes: Sequence[int] = (32, 64), batches: Sequence[int] = (1, 2, 4, 8, 16), rounds: int = 3
) -> list[dict[str, object]]:
    """Print face-steps a second and their ratio to one thread with the same batch."""
    heads = ["generator", "batch", "1 thread", "2 threads in an operation", "ratio", "2 workers", "ratio"]
    print("Faces times steps a second.\n")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    everything: list[dict[str, object]] = []
    before = torch.get_num_threads()
    for size in sizes:
        for batch in batches:
            results = {result.way: result for result in measure(size, batch, rounds)}
            alone, *others = (results.get(way) for way in WAYS)
            cells = [f"{r.rate:.2f} | {r.rate / alone.rate:.2f}" if r and alone else " | " for r in others]
            print(
                f"| {size} px | {batch} | {alone.rate if alone else 0:.2f} | {' | '.join(cells)} |",
                flush=True,
            )
            everything += [asdict(result) for result in results.values()]
    torch.set_num_threads(before)
    return everything


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], choices=STEPS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = scaling_table(options.sizes, options.batches, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
