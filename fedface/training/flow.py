"""One round of fine-tuning a rectified flow on one device's photos, every step of it private.

A flow has one network and no discriminator: the loss of one photo is the regression of Liu et al. 2022
(arXiv:2209.03003), equation 1, averaged over `noise_draws` draws of a time and a noise image before its gradient is
clipped (noise multiplicity, Dockhorn et al. 2022, arXiv:2210.09929, section 3.1): more draws reduce the variance of
one photo's gradient and cost no privacy, see training/dp_sgd.

The draws of one photo are stratified: times come one from each of equal intervals, and noise images in pairs of
opposite sign, whose contributions that are odd in the noise cancel.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Annotated, ClassVar, assert_never

import numpy as np
import torch
from torch import Tensor

from fedface.models.lora import Adaptation, Full, attach
from fedface.models.model import Architecture, FlowArchitecture, Model
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.synthetic.faces import render_people
from fedface.tensor_types import Images, StoredImages, Vector
from fedface.training.dp_momentum_sgd import MomentumSettings, descent, descent_ranges, dp_sgd_update
from fedface.training.dp_sgd import check_per_example_gradients
from fedface.training.per_example_gradients import (
    Draws,
    Network,
    PerExampleProblem,
    differentiable_gradient,
    per_example_gradients,
    trainable_parameters,
    weights_digest,
)
from fedface.training.training_round import (
    Objective,
    PerExampleRelease,
    apply_mean_update,
    check_architecture,
    guaranteed_units,
    mark_trainable,
)
from fedface.training.unit_clipping import NoiseSource
from fedface.validation import In, checked

_PUBLIC_FACES = 64  # synthetic faces from which the scales are estimated
_FACES_AT_ONCE = 32
_PHOTOS_AT_ONCE = 16  # whose gradients are in memory together: the fastest, see docs/speed.md
_EVALUATIONS_AT_ONCE = 64  # photos times draws whose activations are in memory together


@dataclass(frozen=True, kw_only=True)
@checked
class FlowTrainingConfig(MomentumSettings):
    """How devices fine-tune a flow; every number is public and the same on all devices."""

    kind: ClassVar[str] = "flow-training"
    objective: ClassVar[Objective] = "generator"

    rounds: int = 5  # rounds of the run, >= 1
    steps_per_round: int = 8  # private steps a device takes in one round, >= 1
    sampling_rate: float = 0.05  # q: probability of a photo to join a step, in (0, 1]
    expected_batch_size: int = 10  # public divisor of each step's sum, >= 1
    clip_norm: float = 0.1  # largest L2 norm of one photo's gradient, > 0
    # K: draws of time and noise, per photo and step
    noise_draws: Annotated[int, In(f"[1, {_EVALUATIONS_AT_ONCE}]")] = 1
    # Times run from 0 (noise); early ones decide what a face looks like
    max_time: Annotated[float, In("(0, 1]")] = 1.0
    lr: Annotated[float, In("[1e-6, 1000)")] = 0.1  # of gradient descent
    # Noise multiplier above which lr falls as 1 / noise
    lr_noise_threshold: Annotated[float, In("(0, 1000]")] = 0.5
    # Fraction of the last step repeated in the next of the same round
    momentum: Annotated[float, In("[0, 1)")] = 0.9
    preconditioner: Annotated[float, In("[0, 100]")] = 0.0  # damping of the public scales; 0: no scales
    server_lr: Annotated[float, In("(0, 4]")] = 1.0  # times the mean update, on the server
    adapt: Adaptation = field(default_factory=Full)  # which weights are trained: all, or low-rank changes

    def __post_init__(self) -> None:
        self.schedule()

    def check(self, architecture: Architecture) -> None:
        """Raises ConfigError unless a model of this architecture can be trained this way."""
        check_architecture(architecture, FlowArchitecture)

    def prepare(self, model: Model, dp: DPParameters, rng: torch.Generator) -> FlowRound:
        """A round on a copy of the model; `rng` draws the public directions of low-rank changes."""
        return FlowRound(mark_trainable(model, self.adapt, rng), self, dp)


def flow_loss(network: Network, images: Images, noise: Tensor, times: Tensor) -> Tensor:
    """The squared error of the velocity, averaged over channels and pixels, one per image, (n,).

    Args:
        network: (points (n, 3, s, s), times (n,)) -> velocities (n, 3, s, s).
        images: (n, 3, s, s) in [0, 1].
        noise: Standard normal, (n, 3, s, s).
        times: (n,) in [0, 1]; 0 is noise, 1 the image.
    """
    x1, t = 2.0 * images - 1.0, times[:, None, None, None]
    velocity = network(noise + t * (x1 - noise), times)
    return (velocity.to(noise.dtype) - (x1 - noise)).square().mean(dim=(1, 2, 3))


def loss_over_draws(network: Network, photos: Images, draws: Tensor) -> Tensor:
    """The mean of `flow_loss` over each photo's own draws (n, K, 1 + 3 s s), each a time and a noise image: (n,)."""
    count = draws.shape[1]
    times, noise = draws[:, :, 0].flatten(), draws[:, :, 1:].reshape(-1, *photos.shape[1:])
    return (
        flow_loss(network, photos.repeat_interleave(count, dim=0), noise, times).view(-1, count).mean(dim=1)
    )


def times_and_noises(photos: int, count: int, side: int, max_time: float, rng: np.random.Generator) -> Tensor:
    """K draws for each of n photos, independent from photo to photo: (n, K, 1 + 3 s s) float32.

    Times in [0, max_time], one from each K-th of the range, and standard normal noise images of side s, each second
    one the negative of the one before.
    """
    intervals = rng.permuted(np.tile(np.arange(count), (photos, 1)), axis=1)
    times = max_time * (intervals + rng.random((photos, count))) / count
    half = rng.standard_normal((photos, -(-count // 2), 3 * side * side), dtype=np.float32)
    noise = np.stack([half, -half], axis=2).reshape(photos, -1, 3 * side * side)[:, :count]
    return torch.from_numpy(np.concatenate([times[:, :, None].astype(np.float32), noise], axis=2))


def _draws(flow: RectifiedFlow, config: FlowTrainingConfig, rng: NoiseSource) -> Draws:
    """Secret draws under a guarantee, replayable ones without."""
    match rng:
        case SecretNoise():
            # A fast stream under a secret key of 128 bits: these draws must be secret, but they are not the noise.
            key = rng.words(2)
        case torch.Generator():
            key = torch.randint(2**62, (2,), generator=rng).numpy().astype(np.uint64)
        case _:
            assert_never(rng)
    stream = np.random.Generator(np.random.Philox(key=key))
    return Draws(
        lambda photos, rng: times_and_noises(photos, config.noise_draws, flow.size, config.max_time, rng),
        stream,
    )


@dataclass(frozen=True)
class FlowRound:
    """One round of training a rectified flow, see `TrainingRound`."""

    model: Model
    config: FlowTrainingConfig
    dp: DPParameters

    def update(
        self, photos: StoredImages, *, rng: NoiseSource, streams: Streams, units: Tensor | None = None
    ) -> Vector:
        """What a device sends of its trained weights, in the order of their names, shape (d,), see `dp_sgd_update`.

        `streams` is not used: a flow's draws are as secret as its coins.
        """
        flow, config = copy.deepcopy(self.model.network(RectifiedFlow)), self.config
        draws = _draws(flow, config, rng)
        _check(flow.config, config.adapt)
        problem = PerExampleProblem(
            flow,
            loss_over_draws,
            draws,
            public_scales(flow, config),
            microbatch=_PHOTOS_AT_ONCE if _PHOTOS_AT_ONCE * config.noise_draws <= _EVALUATIONS_AT_ONCE else 1,
            recipe=(self.model.architecture, config),
        )
        return dp_sgd_update(
            problem, photos, self.dp, config, rng=rng, units=guaranteed_units(self.dp, units)
        )

    def ranges(self) -> Vector:
        """Public bounds on how far each trained weight moves in one round, see `descent_ranges`, shape (d,)."""
        return descent_ranges(self.model.network(RectifiedFlow), self.config, self.dp)

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """The gradient of a photo's loss at draws that the attacker knows, the same for every photo."""
        flow, config = self.model.network(RectifiedFlow), self.config
        rows = times_and_noises(
            1, config.noise_draws, flow.size, config.max_time, streams.numpy("draws of one photo")
        )
        return differentiable_gradient(
            flow, lambda photos: loss_over_draws(flow, photos, rows.expand(len(photos), -1, -1)).mean()
        )

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The mean update applied."""
        change = descent(total, self.config, self.dp)
        return apply_mean_update(self.model, change, devices, self.config.server_lr)


def public_scales(flow: RectifiedFlow, config: FlowTrainingConfig) -> list[Tensor] | None:
    """Factors that equalise the gradient across weights, estimated from synthetic faces; None for preconditioner 0.

    AdaDPS (Li et al. 2022, arXiv:2202.05963): noise has one scale for all weights, gradients do not, and Adam, which
    equalises them, fails on noised gradients. Here the scales come from public images, so that they cost no privacy:
    1 / (r_i + preconditioner * r), with r_i the root mean square of weight i's gradient over synthetic faces and r
    that of all weights, all times one factor that preserves a gradient's usual norm.

    Returns:
        One tensor (*weight.shape) per trained parameter, in the order of `flow.parameters()`, all > 0.
    """
    if config.preconditioner == 0:
        return None
    key = (weights_digest(flow), flow.config, config)
    with _LOCK:  # concurrent devices wait for the one that computes
        _SCALES[key] = _SCALES.pop(key) if key in _SCALES else _public_scales(flow, config)
        if len(_SCALES) > 2:
            del _SCALES[next(iter(_SCALES))]
        return _SCALES[key]


# The most recent scales, so that simulated devices in one process share the work: by the weights of a flow, of which
# no reference is held, since a device trains its copy after it has asked.
_SCALES: dict[tuple[bytes, FlowConfig, FlowTrainingConfig], list[Tensor]] = {}
_LOCK = Lock()


def _public_scales(flow: RectifiedFlow, config: FlowTrainingConfig) -> list[Tensor]:
    streams = Streams(0).child("public faces")
    faces = render_people(_PUBLIC_FACES, 0.5, flow.size, streams)
    draws = times_and_noises(_PUBLIC_FACES, 1, flow.size, config.max_time, streams.numpy("draws"))
    squares = [torch.zeros_like(weight) for weight in trainable_parameters(flow).values()]
    problem = PerExampleProblem(flow, loss_over_draws)
    for part, rows in zip(
        torch.split(faces, _FACES_AT_ONCE), torch.split(draws, _FACES_AT_ONCE), strict=True
    ):
        gradients = per_example_gradients(problem, part, rows)
        squares = [
            total + gradient.square().sum(dim=0) for total, gradient in zip(squares, gradients, strict=True)
        ]
    return _equalising_scales(squares, config.preconditioner)


def _equalising_scales(squares: list[Tensor], preconditioner: float) -> list[Tensor]:
    """Scales from each weight's summed squared gradients; ones where float32 cannot hold them all, each > 0."""
    ones = [torch.ones_like(square) for square in squares]
    energy = sum(float(square.sum()) for square in squares)
    floor = preconditioner * (energy / sum(square.numel() for square in squares)) ** 0.5
    if not 0.0 < floor < math.inf:
        return ones
    scales = [1.0 / (square.sqrt() + floor) for square in squares]
    scaled = sum(
        float((scale.square() * square).sum()) for scale, square in zip(scales, squares, strict=True)
    )
    if not 0.0 < scaled < math.inf:
        return ones
    scales = [scale * (energy / scaled) ** 0.5 for scale in scales]
    usable = all(bool(((scale > 0.0) & torch.isfinite(scale)).all()) for scale in scales)
    return scales if usable else ones


@lru_cache(maxsize=8)
def _check(config: FlowConfig, adapt: Adaptation) -> None:
    """Refuse a network that mixes photos, once per process: whether it does depends on its architecture alone.

    Two draws each are enough. The weights are moved off their initial values, where most gradients are zero.
    """
    streams = Streams(0)
    flow = RectifiedFlow(config, streams.generator("weights"))
    attach(flow, adapt, streams.generator("adapters"))
    rng = streams.generator("moved")
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.02)
    images = torch.rand(2, 3, config.size, config.size, generator=rng)
    problem = PerExampleProblem(
        flow,
        loss_over_draws,
        Draws(lambda count, rng: times_and_noises(count, 2, config.size, 1.0, rng), streams.numpy("draws")),
    )
    check_per_example_gradients(problem, images)
