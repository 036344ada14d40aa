"""Every way from a low-resolution photo to faces, by name, and what each of them needs.

Called from the command line, the local page and federation/findings. The closed choice is `Method`; a recipe picks one
by its `kind`, and `METHODS` lists them with their default settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias, assert_never

from fedface.config import kind_of
from fedface.errors import ConfigError
from fedface.models.family import Alone, Encoded, Flow, Gan, Model, Resolved, Styled
from fedface.models.weights import load_base, load_flow, load_resolved, load_styled, words_of_family
from fedface.randomness import Streams
from fedface.upsampling.contracts import Progress, Upsampler, Watch
from fedface.upsampling.degrade import Degradation, in_words
from fedface.upsampling.guidance import Guidance, GuidanceConfig
from fedface.upsampling.langevin import Langevin, LangevinConfig, measurement_noise
from fedface.upsampling.one_pass import (
    BicubicConfig,
    EncodeConfig,
    NearestConfig,
    OnePass,
    SuperResolutionConfig,
    answered_by,
    bicubic,
    nearest,
    styles_of,
)
from fedface.upsampling.pulse import Pulse, PulseConfig


@dataclass(frozen=True, kw_only=True)
class EncodeThenPulseConfig:
    """PULSE, started from what a style encoder answers instead of from anywhere."""

    pulse: PulseConfig = field(default_factory=PulseConfig)


Method: TypeAlias = (
    PulseConfig
    | EncodeThenPulseConfig
    | LangevinConfig
    | GuidanceConfig
    | EncodeConfig
    | SuperResolutionConfig
    | BicubicConfig
    | NearestConfig
)

METHODS: Mapping[str, Method] = {
    kind_of(type(method)): method
    for method in (
        PulseConfig(),
        EncodeThenPulseConfig(),
        LangevinConfig(),
        GuidanceConfig(),
        EncodeConfig(),
        SuperResolutionConfig(),
        BicubicConfig(),
        NearestConfig(),
    )
}
BASELINES: tuple[Method, ...] = (NearestConfig(), BicubicConfig())  # beside every comparison


def name_of(method: Method) -> str:
    """A method's name on the command line and in a recipe, such as "pulse"."""
    return kind_of(type(method))


def title_of(method: Method) -> str:
    """A method's name for people."""
    match method:
        case PulseConfig():
            return "PULSE"
        case EncodeThenPulseConfig():
            return "PULSE from the encoder's start"
        case LangevinConfig():
            return "posterior sampling"
        case GuidanceConfig():
            return "guided flow"
        case EncodeConfig():
            return "style encoder"
        case SuperResolutionConfig():
            return "super-resolution"
        case BicubicConfig():
            return "bicubic"
        case NearestConfig():
            return "nearest"
        case _:
            assert_never(method)


def has_one_answer(method: Method) -> bool:
    """Whether all faces that a method makes of one photo are the same."""
    return isinstance(method, EncodeConfig | SuperResolutionConfig | BicubicConfig | NearestConfig)


def evaluations_of(method: Method) -> int:
    """How often a method runs its network for one face at most, forwards and backwards counted once each."""
    match method:
        case PulseConfig(steps=steps):
            return steps
        case EncodeThenPulseConfig(pulse=pulse):
            return 1 + pulse.steps
        case LangevinConfig() as config:
            return config.steps * config.leaps + config.rank
        case GuidanceConfig(steps=steps, solves=solves):
            return steps * (1 + solves)
        case EncodeConfig() | SuperResolutionConfig():
            return 1
        case BicubicConfig() | NearestConfig():
            return 0
        case _:
            assert_never(method)


def side_by_side(method: Method, workers: int) -> Method:
    """The same method with so many threads, each with faces of its own; what is found is the same up to rounding."""
    match method:
        case PulseConfig() | LangevinConfig() | GuidanceConfig():
            return replace(method, workers=workers)
        case EncodeThenPulseConfig(pulse=pulse):
            return replace(method, pulse=replace(pulse, workers=workers))
        case _:
            return method


def fitting_method(model: Model) -> Method:
    """The method that goes with a model where none is named."""
    match model:
        case Styled():
            return EncodeConfig()
        case Resolved():
            return SuperResolutionConfig()
        case Flow():
            return GuidanceConfig()
        case _:
            return PulseConfig()


def embedded(method: Method) -> Model | None:
    """The shipped checkpoint that a method uses where none is named; None for those that need no network."""
    match method:
        case PulseConfig() | LangevinConfig():
            return _loaded("base")
        case GuidanceConfig():
            return _loaded("flow")
        case EncodeConfig() | EncodeThenPulseConfig():
            return _loaded("styled")
        case SuperResolutionConfig():
            return _loaded("resolved")
        case BicubicConfig() | NearestConfig():
            return None
        case _:
            assert_never(method)


@lru_cache(maxsize=4)
def _loaded(name: str) -> Model:
    loads: Mapping[str, Callable[[], Model]] = {
        "base": load_base,
        "flow": load_flow,
        "styled": load_styled,
        "resolved": load_resolved,
    }
    return loads[name]()


def goes_with(method: Method, model: Model) -> bool:
    """Whether a method can use a model of this family."""
    match method:
        case PulseConfig() | LangevinConfig():
            return not isinstance(model, Resolved)
        case GuidanceConfig():
            return isinstance(model, Flow)
        case EncodeConfig() | EncodeThenPulseConfig():
            return isinstance(model, Styled)
        case SuperResolutionConfig():
            return isinstance(model, Resolved)
        case BicubicConfig() | NearestConfig():
            return False
        case _:
            assert_never(method)


def with_models(
    methods: Sequence[Method], given: Model | None
) -> tuple[int, tuple[tuple[Method, Model | None], ...]]:
    """Each method with its checkpoint: the one that was given where it goes with the method, the embedded one else.

    Args:
        methods: At least one.
        given: A checkpoint of any family, or None.

    Returns:
        The size of the faces in pixels, and the pairs.

    Raises:
        ConfigError: The given checkpoint goes with no method, or the checkpoints make faces of different sizes.
    """
    pairs = tuple(
        (method, given if given is not None and goes_with(method, given) else embedded(method))
        for method in methods
    )
    if given is not None and not any(model is given for _, model in pairs):
        names = ", ".join(name for name, method in METHODS.items() if goes_with(method, given))
        raise ConfigError(f"this checkpoint is {words_of_family(given)}; it goes with the methods {names}")
    sizes = {model.size: name_of(method) for method, model in pairs if model is not None}
    if len(sizes) > 1:
        told = ", ".join(f"{name} {size} px" for size, name in sizes.items())
        raise ConfigError(
            f"these methods make faces of different sizes ({told}); compare methods of one size"
        )
    usual = (given or embedded(PulseConfig())).size  # type: ignore[union-attr]
    return next(iter(sizes), usual), pairs


def check_method(method: Method, model: Model | None, degradation: Degradation, *, size: int) -> None:
    """Raises ConfigError unless a method goes with a model, a downscale and faces of `size` pixels."""
    try:
        low = degradation.low_side(size)
        if isinstance(method, LangevinConfig | GuidanceConfig):
            measurement_noise(degradation, method.spread)
    except ValueError as error:
        words = f"{in_words(degradation)} with the method {name_of(method)}"
        raise ConfigError(f"{words} does not go with faces of {size} pixels: {error}") from error
    if isinstance(method, BicubicConfig | NearestConfig):
        return
    if model is None or not goes_with(method, model):
        got = "none" if model is None else words_of_family(model)
        raise ConfigError(
            f"the method {name_of(method)} needs {_needs(method)}, got {got}; name such a checkpoint"
        )
    if model.size != size:
        raise ConfigError(f"this checkpoint makes faces of {model.size} pixels, asked for {size}")
    if isinstance(method, EncodeConfig | EncodeThenPulseConfig | SuperResolutionConfig):
        if isinstance(model, Styled | Resolved) and low > model.largest_low:
            raise ConfigError(
                f"this network answers photos of up to {model.largest_low} x {model.largest_low} pixels with faces "
                f"of {model.size}; asked for {low} to {size}. Choose fewer pixels, or a method that searches"
            )


def _needs(method: Method) -> str:
    match method:
        case GuidanceConfig():
            return "a rectified flow"
        case EncodeConfig() | EncodeThenPulseConfig():
            return "a generator with a style encoder"
        case SuperResolutionConfig():
            return "a super-resolution network"
        case _:
            return "a generator"


def make_upsampler(
    method: Method,
    model: Model | None,
    degradation: Degradation,
    streams: Streams,
    *,
    size: int,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Upsampler:
    """The upsampler of a method with a model's weights.

    Args:
        method: Which, and how.
        model: The checkpoint; None goes with nearest and bicubic alone, which do not look at it.
        degradation: The known downscale.
        streams: Where searches start and samplers draw.
        size: Height and width of the faces in pixels.
        progress: Told how far it is.
        watch: Shown the faces after each step, by methods that have steps.

    Raises:
        ConfigError: The method needs another kind of model, or the model other sizes.
    """
    check_method(method, model, degradation, size=size)
    match method, model:
        case BicubicConfig(eps=eps), _:
            return OnePass(bicubic(size), degradation, size=size, eps=eps, progress=progress)
        case NearestConfig(eps=eps), _:
            return OnePass(nearest(size), degradation, size=size, eps=eps, progress=progress)
        case (EncodeConfig(eps=eps), Styled() as known) | (
            SuperResolutionConfig(eps=eps),
            Resolved() as known,
        ):
            return OnePass(answered_by(known.upsampler), degradation, size=size, eps=eps, progress=progress)
        case EncodeThenPulseConfig(pulse=config), Styled() as known:
            start = styles_of(known.upsampler)
            return Pulse(
                known.generator, degradation, config, streams, start=start, progress=progress, watch=watch
            )
        case GuidanceConfig() as config, Flow(generator=flow):
            return Guidance(flow, degradation, config, streams, progress=progress, watch=watch)
        case PulseConfig() as config, (Gan() | Encoded() | Flow() | Alone() | Styled()) as known:
            return Pulse(known.generator, degradation, config, streams, progress=progress, watch=watch)
        case LangevinConfig() as config, (Gan() | Encoded() | Flow() | Alone() | Styled()) as known:
            return Langevin(known.generator, degradation, config, streams, progress=progress, watch=watch)
        case _:
            raise ConfigError(f"the method {name_of(method)} needs {_needs(method)}")
