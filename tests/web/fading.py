"""A method provider whose faces are known: each fades in from black over some steps. For the tests of the page. Face i
of f is the photo's enlarged pixels, with (i + 1) / f of its blue.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from fedface.errors import ConfigError
from fedface.photos.face_alignment import Face
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot, Upsampled, squared_difference
from fedface.web.method_provider import MethodInfo

SIZE = 16
STEPS = 8


def faces_of(low: LowImages, count: int) -> Images:
    """The faces that a search of one photo ends with, (count, 3, SIZE, SIZE)."""
    large = F.interpolate(low, size=(SIZE, SIZE), mode="nearest").repeat(count, 1, 1, 1).clamp(0, 1)
    large[:, 2] *= (torch.arange(count) + 1).view(-1, 1, 1) / count
    return large


class Fading:
    """A slow `Upsampler`."""

    def __init__(
        self, side: int, pause: float, progress: Progress | None, watch: StepCallback | None
    ) -> None:
        self.low_size, self.size = side, SIZE
        self._pause, self._progress, self._watch = pause, progress, watch

    def upsample(self, low: LowImages, *, faces_per_photo: int) -> Upsampled:
        """Fade in, step by step."""
        images = faces_of(low, faces_per_photo)
        degradation = BicubicPulse(SIZE // self.low_size)
        consistency_error = squared_difference(
            degradation.apply(images), low.expand_as(degradation.apply(images))
        )
        for step in range(1, STEPS + 1):
            time.sleep(self._pause)
            if self._progress is not None:
                self._progress(step, STEPS)
            if self._watch is not None:
                generated = images * step / STEPS
                faces = torch.arange(faces_per_photo)
                self._watch(
                    StepSnapshot(
                        step=step,
                        steps=STEPS,
                        faces=faces,
                        images=generated,
                        consistency_error=consistency_error,
                    )
                )
        fits = torch.arange(faces_per_photo) == 0
        return Upsampled(
            images=images[None], consistency_error=consistency_error[None], converged=fits[None], steps=STEPS
        )


class FadingSearcher:
    """Three methods: one with several faces, one with a single face at 8 px only, one with a bug."""

    size = SIZE
    methods: Sequence[MethodInfo] = (
        MethodInfo(name="fading", title="Fading", description="Fades in.", several=True),
        MethodInfo(name="single", title="Single", description="Has one answer.", several=False),
        MethodInfo(name="broken", title="Broken", description="Has a bug.", several=True),
    )

    def __init__(self, pause: float = 0.0) -> None:
        self._pause = pause

    def training_data(self, method: str) -> str:
        return f"{method} has learned from 85 light faces in 100."

    def make(
        self, method: str, *, side: int, seed: int, progress: Progress | None, watch: StepCallback | None
    ) -> Fading:
        if method == "single" and side != 8:
            raise ConfigError("this network reads 8 pixels a side; choose 8, or another method")
        if method == "broken":
            raise RuntimeError("a bug")
        return Fading(side, self._pause, progress, watch)


class Known:
    """A detector that finds this many faces in every photo, each smaller than the one before."""

    name = "known"

    def __init__(self, count: int) -> None:
        self._count = count

    def find(self, pixels: np.ndarray) -> list[Face]:
        return [_face(30.0 + 10.0 * number) for number in reversed(range(self._count))]


def _face(eyes_apart: float) -> Face:
    half = eyes_apart / 2
    points = [(60 - half, 50), (60 + half, 50), (60, 65), (60 - half, 50 + half), (60 + half, 50 + half)]
    return Face((60 - half, 40, 60 + half, 80), np.array(points, dtype=np.float64), 1.0)
