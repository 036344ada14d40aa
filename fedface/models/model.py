"""The families of models behind one door: what a checkpoint holds, and how to build it from its shape alone.

Called from models/checkpoint (files), training/training_methods (which knows how each learns) and federation/ (which carries
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
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.latent_encoder import LatentEncoder, LatentEncoderConfig
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.models.style_encoder import StyleEncoder, StyleEncoderNetworkConfig, StyleUpsampler
from fedface.models.stylegan1 import StyleGAN1, StyleGAN1Config
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.models.super_resolution import SuperResolutionNetwork, SuperResolutionNetworkConfig


@dataclass(frozen=True, kw_only=True)
class GanArchitecture:
    """A StyleGAN2 generator and the discriminator it learns from."""

    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.generator.size != self.discriminator.size:
            raise ConfigError(
                f"generator and discriminator must have one size, got {self.generator.size} and {self.discriminator.size}"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """A StyleGAN2 generator and the encoder that finds a photo's latent."""

    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)

    def __post_init__(self) -> None:
        for name in ("size", "latent_width"):
            made, read = getattr(self.generator, name), getattr(self.encoder, name)
            if made != read:
                raise ConfigError(f"generator and encoder must have one {name}, got {made} and {read}")


@dataclass(frozen=True, kw_only=True)
class FlowArchitecture:
    """A rectified flow; it needs nobody beside it."""

    flow: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorArchitecture:
    """A generator without its discriminator, as a stranger's file may hold it: for sampling and searching."""

    generator: StyleGAN2Config | StyleGAN1Config = field(default_factory=StyleGAN2Config)


@dataclass(frozen=True, kw_only=True)
class StyleEncoderArchitecture:
    """A StyleGAN2 generator and the encoder that finds the styles of a low-resolution photo."""

    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    encoder: StyleEncoderNetworkConfig = field(default_factory=StyleEncoderNetworkConfig)

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
class SuperResolutionArchitecture:
    """A super-resolution network; it needs nobody beside it."""

    network: SuperResolutionNetworkConfig = field(default_factory=SuperResolutionNetworkConfig)


Architecture = (
    GanArchitecture
    | EncoderArchitecture
    | FlowArchitecture
    | GeneratorArchitecture
    | StyleEncoderArchitecture
    | SuperResolutionArchitecture
)


@dataclass(frozen=True)
class GanModel:
    """A generator and the discriminator it was trained against, with what is known about their making."""

    generator: StyleGAN2
    discriminator: Discriminator
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> GanArchitecture:
        """What `build` needs to make networks of the same form."""
        return GanArchitecture(generator=self.generator.config, discriminator=self.discriminator.config)

    def named_modules(self) -> dict[str, nn.Module]:
        """The networks by name, in the order in which their weights are flattened."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def modules(self) -> tuple[nn.Module, ...]:
        """Both networks in the order in which their weights are flattened."""
        return self.generator, self.discriminator

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


@dataclass(frozen=True)
class EncoderModel:
    """A generator and the encoder that finds a photo's latent."""

    generator: StyleGAN2
    encoder: LatentEncoder
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> EncoderArchitecture:
        """What `build` needs to make networks of the same form."""
        return EncoderArchitecture(generator=self.generator.config, encoder=self.encoder.config)

    def named_modules(self) -> dict[str, nn.Module]:
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
class FlowModel:
    """A rectified flow: photo to latent and back."""

    generator: RectifiedFlow
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> FlowArchitecture:
        """What `build` needs to make a network of the same form."""
        return FlowArchitecture(flow=self.generator.config)

    def named_modules(self) -> dict[str, nn.Module]:
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
class GeneratorModel:
    """A generator without its discriminator."""

    generator: StyleGAN2 | StyleGAN1
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> GeneratorArchitecture:
        """What `build` needs to make a network of the same form."""
        return GeneratorArchitecture(generator=self.generator.config)

    def named_modules(self) -> dict[str, nn.Module]:
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
class StyleEncoderModel:
    """A generator and the encoder that finds the styles of a low-resolution photo."""

    generator: StyleGAN2
    encoder: StyleEncoder
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> StyleEncoderArchitecture:
        """What `build` needs to make networks of the same form."""
        return StyleEncoderArchitecture(generator=self.generator.config, encoder=self.encoder.config)

    def named_modules(self) -> dict[str, nn.Module]:
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
    def max_input_size(self) -> int:
        """Height and width in pixels of the largest photos that it reads."""
        return self.encoder.config.side

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self.generator.size


@dataclass(frozen=True)
class SuperResolutionModel:
    """A super-resolution network: photo to picture, no generator."""

    network: SuperResolutionNetwork
    notes: Mapping[str, Any]

    @property
    def architecture(self) -> SuperResolutionArchitecture:
        """What `build` needs to make a network of the same form."""
        return SuperResolutionArchitecture(network=self.network.config)

    def named_modules(self) -> dict[str, nn.Module]:
        """The network by name."""
        return {"network": self.network}

    def modules(self) -> tuple[nn.Module, ...]:
        """The one network."""
        return (self.network,)

    @property
    def upsampler(self) -> SuperResolutionNetwork:
        """The network itself."""
        return self.network

    @property
    def max_input_size(self) -> int:
        """Height and width in pixels of the largest photos that it reads."""
        return self.network.config.side

    @property
    def size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.network.size


GenerativeModel = (
    GanModel | EncoderModel | FlowModel | GeneratorModel | StyleEncoderModel
)  # families that draw faces by themselves
Model = GenerativeModel | SuperResolutionModel


def build_model(
    shape: Architecture, rng: torch.Generator | None = None, notes: Mapping[str, Any] | None = None
) -> Model:
    """Networks of a shape with random weights.

    Args:
        shape: Which family, and how large.
        rng: Where the weights are drawn from; torch's own stream if None, for weights that are filled next.
        notes: What is known about their making.
    """
    known = dict(notes or {})
    match shape:
        case GanArchitecture():
            return GanModel(StyleGAN2(shape.generator, rng), Discriminator(shape.discriminator, rng), known)
        case EncoderArchitecture():
            return EncoderModel(StyleGAN2(shape.generator, rng), LatentEncoder(shape.encoder, rng), known)
        case FlowArchitecture():
            return FlowModel(RectifiedFlow(shape.flow, rng), known)
        case GeneratorArchitecture(generator=config):
            if isinstance(config, StyleGAN1Config):
                return GeneratorModel(StyleGAN1(config, rng), known)
            return GeneratorModel(StyleGAN2(config, rng), known)
        case StyleEncoderArchitecture():
            return StyleEncoderModel(StyleGAN2(shape.generator, rng), StyleEncoder(shape.encoder, rng), known)
        case SuperResolutionArchitecture():
            return SuperResolutionModel(SuperResolutionNetwork(shape.network, rng), known)
        case _:
            assert_never(shape)


def as_generative(model: Model) -> GenerativeModel:
    """The model itself, if it draws faces by itself; raises ConfigError for one that only answers photos."""
    if isinstance(model, SuperResolutionModel):
        raise ConfigError(
            "a super-resolution network draws nobody by itself; name a checkpoint with a generator"
        )
    return model


M = TypeVar("M", GanModel, EncoderModel, FlowModel, GeneratorModel, StyleEncoderModel, SuperResolutionModel)


def copy_model(model: M) -> M:
    """The same weights in new memory."""
    twin = build_model(model.architecture, notes=model.notes)
    for mine, theirs in zip(twin.modules(), model.modules(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return twin  # type: ignore[return-value]


def new_gan(generator: StyleGAN2Config, discriminator: DiscriminatorConfig, rng: torch.Generator) -> GanModel:
    """A generator and a discriminator with random weights; raises ConfigError unless their sizes agree."""
    shape = GanArchitecture(generator=generator, discriminator=discriminator)
    return GanModel(StyleGAN2(shape.generator, rng), Discriminator(shape.discriminator, rng), {})
