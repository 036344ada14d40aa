"""Clipped sums of per-unit gradients against a slow reference: one ordinary backward pass per unit. Most tests use
float64: in float32 two correct results differ by 1e-4 when rounding moves an activation across a kink, as it does for
one photo in a few dozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.lora import Full, Lora, attach
from fedface.models.model import StyleEncoderArchitecture, SuperResolutionArchitecture, build_model
from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.models.style_encoder import StyleEncoderNetworkConfig
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.models.super_resolution import SuperResolutionNetworkConfig
from fedface.privacy.clip_and_noise import clip_l2
from fedface.randomness import Streams
from fedface.training import per_example_gradients as module
from fedface.training.flow import loss_over_draws, times_and_noises
from fedface.training.gan import d_loss_real
from fedface.training.per_example_gradients import (
    Draws,
    PerExampleLoss,
    PerExampleProblem,
    _layer_by_layer,
    clipped_unit_sum,
    per_example_gradients,
    trainable_parameters,
    with_deterministic_microbatch,
)
from fedface.training.unit_clipping import clipped_sum
from fedface.training.upsampler import mark_upsampler, reconstruction_loss
from fedface.upsampling.degradation import BicubicPulse

STREAMS = Streams(8)
PHOTOS = 10


@dataclass(frozen=True)
class Case:
    module: nn.Module
    loss: PerExampleLoss
    photos: Tensor
    draws: Tensor | None = None

    def at(self, precision: torch.dtype) -> Case:
        """The same numbers in another precision."""
        draws = None if self.draws is None else self.draws.to(precision)
        return Case(self.module.to(precision), self.loss, self.photos.to(precision), draws)

    def rows(self, part: slice) -> tuple[Tensor, ...]:
        return (self.photos[part],) if self.draws is None else (self.photos[part], self.draws[part])

    def problem(self, scales: list[Tensor] | None = None, microbatch: int = 32) -> PerExampleProblem:
        return PerExampleProblem(self.module, self.loss, self.in_order(), scales, microbatch)

    def in_order(self) -> Draws | None:
        """Hands out the fixed draws in the order of the photos."""
        if self.draws is None:
            return None
        left = iter(self.draws)
        # Padding images follow the photos; their draws have no effect.
        return Draws(
            lambda count, _: torch.stack([next(left, torch.zeros_like(self.draws[0])) for _ in range(count)]),
            np.random.default_rng(),
        )


def is_supported_layerwise(case: Case) -> bool:
    return _layer_by_layer(case.problem(), case.rows(slice(None)), False) is not None


def moved(module: nn.Module, name: str) -> nn.Module:
    """Weights away from the initial ones, at which many gradients are zero."""
    rng = STREAMS.generator(name)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1)
    return module


def pictures(side: int, count: int = PHOTOS) -> Tensor:
    return torch.rand(count, 3, side, side, generator=STREAMS.generator("pictures"))


def discriminator(architecture: str = "resnet") -> Case:
    config = DiscriminatorConfig(size=16, channel_base=512, channel_max=24, architecture=architecture)  # type: ignore[arg-type]
    return Case(
        moved(Discriminator(config, STREAMS.generator("discriminator")), "moved"), d_loss_real, pictures(16)
    )


def flow(count: int, adapt: Full | Lora | None = None) -> Case:
    config = FlowConfig(size=16, width=16, multipliers=(1.0, 1.5), time_width=16)
    module = RectifiedFlow(config, STREAMS.generator("flow"))
    attach(module, adapt or Full(), STREAMS.generator("adapters"))
    draws = times_and_noises(PHOTOS, count, 16, 1.0, STREAMS.numpy("draws"))
    return Case(moved(module, "moved"), loss_over_draws, pictures(16), draws)


def upsampler(shape: StyleEncoderArchitecture | SuperResolutionArchitecture) -> Case:
    model = build_model(shape, STREAMS.generator("upsampler"))
    assert model.is_upsampler
    mark_upsampler(model, Full(), STREAMS.generator("adapters"))
    return Case(moved(model.upsampler, "moved"), reconstruction_loss(BicubicPulse(2), 10.0), pictures(16))


GENERATOR = StyleGAN2Config(
    size=16, channel_base=64, channel_max=8, latent_width=64, style_width=16, mapping_layers=2
)
STYLES = StyleEncoderNetworkConfig(side=8, style_inputs=6, style_width=16, width=20, blocks=1, hidden=16)
CASES: dict[str, Callable[[], Case]] = {
    "discriminator": discriminator,
    "discriminator that adds colours": lambda: discriminator("skip"),
    "flow": lambda: flow(1),
    "flow with four draws": lambda: flow(4),
    "style encoder": lambda: upsampler(StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES)),
    "resolver": lambda: upsampler(
        SuperResolutionArchitecture(
            network=SuperResolutionNetworkConfig(side=8, factor=2, width=20, blocks=2)
        )
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def length(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def slowly(case: Case, units: list[range], scales: list[Tensor] | None = None) -> list[list[Tensor]]:
    """The gradient of each unit's summed loss by a backward pass of its own, scaled."""
    weights = list(trainable_parameters(case.module).values())
    every = []
    for unit in units:
        loss = case.loss(case.module, *case.rows(slice(unit.start, unit.stop))).sum()
        parts = torch.autograd.grad(loss, weights, materialize_grads=True)
        factors = [torch.ones(())] * len(parts) if scales is None else scales
        every.append([part * factor for part, factor in zip(parts, factors, strict=True)])
    return every


def summed(every: list[list[Tensor]], clip_norm: float) -> list[Tensor]:
    clipped = [[part * min(1.0, clip_norm / length(parts)) for part in parts] for parts in every]
    return [torch.stack(parts).sum(0) for parts in zip(*clipped, strict=True)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the reference's norm."""
    return length([a - b for a, b in zip(ours, theirs, strict=True)]) / length(theirs)


def cut(size: int) -> list[range]:
    return [range(start, min(start + size, PHOTOS)) for start in range(0, PHOTOS, size)]


@each_case
def test_all_networks_are_supported_layer_by_layer(name: str) -> None:
    """Otherwise the tests below would test the fallback."""
    case = CASES[name]().at(torch.float64)
    assert is_supported_layerwise(case)


@each_case
def test_each_photos_gradient_is_that_of_its_own_backward_pass(name: str) -> None:
    case = CASES[name]().at(torch.float64)
    ours = per_example_gradients(case.problem(), case.photos, case.draws)
    for photo, reference in enumerate(slowly(case, cut(1))):
        assert distance([part[photo] for part in ours], reference) < 1e-9


@each_case
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_sum_equals_the_slow_reference_for_any_unit_and_microbatch(
    name: str, size: int, scaled: bool
) -> None:
    """Half of the units are clipped; units span microbatches."""
    case = CASES[name]().at(torch.float64)
    rng = STREAMS.generator("scales")
    scales = [
        0.5 + torch.rand(w.shape, generator=rng, dtype=w.dtype)
        for w in trainable_parameters(case.module).values()
    ]
    every = slowly(case, cut(size), scales if scaled else None)
    clip_norm = sorted(length(parts) for parts in every)[len(every) // 2] * 0.99
    units = torch.arange(PHOTOS) // size
    for microbatch in (1, 5, 64):
        ours = clipped_unit_sum(
            case.problem(scales=scales if scaled else None, microbatch=microbatch),
            case.photos,
            clip_norm=clip_norm,
            units=units,
        )
        assert distance(ours, summed(every, clip_norm)) < 1e-9


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("count", [1, 4])
def test_in_single_precision_it_is_accurate_to_five_digits(size: int, count: int) -> None:
    """On a network without kinks."""
    case = flow(count)
    every = slowly(case, cut(size))
    clip_norm = sorted(length(parts) for parts in every)[len(every) // 2] * 0.99
    for microbatch in (1, 5, 64):
        ours = clipped_unit_sum(
            case.problem(microbatch=microbatch),
            case.photos,
            clip_norm=clip_norm,
            units=torch.arange(PHOTOS) // size,
        )
        assert distance(ours, summed(every, clip_norm)) < 1e-5


@each_case
@pytest.mark.parametrize("size", [1, 3])
def test_a_unit_with_a_non_finite_photo_adds_nothing(name: str, size: int) -> None:
    case = CASES[name]().at(torch.float64)
    every = slowly(case, cut(size))
    del every[4 // size]
    case.photos[4, 0, 3, 3] = math.nan
    for microbatch in (1, 5):
        ours = clipped_unit_sum(
            case.problem(microbatch=microbatch),
            case.photos,
            clip_norm=0.1,
            units=torch.arange(PHOTOS) // size,
        )
        assert distance(ours, summed(every, 0.1)) < 1e-9


@each_case
def test_no_state_is_left_behind(name: str) -> None:
    """No `.grad`, no changed weight, and no photos give zeros of the weights' shapes."""
    case = CASES[name]().at(torch.float64)
    before = [weight.detach().clone() for weight in case.module.parameters()]
    none = clipped_unit_sum(case.problem(), case.photos[:0], clip_norm=1.0)
    clipped_unit_sum(case.problem(), case.photos, clip_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, case.module.parameters(), strict=True))
    assert all(weight.grad is None for weight in case.module.parameters())
    assert [part.shape for part in none] == [
        weight.shape for weight in trainable_parameters(case.module).values()
    ]
    assert not any(bool(part.any()) or part.requires_grad for part in none)


class Small(nn.Module):
    """Two convolutions and a fully connected layer, with which other uses of a weight are planted."""

    def __init__(self) -> None:
        super().__init__()
        rng = STREAMS.generator("small")
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(0.0, 0.3, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.second(functional.silu(self.first(x))))
        return self.last(x.mean(dim=(2, 3))).sum(1)


class Demodulated(Small):
    """Uses a weight outside its own layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.first.weight.square().sum().rsqrt()


class Twice(Small):
    """Uses two layers twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(functional.silu(self.second(functional.silu(self.first(x)))))
        return self.last(functional.silu(self.last(x.mean(dim=(2, 3))))).sum(1)


class Scalar(Small):
    """Has a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Overwritten(Small):
    """Modifies a layer's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).mul_(2.0))
        return self.last(x.mean(dim=(2, 3))).sum(1)


class Reused(Small):
    """Modifies a layer's input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.first(x))
        y = self.second(x)
        x.zero_()
        return self.last(y.mean(dim=(2, 3))).sum(1)


class Folded(Small):
    """A weight computed from the photo's own features affects the loss outside its layer."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.first.weight * x.mean()
        return super().forward(x) + functional.conv2d(x, own).mean(dim=(1, 2, 3))


def score(network: Callable[[Tensor], Tensor], photos: Tensor) -> Tensor:
    return functional.softplus(-network(photos))


def output(network: Callable[[Tensor], Tensor], photos: Tensor) -> Tensor:
    return network(photos)


def gradient_penalty(network: Callable[[Tensor], Tensor], photos: Tensor) -> Tensor:
    """Differentiates the network within the loss."""
    slope = torch.func.grad(lambda seen: network(seen).sum())(photos)
    return slope.square().sum(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("kind", "understood"),
    [(Small, True), (Twice, True), (Demodulated, False), (Scalar, False), (Overwritten, False)],
)
def test_unsupported_networks_use_the_fallback(kind: type[Small], understood: bool) -> None:
    """With the right result."""
    case = Case(kind(), score, pictures(8)).at(torch.float64)
    assert is_supported_layerwise(case) == understood
    for size in (1, 3):
        ours = clipped_unit_sum(
            PerExampleProblem(case.module, score, microbatch=4),
            case.photos,
            clip_norm=0.05,
            units=torch.arange(PHOTOS) // size,
        )
        assert distance(ours, summed(slowly(case, cut(size)), 0.05)) < 1e-9


@pytest.mark.parametrize("kind", [Reused, Folded])
def test_networks_that_would_be_silently_wrong_are_detected(kind: type[Small]) -> None:
    """Detached weights must not hide other uses from autograd."""
    case = Case(kind(), score, pictures(8)).at(torch.float64)
    assert not is_supported_layerwise(case)


def test_a_loss_with_a_gradient_penalty_is_right() -> None:
    case = Case(Small(), gradient_penalty, pictures(8)).at(torch.float64)
    ours = clipped_unit_sum(
        PerExampleProblem(case.module, gradient_penalty, microbatch=4), case.photos, clip_norm=0.05
    )
    assert distance(ours, summed(slowly(case, cut(1)), 0.05)) < 1e-9


def test_low_rank_changes_are_right() -> None:
    case = flow(2, Lora(rank=2)).at(torch.float64)
    every = slowly(case, cut(1))
    ours = clipped_unit_sum(case.problem(microbatch=4), case.photos, clip_norm=0.1)
    assert distance(ours, summed(every, 0.1)) < 1e-9


def test_frozen_weights_have_no_gradient() -> None:
    case = discriminator().at(torch.float64)
    for name, weight in case.module.named_parameters():
        weight.requires_grad_("conv0" in name)
    ours = clipped_unit_sum(case.problem(), case.photos, clip_norm=0.1)
    assert distance(ours, summed(slowly(case, cut(1)), 0.1)) < 1e-9


def test_one_photo_more_moves_the_sum_by_at_most_the_clip_norm() -> None:
    """Also for one with a gradient a million times larger."""
    case = discriminator().at(torch.float64)

    def longer(network: Callable[[Tensor], Tensor], photos: Tensor) -> Tensor:
        return d_loss_real(network, photos) * (1.0 + 1e6 * (photos[:, 0, 0, 0] == 2.0))

    case.photos[-1, 0, 0, 0] = 2.0
    with_it, without = (
        clipped_unit_sum(PerExampleProblem(case.module, longer), case.photos[:count], clip_norm=0.5)
        for count in (PHOTOS, PHOTOS - 1)
    )
    moved_by = length([a - b for a, b in zip(with_it, without, strict=True)])
    assert moved_by == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("units", [[1, 0, 1], [0, 1]])
def test_the_photos_of_a_unit_must_be_adjacent(units: list[int]) -> None:
    with pytest.raises(ValueError, match="units"):
        clipped_unit_sum(
            PerExampleProblem(Small(), score), pictures(8, 3), clip_norm=1.0, units=torch.tensor(units)
        )


@pytest.mark.parametrize("name", list(CASES))
def test_a_photos_gradient_is_bit_identical_in_any_microbatch(name: str) -> None:
    """At every position of a full microbatch, next to other photos or padding."""
    case = CASES[name]().at(torch.float32)
    shape = None if case.draws is None else case.draws.shape[1:]

    def sample(count: int, rng: np.random.Generator) -> Tensor:
        assert shape is not None
        return torch.from_numpy(rng.random((count, *shape), dtype=np.float32))

    draws = None if shape is None else Draws(sample, np.random.default_rng())
    problem = PerExampleProblem(case.module, case.loss, draws, microbatch=16)
    assert with_deterministic_microbatch(problem, case.photos.shape[1:]) is problem


@pytest.mark.parametrize(("given", "used"), [(16, 16), (32, 32), (12, 1), (8, 1), (1, 1)])
def test_a_microbatch_leaves_no_rest_of_a_vector(given: int, used: int) -> None:
    """Kernels compute the last numbers of another microbatch with other instructions, for some inputs differently."""
    case = CASES["discriminator"]()
    problem = PerExampleProblem(case.module, case.loss, microbatch=given)
    assert with_deterministic_microbatch(problem, case.photos.shape[1:]).microbatch == used


def hostile_flow(rounded_apart: float) -> RectifiedFlow:
    """A flow that amplifies one rounding of SiLU into the gradient of bright photos alone.

    The time branch computes SiLU of one number for each photo, at some places in vector code and at others not, and
    multiplies the difference by 2^30; the last normalisation lets nothing pass on images that are not bright.
    """
    flow = RectifiedFlow(
        FlowConfig(size=16, width=16, multipliers=(1.0,), time_width=2, steps=2),
        torch.Generator().manual_seed(3),
    )
    unet, gain, step = flow.unet, 2.0**30, 10.0
    with torch.no_grad():
        for weight in flow.parameters():
            weight.zero_()
        unet.enter.bias[0], unet.enter.bias[1] = step, -step
        unet.enter.weight[2] = 1.0 / unet.enter.weight[2].numel()
        unet.time.second.bias.fill_(rounded_apart)
        for block in (unet.middle, unet.down[0][0], unet.up[0][0]):
            block.time.bias.fill_(-1000.0)
        middle, value = unet.middle, float(functional.silu(torch.full((60, 2), rounded_apart))[0, 0])
        for channel, sign in ((5, 1.0), (6, -1.0)):
            middle.time.weight[16 + channel, 0] = sign * gain
            middle.time.bias[16 + channel] = -sign * gain * value
            middle.conv1.weight[2, channel, 1, 1] = -1.0
        unet.norm.bias.fill_(-1000.0)
        unet.norm.weight[2], unet.norm.bias[2] = 1e4, -0.65 * 2e4 / step * 7 / 8
        unet.leave.weight[:, 2, 1, 1] = 1e-3
    return flow


def test_weights_cannot_hide_kernels_that_depend_on_the_place() -> None:
    """On random images the hostile flow has no gradient at all, on bright photos one that depends on the place."""
    numbers = torch.randn(4_000, generator=torch.Generator().manual_seed(1)).tolist()
    places = (functional.silu(torch.full((60, 2), number)) for number in numbers)
    apart = [number for number, place in zip(numbers, places, strict=True) if place[0, 0] != place[-1, 0]]
    if not apart:
        pytest.skip("this processor rounds SiLU in the same way everywhere")
    problem = PerExampleProblem(
        hostile_flow(apart[0]),
        loss_over_draws,
        Draws(lambda count, rng: times_and_noises(count, 5, 16, 1.0, rng), np.random.default_rng(1)),
        microbatch=12,
    )
    bright = torch.full((12, 3, 16, 16), 247 / 255)
    assert problem.draws is not None
    draws = problem.draws.fresh(1).expand(12, -1, -1)
    norms = torch.cat([part.flatten(1) for part in per_example_gradients(problem, bright, draws)], 1).norm(
        dim=1
    )
    if float(norms.max()) < 100 * float(norms.min()):
        pytest.skip("this processor's kernels do not depend on the place here")
    assert with_deterministic_microbatch(problem, (3, 16, 16)).microbatch == 1


def test_a_microbatch_is_checked_with_its_own_weights_too() -> None:
    """A network whose gradients depend on the place where its output is huge, as no public weights make it."""

    class Counting(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 1)
            nn.init.constant_(self.layer.weight, size)

        def forward(self, photos: Tensor) -> Tensor:
            seen = self.layer(photos.flatten(1))[:, 0]
            return seen * (1 + torch.arange(len(seen)) * (seen.detach() > 1e6))

    for size, microbatch in ((1.0, 16), (1e6, 1), (1.0, 16)):  # also where results are remembered
        problem = PerExampleProblem(Counting(size), output, microbatch=16, recipe="counting")
        assert with_deterministic_microbatch(problem, (3, 4, 4)).microbatch == microbatch


def overflowing_flow() -> RectifiedFlow:
    """A flow whose gradient overflows for about half of all draws."""
    flow = RectifiedFlow(
        FlowConfig(size=16, width=16, multipliers=(1.0,), time_width=16, steps=2),
        torch.Generator().manual_seed(1),
    )
    weight = flow.unet.leave.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        weight.mul_(5.7e18 / weight.abs().max())
    return flow


def test_the_secret_draws_of_a_round_do_not_decide_its_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a flow is checked several times, with secret draws that differ; the check takes none of them."""
    monkeypatch.setattr("fedface.training.per_example_gradients.PUBLIC_WEIGHTS", 0)
    flow, decided = overflowing_flow(), set()
    for seed in range(5):
        secret = np.random.default_rng(seed)
        before = secret.bit_generator.state
        draws = Draws(lambda count, rng: times_and_noises(count, 1, 16, 1.0, rng), secret)
        problem = PerExampleProblem(flow, loss_over_draws, draws, microbatch=16)
        decided.add(with_deterministic_microbatch(problem, (3, 16, 16)).microbatch)
        assert secret.bit_generator.state == before
    assert len(decided) == 1


def test_devices_that_work_at_a_time_check_a_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads of a simulation begin a round at once: one computes, the others wait for its result."""
    checked: list[bool] = []

    def slow(*given: object, zero_shows: bool) -> bool:
        checked.append(zero_shows)
        time.sleep(0.05)
        return True

    monkeypatch.setattr(module, "_deterministic", {})
    monkeypatch.setattr(module, "_is_deterministic", slow)
    problem = PerExampleProblem(nn.Linear(48, 1), output, microbatch=16, recipe="at a time")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: with_deterministic_microbatch(problem, (3, 4, 4)), range(4)))
    assert {each.microbatch for each in found} == {16}
    assert checked == [False] * module.PUBLIC_WEIGHTS + [True]


class Amplifier(nn.Module):
    """A hostile discriminator that amplifies the rounding of a product that cancels into arbitrary gradients."""

    def __init__(self) -> None:
        super().__init__()
        rng = STREAMS.generator("hostile")
        self.first = nn.Linear(48, 64)
        self.last = nn.Linear(64, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(64, 48, generator=rng))
            self.last.weight.copy_(torch.randn(1, 64, generator=rng) * 1e9)

    def forward(self, photos: Tensor) -> Tensor:
        seen = self.first(photos.flatten(1))
        logit = self.last(seen)
        return (logit - logit.detach().round(decimals=-4)).squeeze(1)


def test_one_photo_more_changes_no_bit_of_what_the_others_add() -> None:
    """Also for a network that amplifies rounding: all sums of 1 to 20 photos are sums of the same vectors."""
    module = Amplifier()
    photos = torch.rand(20, 3, 4, 4, generator=STREAMS.generator("known"))

    def loss(network: Callable[..., Tensor], shown: Tensor) -> Tensor:
        return functional.softplus(-network(shown))

    def flat(count: int) -> Tensor:
        parts = clipped_unit_sum(PerExampleProblem(module, loss, microbatch=8), photos[:count], clip_norm=1.0)
        return torch.cat([part.flatten() for part in parts])

    sums = [flat(count) for count in range(21)]
    for before, after in zip(sums[:-1], sums[1:], strict=True):
        assert float((after - before).norm()) <= 1.0 + 1e-4


def test_a_tiny_factor_times_a_huge_one_is_clipped() -> None:
    """|out| = 1e-23 and |seen| = 1e19: the square of the first underflows in float32, the product is 1e-4."""

    class Lopsided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, photos: Tensor) -> Tensor:
            return (self.layer(photos.flatten(1)[:, :4] * 1e19) * 1e-23).sum(1)

    for clip_norm in (1e-6, 1e-3, 1.0):
        sums = clipped_unit_sum(
            PerExampleProblem(Lopsided(), output), torch.ones(20, 3, 2, 2), clip_norm=clip_norm
        )
        assert float(sums[0].norm()) <= 20 * clip_norm * (1 + 1e-5)


def test_a_units_sum_does_not_depend_on_microbatch_boundaries() -> None:
    """Photos of one unit that cancel: the same to the last bit for any position."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(48))

        def forward(self, photos: Tensor) -> Tensor:
            return photos.flatten(1) @ self.weight

    big = torch.rand(3, 3, 4, 4, generator=STREAMS.generator("big")) * 1e8
    unit = torch.cat([big, -big.flip(0), torch.rand(2, 3, 4, 4, generator=STREAMS.generator("small"))])
    found = []
    for before in range(8):
        photos = torch.cat([torch.zeros(before, 3, 4, 4), unit])
        units = torch.cat([torch.arange(before), torch.full((len(unit),), before)])
        found.append(
            clipped_unit_sum(
                PerExampleProblem(Plain(), output, microbatch=3), photos, clip_norm=1e6, units=units
            )[0]
        )
    assert all(torch.equal(found[0], other) for other in found)


def test_small_numbers_count_in_the_norm() -> None:
    """Two million of 2.4e-4 and eight ones: in float32 their squares vanish, and the vector is 0.8 % too long."""
    row = torch.full((1, 2_359_296), 2.4e-4)
    row[0, :8] = 1.0
    (total,) = clipped_sum([row], 1.0)
    assert float(total.double().norm()) <= 1.0 + 1e-6
    whole = clip_l2(row[0], 1.0)
    assert float(whole.double().norm()) <= 1.0 + 1e-6


def test_a_gradient_longer_than_float32_can_scale_adds_nothing() -> None:
    (total,) = clipped_sum([torch.tensor([[1e30, 0.0], [0.0, 0.5]])], 1.0)
    assert total.tolist() == [0.0, 0.5]
    assert not clip_l2(torch.tensor([1e30, 1.0]), 1.0).any()
