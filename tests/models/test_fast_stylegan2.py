"""The prepared generator against the ordinary one: equal images, equal gradients, and no gradient of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedface.models import fast_stylegan2
from fedface.models.checkpoint import load_gan
from fedface.models.fast_stylegan2 import fast_precision, prepare_for_search
from fedface.models.generator_protocol import Generator, draw_noise
from fedface.models.stylegan2 import StyledConv, StyleGAN2, StyleGAN2Config, ToRGB
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse

STREAMS = Streams(23)
CONFIG = StyleGAN2Config(
    size=32, latent_width=16, style_width=16, mapping_layers=2, channel_base=512, channel_max=24
)
Architecture = Literal["skip", "orig", "resnet"]


def random_generator(config: StyleGAN2Config) -> StyleGAN2:
    """Random weights; nonzero biases and noise strengths."""
    rng = STREAMS.generator("weights")
    generator = StyleGAN2(config, rng)
    with torch.no_grad():
        for layer in generator.synthesis.modules():
            if isinstance(layer, StyledConv | ToRGB):
                layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=rng))
            if isinstance(layer, StyledConv):
                layer.noise_strength.copy_(0.2 * torch.randn([], generator=rng))
    return generator


def inputs(generator: Generator, faces: int) -> tuple[Tensor, list[Tensor]]:
    """Styles that differ between inputs, and noise."""
    rng = STREAMS.generator("inputs")
    latents = torch.randn(faces * generator.style_inputs, generator.latent_width, generator=rng)
    styles = generator.map(latents)[:, 0].unflatten(0, (faces, generator.style_inputs))
    return styles.detach(), draw_noise(generator, faces, rng)


def pulled(generator: Generator, styles: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The images, and the gradients of styles and noise maps for a loss towards a photo."""
    moved = [tensor.detach().clone().requires_grad_() for tensor in (styles, *noise)]
    images = generator.synthesize(moved[0], moved[1:])
    photo = torch.rand(images.shape[1:], generator=STREAMS.generator("photo"))
    return images.detach(), list(torch.autograd.grad((images - photo).square().mean(), moved))


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, relative to the second."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("faces", [1, 3])
@pytest.mark.parametrize("clamp", [None, 0.8])
@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
def test_images_and_all_gradients_equal_those_of_the_plain_generator(
    architecture: Architecture, clamp: float | None, faces: int
) -> None:
    """One face takes the path that scales weights, several the one that scales activations."""
    generator = random_generator(replace(CONFIG, architecture=architecture, clamp=clamp))
    styles, noise = inputs(generator, faces)
    expected, found = (pulled(each, styles, noise) for each in (generator, prepare_for_search(generator)))
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for i, (ours, theirs) in enumerate(zip(found[1], expected[1], strict=True)):
        assert apart(ours, theirs) < 1e-4, i


def test_a_split_batch_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if all faces share one noise map, whose gradient is then the sum over faces."""
    generator = random_generator(CONFIG)
    styles, noise = inputs(generator, 5)
    shared = [plane[:1] for plane in noise]
    whole = pulled(prepare_for_search(generator), styles, shared)
    monkeypatch.setattr(fast_stylegan2, "BYTES_AT_ONCE", 2 * 32 * 32 * 16 * 4)
    cut = pulled(prepare_for_search(generator), styles, shared)
    torch.testing.assert_close(cut[0], whole[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(cut[1], whole[1], strict=True):
        assert ours.shape == theirs.shape
        assert apart(ours, theirs) < 1e-4


def test_the_fixed_noise_is_used_by_default() -> None:
    generator = random_generator(CONFIG)
    styles, _ = inputs(generator, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            prepare_for_search(generator).synthesize(styles),
            generator.synthesize(styles),
            atol=1e-5,
            rtol=1e-5,
        )


def test_bfloat16_gradients_have_the_direction_of_float32_gradients() -> None:
    """The gradient of PULSE's loss per face: the cosine is at least .999 for styles and each searched map."""
    generator = load_gan().generator
    rng = STREAMS.generator("faces")
    low = BicubicPulse(4).apply(generator.sample(8, rng))
    styles = generator.map(torch.randn(8, generator.latent_width, generator=rng)).detach()
    noise = draw_noise(generator, 8, rng)
    gradients = []
    for precision in ("float32", "bfloat16"):
        moved = [tensor.clone().requires_grad_() for tensor in (styles, *noise[:5])]
        images = prepare_for_search(generator, precision=precision).synthesize(
            moved[0], [*moved[1:], *noise[5:]]
        )
        loss = (BicubicPulse(4).apply(images) - low).square().mean(dim=(1, 2, 3)).sum()
        gradients.append(torch.autograd.grad(loss, moved))
    for exact, rounded in zip(*gradients, strict=True):
        assert functional.cosine_similarity(exact.flatten(1), rounded.flatten(1)).min() > 0.999


def test_bfloat16_images_differ_by_less_than_one_level_of_8_bit() -> None:
    generator = load_gan().generator
    styles = generator.map(torch.randn(8, generator.latent_width, generator=STREAMS.generator("z"))).detach()
    exact, rounded = (
        prepare_for_search(generator, precision=p).synthesize(styles) for p in ("float32", "bfloat16")
    )
    assert (exact - rounded).square().mean().sqrt() < 1 / 255
    assert not torch.equal(exact, rounded)


def test_a_prepared_generator_is_independent_of_its_source() -> None:
    generator = random_generator(CONFIG)
    styles, noise = inputs(generator, 1)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    constants = prepare_for_search(generator)
    first, _ = pulled(constants, styles, noise)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in generator.parameters())
    with torch.no_grad():
        for weight in generator.parameters():
            weight.add_(1.0)
    assert torch.equal(pulled(constants, styles, noise)[0], first)


class WeightGradients(TorchDispatchMode):
    """Counts the convolutions whose weights' gradients are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.count += bool(args[-1][1])
        return func(*args, **(kwargs or {}))


def test_no_gradient_of_a_weight_is_computed() -> None:
    """The planted positive is an ordinary generator whose weights require gradients: 7 + 4 convolutions."""
    generator = random_generator(CONFIG)
    styles, noise = inputs(generator, 1)
    with WeightGradients() as plain:
        images = generator.synthesize(styles, noise)
        torch.autograd.grad(images.mean(), list(generator.synthesis.parameters()), allow_unused=True)
    with WeightGradients() as ours:
        pulled(prepare_for_search(generator), styles, noise)
    assert (plain.count, ours.count) == (11, 0)


def test_mapping_and_truncation_are_those_of_the_generator() -> None:
    """Including classes and labels."""
    generator = random_generator(replace(CONFIG, classes=3))
    constants = prepare_for_search(generator)
    latents, labels = torch.randn(4, 16, generator=STREAMS.generator("z")), torch.eye(3)[[0, 2, 1, 1]]
    styles = generator.map(latents, labels).detach()
    torch.testing.assert_close(constants.map(latents, labels), styles)
    torch.testing.assert_close(constants.truncate(styles, 0.5), generator.truncate(styles, 0.5))
    for name in ("size", "latent_width", "style_inputs", "noise_sides", "style_slope"):
        assert getattr(constants, name) == getattr(generator, name)


def test_styles_and_noise_of_a_wrong_count_are_refused() -> None:
    constants = prepare_for_search(random_generator(CONFIG))
    styles, noise = inputs(constants, 1)
    with pytest.raises(ValueError, match="styles must have shape"):
        constants.synthesize(styles[:, 1:])
    with pytest.raises(ValueError, match="noise must be 7 maps, got 6"):
        constants.synthesize(styles, noise[1:])


def test_auto_follows_the_hardware() -> None:
    """Hardware without bfloat16, or that does not report it, gets float32."""
    assert prepare_for_search(random_generator(CONFIG), precision="auto").precision == fast_precision(
        torch.device("cpu")
    )
    assert fast_precision(torch.device("meta")) == "float32"
