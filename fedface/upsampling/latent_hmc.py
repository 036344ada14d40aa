"""Posterior sampling in a generator's latents by Hamiltonian Monte Carlo.

Where PULSE searches for a face that fits, this samples from p(latents | photo), so that it satisfies conditional
proportional representation and symmetric pairwise error (Jalal et al. 2021, theorem 4.3), for every grouping at once
and without knowing the groups, as far as the generator's own faces are distributed like people's.

The target is exp(-|A G(z) - y|^2 / (2 s^2) - |z|^2 / 2): z standard normal, through the generator's own mapping (not
the normal distribution that PULSE fits to styles, which is another prior); s the noise of the measurement; the sum
over all m measured values. Chains start from the prior and follow the noise level from 1 down to s.

Source: Jalal et al. 2021 (arXiv:2106.12182), section 5 and its appendix on experiments, which `HmcConfig.paper()`
follows: unadjusted steps of 5e-6 (s_t / s)^2. The default instead runs Hamiltonian trajectories that are accepted or
rejected as a whole, so that no step size biases the samples, in a metric, since the posterior of a face is some fifty
times narrower along the latents that a photo determines than along the others (docs/posterior.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from scipy import stats
from torch import Tensor

from fedface.models.fast_stylegan2 import frozen_copy
from fedface.models.generator_protocol import Generator
from fedface.randomness import Streams
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.mcmc import (
    ForwardModel,
    Metric,
    PerChainRng,
    Point,
    Transition,
    gauss_newton,
    hmc_step,
    ula_step,
)
from fedface.upsampling.parallel import Chunk, search_in_chunks
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampled, check_low, single_faces
from fedface.validation import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

CONVERGED = 0.999  # quantile of the noise: a chain with a larger consistency error has not converged
ACCEPT = 0.8  # the share of moves that the adaptation of step lengths aims at
ADAPT = 0.7  # how fast the logarithm of a step length follows
AVERAGED = 24  # draws of the prior behind a metric
JITTER = 0.3  # steps differ by up to this share between moves, so that no trajectory closes on itself


@dataclass(frozen=True, kw_only=True)
@checked
class HmcConfig:
    """Settings of the chains; none depends on the size of the generator.

    The metric comes from the prior, and step lengths adapt during the annealing alone. The `final_transitions` are
    those of one fixed Markov chain whose stationary distribution is the posterior itself.
    """

    kind: ClassVar[str] = "hmc"

    # Std of what separates photos from the model; the noise is hypot(this, degradation's).
    noise_std: NonNegativeFloat = 0.02
    start_std: PositiveFloat = 1.0  # noise of the first level
    noise_levels: PositiveInt = 12  # from there down to the noise, geometrically
    transitions: PositiveInt = 3  # at each level
    final_transitions: NonNegativeInt = 12  # moves at the noise itself with everything fixed
    leapfrog_steps: PositiveInt = 16  # gradients in one move; 1 is Langevin
    # Length of the first leapfrog steps, in posterior standard deviations; then adapted.
    step: PositiveFloat = 0.3
    rank: NonNegativeInt = 64  # most directions of the metric, which is prepared once; 0 is none
    # none: published steps, never rejected or adapted
    correction: Literal["metropolis", "none"] = "metropolis"
    noise: Literal["fixed", "sampled"] = "fixed"  # the generator's own maps, or maps sampled with the latents
    faces_at_once: PositiveInt = 64  # chains side by side, bounds the memory of one worker
    workers: PositiveInt = 1  # threads, each with chains of its own

    def __post_init__(self) -> None:
        numbers = (self.leapfrog_steps, self.rank, self.final_transitions)
        if self.correction == "none" and numbers != (1, 0, 0):
            raise ValueError(
                "correction none needs leapfrog_steps 1, rank 0 and final_transitions 0, got "
                f"{', '.join(map(str, numbers))}"
            )

    @property
    def steps(self) -> int:
        """Moves of one chain."""
        return self.noise_levels * self.transitions + self.final_transitions

    @staticmethod
    def paper() -> HmcConfig:
        """As published: 500 levels of 3 unadjusted steps, noise maps sampled.

        Their step 5e-6 is the gradient's factor at the last level; ours is the length of the noise, sqrt(2 * 5e-6).
        """
        return HmcConfig(
            noise_levels=500,
            transitions=3,
            final_transitions=0,
            leapfrog_steps=1,
            step=math.sqrt(1e-5),
            rank=0,
            correction="none",
            noise="sampled",
        )


def measurement_noise(degradation: Degradation, spread: float) -> float:
    """The standard deviation s of one measured value: hypot of the degradation's own noise and `spread`.

    Raises:
        ValueError: Both are 0: no sampler can meet a photo exactly.
    """
    s = math.hypot(degradation.noise_std, spread)
    if s == 0:
        raise ValueError("spread must be > 0 where the degradation adds no noise, got 0")
    return s


def consistency_bound(s: float, values: int) -> float:
    """The consistency error that a posterior sample stays below in 999 of 1,000 photos.

    The true face and a posterior sample are exchangeable given the photo, so the sample's residual is distributed like
    the noise: m * consistency error / s^2 is chi-squared with m degrees of freedom, over photos of the model.

    Args:
        s: Standard deviation of the noise of a measured value, > 0.
        values: How many were measured, m >= 1.
    """
    return s**2 * float(stats.chi2.ppf(CONVERGED, values)) / values


class HmcUpsampler:
    """Annealed Markov chains over latents of a frozen copy of the generator; an `Upsampler`.

    Noise maps are the generator's fixed ones unless the config says otherwise: they are part of its weights, and the
    faces of `generator_protocol.sample`, whose shares of groups the sampler should reproduce, have them too.
    """

    def __init__(
        self,
        generator: Generator,
        degradation: Degradation,
        config: HmcConfig,
        streams: Streams,
        *,
        progress: Progress | None = None,
        watch: StepCallback | None = None,
    ) -> None:
        """Arguments as for `methods.make_upsampler`.

        Args:
            generator: Any family. With a flow, whose latents are whole images, choose a low `rank`.

        Raises:
            ValueError: The degradation does not support the generator's size, or nothing is noisy.
        """
        self.size, self.low_size = generator.size, degradation.low_side(generator.size)
        self.degradation, self.config = degradation, config
        self.noise = measurement_noise(degradation, config.noise_std)
        self._streams, self._progress, self._watch = streams, progress, watch
        self._generator = frozen_copy(generator)
        self._sides = generator.noise_sides if config.noise == "sampled" else ()
        self._width = generator.latent_width + sum(side**2 for side in self._sides)
        self._metric = self._average_metric(streams.generator("langevin/metric"))

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """Independent samples of each photo's posterior, see `Upsampler.upsample`: the last states of chains.

        Not converged where the consistency error exceeds `consistency_bound`: the chain has not converged, or no
        face of the generator fits.
        """
        check_low(low, self.low_size, faces_per_photo)
        return search_in_chunks(
            low.detach().float().repeat_interleave(faces_per_photo, dim=0),
            faces_per_photo,
            self.config,
            lambda faces: PerChainRng([self._streams.generator(f"langevin/{i}") for i in faces.tolist()]),
            self._sample,
            progress=self._progress,
            watch=self._watch,
        )

    def _draw(self, x: Tensor) -> Images:
        """Faces of flat states: latents, then noise maps where those are sampled."""
        z = self._generator.latent_width
        latents, *maps = torch.split(x, [z, *(side**2 for side in self._sides)], dim=1)
        noise = [m.view(-1, 1, side, side) for m, side in zip(maps, self._sides, strict=True)]
        return self._generator.synthesize(self._generator.map(latents), noise or None)

    def _average_metric(self, rng: torch.Generator) -> Metric:
        """Averaged over the prior alone, so that it does not depend on the chains."""
        if not self.config.rank:
            return Metric.identity(self._width)
        nothing = torch.zeros(1, 3, self.low_size, self.low_size)
        states = torch.randn(AVERAGED, self._width, generator=rng)
        measured = ForwardModel(self._draw, self.degradation.apply, nothing)
        return gauss_newton(measured, states, self.config.rank, rng)

    def _sample(self, chunk: Chunk[PerChainRng]) -> Upsampled:
        """The last states of m chains."""
        values = 3 * self.low_size**2
        bound = consistency_bound(self.noise, values)
        if not len(chunk.faces):
            none = chunk.target.new_zeros(0, 3, self.size, self.size)
            return single_faces(none, chunk.target.new_zeros(0), bound, self.config.steps)
        forward = ForwardModel(self._draw, self.degradation.apply, chunk.target)
        start = forward.point(chunk.start.normals(self._width))
        move = self._langevin if self.config.correction == "none" else self._metropolis
        for step, point in enumerate(move(forward, start, chunk.start), 1):
            chunk.step(step, point.images, point.energy * 2 / values)
        error = (point.energy * 2 / values).nan_to_num(nan=math.inf)
        return single_faces(point.images.nan_to_num(0.0), error, bound, self.config.steps)

    def _noises(self) -> list[float]:
        """Of each level; never below the noise itself."""
        first, count = max(self.config.start_std, self.noise), self.config.noise_levels
        ratio = self.noise / first
        return [first * ratio ** (level / max(count - 1, 1)) for level in range(count - 1)] + [self.noise]

    def _langevin(self, forward: ForwardModel, point: Point, rngs: PerChainRng) -> Iterator[Point]:
        """Published: unadjusted steps in proportion to the noise of the level."""
        for s in self._noises():
            for _ in range(self.config.transitions):
                step = self.config.step * s / self.noise
                point = ula_step(forward, point, s, step=step, rngs=rngs).point
                yield point

    def _metropolis(self, forward: ForwardModel, point: Point, rngs: PerChainRng) -> Iterator[Point]:
        """Adjusted moves in a metric; step lengths adapt level by level, then stay as they are."""
        config = self.config
        step, before = point.energy.new_full(point.energy.shape, config.step), 0.0

        def move(s: float) -> Transition:
            jittered = step * (1 + JITTER * (2 * rngs.uniforms() - 1))
            leaps = config.leapfrog_steps
            return hmc_step(forward, point, self._metric, s, step=jittered, leapfrog_steps=leaps, rngs=rngs)

        for s in self._noises():
            if before and not config.rank:
                step = step * (s / before)  # no metric accounts for the narrower posterior
            before = s
            for _ in range(config.transitions):
                point, probability = move(s)
                step = step * torch.exp(ADAPT * (probability - ACCEPT))
                yield point
        for _ in range(config.final_transitions):
            point = move(self.noise).point
            yield point
