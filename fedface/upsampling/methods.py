"""The upsampling methods by name, and what each of them needs.

`Method` is the closed choice; a recipe picks one by its `kind`, and `METHODS` lists them with their default settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, TypeAlias, assert_never

from fedface.errors import ConfigError
from fedface.models.checkpoint import load_flow, load_gan, load_style_encoder, load_super_resolution
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    GeneratorArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    UpsamplerArchitecture,
)
from fedface.models.rectified_flow import RectifiedFlow
from fedface.models.style_encoder import StyleEncoder, StyleUpsampler
from fedface.models.stylegan2 import StyleGAN2
from fedface.randomness import Streams
from fedface.upsampling.degradation import Degradation, format_degradation
from fedface.upsampling.feedforward import (
    BicubicConfig,
    FeedforwardUpsampler,
    NearestConfig,
    StyleEncoderConfig,
    SuperResolutionConfig,
    interpolation,
    styles_of,
)
from fedface.upsampling.flow_posterior import GuidedFlowConfig, GuidedFlowUpsampler
from fedface.upsampling.latent_hmc import HmcConfig, HmcUpsampler, measurement_noise
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampler


@dataclass(frozen=True, kw_only=True)
class PulseEncoderInitConfig:
    """PULSE that starts from a style encoder's output."""

    kind: ClassVar[str] = "pulse-encoder-init"

    pulse: PulseConfig = field(default_factory=PulseConfig)


Method: TypeAlias = (
    PulseConfig
    | PulseEncoderInitConfig
    | HmcConfig
    | GuidedFlowConfig
    | StyleEncoderConfig
    | SuperResolutionConfig
    | BicubicConfig
    | NearestConfig
)


@dataclass(frozen=True)
class _Facts:
    """What a method is called, which models it can use, and which of them is bundled."""

    title: str
    architectures: tuple[type[Architecture], ...] = ()  # none for a method without a network
    load: Callable[[], Model] | None = None


_GENERATORS = (
    GanArchitecture,
    EncoderArchitecture,
    FlowArchitecture,
    GeneratorArchitecture,
    StyleEncoderArchitecture,
)
_FACTS: Mapping[type[Method], _Facts] = {
    PulseConfig: _Facts("PULSE", _GENERATORS, load_gan),
    PulseEncoderInitConfig: _Facts(
        "PULSE from the encoder's start", (StyleEncoderArchitecture,), load_style_encoder
    ),
    HmcConfig: _Facts("posterior sampling", _GENERATORS, load_gan),
    GuidedFlowConfig: _Facts("guided flow", (FlowArchitecture,), load_flow),
    StyleEncoderConfig: _Facts("style encoder", (StyleEncoderArchitecture,), load_style_encoder),
    SuperResolutionConfig: _Facts("super-resolution", (SuperResolutionArchitecture,), load_super_resolution),
    BicubicConfig: _Facts("bicubic"),
    NearestConfig: _Facts("nearest"),
}
METHODS: Mapping[str, Method] = {config.kind: config() for config in _FACTS}
BASELINES: tuple[Method, ...] = (NearestConfig(), BicubicConfig())  # beside every comparison


def name_of(method: Method) -> str:
    """A method's name on the command line and in a recipe, such as "pulse"."""
    return method.kind


def title_of(method: Method) -> str:
    """A method's name for people."""
    return _FACTS[type(method)].title


def is_deterministic(method: Method) -> bool:
    """Whether a method generates the same face each time from one photo."""
    return isinstance(method, StyleEncoderConfig | SuperResolutionConfig | BicubicConfig | NearestConfig)


def evaluation_count(method: Method) -> int:
    """How often a method runs its network for one face at most, forwards and backwards counted once each."""
    match method:
        case PulseConfig(steps=steps):
            return steps
        case PulseEncoderInitConfig(pulse=pulse):
            return 1 + pulse.steps
        case HmcConfig() as config:
            return config.steps * config.leapfrog_steps + config.rank
        case GuidedFlowConfig(steps=steps, cg_steps=solves):
            return steps * (1 + solves)
        case StyleEncoderConfig() | SuperResolutionConfig():
            return 1
        case BicubicConfig() | NearestConfig():
            return 0
        case _:
            assert_never(method)


def with_workers(method: Method, workers: int) -> Method:
    """The same method with so many threads, each with faces of its own; results are the same up to rounding."""
    match method:
        case PulseConfig() | HmcConfig() | GuidedFlowConfig():
            return replace(method, workers=workers)
        case PulseEncoderInitConfig(pulse=pulse):
            return replace(method, pulse=replace(pulse, workers=workers))
        case _:
            return method


def default_method(model: Model) -> Method:
    """The method for a model where none is named."""
    match model.architecture:
        case StyleEncoderArchitecture():
            return StyleEncoderConfig()
        case SuperResolutionArchitecture():
            return SuperResolutionConfig()
        case FlowArchitecture():
            return GuidedFlowConfig()
        case _:
            return PulseConfig()


def bundled_checkpoint(method: Method) -> Model | None:
    """The shipped checkpoint that a method uses where none is named; None for those that need no network."""
    load = _FACTS[type(method)].load
    return None if load is None else _loaded(load)


@lru_cache(maxsize=4)
def _loaded(load: Callable[[], Model]) -> Model:
    return load()


def is_compatible(method: Method, model: Model) -> bool:
    """Whether a method can use a model of this architecture."""
    return isinstance(model.architecture, _FACTS[type(method)].architectures)


def pair_with_models(
    methods: Sequence[Method], given: Model | None
) -> tuple[int, tuple[tuple[Method, Model | None], ...]]:
    """Each method with its checkpoint: the given one where the method can use it, else the bundled one.

    Args:
        methods: At least one.
        given: A checkpoint of any family, or None.

    Returns:
        The size of the faces in pixels, and the pairs.

    Raises:
        ConfigError: No method can use the given checkpoint, or the checkpoints generate faces of different sizes.
    """
    pairs = tuple(
        (method, given if given is not None and is_compatible(method, given) else bundled_checkpoint(method))
        for method in methods
    )
    if given is not None and not any(model is given for _, model in pairs):
        names = ", ".join(name for name, method in METHODS.items() if is_compatible(method, given))
        raise ConfigError(
            f"this checkpoint is {given.architecture.description}; it is compatible with the methods {names}"
        )
    sizes = {model.size: name_of(method) for method, model in pairs if model is not None}
    if len(sizes) > 1:
        listed = ", ".join(f"{name} {size} px" for size, name in sizes.items())
        raise ConfigError(
            f"these methods make faces of different sizes ({listed}); compare methods of one size"
        )
    usual = (given or bundled_checkpoint(PulseConfig())).size  # type: ignore[union-attr]
    return next(iter(sizes), usual), pairs


def check_method(method: Method, model: Model | None, degradation: Degradation, *, size: int) -> None:
    """Raises ConfigError unless a method can use a model and a downscale for faces of `size` pixels."""
    try:
        low = degradation.low_side(size)
        if isinstance(method, HmcConfig | GuidedFlowConfig):
            measurement_noise(degradation, method.noise_std)
    except ValueError as error:
        what = f"{format_degradation(degradation)} with the method {name_of(method)}"
        raise ConfigError(f"{what} does not support faces of {size} pixels: {error}") from error
    if isinstance(method, BicubicConfig | NearestConfig):
        return
    if model is None or not is_compatible(method, model):
        got = "none" if model is None else model.architecture.description
        raise ConfigError(
            f"the method {name_of(method)} needs {_needs(method)}, got {got}; name such a checkpoint"
        )
    if model.size != size:
        raise ConfigError(f"this checkpoint generates faces of {model.size} pixels, requested are {size}")
    if isinstance(method, StyleEncoderConfig | PulseEncoderInitConfig | SuperResolutionConfig):
        assert isinstance(model.architecture, UpsamplerArchitecture)
        if low > (largest := model.architecture.max_input_size):
            raise ConfigError(
                f"this network enlarges photos of up to {largest} x {largest} pixels to faces "
                f"of {model.size}; requested are {low} to {size}. Choose fewer pixels, or a method that searches"
            )


def _needs(method: Method) -> str:
    first, *others = _FACTS[type(method)].architectures
    return "a generator" if others else first.description


def make_upsampler(
    method: Method,
    model: Model | None,
    degradation: Degradation,
    streams: Streams,
    *,
    size: int,
    progress: Progress | None = None,
    watch: StepCallback | None = None,
) -> Upsampler:
    """The upsampler of a method with a model's weights.

    Args:
        method: Which, and how.
        model: The checkpoint; None for nearest and bicubic alone, which do not use it.
        degradation: The known downscale.
        streams: Random numbers, such as the starts of searches.
        size: Height and width of the faces in pixels.
        progress: Called after every step with how far all faces are.
        watch: Called with the faces of every step, by methods that have steps.

    Raises:
        ConfigError: The method needs another kind of model, or the model other sizes.
    """
    check_method(method, model, degradation, size=size)
    if isinstance(method, BicubicConfig | NearestConfig):
        enlarge = interpolation(size, "bicubic" if isinstance(method, BicubicConfig) else "nearest")
        return FeedforwardUpsampler(enlarge, degradation, size=size, eps=method.eps, progress=progress)
    if model is None:
        raise ConfigError(f"the method {name_of(method)} needs {_needs(method)}")
    match method:
        case StyleEncoderConfig(eps=eps) | SuperResolutionConfig(eps=eps):
            return FeedforwardUpsampler(model.upsampler, degradation, size=size, eps=eps, progress=progress)
        case PulseEncoderInitConfig(pulse=config):
            generator = model.network(StyleGAN2)
            start = styles_of(StyleUpsampler(generator, model.network(StyleEncoder)))
            return PulseUpsampler(
                generator, degradation, config, streams, start=start, progress=progress, watch=watch
            )
        case GuidedFlowConfig():
            flow = model.network(RectifiedFlow)
            return GuidedFlowUpsampler(flow, degradation, method, streams, progress=progress, watch=watch)
        case PulseConfig():
            return PulseUpsampler(
                model.generator, degradation, method, streams, progress=progress, watch=watch
            )
        case HmcConfig():
            return HmcUpsampler(model.generator, degradation, method, streams, progress=progress, watch=watch)
        case _:
            assert_never(method)
