"""The methods of fedface for the page, with their bundled checkpoints or one that the user chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from fedface.errors import ConfigError
from fedface.models.checkpoint import load_gan
from fedface.models.model import Model
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.feedforward import (
    BicubicConfig,
    NearestConfig,
    StyleEncoderConfig,
    SuperResolutionConfig,
)
from fedface.upsampling.flow_posterior import GuidedFlowConfig
from fedface.upsampling.latent_hmc import HmcConfig
from fedface.upsampling.methods import (
    METHODS,
    Method,
    PulseEncoderInitConfig,
    bundled_checkpoint,
    default_method,
    is_deterministic,
    make_upsampler,
    name_of,
    title_of,
)
from fedface.upsampling.pulse import PulseConfig
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampler


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    name: str  # as the command line knows it
    title: str
    description: str  # what it does, for laypeople
    several: bool  # whether it can generate several faces for the same pixels


class MethodProvider(Protocol):
    """Builds upsamplers for one size of face."""

    size: int  # height and width of the faces in pixels
    methods: Sequence[MethodInfo]  # to choose from, at least one; the first is preselected

    def training_data(self, method: str) -> str:
        """The training data of a method's network in a sentence; empty if unknown."""

    def make(
        self, method: str, *, side: int, seed: int, progress: Progress | None, watch: StepCallback | None
    ) -> Upsampler:
        """An upsampler from `side` pixels to `size`.

        Raises:
            ConfigError: The method does not support this; with the reason.
        """


class MethodCatalog:
    """Every method of fedface by its name; a `MethodProvider`."""

    def __init__(self, model: Model | None) -> None:
        """`model` replaces every bundled checkpoint; None: each method uses its own."""
        self._model = model
        self.size = load_gan().generator.size if model is None else model.size
        first = name_of(PulseConfig() if model is None else default_method(model))
        names = sorted(METHODS, key=lambda name: name != first)  # stable: only the first one moves
        self.methods: Sequence[MethodInfo] = tuple(method_info(METHODS[name]) for name in names)

    def training_data(self, method: str) -> str:
        model = self._network(_method(method))
        return "" if model is None else describe_training_data(model.notes)

    def make(
        self, method: str, *, side: int, seed: int, progress: Progress | None, watch: StepCallback | None
    ) -> Upsampler:
        chosen = _method(method)
        if side < 1 or self.size % side:
            raise ConfigError(f"faces of {self.size} pixels cannot be downscaled to {side}; choose a divisor")
        return make_upsampler(
            chosen,
            self._network(chosen),
            BicubicPulse(self.size // side),
            Streams(seed),
            size=self.size,
            progress=progress,
            watch=watch,
        )

    def _network(self, method: Method) -> Model | None:
        if self._model is None or isinstance(method, BicubicConfig | NearestConfig):
            return bundled_checkpoint(method)
        return self._model


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(f"there is no method named {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def method_info(method: Method) -> MethodInfo:
    """A method described for laypeople."""
    title = title_of(method)
    return MethodInfo(
        name=name_of(method),
        title=title[:1].upper() + title[1:],
        description=_description(method),
        several=not is_deterministic(method),
    )


def _description(method: Method) -> str:
    match method:
        case PulseConfig():
            return "Starts from faces of the generator and changes each until it matches these pixels when downscaled."
        case PulseEncoderInitConfig():
            return "Like PULSE, but initialised by a style encoder."
        case HmcConfig():
            return "Samples faces that fit at random; likelier ones appear more often."
        case GuidedFlowConfig():
            return "Generates faces from noise and guides each towards these pixels."
        case StyleEncoderConfig():
            return "A network that generates a face from few pixels in one forward pass."
        case SuperResolutionConfig():
            return "A network trained to sharpen: one face, close to the mean of all faces that fit."
        case BicubicConfig():
            return "The same pixels, interpolated smoothly; adds no detail."
        case NearestConfig():
            return "The same pixels, enlarged; adds no detail."
        case _:
            assert_never(method)


def describe_training_data(notes: Mapping[str, Any]) -> str:
    """A sentence on a checkpoint's training data, from its notes; empty if they do not contain it."""
    for part in (notes, notes.get("generator_notes")):
        recipe = part.get("recipe") if isinstance(part, Mapping) else None
        share = recipe.get("light_fraction") if isinstance(recipe, Mapping) else None
        if isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1:
            return f"Its network was trained on synthetic faces: {100 * share:.0f} % had light skin."
    return ""
