"""The families of models behind one door: what a checkpoint holds, and how to build it from its shape alone.

Called from models/weights (files), training/ways (which knows how each learns) and federation/ (which carries
them). All families but one have a generator with the three verbs of `models.contracts`, and differ in what stands
beside it; a super-resolution network draws nobody by itself.
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
from fedface.models.resolver import Resolver, ResolverConfig
from fedface.models.style_encoder import StyleEncoder, StyleEncoderConfig, StyleUpsampler
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


@dataclass(frozen=True, kw_only=True)
class StyledShape:
    """A StyleGAN2 generator and the encoder that finds the styles of a low-resolution photo."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    encoder: StyleEncoderConfig = field(default_factory=StyleEncoderConfig)

    def __post_init__(self) -> None:
        wanted = (2 * len(self.generator.sides), self.generator.style_width)
        told = (self.encoder.style_inputs, self.encoder.style_width)
        if told != wanted:
            raise ConfigError(
                f"the encoder must tell {wanted[0]} styles of width {wanted[1]}, as the generator takes them, "
                f"got {told[0]} of width {told[1]}"
            )
        if self.generator.size < self.encoder.side:
            raise ConfigError(
                f"side must be at most the generator's {self.generator.size}, got {self.encoder.side}"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedShape:
    """A super-resolution network; it needs nobody beside it."""

    resolver: ResolverConfig = field(default_factory=ResolverConfig)


Shape = GanShape | EncodedShape | FlowShape | AloneShape | StyledShape | ResolvedShape


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

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


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

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


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

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


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

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


@dataclass(frozen=True)
class Styled:
    """A generator and the encoder that finds the styles of a low-resolution photo."""

    generator: StyleGAN2
    encoder: StyleEncoder
    notes: Mapping[str, Any]

    @property
    def shape(self) -> StyledShape:
        """What `build` needs to make networks of the same form."""
        return StyledShape(generator=self.generator.config, encoder=self.encoder.config)

    def named(self) -> dict[str, nn.Module]:
        """The networks by name, in the order in which their weights are flattened."""
        return {"generator": self.generator, "encoder": self.encoder}

    def modules(self) -> tuple[nn.Module, ...]:
        """Both networks in the order in which their weights are flattened."""
        return self.generator, self.encoder

    @property
    def upsampler(self) -> StyleUpsampler:
        """Both as one network from photos to faces; it shares their weights."""
        return StyleUpsampler(self.generator, self.encoder)

    @property
    def largest_low(self) -> int:
        """Height and width in pixels of the largest photos that it reads."""
        return self.encoder.config.side

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


@dataclass(frozen=True)
class Resolved:
    """A super-resolution network: photo to picture, no generator."""

    resolver: Resolver
    notes: Mapping[str, Any]

    @property
    def shape(self) -> ResolvedShape:
        """What `build` needs to make a network of the same form."""
        return ResolvedShape(resolver=self.resolver.config)

    def named(self) -> dict[str, nn.Module]:
        """The network by name."""
        return {"resolver": self.resolver}

    def modules(self) -> tuple[nn.Module, ...]:
        """The one network."""
        return (self.resolver,)

    @property
    def upsampler(self) -> Resolver:
        """The network itself."""
        return self.resolver

    @property
    def largest_low(self) -> int:
        """Height and width in pixels of the largest photos that it reads."""
        return self.resolver.config.side

    @property
    def size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.resolver.size


Drawing = Gan | Encoded | Flow | Alone | Styled  # families that draw faces by themselves
Model = Drawing | Resolved


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
        case StyledShape():
            return Styled(StyleGAN2(shape.generator, chance), StyleEncoder(shape.encoder, chance), known)
        case ResolvedShape():
            return Resolved(Resolver(shape.resolver, chance), known)
        case _:
            assert_never(shape)


def drawing(model: Model) -> Drawing:
    """The model itself, if it draws faces by itself; raises ConfigError for one that only answers photos."""
    if isinstance(model, Resolved):
        raise ConfigError(
            "a super-resolution network draws nobody by itself; name a checkpoint with a generator"
        )
    return model


M = TypeVar("M", Gan, Encoded, Flow, Alone, Styled, Resolved)


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
