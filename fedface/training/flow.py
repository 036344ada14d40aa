"""One round of fine-tuning a rectified flow on one device's photos, every step of it private.

Called from training/training_methods. A flow has one network and no discriminator: the loss of one photo is the regression of
Liu et al. 2022 (arXiv:2209.03003), equation 1, averaged over `noise_draws` draws of a time and a noise picture
before its gradient is clipped (noise multiplicity, Dockhorn et al. 2022, arXiv:2210.09929, section 3.1): more
draws make the gradient of one photo more telling and cost no privacy, see training/dp_sgd.

Within one photo the draws are spread: times come one from each of equal slices, and noise pictures in pairs
of opposite sign, whose parts that are odd in the noise cancel.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import ClassVar, assert_never

import numpy as np
import torch
from torch import Tensor

from fedface.models.lora import Adaptation, Full, attach, flatten_trainable
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import SecretNoise, Streams
from fedface.synthetic.faces import render_people
from fedface.tensor_types import Images, KeptImages, Vector
from fedface.training.dp_momentum_sgd import check_descent, descent_ranges, dp_sgd_steps, scale_lr_for_noise
from fedface.training.dp_sgd import Network, check_per_example_gradients, per_example_gradients
from fedface.training.per_example_gradients import Draw, trainable_parameters

_PUBLIC = 64  # drawn faces that the scales are learned from
_AT_ONCE = 32  # of them
_PHOTOS_AT_ONCE = 16  # whose gradients are in memory together: what is fastest, see docs/speed.md
_EVALUATIONS_AT_ONCE = 64  # photos times draws whose activations are in memory together


@dataclass(frozen=True, kw_only=True)
class FlowTrainingConfig:
    """How devices fine-tune a flow; every number is public and the same on all devices."""

    kind: ClassVar[str] = "flow-training"

    rounds: int = 5  # rounds of the run, >= 1
    steps_per_round: int = 8  # private steps a device takes in one round, >= 1
    sampling_rate: float = 0.05  # q: chance of a photo to join a step, in (0, 1]
    expected_batch_size: int = 10  # public divisor of each step's sum, >= 1
    clip_norm: float = 0.1  # longest gradient one photo can have, > 0
    noise_draws: int = 1  # K: draws of time and noise for each photo and step, from 1 to 64
    max_time: float = (
        1.0  # times are drawn from 0 (noise) to this, in (0, 1]; what a face looks like is decided early
    )
    lr: float = 0.1  # step of gradient descent, > 0
    lr_noise_threshold: float = 0.5  # noise multiplier beyond which the rate falls as 1 / noise
    momentum: float = (
        0.9  # share of the last step that a device repeats in the next of the same round, in [0, 1)
    )
    preconditioner: float = 0.0  # flattest gradient that is scaled up in full, in public ones; 0: no scales
    server_lr: float = 1.0  # how much of the mean update the server applies, in (0, 4]
    adapt: Adaptation = field(default_factory=Full)  # which weights learn: all, or low-rank changes

    def __post_init__(self) -> None:
        self.schedule()
        # One photo's draws are in memory together.
        if not 1 <= self.noise_draws <= _EVALUATIONS_AT_ONCE:
            raise ValueError(f"noise_draws must lie in [1, {_EVALUATIONS_AT_ONCE}], got {self.noise_draws}")
        if not 0 < self.max_time <= 1:
            raise ValueError(f"max_time must lie in (0, 1], got {self.max_time}")
        check_descent(
            lr=self.lr,
            lr_noise_threshold=self.lr_noise_threshold,
            momentum=self.momentum,
            server_lr=self.server_lr,
        )
        if not 0 <= self.preconditioner <= 100:
            raise ValueError(f"preconditioner must lie in [0, 100], got {self.preconditioner}")

    def schedule(self) -> Schedule:
        """What of this costs privacy."""
        return Schedule(
            rounds=self.rounds,
            steps_per_round=self.steps_per_round,
            sampling_rate=self.sampling_rate,
            expected_batch_size=self.expected_batch_size,
            clip_norm=self.clip_norm,
        )


def flow_loss(network: Network, images: Images, noise: Tensor, times: Tensor) -> Tensor:
    """The squared error of the velocity, its mean over colours and pixels, one per image.

    Args:
        network: (points (n, 3, s, s), times (n,)) -> velocities (n, 3, s, s).
        images: (n, 3, s, s) in [0, 1].
        noise: Standard normal, (n, 3, s, s).
        times: (n,) in [0, 1]; 0 is noise, 1 the image.

    Returns:
        (n,).
    """
    pictures, at = 2.0 * images - 1.0, times[:, None, None, None]
    velocity = network(noise + at * (pictures - noise), times)
    return (velocity.to(noise.dtype) - (pictures - noise)).square().mean(dim=(1, 2, 3))


def loss_over_draws(network: Network, photos: Images, draws: Tensor) -> Tensor:
    """The mean of `flow_loss` over each photo's own draws.

    Args:
        network: As for `flow_loss`.
        photos: (n, 3, s, s) in [0, 1].
        draws: (n, K, 1 + 3 s s): for each photo and draw a time, then a noise picture.

    Returns:
        (n,).
    """
    count = draws.shape[1]
    times, noise = draws[:, :, 0].flatten(), draws[:, :, 1:].reshape(-1, *photos.shape[1:])
    return (
        flow_loss(network, photos.repeat_interleave(count, dim=0), noise, times).view(-1, count).mean(dim=1)
    )


def times_and_noises(photos: int, count: int, side: int, max_time: float, rng: np.random.Generator) -> Tensor:
    """Fresh draws for some photos, independent from photo to photo.

    Args:
        photos: n.
        count: K draws for each.
        side: s, of the noise pictures.
        latest: The end of the range of times, which starts at 0.
        rng: Where they are drawn from.

    Returns:
        (n, K, 1 + 3 s s) float32: times, one from each K-th of the range, and standard normal noise pictures,
        each second the negative of the one before.
    """
    slices = rng.permuted(np.tile(np.arange(count), (photos, 1)), axis=1)
    times = max_time * (slices + rng.random((photos, count))) / count
    half = rng.standard_normal((photos, -(-count // 2), 3 * side * side), dtype=np.float32)
    noise = np.stack([half, -half], axis=2).reshape(photos, -1, 3 * side * side)[:, :count]
    return torch.from_numpy(np.concatenate([times[:, :, None].astype(np.float32), noise], axis=2))


def _draw(flow: RectifiedFlow, config: FlowTrainingConfig, rng: SecretNoise | torch.Generator) -> Draw:
    """Draws that nobody else can know where something is promised, replayable ones where nothing is."""
    match rng:
        case SecretNoise():
            # A fast stream under a secret key of 128 bits: these draws are hidden, not what hides the photos.
            key = rng.words(2)
        case torch.Generator():
            key = torch.randint(2**62, (2,), generator=rng).numpy().astype(np.uint64)
        case _:
            assert_never(rng)
    stream = np.random.Generator(np.random.Philox(key=key))
    return lambda photos: times_and_noises(photos, config.noise_draws, flow.size, config.max_time, stream)


def train_flow_round(
    flow: RectifiedFlow,
    photos: KeptImages,
    config: FlowTrainingConfig,
    terms: DPParameters,
    *,
    rng: SecretNoise | torch.Generator,
    streams: Streams,
    units: Tensor | None = None,
) -> Vector:
    """The change of the flow's trained weights that one round on these photos makes.

    Guarantees:
        * Photos enter only through `private_gradient`, `terms.schedule.steps_per_round` times.
        * `flow` itself stays as it is.

    Args:
        flow: The round's weights, with adapters attached where they are what learns.
        photos: All photos of the device, (n, 3, size, size), floats in [0, 1] or bytes, n >= 0.
        config: Rates and draws; its schedule is not used, the terms are.
        terms: What was agreed and booked.
        rng: SecretNoise for a promise; a replayable stream only where nothing is promised.
        streams: Not used: a flow's draws are as secret as its coins. Every way of learning takes them.
        units: Which unit each photo belongs to, int64 (n,); None: each its own.

    Returns:
        Weights after minus weights before, in the order of their names, shape (d,).

    Raises:
        PrivacyError: The network mixes photos, or a promised round was given replayable chance.
    """
    mine = copy.deepcopy(flow)
    before = flatten_trainable(mine)
    draw = _draw(mine, config, rng)
    _check(flow.config, config.adapt)
    dp_sgd_steps(
        mine,
        photos,
        loss_over_draws,
        terms,
        lr=scale_lr_for_noise(config.lr, config.lr_noise_threshold, terms),
        momentum=config.momentum,
        rng=rng,
        units=units,
        draw=draw,
        scales=public_scales(mine, config),
        microbatch=min(_PHOTOS_AT_ONCE, max(1, _EVALUATIONS_AT_ONCE // config.noise_draws)),
    )
    return flatten_trainable(mine) - before


def public_scales(flow: RectifiedFlow, config: FlowTrainingConfig) -> list[Tensor] | None:
    """Factors that make the numbers of a gradient alike in size, learned from drawn faces; None where not asked for.

    AdaDPS (Li et al. 2022, arXiv:2202.05963): noise has one size for all weights, gradients do not, and Adam, which
    evens them out, drowns when it looks at noised gradients. Here the sizes come from public pictures, so that
    they cost nothing: 1 / (r_i + preconditioner * r), with r_i the root mean square of weight i's gradient over
    drawn faces and r that of all weights, all times one factor that keeps a gradient's usual length.

    Returns:
        One tensor (*weight.shape) per trained parameter, in the order of `flow.parameters()`, all > 0.
    """
    if config.preconditioner == 0:
        return None
    digest = hashlib.sha256()
    for numbers in (*flow.parameters(), *flow.buffers()):
        digest.update(numbers.detach().numpy().tobytes())
    return _KNOWN.scales((digest.hexdigest(), flow.config, config), lambda: _public_scales(flow, config))


_Key = tuple[str, FlowConfig, FlowTrainingConfig]


class _Known:
    """The scales asked for last, by a flow's numbers, shape and recipe.

    So devices pretended in one process share the work. What is kept are scales, which are public, and never a flow:
    a device's copy is trained on after it has asked.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._scales: dict[_Key, list[Tensor]] = {}

    def scales(self, key: _Key, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The scales of this key; who comes while they are computed waits for them."""
        with self._lock:
            found = self._scales.pop(key) if key in self._scales else compute()
            self._scales[key] = found
            while len(self._scales) > self._most:
                del self._scales[next(iter(self._scales))]
            return found


_KNOWN = _Known(most=2)


def _public_scales(flow: RectifiedFlow, config: FlowTrainingConfig) -> list[Tensor]:
    streams = Streams(0).child("public faces")
    pictures = render_people(_PUBLIC, 0.5, flow.size, streams)
    draws = times_and_noises(_PUBLIC, 1, flow.size, config.max_time, streams.numpy("draws"))
    squares = [torch.zeros_like(weight) for weight in trainable_parameters(flow).values()]
    for part, rows in zip(torch.split(pictures, _AT_ONCE), torch.split(draws, _AT_ONCE), strict=True):
        gradients = per_example_gradients(flow, loss_over_draws, part, draws=rows)
        squares = [
            total + gradient.square().sum(dim=0) for total, gradient in zip(squares, gradients, strict=True)
        ]
    return _evened(squares, config.preconditioner)


def _evened(squares: list[Tensor], preconditioner: float) -> list[Tensor]:
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
    """Refuse a kind of network that mixes photos, once per process: whether it does hangs on its form alone.

    Two draws each show it as well as many. The weights are moved off the start, where most gradients are zero.
    """
    streams = Streams(0)
    flow = RectifiedFlow(config, streams.generator("weights"))
    attach(flow, adapt, streams.generator("adapters"))
    rng, draws = streams.generator("moved"), streams.numpy("draws")
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.02)
    pictures = torch.rand(2, 3, config.size, config.size, generator=rng)
    check_per_example_gradients(
        flow, loss_over_draws, pictures, draw=lambda n: times_and_noises(n, 2, config.size, 1.0, draws)
    )


def flow_ranges(flow: RectifiedFlow, config: FlowTrainingConfig) -> Vector:
    """Public bounds on how far each trained weight moves in one round, see `descent_ranges`, shape (d,)."""
    return descent_ranges(
        flow,
        steps=config.steps_per_round,
        lr=config.lr,
        momentum=config.momentum,
        clip_norm=config.clip_norm,
    )
