"""What every training method offers, and what the methods share.

A method's configuration is a value of the recipe and of every task; with a model and privacy parameters it becomes a
round, which is the same object on the device (`update`) and on the server (`apply`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedface.errors import ConfigError
from fedface.models.lora import Adaptation, Lora, assign_trainable, attach, flatten_trainable, merge
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    GanArchitecture,
    Model,
    StyleEncoderArchitecture,
)
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import Streams
from fedface.tensor_types import Images, StoredImages, Vector
from fedface.training.unit_clipping import NoiseSource

PerExampleRelease = Callable[[Images], Vector]
Objective = Literal["generator", "upsampler"]  # what photos help to train, as a device's policy names it


class TrainingRound(Protocol):
    """One round of training a model, of which what is trained is marked."""

    @property
    def model(self) -> Model:
        """A copy of the weights before the round, with low-rank changes attached where they are trained."""

    def update(
        self, photos: StoredImages, *, rng: NoiseSource, streams: Streams, units: Tensor | None = None
    ) -> Vector:
        """What a device sends, before it is divided by `ranges` and protected, shape (d,).

        Photos enter only through `dp_sgd`, as often as the schedule says, and the round's model is not changed.

        Args:
            photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
            rng: SecretNoise for a private round; a replayable stream only without privacy.
            streams: The device's own replayable streams, for generated images.
            units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.

        Raises:
            PrivacyError: The network mixes photos, or a private round was given a replayable stream.
        """

    def ranges(self) -> Vector:
        """Public bounds of the numbers of `update`, for quantisation, shape (d,), all > 0; they are clamped to them."""

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """What one step releases of one photo, before clipping and noise, differentiable in the photo; for audits.

        The attacker is assumed to know what is sampled beside the photo: a flow's times and noises, which on a device
        are secret. Several photos give the mean.

        Args:
            streams: Where those draws come from.
        """

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The model after this round. Post-processing (Dwork and Roth 2014, Proposition 2.1): no privacy cost.

        Args:
            total: The sum of `update` over the devices in it, shape (d,).
            devices: How many are in it, >= 1.
            rng: Replayable draws for the mean style.
        """


class TrainingMethod(Protocol):
    """A way to train, with all its hyperparameters; they are public and the same on all devices."""

    @property
    def objective(self) -> Objective:
        """What photos help to train."""

    def schedule(self) -> Schedule:
        """What of the configuration determines the privacy loss."""

    def describe_update(self) -> str:
        """What a device sends, in words that follow a number."""

    def check(self, architecture: Architecture) -> None:
        """Raises ConfigError unless a model of this architecture can be trained this way."""

    def prepare(self, model: Model, dp: DPParameters, rng: torch.Generator) -> TrainingRound:
        """A round on a copy of a checked model; `rng` draws the public directions of low-rank changes."""


class DPSGDSettings:
    """What the configurations share whose networks read photos by DP-SGD."""

    rounds: int
    steps_per_round: int
    sampling_rate: float
    expected_batch_size: int
    clip_norm: float
    adapt: Adaptation

    def schedule(self) -> Schedule:
        """What of this determines the privacy loss; raises ValueError for a number out of range."""
        return Schedule(
            rounds=self.rounds,
            steps_per_round=self.steps_per_round,
            sampling_rate=self.sampling_rate,
            expected_batch_size=self.expected_batch_size,
            clip_norm=self.clip_norm,
        )

    def describe_update(self) -> str:
        """What a device sends, in words that follow a number."""
        if isinstance(self.adapt, Lora):
            return f"changes of low-rank weights (rank {self.adapt.rank})"
        return "weight changes"


def check_architecture(actual: Architecture, expected: type[Architecture]) -> None:
    """Raises ConfigError for another architecture, and for networks that need a class for each image."""
    if not isinstance(actual, expected):
        raise ConfigError(
            f"training: this method needs {expected.description}, got {actual.description}; "
            "name such a checkpoint as base"
        )
    with_generator = GanArchitecture | EncoderArchitecture | StyleEncoderArchitecture
    if isinstance(actual, with_generator) and actual.generator.classes:
        raise ConfigError(
            "training: this generator is class-conditional, and devices do not send the classes of their photos; "
            "name a checkpoint whose generator has no classes as base"
        )


def mark_trainable(model: Model, adapt: Adaptation, rng: torch.Generator) -> Model:
    """A copy in which all networks are trained: all weights, or low-rank changes in public random directions."""
    marked = copy.deepcopy(model)
    for module in marked.modules():
        attach(module, adapt, rng)
    return marked


def apply_mean_update(model: Model, total: Vector, devices: int, server_lr: float) -> Model:
    """A copy whose trained weights moved by `server_lr` times the mean update, low-rank changes merged."""
    after = copy.deepcopy(model)
    start = flatten_trainable(*after.modules())
    assign_trainable(start + server_lr * total / devices, *after.modules())
    for module in after.modules():
        merge(module)
    return after


def guaranteed_units(dp: DPParameters, units: Tensor | None) -> Tensor | None:
    """The units where the guarantee is per occasion; None, each photo its own, where it is not.

    Per library the whole update is one vector, whatever its steps clip.
    """
    return units if dp.unit == "occasion" else None
