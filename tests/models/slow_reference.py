"""Reference implementations of the networks in NumPy and float64, image by image and channel by channel. Written from
the equations (arXiv:1912.04958, 2006.06676, 1812.04948), with weights by name from a module's state dict. The resnet
generator, the skip discriminator, classes and clamps have no published reference vectors and are compared with this.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.signal import convolve2d, correlate2d
from torch import nn

Array = NDArray[np.float64]
ROW = np.array([1.0, 3.0, 3.0, 1.0]) / 8
FILTER = np.outer(ROW, ROW)


class State:
    """A state dict in float64; `state.at("b8.")` reads names after that prefix."""

    def __init__(self, values: Mapping[str, Array], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def __getitem__(self, name: str) -> Array:
        return self.values[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.values

    def at(self, more: str) -> State:
        return State(self.values, self.prefix + more)


def state_of(module: nn.Module) -> State:
    """A module's state dict."""
    return State({name: value.double().numpy() for name, value in module.state_dict().items()})


def lrelu(x: Array, gain: float = 1.0, clamp: float | None = None) -> Array:
    y = np.where(x > 0, x, 0.2 * x) * np.sqrt(2) * gain
    return y if clamp is None else np.clip(y, -clamp * gain, clamp * gain)


def normalised(x: Array) -> Array:
    return x / np.sqrt((x**2).mean() + 1e-8)


def dense(x: Array, state: State, rate: float = 1.0) -> Array:
    return state["weight"] @ x * rate / np.sqrt(len(x)) + state["bias"] * rate


def mapping(state: State, latent: Array | None, label: Array | None) -> Array:
    """One latent (z,) and one label (classes,), either may be None -> (v,)."""
    parts = [] if latent is None else [normalised(latent)]
    if label is not None:
        parts.append(normalised(dense(label, state.at("embed."))))
    x = np.concatenate(parts)
    for i in range(100):
        if f"fc{i}.weight" in state:
            x = lrelu(dense(x, state.at(f"fc{i}."), 0.01))
    return x


def doubled(x: Array) -> Array:
    """(h, w) -> (2h, 2w): zeros between the pixels, then the filter with gain 4."""
    spread = np.zeros((2 * x.shape[0], 2 * x.shape[1]))
    spread[::2, ::2] = x
    return correlate2d(np.pad(spread, ((2, 1), (2, 1))), FILTER * 4, "valid")


def halved(x: Array) -> Array:
    """(h, w) -> (h/2, w/2): the filter, then every second pixel."""
    return correlate2d(np.pad(x, 1), FILTER, "valid")[::2, ::2]


def each(function: object, x: Array) -> Array:
    return np.stack([function(channel) for channel in x])  # type: ignore[operator]


def convolved(x: Array, weight: Array) -> Array:
    """(i, h, w) with (o, i, k, k) -> (o, h, w)."""
    return np.stack([
        sum(correlate2d(channel, kernel, "same") for channel, kernel in zip(x, kernels, strict=True))
        for kernels in weight
    ])  # fmt: skip


def doubled_by(x: Array, weight: Array) -> Array:
    """Zeros between the pixels, every pixel replaced by the kernel, then the filter with gain 4."""
    spread = np.zeros((len(x), 2 * x.shape[1] - 1, 2 * x.shape[2] - 1))
    spread[:, ::2, ::2] = x
    return np.stack([
        correlate2d(
            np.pad(sum(convolve2d(channel, kernel) for channel, kernel in zip(spread, kernels, strict=True)), 1),
            FILTER * 4,
            "valid",
        )
        for kernels in weight
    ])  # fmt: skip


def styled(x: Array, style: Array, state: State, *, up: bool, gain: float, clamp: float | None) -> Array:
    """One image through one modulated convolution, with a weight of its own."""
    weight = state["weight"] * dense(style, state.at("affine."))[None, :, None, None]
    weight = weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    y = doubled_by(x, weight) if up else convolved(x, weight)
    y = y + state["noise_const"] * state["noise_strength"] + state["bias"][:, None, None]
    return lrelu(y, gain, clamp)


def synthesis(state: State, styles: Array, size: int, architecture: str, clamp: float | None) -> Array:
    """One face's styles (k, v) -> (3, size, size) in the published range [-1, 1]."""
    x, picture, used, side = state["b4.const"], None, 0, 4
    while side <= size:
        block = state.at(f"b{side}.")
        if side == 4:
            x = styled(x, styles[0], block.at("conv1."), up=False, gain=1, clamp=clamp)
            used = 1
        else:
            resnet = architecture == "resnet"
            gain = np.sqrt(0.5) if resnet else 1.0
            y = styled(x, styles[used], block.at("conv0."), up=True, gain=1, clamp=clamp)
            y = styled(y, styles[used + 1], block.at("conv1."), up=False, gain=gain, clamp=clamp)
            if resnet:
                y = y + each(doubled, convolved(x, block["skip.weight"])) / np.sqrt(len(x)) * gain
            x, used = y, used + 2
        if picture is not None:
            picture = each(doubled, picture)
        if architecture == "skip" or side == size:
            rgb = block.at("torgb.")
            weight = rgb["weight"] * dense(styles[used], rgb.at("affine."))[None, :, None, None]
            seen = convolved(x, weight) / np.sqrt(len(x)) + rgb["bias"][:, None, None]
            seen = seen if clamp is None else np.clip(seen, -clamp, clamp)
            picture = seen if picture is None else picture + seen
        side *= 2
    return picture  # type: ignore[return-value]


def judged(x: Array, state: State, *, clamp: float | None, gain: float = 1.0, down: bool = False) -> Array:
    """One ordinary convolution of the discriminator on one image."""
    weight = state["weight"] / np.sqrt(state["weight"][0].size)
    if down:
        blurred = each(lambda channel: correlate2d(np.pad(channel, 2), FILTER, "valid"), x)
        y = np.stack([
            sum(correlate2d(c, k, "valid") for c, k in zip(blurred, kernels, strict=True))[::2, ::2]
            for kernels in weight
        ])  # fmt: skip
    else:
        y = convolved(x, weight)
    return lrelu(y + state["bias"][:, None, None], gain, clamp)


def spread(batch: list[Array], group: int, shares: int) -> list[Array]:
    """For each image (c, h, w) the statistics (shares,) of its group; image i is in group i mod (n / group)."""
    count, size = len(batch), min(group, len(batch))
    found = []
    for i in range(count):
        members = np.stack([batch[j] for j in range(count) if j % (count // size) == i % (count // size)])
        deviation = np.sqrt(members.var(axis=0) + 1e-8)
        found.append(np.array([part.mean() for part in np.split(deviation, shares)]))
    return found


def discriminator(
    state: State,
    pictures: Array,
    labels: Array | None,
    *,
    architecture: str,
    clamp: float | None,
    group: int,
    shares: int,
) -> Array:
    """Images (n, 3, s, s) in [-1, 1] -> logits (n,)."""
    last = []
    for picture in pictures:
        seen, x, side = picture, None, picture.shape[-1]
        while side > 4:
            block = state.at(f"b{side}.")
            if x is None or architecture == "skip":
                colours = judged(seen, block.at("fromrgb."), clamp=clamp)
                x = colours if x is None else x + colours
            gain = np.sqrt(0.5) if architecture == "resnet" else 1.0
            y = judged(x, block.at("conv0."), clamp=clamp)
            y = judged(y, block.at("conv1."), clamp=clamp, gain=gain, down=True)
            if architecture == "resnet":
                y = y + convolved(each(halved, x), block["skip.weight"]) / np.sqrt(len(x)) * gain
            x, seen, side = y, each(halved, seen), side // 2
        if architecture == "skip":
            x = x + judged(seen, state.at("b4.fromrgb."), clamp=None)
        last.append(x)
    if group:
        metrics = spread(last, group, shares)
        last = [
            np.concatenate([x, np.ones((shares, 4, 4)) * own[:, None, None]])
            for x, own in zip(last, metrics, strict=True)
        ]
    logits = []
    for i, x in enumerate(last):
        y = judged(x, state.at("b4.conv."), clamp=clamp).reshape(-1)
        y = dense(lrelu(dense(y, state.at("b4.fc."))), state.at("b4.out."))
        if labels is not None:
            y = y * mapping(state.at("mapping."), None, labels[i]) / np.sqrt(len(y))
        logits.append(y.sum())
    return np.array(logits)
