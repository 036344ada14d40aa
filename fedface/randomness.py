"""Two kinds of randomness that must never mix: reproducible streams, and secret noise.

A stream is derived from a run's seed and a name, so that random numbers in one place do not shift those in another.
Secret noise is keyed by the operating system and cannot be reproduced: noise that a server can recompute from a seed
gives no privacy.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_AT_ONCE = 16_384  # pairs of normals that stay in the processor's cache


@dataclass(frozen=True)
class Streams:
    """Named random streams derived from one seed; equal (seed, name) gives equal numbers."""

    seed: int  # >= 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def _number(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, name: str) -> torch.Generator:
        """A new torch generator on the CPU at the start of the stream `name`."""
        return torch.Generator().manual_seed(self._number(name))

    def numpy(self, name: str) -> np.random.Generator:
        """A new numpy generator at the start of the stream `name`."""
        return np.random.Generator(np.random.PCG64(self._number(name)))

    def child(self, name: str) -> Streams:
        """Independent streams for one part, such as one device or one round."""
        return Streams(self._number(name))


def halfway(words: np.ndarray) -> np.ndarray:
    """(k + 1/2) / 2^52 for the upper 52 bits k of each uint64 word, strictly inside (0, 1), float64.

    52 bits, not 53: the largest plus one half must not round up to 1. The bits become the fraction of a float64
    between 1 and 2, from which 1 - 2^-53 is taken; every step is exact.
    """
    between = ((words >> np.uint64(12)) | np.uint64(0x3FF0000000000000)).view(np.float64)
    return np.asarray(between - (1.0 - 2.0**-53))


class SecretNoise:
    """Noise that cannot be reproduced: an AES-256-CTR keystream under a key that exists only in this object.

    For privacy noise and for Poisson sampling, both of which the analysis of DP-SGD assumes to be unknown to the
    adversary (Abadi et al. 2016, arXiv:1607.00133). A torch generator is not sufficient: on the CPU it uses 32 bits of
    its seed, and a weight with gradient zero publishes its outputs unchanged.
    """

    def __init__(self) -> None:
        key = algorithms.AES(secrets.token_bytes(32))
        self._stream = Cipher(key, modes.CTR(secrets.token_bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """`count` uniform 64-bit words, uint64, shape (count,)."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        """`count` uniform numbers strictly inside (0, 1), float64, shape (count,)."""
        return halfway(self.words(count))

    def normals(self, count: int) -> torch.Tensor:
        """`count` standard normal numbers, float64, shape (count,).

        Each is the sum of four independent normals, halved, so that its last bits reveal nothing about the words that
        it was computed from
        (Holohan and Braghin 2021, arXiv:2107.10138, the remedy Opacus uses). That alone does not hide
        what noise is added to: see privacy/clip_and_noise.py.
        """
        pairs = -(-count // 2)
        total = torch.zeros(2, pairs, dtype=torch.float64)
        for start in range(0, pairs, _AT_ONCE):
            part = total[:, start : start + _AT_ONCE]
            for _ in range(4):
                # In torch, whose logarithms and cosines are several times as fast as numpy's.
                radius = torch.from_numpy(self.uniforms(part.shape[1])).log_().mul_(-2.0).sqrt_()
                angle = torch.from_numpy(self.uniforms(part.shape[1])).mul_(2.0 * np.pi)
                part[0] += radius * angle.cos()
                part[1] += radius * angle.sin()
        return total.flatten()[:count] / 2.0

    def permutation(self, count: int) -> np.ndarray:
        """A uniformly random order of 0..count-1, int64, shape (count,)."""
        return np.argsort(self.words(count), kind="stable")
