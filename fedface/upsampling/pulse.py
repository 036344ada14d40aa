"""PULSE: search a generator's latents for faces whose degraded picture is the given photo.

It takes any generator and any known degradation. Many faces are searched at once; because Adam works coordinate by
coordinate, that is the same search as one after the other. A face leaves the batch as soon as it fits.

Source: Menon et al. 2020 (arXiv:2003.03808) and its published code, which `PulseConfig.paper()` follows step by
step. Corrected otherwise: each face is compared with the tolerance on its own, a search ends when its face fits,
the best face is returned and not the last, and a search that fails is a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, ClassVar, Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedface.models.fast_stylegan2 import prepare_for_search
from fedface.models.generator_protocol import Generator
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2
from fedface.randomness import Streams
from fedface.tensor_types import LowImages, Styles
from fedface.upsampling.candidate_selection import Best, CandidateScorer, CandidateSelector, Last
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.parallel import ProgressAggregator, map_in_threads, partition_batch
from fedface.upsampling.spherical_adam import SphericalAdam, one_cycle_drop
from fedface.upsampling.style_gaussian import fit_style_gaussian
from fedface.upsampling.upsampler import (
    Progress,
    StepCallback,
    StepSnapshot,
    Upsampled,
    by_photo,
    check_low,
    join,
    squared_difference,
)
from fedface.validation import Above, AtLeast, checked

Start = Callable[[LowImages], Styles]  # photos (n, 3, lh, lw) -> styles (n, k, v) to begin with


@dataclass(frozen=True, kw_only=True)
@checked
class PulseConfig:
    """Settings of the search; none depends on the size of the generator.

    The tolerance is tighter than the paper's. A fixed tolerance in sRGB is a larger share of a dark face than
    of a light one, so that a loose one lets dark skin stray further towards the mean of the generator.
    """

    kind: ClassVar[str] = "pulse"

    steps: Annotated[int, AtLeast(1)] = 100
    learning_rate: Annotated[float, Above(0)] = 0.8  # the peak of the schedule
    # A face fits when its mean squared difference (sRGB) is at most this.
    eps: Annotated[float, Above(0)] = 5e-4
    l2: Annotated[float, AtLeast(0)] = 100.0  # weight of the difference
    geocross: Annotated[float, AtLeast(0)] = 0.05  # weight of the spread of the styles of one face
    tile_latent: bool = False  # one latent for all style inputs; otherwise one for each
    # How many noise maps, coarsest first, are searched as well.
    trainable_noise: Annotated[int, AtLeast(0)] = 5
    mapping_samples: Annotated[int, AtLeast(2)] = 20_000  # latents drawn to fit the distribution of styles
    stop: Literal["fit", "end"] = "fit"  # when a search stops: its face fits, or all steps are taken
    selection: Literal["best", "last"] = "best"  # which face of a search is its answer
    faces_at_once: Annotated[int, AtLeast(1)] = 32  # bounds the memory of one worker
    workers: Annotated[int, AtLeast(1)] = 1  # threads that search side by side, each with faces of its own
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # of the search; every figure is float32

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


def _halfway(start: Tensor, drawn: Tensor) -> Tensor:
    """Rows between two directions, as long as those of `start`; drawn ones are nearly orthogonal to any other."""
    between = F.normalize(F.normalize(start, dim=-1) + F.normalize(drawn, dim=-1), dim=-1)
    length: Tensor = start.norm(dim=-1, keepdim=True)
    return between * length


class _Stillness:
    """Weights ask for no gradient while any search uses them, and are as before once the last one has left."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside: dict[
            int, tuple[int, bool, list[bool]]
        ] = {}  # searches, training, who asked for gradients

    @contextmanager
    def of(self, generator: Generator) -> Iterator[None]:
        """A generator at rest; several threads may hold it at once."""
        if not isinstance(generator, nn.Module):
            yield
            return
        key = id(generator)
        with self._lock:
            asked = [weight.requires_grad for weight in generator.parameters()]
            searches, training, before = self._inside.get(key, (0, generator.training, asked))
            self._inside[key] = searches + 1, training, before
            generator.requires_grad_(False).eval()
        try:
            yield
        finally:
            with self._lock:
                searches, training, before = self._inside.pop(key)
                if searches > 1:
                    self._inside[key] = searches - 1, training, before
                else:
                    generator.train(training)
                    for weight, wanted in zip(generator.parameters(), before, strict=True):
                        weight.requires_grad_(wanted)


_STILL = _Stillness()


def _constants(generator: Generator, precision: Literal["auto", "float32", "bfloat16"]) -> Generator:
    """The synthesis of a generator in the form that is searched fastest; other families as they are."""
    match generator:
        case ClassConditioned():
            return _constants(generator.generator, precision)
        case StyleGAN2():
            return prepare_for_search(generator, precision=precision)
        case _:
            return generator


@dataclass(frozen=True)
class _Chunk:
    """Faces that are searched together."""

    place: int  # among the chunks
    faces: Tensor  # (m,) which of all faces
    target: LowImages  # (m, 3, lh, lw)
    variables: list[Tensor]  # latents (m, rows, v), then noise maps that are searched
    fixed: list[Tensor]  # the other noise maps


class PulseUpsampler:
    """Search by gradient descent over latents and coarse noise maps; an `Upsampler`.

    A StyleGAN2 is searched as constants, see `models.fast_stylegan2`, which are prepared here: later changes of its
    weights do not reach the search.
    """

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
        """Prepare the weights and fit the distribution of styles.

        Args:
            generator: Any family.
            degradation: What the photos went through.
            config: How to search.
            streams: Where starts are drawn from.
            start: Styles for photos, such as an encoder's. The first face of each photo begins with them, the
                others about 45 degrees aside, each in a direction of its own, which made them fit sooner than
                starts from anywhere and differ as much. Latents keep the length that these styles ask for.
            progress: Called after every step with how far all searches are.
            watch: Shown the faces of every step that are still searched.

        Raises:
            ValueError: The degradation does not go with the generator's size.
        """
        degradation.low_side(generator.size)  # raises where it does not fit
        self.generator = generator
        self.degradation = degradation
        self.config = config
        self._streams = streams
        self._start, self._progress, self._watch = start, progress, watch
        with _STILL.of(generator):
            self._exact = _constants(generator, "float32")
            self._quick = (
                self._exact if config.precision == "float32" else _constants(generator, config.precision)
            )
            self._fit = fit_style_gaussian(
                self._exact.map if isinstance(generator, StyleGAN2) else generator.map,
                generator.latent_width,
                samples=config.mapping_samples,
                stream=streams.generator("pulse/mapping"),
                slope=generator.style_slope,
            )

    @property
    def size(self) -> int:
        """Height and width of the faces that this search makes."""
        return self.generator.size

    @property
    def low_size(self) -> int:
        """Height and width of the photos that this search takes."""
        return self.degradation.low_side(self.generator.size)

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """Find faces for each photo, all at once.

        Guarantees:
            * Equal photos and streams give equal faces, whatever `faces_at_once` and `workers` are (up to rounding).
            * `consistency error` belongs to the returned image, made in float32 and clamped to [0, 1].
            * The generator's weights, and whether they ask for gradients, are as before.

        Args:
            low: (n, 3, low_size, low_size) sRGB in [0, 1]; float64 with a generator of float64.
            faces_per_photo: Faces for each photo, each from a start of its own, >= 1.

        Returns:
            (n, f) faces with their consistency error; not converged where the consistency error stayed above `eps`.

        Raises:
            ValueError: The photos have another size or hold values that are not finite.
        """
        check_low(low, self.low_size, faces_per_photo)
        photos = low.detach().to(torch.float64 if low.dtype == torch.float64 else torch.float32)
        targets = photos.repeat_interleave(faces_per_photo, dim=0)
        places = partition_batch(len(targets), self.config.workers, self.config.faces_at_once)
        tally = ProgressAggregator(len(places), self.config.steps, self._progress, self._watch)
        with _STILL.of(self.generator):
            begun = self._begun(photos).repeat_interleave(faces_per_photo, dim=0)
            firsts = torch.arange(len(targets)) % faces_per_photo == 0
            chunks = self._chunks(places, targets, begun, firsts)
            joined = join(
                map_in_threads(chunks, lambda chunk: self._search(chunk, tally), self.config.workers)
            )
        return by_photo(joined, faces_per_photo)

    def _begun(self, photos: LowImages) -> Tensor:
        """Latents (n, rows, v) of the styles that photos start from; none where nobody gives any."""
        k, v = self.generator.style_inputs, len(self._fit.mean)
        if self._start is None or not len(photos):
            return torch.zeros(0, k, v)
        with torch.no_grad():
            styles = self._start(photos).detach().to(photos)
        if styles.shape != (len(photos), k, v) or not styles.isfinite().all():
            wanted = (len(photos), k, v)
            raise ValueError(f"start must give finite styles of shape {wanted}, got {tuple(styles.shape)}")
        latents = self._fit.latents(styles)
        return latents.mean(dim=1, keepdim=True) if self.config.tile_latent else latents

    def _chunks(
        self, places: Sequence[Tensor], targets: LowImages, begun: Tensor, firsts: Tensor
    ) -> Iterator[_Chunk]:
        """Where searches start, sampled face by face, whatever the chunks; at or near `begun` if there are any."""
        stream = self._streams.generator("pulse/search")
        rows = 1 if self.config.tile_latent else self.generator.style_inputs
        sides = self.generator.noise_sides
        searched = min(self.config.trainable_noise, len(sides))
        for place, faces in enumerate(places):
            latents = targets.new_empty(len(faces), rows, len(self._fit.mean))
            noise = [targets.new_empty(len(faces), 1, side, side) for side in sides]
            for i, face in enumerate(faces.tolist()):
                for drawn in (latents, *noise):
                    drawn[i] = torch.randn(drawn.shape[1:], generator=stream)
                if len(begun):
                    latents[i] = begun[face] if firsts[face] else _halfway(begun[face], latents[i])
            if len(noise) > searched:
                noise[-1].zero_()
            variables, fixed = [latents, *noise[:searched]], noise[searched:]
            yield _Chunk(place, faces, targets[faces], variables, fixed)

    def _styles(self, latents: Tensor) -> Styles:
        styles = self._fit.styles(latents)
        return styles.expand(-1, self.generator.style_inputs, -1)

    def _keeping(self, chunk: _Chunk) -> CandidateSelector:
        judge = CandidateScorer(
            make=lambda inputs: self._exact.synthesize(self._styles(inputs[0]), inputs[1:]),
            degradation=self.degradation,
            target=chunk.target,
            eps=self.config.eps,
        )
        match self.config.selection:
            case "best":
                return Best(chunk.variables, chunk.fixed, judge)
            case "last":
                return Last(chunk.variables, chunk.fixed, judge)
            case _:
                assert_never(self.config.selection)

    def _loss(self, difference: Tensor, styles: Styles) -> Tensor:
        """Of each face, (m,)."""
        match self.config.stop:
            case "fit":  # a face at eps has left
                loss = self.config.l2 * difference
            case "end":  # flat below eps, as published
                loss = self.config.l2 * difference.clamp(min=self.config.eps)
            case _:
                assert_never(self.config.stop)
        if self.config.geocross and not self.config.tile_latent:
            loss = loss + self.config.geocross * geocross(styles)
        return loss

    def _search(self, chunk: _Chunk, tally: ProgressAggregator) -> Upsampled:
        """Faces (m, 1, 3, s, s) for the m targets of a chunk."""
        config, kept = self.config, self._keeping(chunk)
        active, target, fixed = torch.arange(len(chunk.faces)), chunk.target, chunk.fixed
        search, step = SphericalAdam(chunk.variables, config.learning_rate), 0
        while len(active):
            with torch.enable_grad():
                inputs = [variable.requires_grad_() for variable in search.variables]
                styles = self._styles(inputs[0])
                made = self._quick.synthesize(styles, [*inputs[1:], *fixed])
                difference = squared_difference(self.degradation.apply(made), target)
                loss = self._loss(difference, styles).sum()
            step += 1
            snapshot = StepSnapshot(
                step=step,
                steps=config.steps,
                faces=chunk.faces[active],
                images=made.detach(),
                consistency_error=difference.detach(),
            )
            kept.offer(active, snapshot.images, inputs)
            tally.step(chunk.place, snapshot)
            open_ = self._open(kept, active)
            if step == config.steps or not open_.any():
                break
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            search.step(gradients, one_cycle_drop(step - 1, config.steps))
            if not open_.all():
                search.keep(open_)
                active, target, fixed = active[open_], target[open_], [noise[open_] for noise in fixed]
        tally.end(chunk.place)
        return kept.found(self.generator.size, step)

    def _open(self, kept: CandidateSelector, faces: Tensor) -> Tensor:
        """Which searches go on, (m,) bool."""
        match self.config.stop:
            case "fit":
                return ~kept.fit(faces)
            case "end":
                return torch.ones_like(faces, dtype=torch.bool)
            case _:
                assert_never(self.config.stop)
