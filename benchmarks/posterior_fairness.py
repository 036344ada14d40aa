"""Do posterior samples keep the shares of groups, and does PULSE?

    python benchmarks/posterior_fairness.py [--photos 150] [--faces 2] [--methods pulse langevin ...]
                                            [--measurements 4 16] [--mixing] [--seed 0] [--workers 1]

Originals are samples of each model's own prior, so that a perfect posterior sampler must return every group as often
as it came (PR), turn as many faces from light to dark as from dark to light (SPE), and make faces that are as far from
the original as two of its faces for one photo are from each other: given the photo, original and samples are
exchangeable. Groups are the halves of the Monk scale, read from pixels. Photos are measured 4 times smaller (PULSE's
bicubic, noise 0.02) and 16 times smaller (means of blocks, noise 0.1: 2 x 2 pixels, where tone is often open). PULSE
stops at the consistency error of that noise. Chains for 2 x 2 pixels are shorter than the default, which
is made for 4 times smaller. With --mixing, chains of four photos are followed instead, for several lengths of a move
and equal numbers of gradients.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedface.audits.bias import DARKER_FROM, HALVES, confusion, fairness_metrics
from fedface.audits.group_metrics import mean_interval, rates_by_group
from fedface.models.checkpoint import load_flow, load_gan
from fedface.models.fast_stylegan2 import prepare_for_search
from fedface.models.generator_protocol import Generator, sample
from fedface.models.rectified_flow import RectifiedFlow
from fedface.models.stylegan2 import StyleGAN2
from fedface.photos.skin_tone import measure_tone
from fedface.randomness import Streams
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Area, BicubicPulse, Degradation
from fedface.upsampling.flow_posterior import GuidedFlowConfig, GuidedFlowUpsampler
from fedface.upsampling.latent_hmc import HmcConfig, HmcUpsampler
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.upsampling.upsampler import StepSnapshot, Upsampler, squared_difference

HEADS = (
    "method",
    "dark, originals",
    "dark, generated",
    "made minus originals",
    "SPE",
    "light stays light",
    "dark stays dark",
    "apart: two faces / face and original",
    "fits",
    "CPU s a face",
)
MIXING = (
    "leapfrog steps per transition",
    "directions of the metric",
    "accepted",
    "consistency error / noise^2 at the end",
    "R-hat of means of 8 x 8 pixels, median / largest",
    "R-hat of Monk tone, median / largest",
)


@dataclass(frozen=True)
class Measurement:
    """How photos come about."""

    degradation: Degradation
    noise: float  # standard deviation of a measured value
    chains: HmcConfig  # long enough for a posterior of that width

    def photos(self, faces: Images, stream: torch.Generator) -> LowImages:
        """Not clamped, so that the noise is normal."""
        low = self.degradation.apply(faces)
        return low + self.noise * torch.randn(low.shape, generator=stream)


MEASUREMENTS = {
    4: Measurement(BicubicPulse(4), 0.02, HmcConfig(noise_std=0.02)),
    16: Measurement(
        Area(16),
        0.1,
        HmcConfig(noise_std=0.1, noise_levels=6, transitions=2, final_transitions=8, leapfrog_steps=10),
    ),
}


@dataclass(frozen=True)
class Row:
    """A method and the model that draws its originals."""

    title: str
    prior: Generator
    make: Callable[[Measurement, Streams], Upsampler]


def rows(workers: int) -> dict[str, Row]:
    """By the name that the command line gives."""
    base, flow = load_gan().network(StyleGAN2), load_flow().network(RectifiedFlow)
    prepared = prepare_for_search(base)

    def pulse(seen: Measurement, streams: Streams) -> Upsampler:
        return PulseUpsampler(
            base, seen.degradation, PulseConfig(eps=seen.noise**2, workers=workers), streams
        )

    def fitted(seen: Measurement, streams: Streams) -> Upsampler:
        # Far below the noise: close to the best fit, as published searches are.
        config = PulseConfig(eps=seen.noise**2 / 20, workers=workers)
        return PulseUpsampler(base, seen.degradation, config, streams)

    def langevin(seen: Measurement, streams: Streams) -> Upsampler:
        config = replace(seen.chains, workers=workers)
        return HmcUpsampler(base, seen.degradation, config, streams)

    def guidance(seen: Measurement, streams: Streams) -> Upsampler:
        config = GuidedFlowConfig(noise_std=seen.noise, workers=workers)
        return GuidedFlowUpsampler(flow, seen.degradation, config, streams)

    def isotropic(seen: Measurement, streams: Streams) -> Upsampler:
        config = GuidedFlowConfig(noise_std=seen.noise, covariance="isotropic", workers=workers)
        return GuidedFlowUpsampler(flow, seen.degradation, config, streams)

    return {
        "pulse": Row("PULSE, stops at the noise", prepared, pulse),
        "fitted": Row("PULSE, fits the noise", prepared, fitted),
        "langevin": Row("HMC", prepared, langevin),
        "guidance": Row("Guided flow, moments", flow, guidance),
        "isotropic": Row("Guided flow, isotropic", flow, isotropic),
    }


def halves(images: Images) -> list[str]:
    """Of each face."""
    return [HALVES[int(monk >= DARKER_FROM)] for monk in measure_tone(images).monk.tolist()]


def line(row: Row, seen: Measurement, photos: int, faces: int, streams: Streams) -> list[str]:
    """One row of the table."""
    originals = sample(row.prior, photos, streams.generator("originals"))
    low = seen.photos(originals, streams.generator("noise"))
    begun = time.process_time()
    found = row.make(seen, streams).upsample(low, faces_per_photo=faces)
    seconds = (time.process_time() - begun) / (photos * faces)
    true, made = halves(originals), halves(found.images.flatten(0, 1))
    metrics = fairness_metrics(confusion([name for name in true for _ in range(faces)], made, HALVES), HALVES)
    stays = shares(
        [a == b for a, b in zip([n for n in true for _ in range(faces)], made, strict=True)], faces
    )
    unchanged = rates_by_group(stays, true, expected=HALVES)
    is_dark = torch.tensor([name == "darker" for name in true]).double()
    made_dark = shares([name == "darker" for name in made], faces)
    rng = streams.numpy("resamples")
    change = mean_interval((made_dark - is_dark).numpy(), rng)
    return [
        row.title,
        str(mean_interval(is_dark.numpy(), rng)),
        str(mean_interval(made_dark.numpy(), rng)),
        f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
        f"{metrics.spe:.3f}",
        str(unchanged["lighter"]),
        str(unchanged["darker"]),
        apart(found.images, originals) if faces > 1 else "-",
        f"{float(found.converged.double().mean()):.2f}",
        f"{seconds:.2f}",
    ]


def shares(flags: Sequence[bool], faces: int) -> Tensor:
    """Of each photo's faces, (n,)."""
    return torch.tensor(flags).double().view(-1, faces).mean(dim=1)


def apart(made: Images, originals: Images) -> str:
    """Mean squared differences in 1e-3, pictures in [0, 1]; equal for a posterior sampler."""
    pair = squared_difference(made[:, 0], made[:, 1]).mean() * 1e3
    truth = (
        squared_difference(made[:, 0], originals) + squared_difference(made[:, 1], originals)
    ).mean() * 500
    return f"{float(pair):.2f} / {float(truth):.2f}"


def mixing(seen: Measurement, streams: Streams, *, leaps: int, rank: int) -> str:
    """Acceptance and R-hat (Gelman & Rubin 1992) of 4 chains a photo, for equal numbers of gradients."""
    prepared, photos, chains = prepare_for_search(load_gan().network(StyleGAN2)), 4, 4
    low = seen.photos(
        sample(prepared, photos, streams.generator("mixing")), streams.generator("mixing/noise")
    )
    config = HmcConfig(
        noise_std=seen.noise,
        leapfrog_steps=leaps,
        rank=rank,
        transitions=48 // leaps,
        final_transitions=640 // leaps,
        noise_levels=12,
    )
    colours: list[Tensor] = []
    monks: list[Tensor] = []
    consistency_errors: list[Tensor] = []

    def look(snapshot: StepSnapshot) -> None:
        if snapshot.step > config.noise_levels * config.transitions:
            images = snapshot.images.clamp(0, 1)
            colours.append(torch.nn.functional.avg_pool2d(images, 8).flatten(1))
            monks.append(measure_tone(images).monk[:, None])
            consistency_errors.append(snapshot.consistency_error)

    sampler = HmcUpsampler(load_gan().generator, seen.degradation, config, streams, watch=look)
    found = sampler.upsample(low, faces_per_photo=chains)
    moved = torch.stack(consistency_errors)
    accepted = float((moved[1:] != moved[:-1]).double().mean())
    cells = [
        f"{leaps}",
        f"{rank}",
        f"{accepted:.2f}",
        f"{float(found.consistency_error.mean()) / seen.noise**2:.2f}",
    ]
    for trace in (colours, monks):
        apart = r_hat(torch.stack(trace).view(config.final_transitions, photos, chains, -1))
        cells.append(f"{float(apart.median()):.2f} / {float(apart.max()):.2f}")
    return "| " + " | ".join(cells) + " |"


def r_hat(trace: Tensor) -> Tensor:
    """Of traces (moves, photos, chains, metrics): (photos, metrics), 1 where chains agree."""
    within = trace.var(dim=0).mean(dim=1)
    between = trace.mean(dim=0).var(dim=1)
    count = trace.shape[0]
    return (((count - 1) / count * within + between) / within.clamp(min=1e-12)).sqrt()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=150)
    parser.add_argument("--faces", type=int, default=2)
    parser.add_argument(
        "--methods", nargs="*", default=["pulse", "fitted", "langevin", "guidance", "isotropic"]
    )
    parser.add_argument("--measurements", nargs="*", type=int, default=[4, 16], choices=sorted(MEASUREMENTS))
    parser.add_argument("--mixing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    streams = Streams(asked.seed)
    known = rows(asked.workers)
    for factor in asked.measurements:
        seen = MEASUREMENTS[factor]
        print(
            f"\n{factor} times smaller, noise {seen.noise}, {asked.photos} photos x {asked.faces} faces\n",
            flush=True,
        )
        if asked.mixing:
            print("| " + " | ".join(MIXING) + " |\n|" + "---|" * len(MIXING), flush=True)
            for leaps, rank in ((16, 64), (16, 0), (4, 64), (1, 64), (1, 0)):
                print(mixing(seen, streams, leaps=leaps, rank=rank), flush=True)
            continue
        print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS), flush=True)
        for name in asked.methods:
            print(
                "| " + " | ".join(line(known[name], seen, asked.photos, asked.faces, streams)) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
