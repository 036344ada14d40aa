"""PULSE: losses and optimiser compared with the published code, and properties of its search."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedface.models.checkpoint import load_gan
from fedface.models.fast_stylegan2 import FastStyleGAN2, prepare_for_search
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams
from fedface.upsampling import pulse
from fedface.upsampling.degradation import Area, Bicubic, BicubicPulse, Blur, Chain, Noise, apply_degradation
from fedface.upsampling.jpeg import Jpeg
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler, geocross
from fedface.upsampling.spherical_adam import SphericalAdam, one_cycle_drop
from fedface.upsampling.style_gaussian import fit_style_gaussian
from fedface.upsampling.upsampler import StepSnapshot, Upsampled, squared_difference

STREAMS = Streams(7)
QUICK = PulseConfig(steps=12, mapping_samples=500)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    config = StyleGAN2Config(
        size=16, latent_width=16, style_width=16, mapping_layers=2, channel_base=256, channel_max=16
    )
    return StyleGAN2(config, STREAMS.generator("weights"))


@pytest.fixture(scope="module")
def low(generator: StyleGAN2) -> Tensor:
    """Photos that the generator can match, because they are its samples."""
    return BicubicPulse(4).apply(generator.sample(6, STREAMS.generator("truth"))).clamp(0, 1)


def test_losses_equal_those_of_the_published_code(shared: Path) -> None:
    reference = np.load(shared / "refs" / "pulse_losses.npz")
    styles = torch.tensor(reference["in/latent"]).requires_grad_()
    spread = geocross(styles).sum()
    (gradient,) = torch.autograd.grad(spread, styles)
    assert spread.item() == pytest.approx(float(reference["out/geocross"]), rel=1e-6)
    np.testing.assert_allclose(gradient.numpy(), reference["out/geocross_grad"], atol=1e-6)
    a, b = torch.tensor(reference["in/a"]), torch.tensor(reference["in/b"])
    assert squared_difference(a, b).sum().item() == pytest.approx(float(reference["out/l2"]), rel=1e-5)
    clamped = squared_difference(a, a + 0.01).clamp(min=2e-3).sum()
    assert clamped.item() == pytest.approx(float(reference["out/l2_clamped(a,a+0.01)"]), rel=1e-6)


def test_geocross_of_opposite_styles_is_known_and_of_equal_ones_zero() -> None:
    """Angles pi off the diagonal and 0 on it: v / 8 * pi^2 / 2."""
    style = torch.randn(1, 1, 32, generator=STREAMS.generator("style"))
    opposite = geocross(torch.cat((style, -style), dim=1))
    assert opposite.item() == pytest.approx(32 / 8 * np.pi**2 / 2, rel=1e-4)
    assert geocross(style.expand(1, 5, 32)).item() < 1e-6


def test_spherical_adam_follows_the_published_trajectory(shared: Path) -> None:
    reference = np.load(shared / "refs" / "pulse_spherical_adam.npz")
    targets = [torch.tensor(reference["in/target_p"]), torch.tensor(reference["in/target_n"])]
    search = SphericalAdam([torch.tensor(reference["in/p0"]), torch.tensor(reference["in/n0"])], 0.4)
    for step in range(20):
        inputs = [variable.requires_grad_() for variable in search.variables]
        loss = sum(((a - b).square().mean() for a, b in zip(inputs, targets, strict=True)), torch.zeros(()))
        multiplier = one_cycle_drop(step, 20)
        search.step(torch.autograd.grad(loss, inputs), multiplier)
        assert 0.4 * multiplier == pytest.approx(reference["out/lr"][step], rel=1e-6)
        assert loss.item() == pytest.approx(reference["out/loss"][step], rel=1e-5)
        np.testing.assert_allclose(search.variables[0].numpy(), reference["out/p_traj"][step], atol=1e-5)
    np.testing.assert_allclose(search.variables[1].numpy(), reference["out/n_final"], atol=1e-5)


def test_the_style_fit_recovers_the_normal_before_a_leaky_relu_of_any_gain() -> None:
    centre, spread = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    for gain in (1.0, 2**0.5):

        def mapping(latents: Tensor, gain: float = gain) -> Tensor:
            return gain * torch.nn.functional.leaky_relu(latents * spread + centre, 0.2)[:, None]

        fit = fit_style_gaussian(mapping, 3, samples=40_000, stream=STREAMS.generator("fit"))
        torch.testing.assert_close(fit.mean, gain * centre, atol=0.05, rtol=0)
        torch.testing.assert_close(fit.std, gain * spread, atol=0.05, rtol=0)
        latents = torch.randn(2, 4, 3, generator=STREAMS.generator("z"))
        exact = mapping(latents.flatten(0, 1))[:, 0].unflatten(0, (2, 4))
        torch.testing.assert_close(fit.styles(latents), exact, atol=0.15, rtol=0)


def test_the_style_fit_of_a_linear_mapping_inverts_no_leaky_relu() -> None:
    """Slope 1: normal styles are fitted directly, negative ones too."""
    centre, spread = torch.tensor([-1.0, 0.2]), torch.tensor([0.5, 2.0])
    fit = fit_style_gaussian(
        lambda latents: (latents * spread + centre)[:, None],
        2,
        samples=40_000,
        stream=STREAMS.generator("fit"),
        slope=1.0,
    )
    torch.testing.assert_close(fit.mean, centre, atol=0.05, rtol=0)
    torch.testing.assert_close(fit.std, spread, atol=0.05, rtol=0)
    latents = torch.randn(2, 4, 2, generator=STREAMS.generator("z"))
    torch.testing.assert_close(fit.styles(latents), latents * fit.std + fit.mean)


def test_the_style_fit_equals_that_of_the_published_code(shared: Path) -> None:
    reference = np.load(shared / "refs" / "pulse_sg1_mapping64.npz")
    layers = [
        [torch.tensor(reference[f"state/dense{i}.{part}"]) * 0.01 for part in ("weight", "bias")]
        for i in range(8)
    ]

    def mapping(latents: Tensor) -> Tensor:
        x = latents * torch.rsqrt(latents.square().mean(dim=1, keepdim=True) + 1e-8)
        for weight, bias in layers:
            x = torch.nn.functional.leaky_relu(x @ weight.T * 2**0.5 / 8 + bias, 0.2)
        return x[:, None]

    fit = fit_style_gaussian(mapping, 64, samples=20_000, stream=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(fit.mean.numpy(), reference["out/gaussian_fit_mean_20000"], atol=1e-5)
    np.testing.assert_allclose(fit.std.numpy(), reference["out/gaussian_fit_std_20000"], atol=1e-5)


def test_samples_of_the_generator_are_matched(generator: StyleGAN2, low: Tensor) -> None:
    """Planted positive: a solution exists, so most searches find one; each success is verified."""
    config = PulseConfig(steps=100, eps=4e-3, mapping_samples=2000)
    found = PulseUpsampler(generator, BicubicPulse(4), config, STREAMS).upsample(low, faces_per_photo=2)
    assert found.images.shape == (6, 2, 3, 16, 16)
    assert found.converged.float().mean() > 0.7
    again = BicubicPulse(4).apply(found.images.flatten(0, 1))
    consistency_error = squared_difference(again, low.repeat_interleave(2, dim=0)).view(6, 2)
    torch.testing.assert_close(found.consistency_error, consistency_error, atol=1e-7, rtol=1e-4)
    assert torch.equal(found.converged, found.consistency_error <= config.eps)
    assert 0 <= found.images.min() and found.images.max() <= 1


def test_a_search_uses_the_degradation_of_the_test(generator: StyleGAN2) -> None:
    """A chain of blur, downscale, noise and JPEG, searched through its mean and its straight-through gradient."""
    chain = Chain((Blur(0.8), Bicubic(2), Noise(0.01), Jpeg(90, "4:4:4")))
    photos = apply_degradation(
        chain, generator.sample(3, STREAMS.generator("truth")), STREAMS.generator("noise")
    )
    search = PulseUpsampler(generator, chain, replace(QUICK, eps=1e-9, steps=30), STREAMS)
    assert (search.low_size, search.size) == (8, 16)
    found = search.upsample(photos, faces_per_photo=1)
    first = PulseUpsampler(generator, chain, replace(QUICK, eps=1e-9, steps=1), STREAMS)
    assert (found.consistency_error < 0.5 * first.upsample(photos, faces_per_photo=1).consistency_error).all()
    again = squared_difference(chain.apply(found.images[:, 0]), photos)
    torch.testing.assert_close(found.consistency_error[:, 0], again, atol=1e-7, rtol=1e-4)


def test_a_photo_that_no_face_can_match_is_a_value_and_does_not_disturb_the_others(
    generator: StyleGAN2, low: Tensor
) -> None:
    """Clean negative: a checkerboard fails, and the others have the same result without it."""
    checkers = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    hard = torch.cat((low[:2], checkers.float().expand(1, 3, 4, 4)))
    search = PulseUpsampler(generator, BicubicPulse(4), replace(QUICK, eps=2e-2), STREAMS)
    found, without = (search.upsample(photos, faces_per_photo=1) for photos in (hard, low[:2]))
    assert not found.converged[2].any()
    torch.testing.assert_close(found.consistency_error[:2], without.consistency_error, atol=1e-5, rtol=1e-3)


def test_a_batch_is_the_same_search_as_one_face_at_a_time(generator: StyleGAN2, low: Tensor) -> None:
    together, alone = (
        PulseUpsampler(generator, BicubicPulse(4), replace(QUICK, faces_at_once=m), STREAMS).upsample(
            low[:3], faces_per_photo=2
        )
        for m in (64, 1)
    )
    torch.testing.assert_close(together.consistency_error, alone.consistency_error, atol=1e-5, rtol=1e-2)
    torch.testing.assert_close(together.images, alone.images, atol=1e-2, rtol=0)


def test_the_best_face_is_returned_so_more_steps_never_fit_worse(generator: StyleGAN2, low: Tensor) -> None:
    """A too large rate makes the last face worse than the first; the result must not be."""
    config = replace(QUICK, eps=1e-9)
    first = PulseUpsampler(generator, Area(4), replace(config, steps=1), STREAMS)
    reckless = PulseUpsampler(generator, Area(4), replace(config, learning_rate=50.0), STREAMS)
    start = first.upsample(low, faces_per_photo=1).consistency_error
    assert (reckless.upsample(low, faces_per_photo=1).consistency_error <= start + 1e-6).all()


def test_the_search_stops_when_every_face_fits_and_reports_progress(
    generator: StyleGAN2, low: Tensor
) -> None:
    heard: list[tuple[int, int]] = []
    config = replace(QUICK, eps=10.0, faces_at_once=2)

    def listen(done: int, total: int) -> None:
        heard.append((done, total))

    search = PulseUpsampler(generator, BicubicPulse(4), config, STREAMS, progress=listen)
    found = search.upsample(low[:4], faces_per_photo=1)
    assert found.steps == 1 and found.converged.all()
    assert heard == [(1, 24), (13, 24)]


def test_tiled_latents_and_no_noise_are_searched_as_well(generator: StyleGAN2, low: Tensor) -> None:
    config = replace(QUICK, tile_latent=True, trainable_noise=0)
    start, found = (
        PulseUpsampler(generator, Area(4), replace(config, steps=steps, eps=1e-9), STREAMS).upsample(
            low, faces_per_photo=1
        )
        for steps in (1, 12)
    )
    assert found.consistency_error.mean() < start.consistency_error.mean()


def test_wrong_settings_are_named(generator: StyleGAN2) -> None:
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got 0"):
        PulseConfig(eps=0)
    with pytest.raises(ValueError, match="factor must divide the size 16, got 5"):
        PulseUpsampler(generator, Area(5), QUICK, STREAMS)


def test_the_best_face_of_a_photo_is_the_one_with_the_smallest_consistency_error() -> None:
    images = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 3, 2, 2)
    consistency_error = torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, float("inf")]])
    found = Upsampled(
        images=images, consistency_error=consistency_error, converged=consistency_error < 0.15, steps=1
    )
    assert found.best()[:, 0, 0, 0].tolist() == [1.0, 3.0]


class _Flatterer:
    """Returns the photo itself for any styles."""

    def __init__(self, generator: StyleGAN2, claim: Tensor) -> None:
        self.generator, self.claim = generator, claim

    def synthesize(self, styles: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        return self.claim + 0 * (styles.sum() + self.generator.synthesize(styles, noise))


def test_metrics_are_computed_in_float32(
    generator: StyleGAN2, low: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted positive: a low-precision form that claims a perfect fit is detected by the float32 weights."""
    claim = low[:1].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    honest = prepare_for_search(generator)

    def quick(weights: StyleGAN2, precision: str = "float32") -> FastStyleGAN2 | _Flatterer:
        return honest if precision == "float32" else _Flatterer(weights, claim)

    monkeypatch.setattr(pulse, "frozen_copy", quick)
    config = replace(QUICK, precision="bfloat16", eps=1e-3)
    found = PulseUpsampler(generator, Area(4), config, STREAMS).upsample(low[:1], faces_per_photo=1)
    assert squared_difference(Area(4).apply(claim), low[:1]).item() < 1e-12
    assert found.consistency_error.item() == pytest.approx(
        squared_difference(Area(4).apply(found.images[:, 0]), low[:1]).item(), rel=1e-4
    )
    assert found.consistency_error.item() > config.eps
    assert not found.converged.any()


def test_a_search_in_bfloat16_is_as_good_as_in_float32() -> None:
    """The base checkpoint, whose finest layers are rounded: as many faces fit, and as well."""
    base = load_gan().generator
    photos = BicubicPulse(4).apply(base.sample(6, STREAMS.generator("faces"))).clamp(0, 1)
    exact, rounded = (
        PulseUpsampler(
            base, BicubicPulse(4), PulseConfig(steps=60, precision=precision, mapping_samples=2000), STREAMS
        ).upsample(photos, faces_per_photo=1)
        for precision in ("float32", "bfloat16")
    )
    assert torch.equal(rounded.converged, exact.converged)
    assert exact.converged.all()
    again = squared_difference(BicubicPulse(4).apply(rounded.images[:, 0]), photos)
    torch.testing.assert_close(rounded.consistency_error[:, 0], again, atol=1e-7, rtol=1e-4)


def test_a_search_has_its_own_copy_of_the_weights(generator: StyleGAN2, low: Tensor) -> None:
    """Later training does not change an existing search."""
    copied = copy.deepcopy(generator)
    search = PulseUpsampler(copied, Area(4), QUICK, STREAMS)
    before = search.upsample(low[:1], faces_per_photo=1)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    torch.testing.assert_close(search.upsample(low[:1], faces_per_photo=1).images, before.images)


def test_two_searches_do_not_change_the_generator(generator: StyleGAN2, low: Tensor) -> None:
    """The second starts while the first runs, and the first ends last: weights require gradients throughout."""
    copied = copy.deepcopy(generator)
    begun: list[PulseUpsampler] = []

    def begin(snapshot: StepSnapshot) -> None:
        if not begun:
            begun.append(PulseUpsampler(copied, Area(4), QUICK, STREAMS))
            assert all(weight.requires_grad for weight in copied.parameters())

    PulseUpsampler(copied, Area(4), QUICK, STREAMS, watch=begin).upsample(low[:1], faces_per_photo=1)
    assert begun and all(weight.requires_grad for weight in copied.parameters())
