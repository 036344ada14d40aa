"""The discrete Gaussian on the integers: a sampler without floating point, and why shares of it add up to a Gaussian.

Everything follows from one lemma. The density phi of N(0, v), summed over all integers shifted by any real y, lies in
1 +- eta(v), eta(v) = 2 e^(-2 pi^2 v) (1 + 1e-20) for v >= 1: by Poisson's formula the sum is
1 + 2 sum_m e^(-2 pi^2 m^2 v) cos(2 pi m y). Hence, for the discrete Gaussian N_Z(v), whose probability of k is
proportional to phi_v(k):

* **Shares add up.** X of N_Z(v) plus Y of N_Z(w) is N_Z(v + w) up to factors 1 +- eta(v w / (v + w)) on every
  probability: the product of two Gaussian densities is phi_(v+w)(k) times a Gaussian density of variance v w / (v + w),
  which is summed over the integers. This is the theorem on sums of discrete Gaussians of Kairouz, Liu and Steinke
  (2021), arXiv:2102.06387, Section 4.
* **A wide one from two narrow ones.** X of N_Z(v) plus c times Y of N_Z(w) is N_Z(v + c^2 w) up to factors
  1 +- eta(v w / (v + c^2 w)), by the same product summed over the multiples of c (Micciancio and Walter 2017, CRYPTO).
* **It is a Gaussian that was rounded.** N(0, v - s), followed by the random map that sends y to the integer k with
  probability phi_s(k - y) / sum_j phi_s(j - y), is N_Z(v) up to factors 1 +- 2 eta(s), for every s < v. The map
  commutes with integer shifts. So an integer vector plus N_Z(v) in each coordinate is a post-processing of the same
  vector plus N(0, v - s): it costs what the Gaussian mechanism costs, at every epsilon and composed in every way
  (Dwork and Roth 2014, Proposition 2.1; for the Rényi divergence, Canonne, Kamath and Steinke 2020, arXiv:2004.00010,
  Theorem 4).

Wherever v w / (v + w), v w / (v + c^2 w) and s are at least `SMOOTHING` = 8, each factor differs from 1 by less than
2^-225, and a table differs from its distribution by less than 2^-235 in total variation. Over 2^70 samples the
distance from the Gaussian mechanism stays below 2^-150; times e^epsilon, for every epsilon up to 70, that is less than
2e-15 of delta. The accountant sets 1e-12 of delta aside; a privacy filter, which sets nothing aside, holds at so much
more delta.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import cached_property, lru_cache

import numpy as np

from fedface.randomness import SecretNoise

SMOOTHING = 8  # s of the module's docstring
MIN_VARIANCE = 2 * SMOOTHING  # of one share
_MAX_TABLE_VARIANCE = 2**20  # a larger one is sampled as a sum of two
_BITS = 256  # of a table's thresholds
_WORK_BITS = 384  # of the fixed point numbers that they are computed from
_TAIL = 18.9  # standard deviations; the probability of what lies beyond is below 2^-256
_AT_ONCE = 2**15  # samples whose words stay in the processor's cache
_GUIDE_BITS = 16  # of a word, by which its place among the thresholds is looked up


class DiscreteGaussian:
    """N_Z(variance), probabilities proportional to e^(-k^2 / (2 variance)) on the integers k.

    Args:
        variance: An integer, at least `MIN_VARIANCE`. It exceeds the distribution's variance by less than 1e-60.

    Raises:
        ValueError: A smaller variance.
    """

    def __init__(self, variance: int) -> None:
        if variance < MIN_VARIANCE:
            raise ValueError(f"variance must be at least {MIN_VARIANCE}, got {variance}")
        self._scale = 1  # c of the module's docstring
        self._coarse: DiscreteGaussian | None = None
        if variance > _MAX_TABLE_VARIANCE:
            self._scale = min(math.isqrt(variance) // 1000 + 1, 256)
            coarse = variance // self._scale**2 - MIN_VARIANCE
            self._coarse = discrete_gaussian(coarse)
            variance -= self._scale**2 * coarse
        self._variance = variance  # of what the table is for
        self._end = math.ceil(_TAIL * math.sqrt(variance))

    @property
    def largest(self) -> int:
        """The largest absolute value that a sample can have."""
        return self._end + (0 if self._coarse is None else self._scale * self._coarse.largest)

    @cached_property
    def _thresholds(self) -> list[int]:
        """2^256 times the probability of at most k, for k from -end to end - 1, in increasing order.

        A sample is the number of thresholds that a uniform integer below 2^256 reaches, minus end. Every probability is
        computed from the last one by multiplication, in fixed point; errors stay below 2^-340.
        """
        one = 1 << _WORK_BITS
        root = _exp_minus(1, 2 * self._variance)  # e^(-1 / (2 variance))
        square = root * root >> _WORK_BITS
        weights, ratio = [one], root
        for _ in range(self._end):
            weights.append(weights[-1] * ratio >> _WORK_BITS)
            ratio = ratio * square >> _WORK_BITS
        total = 2 * sum(weights) - one
        below, thresholds = 0, []
        for k in range(-self._end, self._end):
            below += weights[abs(k)]
            thresholds.append((below << _BITS) // total)
        return thresholds

    @cached_property
    def _upper_words(self) -> np.ndarray:
        """The upper 64 bits of each threshold, and the largest word, uint64."""
        upper = [threshold >> (_BITS - 64) for threshold in self._thresholds]
        return np.array([*upper, (1 << 64) - 1], dtype=np.uint64)

    @cached_property
    def _below(self) -> np.ndarray:
        """How many thresholds lie below each number of `_GUIDE_BITS` bits and zeros behind it, int64."""
        starts = np.arange(1 << _GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - _GUIDE_BITS)
        below = np.searchsorted(self._upper_words[:-1], starts)
        return np.append(below, len(self._thresholds))

    @cached_property
    def _crowded(self) -> np.ndarray:
        """Whether several thresholds begin with the same `_GUIDE_BITS` bits, bool."""
        return np.diff(self._below) > 1

    def sample(self, count: int, secret: SecretNoise) -> np.ndarray:
        """Independent samples, int64, shape (count,), by inversion.

        64 random bits decide unless they equal those of a threshold; then 192 further bits do.
        """
        samples = np.empty(count, dtype=np.int64)
        for start in range(0, count, _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            part[:] = self._fine(len(part), secret)
            if self._coarse is not None:
                part += self._scale * self._coarse.sample(len(part), secret)
        return samples

    def _fine(self, count: int, secret: SecretNoise) -> np.ndarray:
        words = secret.words(count)
        first = (words >> np.uint64(64 - _GUIDE_BITS)).astype(np.int64)
        found = self._below[first]
        found += self._upper_words[found] < words
        crowded = np.flatnonzero(self._crowded[first])
        found[crowded] = np.searchsorted(self._upper_words[:-1], words[crowded])
        for at in np.flatnonzero(self._upper_words[found] == words):  # undecided
            number = int(words[at])
            for word in secret.words((_BITS - 64) // 64):
                number = number << 64 | int(word)
            found[at] = bisect_right(self._thresholds, number)
        return np.asarray(found - self._end)


@lru_cache(maxsize=16)  # a table takes about 0.1 s
def discrete_gaussian(variance: int) -> DiscreteGaussian:
    """The distribution of this variance, with its tables shared by all who ask for it."""
    return DiscreteGaussian(variance)


def _exp_minus(numerator: int, denominator: int) -> int:
    """e^(-numerator / denominator) in fixed point, as the inverse of the exponential series of a positive number."""
    term = total = 1 << _WORK_BITS
    n = 0
    while term:
        n += 1
        term = term * numerator // (denominator * n)
        total += term
    return (1 << 2 * _WORK_BITS) // total
