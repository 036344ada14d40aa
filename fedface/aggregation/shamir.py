"""Shamir's secret sharing: any `threshold` holders recover a secret of 32 bytes, fewer learn nothing about it.

Source: Shamir (1979), "How to share a secret", over the field of integers modulo the Mersenne prime p = 2^521 - 1. The
secret is the constant term of a polynomial of degree threshold - 1; holder x = 1, 2, ... has its value at x.

What this does not do:
    * It does not prove that a dealer's shares belong to one polynomial. `join` notices it when it is given more than
      `threshold` shares, and cannot tell whose share is wrong.
    * Python's integers do not run in constant time: whoever can time a device's arithmetic is outside the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate
from math import prod

from fedface.errors import AggregationError

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66  # 521 bits, big-endian
MAX_HOLDERS = 65_535
_DOMAIN = b"fedface shamir 1"


def split(secret: bytes, *, holders: int, threshold: int, seed: bytes) -> list[bytes]:
    """Shares of a secret for the holders x = 1..holders, in this order; the same arguments give the same shares.

    The coefficients above the constant term are 521-bit blocks of SHAKE256(threshold, seed, secret), reduced modulo p.
    Were these blocks uniform, each coefficient would be within 2^-520 of uniform (only 0 has two preimages), so that
    fewer than `threshold` shares reveal nothing but what SHAKE256 under a secret seed reveals. The hash includes the
    secret, so that a seed used for two secrets does not give two polynomials with a known difference.

    Args:
        secret: 32 bytes.
        holders: how many shares, 1..65,535.
        threshold: how many of them recover the secret, 1..holders.
        seed: 32 secret random bytes of the dealer.

    Returns:
        Shares of 66 bytes each.

    Raises:
        AggregationError: an argument has another length or is out of its range.
    """
    if len(secret) != SECRET_BYTES or len(seed) != SECRET_BYTES:
        lengths = f"{len(secret)} and {len(seed)}"
        raise AggregationError(f"a secret and its seed have {SECRET_BYTES} bytes each, got {lengths}")
    if not 1 <= threshold <= holders <= MAX_HOLDERS:
        got = f"threshold {threshold} and {holders} holders"
        raise AggregationError(f"shares require 1 <= threshold <= holders <= {MAX_HOLDERS}, got {got}")
    key = _DOMAIN + threshold.to_bytes(4, "big") + seed + secret
    stream = hashlib.shake_256(key).digest(SHARE_BYTES * (threshold - 1))
    blocks = (stream[start : start + SHARE_BYTES] for start in range(0, len(stream), SHARE_BYTES))
    surplus = 8 * SHARE_BYTES - PRIME.bit_length()
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [(int.from_bytes(block, "big") >> surplus) % PRIME for block in blocks]
    return [_value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, holders + 1)]


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret that shares (holder x -> share) belong to; surplus shares must agree with it.

    With nodes 0, x_1, ..., x_m the divided difference of order m vanishes for every polynomial of degree below m
    (Lagrange). For f itself that gives f(0) from the shares; for z f(z), z^2 f(z), ... z^(m - threshold) f(z), where
    node 0 drops out, it gives m - threshold equations that hold exactly if all shares lie on one polynomial of degree
    below `threshold`. One modular inverse serves all of them.

    Raises:
        AggregationError: fewer than `threshold` shares, a share that is malformed or of an impossible holder, shares
            that contradict one another, or shares of something that is not 32 bytes.
    """
    if threshold < 1:
        raise AggregationError(f"threshold must be at least 1, got {threshold}")
    if len(shares) < threshold:
        raise AggregationError(f"this secret takes {threshold} shares to recover, got {len(shares)}")
    values = {x: _parse(x, share) for x, share in shares.items()}
    denominators = [x * prod(x - other for other in values if other != x) % PRIME for x in values]
    before = list(accumulate(denominators, _times, initial=1))
    after = list(accumulate(reversed(denominators), _times, initial=1))[-2::-1]
    # Each term is value / denominator, times the product of all denominators.
    terms = [y * left * right % PRIME for y, left, right in zip(values.values(), before, after, strict=False)]
    constant = -prod(-x for x in values) * sum(terms) * pow(before[-1], -1, PRIME) % PRIME
    for _ in range(len(values) - threshold):
        terms = [term * x % PRIME for term, x in zip(terms, values, strict=True)]
        if sum(terms) % PRIME:
            raise AggregationError(f"the shares of holders {sorted(values)} contradict one another")
    if constant >= 1 << 8 * SECRET_BYTES:
        problem = f"the shares of holders {sorted(values)} do not belong to a secret of {SECRET_BYTES} bytes"
        raise AggregationError(f"{problem}; at least one of them is wrong")
    return constant.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: list[int], x: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _times(left: int, right: int) -> int:
    return left * right % PRIME


def _parse(x: int, share: bytes) -> int:
    if type(x) is not int or not 1 <= x <= MAX_HOLDERS:
        raise AggregationError(f"holders are numbered 1..{MAX_HOLDERS}, got {x!r:.80}")
    if type(share) is not bytes or len(share) != SHARE_BYTES:
        got = f"{len(share)} bytes" if isinstance(share, bytes) else type(share).__name__
        raise AggregationError(f"holder {x}: a share has {SHARE_BYTES} bytes, got {got}")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise AggregationError(f"holder {x}: a share is a number below 2^521 - 1, got a greater one")
    return value
