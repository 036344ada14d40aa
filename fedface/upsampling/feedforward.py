"""Feed-forward methods with one output per photo: nearest, bicubic, a super-resolution network, a style encoder.

A photo of few pixels fits many faces, and these methods return one. Nearest and bicubic are the baselines of every
comparison: a method that does not beat them adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedface.models.style_encoder import StyleUpsampler
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.upsampler import Progress, Upsampled, check_low, clamp_and_score
from fedface.validation import PositiveFloat, checked

EPS = 5e-4  # the tolerance of every method: a face fits when its mean squared difference is at most this


@dataclass(frozen=True, kw_only=True)
@checked
class _FeedforwardConfig:
    eps: PositiveFloat = EPS


@dataclass(frozen=True, kw_only=True)
class NearestConfig(_FeedforwardConfig):
    """Every pixel becomes a square, as in a pixelated photo."""

    kind: ClassVar[str] = "nearest"


@dataclass(frozen=True, kw_only=True)
class BicubicConfig(_FeedforwardConfig):
    """The smooth enlargement of every image viewer."""

    kind: ClassVar[str] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(_FeedforwardConfig):
    """A feed-forward network trained to invert the downscale: the mean of the faces that fit, hence blurred."""

    kind: ClassVar[str] = "super-resolution"


@dataclass(frozen=True, kw_only=True)
class StyleEncoderConfig(_FeedforwardConfig):
    """A style encoder and its generator: one of the faces that the generator can generate."""

    kind: ClassVar[str] = "style-encoder"


class FeedforwardUpsampler:
    """An `Upsampler` that applies a function once; every face of a photo is the same."""

    def __init__(
        self,
        function: Callable[[LowImages], Images],
        degradation: Degradation,
        *,
        size: int,
        eps: float = EPS,
        at_once: int = 64,
        progress: Progress | None = None,
    ) -> None:
        """Wrap a function of photos.

        Args:
            function: Photos (n, 3, low, low) -> images (n, 3, size, size), called without gradients.
            degradation: What the photos went through.
            size: Height and width of the images in pixels.
            eps: An image fits when its mean squared difference after the downscale is at most this, > 0.
            at_once: Photos in memory together, >= 1.
            progress: Called with the numbers of photos done and of all photos.
        """
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be a finite number above 0, got {eps}")
        self.size, self.low_size = size, degradation.low_side(size)
        self._function, self._degradation = function, degradation
        self._eps, self._at_once, self._progress = eps, at_once, progress

    @torch.no_grad()
    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """One face for each photo, repeated `faces_per_photo` times; see `Upsampler.upsample`."""
        check_low(low, self.low_size, faces_per_photo)
        parts = []
        for start in range(0, len(low), self._at_once):
            parts.append(self._function(low[start : start + self._at_once].float()))
            if self._progress is not None:
                self._progress(min(start + self._at_once, len(low)), len(low))
        images = torch.cat(parts) if parts else torch.zeros(0, 3, self.size, self.size)
        consistency_error = torch.zeros(0)
        if parts:
            images, consistency_error = clamp_and_score(images, low, self._degradation.apply)
        return Upsampled(
            images=images[:, None].expand(-1, faces_per_photo, -1, -1, -1),
            consistency_error=consistency_error[:, None].expand(-1, faces_per_photo),
            converged=(consistency_error <= self._eps)[:, None].expand(-1, faces_per_photo),
            steps=1,
        )


def interpolation(size: int, mode: Literal["nearest", "bicubic"]) -> Callable[[LowImages], Images]:
    """Photos -> their enlargement (n, 3, size, size), not clamped."""
    corners = False if mode == "bicubic" else None
    return lambda low: functional.interpolate(low, size=(size, size), mode=mode, align_corners=corners)


def styles_of(upsampler: StyleUpsampler) -> Callable[[LowImages], Tensor]:
    """Photos (n, 3, l, l) -> the encoder's styles (n, k, v), without gradients: where a search may start."""

    @torch.no_grad()
    def styles(low: LowImages) -> Tensor:
        return upsampler.encoder(low)  # type: ignore[no-any-return]

    return styles
