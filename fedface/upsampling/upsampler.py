"""The protocol of all upsamplers: plausible faces for a low-resolution photo, and how well each one fits it.

A search that found no face returns `converged` False; it raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedface.tensor_types import Images, LowImages

# Called with (steps done, steps at most) over all photos; faces that are done early let it jump ahead.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class StepSnapshot:
    """The state of a search after one of its steps, for callers that show faces as they appear."""

    step: int  # steps taken by the faces shown, from 1
    steps: int  # steps at most
    faces: Tensor  # (m,) int64: which of the n * f faces these are, photo by photo
    images: Tensor  # (m, 3, s, s) sRGB, detached, not clamped: the faces of this step, not the best so far
    consistency_error: (
        Tensor  # (m,) mean squared difference of the downscaled face, not clamped, and the photo
    )


StepCallback = Callable[[StepSnapshot], None]


@dataclass(frozen=True, kw_only=True)
class Upsampled:
    """Several faces for each of n low-resolution photos.

    None of them is the person: each is a face that would look like the photo after the downscale.
    """

    images: Tensor  # (n, f, 3, s, s) sRGB in [0, 1]
    # (n, f) mean squared difference of the downscaled face and the photo; inf: no face.
    consistency_error: Tensor
    converged: Tensor  # (n, f) bool, the consistency error is within the tolerance of the search
    steps: int  # the most steps that any face took; 1 for a method that does not search

    def __post_init__(self) -> None:
        if self.images.ndim != 5 or self.images.shape[2] != 3:
            raise ValueError(f"images must have shape (n, f, 3, s, s), got {tuple(self.images.shape)}")
        for name, field in (("consistency_error", self.consistency_error), ("converged", self.converged)):
            if field.shape != self.images.shape[:2]:
                expected = tuple(self.images.shape[:2])
                raise ValueError(f"{name} must have shape {expected}, got {tuple(field.shape)}")
        if self.converged.dtype != torch.bool:
            raise ValueError(f"converged must be boolean, got {self.converged.dtype}")

    @property
    def photos(self) -> int:
        return self.images.shape[0]

    @property
    def faces_per_photo(self) -> int:
        return self.images.shape[1]

    def best(self) -> Images:
        """The face with the smallest consistency error of each photo, (n, 3, s, s)."""
        return self.images[torch.arange(self.photos), self.consistency_error.argmin(dim=1)]


class Upsampler(Protocol):
    """Low-resolution photos -> faces that would look like them."""

    low_size: int  # height and width of the photos that it takes
    size: int  # height and width of the faces that it generates

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """Find `faces_per_photo` faces for each photo.

        Args:
            low: (n, 3, lh, lw) sRGB in [0, 1].
            faces_per_photo: How many faces to return for each, >= 1. A deterministic method repeats its output.

        Returns:
            (n, f) faces in the order of the photos. The consistency error belongs to the returned image, clamped to
            [0, 1]. Equal photos and streams give equal faces, whatever `faces_at_once` and `workers` are (up to
            rounding). The model's weights are not changed.

        Raises:
            ValueError: The photos have another size or hold values that are not finite.
        """


def single_faces(images: Images, consistency_error: Tensor, tolerance: float, steps: int) -> Upsampled:
    """Results with one face for each photo, from images (n, 3, s, s) in [0, 1] and their consistency error (n,)."""
    return Upsampled(
        images=images[:, None],
        consistency_error=consistency_error[:, None],
        converged=(consistency_error <= tolerance)[:, None],
        steps=steps,
    )


def join(parts: Sequence[Upsampled], faces_per_photo: int) -> Upsampled:
    """Results for single faces, (m, 1, ...) each, as one result for n photos with f faces each."""

    def joined(tensors: Iterator[Tensor]) -> Tensor:
        rows = torch.cat(list(tensors))
        return rows.view(len(rows) // faces_per_photo, faces_per_photo, *rows.shape[2:])

    return Upsampled(
        images=joined(part.images for part in parts),
        consistency_error=joined(part.consistency_error for part in parts),
        converged=joined(part.converged for part in parts),
        steps=max(part.steps for part in parts),
    )


def check_low(low: LowImages, side: int, faces_per_photo: int) -> None:
    """Raises ValueError unless photos are finite, (n, 3, side, side), and `faces_per_photo` is at least 1."""
    if faces_per_photo < 1:
        raise ValueError(f"faces_per_photo must be at least 1, got {faces_per_photo}")
    if low.ndim != 4 or low.shape[1:] != (3, side, side):
        raise ValueError(f"photos must have shape (n, 3, {side}, {side}), got {tuple(low.shape)}")
    if not low.isfinite().all():
        raise ValueError("photos must be finite, got NaN or infinity")


def clamp_and_score(
    images: Images, low: LowImages, apply: Callable[[Images], LowImages]
) -> tuple[Images, Tensor]:
    """Images clamped to [0, 1] with their consistency error (n,): infinity where the output is not finite.

    An output that is not finite becomes black, which must not count as a face that fits a dark photo.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    clamped = images.clamp(0.0, 1.0).nan_to_num(0.0)
    consistency_error = squared_difference(apply(clamped), low)
    return clamped, consistency_error.masked_fill(~finite, float("inf"))


def pixel_std(faces: Images) -> Tensor:
    """How far f faces (f, 3, s, s) differ at each pixel, (s, s) in [0, 0.5].

    The standard deviation over the faces, as the root mean square of the three colours; zero where they are equal.
    """
    return faces.clamp(0, 1).std(dim=0, correction=0).square().mean(dim=0).sqrt()


def squared_difference(low: LowImages, target: LowImages) -> Tensor:
    """The mean over colours and pixels of the squared difference, (n,)."""
    return (low - target).square().flatten(1).mean(dim=1)
