"""PULSE: search a generator's latents for faces whose degraded image is the given photo.

It takes any generator and any known degradation. Many faces are searched at once; because Adam works coordinate by
coordinate, that is the same search as one after the other. A face leaves the batch as soon as it fits.

Source: Menon et al. 2020 (arXiv:2003.03808) and its published code, which `PulseConfig.paper()` follows step by
step. Corrected otherwise: each face is compared with the tolerance on its own, a search ends when its face fits,
the best face is returned and not the last, and a search that fails is a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.models.fast_stylegan2 import frozen_copy
from fedface.models.generator_protocol import Generator
from fedface.randomness import Streams
from fedface.tensor_types import LowImages, Styles
from fedface.upsampling.candidate_selection import CandidateScorer, CandidateSelector
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.parallel import Chunk, search_in_chunks
from fedface.upsampling.spherical_adam import SphericalAdam, one_cycle_drop
from fedface.upsampling.style_gaussian import fit_style_gaussian
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampled, check_low, squared_difference
from fedface.validation import AtLeast, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

Start = Callable[[LowImages], Styles]  # photos (n, 3, lh, lw) -> styles (n, k, v) to begin with


@dataclass(frozen=True, kw_only=True)
@checked
class PulseConfig:
    """Settings of the search; none depends on the size of the generator.

    The tolerance is tighter than the paper's. A fixed tolerance in sRGB is a larger share of a dark face than
    of a light one, so that a loose one lets dark skin stray further towards the mean of the generator.
    """

    kind: ClassVar[str] = "pulse"

    steps: PositiveInt = 100
    learning_rate: PositiveFloat = 0.8  # the peak of the schedule
    eps: PositiveFloat = 5e-4  # a face fits when its mean squared difference (sRGB) is at most this
    l2: NonNegativeFloat = 100.0  # weight of the difference
    geocross: NonNegativeFloat = 0.05  # weight of the spread of the styles of one face
    tile_latent: bool = False  # one latent for all style inputs; otherwise one for each
    trainable_noise: NonNegativeInt = 5  # how many noise maps, coarsest first, are searched as well
    mapping_samples: Annotated[int, AtLeast(2)] = 20_000  # latents sampled to fit the distribution of styles
    stop: Literal["fit", "end"] = "fit"  # when a search stops: its face fits, or all steps are taken
    selection: Literal["best", "last"] = "best"  # which face of a search is its answer
    faces_at_once: PositiveInt = 32  # bounds the memory of one worker
    workers: PositiveInt = 1  # threads that search side by side, each with faces of its own
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # of the search; results are float32

    @staticmethod
    def paper() -> PulseConfig:
        """The published code: 100 steps whatever happens, and the face of the last one."""
        return PulseConfig(
            learning_rate=0.4, eps=2e-3, mapping_samples=1_000_000, stop="end", selection="last"
        )


def geocross(styles: Styles) -> Tensor:
    """How far apart on the sphere the k styles of each face lie: (n, k, v) -> (n,), 0 when they are equal.

    v / 8 times the mean of the squared angle between styles i and j over all pairs, i = j included.
    """
    first, second = styles[:, :, None], styles[:, None]
    apart = ((first - second).square().sum(-1) + 1e-9).sqrt()
    together = ((first + second).square().sum(-1) + 1e-9).sqrt()
    theta = 2 * torch.atan2(apart, together)
    return theta.square().mean(dim=(1, 2)) * styles.shape[-1] / 8


def _halfway(start: Tensor, sampled: Tensor) -> Tensor:
    """Rows between two directions, as long as those of `start`; random ones are nearly orthogonal to any other."""
    between = F.normalize(F.normalize(start, dim=-1) + F.normalize(sampled, dim=-1), dim=-1)
    length: Tensor = start.norm(dim=-1, keepdim=True)
    return between * length


@dataclass(frozen=True)
class _Start:
    """Where the search of a chunk of m faces starts."""

    variables: list[Tensor]  # latents (m, rows, v), then noise maps that are searched
    fixed: list[Tensor]  # the other noise maps


class PulseUpsampler:
    """Search by gradient descent over latents and coarse noise maps; an `Upsampler`. Its generator is a frozen copy."""

    def __init__(
        self,
        generator: Generator,
        degradation: Degradation,
        config: PulseConfig,
        streams: Streams,
        *,
        start: Start | None = None,
        progress: Progress | None = None,
        watch: StepCallback | None = None,
    ) -> None:
        """Arguments as for `methods.make_upsampler`; `watch` is called with the faces that are still searched.

        Args:
            start: Styles for photos, such as an encoder's. The first face of each photo begins with them, the
                others about 45 degrees aside, each in a direction of its own, which made them fit sooner than
                random starts and differ as much. Latents have the length of these styles' latents.

        Raises:
            ValueError: The degradation does not support the generator's size.
        """
        self.size, self.low_size = generator.size, degradation.low_side(generator.size)
        self.degradation, self.config = degradation, config
        self._streams = streams
        self._start, self._progress, self._watch = start, progress, watch
        self._generator = frozen_copy(generator)
        self._quick = (
            self._generator if config.precision == "float32" else frozen_copy(generator, config.precision)
        )
        self._fit = fit_style_gaussian(
            self._generator.map,
            generator.latent_width,
            samples=config.mapping_samples,
            stream=streams.generator("pulse/mapping"),
            slope=generator.style_slope,
        )

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """One search for each face, see `Upsampler.upsample`; photos of float64 need a generator of float64.

        Images are generated in float32 whatever `precision` is. Not converged where the consistency error stayed
        above `eps`.
        """
        check_low(low, self.low_size, faces_per_photo)
        photos = low.detach().to(torch.float64 if low.dtype == torch.float64 else torch.float32)
        return search_in_chunks(
            photos.repeat_interleave(faces_per_photo, dim=0),
            faces_per_photo,
            self.config,
            self._starts(photos, faces_per_photo),
            self._search,
            progress=self._progress,
            watch=self._watch,
        )

    def _start_latents(self, photos: LowImages) -> Tensor:
        """Latents (n, rows, v) of the styles that photos start from; none without `start`."""
        k, v = self._generator.style_inputs, len(self._fit.mean)
        if self._start is None or not len(photos):
            return torch.zeros(0, k, v)
        with torch.no_grad():
            styles = self._start(photos).detach().to(photos)
        if styles.shape != (len(photos), k, v) or not styles.isfinite().all():
            expected = (len(photos), k, v)
            raise ValueError(f"start must give finite styles of shape {expected}, got {tuple(styles.shape)}")
        latents = self._fit.latents(styles)
        return latents.mean(dim=1, keepdim=True) if self.config.tile_latent else latents

    def _starts(self, photos: LowImages, faces_per_photo: int) -> Callable[[Tensor], _Start]:
        """Where searches start, sampled face by face; at or near the styles of `start` if there is one."""
        stream, first = self._streams.generator("pulse/search"), self._start_latents(photos)
        rows = 1 if self.config.tile_latent else self._generator.style_inputs
        sides = self._generator.noise_sides
        searched = min(self.config.trainable_noise, len(sides))

        def starts(faces: Tensor) -> _Start:
            latents = photos.new_empty(len(faces), rows, len(self._fit.mean))
            noise = [photos.new_empty(len(faces), 1, side, side) for side in sides]
            for i, face in enumerate(faces.tolist()):
                for sampled in (latents, *noise):
                    sampled[i] = torch.randn(sampled.shape[1:], generator=stream)
                if len(first):
                    near = first[face // faces_per_photo]
                    latents[i] = _halfway(near, latents[i]) if face % faces_per_photo else near
            if len(noise) > searched:
                noise[-1].zero_()
            return _Start([latents, *noise[:searched]], noise[searched:])

        return starts

    def _styles(self, latents: Tensor) -> Styles:
        styles = self._fit.styles(latents)
        return styles.expand(-1, self._generator.style_inputs, -1)

    def _selector(self, chunk: Chunk[_Start]) -> CandidateSelector:
        scorer = CandidateScorer(
            synthesize=lambda inputs: self._generator.synthesize(self._styles(inputs[0]), inputs[1:]),
            degradation=self.degradation,
            target=chunk.target,
            eps=self.config.eps,
        )
        return CandidateSelector(chunk.start.variables, chunk.start.fixed, scorer, self.config.selection)

    def _loss(self, difference: Tensor, styles: Styles) -> Tensor:
        """Of each face, (m,)."""
        # A face at eps has left the search, unless it takes all steps; then the loss is flat below eps, as published.
        excess = difference if self.config.stop == "fit" else difference.clamp(min=self.config.eps)
        loss = self.config.l2 * excess
        if self.config.geocross and not self.config.tile_latent:
            loss = loss + self.config.geocross * geocross(styles)
        return loss

    def _search(self, chunk: Chunk[_Start]) -> Upsampled:
        config, selector = self.config, self._selector(chunk)
        active, target, fixed = torch.arange(len(chunk.faces)), chunk.target, chunk.start.fixed
        search, step = SphericalAdam(chunk.start.variables, config.learning_rate), 0
        while len(active):
            with torch.enable_grad():
                inputs = [variable.requires_grad_() for variable in search.variables]
                styles = self._styles(inputs[0])
                generated = self._quick.synthesize(styles, [*inputs[1:], *fixed])
                difference = squared_difference(self.degradation.apply(generated), target)
                loss = self._loss(difference, styles).sum()
            step += 1
            selector.offer(active, generated.detach(), inputs)
            chunk.step(step, generated.detach(), difference.detach(), active)
            fits = (
                selector.fit(active) if config.stop == "fit" else torch.zeros_like(active, dtype=torch.bool)
            )
            if step == config.steps or fits.all():
                break
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            search.step(gradients, one_cycle_drop(step - 1, config.steps))
            if fits.any():
                search.keep(~fits)
                active, target, fixed = active[~fits], target[~fits], [noise[~fits] for noise in fixed]
        chunk.progress.end(chunk.place)
        return selector.found(self.size, step)
