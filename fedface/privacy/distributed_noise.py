"""Distributed noise: each device rounds its clipped vector to integers and adds its share of the noise, before masking.

Whoever sees only the sum sees a Gaussian mechanism, whoever adds up the masked vectors: no server is trusted with the
noise. What each device does:

1. **Clip** to L2 norm `clip_norm`, and scale so that this norm is `scale` integers. Where the unit is not the library,
   what is clipped is each unit's vector, and the device has their sum.
2. **Round** each number up or down at random, without bias, and again until the squared norm of the integers is at
   most `max_square_norm` (conditional randomised rounding). The bound is checked on integers, so that neither floating
   point nor bad luck exceeds it. Theorem 1 of Kairouz, Liu and Steinke (2021), arXiv:2102.06387, says which bound holds
   at once with probability 1 - beta. The distance between neighbours' sums is at most sqrt(max_square_norm) for
   certain, and mixtures over the rounding diverge at most as much as the worst pair in them (quasi-convexity).
   A sum S over units is rounded once, to floor(S + u) with u uniform. One unit more, g, changes it for the same u by
   floor(f + g) with f uniform: g itself, rounded at random, which keeps the bound with probability 1 - beta. The
   divergence of mixtures over u is at most the mean of their parts' (joint convexity), so beta = 2^-80 a step is added
   to delta, and lies in what the accountant sets aside. Integers beyond the ring are clamped, which brings none
   further apart.
3. **Add a share**: a discrete Gaussian of `share_variance` on each integer. The shares of any `honest` devices add up
   to at least the variance (noise multiplier)^2 * max_square_norm + 8, of which the 8 pay for the integers:
   privacy/discrete_gaussian.py shows that the sum costs what a Gaussian mechanism with this noise multiplier costs.
   More shares are more noise: post-processing.

Devices that drop out, or whose shares of the noise the server knows, only lower the number of honest shares in a sum;
the guarantee holds as long as `honest` of them remain in it, and as long as the masks hide all but the sum: while at
most `MaskGraph.corrupt` devices collude (aggregation/mask_graph.py), with more of whom the server could open single
vectors. No sum can leave the ring: every integer and every share is bounded.

Source: Kairouz, Liu and Steinke (2021); Agarwal, Kairouz and Liu (2021), arXiv:2110.04995, whose Skellam noise needs no
lower limit on a share's variance but has no price as tight as a Gaussian's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Annotated

import numpy as np
import torch

from fedface.errors import PrivacyError
from fedface.privacy.clip_and_noise import MAX_NORM, clip_l2
from fedface.privacy.discrete_gaussian import MIN_VARIANCE, SMOOTHING, DiscreteGaussian, discrete_gaussian
from fedface.privacy.mechanism import ClipNorm, Sigma
from fedface.privacy.plan import DPParameters
from fedface.privacy_units import Unit
from fedface.randomness import SecretNoise
from fedface.tensor_types import Vector
from fedface.validation import AtLeast, In, checked

RING_BITS = 32  # sums are taken modulo 2^32, and read as numbers from -2^31 to 2^31 - 1
BETA = 2.0**-80  # the probability with which rounding exceeds `max_square_norm`
_MIN_SCALE = 2**12  # integers to which `clip_norm` is scaled, so that rounding lengthens it by 0.1 % at most
_SCALE_PER_ROOT = 8  # and at least so many times the root of the dimension: by 0.3 % at most
_MAX_LENGTHENING = 1.1  # of the norm bound by rounding; what would need more noise than that is refused
_ATTEMPTS = 3
_AT_ONCE = 2**16  # numbers that stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
@checked
class DistributedNoise:
    """What the devices of one sum must agree on; all of it is public, and follows from the run's parameters.

    Raises:
        PrivacyError: The noise of a sum does not fit the ring.
    """

    length: Annotated[int, In(f"[1, {1 << 30}]")]  # d, numbers in each device's vector
    unit: Unit  # whose vector is clipped: the library's is all that a device sends
    clip_norm: ClipNorm  # largest L2 norm of one unit's vector
    noise_multiplier: Sigma  # of the Gaussian mechanism whose price the sum has
    # Devices whose shares are certainly in each sum, unknown to the server
    honest: Annotated[int, AtLeast(1)]
    max_devices: Annotated[int, In(f"[1, {1 << 20}]")]  # the most devices in one sum

    def __post_init__(self) -> None:
        if self.honest > self.max_devices:
            raise ValueError(f"honest must be at most max_devices={self.max_devices}, got {self.honest}")
        longer = self.max_square_norm > _MAX_LENGTHENING**2 * self.scale**2
        if longer or self.largest < math.isqrt(self.max_square_norm):
            raise PrivacyError(
                f"the noise of {self.max_devices} devices does not fit sums of {RING_BITS} bits at noise multiplier "
                f"{self.noise_multiplier:g} with {self.honest} honest devices; use fewer devices, a larger epsilon, or "
                "a larger honest fraction"
            )

    @cached_property
    def scale(self) -> int:
        """The integer length to which `clip_norm` is scaled: large beside the rounding, small beside the ring."""
        desired = max(_MIN_SCALE, math.ceil(_SCALE_PER_ROOT * math.sqrt(self.length)))
        # In each device's part of the ring
        deviations = 1.0 + 22.0 * self.noise_multiplier / math.sqrt(self.honest)
        room = math.floor(2.0 ** (RING_BITS - 1) / (2.0 * self.max_devices * deviations))
        return max(min(desired, room), 1)

    @property
    def largest(self) -> int:
        """The largest absolute value of a device's integers before noise: so many devices' sum stays in the ring."""
        return ((1 << (RING_BITS - 1)) - 1) // self.max_devices - self.share.largest

    @property
    def step(self) -> float:
        """What one integer stands for, in the unit of `clip_norm`."""
        return self.clip_norm / self.scale

    @cached_property
    def max_square_norm(self) -> int:
        """By how much one unit changes the sum's integers: the largest squared L2 norm."""
        scale, root = float(self.scale), math.sqrt(self.length)
        likely = scale**2 + self.length / 4 + math.sqrt(2.0 * math.log(1.0 / BETA)) * (scale + root / 2)
        return math.floor(min((scale + root) ** 2, likely))

    @cached_property
    def share_variance(self) -> int:
        """The variance of one device's share, in squared integers."""
        total = Fraction(self.noise_multiplier) ** 2 * self.max_square_norm + SMOOTHING
        return max(math.ceil(total / self.honest), MIN_VARIANCE)

    @staticmethod
    def of(dp: DPParameters, length: int, max_devices: int) -> DistributedNoise | None:
        """What the devices of a run add to vectors (length,); None if its noise is not distributed.

        Raises:
            PrivacyError: The noise of a sum does not fit the ring.
        """
        if dp.noise != "distributed":
            return None
        return DistributedNoise(
            length=length,
            unit=dp.unit,
            clip_norm=dp.update_clip_norm if dp.unit == "library" else dp.schedule.clip_norm,
            noise_multiplier=dp.noise_multiplier,
            honest=dp.honest_devices,
            max_devices=max_devices,
        )

    @property
    def share(self) -> DiscreteGaussian:
        """The distribution of one device's share of the noise on one integer."""
        return discrete_gaussian(self.share_variance)


def noised_integers(update: Vector, noise: DistributedNoise) -> np.ndarray:
    """A device's vector as integers with its share of the noise; never call it twice on one update.

    Args:
        update: Shape (d,). That of a library is clipped here; otherwise it is a sum of clipped vectors, in float64:
            nothing may round it before it has noise. One with a non-finite entry counts as zero.
        noise: What the devices of the sum agreed on.

    Returns:
        int64, shape (d,). Sums of up to `max_devices` of them lie strictly between -2^31 and 2^31.

    Raises:
        ValueError: Another length.
    """
    if tuple(update.shape) != (noise.length,):
        raise ValueError(f"expected a vector of {noise.length} numbers, got shape {tuple(update.shape)}")
    secret, whole = SecretNoise(), noise.unit == "library"
    values = clip_l2(update.detach().cpu(), noise.clip_norm if whole else MAX_NORM).numpy()
    integers = (_rounded_within_norm if whole else _rounded)(values, noise, secret)
    for part in _parts(noise.length):
        integers[part] += noise.share.sample(len(integers[part]), secret)
    return integers


def from_sum(integers: np.ndarray, noise: DistributedNoise) -> Vector:
    """A sum of `noised_integers` in the unit of the updates, float32, shape (d,)."""
    return torch.from_numpy((integers * noise.step).astype(np.float32))


def _parts(length: int) -> Iterator[slice]:
    """Parts of a vector, since float64 and random words take several times its memory."""
    return (slice(start, start + _AT_ONCE) for start in range(0, length, _AT_ONCE))


def _rounded(values: np.ndarray, noise: DistributedNoise, secret: SecretNoise) -> np.ndarray:
    """Numbers (d,) scaled, rounded up or down at random without bias, and clamped to the ring, int64."""
    integers = np.empty(noise.length, dtype=np.int64)
    for part in _parts(noise.length):
        scaled = values[part].astype(np.float64) * (noise.scale / noise.clip_norm)
        down = np.floor(scaled)
        down += secret.uniforms(len(down)) < scaled - down
        integers[part] = down.clip(-noise.largest, noise.largest)
    return integers


def _rounded_within_norm(values: np.ndarray, noise: DistributedNoise, secret: SecretNoise) -> np.ndarray:
    """The same, of squared norm at most `max_square_norm` for certain."""
    for _ in range(_ATTEMPTS):
        integers = _rounded(values, noise, secret)
        if int(integers @ integers) <= noise.max_square_norm:
            return integers
    # Towards zero, never longer than the update.
    towards_zero = np.trunc(values.astype(np.float64) * (noise.scale / noise.clip_norm)).astype(np.int64)
    if int(towards_zero @ towards_zero) <= noise.max_square_norm:
        return np.asarray(towards_zero)
    return np.zeros_like(towards_zero)
