"""A model: networks by name, the architecture that builds them, and notes on how they were trained.

The architecture is a closed choice of six; it is what a checkpoint or a task describes, and enough to build the
networks. All models but a super-resolution network contain a generator (`models.generator_protocol`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

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

N = TypeVar("N", bound=nn.Module)

NETWORKS: Mapping[type, Callable[[Any, torch.Generator | None], nn.Module]] = {
    StyleGAN2Config: StyleGAN2,
    StyleGAN1Config: StyleGAN1,
    DiscriminatorConfig: Discriminator,
    LatentEncoderConfig: LatentEncoder,
    FlowConfig: RectifiedFlow,
    StyleEncoderNetworkConfig: StyleEncoder,
    SuperResolutionNetworkConfig: SuperResolutionNetwork,
}


@dataclass(frozen=True, kw_only=True)
class GanArchitecture:
    """A StyleGAN2 generator and its discriminator."""

    kind: ClassVar[str] = "gan"
    description: ClassVar[str] = "a generator with its discriminator"
    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.generator.size != self.discriminator.size:
            raise ConfigError(
                f"generator and discriminator must have one size, got {self.generator.size} and "
                f"{self.discriminator.size}"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """A StyleGAN2 generator and the encoder that estimates a photo's latent."""

    kind: ClassVar[str] = "encoder"
    description: ClassVar[str] = "a generator with an encoder"
    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)

    def __post_init__(self) -> None:
        for name in ("size", "latent_width"):
            generator, encoder = getattr(self.generator, name), getattr(self.encoder, name)
            if generator != encoder:
                raise ConfigError(
                    f"generator and encoder must have one {name}, got {generator} and {encoder}"
                )


@dataclass(frozen=True, kw_only=True)
class FlowArchitecture:
    """A rectified flow alone."""

    kind: ClassVar[str] = "flow"
    description: ClassVar[str] = "a rectified flow"
    flow: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorArchitecture:
    """A generator without a discriminator, such as an imported one: for sampling and searching, not for training."""

    kind: ClassVar[str] = "generator"
    description: ClassVar[str] = "a generator alone"
    generator: StyleGAN2Config | StyleGAN1Config = field(default_factory=StyleGAN2Config)


@dataclass(frozen=True, kw_only=True)
class StyleEncoderArchitecture:
    """A StyleGAN2 generator and the encoder that estimates the styles of a low-resolution photo."""

    kind: ClassVar[str] = "style-encoder"
    description: ClassVar[str] = "a generator with a style encoder"
    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    encoder: StyleEncoderNetworkConfig = field(default_factory=StyleEncoderNetworkConfig)

    def __post_init__(self) -> None:
        expected = (2 * len(self.generator.sides), self.generator.style_width)
        actual = (self.encoder.style_inputs, self.encoder.style_width)
        if actual != expected:
            raise ConfigError(
                f"the encoder must output {expected[0]} styles of width {expected[1]}, as the generator takes them, "
                f"got {actual[0]} of width {actual[1]}"
            )
        if self.generator.size < self.encoder.side:
            raise ConfigError(
                f"side must be at most the generator's {self.generator.size}, got {self.encoder.side}"
            )

    @property
    def max_input_size(self) -> int:
        """Height and width in pixels of the largest photos that the encoder reads."""
        return self.encoder.side


@dataclass(frozen=True, kw_only=True)
class SuperResolutionArchitecture:
    """A super-resolution network alone: it enlarges photos and has no generator."""

    kind: ClassVar[str] = "super-resolution"
    description: ClassVar[str] = "a super-resolution network"
    network: SuperResolutionNetworkConfig = field(default_factory=SuperResolutionNetworkConfig)

    @property
    def max_input_size(self) -> int:
        """Height and width in pixels of the largest photos that the network reads."""
        return self.network.side


UpsamplerArchitecture = StyleEncoderArchitecture | SuperResolutionArchitecture
Architecture = (
    GanArchitecture | EncoderArchitecture | FlowArchitecture | GeneratorArchitecture | UpsamplerArchitecture
)


def image_size(architecture: Architecture) -> int:
    """Height and width in pixels of the images that its first network generates."""
    first, *_ = vars(architecture).values()
    return int(first.size)


@dataclass(frozen=True)
class Model:
    """Networks of an architecture, with weights."""

    architecture: Architecture
    networks: Mapping[str, nn.Module]  # by name, in the order in which their weights are flattened
    notes: Mapping[str, Any] = field(default_factory=dict)  # how it was trained or where it came from

    def __post_init__(self) -> None:
        configs = {name: network.config for name, network in self.networks.items()}
        if configs != dict(vars(self.architecture)):
            raise ValueError(f"expected the networks of {self.architecture}, got {configs}")

    def modules(self) -> tuple[nn.Module, ...]:
        """The networks in the order in which their weights are flattened."""
        return tuple(self.networks.values())

    def network(self, kind: type[N]) -> N:
        """The network of this class, of which a model has at most one; raises ConfigError where it has none."""
        for network in self.networks.values():
            if isinstance(network, kind):
                return network
        raise ConfigError(
            f"expected a model with a {kind.__name__}, got {self.architecture.description}; name another checkpoint"
        )

    @property
    def size(self) -> int:
        """Height and width of its images in pixels."""
        return image_size(self.architecture)

    @property
    def generator(self) -> StyleGAN2 | StyleGAN1 | RectifiedFlow:
        """The network that maps latents to images; raises ConfigError for a super-resolution network."""
        for network in self.networks.values():
            if isinstance(network, StyleGAN2 | StyleGAN1 | RectifiedFlow):
                return network
        raise ConfigError(
            "a super-resolution network cannot generate faces without a photo; name a checkpoint with a generator"
        )

    @property
    def discriminator(self) -> Discriminator:
        """The network that scores images; raises ConfigError where there is none."""
        return self.network(Discriminator)

    @property
    def is_upsampler(self) -> bool:
        """Whether one of its networks maps photos to larger photos."""
        return isinstance(self.architecture, UpsamplerArchitecture)

    @property
    def upsampler(self) -> StyleUpsampler | SuperResolutionNetwork:
        """The network from photos to larger photos, sharing the model's weights; raises ConfigError without one."""
        if isinstance(self.architecture, StyleEncoderArchitecture):
            return StyleUpsampler(self.network(StyleGAN2), self.network(StyleEncoder))
        return self.network(SuperResolutionNetwork)


def build_model(
    architecture: Architecture, rng: torch.Generator | None = None, notes: Mapping[str, Any] | None = None
) -> Model:
    """A model with random weights.

    Args:
        architecture: Which networks, and how large.
        rng: Where the weights are sampled from; torch's own stream if None, for weights that are assigned next.
        notes: How it was trained or where it came from.
    """
    networks = {name: NETWORKS[type(config)](config, rng) for name, config in vars(architecture).items()}
    return Model(architecture, networks, dict(notes or {}))
