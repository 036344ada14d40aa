"""The families of models behind one door: what a checkpoint holds, and how to build it from its shape alone.

Called from models/weights (files), training/ways (which knows how each learns) and federation/ (which carries
them). Each family has a generator with the three verbs of `models.contracts`; what stands beside it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, assert_never

import torch
from torch import nn

from fedface.errors import ConfigError
from fedface.models.critic import Critic, CriticConfig
from fedface.models.encoder import Encoder, EncoderConfig
from fedface.models.flow import FlowConfig, RectifiedFlow
from fedface.models.stylegan1 import StyleGAN1, StyleGAN1Config
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2


@dataclass(frozen=True, kw_only=True)
class GanShape:
    """A StyleGAN2 generator and the critic it learns from."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        if self.generator.size != self.critic.size:
            raise ConfigError(
                f"generator and critic must have one size, got {self.generator.size} and {self.critic.size}"
            )


@dataclass(frozen=True, kw_only=True)
class EncodedShape:
    """A StyleGAN2 generator and the encoder that finds a photo's latent."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        for name in ("size", "latent_width"):
            made, read = getattr(self.generator, name), getattr(self.encoder, name)
            if made != read:
                raise ConfigError(f"generator and encoder must have one {name}, got {made} and {read}")


@dataclass(frozen=True, kw_only=True)
class FlowShape:
    """A rectified flow; it needs nobody beside it."""

    flow: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True, kw_only=True)
class AloneShape:
    """A generator without its critic, as a stranger's file may hold it: for sampling and searching."""

    generator: GeneratorConfig | StyleGAN1Config = field(default_factory=GeneratorConfig)


Shape = GanShape | EncodedShape | FlowShape | AloneShape


@dataclass(frozen=True)
class Gan:
    """A generator and the critic it was trained against, with what is known about their making."""

    generator: StyleGAN2
    critic: Critic
    notes: Mapping[str, Any]

    @property
    def shape(self) -> GanShape:
        """What `build` needs to make networks of the same form."""
        return GanShape(generator=self.generator.config, critic=self.critic.config)

    def named(self) -> dict[str, nn.Module]:
        """The networks by name, in the order in which their weights are flattened."""
        return {"generator": self.generator, "critic": self.critic}

    def modules(self) -> tuple[nn.Module, ...]:
        """Both networks in the order in which their weights are flattened."""
        return self.generator, self.critic


@dataclass(frozen=True)
class Encoded:
    """A generator and the encoder that finds a photo's latent."""

    generator: StyleGAN2
    encoder: Encoder
    notes: Mapping[str, Any]

    @property
    def shape(self) -> EncodedShape:
        """What `build` needs to make networks of the same form."""
        return EncodedShape(generator=self.generator.config, encoder=self.encoder.config)

    def named(self) -> dict[str, nn.Module]:
        """The networks by name, in the order in which their weights are flattened."""
        return {"generator": self.generator, "encoder": self.encoder}

    def modules(self) -> tuple[nn.Module, ...]:
        """Both networks in the order in which their weights are flattened."""
        return self.generator, self.encoder


@dataclass(frozen=True)
class Flow:
    """A rectified flow: photo to latent and back."""

    generator: RectifiedFlow
    notes: Mapping[str, Any]

    @property
    def shape(self) -> FlowShape:
        """What `build` needs to make a network of the same form."""
        return FlowShape(flow=self.generator.config)

    def named(self) -> dict[str, nn.Module]:
        """The network by name."""
        return {"flow": self.generator}

    def modules(self) -> tuple[nn.Module, ...]:
        """The one network."""
        return (self.generator,)


@dataclass(frozen=True)
class Alone:
    """A generator without its critic."""

    generator: StyleGAN2 | StyleGAN1
    notes: Mapping[str, Any]

    @property
    def shape(self) -> AloneShape:
        """What `build` needs to make a network of the same form."""
        return AloneShape(generator=self.generator.config)

    def named(self) -> dict[str, nn.Module]:
        """The network by name."""
        return {"generator": self.generator}

    def modules(self) -> tuple[nn.Module, ...]:
        """The one network."""
        return (self.generator,)


Model = Gan | Encoded | Flow | Alone


def build(
    shape: Shape, chance: torch.Generator | None = None, notes: Mapping[str, Any] | None = None
) -> Model:
    """Networks of a shape with random weights.

    Args:
        shape: Which family, and how large.
        chance: Where the weights are drawn from; torch's own stream if None, for weights that are filled next.
        notes: What is known about their making.
    """
    known = dict(notes or {})
    match shape:
        case GanShape():
            return Gan(StyleGAN2(shape.generator, chance), Critic(shape.critic, chance), known)
        case EncodedShape():
            return Encoded(StyleGAN2(shape.generator, chance), Encoder(shape.encoder, chance), known)
        case FlowShape():
            return Flow(RectifiedFlow(shape.flow, chance), known)
        case AloneShape(generator=config):
            if isinstance(config, StyleGAN1Config):
                return Alone(StyleGAN1(config, chance), known)
            return Alone(StyleGAN2(config, chance), known)
        case _:
            assert_never(shape)


M = TypeVar("M", Gan, Encoded, Flow, Alone)


def copy_model(model: M) -> M:
    """The same weights in new memory."""
    twin = build(model.shape, notes=model.notes)
    for mine, theirs in zip(twin.modules(), model.modules(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return twin  # type: ignore[return-value]


def new_gan(generator: GeneratorConfig, critic: CriticConfig, chance: torch.Generator) -> Gan:
    """A generator and a critic with random weights; raises ConfigError unless their sizes agree."""
    shape = GanShape(generator=generator, critic=critic)
    return Gan(StyleGAN2(shape.generator, chance), Critic(shape.critic, chance), {})
