"""The closed choice of training methods (docs/architecture.md compares them), and one round of any of them."""

from __future__ import annotations

from fedface.models.model import Model
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise, Streams
from fedface.training.flow import FlowTrainingConfig
from fedface.training.gan import GanTrainingConfig
from fedface.training.latent_prior import PriorTrainingConfig
from fedface.training.training_round import TrainingMethod, TrainingRound
from fedface.training.unit_clipping import NoiseSource
from fedface.training.upsampler import UpsamplerTrainingConfig

Training = GanTrainingConfig | FlowTrainingConfig | PriorTrainingConfig | UpsamplerTrainingConfig


def prepare_round(model: Model, training: TrainingMethod, dp: DPParameters, common: Streams) -> TrainingRound:
    """One round of a method on a copy of a model, of which what is trained is marked.

    Args:
        model: The weights before the round; they are not changed. ConfigError if it cannot be trained this way.
        training: The method.
        dp: Schedule and noise, as recorded in the ledger.
        common: Public streams of this round, the same on every device and on the server.
    """
    training.check(model.architecture)
    return training.prepare(model, dp, common.generator("adapter"))


def common_streams(seed: int, round: int) -> Streams:
    """The public streams of one round, which every device and the server derive alike from the task's seed."""
    return Streams(seed).child(f"common/{round}")


def noise_source(dp: DPParameters, streams: Streams) -> NoiseSource:
    """Where noise and coins come from: secret under a guarantee, the device's own replayable stream without one."""
    return SecretNoise() if dp.is_private else streams.generator("no privacy")
