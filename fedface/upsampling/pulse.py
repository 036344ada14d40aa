"""PULSE: search a generator's latents for faces whose downscaled picture is the given photo.

Called by the audits and the command line, with any `models.contracts.Generator` and any known downscale. All
faces of all photos are searched at once; because Adam works coordinate by coordinate, that is the same search
as one after the other. A face leaves the batch as soon as it fits.

Source: Menon et al. 2020 (arXiv:2003.03808). Corrected here: each face is compared with the tolerance on its
own, the best face is returned and not the last, and a search that fails is a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedface.models.contracts import Generator
from fedface.models.frozen import frozen
from fedface.models.stylegan2 import OfClass, StyleGAN2
from fedface.randomness import Streams
from fedface.shapes import Images, Latents, LowImages, Styles
from fedface.upsampling.contracts import Progress, Upsampled, check_low, join, squared_difference
from fedface.upsampling.degrade import Degradation


@dataclass(frozen=True, kw_only=True)
class PulseConfig:
    """Settings of the search; none depends on the size of the generator.

    The tolerance is tighter than the paper's. A fixed tolerance in sRGB is a larger share of a dark face than
    of a light one, so that a loose one lets dark skin stray further towards the mean of the generator.
    """

    steps: int = 100  # >= 1
    learning_rate: float = 0.8  # > 0, the peak of the schedule
    eps: float = 5e-4  # > 0, a face fits when its mean squared difference (sRGB in [0, 1]) is at most this
    l2: float = 100.0  # >= 0, weight of the difference
    geocross: float = 0.05  # >= 0, weight of the spread of the styles of one face
    tile_latent: bool = False  # one latent for all style inputs; otherwise one for each
    trainable_noise: int = 5  # >= 0, how many noise maps, coarsest first, are searched as well
    mapping_samples: int = 20_000  # >= 2, latents drawn to fit the distribution of styles
    faces_at_once: int = 32  # >= 1, bounds the memory
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # of the search; every figure is float32

    def __post_init__(self) -> None:
        counts = (("steps", 1), ("trainable_noise", 0), ("mapping_samples", 2), ("faces_at_once", 1))
        for name, least in counts:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        for name in ("l2", "geocross"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")

    @staticmethod
    def paper() -> PulseConfig:
        """The settings of the published code: 100 steps, rate 0.4, eps 2e-3, a million mapping draws."""
        return PulseConfig(learning_rate=0.4, eps=2e-3, mapping_samples=1_000_000)


def geocross(styles: Styles) -> Tensor:
    """How far apart on the sphere the k styles of each face lie: (n, k, v) -> (n,), 0 when they are equal.

    v / 8 times the mean of the squared angle between styles i and j over all pairs, i = j included.
    """
    first, second = styles[:, :, None], styles[:, None]
    apart = ((first - second).square().sum(-1) + 1e-9).sqrt()
    together = ((first + second).square().sum(-1) + 1e-9).sqrt()
    theta = 2 * torch.atan2(apart, together)
    return theta.square().mean(dim=(1, 2)) * styles.shape[-1] / 8


def one_cycle_drop(step: int, steps: int) -> float:
    """The multiplier of the learning rate: 0.1, 1 at 45 % of the steps, 0.1 at 90 %, 0.001 at the end."""
    return float(np.interp(step / steps, [0, 0.45, 0.9, 1], [0.1, 1, 0.1, 0.001]))


def _radius(variable: Tensor) -> Tensor:
    return (variable.square().sum(dim=tuple(range(2, variable.ndim)), keepdim=True) + 1e-9).sqrt()


class SphericalAdam:
    """Adam whose variables keep their length: after each step every row returns to its own sphere.

    Variables have shape (n, k, ...); a row is everything after two axes: one latent or one noise map.
    """

    def __init__(self, variables: Sequence[Tensor], learning_rate: float) -> None:
        self.variables = [variable.clone() for variable in variables]
        self.learning_rate = learning_rate
        self._radii = [_radius(variable) for variable in variables]
        self._mean = [torch.zeros_like(variable) for variable in variables]
        self._square = [torch.zeros_like(variable) for variable in variables]
        self._step = 0

    def step(self, gradients: Sequence[Tensor], multiplier: float = 1.0) -> None:
        """Move every variable one step along its gradient, then back onto its sphere."""
        self._step += 1
        bias_mean, bias_square = 1 - 0.9**self._step, 1 - 0.999**self._step
        rate = self.learning_rate * multiplier / bias_mean
        for i, gradient in enumerate(gradients):
            self._mean[i].lerp_(gradient, 0.1)
            self._square[i].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = (self._square[i] / bias_square).sqrt_().add_(1e-8)
            moved = self.variables[i].detach() - rate * self._mean[i] / size
            self.variables[i] = moved / _radius(moved) * self._radii[i]

    def keep(self, chosen: Tensor) -> None:
        """Go on with the faces that `chosen`, (n,) bool, marks; forget the others."""
        for kept in (self.variables, self._radii, self._mean, self._square):
            kept[:] = [tensor[chosen] for tensor in kept]


@dataclass(frozen=True)
class StyleFit:
    """A normal distribution of styles before the last leaky ReLU of the mapping, coordinate by coordinate."""

    mean: Tensor  # (v,)
    std: Tensor  # (v,)
    slope: float = 0.2  # of that leaky ReLU, > 0; 1 where the mapping ends with none

    def styles(self, latents: Tensor) -> Styles:
        """Latents (n, k, v) -> styles (n, k, v): LeakyReLU of latents * std + mean."""
        return F.leaky_relu(latents * self.std + self.mean, self.slope)


def fit_styles(
    mapping: Callable[[Latents], Styles],
    latent_width: int,
    *,
    samples: int,
    stream: torch.Generator,
    slope: float = 0.2,
) -> StyleFit:
    """Fit the distribution of a mapping's styles with its last leaky ReLU undone.

    The gain behind that ReLU (sqrt 2 in StyleGAN2) needs no mention: a positive factor passes through a leaky
    ReLU unchanged.

    Args:
        mapping: Latents (n, z) -> styles (n, k, v), equal for all k.
        latent_width: z.
        samples: How many latents to draw, >= 2.
        stream: Where they are drawn from.
        slope: Of the last leaky ReLU, > 0 (`Generator.style_slope`); 1 where there is none.

    Returns:
        Mean and unbiased standard deviation of each coordinate.
    """
    total = square = torch.zeros((), dtype=torch.float64)
    # The latents of a flow are whole pictures: fewer of them at once.
    at_once = min(10_000, max(1, 2**23 // latent_width))
    with torch.no_grad():
        for start in range(0, samples, at_once):
            latents = torch.randn(min(at_once, samples - start), latent_width, generator=stream)
            before = F.leaky_relu(mapping(latents)[:, 0], 1.0 / slope).double()
            total = total + before.sum(dim=0)
            square = square + before.square().sum(dim=0)
    mean = total / samples
    variance = (square - samples * mean.square()).clamp(min=0) / (samples - 1)
    return StyleFit(mean.float(), variance.sqrt().float(), slope)


@contextmanager
def _frozen(generator: Generator) -> Iterator[None]:
    """Weights ask for no gradient inside, and are as they were afterwards."""
    if not isinstance(generator, nn.Module):
        yield
        return
    asked = [(weight, weight.requires_grad) for weight in generator.parameters()]
    training = generator.training
    generator.requires_grad_(False).eval()
    try:
        yield
    finally:
        generator.train(training)
        for weight, before in asked:
            weight.requires_grad_(before)


def _constants(generator: Generator, precision: Literal["auto", "float32", "bfloat16"]) -> Generator:
    """The synthesis of a generator in the form that is searched fastest; other families as they are."""
    match generator:
        case OfClass():
            return _constants(generator.generator, precision)
        case StyleGAN2():
            return frozen(generator, precision=precision)
        case _:
            return generator


class _Best:
    """The best face of each search so far.

    A search may run in bfloat16, but no figure rests on that: a face that seems to fit is made again in float32,
    and its search goes on when it does not fit after all.
    """

    def __init__(
        self,
        variables: Sequence[Tensor],
        fixed: Sequence[Tensor],
        target: LowImages,
        *,
        eps: float,
        degradation: Degradation,
        make: Callable[[Sequence[Tensor]], Images],
    ) -> None:
        self._inputs = [*(variable.detach().clone() for variable in variables), *fixed]
        self._target, self._eps, self._degradation, self._make = target, eps, degradation, make
        self._seeming = torch.full((target.shape[0],), float("inf"))
        self._images: Images | None = None
        self.misfit = torch.full((target.shape[0],), float("inf"))

    def offer(self, faces: Tensor, images: Images, variables: Sequence[Tensor]) -> None:
        """Remember what is better than before: `images` and `variables` are what the searches `faces` found."""
        now = self._misfit(images.clamp(0, 1), faces)
        better = now < self._seeming[faces]  # a NaN is never better
        at = faces[better]
        self._seeming[at] = now[better]
        for kept, variable in zip(self._inputs, variables, strict=False):
            kept[at] = variable.detach()[better]
        self._check(at[self._seeming[at] <= self._eps])

    def found(self, size: int, steps: int) -> Upsampled:
        """The faces (m, 1, 3, size, size), each with the misfit of the picture that is returned."""
        missing = (self.misfit > self._eps) & (self._seeming < float("inf"))
        self._check(missing.nonzero()[:, 0])
        images = torch.zeros(len(self.misfit), 3, size, size) if self._images is None else self._images
        fits = self.misfit <= self._eps
        return Upsampled(
            images=images[:, None], misfit=self.misfit[:, None], converged=fits[:, None], steps=steps
        )

    def _check(self, faces: Tensor) -> None:
        """Make these faces in float32 from the best inputs so far, and keep what is better."""
        if not len(faces):
            return
        with torch.no_grad():
            images = self._make([tensor[faces] for tensor in self._inputs]).clamp(0, 1)
        now = self._misfit(images, faces)
        better = now < self.misfit[faces]
        if self._images is None:
            self._images = torch.zeros(len(self.misfit), *images.shape[1:])
        self._images[faces[better]], self.misfit[faces[better]] = images[better], now[better]

    def _misfit(self, images: Images, faces: Tensor) -> Tensor:
        return squared_difference(self._degradation.apply(images), self._target[faces]).detach()


class Pulse:
    """Search by gradient descent over latents and coarse noise maps; an `Upsampler`.

    A StyleGAN2 is searched as constants, see `models.frozen`, which are prepared here: later changes of its
    weights do not reach the search.
    """

    def __init__(
        self,
        generator: Generator,
        degradation: Degradation,
        config: PulseConfig,
        streams: Streams,
        *,
        progress: Progress | None = None,
    ) -> None:
        degradation.low_side(generator.size)  # raises where it does not fit
        self.generator = generator
        self.degradation = degradation
        self.config = config
        self._streams = streams
        self._progress = progress
        with _frozen(generator):
            self._exact = _constants(generator, "float32")
            self._quick = (
                self._exact if config.precision == "float32" else _constants(generator, config.precision)
            )
            self._fit = fit_styles(
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
            * Equal photos and streams give equal faces, whatever `faces_at_once` is (up to rounding).
            * `misfit` belongs to the returned image, made in float32 and clamped to [0, 1].
            * The generator's weights, and whether they ask for gradients, are as before.

        Args:
            low: (n, 3, low_size, low_size) sRGB in [0, 1].
            faces_per_photo: Faces for each photo, each from a start of its own, >= 1.

        Returns:
            (n, f) faces with their misfit; not converged where the misfit stayed above `eps`.

        Raises:
            ValueError: The photos have another size or hold values that are not finite.
        """
        check_low(low, self.low_size, faces_per_photo)
        targets = low.detach().float().repeat_interleave(faces_per_photo, dim=0)
        stream = self._streams.generator("pulse/search")
        chunks = torch.split(targets, self.config.faces_at_once)
        with _frozen(self.generator), torch.enable_grad():
            found = [self._search(chunk, stream, done=i, of=len(chunks)) for i, chunk in enumerate(chunks)]
        joined = join(found)
        shape = (low.shape[0], faces_per_photo)
        return Upsampled(
            images=joined.images.view(*shape, *joined.images.shape[2:]),
            misfit=joined.misfit.view(shape),
            converged=joined.converged.view(shape),
            steps=joined.steps,
        )

    def _start(self, faces: int, stream: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Searched variables, then fixed noise maps; drawn face by face, whatever the chunks."""
        rows = 1 if self.config.tile_latent else self.generator.style_inputs
        sides = self.generator.noise_sides
        latents, maps = [], [[] for _ in sides]  # type: tuple[list[Tensor], list[list[Tensor]]]
        for _ in range(faces):
            latents.append(torch.randn(rows, len(self._fit.mean), generator=stream))
            for i, side in enumerate(sides):
                maps[i].append(torch.randn(1, side, side, generator=stream))
        noise = [torch.stack(drawn) for drawn in maps]
        searched = min(self.config.trainable_noise, len(noise))
        if len(noise) > searched:
            noise[-1] = torch.zeros_like(noise[-1])
        return [torch.stack(latents), *noise[:searched]], noise[searched:]

    def _styles(self, latents: Tensor) -> Styles:
        styles = self._fit.styles(latents)
        return styles.expand(-1, self.generator.style_inputs, -1)

    def _search(self, target: LowImages, stream: torch.Generator, *, done: int, of: int) -> Upsampled:
        """Faces (m, 1, 3, s, s) for m targets; the chunk is number `done` of `of`."""
        config, faces = self.config, target.shape[0]
        active, step = torch.arange(faces), 0
        variables, fixed = self._start(faces, stream) if faces else ([], [])
        best = _Best(
            variables,
            fixed,
            target,
            eps=config.eps,
            degradation=self.degradation,
            make=lambda inputs: self._exact.synthesize(self._styles(inputs[0]), inputs[1:]),
        )
        search = SphericalAdam(variables, config.learning_rate)
        while len(active):
            inputs = [variable.requires_grad_() for variable in search.variables]
            styles = self._styles(inputs[0])
            made = self._quick.synthesize(styles, [*inputs[1:], *fixed])
            best.offer(active, made.detach(), inputs)
            step += 1
            if self._progress is not None:
                self._progress(done * config.steps + step, of * config.steps)
            open_ = best.misfit[active] > config.eps
            if step == config.steps or not open_.any():
                break
            # The published loss is flat below eps; here a face that gets there has left the batch.
            loss = config.l2 * squared_difference(self.degradation.apply(made), target)
            if config.geocross and not config.tile_latent:
                loss = loss + config.geocross * geocross(styles)
            gradients = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
            search.step(gradients, one_cycle_drop(step - 1, config.steps))
            if not open_.all():
                search.keep(open_)
                active, target, fixed = active[open_], target[open_], [noise[open_] for noise in fixed]
        return best.found(self.generator.size, step)
