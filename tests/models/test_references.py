"""The networks reproduce the published implementations, for every available reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.stylegan1 import StyleGAN1, StyleGAN1Config
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.upsampling.style_gaussian import fit_style_gaussian

EXACT = 1e-4


class Reference:
    """One file's arrays, with how the published network was built."""

    def __init__(self, name: str, described: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        self.name, self.described, self.arrays = name, described, arrays
        self.built: dict[str, Any] = described.get("kwargs", {})

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def get(self, name: str) -> Tensor | None:
        return self.arrays.get(name)

    def fill(self, module: nn.Module, prefix: str = "", *, missing: str = "nothing") -> None:
        """Load the weights; only names that match `missing` may be absent, and constant filters are skipped."""
        state = {prefix + key[6:]: value for key, value in self.arrays.items() if key.startswith("state/")}
        weights = {
            k: v for k, v in state.items() if not k.endswith(("resample_filter", "intermediate.kernel"))
        }
        left = module.load_state_dict(weights, strict=False)
        assert not left.unexpected_keys, self.name
        assert not [key for key in left.missing_keys if not re.search(missing, key)], self.name

    def agrees(self, got: Tensor, expected: str) -> None:
        """Equal to an output to 1e-4, absolute."""
        assert got.shape == self[expected].shape, (self.name, expected)
        assert float((got - self[expected]).detach().abs().max()) < EXACT, (self.name, expected)


def references(shared: Path, kind: str) -> Iterator[Reference]:
    """Every reference of a kind; at least one."""
    files = json.loads((shared / "refs" / "index.json").read_text())["files"]
    found = {name: described for name, described in files.items() if described["kind"].startswith(kind)}
    assert found, kind
    for name, described in found.items():
        with np.load(shared / "refs" / described["file"]) as arrays:
            yield Reference(
                name, described, {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}
            )


def generator_like(reference: Reference) -> StyleGAN2:
    """A generator with the published constructor's arguments, and its defaults."""
    built = reference.built
    synthesis = built.get("synthesis_kwargs", {})
    return StyleGAN2(
        StyleGAN2Config(
            size=built["img_resolution"],
            latent_width=built["z_dim"],
            style_width=built["w_dim"],
            mapping_layers=built.get("mapping_kwargs", {}).get("num_layers", 8),
            channel_base=synthesis.get("channel_base", 32768),
            channel_max=synthesis.get("channel_max", 512),
            architecture=synthesis.get("architecture", "skip"),
            clamp=synthesis.get("conv_clamp"),
            classes=built.get("c_dim", 0),
        )
    )


def discriminator_like(reference: Reference) -> Discriminator:
    """A discriminator with the published constructor's arguments, and its defaults."""
    built = reference.built
    head = built.get("epilogue_kwargs", {})
    shares = head.get("mbstd_num_channels", 1)
    group = head.get("mbstd_group_size", 4) or 10**6  # None is the whole batch
    return Discriminator(
        DiscriminatorConfig(
            size=built["img_resolution"],
            channel_base=built.get("channel_base", 32768),
            channel_max=built.get("channel_max", 512),
            architecture=built.get("architecture", "resnet"),
            clamp=built.get("conv_clamp"),
            minibatch_group=group if shares else 0,
            minibatch_channels=max(1, shares),
            classes=built.get("c_dim", 0),
            mapping_layers=built.get("mapping_kwargs", {}).get("num_layers", 8),
        )
    )


def test_generators_reproduce_the_published_styles_images_and_gradients(shared: Path) -> None:
    """At every truncation, cutoff and noise of the reference."""
    for reference in references(shared, "stylegan2-ada G"):
        generator = generator_like(reference)
        reference.fill(generator)
        count = sum(weight.numel() for weight in generator.parameters())
        assert count == reference.described["n_params"], reference.name
        assert generator.style_inputs == reference.described["num_ws"], reference.name
        styles = generator.map(reference["in/z"], reference.get("in/c"))
        noises = {"const": None, "none": [torch.zeros(1, 1, side, side) for side in generator.noise_sides]}
        seen = 0
        for name in reference.arrays:
            if ws := re.fullmatch(r"out/ws_psi([\d.]+?)(?:_cutoff(\d+))?", name):
                cutoff = int(ws[2]) if ws[2] else None
                reference.agrees(generator.truncate(styles, float(ws[1]), cutoff), name)
                seen += 1
            if img := re.fullmatch(r"out/img_psi([\d.]+)_(const|none)", name):
                shorter = generator.truncate(styles, float(img[1]))
                reference.agrees(2 * generator.synthesize(shorter, noises[img[2]]) - 1, name)
                seen += 1
        assert seen >= 5, reference.name
        wplus = reference["in/wplus"].clone().requires_grad_()
        picture = 2 * generator.synthesize(wplus) - 1
        reference.agrees(picture, "out/img_wplus_const")
        (gradient,) = torch.autograd.grad(picture.square().mean(), wplus)
        reference.agrees(gradient, "out/grad_wplus_of_mean_sq")


def test_discriminators_reproduce_the_published_logits_and_gradients(shared: Path) -> None:
    """In every form, with and without minibatch statistics, eight images together and one alone."""
    for reference in references(shared, "stylegan2-ada D"):
        discriminator = discriminator_like(reference)
        reference.fill(discriminator)
        count = sum(weight.numel() for weight in discriminator.parameters())
        assert count == reference.described["n_params"], reference.name
        picture = ((reference["in/img"] + 1) / 2).requires_grad_()
        labels = reference.get("in/c")
        logits = discriminator(picture, labels)
        reference.agrees(logits[:, None], "out/logits")
        (gradient,) = torch.autograd.grad(logits.sum(), picture)
        reference.agrees(gradient / 2, "out/grad_img_of_sum")
        if "out/logits_first1" in reference.arrays:
            first = discriminator(picture[:1], None if labels is None else labels[:1])
            reference.agrees(first[:, None], "out/logits_first1")


def sg1_like(reference: Reference) -> StyleGAN1:
    """A StyleGAN1 with the arguments of either half of the published network; the other half is minimal."""
    built, described = reference.built, reference.described
    width = described.get("dim") or built["dlatent_size"]
    return StyleGAN1(
        StyleGAN1Config(
            size=built.get("resolution", 8),
            latent_width=width,
            style_width=width,
            mapping_layers=described.get("layers", 1),
            channel_base=2 * built.get("fmap_base", 8),
            channel_max=built.get("fmap_max", 8),
        )
    )


def test_stylegan1_reproduces_the_published_images_and_gradients(shared: Path) -> None:
    """With the noise maps of the reference."""
    for reference in references(shared, "PULSE StyleGAN1 G_synthesis"):
        generator = sg1_like(reference)
        reference.fill(generator, "synthesis.", missing=r"^mapping\.|noise\.const$")
        assert generator.style_inputs == reference.described["num_layers"], reference.name
        noise = [reference[f"in/noise{i}"] for i in range(len(generator.noise_sides))]
        styles = reference["in/w"].clone().requires_grad_()
        picture = 2 * generator.synthesize(styles, noise) - 1
        reference.agrees(picture, "out/img")
        (gradient,) = torch.autograd.grad(picture.square().mean(), styles)
        reference.agrees(gradient, "out/grad_w_of_mean_sq")


def test_stylegan1_reproduces_the_published_mapping_and_its_fit(shared: Path) -> None:
    """The styles, and the normal distribution that PULSE fits to twenty thousand of them."""
    for reference in references(shared, "PULSE StyleGAN1 G_mapping"):
        generator = sg1_like(reference)
        reference.fill(generator, "mapping.", missing=r"^synthesis\.|w_avg$")
        reference.agrees(generator.map(reference["in/z"])[:, 0], "out/w")
        fit = fit_style_gaussian(
            generator.map,
            generator.latent_width,
            samples=20_000,
            stream=torch.Generator().manual_seed(0),
            slope=generator.style_slope,
        )
        reference.agrees(fit.mean, "out/gaussian_fit_mean_20000")
        reference.agrees(fit.std, "out/gaussian_fit_std_20000")


def test_a_wrong_weight_is_detected(shared: Path) -> None:
    """Planted: one weight of a generator changed by 1 %."""
    reference = next(references(shared, "stylegan2-ada G"))
    generator = generator_like(reference)
    reference.fill(generator)
    with torch.no_grad():
        generator.synthesis.get_submodule("b4.conv1").weight.mul_(1.0).flatten()[0].mul_(1.01)  # type: ignore[union-attr,operator]
    with pytest.raises(AssertionError, match="img_wplus_const"):
        reference.agrees(2 * generator.synthesize(reference["in/wplus"]) - 1, "out/img_wplus_const")
