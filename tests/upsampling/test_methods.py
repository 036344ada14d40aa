"""Methods by name: baselines, and the network that each method needs."""

from __future__ import annotations

import pytest
import torch
from tiny import FLOW, GENERATOR, RESOLVER, STYLES
from torch.nn import functional

from fedface.codec import encode
from fedface.config import parse
from fedface.errors import ConfigError
from fedface.experiment import UpsamplingConfig
from fedface.models.model import (
    FlowArchitecture,
    GeneratorArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    build_model,
)
from fedface.randomness import Streams
from fedface.upsampling.degradation import Area, BicubicPulse
from fedface.upsampling.feedforward import (
    BicubicConfig,
    NearestConfig,
    StyleEncoderConfig,
    SuperResolutionConfig,
)
from fedface.upsampling.methods import (
    BASELINES,
    METHODS,
    PulseEncoderInitConfig,
    default_method,
    is_compatible,
    is_deterministic,
    make_upsampler,
    name_of,
    pair_with_models,
    title_of,
    with_workers,
)
from fedface.upsampling.pulse import PulseConfig
from fedface.upsampling.upsampler import squared_difference

STREAMS = Streams(2)
LOW = torch.rand(3, 3, 4, 4, generator=STREAMS.generator("low"))
MODELS: dict[str, Model] = {
    "alone": build_model(GeneratorArchitecture(generator=GENERATOR), STREAMS.generator("alone")),
    "flow": build_model(FlowArchitecture(flow=FLOW), STREAMS.generator("flow")),
    "styled": build_model(
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES), STREAMS.generator("styled")
    ),
    "resolved": build_model(SuperResolutionArchitecture(network=RESOLVER), STREAMS.generator("resolved")),
}


def test_nearest_and_bicubic_equal_torch() -> None:
    for method, mode in ((NearestConfig(), "nearest"), (BicubicConfig(), "bicubic")):
        found = make_upsampler(method, None, Area(4), STREAMS, size=16).upsample(LOW, faces_per_photo=2)
        reference = functional.interpolate(LOW, size=(16, 16), mode=mode).clamp(0, 1)
        assert torch.equal(found.images[:, 0], reference) and torch.equal(found.images[:, 1], reference)


def test_nearest_fits_after_area_and_not_after_bicubic() -> None:
    """Nearest inverts area exactly: its consistency error is 0. After a bicubic downscale it does not fit."""
    exact = make_upsampler(NearestConfig(), None, Area(4), STREAMS, size=16)
    found = exact.upsample(LOW, faces_per_photo=1)
    assert float(found.consistency_error.max()) < 1e-12 and found.converged.all()
    other = make_upsampler(NearestConfig(), None, BicubicPulse(4), STREAMS, size=16)
    found = other.upsample(LOW, faces_per_photo=1)
    again = squared_difference(BicubicPulse(4).apply(found.images[:, 0]), LOW)
    torch.testing.assert_close(found.consistency_error[:, 0], again)
    assert float(found.consistency_error.min()) > 5e-4 and not found.converged.any()


@pytest.mark.parametrize(
    ("method", "name"), [(StyleEncoderConfig(), "styled"), (SuperResolutionConfig(), "resolved")]
)
def test_feed_forward_networks_give_one_face_per_photo(method: StyleEncoderConfig, name: str) -> None:
    """The same as calling it, clamped; one network accepts photos of two sizes."""
    model = MODELS[name]
    assert model.is_upsampler
    for factor in (4, 2):
        low = torch.rand(2, 3, 16 // factor, 16 // factor, generator=STREAMS.generator("low"))
        upsampler = make_upsampler(method, model, BicubicPulse(factor), STREAMS, size=16)
        found = upsampler.upsample(low, faces_per_photo=3)
        with torch.no_grad():
            assert torch.equal(found.images[:, 2], model.upsampler(low).clamp(0, 1))
        assert found.steps == 1 and upsampler.low_size == 16 // factor and upsampler.size == 16
    assert is_deterministic(method)


def test_a_search_can_start_from_the_encoders_output() -> None:
    """Its first step is the encoder's face, up to the noise maps that PULSE samples."""
    styled = MODELS["styled"]
    assert isinstance(styled.architecture, StyleEncoderArchitecture)
    quick = PulseEncoderInitConfig(pulse=PulseConfig(steps=1, mapping_samples=500, trainable_noise=0))
    found = make_upsampler(quick, styled, BicubicPulse(4), STREAMS, size=16).upsample(LOW, faces_per_photo=1)
    with torch.no_grad():
        answer = styled.upsampler(LOW)
    quiet = styled.generator.synthesize(
        styled.networks["encoder"](LOW), [torch.zeros(1, 1, s, s) for s in (4, 8, 8, 16, 16)]
    )
    assert (found.images[:, 0] - answer.clamp(0, 1)).abs().mean() < 0.1 + (quiet - answer).abs().mean()


def test_every_method_has_a_name_a_title_and_a_kind_in_yaml() -> None:
    for name, method in METHODS.items():
        assert name_of(method) == name and title_of(method)
        read = parse(f"method: {{kind: {name}}}", UpsamplingConfig, name="recipe")
        assert read.method == method and encode(read)["method"]["kind"] == name
    assert len(METHODS) == 8 and {name_of(method) for method in BASELINES} == {"nearest", "bicubic"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_the_network_it_needs(name: str) -> None:
    """Given each family in turn: compatible ones work, others are refused with what is needed."""
    method = METHODS[name]
    if method in BASELINES:
        return
    for model in MODELS.values():
        if is_compatible(method, model):
            assert make_upsampler(method, model, Area(4), STREAMS, size=16).low_size == 4
        else:
            with pytest.raises(ConfigError, match=f"the method {name} needs a .*, got a"):
                make_upsampler(method, model, Area(4), STREAMS, size=16)
    with pytest.raises(ConfigError, match=f"the method {name} needs a .*, got none"):
        make_upsampler(method, None, Area(4), STREAMS, size=16)


@pytest.mark.parametrize("name", MODELS)
def test_each_family_has_a_default_method(name: str) -> None:
    assert is_compatible(default_method(MODELS[name]), MODELS[name])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="does not support faces of 16 pixels"):
        make_upsampler(NearestConfig(), None, Area(3), STREAMS, size=16)
    with pytest.raises(ConfigError, match="generates faces of 16 pixels, requested are 32"):
        make_upsampler(PulseConfig(), MODELS["alone"], Area(4), STREAMS, size=32)
    with pytest.raises(ConfigError, match="up to 8 x 8 pixels to faces of 16; requested are 16 to 16"):
        make_upsampler(StyleEncoderConfig(), MODELS["styled"], Area(1), STREAMS, size=16)
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got 0"):
        NearestConfig(eps=0)


def test_a_given_checkpoint_replaces_the_bundled_one_where_compatible() -> None:
    """PULSE with another generator, nearest without any; an incompatible network is refused by name."""
    alone = MODELS["alone"]
    size, pairs = pair_with_models([PulseConfig(), NearestConfig()], alone)
    assert size == 16 and pairs[0][1] is alone and pairs[1][1] is None
    with pytest.raises(
        ConfigError, match="a super-resolution network; it is compatible with the methods super-resolution"
    ):
        pair_with_models([PulseConfig()], MODELS["resolved"])
    with pytest.raises(ConfigError, match="faces of different sizes"):
        pair_with_models([PulseConfig(), SuperResolutionConfig()], alone)
    assert pair_with_models([BicubicConfig()], None)[0] == 32


@pytest.mark.parametrize("name", METHODS)
def test_workers_change_only_the_parallelism(name: str) -> None:
    """One worker is the default; methods without steps have none."""
    method = METHODS[name]
    assert with_workers(method, 1) == method
    assert (with_workers(method, 2) == method) == is_deterministic(method)
