"""Which face of a search is its answer: the best of all steps, or the last.

A search may run in bfloat16, but no metric depends on that: the returned image is generated again in float32, and its
consistency error is that of the image itself, clamped to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.upsampler import Upsampled, single_faces, squared_difference


@dataclass(frozen=True)
class CandidateScorer:
    """Generates faces in float32 and measures them against their photos."""

    # Searched variables and fixed noise maps -> faces, in float32.
    synthesize: Callable[[Sequence[Tensor]], Images]
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


class CandidateSelector:
    """Receives the faces of every step and selects one of each search.

    That with the smallest consistency error, or that of the last step that the search took, as the published code does.
    """

    def __init__(
        self,
        variables: Sequence[Tensor],
        fixed: Sequence[Tensor],
        scorer: CandidateScorer,
        selection: Literal["best", "last"],
    ) -> None:
        count = scorer.target.shape[0]
        self._scorer, self._last = scorer, selection == "last"
        self._inputs = [*(variable.detach().clone() for variable in variables), *fixed]
        # The consistency error of the images offered, which may be in bfloat16, and of those generated in float32.
        self._offered = scorer.target.new_full((count,), float("inf"))
        self._consistency_error = self._offered.clone()
        self._pending = torch.zeros(count, dtype=torch.bool)  # selected inputs not generated in float32 yet
        self._images: Images | None = None

    def offer(self, faces: Tensor, images: Images, variables: Sequence[Tensor]) -> None:
        """`images` and `variables` are what the searches with the numbers `faces` have found in this step."""
        now = self._scorer.consistency_error(images, faces)
        chosen = now < self._offered[faces]  # a NaN is never better
        if self._last:
            chosen[:] = True
            self._consistency_error[faces] = float("inf")
        at = faces[chosen]
        self._offered[at], self._pending[at] = now[chosen], True
        for stored, variable in zip(self._inputs, variables, strict=False):
            stored[at] = variable.detach()[chosen]

    def fit(self, faces: Tensor) -> Tensor:
        """Which of these searches have found a face that fits, by its float32 image, (len(faces),) bool."""
        self._generate(faces[self._pending[faces] & (self._offered[faces] <= self._scorer.eps)])
        return self._consistency_error[faces] <= self._scorer.eps

    def found(self, size: int, steps: int) -> Upsampled:
        """The faces, (m, 1, 3, size, size), after `steps` steps; black, with infinite error, where a search met NaN."""
        self._generate(self._pending.nonzero()[:, 0])
        images = self._images
        if images is None:
            images = torch.zeros(len(self._consistency_error), 3, size, size)
        return single_faces(images, self._consistency_error, self._scorer.eps, steps)

    def _generate(self, faces: Tensor) -> None:
        """Generate these faces in float32 from the selected inputs, and store what is better."""
        if not len(faces):
            return
        self._pending[faces] = False
        images, now = self._scorer.generate(self._inputs, faces)
        better = now < self._consistency_error[faces]
        if self._images is None:
            self._images = images.new_zeros(len(self._consistency_error), *images.shape[1:])
        self._images[faces[better]], self._consistency_error[faces[better]] = images[better], now[better]
