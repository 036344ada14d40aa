"""Which face of a search is its answer: the best of all steps, or the last.

A search may run in bfloat16, but no metric depends on that: the returned image is generated again in float32, and its
consistency error is that of the image itself, clamped to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.upsampler import Upsampled, single_faces, squared_difference


@dataclass(frozen=True)
class CandidateScorer:
    """Generates faces in float32 and measures them against their photos."""

    synthesize: Callable[
        [Sequence[Tensor]], Images
    ]  # searched variables and fixed noise maps -> faces, in float32
    degradation: Degradation
    target: LowImages  # (m, 3, lh, lw)
    eps: float  # a face fits when its consistency error is at most this

    def consistency_error(self, images: Images, faces: Tensor) -> Tensor:
        """Of the faces with these numbers, once clamped, (len(faces),)."""
        low = self.degradation.apply(images.detach().clamp(0, 1))
        return squared_difference(low, self.target[faces]).detach()

    def generate(self, inputs: Sequence[Tensor], faces: Tensor) -> tuple[Images, Tensor]:
        """The faces with these numbers, from all faces' inputs: clamped images and their consistency error."""
        with torch.no_grad():
            images = self.synthesize([tensor[faces] for tensor in inputs]).clamp(0, 1)
        return images, self.consistency_error(images, faces)

    def upsampled(self, images: Images, consistency_error: Tensor, steps: int) -> Upsampled:
        """One face for each photo."""
        return single_faces(images, consistency_error, self.eps, steps)


class CandidateSelector(Protocol):
    """Receives the faces of every step and selects one of each search."""

    def offer(self, faces: Tensor, images: Images, variables: Sequence[Tensor]) -> None:
        """`images` and `variables` are what the searches with the numbers `faces` have found in this step."""

    def fit(self, faces: Tensor) -> Tensor:
        """Which of these searches have found a face that fits, by its float32 image, (len(faces),) bool."""

    def found(self, size: int, steps: int) -> Upsampled:
        """The faces, (m, 1, 3, size, size), after `steps` steps."""


class Best:
    """Keeps the face with the smallest consistency error."""

    def __init__(self, variables: Sequence[Tensor], fixed: Sequence[Tensor], scorer: CandidateScorer) -> None:
        count = scorer.target.shape[0]
        self._scorer = scorer
        self._inputs = [*(variable.detach().clone() for variable in variables), *fixed]
        # The smallest consistency error of the images offered, which may be in bfloat16.
        self._offered = scorer.target.new_full((count,), float("inf"))
        self._pending = torch.zeros(count, dtype=torch.bool)  # best inputs not generated in float32 yet
        self._images: Images | None = None
        self._consistency_error = scorer.target.new_full((count,), float("inf"))

    def offer(self, faces: Tensor, images: Images, variables: Sequence[Tensor]) -> None:
        now = self._scorer.consistency_error(images, faces)
        better = now < self._offered[faces]  # a NaN is never better
        at = faces[better]
        self._offered[at], self._pending[at] = now[better], True
        for stored, variable in zip(self._inputs, variables, strict=False):
            stored[at] = variable.detach()[better]

    def fit(self, faces: Tensor) -> Tensor:
        """Which fit, in float32."""
        self._generate(faces[self._pending[faces] & (self._offered[faces] <= self._scorer.eps)])
        return self._consistency_error[faces] <= self._scorer.eps

    def found(self, size: int, steps: int) -> Upsampled:
        self._generate(self._pending.nonzero()[:, 0])
        images = (
            torch.zeros(len(self._consistency_error), 3, size, size) if self._images is None else self._images
        )
        return self._scorer.upsampled(images, self._consistency_error, steps)

    def _generate(self, faces: Tensor) -> None:
        """Generate these faces in float32 from the best inputs so far, and store what is better."""
        if not len(faces):
            return
        self._pending[faces] = False
        images, now = self._scorer.generate(self._inputs, faces)
        better = now < self._consistency_error[faces]
        if self._images is None:
            self._images = images.new_zeros(len(self._consistency_error), *images.shape[1:])
        self._images[faces[better]], self._consistency_error[faces[better]] = images[better], now[better]


class Last:
    """Keeps the face of the last step that each search took, as the published code does."""

    def __init__(self, variables: Sequence[Tensor], fixed: Sequence[Tensor], scorer: CandidateScorer) -> None:
        self._scorer = scorer
        self._inputs = [*(variable.detach().clone() for variable in variables), *fixed]
        self._offered = scorer.target.new_full((scorer.target.shape[0],), float("inf"))

    def offer(self, faces: Tensor, images: Images, variables: Sequence[Tensor]) -> None:
        self._offered[faces] = self._scorer.consistency_error(images, faces)
        for stored, variable in zip(self._inputs, variables, strict=False):
            stored[faces] = variable.detach()

    def fit(self, faces: Tensor) -> Tensor:
        fits = self._offered[faces] <= self._scorer.eps
        if fits.any():
            fits[fits.clone()] = self._scorer.generate(self._inputs, faces[fits])[1] <= self._scorer.eps
        return fits

    def found(self, size: int, steps: int) -> Upsampled:
        """The last faces; black, and infinitely far off, where a search ran into NaN."""
        count = self._scorer.target.shape[0]
        images, consistency_error = torch.zeros(0, 3, size, size), torch.zeros(0)
        if count:
            images, consistency_error = self._scorer.generate(self._inputs, torch.arange(count))
        images, consistency_error = images.nan_to_num(0.0), consistency_error.nan_to_num(float("inf"))
        return self._scorer.upsampled(images, consistency_error, steps)
