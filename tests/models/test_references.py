"""Our networks give the numbers of the published implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedface.models.critic import Critic, CriticConfig
from fedface.models.stylegan2 import GeneratorConfig, StyleGAN2


def _reference(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "refs" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def _fill(module: nn.Module, reference: dict[str, Tensor]) -> None:
    state = {key[6:]: value for key, value in reference.items() if key.startswith("state/")}
    module.load_state_dict({key: value for key, value in state.items() if "resample_filter" not in key})


@pytest.mark.parametrize(
    ("name", "size", "layers", "architecture"),
    [
        ("sg2ada_g32_map2_skip", 32, 2, "skip"),
        ("sg2ada_g64_map8_skip", 64, 8, "skip"),
        ("sg2ada_g32_map2_orig", 32, 2, "orig"),
    ],
)
def test_generator_reproduces_the_published_pictures_and_gradients(
    shared: Path, name: str, size: int, layers: int, architecture: str
) -> None:
    """Same weights, same latents: same styles, pictures and style gradients to 1e-4."""
    reference = _reference(shared, name)
    generator = StyleGAN2(
        GeneratorConfig(
            size=size,
            mapping_layers=layers,
            channel_base=1024,
            channel_max=64,
            architecture=architecture,  # type: ignore[arg-type]
        )
    )
    _fill(generator, reference)
    styles = generator.map(reference["in/z"])
    assert (styles - reference["out/ws_psi1"]).abs().max() < 1e-4
    shorter = generator.truncate(styles, psi=0.7)
    assert (shorter - reference["out/ws_psi0.7"]).abs().max() < 1e-4
    assert (2 * generator.synthesize(shorter) - 1 - reference["out/img_psi0.7_const"]).abs().max() < 1e-4
    silent = [torch.zeros(1, 1, side, side) for side in generator.noise_sides]
    quiet = 2 * generator.synthesize(shorter, silent) - 1
    assert (quiet - reference["out/img_psi0.7_none"]).abs().max() < 1e-4
    wplus = reference["in/wplus"].clone().requires_grad_()
    picture = 2 * generator.synthesize(wplus) - 1
    assert (picture - reference["out/img_wplus_const"]).abs().max() < 1e-4
    (gradient,) = torch.autograd.grad(picture.square().mean(), wplus)
    assert (gradient - reference["out/grad_wplus_of_mean_sq"]).abs().max() < 1e-4


def test_critic_reproduces_the_published_logits_and_gradients(shared: Path) -> None:
    """Same weights, same pictures: same logits and picture gradients to 1e-4 (no minibatch statistics)."""
    reference = _reference(shared, "sg2ada_d32_resnet_nombstd")
    critic = Critic(CriticConfig(size=32))
    _fill(critic, reference)
    picture = ((reference["in/img"] + 1) / 2).requires_grad_()
    logits = critic(picture)
    assert (logits - reference["out/logits"][:, 0]).abs().max() < 1e-4
    (gradient,) = torch.autograd.grad(logits.sum(), picture)
    assert (gradient / 2 - reference["out/grad_img_of_sum"]).abs().max() < 1e-4
