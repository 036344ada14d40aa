"""Randomness: reproducible streams, and noise that is never reproducible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedface.randomness import SecretNoise, Streams, halfway

COUNT = 200_000


def test_equal_seed_and_name_give_equal_numbers() -> None:
    """In torch and numpy, from new objects, also after other streams were used."""
    first, second = Streams(7), Streams(7)
    torch.rand(3, generator=second.generator("other"))
    assert torch.equal(
        torch.rand(9, generator=first.generator("a")), torch.rand(9, generator=second.generator("a"))
    )
    assert np.array_equal(first.numpy("a").random(9), second.numpy("a").random(9))
    assert first.child("c") == second.child("c")


def test_another_name_seed_or_child_gives_other_numbers() -> None:
    """Twelve streams, no two equal."""
    streams = [Streams(seed) for seed in (0, 1)]
    streams += [parent.child(name) for parent in streams for name in ("a", "b")]
    draws = {tuple(torch.rand(4, generator=s.generator(n)).tolist()) for s in streams for n in ("a", "b")}
    assert len(draws) == 12


def test_a_stream_ignores_the_global_seed() -> None:
    """And does not change it."""
    state = torch.random.get_rng_state()
    first = torch.rand(5, generator=Streams(1).generator("a"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(torch.rand(5, generator=Streams(1).generator("a")), first)


def test_a_negative_seed_is_refused() -> None:
    """Seeds count from 0."""
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        Streams(-1)


def test_secret_normals_have_the_moments_of_a_standard_normal() -> None:
    """Mean 0, variance 1, skewness 0, kurtosis 3, each within five of its own standard errors."""
    x = SecretNoise().normals(COUNT).double()
    root = math.sqrt(COUNT)
    assert abs(float(x.mean())) < 5 / root
    assert abs(float(x.square().mean()) - 1) < 5 * math.sqrt(2) / root
    assert abs(float(x.pow(3).mean())) < 5 * math.sqrt(15) / root
    assert abs(float(x.pow(4).mean()) - 3) < 5 * math.sqrt(96) / root


def test_the_two_halves_of_secret_normals_are_independent() -> None:
    """Box-Muller gives cosines and sines; their correlation is 0 within five standard errors."""
    x = SecretNoise().normals(COUNT).double()
    half = COUNT // 2
    assert abs(float((x[:half] * x[half:]).mean())) < 5 / math.sqrt(half)
    assert abs(float((x[:half].square() * x[half:].square()).mean()) - 1) < 5 * math.sqrt(8) / math.sqrt(half)


def test_secret_uniforms_are_uniform() -> None:
    """Kolmogorov's distance to the diagonal stays below 2.2 / sqrt(n), which one run in 8000 exceeds."""
    x = np.sort(SecretNoise().uniforms(COUNT))
    distance = np.abs(x - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 2.2 / math.sqrt(COUNT)


class FixedWords(SecretNoise):
    """Secret noise with given words."""

    def __init__(self, *words: int) -> None:
        super().__init__()
        self.given = words

    def words(self, count: int) -> np.ndarray:
        return np.resize(np.array(self.given, dtype=np.uint64), count)


def test_secret_uniforms_are_never_zero_or_one() -> None:
    """Also for the smallest and the largest word: at sampling rate 1 every photo is sampled."""
    low, high = FixedWords(0, 2**64 - 1).uniforms(2)
    assert 0 < low < 1e-15 and 1 - 1e-15 < high < 1
    assert torch.isfinite(FixedWords(0, 2**64 - 1).normals(4)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_any_number_of_normals_can_be_generated(count: int) -> None:
    """Odd numbers as well, though normals come in pairs."""
    assert SecretNoise().normals(count).shape == (count,)


def test_secret_noise_is_never_repeated() -> None:
    """Each object has its own key."""
    one, two = SecretNoise(), SecretNoise()
    words = [tuple(noise.words(4)) for noise in (one, two, one, two)]
    assert len(set(words)) == 4


def test_secret_noise_ignores_every_seed() -> None:
    """Equal global seeds do not make it equal."""
    sampled = []
    for _ in range(2):
        torch.random.default_generator.manual_seed(0)
        sampled.append(SecretNoise().normals(8))
    assert not torch.equal(sampled[0], sampled[1])


def test_a_secret_permutation_is_a_permutation() -> None:
    """100 permutations of 10 begin with at least five different numbers."""
    noise = SecretNoise()
    orders = [noise.permutation(10) for _ in range(100)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({int(order[0]) for order in orders}) >= 5


def test_words_map_to_the_midpoints_of_equal_cells() -> None:
    """(k + 1/2) / 2^52 by plain arithmetic, at both ends and in between."""
    words = np.concatenate([np.array([0, 2**64 - 1, 2**63], dtype=np.uint64), SecretNoise().words(1000)])
    plain = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    assert np.array_equal(halfway(words), plain)
    assert 0.0 < halfway(words).min() and halfway(words).max() < 1.0
