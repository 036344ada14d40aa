"""The key recovery of Li and Micciancio (2021, ePrint 2020/1533) finds the key of CKKS, and nothing of ours.

A ciphertext (c0, c1) decrypts to the polynomial c0 + c1 s. Whoever knows it solves for the secret s. A decrypted CKKS
sum is that polynomial, noise included; a decrypted BFV sum is an exact integer, from which the noise was rounded off.
"""

from __future__ import annotations

import numpy as np
import torch
from tenseal import sealapi

from fedface.aggregation.homomorphic import SLOTS, EncryptedRing, HomomorphicKeys, _load
from fedface.aggregation.payload import AggregationParameters, HomomorphicConfig

Poly = list[int]  # coefficients, or values at the odd powers of a root of unity, modulo a prime


def fourier(values: Poly, root: int, prime: int) -> Poly:
    """The sums of values times powers of a root of unity of order len(values) (Cooley and Tukey 1965)."""
    if len(values) == 1:
        return values
    even, odd = (fourier(values[start::2], root * root % prime, prime) for start in (0, 1))
    power, twisted = 1, []
    for value in odd:
        twisted.append(value * power % prime)
        power = power * root % prime
    return [(a + b) % prime for a, b in zip(even, twisted, strict=True)] + [
        (a - b) % prime for a, b in zip(even, twisted, strict=True)
    ]


def smallest_root(prime: int) -> int:
    """The smallest number whose power SLOTS is -1, as SEAL takes it."""
    base = next(base for base in range(2, 99) if pow(base, (prime - 1) // 2, prime) == prime - 1)
    root = pow(base, (prime - 1) // (2 * SLOTS), prime)
    return min(pow(root, odd, prime) for odd in range(1, 2 * SLOTS, 2))


def evaluated(coefficients: Poly, prime: int) -> Poly:
    """At the roots of x^SLOTS + 1, in SEAL's order."""
    root = smallest_root(prime)
    twisted = [value * pow(root, at, prime) % prime for at, value in enumerate(coefficients)]
    values = fourier(twisted, root * root % prime, prime)
    return [values[int(f"{at:012b}"[::-1], 2)] for at in range(SLOTS)]


def interpolated(values: Poly, prime: int) -> Poly:
    """The inverse of `evaluated`, coefficients between -prime / 2 and prime / 2."""
    back = pow(smallest_root(prime), -1, prime)
    ordered = [values[int(f"{at:012b}"[::-1], 2)] for at in range(SLOTS)]
    twisted = fourier(ordered, back * back % prime, prime)
    size = pow(SLOTS, -1, prime)
    found = [value * size * pow(back, at, prime) % prime for at, value in enumerate(twisted)]
    return [value - prime if 2 * value > prime else value for value in found]


def test_the_key_of_ckks_follows_from_two_parts_of_a_decrypted_sum() -> None:
    """Scale 2^40, published as float64: every word of the key. Real numbers are half of the equations of a part."""
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(SLOTS)
    primes = sealapi.CoeffModulus.Create(SLOTS, [54, 55])
    parameters.set_coeff_modulus(primes)
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    key, prime = sealapi.KeyGenerator(context).secret_key(), int(primes[0].value())
    encryptor, encoder = sealapi.Encryptor(context, key), sealapi.CKKSEncoder(context)
    rng, parts = np.random.default_rng(0), []
    for _ in range(2):
        total, decrypted, again = sealapi.Ciphertext(context), sealapi.Plaintext(), sealapi.Plaintext()
        uploads = [sealapi.Ciphertext(context) for _ in range(2)]
        for upload in uploads:
            plain = sealapi.Plaintext()
            encoder.encode(rng.uniform(-0.1, 0.1, SLOTS // 2).tolist(), 2.0**40, plain)
            encryptor.encrypt_symmetric(plain, upload)
        sealapi.Evaluator(context).add(*uploads, total)
        sealapi.Decryptor(context, key).decrypt(total, decrypted)
        encoder.encode(encoder.decode_double(decrypted), 2.0**41, again)  # c0 + c1 s and its conjugate
        words = [total.dyn_array().at(at) for at in range(2 * SLOTS)]
        parts.append(([again[at] for at in range(SLOTS)], words[:SLOTS], words[SLOTS:]))

    found = []
    for at in range(SLOTS):
        mirrored = SLOTS - 1 - at  # the value at the conjugate root
        (a, b, x), (c, d, y) = (
            (c1[at], c1[mirrored], phase[at] - c0[at] - c0[mirrored]) for phase, c0, c1 in parts
        )
        found.append((x * d - y * b) * pow(a * d - b * c, -1, prime) % prime)
    assert found == [key.data()[at] for at in range(SLOTS)]


def test_the_same_recovery_finds_nothing_in_our_sums() -> None:
    """What the server sees differs from c0 + c1 s by small noise alone, and that hides the key completely."""
    agreement, length = AggregationParameters(value_range=0.1, max_devices=8), 3 * SLOTS
    keys = HomomorphicKeys.make(HomomorphicConfig(), agreement)
    device = EncryptedRing(HomomorphicConfig(), agreement, keys)
    adder, scheme = device.adder(length), device.scheme
    for seed in range(2):
        update = torch.rand(length, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
        adder.add(device.send(device.to_ring(update), length))
    _, (total,) = scheme.read(adder.to_bytes(), length)
    plain = sealapi.Plaintext()
    sealapi.BatchEncoder(scheme.context).encode(device.decrypt(adder.to_bytes(), length).tolist(), plain)
    message = [plain[at] for at in range(plain.coeff_count())] + [0] * (SLOTS - plain.coeff_count())

    primes = [int(prime.value()) for prime in scheme._coefficient_primes][:2]
    (prime, _), q, t = primes, primes[0] * primes[1], scheme.plain_modulus
    scaled = evaluated([(2 * value * q + t) // (2 * t) % prime for value in message], prime)
    words = [total.dyn_array().at(at) for at in range(4 * SLOTS)]  # of each polynomial, modulo each prime
    c0, c1 = (evaluated(words[at : at + SLOTS], prime) for at in (0, 2 * SLOTS))
    attempt = [(m - a) * pow(b, -1, prime) % prime for m, a, b in zip(scaled, c0, c1, strict=True)]
    small = [abs(value) <= 1 for value in interpolated(attempt, prime)]
    assert sum(small) == 0

    secret = _load(sealapi.SecretKey(), scheme.context, keys.secret, "key")
    s = [secret.data()[at] for at in range(SLOTS)]
    assert {*interpolated(s, prime)} == {-1, 0, 1}
    noise = [(a + b * key - m) % prime for a, b, key, m in zip(c0, c1, s, scaled, strict=True)]
    sizes = [abs(value) for value in interpolated(noise, prime)]
    assert 0 < sum(sizes) and max(sizes) <= 2 * 22
