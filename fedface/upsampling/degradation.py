"""The known degradations: what turned a face into the low-resolution photo that we are given.

Upsamplers search for a face whose degraded image equals the photo. A degradation is a frozen value, which a YAML file
chooses by its kind: bicubic-pulse, bicubic, area, pixelate, blur, noise, jpeg or chain.

Sources: Menon et al. 2020 (arXiv:2003.03808) for PULSE's downscale; for the others see `resampling_matrices`, `jpeg`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, TypeAlias, assert_never, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.tensor_types import Images, LowImages
from fedface.upsampling.jpeg import Jpeg
from fedface.upsampling.resampling_matrices import bicubic_rows, gaussian_rows, mean_rows, pulse_rows
from fedface.validation import In, NonNegativeFloat, PositiveInt, checked


@dataclass(frozen=True)
class _Downscale:
    """Height and width divided by a factor."""

    factor: PositiveInt

    noise_std: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def low_side(self, size: int) -> int:
        """The measured side for an image side; raises ValueError where the factor does not divide it."""
        return _divided(size, "factor", self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor), not clamped.

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        return _filtered((cast("Filter", self),), _checked(images, self.factor))


@dataclass(frozen=True)
@checked
class BicubicPulse(_Downscale):
    """PULSE's downscale: a separable cubic of 4 * factor taps, reflected borders, stride `factor`.

    For even factors it equals the antialiased bicubic of torch and PIL inside the image; only the border
    differs. Odd factors shift by half a pixel, as in the published code: factor 1 is not the identity.
    """

    kind: ClassVar[str] = "bicubic-pulse"


@dataclass(frozen=True)
@checked
class Bicubic(_Downscale):
    """The antialiased bicubic of torch and PIL (a = -0.5), borders included; factor 1 is the identity."""

    kind: ClassVar[str] = "bicubic"


@dataclass(frozen=True)
@checked
class Area(_Downscale):
    """The mean of each block of factor x factor pixels, as binned sensors measure it; factor 1 is the identity."""

    kind: ClassVar[str] = "area"

    def apply(self, images: Images) -> LowImages:
        return F.avg_pool2d(_checked(images, self.factor), self.factor)


@dataclass(frozen=True)
@checked
class Pixelate:
    """A mosaic: every block of block x block pixels shows its mean; the size stays."""

    kind: ClassVar[str] = "pixelate"

    block: PositiveInt  # 1 is the identity

    factor: ClassVar[int] = 1
    noise_std: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def low_side(self, size: int) -> int:
        """The measured side: as before; raises ValueError where blocks do not fill it."""
        _divided(size, "block", self.block)
        return size

    def apply(self, images: Images) -> LowImages:
        """Pixelate, differentiably: (n, 3, h, w) -> (n, 3, h, w).

        Raises:
            ValueError: Height or width is not a multiple of the block.
        """
        means = F.avg_pool2d(_checked(images, self.block), self.block)
        return means.repeat_interleave(self.block, dim=2).repeat_interleave(self.block, dim=3)


@dataclass(frozen=True)
@checked
class Blur:
    """A Gaussian, cut off at four sigma and normalised; reflected borders do not repeat the edge; the size stays."""

    kind: ClassVar[str] = "blur"

    sigma: Annotated[float, In("(0, 1024]")]  # in pixels; a task's blur must not fill a device's memory

    factor: ClassVar[int] = 1
    noise_std: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def low_side(self, size: int) -> int:
        """The measured side: as before."""
        return size

    def apply(self, images: Images) -> LowImages:
        """Blur, differentiably: (n, 3, h, w) -> (n, 3, h, w)."""
        return _filtered((self,), _checked(images, 1))


@dataclass(frozen=True)
@checked
class Noise:
    """Independent normal noise on every value. `apply` gives the mean; `apply_degradation` samples the noise."""

    kind: ClassVar[str] = "noise"

    std: NonNegativeFloat  # in units of sRGB in [0, 1]

    factor: ClassVar[int] = 1
    linear: ClassVar[bool] = True

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise of one value."""
        return self.std

    def low_side(self, size: int) -> int:
        """The measured side: as before."""
        return size

    def apply(self, images: Images) -> LowImages:
        """The mean of the measurement: the image itself."""
        return _checked(images, 1)


DegradationStep: TypeAlias = BicubicPulse | Bicubic | Area | Pixelate | Blur | Noise | Jpeg


@dataclass(frozen=True)
class Chain:
    """Several degradations, one after the other."""

    kind: ClassVar[str] = "chain"

    parts: tuple[DegradationStep, ...]  # at least one, and no chain among them

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"parts must be a tuple of at least one degradation, got {self.parts!r}")
        if len(self.parts) > 16:
            raise ValueError(f"parts must be at most 16 degradations, got {len(self.parts)}")
        for part in self.parts:
            if not isinstance(part, DegradationStep):
                raise ValueError(f"parts must be degradations other than chains, got {part!r}")

    @property
    def factor(self) -> int:
        """How many times smaller the measurement is: the product of all factors."""
        return math.prod(part.factor for part in self.parts)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise of one measured value, away from the borders.

        Later filters average noise; JPEG is taken to leave it as it is. Correlations between values are ignored.
        """
        return _remaining_noise_std(self.parts)

    @property
    def linear(self) -> bool:
        """Whether `apply` is linear, as all parts but JPEG are."""
        return all(part.linear for part in self.parts)

    def low_side(self, size: int) -> int:
        """The measured side for an image side; raises ValueError where it does not fit one of the parts."""
        for part in self.parts:
            size = part.low_side(size)
        return size

    def apply(self, images: Images) -> LowImages:
        """Degrade, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor), not clamped but by JPEG.

        Raises:
            ValueError: Height or width does not fit one of the parts.
        """
        run: tuple[Filter, ...] = ()
        for part in self.parts:
            if isinstance(part, Filter):
                run = (*run, part)
            else:
                images, run = part.apply(_filter_all(run, images)), ()
        return _filter_all(run, images)


Filter: TypeAlias = BicubicPulse | Bicubic | Area | Pixelate | Blur
Degradation: TypeAlias = DegradationStep | Chain


def apply_degradation(degradation: Degradation, images: Images, rng: torch.Generator) -> LowImages:
    """Degrade as a camera does: noise is sampled, and values are clamped to [0, 1].

    Args:
        degradation: One of the kinds above.
        images: (n, 3, h, w).
        rng: Of the noise; unused without noise.

    Raises:
        ValueError: Height or width does not fit.
    """
    for part in steps_of(degradation):
        images = part.apply(images)
        if part.noise_std:
            noise = torch.randn(images.shape, generator=rng, device=rng.device)
            images = images + part.noise_std * noise.to(images)
    return images.clamp(0, 1)


def format_degradation(degradation: Degradation) -> str:
    """As reports write it: "bicubic (PULSE), 4 times smaller"."""
    match degradation:
        case BicubicPulse(factor):
            return f"bicubic (PULSE), {factor} times smaller"
        case Bicubic(factor):
            return f"bicubic, {factor} times smaller"
        case Area(factor):
            return f"means of blocks, {factor} times smaller"
        case Pixelate(block):
            return f"pixelated in blocks of {block} pixels"
        case Blur(sigma):
            return f"Gaussian blur of {sigma:g} pixels"
        case Noise(std):
            return f"noise of {std:g}"
        case Jpeg(quality, chroma):
            return f"JPEG of quality {quality} ({chroma})"
        case Chain(parts):
            return ", then ".join(format_degradation(part) for part in parts)
        case _:
            assert_never(degradation)


def steps_of(degradation: Degradation) -> tuple[DegradationStep, ...]:
    """The parts of a chain; any other degradation is its only part."""
    return degradation.parts if isinstance(degradation, Chain) else (degradation,)


def _divided(size: int, name: str, divisor: int) -> int:
    if size % divisor:
        raise ValueError(f"{name} must divide the size {size}, got {divisor}")
    return size // divisor


def _checked(images: Images, divisor: int) -> Images:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (n, 3, h, w), got {tuple(images.shape)}")
    if images.shape[2] % divisor or images.shape[3] % divisor:
        raise ValueError(f"height and width must be multiples of {divisor}, got {tuple(images.shape[2:])}")
    return images


def _rows(part: Filter, side: int) -> Tensor:
    match part:
        case BicubicPulse(factor):
            return pulse_rows(factor, side)
        case Bicubic(factor):
            return bicubic_rows(factor, side)
        case Area(factor):
            return mean_rows(factor, side)
        case Pixelate(block):
            return mean_rows(block, side).repeat_interleave(block, dim=0)
        case Blur(sigma):
            return gaussian_rows(sigma, side)
        case _:
            assert_never(part)


@lru_cache(maxsize=16)
def _product(parts: tuple[Filter, ...], side: int) -> Tensor:
    """One axis of several filters as one matrix."""
    rows = torch.eye(side, dtype=torch.float64)
    for part in parts:
        after = part.low_side(side)
        rows, side = _rows(part, side) @ rows, after
    return rows


def _filtered(parts: tuple[Filter, ...], images: Images) -> LowImages:
    rows = _product(parts, images.shape[2]).to(images)
    columns = _product(parts, images.shape[3]).to(images)
    return rows @ images @ columns.T


def _filter_all(filters: tuple[Filter, ...], images: Images) -> LowImages:
    """Several filters as one matrix a side, which costs no more than the smallest image among them."""
    if len(filters) > 1:
        return _filtered(filters, _checked(images, 1))
    return filters[0].apply(images) if filters else images


@lru_cache(maxsize=64)
def _remaining_noise_std(parts: tuple[DegradationStep, ...]) -> float:
    """Of the middle value of a small measurement; independent noise adds up by its variance."""
    total = 0.0
    for place, part in enumerate(parts):
        if part.noise_std:
            later = tuple(part for part in parts[place + 1 :] if isinstance(part, Filter))
            total += (part.noise_std * _noise_gain(later)) ** 2
    return math.sqrt(total)


def _noise_gain(filters: tuple[Filter, ...]) -> float:
    """The factor by which these filters scale the std of independent noise, away from the borders."""
    if not filters:
        return 1.0
    blocks = math.lcm(*(part.block for part in filters if isinstance(part, Pixelate)))
    measured = blocks * math.ceil(16 / blocks)
    side = measured * math.prod(part.factor for part in filters)
    rows = _product(filters, side)
    return float(rows[rows.shape[0] // 2].square().sum())
