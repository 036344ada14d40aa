"""Posterior sampling with a rectified flow: noise follows the velocity to a face, guided by the photo.

On the path x_t = (1 - t) noise + t face the velocity v gives the expected face, D = E[face | x_t] = x_t + (1 - t) v
(Lipman et al. 2022, arXiv:2210.02747). A photo y = A face + noise of standard deviation s moves that expectation
(Pokle et al. 2023, arXiv:2310.04432):

    D_y = D + (1 - t)^2 / t * gradient of log p(y | x_t),   p(y | x_t) ~ N(A D, s^2 I + A C A'),

and the velocity to v_y = (D_y - x_t) / (1 - t) = v + (1 - t) / t * gradient. C is the covariance of the face at time t:

* "isotropic": r_t^2 I with r_t^2 = (1 - t)^2 c^2 / ((1 - t)^2 + t^2 c^2) (PiGDM, Song et al. 2023), exact where pixels
  are independent normals of standard deviation c. Pixels of faces are not independent: their means over blocks are
  far more uncertain than this says.
* "moments": (1 - t)^2 / t * dD/dx, the covariance given by the flow itself through Tweedie's formula (Boys et al. 2023,
  arXiv:2310.06721), with (s^2 I + A C A')^-1 by conjugate gradients (Rozet et al. 2024, arXiv:2405.13712), each of
  which is one more gradient. Exact for every normal distribution of faces.

Both are approximations for other distributions, and worse where several kinds of face fit one photo: no step here is
accepted or rejected, unlike in `latent_hmc`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, assert_never

import torch
from torch import Tensor

from fedface.randomness import Streams
from fedface.tensor_types import LowImages
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.latent_hmc import consistency_bound, measurement_noise
from fedface.upsampling.mcmc import PerChainRng
from fedface.upsampling.parallel import Chunk, search_in_chunks
from fedface.upsampling.upsampler import (
    Progress,
    StepCallback,
    Upsampled,
    check_low,
    clamp_and_score,
    single_faces,
    squared_difference,
)
from fedface.validation import AtLeast, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, checked

ROWS_AT_ONCE = 64  # measured values whose row of A A' is computed together


class Flow(Protocol):
    """What is needed of a flow; `models.rectified_flow.RectifiedFlow` is one."""

    size: int  # height and width of the images

    def velocity(self, x: Tensor, times: Tensor) -> Tensor:
        """Where points (n, 3, s, s), images in [-1, 1] plus noise, move at times (n,) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
@checked
class GuidedFlowConfig:
    """Settings of the guided path."""

    kind: ClassVar[str] = "guided-flow"

    # Std of what separates photos from the model; the noise is hypot(this, degradation's).
    noise_std: NonNegativeFloat = 0.02
    steps: Annotated[int, AtLeast(2)] = 40  # of equal time
    covariance: Literal["isotropic", "moments"] = "moments"  # C, see the head of this file
    # Most conjugate gradients a step, for moments; more diverge, see docs/posterior.md.
    cg_steps: PositiveInt = 3
    data_std: PositiveFloat = 0.4  # std of a pixel, c; for isotropic
    # Share of the noise that is sampled again in each step; 0 follows the path without noise.
    churn: Fraction = 1.0
    faces_at_once: PositiveInt = 32  # bounds the memory of one worker
    workers: PositiveInt = 1  # threads, each with faces of its own


def gram(degradation: Degradation, size: int) -> Tensor:
    """A A' of a degradation of images of this side, (m, m); of its slope at mid grey where it is not linear.

    Measured values are ordered as (3, lh, lw) is flattened.
    """
    low = degradation.low_side(size)
    m = 3 * low**2

    def pulled(rows: LowImages) -> Tensor:
        grey = torch.full((len(rows), 3, size, size), 0.5, requires_grad=True)
        with torch.enable_grad():
            (back,) = torch.autograd.grad(degradation.apply(grey), grey, rows)
        return back

    with torch.no_grad():
        parts = [pulled(part.view(-1, 3, low, low)) for part in torch.split(torch.eye(m), ROWS_AT_ONCE)]
        if degradation.linear:
            nothing = degradation.apply(torch.zeros(1, 3, size, size))
            return torch.cat([(degradation.apply(part) - nothing).flatten(1) for part in parts])
        return torch.cat([part.flatten(1).square().sum(dim=1) for part in parts]).diag()


class GuidedFlowUpsampler:
    """Guided sampling with a flow; an `Upsampler`. One pass of fixed length: nothing is searched.

    Degradations that are not linear (JPEG) are linearised where the expected face is.
    """

    def __init__(
        self,
        generator: Flow,
        degradation: Degradation,
        config: GuidedFlowConfig,
        streams: Streams,
        *,
        progress: Progress | None = None,
        watch: StepCallback | None = None,
    ) -> None:
        """Arguments as for `methods.make_upsampler`; `watch` is called with the expected faces.

        Raises:
            ValueError: The degradation does not support the flow's size, or nothing is noisy.
        """
        self.size, self.low_size = generator.size, degradation.low_side(generator.size)
        self.generator, self.degradation, self.config = generator, degradation, config
        self.noise = measurement_noise(degradation, config.noise_std)
        self._streams, self._progress, self._watch = streams, progress, watch
        if config.covariance == "isotropic":
            self._energies, self._turn = torch.linalg.eigh(gram(degradation, generator.size))

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """One face from each noise image, see `Upsampler.upsample`.

        Not converged where the consistency error exceeds `latent_hmc.consistency_bound`.
        """
        check_low(low, self.low_size, faces_per_photo)
        return search_in_chunks(
            low.detach().float().repeat_interleave(faces_per_photo, dim=0),
            faces_per_photo,
            self.config,
            lambda faces: PerChainRng([self._streams.generator(f"guidance/{i}") for i in faces.tolist()]),
            self._sample,
            progress=self._progress,
            watch=self._watch,
        )

    def _sample(self, chunk: Chunk[PerChainRng]) -> Upsampled:
        steps, target = self.config.steps, chunk.target
        x = target.new_zeros(0, 3, self.size, self.size)
        if len(chunk.faces):
            x = chunk.start.normals(3, self.size, self.size)
            for step in range(steps):
                now, then = step / steps, (step + 1) / steps
                expected = self._expected(x, now, target)
                x = self._onward(x, expected, now, then, chunk.start)
                images = (expected + 1) / 2
                error = squared_difference(self.degradation.apply(images.clamp(0, 1)), target)
                chunk.step(step + 1, images, error)
        images, error = clamp_and_score((x + 1) / 2, target, self.degradation.apply)
        return single_faces(images, error, consistency_bound(self.noise, 3 * self.low_size**2), steps)

    def _onward(self, x: Tensor, expected: Tensor, now: float, then: float, rngs: PerChainRng) -> Tensor:
        """The point of time `then`, if the face is the expected one (Song et al. 2021, arXiv:2010.02502, equation 12).

        Without churn this is Euler's step along the velocity. With all of it the noise is what the forward path would
        have between the two times.
        """
        fresh = 0.0
        if then < 1 and now > 0 and self.config.churn:
            shared = (now / then * (1 - then)) ** 2
            between = ((1 - then) / (1 - now)) ** 2 * ((1 - now) ** 2 - shared)
            fresh = self.config.churn * math.sqrt(between)
        old = math.sqrt((1 - then) ** 2 - fresh**2)
        onward = then * expected + old * (x - now * expected) / (1 - now)
        return onward + fresh * rngs.normals(*x.shape[1:]).to(x) if fresh else onward

    def _expected(self, x: Tensor, t: float, target: LowImages) -> Tensor:
        """E[face | x_t, photo] in [-1, 1], (n, 3, s, s)."""
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            free = inputs + (1 - t) * self.generator.velocity(inputs, x.new_full((len(x),), t))
            low = self.degradation.apply((free + 1) / 2)
        expected = free.detach()
        if t == 0:
            # Pure noise carries no information about the face, and the photo none about the noise.
            return expected

        def pulled(weights: Tensor) -> Tensor:
            """The gradient of <A D, weights> in x, times (1 - t)^2 / t."""
            (back,) = torch.autograd.grad(low, inputs, weights, retain_graph=True)
            return back * (1 - t) ** 2 / t

        residual = (target - low).detach()
        match self.config.covariance:
            case "isotropic":
                return expected + pulled(self._weighed(residual, t))
            case "moments":
                return expected + pulled(self._solved(residual, expected, pulled))
            case _:
                assert_never(self.config.covariance)

    def _weighed(self, residual: LowImages, t: float) -> LowImages:
        """(s^2 I + r_t^2 A A')^-1 residual; an image in [0, 1] has half the spread of one in [-1, 1]."""
        c = self.config.data_std
        r = (1 - t) * c / math.hypot(1 - t, t * c) / 2
        turned = residual.flatten(1) @ self._turn
        weighed = turned / (self.noise**2 + r**2 * self._energies)
        solved: Tensor = weighed @ self._turn.mT
        return solved.view_as(residual)

    def _solved(self, residual: LowImages, expected: Tensor, pulled: Callable[[Tensor], Tensor]) -> LowImages:
        """(s^2 I + A C A')^-1 residual by conjugate gradients, which start from 0."""

        def spread(weights: LowImages) -> LowImages:
            # A is taken in [0, 1]: half of a difference in [-1, 1].
            return self.noise**2 * weights + self._pushed(expected, pulled(weights) / 2)

        solution = torch.zeros_like(residual)
        left, along = residual, residual
        size = _dot(left, left)
        for _ in range(self.config.cg_steps):
            through = spread(along)
            curvature = _dot(along, through)
            # A flow's Jacobian is not exactly symmetric and positive: where it is not, the solution so far is used.
            open_ = (curvature > 0) & (size > 0)
            length = torch.where(open_, size / curvature, torch.zeros_like(size))
            solution = solution + length * along
            left = left - length * through
            after = _dot(left, left)
            along = torch.where(open_, left + after / size.clamp(min=1e-30) * along, torch.zeros_like(along))
            size = after
        return solution

    def _pushed(self, expected: Tensor, change: Tensor) -> LowImages:
        """How the measurement of the expected face moves with a change in [0, 1]."""
        if self.degradation.linear:
            return self.degradation.apply(change) - self.degradation.apply(torch.zeros_like(change[:1]))
        at = ((expected + 1) / 2).requires_grad_()
        with torch.enable_grad():
            low = self.degradation.apply(at)
            weights = torch.zeros_like(low, requires_grad=True)
            (back,) = torch.autograd.grad(low, at, weights, create_graph=True)
            (pushed,) = torch.autograd.grad(back, weights, change)
        return pushed


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each face, (n, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
