"""The methods of fedface as the page offers them, with their bundled checkpoints or one that the user chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

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
from fedface.web.method_catalog import MethodInfo, learned_from


class MethodCatalog:
    """Every method by its name; a `MethodProvider`."""

    def __init__(self, model: Model | None) -> None:
        """`model` takes the place of every shipped checkpoint; None: each method has its own."""
        self._model = model
        self._size = load_gan().generator.size if model is None else model.size
        first = name_of(PulseConfig() if model is None else default_method(model))
        names = sorted(METHODS, key=lambda name: name != first)  # stable: only the first one moves
        self._offers = tuple(offer_of(METHODS[name]) for name in names)

    @property
    def size(self) -> int:
        """Height and width of the faces in pixels."""
        return self._size

    @property
    def offers(self) -> Sequence[MethodInfo]:
        """All methods, the one that goes with the checkpoint first."""
        return self._offers

    def learned(self, method: str) -> str:
        """Whose faces the method's network has learned from."""
        model = self._network(_method(method))
        return "" if model is None else learned_from(model.notes)

    def make(
        self, method: str, *, side: int, seed: int, progress: Progress | None, watch: StepCallback | None
    ) -> Upsampler:
        """The upsampler of a method, from `side` pixels to `size`.

        Raises:
            ConfigError: The method does not go with the checkpoint or with this many pixels.
        """
        chosen = _method(method)
        if side < 1 or self._size % side:
            raise ConfigError(
                f"faces of {self._size} pixels do not shrink to {side}; a divisor of it would do"
            )
        return make_upsampler(
            chosen,
            self._network(chosen),
            BicubicPulse(self._size // side),
            Streams(seed),
            size=self._size,
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


def offer_of(method: Method) -> MethodInfo:
    """A method in a layperson's words."""
    title = title_of(method)
    return MethodInfo(
        name=name_of(method),
        title=title[:1].upper() + title[1:],
        words=_words(method),
        several=not is_deterministic(method),
    )


def _words(method: Method) -> str:
    match method:
        case PulseConfig():
            return "Starts from faces that the generator knows, and changes each until it shrinks to these pixels."
        case PulseEncoderInitConfig():
            return "As PULSE, but initialised by a style encoder."
        case HmcConfig():
            return "Wanders at random among the faces that fit; the likelier ones come up more often."
        case GuidedFlowConfig():
            return "Lets faces grow out of noise, and pulls each towards these pixels as it grows."
        case StyleEncoderConfig():
            return "A network that generates a face from few pixels in one forward pass."
        case SuperResolutionConfig():
            return "A network that has learned to sharpen: one answer, near the mean of all faces that fit."
        case BicubicConfig():
            return "Adds nothing: the same pixels, interpolated smoothly."
        case NearestConfig():
            return "Adds nothing: the same pixels, enlarged."
        case _:
            assert_never(method)
