"""The cost of one synthesis and its gradient of the styles at the published size of FFHQ's generator.

    python benchmarks/full_size.py [--sizes 256 512 1024] [--rounds 3] [--threads 1] [--device cpu] [--json FILE]

Random weights at the widths of Karras et al. 2020 (arXiv:2006.06676): 32768 / side channels, at most 512, 8
mapping layers, 30 million weights at 1024 px. Each row runs in a process of its own, whose peak of resident
memory is the table's (on a GPU, what was allocated there). Rows of one size alternate, so that another program
on the same cores disturbs all of them. With one thread on a CPU, seconds are CPU seconds.

plain: `StyleGAN2` with weights that require no gradient; in bfloat16 by torch.autocast.
frozen: `fedface.models.fast_stylegan2`.
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

import torch

from fedface.models.fast_stylegan2 import Precision, prepare_for_search
from fedface.models.generator_protocol import Generator, draw_noise
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams

FORMS = ("plain", "frozen")
HEADS = ("size", "weights", "form", "precision", "synthesis, s", "and back, s", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    size: int
    form: str
    precision: Precision
    device: str
    threads: int

    def now(self) -> float:
        """CPU seconds of one thread, which other programs disturb least; otherwise seconds of the clock."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if self.threads == 1 and self.device == "cpu" else time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one process measured."""

    case: Case
    weights: int
    forward: float  # seconds of a synthesis without gradients
    both: float  # seconds of a synthesis and its gradient
    peak: float  # MiB


def full_generator(size: int) -> StyleGAN2:
    """FFHQ's widths, random weights, noise strengths of a trained size."""
    config = StyleGAN2Config(
        size=size,
        latent_width=512,
        style_width=512,
        mapping_layers=8,
        channel_base=32768,
        channel_max=512,
    )
    generator = StyleGAN2(config, Streams(0).generator(f"benchmark/{size}")).requires_grad_(False)
    for name, weight in generator.named_parameters():
        if name.endswith("noise_strength"):
            weight.fill_(0.05)
    return generator


def measure(case: Case) -> Result:
    """One synthesis without gradients and one with; call it in a process of its own."""
    torch.set_num_threads(case.threads)
    whole = full_generator(case.size).to(case.device)
    weights = sum(weight.numel() for weight in whole.parameters())
    generator: Generator = whole
    if case.form == "frozen":
        generator = prepare_for_search(whole, precision=case.precision)
        del whole
    rng = Streams(1).generator("inputs")
    latents = torch.randn(1, 512, generator=rng).to(case.device)
    styles = generator.map(latents).detach().clone()
    noise = [plane.to(case.device) for plane in draw_noise(generator, 1, rng)]
    half = case.form == "plain" and case.precision == "bfloat16"
    with torch.autocast(case.device, dtype=torch.bfloat16, enabled=half):
        with torch.no_grad():
            generator.synthesize(styles, noise)
            start = case.now()
            generator.synthesize(styles, noise)
            forward = case.now() - start
        styles.requires_grad_()
        start = case.now()
        torch.autograd.grad(generator.synthesize(styles, noise).square().mean(), styles)
        both = case.now() - start
    if case.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        peak = torch.cuda.max_memory_allocated() / 2**20
    return Result(case=case, weights=weights, forward=forward, both=both, peak=peak)


def median_of(results: Sequence[Result]) -> Result:
    """Medians over the rounds of one case."""
    return Result(
        case=results[0].case,
        weights=results[0].weights,
        forward=statistics.median(result.forward for result in results),
        both=statistics.median(result.both for result in results),
        peak=statistics.median(result.peak for result in results),
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    print(f"{machine}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS), flush=True)
    context = multiprocessing.get_context("spawn")
    found: list[Result] = []
    for size in options.sizes:
        shared = {"size": size, "device": options.device, "threads": options.threads}
        kinds: list[tuple[str, Precision]] = [(f, p) for f in FORMS for p in ("float32", "bfloat16")]
        cases = [Case(form=form, precision=precision, **shared) for form, precision in kinds]
        rounds: dict[Case, list[Result]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case in cases:
                with ProcessPoolExecutor(1, mp_context=context) as alone:
                    rounds[case].append(alone.submit(measure, case).result())
        for case in cases:
            result = median_of(rounds[case])
            found.append(result)
            print(
                f"| {size} | {result.weights / 1e6:.1f} M | {case.form} | {case.precision} "
                f"| {result.forward:.2f} | {result.both:.2f} | {result.peak:.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
