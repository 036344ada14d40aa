"""Homomorphically encrypted sums are exact sums of integers, the server cannot decrypt them, and invalid input is
refused.
"""

from __future__ import annotations

import os
import resource
import stat
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from fedface.aggregation.homomorphic import (
    HomomorphicDevice,
    HomomorphicKeys,
    HomomorphicServer,
    Scheme,
)
from fedface.aggregation.payload import (
    Aggregation,
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainConfig,
)
from fedface.aggregation.plain import PlainAggregation
from fedface.aggregation.protocols import DeviceKeys, device_sum
from fedface.errors import AggregationError, ConfigError

CONFIG = HomomorphicConfig(bits=16)
AGREEMENT = AggregationParameters(value_range=0.1, max_devices=8)
KEYS = HomomorphicKeys.make(CONFIG, AGREEMENT)
DEVICE = HomomorphicDevice(CONFIG, AGREEMENT, KEYS)
SERVER = HomomorphicServer(CONFIG, AGREEMENT)


def _updates(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [-R, R], shape (count, length)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, length, generator=generator) * 2 - 1) * AGREEMENT.value_range


def _with(payload: Payload, **header: int | float | str) -> Payload:
    return Payload(kind=payload.kind, header={**payload.header, **header}, parts=payload.parts)


@pytest.mark.parametrize("length", [1, 12287, 12288, 30000])
def test_the_decrypted_sum_is_the_exact_sum_of_the_integers(length: int) -> None:
    """Compared with a plain sum of the integers, through the wire format, around the capacity of one ciphertext."""
    updates = _updates(8, length)
    wires = [DEVICE.protect(update, 3).to_bytes() for update in updates]
    total = SERVER.combine([Payload.from_bytes(wire) for wire in wires])
    opened = DEVICE.reveal(Payload.from_bytes(total.to_bytes()))
    quantiser = SERVER.scheme.quantiser
    integers = np.sum([quantiser.quantise(update) for update in updates], axis=0)
    assert torch.equal(opened, quantiser.dequantise_sum(integers, 8))
    assert (total.count, total.length, total.round) == (8, length, 3)


def test_the_largest_and_smallest_possible_sums_are_exact() -> None:
    """Every coordinate at R, then at -R, from the maximum number of devices."""
    for edge in (AGREEMENT.value_range, -AGREEMENT.value_range):
        update = torch.full((12287,), edge)
        opened = DEVICE.reveal(SERVER.combine([DEVICE.protect(update, 0) for _ in range(8)]))
        assert opened == pytest.approx(torch.full((12287,), 8 * edge), rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    bits=st.integers(2, 24), most=st.sampled_from([1, 2, 3, 16, 17, 1000, 1 << 20]), seed=st.integers(0, 99)
)
def test_plain_and_encrypted_agree_within_half_a_step_for_each_device(
    bits: int, most: int, seed: int
) -> None:
    """For all packings."""
    agreement = AggregationParameters(value_range=0.1, max_devices=most)
    revealed = []
    for config in (PlainConfig(), HomomorphicConfig(bits=bits, min_devices=1)):
        device: Aggregation = PlainAggregation(max_devices=agreement.max_devices)
        if isinstance(config, HomomorphicConfig):
            device = HomomorphicDevice(config, agreement, HomomorphicKeys.make(config, agreement))
        count = min(3, most)
        payloads = [device.protect(update, 0) for update in _updates(count, 50, seed)]
        revealed.append(device.reveal(device.combine(payloads)).double())
    step = 0.1 / ((1 << (bits - 1)) - 1)
    assert (revealed[0] - revealed[1]).abs().max() <= count * step / 2 + 1e-7


def test_all_parameters_have_headroom_for_the_sum_and_the_worst_noise() -> None:
    """t exceeds the largest packed sum, and 2 t n 22 stays below q, with SEAL's own 128-bit check passed."""
    q = 1099511480321 * 4294828033
    for bits in (2, 8, 11, 16, 20, 24):
        for most in (1, 8, 16, 17, 1000, 1 << 20):
            scheme = Scheme(
                config=HomomorphicConfig(bits=bits),
                agreement=AggregationParameters(value_range=1.0, max_devices=most),
            )
            largest = scheme.quantiser.largest_sum
            width = scheme.quantiser.sum_bits
            packed = sum(largest << (width * i) for i in range(scheme.packing.per_slot))
            assert packed < scheme.plain_modulus
            assert 2 * scheme.plain_modulus * most * 22 < q
            assert scheme.context.parameters_set()
            assert scheme.context.first_context_data().total_coeff_modulus_bit_count() == 72
            assert scheme.context.key_context_data().total_coeff_modulus_bit_count() == 109


def test_sums_of_sums_are_sums() -> None:
    """A relay may sum its own devices first."""
    updates = _updates(4, 100)
    payloads = [DEVICE.protect(update, 0) for update in updates]
    relayed = SERVER.combine([SERVER.combine(payloads[:2]), SERVER.combine(payloads[2:])])
    assert torch.equal(DEVICE.reveal(relayed), DEVICE.reveal(SERVER.combine(payloads)))


def test_the_same_update_encrypts_differently_each_time() -> None:
    """Otherwise the server would recognise a device that did not change."""
    update = _updates(1, 10)[0]
    assert DEVICE.protect(update, 0).parts != DEVICE.protect(update, 0).parts


def test_a_payload_reveals_nothing_about_the_update_but_its_length() -> None:
    """Zeros and the largest values: equal headers, and equal mean sizes (one size varies by 1.3 percent)."""
    zeros = [DEVICE.protect(torch.zeros(12287), 0) for _ in range(64)]
    edges = [DEVICE.protect(torch.full((12287,), 0.1), 0) for _ in range(64)]
    assert zeros[0].header == edges[0].header
    sizes = [np.mean([payload.nbytes for payload in payloads]) for payloads in (zeros, edges)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.012)  # five standard errors


def test_the_server_has_no_key_and_can_neither_protect_nor_reveal() -> None:
    """It is built from public parameters only."""
    server = HomomorphicServer(CONFIG, AGREEMENT)
    total = server.combine([DEVICE.protect(update, 0) for update in _updates(2, 5)])
    with pytest.raises(AggregationError, match="no key"):
        server.reveal(total)
    with pytest.raises(AggregationError, match="no key"):
        server.protect(torch.zeros(5), 0)
    with pytest.raises(AggregationError, match="got none"):
        device_sum(CONFIG, AGREEMENT, DeviceKeys())


def test_another_key_decrypts_nothing() -> None:
    """Its name does not match; with a forged name, SEAL's noise budget is zero."""
    other = HomomorphicDevice(CONFIG, AGREEMENT, HomomorphicKeys.make(CONFIG, AGREEMENT))
    total = SERVER.combine([DEVICE.protect(update, 0) for update in _updates(2, 5)])
    with pytest.raises(AggregationError, match="encrypted with key"):
        other.reveal(total)
    with pytest.raises(AggregationError, match="noise budget"):
        other.reveal(_with(total, key=other.key_name))
    with pytest.raises(AggregationError, match="one key"):
        SERVER.combine([DEVICE.protect(torch.zeros(5), 0), other.protect(torch.zeros(5), 0)])


def test_a_sum_of_too_few_updates_is_not_decrypted_even_with_a_false_header() -> None:
    """The devices are counted inside the ciphertext."""
    single = DEVICE.protect(_updates(1, 5)[0], 0)
    with pytest.raises(AggregationError, match="at least 2"):
        DEVICE.reveal(single)
    with pytest.raises(AggregationError, match="the sum itself 1"):
        DEVICE.reveal(_with(single, count=2))


def test_too_many_devices_and_the_same_device_twice_are_refused() -> None:
    """Nine uploads do not fit into the headroom of eight."""
    payloads = [DEVICE.protect(update, 0) for update in _updates(9, 5)]
    with pytest.raises(AggregationError, match="room for 8"):
        SERVER.combine(payloads)
    with pytest.raises(AggregationError, match="twice"):
        SERVER.combine([payloads[0], payloads[0]])
    assert SERVER.combine(payloads[:8]).count == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenseal", "0.3.15"),
        ("bits", 12),
        ("value_range", 0.2),
        ("max_devices", 9),
        ("format", 2),
        ("format", 1.0),
        ("parameters", "0" * 64),
    ],
)
def test_a_payload_of_other_parameters_or_another_tenseal_is_refused_by_name(
    name: str, value: int | float | str
) -> None:
    """TenSEAL versions cannot read each other, and SEAL's own error would come later and be less clear."""
    good = DEVICE.protect(torch.zeros(5), 0)
    with pytest.raises(AggregationError, match=name):
        SERVER.combine([good, _with(DEVICE.protect(torch.zeros(5), 0), **{name: value})])


def test_truncated_damaged_and_foreign_parts_are_refused() -> None:
    """SEAL validates what it loads, after our limit on its size."""
    good = DEVICE.protect(_updates(1, 20000)[0], 0)
    first, second = good.parts
    for parts in (
        (first,),
        (first, second, second),
        (first, b""),
        (first, second[:-5]),
        (first, second[:10]),
        (first, bytes(len(second))),
        (first, second + bytes(200_000)),
        (first, KEYS.secret),
        (first, second[:20] + bytes(200) + second[220:]),
    ):
        with pytest.raises(AggregationError):
            SERVER.combine([Payload(kind=good.kind, header=good.header, parts=parts)])
    with pytest.raises(AggregationError):
        SERVER.combine([good, DEVICE.protect(torch.zeros(20001), 0)])
    with pytest.raises(AggregationError):
        SERVER.combine([good, DEVICE.protect(torch.zeros(20000), 1)])


def test_transparent_ciphertexts_are_refused() -> None:
    """An upload that cancels another, and one that is not encrypted: both could be read without a key."""
    scheme = SERVER.scheme
    good = DEVICE.protect(torch.zeros(5), 0)
    negated = scheme.ciphertext(good.parts[0])
    sealapi.Evaluator(scheme.context).negate_inplace(negated)
    empty = sealapi.Ciphertext(scheme.context)
    empty.resize(scheme.context, 2)
    for hostile in (negated, empty):
        with tempfile.NamedTemporaryFile() as file:
            hostile.save(file.name)
            written = Path(file.name).read_bytes()
        with pytest.raises(AggregationError, match="SEAL|not encrypted"):
            SERVER.combine([good, Payload(kind=good.kind, header=good.header, parts=(written,))])


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory in KiB, as Linux reports it")
def test_a_decompression_bomb_is_refused_without_allocating_memory() -> None:
    """8000 zstd blocks of four bytes, each of which expands to 128 KiB of zeros."""
    good = DEVICE.protect(torch.zeros(5), 0)
    block = ((131072 << 3) | 2).to_bytes(3, "little") + b"\0"
    last = ((131072 << 3) | 3).to_bytes(3, "little") + b"\0"
    frame = bytes.fromhex("28b52ffd0038") + 7999 * block + last
    bomb = good.parts[0][:8] + struct.pack("<Q", 16 + len(frame)) + frame
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AggregationError):
        SERVER.combine([Payload(kind=good.kind, header=good.header, parts=(bomb,))])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_values_that_are_not_finite_never_leave_the_device() -> None:
    """Nothing is encrypted, nothing is returned."""
    with pytest.raises(AggregationError, match="not finite"):
        DEVICE.protect(torch.tensor([0.0, float("nan")]), 0)


def test_a_key_file_is_private_and_gives_the_same_key(tmp_path: Path) -> None:
    """Mode 0600, never overwritten, refused if others may read it, and it decrypts the same sums."""
    path = tmp_path / "device.key"
    KEYS.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = HomomorphicDevice(CONFIG, AGREEMENT, HomomorphicKeys.load(path))
    total = SERVER.combine([DEVICE.protect(update, 0) for update in _updates(2, 5)])
    assert torch.equal(again.reveal(total), DEVICE.reveal(total))
    with pytest.raises(ConfigError, match="never overwritten"):
        KEYS.save(path)
    if os.name == "posix":
        path.chmod(0o640)
        with pytest.raises(AggregationError, match="chmod 600"):
            HomomorphicKeys.load(path)
    with pytest.raises(AggregationError, match="cannot read"):
        HomomorphicKeys.load(tmp_path / "absent.key")


def test_without_in_memory_files_temporary_files_are_used_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS; the temporary folder is empty afterwards, also after a refusal."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keys = HomomorphicKeys.make(CONFIG, AGREEMENT)
    device = HomomorphicDevice(CONFIG, AGREEMENT, keys)
    update = torch.tensor([0.1, -0.1, 0.0])
    payload = device.protect(update, 0)
    opened = device.reveal(SERVER.combine([payload, device.protect(update, 0)]))
    assert opened == pytest.approx(2 * update, rel=1e-6)
    with pytest.raises(AggregationError):
        SERVER.combine([Payload(kind=payload.kind, header=payload.header, parts=(b"broken",))])
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_keys_are_refused() -> None:
    """Truncated, flipped, of another kind, or for other settings."""
    written = KEYS.to_bytes()
    for hostile in (b"", written[:60], written[:-1], b"XXXX" + written[4:], written[:-1] + b"\0"):
        with pytest.raises(AggregationError):
            HomomorphicKeys.from_bytes(hostile)
    with pytest.raises(AggregationError, match="other settings"):
        HomomorphicDevice(HomomorphicConfig(bits=12), AGREEMENT, KEYS)
    noise = HomomorphicKeys(parameters=KEYS.parameters, secret=b"not a key")
    with pytest.raises(AggregationError, match="SEAL"):
        HomomorphicDevice(CONFIG, AGREEMENT, noise)


def test_repr_of_a_key_or_a_payload_does_not_show_its_content() -> None:
    """Logs are not private."""
    assert "secret" not in repr(KEYS)
    assert "parts" not in repr(DEVICE.protect(torch.zeros(2), 0))
