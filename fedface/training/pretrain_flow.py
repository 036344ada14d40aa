"""Pretraining of the bundled rectified flow on synthetic faces alone, like those of training/pretrain_gan.

The loss is the regression of Liu et al. 2022 (arXiv:2209.03003), equation 1, with times from the logit-normal
distribution of Esser et al. 2024 (arXiv:2403.03206), section 3.1, stratified over the batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from torch.optim import Adam

from fedface.models.model import FlowArchitecture, Model
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.randomness import Streams
from fedface.tensor_types import Images
from fedface.training.flow import flow_loss
from fedface.training.pretrain_gan import Progress, render_faces, take_step, training_notes, update_ema
from fedface.validation import AtLeast, Fraction, In, PositiveInt, checked


@dataclass(frozen=True, kw_only=True)
@checked
class FlowPretrainConfig:
    """Hyperparameters of pretraining; the defaults are those of the bundled checkpoint."""

    seed: int = 7  # >= 0
    light_fraction: Fraction = 0.85  # fraction of faces with light skin, Monk 1 to 5
    pool: PositiveInt = 40_000  # synthetic faces, rendered once, used many times, half of them mirrored
    steps: PositiveInt = 9000
    batch: Annotated[int, AtLeast(2)] = 64
    # Adam's, after a warm-up of 200 steps; falls along a cosine.
    learning_rate: Annotated[float, In("(0, 1)")] = 2e-3
    averaging: Annotated[float, In("[0, 1)")] = 0.9995  # decay of the moving average in late steps
    flow: FlowConfig = field(default_factory=FlowConfig)


def synthesize_pool(config: FlowPretrainConfig, report: Progress) -> Tensor:
    """Synthetic faces with camera noise, (pool, 3, s, s) uint8."""
    return render_faces(config.pool, config.light_fraction, config.flow.size, Streams(config.seed), report)


def stratified_times(count: int, rng: torch.Generator) -> Tensor:
    """Logit-normal times in (0, 1), one from each of `count` equally likely intervals, in random order, (count,)."""
    place = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
    return torch.sigmoid(torch.special.ndtri(place.clamp(1e-6, 1.0 - 1e-6)))


class FlowPretraining:
    """The state of one pretraining; `finish` gives the averaged network at any moment."""

    def __init__(self, config: FlowPretrainConfig, pool: Tensor) -> None:
        self.config = config
        self.pool = pool
        self.streams = Streams(config.seed)
        self.flow = RectifiedFlow(config.flow, self.streams.generator("weights"))
        self.averaged = RectifiedFlow(config.flow)
        self.averaged.load_state_dict(self.flow.state_dict())
        self.rng = self.streams.generator("faces")
        self.steps_done = 0
        self.started = time.monotonic()

    def images(self) -> Images:
        """A batch from the pool, half of it mirrored."""
        chosen = torch.randint(len(self.pool), (self.config.batch,), generator=self.rng)
        images = self.pool[chosen].float() / 255.0
        half = self.config.batch // 2
        return torch.cat([images[:half], images[half:].flip(-1)])

    def learn(self, report: Progress) -> None:
        optimiser = Adam(self.flow.parameters(), self.config.learning_rate, betas=(0.9, 0.99))
        for step in range(self.config.steps):
            for group in optimiser.param_groups:
                group["lr"] = self.config.learning_rate * _lr_factor(step, self.config.steps)
            images = self.images()
            noise = torch.randn(images.shape, generator=self.rng)
            times = stratified_times(len(images), self.rng)
            with torch.autocast("cpu", torch.bfloat16):
                loss = flow_loss(self.flow, images, noise, times).mean()
            take_step(optimiser, loss)
            update_ema(self.averaged, self.flow, step, self.config.averaging)
            self.steps_done += 1
            if step % 100 == 0:
                report("flow", step, self.config.steps, {"loss": loss.item()})

    def finish(self) -> Model:
        """The averaged network, with notes on how it was trained."""
        images = self.steps_done * self.config.batch
        notes = training_notes("fedface pretrain flow", asdict(self.config), images, self.started)
        return Model(FlowArchitecture(flow=self.config.flow), {"flow": self.averaged}, notes)


def _lr_factor(step: int, steps: int) -> float:
    """The learning rate's multiplier: up to 1 within 200 steps or a tenth, then down to 0.01 along a cosine."""
    warm = min(1.0, (step + 1) / max(1, min(200, steps // 10)))
    return warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def pretrain_flow(config: FlowPretrainConfig, report: Progress) -> Model:
    """Render the pool and train on it."""
    training = FlowPretraining(config, synthesize_pool(config, report))
    training.learn(report)
    return training.finish()
