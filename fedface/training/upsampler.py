"""One round of training an upsampler on one device's photos, every step of it private.

For a style encoder (pSp, Richardson et al. 2021, arXiv:2008.00951) and for a super-resolution network. The loss of one
photo: downscale it as configured, upsample with the network, and compare with the photo itself. Nothing else of the
photo is used, so that the loss of photo i depends on photo i alone and each step is a Poisson-sampled Gaussian sum
(Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; training/dp_sgd).

Of the style encoder's two networks the generator is frozen: devices train only the encoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.lora import Adaptation, Full, attach
from fedface.models.model import (
    Architecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    UpsamplerArchitecture,
    build_model,
    image_size,
)
from fedface.privacy.plan import DPParameters
from fedface.randomness import Streams
from fedface.tensor_types import Images, StoredImages, Vector
from fedface.training.dp_momentum_sgd import MomentumSettings, descent, descent_ranges, dp_sgd_update
from fedface.training.dp_sgd import check_per_example_gradients
from fedface.training.per_example_gradients import (
    Network,
    PerExampleLoss,
    PerExampleProblem,
    differentiable_gradient,
)
from fedface.training.pretrain_gan import pair_losses
from fedface.training.training_round import (
    Objective,
    PerExampleRelease,
    apply_mean_update,
    check_architecture,
    guaranteed_units,
)
from fedface.training.unit_clipping import NoiseSource
from fedface.upsampling.degradation import BicubicPulse, Degradation, format_degradation
from fedface.upsampling.upsampler import squared_difference
from fedface.validation import In, checked

_MICROBATCH_VALUES = 2**25  # activations that one microbatch keeps in memory
# Activations of one photo: about half a gigabyte, and its gradient several times that
_MAX_VALUES_PER_PHOTO = 2**27


@dataclass(frozen=True, kw_only=True)
@checked
class UpsamplerTrainingConfig(MomentumSettings):
    """How devices train an upsampler; every number is public and the same on all devices."""

    kind: ClassVar[str] = "upsampler-training"
    objective: ClassVar[Objective] = "upsampler"

    rounds: int = 5  # rounds of the run, >= 1
    steps_per_round: int = 8  # private steps a device takes in one round, >= 1
    sampling_rate: float = 0.08  # q: probability of a photo to join a step, in (0, 1]
    expected_batch_size: int = 32  # public divisor of each step's sum, >= 1
    clip_norm: float = 0.3  # largest L2 norm of one photo's gradient, > 0; about the usual norm
    # What the network learns to invert.
    downscale: Degradation = field(default_factory=lambda: BicubicPulse(4))
    # Of the squared difference after the downscale
    consistency_weight: Annotated[float, In("[0, 10000]")] = 10.0
    lr: Annotated[float, In("[1e-6, 1000)")] = 1.0  # of gradient descent
    # Noise multiplier above which lr falls as 1 / noise
    lr_noise_threshold: Annotated[float, In("(0, 1000]")] = 0.5
    # Fraction of the last step repeated in the next of the same round
    momentum: Annotated[float, In("[0, 1)")] = 0.9
    server_lr: Annotated[float, In("(0, 4]")] = 1.0  # times the mean update, on the server
    adapt: Adaptation = field(default_factory=Full)  # which weights are trained: all, or low-rank changes
    learner: Literal["style-encoder", "super-resolution"] = "style-encoder"  # which network is trained

    def __post_init__(self) -> None:
        self.schedule()
        if self.downscale.noise_std > 0:
            raise ValueError(
                f"downscale must add no noise in training, got {format_degradation(self.downscale)}; "
                "noise belongs under upsampling, or into a method's noise_std"
            )

    def check(self, architecture: Architecture) -> None:
        """Raises ConfigError unless a model of this architecture can be trained this way, on this downscale."""
        expected = (
            StyleEncoderArchitecture if self.learner == "style-encoder" else SuperResolutionArchitecture
        )
        check_architecture(architecture, expected)
        size = image_size(architecture)
        try:
            low = self.downscale.low_side(size)
        except ValueError as error:
            raise ConfigError(
                f"training.downscale does not support faces of {size} pixels: {error}"
            ) from error
        if low >= size:
            raise ConfigError(
                f"training.downscale leaves faces at {low} pixels: an upsampler learns from photos that are smaller"
            )
        if isinstance(architecture, UpsamplerArchitecture) and low > architecture.max_input_size:
            raise ConfigError(
                f"training.downscale makes photos of {low} pixels from faces of {size}, and this network reads photos "
                f"of {architecture.max_input_size} at most; name another downscale or another base"
            )

    def prepare(self, model: Model, dp: DPParameters, rng: torch.Generator) -> UpsamplerRound:
        """A round on a copy of the model; `rng` draws the public directions of low-rank changes.

        Raises:
            ConfigError: The loss cannot be computed for this network, or takes more memory than devices give.
            PrivacyError: The network mixes photos.
        """
        check_trainable(model.architecture, self)
        marked = copy.deepcopy(model)
        mark_upsampler(marked, self.adapt, rng)
        return UpsamplerRound(marked, self, dp)


def reconstruction_loss(downscale: Degradation, consistency_weight: float) -> PerExampleLoss:
    """The loss of one photo: (network, photos (n, 3, s, s)) -> (n,).

    The output against the photo, L1 on pixels and on their differences at three scales; and the output's own
    downscale against the network's input, for an upsampler must be consistent with the pixels it was given.
    """

    def loss(network: Network, photos: Images) -> Tensor:
        low = downscale.apply(photos).clamp(0.0, 1.0)
        generated = network(low)
        inconsistency = squared_difference(downscale.apply(generated), low)
        return pair_losses(generated, photos) + consistency_weight * inconsistency

    return loss


@dataclass(frozen=True)
class UpsamplerRound:
    """One round of training an upsampler, see `TrainingRound`."""

    model: Model
    config: UpsamplerTrainingConfig
    dp: DPParameters

    def update(
        self, photos: StoredImages, *, rng: NoiseSource, streams: Streams, units: Tensor | None = None
    ) -> Vector:
        """What a device sends of its trained weights, in the order of their names, shape (d,), see `dp_sgd_update`."""
        config = self.config
        values = check_trainable(self.model.architecture, config)
        network = copy.deepcopy(self.model.upsampler)
        problem = PerExampleProblem(
            network,
            self._loss(),
            microbatch=16 if 16 * values <= _MICROBATCH_VALUES else 1,
            recipe=(self.model.architecture, config),
        )
        return dp_sgd_update(
            problem, photos, self.dp, config, rng=rng, units=guaranteed_units(self.dp, units)
        )

    def ranges(self) -> Vector:
        """Public bounds on how far each trained weight moves in one round, see `descent_ranges`, shape (d,)."""
        return descent_ranges(self.model.upsampler, self.config, self.dp)

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """The gradient of a photo's loss."""
        network, loss = self.model.upsampler, self._loss()
        return differentiable_gradient(network, lambda photos: loss(network, photos).mean())

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The mean update applied."""
        change = descent(total, self.config, self.dp)
        return apply_mean_update(self.model, change, devices, self.config.server_lr)

    def _loss(self) -> PerExampleLoss:
        return reconstruction_loss(self.config.downscale, self.config.consistency_weight)


def mark_upsampler(model: Model, adapt: Adaptation, rng: torch.Generator) -> None:
    """Mark in place what is trained: the network that maps photos, never the generator."""
    for module in model.modules():
        module.requires_grad_(False)
    attach(model.modules()[-1], adapt, rng)  # the style encoder, or the only network


@lru_cache(maxsize=8)
def check_trainable(architecture: Architecture, config: UpsamplerTrainingConfig) -> int:
    """Refuse what no device should begin with, once per process; it depends on the architecture and reads no photo.

    A device checks before it writes its ledger; memory, because the success of a step could reveal how many photos
    joined it. Returns how many activations one photo needs in memory, >= 1.

    Raises:
        ConfigError: The loss cannot be computed for this architecture, or takes more memory than devices give.
        PrivacyError: The network mixes photos.
    """
    with torch.device("meta"):
        values = _count_activations(build_model(architecture))
    if values > _MAX_VALUES_PER_PHOTO:
        raise ConfigError(
            f"training: one photo would keep {values:,} numbers in memory, devices allow {_MAX_VALUES_PER_PHOTO:,}; "
            "name a smaller network"
        )
    try:
        _check(architecture, config)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ConfigError(f"training: this loss cannot be computed for this network ({error})") from error
    return values


def _count_activations(model: Model) -> int:
    """Outputs of all layers for one photo, counted without memory."""
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    network, architecture = model.upsampler, model.architecture
    assert isinstance(architecture, UpsamplerArchitecture)
    side = architecture.max_input_size
    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network(torch.zeros(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return max(1, total)


def _check(architecture: Architecture, config: UpsamplerTrainingConfig) -> None:
    """Compare per-example gradients with gradients of single photos, on random images."""
    streams = Streams(0)
    model = build_model(architecture, streams.generator("weights"))
    mark_upsampler(model, config.adapt, streams.generator("adapters"))
    rng = streams.generator("moved")
    network = model.upsampler
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.02)
    images = torch.rand(2, 3, model.size, model.size, generator=rng)
    loss = reconstruction_loss(config.downscale, config.consistency_weight)
    check_per_example_gradients(PerExampleProblem(network, loss), images)
