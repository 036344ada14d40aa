"""Generators and discriminators of several classes, and generators whose latent prior was fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import slow_reference
import torch
from torch import Tensor

from fedface.errors import ConfigError
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.generator_protocol import Generator, sample
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler

SHAPE = StyleGAN2Config(
    size=8, latent_width=5, style_width=6, mapping_layers=3, channel_base=64, channel_max=8, classes=4
)
DISCRIMINATOR = DiscriminatorConfig(size=8, channel_base=64, channel_max=8, mapping_layers=2, classes=4)
ONE_HOT = torch.eye(4)


def stream(name: str) -> torch.Generator:
    return Streams(11).generator(name)


def generator(**changes: Any) -> StyleGAN2:
    return StyleGAN2(replace(SHAPE, **changes), stream("weights"))


def test_styles_of_a_class_equal_the_slow_reference() -> None:
    """Latent and embedded label, each normalised, concatenated; also for a mixture of labels."""
    generated = generator()
    latents = torch.randn(5, 5, generator=stream("z"))
    labels = torch.cat([ONE_HOT, torch.tensor([[0.5, 0.0, 0.25, 0.25]])])
    state = slow_reference.state_of(generated).at("mapping.")
    reference = [
        slow_reference.mapping(state, z, c)
        for z, c in zip(latents.double().numpy(), labels.double().numpy(), strict=True)
    ]
    found = generated.map(latents, labels).detach().numpy()
    np.testing.assert_allclose(found, np.stack(reference)[:, None].repeat(4, axis=1), atol=1e-6)


@pytest.mark.parametrize("group", [0, 4])
def test_logits_of_a_class_equal_the_slow_reference(group: int) -> None:
    """The last layer's product with the label's direction, over the root of the width."""
    discriminator = Discriminator(
        replace(DISCRIMINATOR, minibatch_group=group), stream("discriminator")
    ).double()
    pictures = torch.randn(4, 3, 8, 8, generator=stream("pictures"), dtype=torch.float64)
    labels = ONE_HOT[[2, 0, 3, 1]].double()
    reference = slow_reference.discriminator(
        slow_reference.state_of(discriminator),
        pictures.numpy(),
        labels.numpy(),
        architecture="resnet",
        clamp=None,
        group=group,
        shares=1,
    )
    found = discriminator((pictures + 1) / 2, labels.float())
    np.testing.assert_allclose(found.detach().numpy(), reference, atol=1e-6)


def test_names_of_conditional_weights_are_the_published_ones() -> None:
    """Embedding and label mapping, and neither without classes."""
    extra = set(generator().state_dict()) - set(generator(classes=0).state_dict())
    assert extra == {"mapping.embed.weight", "mapping.embed.bias"}
    plain = Discriminator(replace(DISCRIMINATOR, classes=0)).state_dict()
    extra = set(Discriminator(DISCRIMINATOR).state_dict()) - set(plain)
    layers = ("embed", "fc0", "fc1")
    assert extra == {f"mapping.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert plain["b4.out.weight"].shape == (1, 8)
    assert Discriminator(DISCRIMINATOR).state_dict()["b4.out.weight"].shape == (8, 8)


def test_labels_may_be_integers() -> None:
    """As torch's one_hot gives them."""
    latents = torch.randn(4, 5, generator=stream("z"))
    assert torch.equal(generator().map(latents, ONE_HOT.long()), generator().map(latents, ONE_HOT))


@pytest.mark.parametrize(
    ("labels", "result"),
    [(None, "got no labels"), (torch.eye(3), "must have shape"), (torch.ones(4), "shape")],
)
def test_missing_or_misshapen_labels_are_refused(labels: Tensor | None, result: str) -> None:
    """By generator and discriminator alike."""
    with pytest.raises(ConfigError, match=result):
        generator().map(torch.zeros(3, 5), labels)
    with pytest.raises(ConfigError, match=result):
        Discriminator(DISCRIMINATOR)(torch.zeros(3, 3, 8, 8), labels)


def test_labels_for_networks_without_classes_are_refused() -> None:
    """They are not ignored."""
    with pytest.raises(ConfigError, match="has no classes"):
        generator(classes=0).map(torch.zeros(4, 5), ONE_HOT)
    with pytest.raises(ConfigError, match="has no classes"):
        Discriminator(replace(DISCRIMINATOR, classes=0))(torch.zeros(4, 3, 8, 8), ONE_HOT)


def test_a_class_conditioned_generator_is_that_class() -> None:
    """Same styles as with the one-hot label; everything else is passed through."""
    generated = generator()
    latents = torch.randn(3, 5, generator=stream("z"))
    for label in range(4):
        held: Generator = ClassConditioned(generated, label)
        styles = held.map(latents)
        assert torch.equal(styles, generated.map(latents, ONE_HOT[[label]].expand(3, -1)))
        assert torch.equal(held.truncate(styles, 0.5), generated.truncate(styles, 0.5))
        assert torch.equal(held.synthesize(styles), generated.synthesize(styles))
        for name in ("size", "latent_width", "style_inputs", "noise_sides", "style_slope"):
            assert getattr(held, name) == getattr(generated, name), name
    sampled = [sample(ClassConditioned(generated, label), 2, stream("draw")) for label in (0, 1)]
    assert sampled[0].shape == (2, 3, 8, 8) and not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("label", [-1, 4])
def test_an_unknown_class_is_refused(label: int) -> None:
    """Classes count from 0."""
    with pytest.raises(ConfigError, match=f"4 classes, from 0, got {label}"):
        ClassConditioned(generator(), label)


def test_pulse_searches_within_a_class_and_leaves_the_weights_free() -> None:
    """A search freezes the weights and restores their state."""
    generated = generator()
    config = PulseConfig(steps=3, mapping_samples=50)
    search = PulseUpsampler(ClassConditioned(generated, 1), BicubicPulse(2), config, Streams(3))
    found = search.upsample(torch.full((1, 3, 4, 4), 0.5), faces_per_photo=2)
    assert found.images.shape == (1, 2, 3, 8, 8)
    assert all(weight.requires_grad for weight in generated.parameters())


@pytest.mark.parametrize("classes", [0, 4])
def test_an_unfitted_prior_is_the_standard_one(classes: int) -> None:
    """Same samples, same styles, and two buffers that are saved."""
    standard, fitted = generator(classes=classes), generator(classes=classes, prior="fitted")
    extra = set(fitted.state_dict()) - set(standard.state_dict())
    assert extra == {"mapping.prior_mean", "mapping.prior_root"}
    latents = torch.randn(4, 5, generator=stream("z"))
    labels = ONE_HOT if classes else None
    assert torch.equal(fitted.map(latents, labels), standard.map(latents, labels))


def test_a_fitted_prior_shifts_and_scales_latents_first() -> None:
    """Mean + root times each latent, here with an asymmetric root."""
    standard, fitted = generator(classes=0), generator(classes=0, prior="fitted")
    mean, root = torch.randn(5, generator=stream("mean")), torch.randn(5, 5, generator=stream("root"))
    fitted.mapping.prior_mean.copy_(mean)
    fitted.mapping.prior_root.copy_(root)
    latents = torch.randn(4, 5, generator=stream("z"))
    moved = torch.stack([mean + root @ z for z in latents])
    torch.testing.assert_close(fitted.map(latents), standard.map(moved))
