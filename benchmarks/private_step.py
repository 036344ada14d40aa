"""The cost of a private step relative to an ordinary one, for each of our networks that reads photos.

    python benchmarks/private_step.py [--networks discriminator flow ...] [--batch 64] [--rounds 5] [--memory]

The baseline is the non-private step: the mean gradient of the batch by one backward pass. Every other row gives the
sum of clipped per-example gradients plus noise, and alternates with the baseline in one process of one thread; the
table has the median over rounds of the ratio to the baseline of the same round. Losses are those of training, weights
those of the bundled checkpoints.

* non-private, 32 at once: the same mean in parts, as far as the size of the batch alone explains a ratio below 1;
* ours: `clipped_unit_sum` at several microbatches, with the noise of `GaussianSum`;
* vmap: torch.func.vmap over torch.func.grad on the whole network, with the same noise;
* opacus: hooks, functorch, expanded weights and ghost clipping as Opacus ships them, with its own (insecure) noise;
* loop: one backward pass for each photo.

What Opacus refuses is reported with its reason; what it computes is compared with the loop, and where that differs by
more than 1e-3 of the sum's L2 norm the row says by how much. `--memory` runs every row once more in its own process and
adds the peak of resident memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedface.models.checkpoint import load_flow, load_gan, load_style_encoder, load_super_resolution
from fedface.models.lora import Full
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.mechanism import GaussianSum
from fedface.randomness import SecretNoise, Streams
from fedface.training.flow import loss_over_draws, times_and_noises
from fedface.training.gan import d_loss_real
from fedface.training.per_example_gradients import (
    Draws,
    PerExampleLoss,
    PerExampleProblem,
    clipped_unit_sum,
    trainable_parameters,
)
from fedface.training.upsampler import mark_upsampler, reconstruction_loss
from fedface.upsampling.degradation import BicubicPulse

STREAMS = Streams(1)
MECHANISM = GaussianSum(clip_norm=0.1, sigma=1.0)
Step = Callable[[], list[Tensor]]
_WRAPPED = '[NotImplementedError("'  # before the words in which Opacus refuses


@dataclass(frozen=True)
class Case:
    """A network with its loss, a batch, and the loss's own draws."""

    module: nn.Module
    loss: PerExampleLoss
    photos: Tensor
    draws: Tensor | None = None

    def rows(self, start: int = 0, end: int | None = None) -> tuple[Tensor, ...]:
        part = self.photos[start:end]
        return (part,) if self.draws is None else (part, self.draws[start:end])


def discriminator(photos: Tensor) -> Case:
    return Case(load_gan().discriminator, d_loss_real, photos)


def flow(photos: Tensor, count: int) -> Case:
    draws = times_and_noises(len(photos), count, 32, 1.0, STREAMS.numpy("draws"))
    return Case(load_flow().generator, loss_over_draws, photos, draws)


def upsampler(photos: Tensor, load: Callable) -> Case:
    model = load()
    mark_upsampler(model, Full(), STREAMS.generator("adapters"))
    return Case(model.upsampler, reconstruction_loss(BicubicPulse(4), 10.0), photos)


NETWORKS: dict[str, Callable[[Tensor], Case]] = {
    "discriminator": discriminator,
    "flow": lambda photos: flow(photos, 1),
    "flow, 4 draws": lambda photos: flow(photos, 4),
    "style encoder": lambda photos: upsampler(photos, load_style_encoder),
    "super-resolution": lambda photos: upsampler(photos, load_super_resolution),
}


def plain(case: Case) -> Step:
    """The non-private step."""
    weights = list(trainable_parameters(case.module).values())
    return lambda: list(torch.autograd.grad(case.loss(case.module, *case.rows()).mean(), weights))


def plain_in_parts(case: Case, microbatch: int) -> Step:
    """The same mean with fewer photos at once, which suits a small cache."""
    weights = list(trainable_parameters(case.module).values())

    def step() -> list[Tensor]:
        totals = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, len(case.photos), microbatch):
            losses = case.loss(case.module, *case.rows(start, start + microbatch))
            parts = torch.autograd.grad(losses.sum() / len(case.photos), weights)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        return totals

    return step


def loop(case: Case) -> Step:
    """One backward pass for each photo, clipped and summed, without noise: what the others must equal."""
    weights = list(trainable_parameters(case.module).values())

    def step() -> list[Tensor]:
        totals = [torch.zeros_like(weight) for weight in weights]
        for i in range(len(case.photos)):
            parts = torch.autograd.grad(case.loss(case.module, *case.rows(i, i + 1)).sum(), weights)
            length = torch.stack([part.norm() for part in parts]).norm()
            scale = (MECHANISM.clip_norm / length).clamp(max=1.0)
            totals = [total + part * scale for total, part in zip(totals, parts, strict=True)]
        return [total.detach() for total in totals]

    return step


def noised(totals: list[Tensor]) -> list[Tensor]:
    """Noise for all weights, generated at once."""
    flat = add_noise(torch.cat([total.flatten() for total in totals]), MECHANISM, SecretNoise())
    parts = torch.split(flat, [total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]


def ours(case: Case, microbatch: int) -> Step:
    def step() -> list[Tensor]:
        left = iter([] if case.draws is None else torch.split(case.draws, microbatch))
        draws = None if case.draws is None else Draws(lambda *_: next(left), STREAMS.numpy("unused"))
        problem = PerExampleProblem(case.module, case.loss, draws, microbatch=microbatch)
        return clipped_unit_sum(problem, case.photos, clip_norm=MECHANISM.clip_norm)

    return step


def whole(case: Case, microbatch: int) -> Step:
    """vmap over grad."""
    weights = {name: weight.detach() for name, weight in trainable_parameters(case.module).items()}

    def loss_of_one(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        def network(*inputs: Tensor) -> Tensor:
            result: Tensor = functional_call(case.module, weights, inputs)
            return result

        return case.loss(network, *(part[None] for part in row)).squeeze(0)

    each = vmap(grad(loss_of_one), in_dims=(None, *(0 for _ in case.rows())))

    def step() -> list[Tensor]:
        totals = [torch.zeros_like(weight) for weight in weights.values()]
        for start in range(0, len(case.photos), microbatch):
            parts = list(each(weights, *case.rows(start, start + microbatch)).values())
            length = torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()
            scale = (MECHANISM.clip_norm / length).clamp(max=1.0)
            totals = [t + torch.einsum("n,n...->...", scale, p) for t, p in zip(totals, parts, strict=True)]
        return totals

    return step


class Opacus:
    """One of Opacus's modes on a copy of the network; its optimiser clips, sums and noises."""

    def __init__(self, case: Case, mode: str) -> None:
        self.case, self.mode = case, mode
        module = copy.deepcopy(case.module)
        match mode:
            case "hooks" | "functorch":
                self.wrapped = GradSampleModule(
                    module, loss_reduction="sum", force_functorch=mode == "functorch"
                )
            case "expanded weights":
                self.wrapped = GradSampleModuleExpandedWeights(module, loss_reduction="sum")
            case _:
                self.wrapped = GradSampleModuleFastGradientClipping(
                    module, loss_reduction="sum", max_grad_norm=MECHANISM.clip_norm
                )
        self.weights = list(trainable_parameters(module).values())
        kind = DPOptimizerFastGradientClipping if mode == "ghost" else DPOptimizer
        self.optimiser = kind(
            torch.optim.SGD(self.weights, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=MECHANISM.clip_norm,
            expected_batch_size=1,
            loss_reduction="sum",
        )

    def __call__(self) -> list[Tensor]:
        self.optimiser.zero_grad()
        losses = self.case.loss(self.wrapped, *self.case.rows())
        if self.mode == "ghost":
            DPTensorFastGradientClipping(self.wrapped, self.optimiser, losses, "sum").backward()
        else:
            torch.autograd.backward(losses.sum())
        self.optimiser.pre_step()
        return [weight.grad.clone() for weight in self.weights if weight.grad is not None]

    def with_noise(self) -> None:
        self.optimiser.noise_multiplier = MECHANISM.sigma


def variants(case: Case) -> dict[str, Callable[[], Step]]:
    """Everything that is measured, by name; built when called, because Opacus may refuse."""
    steps: dict[str, Callable[[], Step]] = {"non-private": lambda: plain(case)}
    steps["non-private, 32 at once"] = lambda: plain_in_parts(case, 32)
    for microbatch in (16, 32, 64):
        steps[f"ours, {microbatch} at once"] = lambda m=microbatch: ours(case, m)  # type: ignore[misc]
    for microbatch in (16, 32, 64):
        steps[f"vmap, {microbatch} at once"] = lambda m=microbatch: whole(case, m)  # type: ignore[misc]
    for mode in ("hooks", "functorch", "expanded weights", "ghost"):
        steps[f"opacus {mode}"] = lambda m=mode: Opacus(case, m)  # type: ignore[misc]
    steps["loop"] = lambda: loop(case)
    return steps


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    network: str
    variant: str
    ratio: float | None = None  # median over rounds, to the non-private step of the same round
    seconds: float | None = None  # median, CPU seconds of the thread
    peak: float | None = None  # MiB of a process that does nothing else
    note: str = ""  # refused, or wrong


def norm(parts: list[Tensor]) -> float:
    return float(torch.stack([part.double().norm() for part in parts]).norm())


def fault(case: Case, step: Step, expected: list[Tensor]) -> str:
    """How a clipped sum differs from the loop's; nothing if it does not."""
    got = [part.clone() for part in step()]
    off = norm([a - b for a, b in zip(got, expected, strict=True)]) / norm(expected)
    return "" if off < 1e-3 else f"wrong: off by {off:.1%} of the sum"


def measure(name: str, case: Case, rounds: int) -> list[Result]:
    """All variants in turn; the loop in the first round only."""
    expected = loop(case)()
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for variant, build in variants(case).items():
        try:
            step = build()
            notes[variant] = "" if variant.startswith("non-private") else fault(case, step, expected)
        except Exception as error:  # whatever a foreign library raises is its refusal
            notes[variant] = f"refused: {' '.join(str(error).split()).removeprefix(_WRAPPED)[:80]}"
            continue
        if isinstance(step, Opacus):
            step.with_noise()
        private = variant.startswith(("ours", "vmap", "loop"))
        steps[variant] = (lambda s=step: noised(s())) if private else step  # type: ignore[misc]
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for number in range(rounds):
        for variant, step in steps.items():
            if variant != "loop" or number == 0:
                started = time.thread_time()
                step()
                seconds[variant].append(time.thread_time() - started)
    first = seconds["non-private"]
    results = []
    for variant, note in notes.items():
        if variant not in steps:
            results.append(Result(network=name, variant=variant, note=note))
            continue
        ratios = [a / b for a, b in zip(seconds[variant], first, strict=False)]
        results.append(
            Result(
                network=name,
                variant=variant,
                ratio=statistics.median(ratios),
                seconds=statistics.median(seconds[variant]),
                note=note,
            )
        )
    return results


def peak_of(name: str, variant: str, batch: int) -> float:
    """MiB of a process of its own that takes two steps."""
    command = [sys.executable, __file__, "--networks", name, "--batch", str(batch), "--one", variant]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(completed.stdout.split()[-1])


def photos_of(batch: int) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=STREAMS.generator("photos"))


def step_table(names: list[str], batch: int, rounds: int, memory: bool) -> list[dict[str, object]]:
    """Print ratios, network by network."""
    heads = ["network", "step", "ratio", *(["peak MiB"] if memory else []), ""]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    rows: list[dict[str, object]] = []
    for name in names:
        case = NETWORKS[name](photos_of(batch))
        for result in measure(name, case, rounds):
            cells = [name, result.variant, "" if result.ratio is None else f"{result.ratio:.2f}"]
            row = asdict(result)
            if memory:
                row["peak"] = None if result.ratio is None else peak_of(name, result.variant, batch)
                cells.append("" if row["peak"] is None else f"{row['peak']:.0f}")
            print("| " + " | ".join([*cells, result.note]) + " |", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory too, one process for each row")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.one:
        step = variants(NETWORKS[options.networks[0]](photos_of(options.batch)))[options.one]()
        step(), step()
        # Not getrusage, which counts what the parent held when it made this process.
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
        print(int(status.split()[0]) / 1024)
        return
    rows = step_table(options.networks, options.batch, options.rounds, options.memory)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
