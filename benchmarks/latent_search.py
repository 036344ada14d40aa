"""How fast PULSE searches frozen weights, beside its published loop in plain torch, in the same run.

    python benchmarks/latent_search.py [--sizes 64 256 1024] [--batches 1] [--steps N] [--rounds 1] [--threads 1]
                                       [--tables loops scaling] [--device cpu] [--json FILE]

Four rows for each generator, all with the same weights (32 px: the base checkpoint; otherwise random ones of the
published widths), the same starts and the same photos, which the generator drew itself:

    published   the published loop, `tests/upsampling/published_loop.py`, around a StyleGAN2 written from the paper
    module      the same loop around `fedface.models.stylegan2.StyleGAN2`, weights asking for no gradient
    float32     `fedface.upsampling.pulse.Pulse` with `PulseConfig.paper()`
    bfloat16    the same, its convolutions above 16 px in bfloat16

First every row is timed in turn, a few steps at once and `--rounds` rounds of it, so that another program on the same
cores disturbs all rows. Then each row searches for `--steps` steps; the table has the median of all steps, and the
loss is the mean over faces of the consistency error of the last one. The tolerance is too small to be met, so that
every row descends to its last step. Memory is the peak of a process of its own that does two steps. With one thread,
seconds are CPU seconds. The second table, how faces per second grow with the batch and with a second core, is that of
`side_by_side.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from plain_stylegan2 import PlainGenerator, searched
from side_by_side import scaling_table
from torch import Tensor

from fedface.models.fast_stylegan2 import Precision, fast_precision
from fedface.models.generator_protocol import sample
from fedface.randomness import Streams
from fedface.tensor_types import LowImages
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "upsampling"))
from published_loop import published_loop, starts  # the reference implementation of the tests

NEVER = 1e-12  # a tolerance that no face meets, below which the published loss would be flat
TIMED_STEPS = 4  # in one go; the first is not counted
LOSS_STEPS = {32: 100, 64: 100, 256: 25, 1024: 4}
DRAWS = 1000  # of the mapping
LOOPS = ("published", "module")
ROWS = (*LOOPS, "float32", "bfloat16")
HEADS = (
    "generator",
    "batch",
    "row",
    "s/step",
    "steps/s",
    "ratio",
    "steps",
    "loss",
    "against published",
    "MiB",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table; hashable, and small enough to send to another process."""

    row: str
    size: int
    batch: int
    device: str
    threads: int

    @property
    def base(self) -> int:
        """Channel base of the published networks."""
        return 32768 if self.size == 1024 else 16384

    @property
    def low_size(self) -> int:
        """Of the photos: 16 px, 8 for the smallest generator."""
        return min(16, self.size // 4)

    @property
    def name(self) -> str:
        """For the first column."""
        return "32 px, base checkpoint" if self.size == 32 else f"{self.size} px, base {self.base}"

    def photos(self) -> LowImages:
        """What every row is given."""
        generator = PlainGenerator(searched(self.size, self.base))
        samples = sample(generator, self.batch, Streams(1).generator(f"truth/{self.size}/{self.base}"))
        return BicubicPulse(self.size // self.low_size).apply(samples).clamp(0, 1)

    def search(self, photos: LowImages, steps: int, hear: Callable[[Tensor], None]) -> None:
        """Take all steps; `hear` is called with every face's consistency error after each synthesis."""
        weights = searched(self.size, self.base).to(self.device).requires_grad_(False)
        degradation, streams = BicubicPulse(self.size // self.low_size), Streams(2)
        if self.row in LOOPS:
            generator = PlainGenerator(weights) if self.row == "published" else weights
            draws = torch.randn(DRAWS, weights.latent_width, generator=streams.generator("pulse/mapping"))
            width, rng = weights.config.style_width, streams.generator("pulse/search")
            latents, noise = starts(weights, len(photos), width, rng)
            factor = degradation.factor
            for _, consistency_error in published_loop(
                generator, photos, draws, latents, noise, steps=steps, factor=factor, eps=NEVER
            ):
                hear(consistency_error)
        else:
            precision: Precision = "bfloat16" if self.row == "bfloat16" else "float32"
            paper = replace(PulseConfig.paper(), eps=NEVER, mapping_samples=DRAWS)
            config = replace(paper, steps=steps, precision=precision)
            search = PulseUpsampler(
                weights, degradation, config, streams, watch=lambda snapshot: hear(snapshot.consistency_error)
            )
            search.upsample(photos, faces_per_photo=1)

    def now(self) -> float:
        """CPU seconds of one thread, which other programs disturb least; otherwise seconds of the clock."""
        return time.process_time() if self.threads == 1 and self.device == "cpu" else time.perf_counter()


@dataclass
class Result:
    """What was measured of one case."""

    case: Case
    seconds: float  # of one step, median
    losses: list[float]  # the consistency error of each face in the last step
    steps: int  # that these took
    peak: float  # MiB

    @property
    def loss(self) -> float:
        """The mean over faces."""
        return statistics.fmean(self.losses)


def timed(case: Case, photos: LowImages, steps: int) -> tuple[list[float], list[float]]:
    """The seconds of each step but the first, and the consistency errors after the last."""
    marks: list[float] = []
    last: list[float] = []

    def hear(consistency_error: Tensor) -> None:
        marks.append(case.now())
        last[:] = consistency_error.tolist()

    case.search(photos, steps, hear)
    return [after - before for before, after in zip(marks[1:], marks[2:], strict=False)], last


def peak_of_two_steps(case: Case) -> float:
    """MiB; call it in a process of its own."""
    torch.set_num_threads(case.threads)
    photos = torch.full((case.batch, 3, case.low_size, case.low_size), 0.5)
    timed(case, photos, 2)
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    # getrusage would count the parent as well, whose memory the child had before it began.
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(cases: Sequence[Case], *, steps: int, rounds: int) -> list[Result]:
    """All rows of one size and batch."""
    photos = cases[0].photos()
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            seconds[case] += timed(case, photos, TIMED_STEPS)[0]
    results = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            peak = alone.submit(peak_of_two_steps, case).result()
        more, losses = timed(case, photos, steps)
        results.append(Result(case, statistics.median(seconds[case] + more), losses, steps, peak))
    return results


def lines(results: Sequence[Result]) -> list[str]:
    """Rows of the Markdown table; the first result is the published loop's."""
    plain = results[0]
    return [
        f"| {r.case.name} | {r.case.batch} | {r.case.row} | {r.seconds:.3f} | {1 / r.seconds:.2f} "
        f"| {plain.seconds / r.seconds:.2f} | {r.steps} | {r.loss:.3e} "
        f"| {100 * (r.loss / plain.loss - 1):+.2f} % | {r.peak:.0f} |"
        for r in results
    ]


def loops_table(options: argparse.Namespace) -> list[Result]:
    """Print the first table."""
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS), flush=True)
    found: list[Result] = []
    rows = ROWS if options.device == "cpu" else tuple(row for row in ROWS if row != "module")
    for size in options.sizes:
        for batch in options.batches:
            cases = [
                Case(row=row, size=size, batch=batch, device=options.device, threads=options.threads)
                for row in rows
            ]
            results = measure(cases, steps=options.steps or LOSS_STEPS[size], rounds=options.rounds)
            print("\n".join(lines(results)), flush=True)
            found += results
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], choices=LOSS_STEPS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, help=f"default: by size, {LOSS_STEPS}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", nargs="+", default=["loops", "scaling"], choices=["loops", "scaling"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    print(
        f"{machine}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds;", end=""
    )
    print(" bfloat16 in hardware:", fast_precision(torch.device(options.device)) == "bfloat16", end="\n\n")
    found: dict[str, list[dict[str, object]]] = {}
    if "loops" in options.tables:
        found["loops"] = [asdict(result) for result in loops_table(options)]
    if "scaling" in options.tables:
        print()
        found["scaling"] = scaling_table()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
