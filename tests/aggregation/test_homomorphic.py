"""Homomorphically encrypted sums are exact sums of integers, the server cannot decrypt them, and invalid input is
refused.
"""

from __future__ import annotations

import math
import os
import resource
import stat
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from fedface.aggregation.homomorphic import EncryptedRing, HomomorphicKeys, Scheme
from fedface.aggregation.masked import read_message
from fedface.aggregation.payload import (
    AggregationParameters,
    Exchange,
    HomomorphicConfig,
    Payload,
    SumContext,
)
from fedface.aggregation.protocols import DeviceKeys, device_sum, server_sum
from fedface.aggregation.rehearsal import rehearse, rehearse_protocol
from fedface.errors import AggregationError, ConfigError

CONFIG = HomomorphicConfig(bits=16)
PUBLIC = HomomorphicConfig(bits=16, public_key=True)
AGREEMENT = AggregationParameters(value_range=0.1, max_devices=8)
KEYS = HomomorphicKeys.make(CONFIG, AGREEMENT)
DEVICE = EncryptedRing(CONFIG, AGREEMENT, KEYS)
SERVER = EncryptedRing(CONFIG, AGREEMENT)


def _updates(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [-R, R], shape (count, length)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, length, generator=generator) * 2 - 1) * AGREEMENT.value_range


def _sent(update: torch.Tensor, device: EncryptedRing = DEVICE) -> bytes:
    """One update, encrypted."""
    return device.send(device.to_ring(update), len(update))


def _total(sent: list[bytes], length: int) -> bytes:
    """Their sum at the server."""
    adder = SERVER.adder(length)
    for each in sent:
        adder.add(each)
    return adder.to_bytes()


def _opened(total: bytes, length: int, count: int) -> torch.Tensor:
    """What a device decrypts, as the server reads it."""
    written = DEVICE.write(DEVICE.decrypt(total, length))
    return SERVER.from_ring(SERVER.read(written, length), length, count)


def _with(sent: bytes, **header: int | float | str) -> bytes:
    payload = Payload.from_bytes(sent)
    return Payload(kind=payload.kind, header={**payload.header, **header}, parts=payload.parts).to_bytes()


def _of_parts(sent: bytes, *parts: bytes) -> bytes:
    payload = Payload.from_bytes(sent)
    return Payload(kind=payload.kind, header=payload.header, parts=parts).to_bytes()


@pytest.mark.parametrize("length", [1, 12287, 12288, 12289, 30000])
def test_the_decrypted_sum_is_the_exact_sum_of_the_integers(length: int) -> None:
    """Compared with a plain sum of the integers, through the wire format, around the capacity of one ciphertext."""
    updates = _updates(8, length)
    opened = _opened(_total([_sent(update) for update in updates], length), length, 8)
    quantiser = SERVER.scheme.quantiser
    integers = np.sum([quantiser.quantise(update) for update in updates], axis=0)
    assert torch.equal(opened, quantiser.dequantise_sum(integers, 8))


def test_the_largest_and_smallest_possible_sums_are_exact() -> None:
    """Every coordinate at R, then at -R, from the maximum number of devices."""
    for edge in (AGREEMENT.value_range, -AGREEMENT.value_range):
        update = torch.full((12287,), edge)
        opened = _opened(_total([_sent(update)] * 8, 12287), 12287, 8)
        assert opened == pytest.approx(torch.full((12287,), 8 * edge), rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    bits=st.integers(2, 24),
    most=st.sampled_from([3, 16, 17, 1000, 1 << 20]),
    public=st.booleans(),
    gone=st.integers(0, 1),
)
def test_a_whole_sum_agrees_with_the_plain_one_within_half_a_step_for_each_device(
    bits: int, most: int, public: bool, gone: int
) -> None:
    """For all packings that fit both kinds of keys, with masks, and if a device is lost before it sends its vector."""
    agreement = AggregationParameters(value_range=0.1, max_devices=min(most, 1 << (38 - bits)))
    update = _updates(1, 50, bits)[0]
    absent = {"masked": frozenset({2})} if gone else {}
    done = rehearse_protocol(
        HomomorphicConfig(bits=bits, public_key=public),
        agreement,
        update,
        3,
        absent,  # type: ignore[arg-type]
    )
    step = 0.1 / ((1 << (bits - 1)) - 1)
    assert done.result.count == 3 - gone
    assert (done.result.total - (3 - gone) * update).abs().max() <= (3 - gone) * step / 2 + 1e-7


@pytest.mark.parametrize("config", [CONFIG, PUBLIC])
def test_whoever_has_the_secret_key_reads_uniform_numbers_of_an_upload_and_of_the_sum(
    config: HomomorphicConfig,
) -> None:
    """Every device's vector is zero; slots decrypted from one upload and from the sum pass for uniform below t."""
    length, count = 30_000, 3
    keys = HomomorphicKeys.make(config, AGREEMENT)
    context = SumContext(run="r", round=1, sum_of="updates", model="", terms="", cohort=count)
    devices = {}
    for member in range(count):
        own = keys if member == 0 else keys.for_others()
        signing = DeviceKeys(signing=Ed25519PrivateKey.generate(), encryption=own)
        devices[member] = device_sum(config, AGREEMENT, signing, context)
    server = server_sum(config, AGREEMENT, context, length)
    seen: dict[str, bytes] = {}

    @dataclass
    class Watched:
        """A device whose answers are kept."""

        device: Any

        def __getattr__(self, name: str) -> Any:
            return getattr(self.device, name)

        def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes], stored: bytes) -> bytes:
            answer: bytes = self.device.answer(exchange, requests, stored)
            seen[exchange] = read_message(answer, exchange, None, length=length, round=1)[0]
            return answer

    watched: Any = {member: Watched(device) for member, device in devices.items()}
    done = rehearse(server, watched, lambda member: torch.zeros(length), 1)
    assert done.result.total.abs().max() == 0
    holder = EncryptedRing(config, AGREEMENT, keys)
    t = holder.scheme.plain_modulus
    for slots in (holder.decrypt(seen["masked"], length), holder.read(seen["decrypt"], length)):
        assert len(set(slots.tolist())) == len(slots)
        shares = np.histogram(slots.astype(float) / t, bins=10, range=(0, 1))[0] / len(slots)
        assert np.abs(shares - 0.1).max() < 6 * math.sqrt(0.09 / len(slots))


def test_with_a_public_key_the_other_devices_cannot_decrypt() -> None:
    """What they get has no secret key; it has the same name, so that the server sees one key."""
    keys = HomomorphicKeys.make(PUBLIC, AGREEMENT)
    others = HomomorphicKeys.from_bytes(keys.for_others().to_bytes())
    assert others.secret == b"" and others.name == keys.name
    holder, other = EncryptedRing(PUBLIC, AGREEMENT, keys), EncryptedRing(PUBLIC, AGREEMENT, others)
    assert holder.decrypts and not other.decrypts
    update = _updates(1, 40)[0]
    sent = _sent(update, other)
    with pytest.raises(AggregationError, match="no secret key"):
        other.decrypt(sent, 40)
    assert np.array_equal(holder.decrypt(sent, 40), holder.to_ring(update))
    assert KEYS.for_others() == KEYS


def test_masks_modulo_t_are_undone_and_hide_every_slot() -> None:
    """Added and subtracted; alone they are below t, and words of the keystream that are not below t are skipped."""
    for bits in (2, 11, 16, 24):
        ring = EncryptedRing(HomomorphicConfig(bits=bits), AGREEMENT)
        slots = ring.to_ring(_updates(1, 5000)[0])
        masked = slots.copy()
        ring.add_mask(masked, bytes(32))
        assert int(masked.max()) < ring.scheme.plain_modulus and (masked != slots).mean() > 0.99
        ring.add_mask(masked, bytes(32), subtract=True)
        assert np.array_equal(masked, slots)
    stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 6000))
    t, words = ring.scheme.plain_modulus, np.frombuffer(stream, "<u8")
    below = [word & ((1 << t.bit_length()) - 1) for word in words.tolist()]
    mask = np.zeros(5000, np.uint64)
    ring.add_mask(mask, bytes(32))
    assert mask.tolist() == [word for word in below if word < t][:5000]


def test_all_parameters_have_headroom_for_the_sum_and_the_worst_noise() -> None:
    """t exceeds the largest packed sum, and 2 t n e stays below q, with SEAL's own 128-bit check passed."""
    q = 1099511480321 * 4294828033
    for bits, public in ((2, False), (8, True), (11, False), (16, True), (20, True), (24, False)):
        for most in (1, 8, 16, 17, 1000, 1 << 20):
            scheme = Scheme(
                config=HomomorphicConfig(bits=bits, public_key=public),
                agreement=AggregationParameters(value_range=1.0, max_devices=most),
            )
            largest = scheme.quantiser.largest_sum
            width = scheme.quantiser.sum_bits
            packed = sum(largest << (width * i) for i in range(scheme.packing.per_slot))
            assert packed < scheme.plain_modulus
            assert 2 * scheme.plain_modulus * most * (300 if public else 22) < q
            assert scheme.context.parameters_set()
            assert scheme.context.first_context_data().total_coeff_modulus_bit_count() == 72
            assert scheme.context.key_context_data().total_coeff_modulus_bit_count() == 109


def test_the_same_update_encrypts_differently_each_time() -> None:
    """Otherwise the server would recognise what was sent twice."""
    update = _updates(1, 10)[0]
    assert Payload.from_bytes(_sent(update)).parts != Payload.from_bytes(_sent(update)).parts


def test_a_payload_reveals_nothing_about_the_update_but_its_length() -> None:
    """Zeros and the largest values: equal headers, and equal mean sizes (one size varies by 1.3 percent)."""
    zeros = [_sent(torch.zeros(12287)) for _ in range(64)]
    edges = [_sent(torch.full((12287,), 0.1)) for _ in range(64)]
    assert Payload.from_bytes(zeros[0]).header == Payload.from_bytes(edges[0]).header
    sizes = [np.mean([len(sent) for sent in group]) for group in (zeros, edges)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.012)  # five standard errors


def test_the_server_has_no_key_and_can_neither_encrypt_nor_decrypt() -> None:
    """It is built from public parameters only."""
    total = _total([_sent(update) for update in _updates(2, 5)], 5)
    with pytest.raises(AggregationError, match="no secret key"):
        SERVER.decrypt(total, 5)
    with pytest.raises(AggregationError, match="no key"):
        SERVER.send(SERVER.to_ring(torch.zeros(5)), 5)
    with pytest.raises(AggregationError, match="got none"):
        device_sum(CONFIG, AGREEMENT, DeviceKeys(signing=Ed25519PrivateKey.generate()))


def test_another_key_decrypts_nothing() -> None:
    """Its name does not match; with a forged name, SEAL's noise budget is zero."""
    other = EncryptedRing(CONFIG, AGREEMENT, HomomorphicKeys.make(CONFIG, AGREEMENT))
    total = _total([_sent(update) for update in _updates(2, 5)], 5)
    with pytest.raises(AggregationError, match="encrypted with key"):
        other.decrypt(total, 5)
    with pytest.raises(AggregationError, match="noise budget"):
        other.decrypt(_with(total, key=other.key), 5)
    with pytest.raises(AggregationError, match="the others with"):
        _total([_sent(torch.zeros(5)), _sent(torch.zeros(5), other)], 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenseal", "0.3.15"),
        ("bits", 12),
        ("public_key", 1),
        ("value_range", 0.2),
        ("max_devices", 9),
        ("format", 3),
        ("format", 2.0),
        ("parameters", "0" * 64),
    ],
)
def test_a_payload_of_other_parameters_or_another_tenseal_is_refused_by_name(
    name: str, value: int | float | str
) -> None:
    """TenSEAL versions cannot read each other, and SEAL's own error would come later and be less clear."""
    with pytest.raises(AggregationError, match=name):
        _total([_sent(torch.zeros(5)), _with(_sent(torch.zeros(5)), **{name: value})], 5)


def test_truncated_damaged_and_foreign_parts_are_refused() -> None:
    """SEAL validates what it loads, after our limit on its size; the sum stays as it was."""
    update = _updates(1, 20000)[0]
    good = _sent(update)
    first, second = Payload.from_bytes(good).parts
    adder = SERVER.adder(20000)
    adder.add(good)
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
            adder.add(_of_parts(good, *parts))
    for hostile in (_sent(torch.zeros(20001)), DEVICE.write(DEVICE.to_ring(update)), b""):
        with pytest.raises(AggregationError):
            adder.add(hostile)
    assert torch.equal(_opened(adder.to_bytes(), 20000, 1), _opened(_total([good], 20000), 20000, 1))


def test_transparent_ciphertexts_are_refused() -> None:
    """An upload that cancels another, and one that is not encrypted: both could be read without a key."""
    scheme = SERVER.scheme
    good = _sent(torch.zeros(5))
    negated = scheme.ciphertext(Payload.from_bytes(good).parts[0])
    sealapi.Evaluator(scheme.context).negate_inplace(negated)
    empty = sealapi.Ciphertext(scheme.context)
    empty.resize(scheme.context, 2)
    for hostile in (negated, empty):
        with tempfile.NamedTemporaryFile() as file:
            hostile.save(file.name)
            written = Path(file.name).read_bytes()
        with pytest.raises(AggregationError, match="SEAL|not encrypted"):
            _total([good, _of_parts(good, written)], 5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory in KiB, as Linux reports it")
def test_a_decompression_bomb_is_refused_without_allocating_memory() -> None:
    """8000 zstd blocks of four bytes, each of which expands to 128 KiB of zeros."""
    good = _sent(torch.zeros(5))
    block = ((131072 << 3) | 2).to_bytes(3, "little") + b"\0"
    last = ((131072 << 3) | 3).to_bytes(3, "little") + b"\0"
    frame = bytes.fromhex("28b52ffd0038") + 7999 * block + last
    bomb = Payload.from_bytes(good).parts[0][:8] + struct.pack("<Q", 16 + len(frame)) + frame
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AggregationError):
        _total([_of_parts(good, bomb)], 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_values_that_are_not_finite_never_leave_the_device() -> None:
    """Nothing is encrypted, nothing is returned."""
    with pytest.raises(AggregationError, match="not finite"):
        DEVICE.to_ring(torch.tensor([0.0, float("nan")]))


def test_a_key_file_is_private_and_gives_the_same_key(tmp_path: Path) -> None:
    """Mode 0600, never overwritten, refused if others may read it, and it decrypts the same sums."""
    path = tmp_path / "device.key"
    KEYS.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = EncryptedRing(CONFIG, AGREEMENT, HomomorphicKeys.load(path))
    total = _total([_sent(update) for update in _updates(2, 5)], 5)
    assert np.array_equal(again.decrypt(total, 5), DEVICE.decrypt(total, 5))
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
    update = torch.tensor([0.1, -0.1, 0.0])
    keys = HomomorphicKeys.make(CONFIG, AGREEMENT)
    device = EncryptedRing(CONFIG, AGREEMENT, keys)
    total = _total([_sent(update, device), _sent(update, device)], 3)
    opened = SERVER.from_ring(device.decrypt(total, 3), 3, 2)
    assert opened == pytest.approx(2 * update, rel=1e-6)
    with pytest.raises(AggregationError):
        _total([_of_parts(_sent(update), b"broken")], 3)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_keys_are_refused() -> None:
    """Truncated, flipped, of another kind, or for other settings."""
    written = KEYS.to_bytes()
    for hostile in (b"", written[:60], written[:-1], b"XXXX" + written[4:], written[:-1] + b"\0"):
        with pytest.raises(AggregationError):
            HomomorphicKeys.from_bytes(hostile)
    with pytest.raises(AggregationError, match="other settings"):
        EncryptedRing(HomomorphicConfig(bits=12), AGREEMENT, KEYS)
    noise = HomomorphicKeys(parameters=KEYS.parameters, secret=b"not a key")
    with pytest.raises(AggregationError, match="SEAL"):
        EncryptedRing(CONFIG, AGREEMENT, noise)


def test_repr_of_a_key_or_a_payload_does_not_show_its_content() -> None:
    """Logs are not private."""
    assert "secret" not in repr(KEYS)
    assert "parts" not in repr(Payload.from_bytes(_sent(torch.zeros(2))))
