"""Posterior sampling in a generator's latents by Hamiltonian Monte Carlo.

Where PULSE searches for a face that fits, this samples from p(latents | photo): a face that is twice as likely is
returned twice as often. So it satisfies conditional proportional representation and symmetric pairwise error (Jalal et
al. 2021, theorem 4.3), for every grouping at once and without knowing the groups, as far as the generator's own faces
are distributed like people's.

The target is exp(-|A G(z) - y|^2 / (2 s^2) - |z|^2 / 2): z standard normal, through the generator's own mapping (not
the normal distribution that PULSE fits to styles, which is another prior); s the noise of the measurement; the sum
over all m measured values. Chains start from the prior and follow the noise level from 1 down to s.

Source: Jalal et al. 2021 (arXiv:2106.12182), section 5 and its appendix on experiments, which `HmcConfig.paper()`
follows: unadjusted steps of 5e-6 (s_t / s)^2. The default instead runs Hamiltonian trajectories that are accepted or
rejected as a whole, so that no step size biases the samples, in a metric: the posterior of a face is some fifty times
narrower along the latents that a photo determines than along the others, and it is curved, so that single steps hardly
move. docs/posterior.md measures what leapfrog steps and metric give for equal CPU time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from scipy import stats
from torch import Tensor

from fedface.models.fast_stylegan2 import prepare_for_search
from fedface.models.generator_protocol import Generator
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2
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
from fedface.upsampling.parallel import ProgressAggregator, map_in_threads, partition_batch
from fedface.upsampling.upsampler import (
    Progress,
    StepCallback,
    StepSnapshot,
    Upsampled,
    by_photo,
    check_low,
    join,
)
from fedface.validation import Above, AtLeast, checked

CONVERGED = 0.999  # a chain that misses the photo by more than this quantile of the noise has not arrived
ACCEPT = 0.8  # the share of moves that the adaptation of step lengths aims at
ADAPT = 0.7  # how fast the logarithm of a step length follows
AVERAGED = 24  # draws of the prior behind a metric
JITTER = 0.3  # steps differ by up to this share between moves, so that no trajectory closes on itself


@dataclass(frozen=True, kw_only=True)
@checked
class HmcConfig:
    """Settings of the chains; none depends on the size of the generator.

    The metric comes from the prior, and step lengths adapt during the annealing alone. The `final` moves are those of
    one fixed Markov chain whose stationary distribution is the posterior itself.
    """

    kind: ClassVar[str] = "hmc"

    # Std of what separates photos from the model; the noise is hypot(this, degradation's).
    noise_std: Annotated[float, AtLeast(0)] = 0.02
    start_std: Annotated[float, Above(0)] = 1.0  # noise of the first level
    noise_levels: Annotated[int, AtLeast(1)] = 12  # from there down to the noise, geometrically
    transitions: Annotated[int, AtLeast(1)] = 3  # at each level
    final_transitions: Annotated[int, AtLeast(0)] = 12  # moves at the noise itself with everything fixed
    leapfrog_steps: Annotated[int, AtLeast(1)] = 16  # gradients in one move; 1 is Langevin
    # Length of the first leaps, in posterior standard deviations; then adapted.
    step: Annotated[float, Above(0)] = 0.3
    rank: Annotated[int, AtLeast(0)] = 64  # most directions of the metric, which is prepared once; 0 is none
    correction: Literal["metropolis", "none"] = (
        "metropolis"  # none: published steps, never refused or adapted
    )
    noise: Literal["fixed", "sampled"] = "fixed"  # the generator's own maps, or maps drawn with the latents
    faces_at_once: Annotated[int, AtLeast(1)] = 64  # chains side by side, bounds the memory of one worker
    workers: Annotated[int, AtLeast(1)] = 1  # threads, each with chains of its own

    def __post_init__(self) -> None:
        if self.correction == "none" and (self.leapfrog_steps, self.rank, self.final_transitions) != (
            1,
            0,
            0,
        ):
            raise ValueError(
                f"correction none needs leapfrog_steps 1, rank 0 and final_transitions 0, got "
                f"{self.leapfrog_steps}, {self.rank}, {self.final_transitions}"
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
    """Annealed Markov chains over latents; an `Upsampler`.

    Noise maps are the generator's fixed ones unless the config says otherwise: they are part of its weights, and the
    faces that `generator_protocol.sample` draws, whose shares of groups the sampler should reproduce, have them too. A
    StyleGAN2 is sampled as constants (`models/fast_stylegan2`): later changes of its synthesis do not reach the chains.
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
        """Prepare the weights.

        Args:
            generator: Any family. With a flow, whose latents are whole pictures, choose a low `rank`.
            degradation: What the photos went through.
            config: How to sample.
            streams: Where chains get their chance from, each a stream of its own.
            progress: Called after every transition with how far all chains are.
            watch: Shown the faces after every move.

        Raises:
            ValueError: The degradation does not go with the generator's size, or nothing is noisy.
        """
        degradation.low_side(generator.size)  # raises where it does not fit
        self.generator = generator
        self.degradation = degradation
        self.config = config
        self.noise = measurement_noise(degradation, config.noise_std)
        self._streams = streams
        self._progress, self._watch = progress, watch
        self._exact = _constants(generator)
        self._map = generator.map if isinstance(generator, ClassConditioned) else self._exact.map
        self._sides = generator.noise_sides if config.noise == "sampled" else ()
        self._width = generator.latent_width + sum(side**2 for side in self._sides)
        self._metric = self._averaged(streams.generator("langevin/metric"))

    @property
    def size(self) -> int:
        """Height and width of the faces that are drawn."""
        return self.generator.size

    @property
    def low_size(self) -> int:
        """Height and width of the photos that this sampler takes."""
        return self.degradation.low_side(self.generator.size)

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """Draw faces from each photo's posterior, one chain for each.

        Guarantees:
            * A chain's answer is its last state, whatever others it passed.
            * Face i of a call is the same whatever `faces_at_once` and `workers` are (up to rounding).
            * `consistency error` belongs to the returned image, clamped to [0, 1].
            * The generator's weights, and whether they ask for gradients, are as before.

        Args:
            low: (n, 3, low_size, low_size) sRGB, nominally in [0, 1].
            faces_per_photo: Independent samples for each photo, >= 1.

        Returns:
            (n, f) faces; not converged where the consistency error exceeds `consistency_bound`: the chain has not
            converged, or no face of the generator fits.

        Raises:
            ValueError: The photos have another size or hold values that are not finite.
        """
        check_low(low, self.low_size, faces_per_photo)
        targets = low.detach().float().repeat_interleave(faces_per_photo, dim=0)
        places = partition_batch(len(targets), self.config.workers, self.config.faces_at_once)
        tally = ProgressAggregator(len(places), self.config.steps, self._progress, self._watch)
        joined = join(
            map_in_threads(
                iter(enumerate(places)),
                lambda chunk: self._sample(chunk[0], chunk[1], targets[chunk[1]], tally),
                self.config.workers,
            )
        )
        return by_photo(joined, faces_per_photo)

    def _draw(self, x: Tensor) -> Images:
        """Faces of flat states: latents, then noise maps where those are sampled."""
        z = self.generator.latent_width
        latents, *maps = torch.split(x, [z, *(side**2 for side in self._sides)], dim=1)
        noise = [m.view(-1, 1, side, side) for m, side in zip(maps, self._sides, strict=True)]
        return self._exact.synthesize(self._map(latents), noise or None)

    def _averaged(self, rng: torch.Generator) -> Metric:
        """Of the prior alone, so that chains owe it nothing."""
        if not self.config.rank:
            return Metric.identity(self._width)
        nothing = torch.zeros(1, 3, self.low_size, self.low_size)
        states = torch.randn(AVERAGED, self._width, generator=rng)
        measured = ForwardModel(self._draw, self.degradation.apply, nothing)
        return gauss_newton(measured, states, self.config.rank, rng)

    def _sample(self, place: int, faces: Tensor, target: LowImages, tally: ProgressAggregator) -> Upsampled:
        """The last states (m, 1, 3, s, s) of m chains; the chunk is number `place`."""
        if not len(faces):
            return self._found(target.new_zeros(0, 3, self.size, self.size), target.new_zeros(0))
        values = target[0].numel()
        rngs = PerChainRng([self._streams.generator(f"langevin/{face}") for face in faces.tolist()])
        measured = ForwardModel(self._draw, self.degradation.apply, target)
        point, step = measured.point(rngs.normals(self._width)), 0

        def shown(moved: Transition) -> Point:
            nonlocal step
            step += 1
            consistency_error = moved.point.energy * 2 / values
            tally.step(
                place,
                StepSnapshot(
                    step=step,
                    steps=self.config.steps,
                    faces=faces,
                    images=moved.point.images,
                    consistency_error=consistency_error,
                ),
            )
            return moved.point

        walk = self._drifting if self.config.correction == "none" else self._moving
        point = walk(measured, point, rngs, shown)
        return self._found(point.images, point.energy * 2 / values)

    def _found(self, images: Images, consistency_error: Tensor) -> Upsampled:
        values = 3 * self.low_size**2
        consistency_error = consistency_error.nan_to_num(nan=math.inf)
        fits = consistency_error <= consistency_bound(self.noise, values)
        return Upsampled(
            images=images.nan_to_num(0.0)[:, None],
            consistency_error=consistency_error[:, None],
            converged=fits[:, None],
            steps=self.config.steps,
        )

    def _noises(self) -> list[float]:
        """Of each level; never below the noise itself."""
        first, count = max(self.config.start_std, self.noise), self.config.noise_levels
        ratio = self.noise / first
        return [first * ratio ** (level / max(count - 1, 1)) for level in range(count - 1)] + [self.noise]

    def _drifting(
        self, measured: ForwardModel, point: Point, rngs: PerChainRng, shown: Callable[[Transition], Point]
    ) -> Point:
        """Published: steps in proportion to the noise of the level."""
        for s in self._noises():
            for _ in range(self.config.transitions):
                step = self.config.step * s / self.noise
                point = shown(ula_step(measured, point, s, step=step, rngs=rngs))
        return point

    def _moving(
        self, measured: ForwardModel, point: Point, rngs: PerChainRng, shown: Callable[[Transition], Point]
    ) -> Point:
        """Adjusted moves in a metric: both adapt level by level, then stay as they are."""
        config = self.config
        step, before = point.energy.new_full(point.energy.shape, config.step), 0.0

        def moved(s: float) -> Transition:
            jittered = step * (1 + JITTER * (2 * rngs.uniforms() - 1))
            return hmc_step(
                measured,
                point,
                self._metric,
                s,
                step=jittered,
                leapfrog_steps=config.leapfrog_steps,
                rngs=rngs,
            )

        for s in self._noises():
            if before and not config.rank:
                step = step * (s / before)  # nothing else knows that the posterior gets narrower
            before = s
            for _ in range(config.transitions):
                result = moved(s)
                point, step = (
                    shown(result),
                    step * torch.exp(ADAPT * (result.acceptance_probability - ACCEPT)),
                )
        for _ in range(config.final_transitions):
            point = shown(moved(self.noise))
        return point


def _constants(generator: Generator) -> Generator:
    """The synthesis of a generator in the form that is fastest with gradients; other families as they are."""
    match generator:
        case ClassConditioned():
            return prepare_for_search(generator.generator)
        case StyleGAN2():
            return prepare_for_search(generator)
        case _:
            return generator
