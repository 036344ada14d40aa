"""The known degradations: what turned a face into the low-resolution photo that we are given.

Called by the upsamplers, which search for a face whose degraded picture equals the photo, and by the audits,
which make low-resolution probes. A degradation is a frozen value, so that a record can name it and a YAML file
can choose it by its kind: bicubic-pulse, bicubic, area, pixelate, blur, noise, jpeg or chain.

Sources: Menon et al. 2020 (arXiv:2003.03808) for PULSE's downscale; see `filters` and `jpeg` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.tensor_types import Images, LowImages
from fedface.upsampling.jpeg import Jpeg
from fedface.upsampling.resampling_matrices import (
    bicubic_rows,
    check_positive_whole,
    gaussian_rows,
    mean_rows,
    pulse_rows,
)


@dataclass(frozen=True)
class BicubicPulse:
    """PULSE's downscale: a separable cubic of 4 * factor taps, reflected borders, stride `factor`.

    For even factors it equals the antialiased bicubic of torch and PIL inside the picture; only the border
    differs. Odd factors shift by half a pixel, as in the published code: factor 1 is not the identity.
    """

    kind: ClassVar[str] = "bicubic-pulse"

    factor: int  # >= 1

    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_whole("factor", self.factor)

    def low_side(self, size: int) -> int:
        """The measured side for an image side; raises ValueError where the factor does not divide it."""
        return _divided(size, "factor", self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor), not clamped.

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        return _filtered((self,), _checked(images, self.factor))


@dataclass(frozen=True)
class Bicubic:
    """The antialiased bicubic of torch and PIL (a = -0.5), borders included; factor 1 is the identity."""

    kind: ClassVar[str] = "bicubic"

    factor: int  # >= 1

    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_whole("factor", self.factor)

    def low_side(self, size: int) -> int:
        """The measured side for an image side; raises ValueError where the factor does not divide it."""
        return _divided(size, "factor", self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor), not clamped.

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        return _filtered((self,), _checked(images, self.factor))


@dataclass(frozen=True)
class Area:
    """The mean of each block of factor x factor pixels: what binned sensors do."""

    kind: ClassVar[str] = "area"

    factor: int  # >= 1; 1 is the identity

    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_whole("factor", self.factor)

    def low_side(self, size: int) -> int:
        """The measured side for an image side; raises ValueError where the factor does not divide it."""
        return _divided(size, "factor", self.factor)

    def apply(self, images: Images) -> LowImages:
        """Downscale, differentiably: (n, 3, h, w) -> (n, 3, h / factor, w / factor).

        Raises:
            ValueError: Height or width is not a multiple of the factor.
        """
        return F.avg_pool2d(_checked(images, self.factor), self.factor)


@dataclass(frozen=True)
class Pixelate:
    """A mosaic: every block of block x block pixels shows its mean; the size stays."""

    kind: ClassVar[str] = "pixelate"

    block: int  # >= 1; 1 is the identity

    factor: ClassVar[int] = 1
    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_whole("block", self.block)

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
class Blur:
    """A Gaussian, cut off at four sigma and normalised; reflected borders do not repeat the edge; the size stays."""

    kind: ClassVar[str] = "blur"

    sigma: float  # in (0, 1024], in pixels

    factor: ClassVar[int] = 1
    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1024:  # a task's blur must not fill a device's memory
            raise ValueError(f"sigma must lie in (0, 1024], got {self.sigma}")

    def low_side(self, size: int) -> int:
        """The measured side: as before."""
        return size

    def apply(self, images: Images) -> LowImages:
        """Blur, differentiably: (n, 3, h, w) -> (n, 3, h, w)."""
        return _filtered((self,), _checked(images, 1))


@dataclass(frozen=True)
class Noise:
    """Independent normal noise on every value. `apply` gives its mean, the picture itself; `measure` draws it."""

    kind: ClassVar[str] = "noise"

    std: float  # >= 0, in units of sRGB in [0, 1]

    factor: ClassVar[int] = 1
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be finite and >= 0, got {self.std}")

    @property
    def spread(self) -> float:
        """Standard deviation of the noise of one value."""
        return self.std

    def low_side(self, size: int) -> int:
        """The measured side: as before."""
        return size

    def apply(self, images: Images) -> LowImages:
        """The mean of the measurement: the picture itself."""
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
    def spread(self) -> float:
        """Standard deviation of the noise of one measured value, away from the borders.

        Noise that a later part averages counts as much as is left of it, and JPEG is taken to pass it on. Values
        that share noise count as if they did not.
        """
        return _spread_left(self.parts)

    @property
    def linear(self) -> bool:
        """Whether `apply` is linear: nothing is stored as JPEG."""
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
                images, run = part.apply(_in_a_row(run, images)), ()
        return _in_a_row(run, images)


Filter: TypeAlias = BicubicPulse | Bicubic | Area | Pixelate | Blur
Degradation: TypeAlias = DegradationStep | Chain


def apply_degradation(degradation: Degradation, images: Images, stream: torch.Generator) -> LowImages:
    """What a camera would deliver: degraded, with noise drawn where there is any, clamped to [0, 1].

    Args:
        degradation: What happens to the picture.
        images: (n, 3, h, w).
        stream: Where noise is drawn from; untouched where there is none.

    Raises:
        ValueError: Height or width does not fit.
    """
    for part in steps_of(degradation):
        images = part.apply(images)
        if part.spread:
            drawn = torch.randn(images.shape, generator=stream, device=stream.device)
            images = images + part.spread * drawn.to(images)
    return images.clamp(0, 1)


def adjoint(degradation: Degradation, low: LowImages, side: int) -> Images:
    """The transpose of a linear degradation: <apply(x), low> = <x, adjoint(low)> for all x.

    Args:
        degradation: A linear one.
        low: (n, 3, lh, lw), measured from pictures of side x side.
        side: Of the pictures.

    Returns:
        (n, 3, side, side).

    Raises:
        ValueError: The degradation stores a JPEG, or pictures of this side are not measured with `low`'s.
    """
    if not degradation.linear:
        raise ValueError(f"only a linear degradation has an adjoint, got {format_degradation(degradation)}")
    measured = degradation.low_side(side)
    if low.ndim != 4 or low.shape[1:] != (3, measured, measured):
        raise ValueError(f"low must have shape (n, 3, {measured}, {measured}), got {tuple(low.shape)}")
    with torch.enable_grad():
        origin = low.new_zeros(low.shape[0], 3, side, side).requires_grad_()
        (transposed,) = torch.autograd.grad(degradation.apply(origin), origin, low)
    return transposed


def format_degradation(degradation: Degradation) -> str:
    """For people: "bicubic (PULSE), 4 times smaller"."""
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
    """What happens one after the other; a degradation that is no chain is its own only part."""
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
    rows, *more = _walked(parts, side)
    for following in more:
        rows = following @ rows
    return rows


def _walked(parts: tuple[Filter, ...], side: int) -> Iterator[Tensor]:
    for part in parts:
        after = part.low_side(side)
        yield _rows(part, side)
        side = after


def _filtered(parts: tuple[Filter, ...], images: Images) -> LowImages:
    rows = _product(parts, images.shape[2]).to(images)
    columns = _product(parts, images.shape[3]).to(images)
    return rows @ images @ columns.T


def _in_a_row(filters: tuple[Filter, ...], images: Images) -> LowImages:
    """Several filters as one matrix a side, which costs no more than the smallest picture among them."""
    if len(filters) > 1:
        return _filtered(filters, _checked(images, 1))
    return filters[0].apply(images) if filters else images


@lru_cache(maxsize=64)
def _spread_left(parts: tuple[DegradationStep, ...]) -> float:
    """Of the middle value of a small measurement; independent noise adds up by its variance."""
    total = 0.0
    for place, part in enumerate(parts):
        if part.spread:
            later = tuple(part for part in parts[place + 1 :] if isinstance(part, Filter))
            total += (part.spread * _left_of_noise(later)) ** 2
    return math.sqrt(total)


def _left_of_noise(filters: tuple[Filter, ...]) -> float:
    """What these filters leave of the standard deviation of independent noise, away from the borders."""
    if not filters:
        return 1.0
    blocks = math.lcm(*(part.block for part in filters if isinstance(part, Pixelate)))
    measured = blocks * math.ceil(16 / blocks)
    side = measured * math.prod(part.factor for part in filters)
    rows = _product(filters, side)
    return float(rows[rows.shape[0] // 2].square().sum())
