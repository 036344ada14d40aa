"""How fast PULSE searches frozen weights, beside a plain implementation of the same network in the same run.

    python benchmarks/latent_search.py [--sizes 32 64 256] [--bases 16384 32768] [--batches 1 4] [--steps 100]
                                       [--rounds 3] [--threads 1] [--device cpu] [--json FILE]

The plain implementation is written here from the paper (Karras et al. 2020, arXiv:1912.04958): one modulated
and demodulated weight per image and a grouped convolution, resampling by zero insertion, padding and
convolution, float32, NCHW, weights that ask for no gradient. All rows have the same weights (32 px: the base
checkpoint; otherwise random, with --bases for the channel base) and are searched by the same class,
`fedface.upsampling.pulse.Pulse`, from the same starts towards the same photos, which the generator drew itself.
First every row is timed in turn, a few steps at once and several rounds of it, so that another program on the
same cores disturbs all rows; the table has the median step. Then each row searches for `--steps` steps; its
loss is the mean over faces of the misfit that `Pulse` reports. Memory is the peak of a process of its own that
does two steps. With one thread, seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fedface.models.contracts import sample
from fedface.models.frozen import Precision, fast_precision
from fedface.models.stylegan2 import Block, GeneratorConfig, StyledConv, StyleGAN2, ToRGB
from fedface.models.weights import load_base
from fedface.randomness import Streams
from fedface.shapes import Images, Latents, LowImages, Styles
from fedface.upsampling.degrade import BicubicPulse
from fedface.upsampling.contracts import Progress
from fedface.upsampling.pulse import Pulse, PulseConfig

NEVER = 1e-12  # a tolerance that no face meets, so that every search takes all its steps
TIMED_STEPS = 5  # in one go; the first is not counted
ROWS = ("plain", "float32", "bfloat16")
HEADS = ("generator", "batch", "row", "steps/s", "ratio", "loss", "against plain", "peak MiB")


def zero_inserted(x: Tensor, kernel: Tensor, *, up: int, pad: tuple[int, int]) -> Tensor:
    """Insert zeros between pixels, pad, and filter each channel: (n, c, h, w) -> (n, c, about up * h, ...)."""
    n, c, h, w = x.shape
    x = x.reshape(n * c, 1, h, 1, w, 1)
    x = functional.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n * c, 1, h * up, w * up)
    x = functional.pad(x, (*pad, *pad))
    x = functional.conv2d(x, (kernel * up**2)[None, None])
    return x.reshape(n, c, *x.shape[2:])


def plain_modulated(weight: Tensor, style: Tensor, *, demodulate: bool) -> Tensor:
    """The weights of the paper's equations 1 and 3, one per image: (n, o, i, k, k)."""
    weights = weight[None] * style[:, None, :, None, None]
    if demodulate:
        weights = weights * (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    return weights


class PlainGenerator:
    """A slow and obvious StyleGAN2 (skip form) with the weights of a `StyleGAN2`."""

    def __init__(self, weights: StyleGAN2) -> None:
        self.weights = weights.requires_grad_(False)
        self.size, self.latent_width = weights.size, weights.latent_width
        self.style_inputs, self.noise_sides = weights.style_inputs, weights.noise_sides
        self.style_slope = weights.style_slope

    def map(self, latents: Latents) -> Styles:
        """As the generator's."""
        return self.weights.map(latents.to(self.weights.mapping.w_avg.device)).to(latents.device)

    def truncate(self, styles: Styles, psi: float) -> Styles:
        """As the generator's."""
        return self.weights.truncate(styles.to(self.weights.mapping.w_avg.device), psi).to(styles.device)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        """Styles (n, k, v) -> images (n, 3, size, size)."""
        home, place = styles.device, self.weights.mapping.w_avg.device
        styles = styles.to(place)
        noise = None if noise is None else [plane.to(place) for plane in noise]
        used, picture = 0, torch.zeros(1)
        blocks = [
            cast(Block, self.weights.synthesis.get_submodule(f"b{s}")) for s in self.weights.config.sides
        ]
        x = blocks[0].const.expand(styles.shape[0], -1, -1, -1)
        for block in blocks:
            for conv in [block.conv1] if block.first else [block.conv0, block.conv1]:
                x = self._convolve(conv, x, styles[:, used], None if noise is None else noise[used])
                used += 1
            rgb = self._colours(block.torgb, x, styles[:, used])
            if not block.first:
                rgb = rgb + zero_inserted(picture, block.filter, up=2, pad=(2, 1))
            picture = rgb
        return ((picture + 1) / 2).to(home)

    def _convolve(self, layer: StyledConv, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        weights = plain_modulated(layer.weight, layer.affine(style), demodulate=True)
        n, outputs, inputs = weights.shape[:3]
        x = x.reshape(1, n * inputs, *x.shape[2:])
        if layer.up == 2:
            weights = weights.transpose(1, 2).reshape(n * inputs, outputs, 3, 3)
            x = functional.conv_transpose2d(x, weights, stride=2, groups=n)
            x = x.reshape(n, outputs, *x.shape[2:])
            x = zero_inserted(x, layer.filter * 4, up=1, pad=(1, 1))
        else:
            x = functional.conv2d(x, weights.reshape(n * outputs, inputs, 3, 3), padding=1, groups=n)
            x = x.reshape(n, outputs, *x.shape[2:])
        x = x + (layer.noise_const if noise is None else noise) * layer.noise_strength
        return functional.leaky_relu(x + layer.bias[:, None, None], 0.2) * 2**0.5

    def _colours(self, layer: ToRGB, x: Tensor, style: Tensor) -> Tensor:
        weights = plain_modulated(layer.weight, layer.affine(style) * layer.gain, demodulate=False)
        n, _, inputs = weights.shape[:3]
        y = functional.conv2d(
            x.reshape(1, n * inputs, *x.shape[2:]), weights.reshape(n * 3, inputs, 1, 1), groups=n
        )
        return y.reshape(n, 3, *x.shape[2:]) + layer.bias[:, None, None]


def searched(size: int, base: int) -> StyleGAN2:
    """The base checkpoint at its own size; otherwise random weights at the published widths.

    Random biases and noise strengths are about as large as trained ones.
    """
    if size == 32:
        return load_base().generator
    config = GeneratorConfig(
        size=size,
        latent_width=512,
        style_width=512,
        mapping_layers=8,
        channel_base=base,
        channel_max=512,
    )
    chance = Streams(0).generator(f"benchmark/{size}/{base}")
    generator = StyleGAN2(config, chance)
    with torch.no_grad():
        for layer in generator.synthesis.modules():
            if isinstance(layer, StyledConv):
                layer.noise_strength.fill_(0.05)
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=chance))
    return generator


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table; hashable, and small enough to send to another process."""

    row: str
    size: int
    base: int
    batch: int
    device: str
    threads: int

    def search(self, steps: int, progress: Progress | None = None) -> Pulse:
        """The search by this row's generator."""
        weights = searched(self.size, self.base).to(self.device)
        generator = PlainGenerator(weights) if self.row == "plain" else weights
        precision: Precision = "bfloat16" if self.row == "bfloat16" else "float32"
        config = PulseConfig(steps=steps, eps=NEVER, mapping_samples=1000, precision=precision)
        degradation = BicubicPulse(self.size // self.low_size)
        return Pulse(generator, degradation, config, Streams(2), progress=progress)

    def photos(self) -> LowImages:
        """What every row is given."""
        generator = PlainGenerator(searched(self.size, self.base))
        drawn = sample(generator, self.batch, Streams(1).generator(f"truth/{self.size}/{self.base}"))
        return BicubicPulse(self.size // self.low_size).apply(drawn).clamp(0, 1)

    @property
    def low_size(self) -> int:
        """Of the photos: 16 px, 8 for the smallest generator."""
        return min(16, self.size // 4)

    @property
    def name(self) -> str:
        """For the first column."""
        return "32 px, base checkpoint" if self.size == 32 else f"{self.size} px, base {self.base}"

    def now(self) -> float:
        """CPU seconds of one thread, which other programs disturb least; otherwise seconds of the clock."""
        return time.process_time() if self.threads == 1 and self.device == "cpu" else time.perf_counter()


@dataclass
class Result:
    """What was measured of one case."""

    case: Case
    seconds: float  # of one step, median
    losses: list[float]  # the misfit of each face after all steps
    steps: int  # that these took
    peak: float  # MiB

    @property
    def loss(self) -> float:
        """The mean over faces."""
        return statistics.fmean(self.losses)


class Clock:
    """The seconds of each step; called by `Pulse` after every step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.marks: list[float] = []

    def __call__(self, done: int, of: int) -> None:
        self.marks.append(self.case.now())

    def steps(self) -> list[float]:
        """All steps but the first."""
        return [after - before for before, after in zip(self.marks[1:], self.marks[2:], strict=False)]


def timed(case: Case, photos: LowImages) -> list[float]:
    """The seconds of a few steps."""
    clock = Clock(case)
    case.search(TIMED_STEPS, clock).upsample(photos, faces_per_photo=1)
    return clock.steps()


def peak_of_two_steps(case: Case) -> float:
    """MiB; call it in a process of its own."""
    torch.set_num_threads(case.threads)
    photos = torch.full((case.batch, 3, case.low_size, case.low_size), 0.5)
    case.search(2).upsample(photos, faces_per_photo=1)
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # getrusage would count the parent as well, whose memory the child had before it began
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(cases: Sequence[Case], *, steps: int, rounds: int) -> list[Result]:
    """All rows of one size, base and batch."""
    photos = cases[0].photos()
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            seconds[case] += timed(case, photos)
    results = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            peak = alone.submit(peak_of_two_steps, case).result()
        found = case.search(steps).upsample(photos, faces_per_photo=1)
        losses = found.misfit.flatten().tolist()
        results.append(Result(case, statistics.median(seconds[case]), losses, steps, peak))
    return results


def lines(results: Sequence[Result]) -> list[str]:
    """Rows of the Markdown table; the first result is the plain one."""
    plain = results[0]
    return [
        f"| {r.case.name} | {r.case.batch} | {r.case.row} | {1 / r.seconds:.2f} "
        f"| {plain.seconds / r.seconds:.2f} | {r.loss:.3e} | {100 * (r.loss / plain.loss - 1):+.2f} % "
        f"| {r.peak:.0f} |"
        for r in results
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--bases", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", nargs="+", choices=ROWS[1:], default=ROWS[1:])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    print(
        f"{machine}, {options.threads} threads, torch {torch.__version__}; {options.steps} steps for the loss,"
    )
    print(f"{options.rounds} rounds of {TIMED_STEPS - 1} timed steps; bfloat16 in hardware: ", end="")
    print(fast_precision(torch.device(options.device)) == "bfloat16", end="\n\n")
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS), flush=True)
    found: list[Result] = []
    for size in options.sizes:
        for base in options.bases if size != 32 else [0]:
            for batch in options.batches:
                shape = {"size": size, "base": base, "batch": batch}
                cases = [
                    Case(row=row, device=options.device, threads=options.threads, **shape)
                    for row in ("plain", *options.rows)
                ]
                results = measure(cases, steps=options.steps, rounds=options.rounds)
                print("\n".join(lines(results)), flush=True)
                found += results
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
