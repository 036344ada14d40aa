"""The guarantees of every upsampler: one test per guarantee, run for all methods."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import FLOW, GENERATOR, RESOLVER, STYLES
from torch import Tensor

from fedface.config import dump, parse
from fedface.errors import ConfigError
from fedface.models.model import (
    Architecture,
    FlowArchitecture,
    GeneratorArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    build_model,
)
from fedface.randomness import Streams
from fedface.upsampling.degradation import Area, Degradation
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
    is_deterministic,
    make_upsampler,
    with_workers,
)
from fedface.upsampling.pulse import PulseConfig
from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot, Upsampler, squared_difference

STREAMS = Streams(7)
SIZE = 16
QUARTER = Area(4)
PULSE = PulseConfig(steps=12, mapping_samples=500)
HMC = HmcConfig(noise_levels=3, transitions=1, final_transitions=1, leapfrog_steps=2, rank=4)
GENERATOR_ALONE = GeneratorArchitecture(generator=GENERATOR)
STYLED = StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method with fast settings, its network, and the number of steps of one batch of faces."""

    method: Method
    architecture: Architecture | None = None
    steps: int = 1

    def model(self) -> Model | None:
        """Newly built, always with the same weights."""
        if self.architecture is None:
            return None
        return build_model(self.architecture, STREAMS.generator("weights"))

    def upsampler(
        self,
        *,
        degradation: Degradation = QUARTER,
        streams: Streams = STREAMS,
        model: Model | None = None,
        progress: Progress | None = None,
        watch: StepCallback | None = None,
    ) -> Upsampler:
        """For faces of 16 pixels."""
        model = model or self.model()
        return make_upsampler(
            self.method, model, degradation, streams, size=SIZE, progress=progress, watch=watch
        )


CASES = {
    "pulse": Case(method=PULSE, architecture=GENERATOR_ALONE, steps=12),
    "pulse-encoder-init": Case(method=PulseEncoderInitConfig(pulse=PULSE), architecture=STYLED, steps=12),
    "hmc": Case(method=HMC, architecture=GENERATOR_ALONE, steps=4),
    "hmc-noise": Case(method=replace(HMC, noise="sampled"), architecture=GENERATOR_ALONE, steps=4),
    "guided-flow": Case(
        method=GuidedFlowConfig(steps=3, cg_steps=2), architecture=FlowArchitecture(flow=FLOW), steps=3
    ),
    "style-encoder": Case(method=StyleEncoderConfig(), architecture=STYLED),
    "super-resolution": Case(
        method=SuperResolutionConfig(), architecture=SuperResolutionArchitecture(network=RESOLVER)
    ),
    "bicubic": Case(method=BicubicConfig()),
    "nearest": Case(method=NearestConfig()),
}
SAMPLING = {name: case for name, case in CASES.items() if not is_deterministic(case.method)}
every_method = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_sampling_method = pytest.mark.parametrize("case", SAMPLING.values(), ids=SAMPLING)


@pytest.fixture(scope="module")
def low() -> Tensor:
    return torch.rand(3, 3, 4, 4, generator=STREAMS.generator("low"))


def test_every_method_is_a_case() -> None:
    assert {case.method.kind for case in CASES.values()} == set(METHODS)


@every_method
def test_no_photos_give_no_faces(case: Case) -> None:
    found = case.upsampler().upsample(torch.zeros(0, 3, 4, 4), faces_per_photo=3)
    assert found.images.shape == (0, 3, 3, SIZE, SIZE) and found.consistency_error.shape == (0, 3)


@every_method
def test_wrong_photos_and_degradations_are_named(case: Case) -> None:
    upsampler = case.upsampler()
    assert (upsampler.low_size, upsampler.size) == (4, SIZE)
    for wrong, faces, message in (
        (torch.zeros(1, 3, 8, 8), 1, r"\(n, 3, 4, 4\), got \(1, 3, 8, 8\)"),
        (torch.full((1, 3, 4, 4), float("nan")), 1, "finite"),
        (torch.zeros(1, 3, 4, 4), 0, "faces_per_photo must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            upsampler.upsample(wrong, faces_per_photo=faces)
    with pytest.raises(ConfigError, match="factor must divide the size 16, got 5"):
        case.upsampler(degradation=Area(5))


@every_method
def test_faces_lie_in_range_and_their_consistency_error_is_that_of_the_images(
    case: Case, low: Tensor
) -> None:
    found = case.upsampler().upsample(low, faces_per_photo=2)
    assert found.images.shape == (3, 2, 3, SIZE, SIZE) and not found.images.requires_grad
    assert 0 <= found.images.min() and found.images.max() <= 1
    again = squared_difference(Area(4).apply(found.images.flatten(0, 1)), low.repeat_interleave(2, dim=0))
    torch.testing.assert_close(found.consistency_error.flatten(), again, atol=1e-7, rtol=1e-4)


@every_method
def test_equal_streams_give_equal_faces_and_other_streams_others(case: Case, low: Tensor) -> None:
    first, second, other = (
        case.upsampler(streams=streams).upsample(low, faces_per_photo=2).images
        for streams in (STREAMS, STREAMS, STREAMS.child("other"))
    )
    assert torch.equal(first, second)
    if is_deterministic(case.method):
        assert torch.equal(first, other) and torch.equal(first[:, 0], first[:, 1])
    else:
        assert (first - other).abs().max() > 1e-3
        if isinstance(case.method, PulseConfig):
            assert (first - other).abs().mean() > 0.01 and (first[:, 0] - first[:, 1]).abs().mean() > 0.01
        assert (first[:, 0] - first[:, 1]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@every_method
def test_the_network_is_not_changed(case: Case, low: Tensor) -> None:
    """Weights, modes and gradients, also if the caller has disabled gradients."""
    model = case.model()
    if model is None:
        return
    networks = model.modules()
    for network in networks:
        network.train()
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    upsampler = case.upsampler(model=model)
    with torch.no_grad():
        upsampler.upsample(low[:1], faces_per_photo=1)
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
        assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
        assert network.training


@every_sampling_method
def test_faces_do_not_depend_on_chunks_or_workers(case: Case, low: Tensor) -> None:
    together = case.upsampler().upsample(low, faces_per_photo=2)
    threads = with_workers(case.method, 2)
    if isinstance(case.method, PulseEncoderInitConfig):
        apart: Method = PulseEncoderInitConfig(pulse=replace(PULSE, faces_at_once=1))
    else:
        apart = replace(case.method, faces_at_once=1)
    # Rounding grows over PULSE's many steps of a large rate.
    images, errors = (1e-2, 1e-2) if "pulse" in case.method.kind else (1e-3, 1e-2)
    for method in (apart, threads):
        other = replace(case, method=method).upsampler().upsample(low, faces_per_photo=2)
        torch.testing.assert_close(other.images, together.images, atol=images, rtol=0)
        torch.testing.assert_close(
            other.consistency_error, together.consistency_error, atol=1e-5, rtol=errors
        )


@every_sampling_method
def test_every_step_is_shown_and_counted(case: Case, low: Tensor) -> None:
    """Three photos, two faces at once."""
    counts: list[tuple[int, int]] = []
    seen: list[StepSnapshot] = []
    if isinstance(case.method, PulseEncoderInitConfig):
        method: Method = PulseEncoderInitConfig(pulse=replace(PULSE, faces_at_once=2, eps=1e-9))
    elif isinstance(case.method, PulseConfig):
        method = replace(PULSE, faces_at_once=2, eps=1e-9)
    else:
        method = replace(case.method, faces_at_once=2)
    found = (
        replace(case, method=method)
        .upsampler(progress=lambda done, total: counts.append((done, total)), watch=seen.append)
        .upsample(low, faces_per_photo=1)
    )
    steps = case.steps
    assert counts == [(step, 2 * steps) for step in range(1, 2 * steps + 1)] and found.steps == steps
    assert [snapshot.step for snapshot in seen] == [*range(1, steps + 1)] * 2
    assert [snapshot.faces.tolist() for snapshot in seen[steps - 1 : steps + 1]] == [[0, 1], [2]]
    if isinstance(method, HmcConfig | GuidedFlowConfig):  # their last step is the answer
        torch.testing.assert_close(seen[-1].images[0].clamp(0, 1), found.images[2, 0])


@every_method
def test_settings_survive_a_yaml_round_trip(case: Case) -> None:
    for method in (case.method, METHODS[case.method.kind]):
        assert parse(dump(method), type(method), name="recipe", leave_out=["kind"]) == method
