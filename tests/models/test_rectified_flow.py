"""The rectified flow against differential equations whose solutions are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedface.errors import ConfigError
from fedface.models.generator_protocol import Generator
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.models.unet import UNet, UNetConfig
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler

STREAMS = Streams(3)
TINY = FlowConfig(size=16, width=8, multipliers=(1.0, 2.0), group=4, time_width=8, steps=4)
SPREAD = 0.3  # of the pictures in the Gaussian example


def tiny_flow(config: FlowConfig = TINY) -> RectifiedFlow:
    """A small flow with a smooth nonzero velocity; an untrained one has velocity zero."""
    flow = RectifiedFlow(config, STREAMS.generator("weights"))
    rng = STREAMS.generator("moved")
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1)
    return flow


def latents(count: int, flow: RectifiedFlow) -> Tensor:
    return torch.randn(count, flow.latent_width, generator=STREAMS.generator("latents"))


class Gaussian(nn.Module):
    """The exact velocity for normal images with standard deviation SPREAD. x_t has standard deviation r = sqrt((1 -
    t)^2 + (t SPREAD)^2), and every path is x_t = r(t) x_0.
    """

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        t = times[:, None, None, None]
        return x * (t * SPREAD**2 - (1.0 - t)) / ((1.0 - t).square() + (t * SPREAD).square())


class Decay(nn.Module):
    """Exponential decay to zero."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return -x


def gaussian_flow(steps: int) -> RectifiedFlow:
    flow = RectifiedFlow(FlowConfig(size=16, width=8, multipliers=(1.0,), steps=steps))
    flow.unet = Gaussian()  # type: ignore[assignment]
    return flow


def test_an_untrained_flow_is_the_identity() -> None:
    """The velocity is zero, so an image is its own latent, exactly."""
    flow = RectifiedFlow(TINY, STREAMS.generator("weights"))
    noise = latents(3, flow)
    images = flow.synthesize(flow.map(noise))
    assert torch.equal(images, (noise.view(3, 3, 16, 16) + 1.0) / 2.0)
    assert torch.allclose(flow.invert(images), noise, atol=1e-6)


def test_for_gaussian_images_the_flow_scales_noise_to_their_deviation() -> None:
    """The closed form: x_1 = SPREAD * x_0."""
    flow = gaussian_flow(steps=200)
    noise = latents(4, flow)
    assert torch.allclose(2.0 * flow.synthesize(flow.map(noise)).flatten(1) - 1.0, SPREAD * noise, atol=2e-3)


def test_for_gaussian_images_inversion_divides_by_their_deviation() -> None:
    """The same closed form, backwards."""
    flow = gaussian_flow(steps=8)
    pictures = SPREAD * latents(4, flow)
    found = flow.invert((pictures.view(-1, 3, 16, 16) + 1.0) / 2.0, steps=400)
    assert torch.allclose(found, pictures / SPREAD, atol=2e-3)


def test_twice_the_steps_give_a_quarter_of_the_error() -> None:
    """The midpoint rule is of second order: dx/dt = -x ends at x / e."""
    noise = latents(4, gaussian_flow(1)).double()
    errors = []
    for steps in (32, 64):
        flow = gaussian_flow(steps)
        flow.unet = Decay()  # type: ignore[assignment]
        errors.append(
            float((2.0 * flow.synthesize(flow.map(noise)).flatten(1) - 1.0 - noise / math.e).norm())
        )
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


@torch.no_grad()
def test_inversion_is_more_exact_with_more_steps() -> None:
    """Backwards and forwards through a network's field that does not depend on time."""
    errors = []
    for steps in (4, 16):
        flow = tiny_flow(FlowConfig(**{**vars(TINY), "steps": steps})).double()
        flow.unet.time.first.weight.zero_()
        images = torch.rand(3, 3, 16, 16, generator=STREAMS.generator("photos")).double()
        errors.append(float((flow.synthesize(flow.map(flow.invert(images))) - images).norm()))
    assert errors[1] < errors[0] / 8


def test_it_is_a_generator() -> None:
    """The attributes that searches use, and the two functions that are trivial for a flow."""
    flow: Generator = tiny_flow()
    assert (flow.size, flow.latent_width, flow.style_inputs) == (16, 768, 1)
    assert flow.noise_sides == () and flow.style_slope == 1.0
    noise = torch.randn(2, 768, generator=STREAMS.generator("latents"))
    assert torch.equal(flow.map(noise)[:, 0], noise)
    assert torch.equal(flow.truncate(flow.map(noise), 0.5), 0.5 * noise[:, None])


def test_an_image_does_not_depend_on_its_batch() -> None:
    """Images of a batch and single images agree, and samples are clamped images of the stream's latents."""
    flow = tiny_flow()
    noise = latents(3, flow)
    with torch.no_grad():
        together = flow.synthesize(flow.map(noise))
        alone = torch.cat([flow.synthesize(flow.map(one[None])) for one in noise])
    assert torch.allclose(together, alone, atol=1e-5)
    sampled = flow.sample(3, STREAMS.generator("latents"), batch=2)
    assert torch.allclose(sampled, together.clamp(0.0, 1.0), atol=1e-5)


def test_equal_streams_give_equal_weights_whatever_the_global_seed() -> None:
    first = RectifiedFlow(TINY, STREAMS.generator("weights")).state_dict()
    torch.rand(3)
    second = RectifiedFlow(TINY, STREAMS.generator("weights")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_velocity_depends_on_time_at_both_ends() -> None:
    """The same point has another velocity at another time."""
    flow, x = tiny_flow(), torch.zeros(3, 3, 16, 16)
    first, second, third = flow.velocity(x, torch.tensor([0.0, 0.5, 1.0]))
    assert min(float((first - second).norm()), float((second - third).norm())) > 1e-3


def test_pulse_matches_a_downscaled_image_of_the_flow() -> None:
    """A match exists, and the search finds one."""
    flow = gaussian_flow(steps=4)
    low = BicubicPulse(4).apply(flow.sample(2, STREAMS.generator("target")))
    config = PulseConfig(mapping_samples=500)
    found = PulseUpsampler(flow, BicubicPulse(4), config, STREAMS).upsample(low, faces_per_photo=2)
    assert found.images.shape == (2, 2, 3, 16, 16) and bool(found.converged.all())
    again = BicubicPulse(4).apply(found.images.flatten(0, 1))
    assert float((again - low.repeat_interleave(2, dim=0)).square().mean(dim=(1, 2, 3)).max()) <= config.eps
    assert float((found.images[:, 0] - found.images[:, 1]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 48), ("steps", 0), ("steps", 1001), ("width", 60)],
)
def test_an_invalid_shape_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="group" if field == "width" else field):
        FlowConfig(**{**vars(TINY), "group": 8, field: value})


def test_more_halvings_than_the_size_allows_are_refused() -> None:
    with pytest.raises(ConfigError, match="size must be a multiple of patch times all halvings, 32, got 16"):
        FlowConfig(**{**vars(TINY), "multipliers": (1.0,) * 5})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_width", 7),
        ("time_width", 2**17),
        ("blocks", 0),
        ("blocks", 65),
        ("patch", 0),
        ("width", 2**17),
        ("multipliers", ()),
        ("multipliers", (1.0,) * 9),
        ("multipliers", (math.inf,)),
        ("multipliers", (math.nan,)),
        ("multipliers", (0.0,)),
        ("multipliers", (1025.0,)),
    ],
)
def test_an_invalid_network_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        UNetConfig(**{field: value})


def test_noise_maps_and_no_steps_are_refused() -> None:
    flow = tiny_flow()
    with pytest.raises(ValueError, match="noise maps"):
        flow.synthesize(flow.map(latents(1, flow)), [torch.zeros(1, 1, 4, 4)])
    with pytest.raises(ValueError, match="steps"):
        flow.invert(torch.zeros(1, 3, 16, 16), steps=0)


def test_a_u_net_supports_any_blocks_sides_and_patches() -> None:
    """Images keep their shape, at 64 px too."""
    for config in (
        UNetConfig(width=8, multipliers=(1.0, 1.5, 2.0), group=4, blocks=2, time_width=8),
        UNetConfig(width=8, multipliers=(1.0,), patch=4, time_width=8),
        UNetConfig(width=8, multipliers=(1.0, 2.0), patch=1, time_width=8),
    ):
        net = UNet(config, STREAMS.generator("weights"))
        assert net(torch.zeros(2, 3, 64, 64), torch.tensor([0.1, 0.9])).shape == (2, 3, 64, 64)
        assert math.prod(net(torch.zeros(1, 3, 16, 16), torch.tensor([0.5])).shape) == 768
