"""PULSE's published loop, written plainly from its description. The reference of `test_pulse_published`, and the
baseline of `benchmarks/latent_search.py`. One loop over one batch that shares nothing with `fedface` but the given
generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.models.generator_protocol import Generator


def cubic(distance: float) -> float:
    """Keys' cubic, a = -0.5."""
    x = abs(distance)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def downscale(images: Tensor, factor: int) -> Tensor:
    """Reflect, filter and stride, first along columns and then along rows."""
    taps = [cubic((i - 2 * factor + 0.5) / factor) for i in range(4 * factor)]
    kernel = (torch.tensor(taps) / sum(taps)).to(images)
    before, after = math.floor(3 * factor / 2), math.ceil(3 * factor / 2)
    down, across = kernel.view(1, 1, -1, 1).repeat(3, 1, 1, 1), kernel.view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    x = F.pad(images, (0, 0, before, after), mode="reflect")
    x = F.conv2d(x, down, stride=(factor, 1), groups=3)
    x = F.pad(x, (before, after, 0, 0), mode="reflect")
    return F.conv2d(x, across, stride=(1, factor), groups=3)


def rate(step: int, steps: int) -> float:
    """0.4 times a line from 0.1 up to 1 at 45 %, down to 0.1 at 90 %, and down to 0.001 at the end."""
    x = step / steps
    if x < 0.45:
        return 0.4 * (0.1 + 0.9 * x / 0.45)
    if x < 0.9:
        return 0.4 * (1 - 0.9 * (x - 0.45) / 0.45)
    return 0.4 * (0.1 - 0.099 * (x - 0.9) / 0.1)


def fitted(generator: Generator, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of the mapping's styles before a leaky ReLU of slope 5."""
    with torch.no_grad():
        before = F.leaky_relu(generator.map(draws)[:, 0], 5.0)
    return before.mean(dim=0), before.std(dim=0)


def starts(
    generator: Generator, count: int, latent_width: int, stream: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Latents and noise maps as our search samples them: face by face, latents first; the last map is zero."""
    latents, noise = [], [[] for _ in generator.noise_sides]  # type: tuple[list[Tensor], list[list[Tensor]]]
    for _ in range(count):
        latents.append(torch.randn(generator.style_inputs, latent_width, generator=stream))
        for maps, side in zip(noise, generator.noise_sides, strict=True):
            maps.append(torch.randn(1, side, side, generator=stream))
    sampled = [torch.stack(maps) for maps in noise]
    sampled[-1].zero_()
    return torch.stack(latents), sampled


def squares(x: Tensor) -> Tensor:
    """Over all axes after the first two."""
    return x.pow(2).sum(dim=tuple(range(2, x.ndim)), keepdim=True)


def published_loop(
    generator: Generator,
    photos: Tensor,
    draws: Tensor,
    latents: Tensor,
    noise: Sequence[Tensor],
    *,
    steps: int,
    factor: int,
    eps: float = 2e-3,
) -> Iterator[tuple[Tensor, Tensor]]:
    """After every forward pass: the images, not clamped, and each one's mean squared difference, not clamped either.
    The first five noise maps are searched; the others are fixed.
    """
    mean, std = fitted(generator, draws)
    searched = [x.clone().requires_grad_() for x in (latents, *noise[:5])]
    radii = [(squares(x.detach()) + 1e-9).sqrt() for x in searched]
    first = [torch.zeros_like(x) for x in searched]
    second = [torch.zeros_like(x) for x in searched]
    for step in range(steps):
        w = F.leaky_relu(searched[0] * std + mean, 0.2)
        images = generator.synthesize(w, [*searched[1:], *noise[5:]])
        difference = (downscale(images, factor) - photos).pow(2).mean(dim=(1, 2, 3))
        yield images.detach(), difference.detach()

        apart = ((w[:, None] - w[:, :, None]).pow(2).sum(dim=-1) + 1e-9).sqrt()
        together = ((w[:, None] + w[:, :, None]).pow(2).sum(dim=-1) + 1e-9).sqrt()
        theta = 2 * torch.atan2(apart, together)
        cross = (theta.pow(2) * w.shape[2]).mean(dim=(1, 2)) / 8
        loss = 100 * difference.clamp(min=eps).sum() + 0.05 * cross.sum()

        gradients = torch.autograd.grad(loss, searched)
        for x, radius, m, v, g in zip(searched, radii, first, second, gradients, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():
                x -= rate(step, steps) * (m / (1 - 0.9 ** (step + 1))) / size
                x *= radius / (squares(x) + 1e-9).sqrt()
