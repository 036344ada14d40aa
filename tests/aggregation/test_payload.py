"""The wire format of payloads: a round trip is exact, and everything invalid is refused."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.aggregation.payload import (
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainConfig,
    same_shape,
)
from fedface.errors import AggregationError

HEADER = {"length": 3, "count": 1, "round": 0}


def _wire(header: bytes, *, parts: bytes = b"", count: int = 0, announced: int | None = None) -> bytes:
    """Any content with a correct digest."""
    lengths = struct.pack(">II", len(header) if announced is None else announced, count)
    return b"FFP1" + hashlib.sha256(lengths + header + parts).digest() + lengths + header + parts


@settings(max_examples=50, deadline=None)
@given(
    header=st.dictionaries(
        st.text(max_size=8),
        st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        max_size=6,
    ),
    parts=st.lists(st.binary(max_size=40), max_size=4),
)
def test_a_payload_is_equal_after_a_round_trip(
    header: dict[str, int | float | str], parts: list[bytes]
) -> None:
    """from_bytes(to_bytes(p)) == p, and nbytes is the length without building it."""
    payload = Payload(kind="plain", header=header, parts=tuple(parts))
    wire = payload.to_bytes()
    assert Payload.from_bytes(wire) == payload
    assert payload.nbytes == len(wire)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_never_crash(wire: bytes) -> None:
    """200 random bytes never contain their own SHA-256."""
    with pytest.raises(AggregationError):
        Payload.from_bytes(wire)


def test_every_truncation_every_extra_byte_and_every_flipped_bit_is_refused() -> None:
    """The digest covers the lengths and everything after it."""
    wire = Payload(kind="plain", header=HEADER, parts=(b"abc", b"")).to_bytes()
    for end in range(len(wire)):
        with pytest.raises(AggregationError):
            Payload.from_bytes(wire[:end])
    with pytest.raises(AggregationError):
        Payload.from_bytes(wire + b"\0")
    for at in range(len(wire)):
        with pytest.raises(AggregationError):
            Payload.from_bytes(wire[:at] + bytes([wire[at] ^ 1]) + wire[at + 1 :])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"[" * 4000,
        b"\xff\xfe",
        b'{"kind":"plain"}',
        b'{"kind":"plain","header":[]}',
        b'{"kind":1,"header":{}}',
        b'{"kind":"plain","header":{"a":NaN}}',
        b'{"kind":"plain","header":{"a":1e999}}',
        b'{"kind":"plain","header":{"a":true}}',
        b'{"kind":"plain","header":{"a":null}}',
        b'{"kind":"plain","header":{"a":{"b":1}}}',
        b'{"kind":"plain","header":{"a":1,"a":2}}',
        b'{"kind":"plain","header":{},"more":1}',
        b'{"kind":"plain","header":{"a":' + b"9" * 4060 + b"}}",
        b'{"kind":"plain","header":{' + b",".join(b'"%d":1' % i for i in range(65)) + b"}}",
    ],
)
def test_a_header_that_is_not_flat_json_is_refused_even_with_a_correct_digest(header: bytes) -> None:
    """An attacker can compute a digest too."""
    with pytest.raises(AggregationError):
        Payload.from_bytes(_wire(header))


def test_false_lengths_are_refused_before_memory_is_allocated() -> None:
    """Four gigabytes announced, none sent."""
    good = b'{"kind":"plain","header":{}}'
    assert Payload.from_bytes(_wire(good)).parts == ()
    for hostile in (
        _wire(good, announced=0xFFFFFFFF),
        _wire(good, announced=len(good) + 1),
        _wire(good, count=0xFFFFFFFF),
        _wire(good, count=1),
        _wire(good, parts=struct.pack(">I", 0xFFFFFFFF), count=1),
        _wire(good, parts=struct.pack(">I", 4) + b"abc", count=1),
        _wire(good, parts=struct.pack(">I", 2) + b"abc", count=1),
        _wire(good, parts=b"abc", count=0),
    ):
        with pytest.raises(AggregationError):
            Payload.from_bytes(hostile)


def test_numbers_of_the_header_are_bounded_integers() -> None:
    """A float, a string or a number out of range is not a length."""
    for length in (0, -1, (1 << 30) + 1, 3.0, "3"):
        with pytest.raises(AggregationError):
            _ = Payload(kind="plain", header={"length": length}, parts=()).length
    with pytest.raises(AggregationError):
        Payload(kind="plain", header={"length": True}, parts=())
    assert Payload(kind="plain", header=HEADER, parts=()).length == 3


def test_a_payload_copies_its_header() -> None:
    """Later changes of the dictionary have no effect."""
    header = dict(HEADER)
    payload = Payload(kind="plain", header=header, parts=())
    header["length"] = 4
    assert payload.length == 3


def test_payloads_of_one_sum_share_kind_length_and_round() -> None:
    """Counts are added; everything else must be equal."""
    one = Payload(kind="plain", header=HEADER, parts=())
    two = Payload(kind="plain", header={**HEADER, "count": 2}, parts=())
    assert same_shape([one, two], "plain") == (3, 0, 3)
    for other in (
        Payload(kind="homomorphic", header=HEADER, parts=()),
        Payload(kind="plain", header={**HEADER, "length": 4}, parts=()),
        Payload(kind="plain", header={**HEADER, "round": 1}, parts=()),
    ):
        with pytest.raises(AggregationError):
            same_shape([one, other], "plain")
    with pytest.raises(AggregationError):
        same_shape([], "plain")


def test_settings_out_of_range_are_refused() -> None:
    """With name, value and bound."""
    for value_range, max_devices in ((0.0, 2), (-1.0, 2), (float("nan"), 2), (float("inf"), 2), (1.0, 0)):
        with pytest.raises(ValueError, match="must"):
            AggregationParameters(value_range=value_range, max_devices=max_devices)
    for bits in (1, 25):
        with pytest.raises(ValueError, match="bits"):
            HomomorphicConfig(bits=bits)
    with pytest.raises(ValueError, match="min_devices"):
        HomomorphicConfig(min_devices=0)
    assert (PlainConfig().kind, HomomorphicConfig().kind) == ("plain", "homomorphic")
