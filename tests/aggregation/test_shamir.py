"""Shamir's secret sharing: any threshold of shares joins, fewer fit every secret, wrong shares are named."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.aggregation.shamir import PRIME, SHARE_BYTES, join, split
from fedface.errors import AggregationError

SECRET, SEED = bytes(range(32)), bytes(range(100, 132))


def share(value: int) -> bytes:
    """A share as it is sent."""
    return value.to_bytes(SHARE_BYTES, "big")


def lagrange(points: dict[int, int], at: int) -> int:
    """The slow, obvious interpolation."""
    total = 0
    for x, y in points.items():
        for other in points:
            if other != x:
                y = y * (at - other) * pow(x - other, -1, PRIME) % PRIME
        total += y
    return total % PRIME


def test_a_polynomial_on_paper_joins_to_its_constant_term() -> None:
    """f(x) = 7 + 3 x + 2 x^2 has the values 12, 21, 34 and 51 at 1, 2, 3 and 4."""
    shares = {1: share(12), 2: share(21), 3: share(34), 4: share(51)}
    assert join(shares, 3) == (7).to_bytes(32, "big")
    assert join({4: shares[4], 1: shares[1], 2: shares[2]}, 3) == (7).to_bytes(32, "big")


def test_a_threshold_of_one_shares_the_secret_itself() -> None:
    """A polynomial of degree 0 is its constant term."""
    shares = split(SECRET, holders=3, threshold=1, seed=SEED)
    assert shares == [share(int.from_bytes(SECRET, "big"))] * 3
    assert join({2: shares[1]}, 1) == SECRET


def test_every_subset_of_at_least_the_threshold_joins() -> None:
    """All 42 subsets of 3 to 6 of 6 shares."""
    shares = dict(enumerate(split(SECRET, holders=6, threshold=3, seed=SEED), start=1))
    for size in range(3, 7):
        for holders in combinations(shares, size):
            assert join({x: shares[x] for x in holders}, 3) == SECRET


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_threshold_of_shares_joins_in_any_order(data: st.DataObject) -> None:
    """For arbitrary secrets, seeds, numbers of holders and thresholds."""
    secret, seed = (data.draw(st.binary(min_size=32, max_size=32)) for _ in range(2))
    holders = data.draw(st.integers(1, 50))
    threshold = data.draw(st.integers(1, holders))
    shares = dict(enumerate(split(secret, holders=holders, threshold=threshold, seed=seed), start=1))
    order = data.draw(st.permutations(list(shares)))
    given_shares = order[: data.draw(st.integers(threshold, holders))]
    assert join({x: shares[x] for x in given_shares}, threshold) == secret


@settings(deadline=None, max_examples=20)
@given(other=st.binary(min_size=32, max_size=32))
def test_fewer_shares_fit_every_secret_equally(other: bytes) -> None:
    """Two of the shares and any other secret define exactly one polynomial of degree 2, whose shares join to it."""
    real = dict(enumerate(split(SECRET, holders=5, threshold=3, seed=SEED), start=1))
    known = {x: int.from_bytes(real[x], "big") for x in (2, 5)}
    points = {0: int.from_bytes(other, "big"), **known}
    fake = {x: share(lagrange(points, x)) for x in real}
    assert {x: fake[x] for x in known} == {x: real[x] for x in known}
    assert join(fake, 3) == other


def test_a_device_that_restarts_makes_the_same_shares_and_no_others_related_to_them() -> None:
    """Shares depend on seed, secret and threshold; two secrets under one seed do not differ by a constant."""
    first = split(SECRET, holders=4, threshold=3, seed=SEED)
    assert first == split(SECRET, holders=4, threshold=3, seed=SEED)
    assert not set(first) & set(split(SECRET, holders=4, threshold=3, seed=SECRET))
    assert not set(first) & set(split(SECRET, holders=4, threshold=2, seed=SEED))
    second = split(bytes(32), holders=4, threshold=3, seed=SEED)
    numbers = [[int.from_bytes(each, "big") for each in shares] for shares in (first, second)]
    assert len({(a - b) % PRIME for a, b in zip(*numbers, strict=True)}) == 4


def test_shares_fill_the_field() -> None:
    """Each of the 521 bits of a share is set in about half of 2,000 shares (within 6 standard deviations)."""
    numbers = [
        int.from_bytes(each, "big")
        for number in range(200)
        for each in split(number.to_bytes(32, "big"), holders=10, threshold=10, seed=SEED)
    ]
    for bit in range(521):
        assert abs(sum(each >> bit & 1 for each in numbers) - 1000) < 6 * 500**0.5


def test_contradicting_shares_are_named() -> None:
    """One wrong share among more than the threshold."""
    shares = dict(enumerate(split(SECRET, holders=5, threshold=3, seed=SEED), start=1))
    for x in shares:
        changed = int.from_bytes(shares[x], "big") ^ 1
        with pytest.raises(AggregationError, match=r"holders \[1, 2, 3, 4, 5\] contradict one another"):
            join({**shares, x: share(changed)}, 3)
    with pytest.raises(AggregationError, match="contradict one another"):
        join({**shares, 1: shares[2], 2: shares[1]}, 4)


def test_wrong_shares_without_a_surplus_do_not_join_to_a_secret() -> None:
    """A wrong share moves the constant term out of the 256 bits of a secret, except with probability 2^-265."""
    shares = dict(enumerate(split(SECRET, holders=5, threshold=3, seed=SEED), start=1))
    with pytest.raises(AggregationError, match=r"holders \[1, 2, 3\] do not belong to a secret of 32 bytes"):
        join({1: shares[1], 2: shares[2], 3: shares[4]}, 3)
    with pytest.raises(AggregationError, match="do not belong to a secret"):
        join({x: shares[x] for x in (1, 2)}, 2)


def test_malformed_shares_are_refused() -> None:
    """Too few, another length, another type, not reduced, an impossible holder, a threshold of 0."""
    shares = dict(enumerate(split(SECRET, holders=4, threshold=2, seed=SEED), start=1))
    two = {1: shares[1], 2: shares[2]}
    with pytest.raises(AggregationError, match="takes 3 shares to recover, got 2"):
        join(two, 3)
    for wrong in (b"", shares[2][1:], shares[2] + b"\0"):
        with pytest.raises(AggregationError, match=f"holder 2: a share has 66 bytes, got {len(wrong)} bytes"):
            join({**two, 2: wrong}, 2)
    with pytest.raises(AggregationError, match="holder 2: a share has 66 bytes, got str"):
        join({**two, 2: "a" * 66}, 2)  # type: ignore[dict-item]
    for number in (PRIME, PRIME + 5, 2**528 - 1):
        with pytest.raises(AggregationError, match=r"holder 2: a share is a number below 2\^521 - 1"):
            join({**two, 2: share(number)}, 2)
    for x in (0, -1, 65_536, True, 1.0, "1"):
        with pytest.raises(AggregationError, match=r"numbered 1\.\.65535"):
            join({x: shares[3], 2: shares[2]}, 2)  # type: ignore[dict-item]
    with pytest.raises(AggregationError, match="at least 1"):
        join({}, 0)


@pytest.mark.parametrize(
    ("secret", "seed", "holders", "threshold"),
    [
        (bytes(31), SEED, 3, 2),
        (bytes(33), SEED, 3, 2),
        (SECRET, b"", 3, 2),
        (SECRET, SEED, 2, 3),
        (SECRET, SEED, 3, 0),
        (SECRET, SEED, 65_536, 2),
    ],
)
def test_what_cannot_be_shared_is_refused(secret: bytes, seed: bytes, holders: int, threshold: int) -> None:
    """Lengths other than 32 bytes, and thresholds that no set of holders has."""
    with pytest.raises(AggregationError):
        split(secret, holders=holders, threshold=threshold, seed=seed)
