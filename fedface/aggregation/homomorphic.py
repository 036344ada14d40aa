"""Homomorphically encrypted sums: the server adds ciphertexts, and only a key holder decrypts the sum.

The only module that imports TenSEAL; `HomomorphicServer` is built without a key. The scheme is BFV (Brakerski 2012,
ePrint 2012/078; Fan and Vercauteren 2012, ePrint 2012/144) in Microsoft SEAL: degree 4096, coefficient primes of 40 +
32 + 37 bits, which SEAL's own table accepts for 128-bit security, seeded symmetric ciphertexts. Not CKKS: a decrypted
CKKS sum contains the encryption noise, from which the key can be recovered once it is published (Li and Micciancio
2021, ePrint 2020/1533); a BFV sum is an exact integer.

What this does NOT protect against (see docs/secure-aggregation.md):
    * The devices share ONE secret key. Any device, or anyone who steals the key from one, can decrypt every upload
      that it sees. Uploads must go to the server over a separate encrypted channel (TLS).
    * A malicious server. It can send a key holder one device's upload, altered to look like the sum; the count inside
      the ciphertext detects mistakes, not attacks. The server must be at most honest-but-curious, and hold no key.
    * What the sum reveals. The server learns it after `reveal`; encryption without noise is not privacy.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
from tenseal import sealapi

from fedface.aggregation.payload import (
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainValue,
    same_shape,
)
from fedface.aggregation.quantisation import Packing, Quantiser
from fedface.atomic_io import create_bytes
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

KIND = HomomorphicConfig().kind
FORMAT = 1
SLOTS = 4096  # polynomial degree, and slots that one ciphertext adds at once
PRIME_BITS = (40, 32, 37)  # the last prime is for keys only: ciphertexts live modulo the first two, 72 bits
MAX_PLAIN_BITS = 60  # SEAL's bound on the plain modulus
MAX_ERROR = 22  # SEAL samples fresh noise in -21..21; rounding q m / t adds at most 1/2
MAX_PART_BYTES = 2 * 2 * 8 * SLOTS + 1024  # two polynomials, two primes, 8 bytes a coefficient
KEY_MAGIC = b"FFK1"
MAX_KEY_BYTES = 1 << 20


@contextmanager
def _private_file() -> Iterator[tuple[int, str]]:
    """A private file, as (descriptor, path), zeroed afterwards: SEAL's bindings require a path.

    On Linux it is an anonymous file in memory; elsewhere a temporary file of mode 0600.
    """
    nameless = hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()
    if nameless:
        descriptor = os.memfd_create("fedface", os.MFD_CLOEXEC)
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="fedface-")
    try:
        yield descriptor, path
    finally:
        try:
            os.pwrite(descriptor, bytes(os.fstat(descriptor).st_size), 0)
        finally:
            os.close(descriptor)
            if not nameless:
                os.unlink(path)


def _saved(thing: Any) -> bytes:
    with _private_file() as (descriptor, path):
        thing.save(path)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _load(thing: Any, context: Any, written: bytes, name: str) -> Any:
    """Parse untrusted bytes with SEAL, which checks them. Raises AggregationError with SEAL's reason."""
    with _private_file() as (descriptor, path):
        os.pwrite(descriptor, written, 0)
        try:
            thing.load(context, path)
        except (RuntimeError, ValueError, IndexError, MemoryError) as reason:
            raise AggregationError(f"SEAL does not accept this {name}: {reason}") from reason
    return thing


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The public parameters of one run's encryption, derived from the config and the agreement.

    Guarantees:
        * SEAL itself accepts the parameters at 128-bit security; otherwise this raises AggregationError.
        * A sum of n = `max_devices` honest updates fits its slots and decrypts exactly even in the worst
          case: 2 t n (21 + 1) < q.
    """

    config: HomomorphicConfig
    agreement: AggregationParameters

    def __post_init__(self) -> None:
        _ = self.context  # fail at construction, not at first use

    @cached_property
    def quantiser(self) -> Quantiser:
        """The grid that updates are rounded to."""
        value_range, max_devices = self.agreement.value_range, self.agreement.max_devices
        return Quantiser(value_range=value_range, bits=self.config.bits, max_devices=max_devices)

    @cached_property
    def _coefficient_primes(self) -> list[Any]:
        return list(sealapi.CoeffModulus.Create(SLOTS, list(PRIME_BITS)))

    @cached_property
    def _room(self) -> tuple[int, Any]:
        """(values per slot, plain modulus t): as many values as fit, then the smallest t that holds them."""
        width = self.quantiser.sum_bits
        primes = [int(prime.value()) for prime in self._coefficient_primes]
        q = primes[0] * primes[1]
        for per_slot in range(MAX_PLAIN_BITS // width, 0, -1):
            largest = sum(self.quantiser.largest_sum << (width * place) for place in range(per_slot))
            for bits in range(max(per_slot * width, 20), min(per_slot * width + 3, MAX_PLAIN_BITS + 1)):
                modulus = sealapi.PlainModulus.Batching(SLOTS, bits)
                t = int(modulus.value())
                exact = 2 * t * self.agreement.max_devices * MAX_ERROR < q
                if largest < t and exact and t not in primes:
                    return per_slot, modulus
        raise AggregationError(f"sums of {width} bits do not fit a slot; lower bits or max_devices")

    @cached_property
    def packing(self) -> Packing:
        """How integers share the slots of a ciphertext."""
        return Packing(width=self.quantiser.sum_bits, per_slot=self._room[0], slots=SLOTS)

    @property
    def plain_modulus(self) -> int:
        """t: a slot counts modulo this prime."""
        return int(self._room[1].value())

    @cached_property
    def context(self) -> Any:
        """SEAL's context. Raises AggregationError if SEAL's check for 128-bit security fails."""
        parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
        parameters.set_poly_modulus_degree(SLOTS)
        parameters.set_coeff_modulus(self._coefficient_primes)
        parameters.set_plain_modulus(self._room[1])
        context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise AggregationError(f"SEAL refuses these parameters: {context.parameters_error_message()}")
        return context

    @cached_property
    def public(self) -> dict[str, PlainValue]:
        """The header entries that every payload of this run must have."""
        named: dict[str, PlainValue] = {
            "format": FORMAT,
            "tenseal": tenseal.__version__,
            "bits": self.config.bits,
        }
        named["value_range"] = float(self.agreement.value_range)
        named["max_devices"] = self.agreement.max_devices
        primes = [str(prime.value()) for prime in self._coefficient_primes]
        derived = [SLOTS, primes, str(self.plain_modulus), self.packing.per_slot]
        written = json.dumps([named, derived], sort_keys=True).encode()
        return {**named, "parameters": hashlib.sha256(written).hexdigest()}

    def check(self, payload: Payload) -> None:
        """Raises AggregationError for a payload of other parameters or with the wrong number of parts."""
        for name, ours in self.public.items():
            theirs = payload.header.get(name)
            if theirs != ours or type(theirs) is not type(ours):
                problem = f"this payload has {name} {theirs!r}, this run has {ours!r}"
                raise AggregationError(f"{problem}; use the same versions and settings on both sides")
        if type(payload.header.get("key")) is not str:
            raise AggregationError("an encrypted payload must name its key")
        want = self.packing.parts_for(payload.length)
        if len(payload.parts) != want:
            raise AggregationError(f"{payload.length} weights take {want} parts, got {len(payload.parts)}")

    def payload(self, key: str, parts: tuple[bytes, ...], *, length: int, count: int, round: int) -> Payload:
        """A payload with this scheme's header, under the key of that name."""
        header = {**self.public, "key": key, "length": length, "count": count, "round": round}
        return Payload(kind=KIND, header=header, parts=parts)

    def ciphertext(self, part: bytes) -> Any:
        """Parse one untrusted ciphertext. Raises AggregationError unless it is an ordinary BFV pair."""
        if not 0 < len(part) <= MAX_PART_BYTES:
            raise AggregationError(f"a ciphertext takes 1..{MAX_PART_BYTES} bytes, got {len(part)}")
        ciphertext = _load(sealapi.Ciphertext(self.context), self.context, part, "ciphertext")
        another_level = list(ciphertext.parms_id()) != list(self.context.first_parms_id())
        if ciphertext.size() != 2 or ciphertext.is_ntt_form() or another_level:
            raise AggregationError("a part is a ciphertext of another kind than this run uses")
        if ciphertext.is_transparent():
            raise AggregationError("a part is not encrypted; exclude that device")
        return ciphertext


@dataclass(frozen=True, kw_only=True)
class HomomorphicKeys:
    """The secret that the devices of one run share and the server must never see.

    Generated by one device or by the owner of all, and transferred to the others over a channel that the server cannot
    read. `repr` does not show the secret. Python cannot wipe memory: anyone who reads a device's memory has the key.
    """

    parameters: str  # the hash of the scheme it belongs to
    secret: bytes = field(repr=False)

    @staticmethod
    def make(config: HomomorphicConfig, agreement: AggregationParameters) -> HomomorphicKeys:
        """A new secret key; SEAL takes its randomness from the operating system."""
        scheme = Scheme(config=config, agreement=agreement)
        secret_key = sealapi.KeyGenerator(scheme.context).secret_key()
        return HomomorphicKeys(parameters=str(scheme.public["parameters"]), secret=_saved(secret_key))

    @property
    def name(self) -> str:
        """A public name: 16 hex digits of a hash of the key."""
        return hashlib.sha256(b"fedface key name" + self.secret).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """The SECRET key as bytes: magic, parameter hash, SHA-256, key. Never send this to the server."""
        return KEY_MAGIC + bytes.fromhex(self.parameters) + hashlib.sha256(self.secret).digest() + self.secret

    @staticmethod
    def from_bytes(written: bytes) -> HomomorphicKeys:
        """Inverse of `to_bytes`. Raises AggregationError if the bytes are damaged or not a key."""
        if not 68 < len(written) <= MAX_KEY_BYTES or written[:4] != KEY_MAGIC:
            raise AggregationError(f"this is not a fedface key: expected {KEY_MAGIC!r} first")
        parameters, digest, secret = written[4:36], written[36:68], written[68:]
        if hashlib.sha256(secret).digest() != digest:
            raise AggregationError("this key is damaged or truncated; copy it again from the original")
        return HomomorphicKeys(parameters=parameters.hex(), secret=secret)

    def save(self, path: Path) -> None:
        """Write a new file that only its owner may read (mode 0600). Raises ConfigError if it exists."""
        create_bytes(path, self.to_bytes())

    @staticmethod
    def load(path: Path) -> HomomorphicKeys:
        """Read a key file. Raises AggregationError if it is missing, damaged, or others may read it."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                written = file.read(MAX_KEY_BYTES + 1)
        except OSError as reason:
            raise AggregationError(f"{path}: cannot read this key file: {reason.strerror}") from reason
        if os.name == "posix" and mode & 0o077:
            raise AggregationError(f"{path}: others may read this key; run chmod 600 on it")
        return HomomorphicKeys.from_bytes(written)


class HomomorphicServer:
    """Adds ciphertexts. It has no key, so `protect` and `reveal` raise AggregationError."""

    def __init__(self, config: HomomorphicConfig, agreement: AggregationParameters) -> None:
        self.scheme = Scheme(config=config, agreement=agreement)
        self._evaluator = sealapi.Evaluator(self.scheme.context)

    def protect(self, update: Vector, round: int) -> Payload:
        """Always raises AggregationError: the key is on the devices."""
        raise AggregationError("the server has no key and cannot protect an update; ask a device")

    def combine(self, payloads: Sequence[Payload]) -> Payload:
        """The encrypted sum. Raises AggregationError as Aggregation says, and for the same payload twice."""
        length, round, count = same_shape(payloads, KIND)
        for payload in payloads:
            self.scheme.check(payload)
        keys = sorted({str(payload.header["key"]) for payload in payloads})
        if len(keys) != 1:
            raise AggregationError(f"payloads of one sum must be encrypted with one key, got {keys}")
        if len({payload.parts[0] for payload in payloads}) != len(payloads):
            raise AggregationError("the same payload was given twice; sum each device once")
        if count > (most := self.scheme.agreement.max_devices):
            raise AggregationError(f"the packing has room for {most} updates in one sum, got {count}")
        parts = tuple(map(self._sum, zip(*(payload.parts for payload in payloads), strict=True)))
        return self.scheme.payload(keys[0], parts, length=length, count=count, round=round)

    def _sum(self, parts: Sequence[bytes]) -> bytes:
        total = self.scheme.ciphertext(parts[0])
        for part in parts[1:]:
            try:
                self._evaluator.add_inplace(total, self.scheme.ciphertext(part))
            except (RuntimeError, ValueError) as reason:  # two uploads whose sum is a transparent ciphertext
                raise AggregationError(f"SEAL cannot add these uploads: {reason}") from reason
        return _saved(total)

    def reveal(self, total: Payload) -> Vector:
        """Always raises AggregationError: the key is on the devices."""
        raise AggregationError("the server has no key and cannot reveal a sum; ask a device")


class HomomorphicDevice:
    """Encrypts this device's updates, and decrypts sums when the server asks it to."""

    def __init__(
        self, config: HomomorphicConfig, agreement: AggregationParameters, keys: HomomorphicKeys
    ) -> None:
        """Raises AggregationError if the key is for other parameters."""
        self._server = HomomorphicServer(config, agreement)
        self.scheme = self._server.scheme
        context = self.scheme.context
        if keys.parameters != self.scheme.public["parameters"]:
            raise AggregationError(f"key {keys.name} is for other settings or versions; make a new key")
        self.key_name = keys.name
        secret = _load(sealapi.SecretKey(), context, keys.secret, "key")
        self._encryptor = sealapi.Encryptor(context, secret)
        self._decryptor = sealapi.Decryptor(context, secret)
        self._encoder = sealapi.BatchEncoder(context)

    def protect(self, update: Vector, round: int) -> Payload:
        """Quantise, pack and encrypt one update (d,), weight units; coordinates outside [-R, R] are clamped."""
        integers = self.scheme.quantiser.quantise(update)
        parts = tuple(self._encrypt(slots) for slots in self.scheme.packing.pack(integers))
        return self.scheme.payload(self.key_name, parts, length=len(integers), count=1, round=round)

    def _encrypt(self, slots: np.ndarray) -> bytes:
        plain = sealapi.Plaintext()
        self._encoder.encode(slots.tolist(), plain)
        return _saved(self._encryptor.encrypt_symmetric(plain))

    def combine(self, payloads: Sequence[Payload]) -> Payload:
        """As on the server; the key is not used."""
        return self._server.combine(payloads)

    def reveal(self, total: Payload) -> Vector:
        """Decrypt a sum: float32, shape (d,), weight units, exact up to count * step / 2.

        Raises AggregationError: another key or other parameters, fewer updates than `min_devices`, no noise budget
        left, an encrypted count that differs from the header's, integers that no sum can have.
        """
        length, _, count = same_shape([total], KIND)
        self.scheme.check(total)
        if total.header["key"] != self.key_name:
            raise AggregationError(
                f"this sum is encrypted with key {total.header['key']}, this device has {self.key_name}"
            )
        slots = [self._decrypt(part) for part in total.parts]
        integers, counted = self.scheme.packing.unpack(np.array(slots, dtype=np.int64), length)
        if counted != count:
            raise AggregationError(f"the header counts {count} updates, the sum itself {counted}")
        if counted < (fewest := self.scheme.config.min_devices):
            raise AggregationError(f"sums of at least {fewest} updates are decrypted, this one has {counted}")
        return self.scheme.quantiser.dequantise_sum(integers, counted)

    def _decrypt(self, part: bytes) -> list[int]:
        ciphertext = self.scheme.ciphertext(part)
        if self._decryptor.invariant_noise_budget(ciphertext) <= 0:
            raise AggregationError("no noise budget is left: a damaged sum, or too many additions")
        plain = sealapi.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return list(self._encoder.decode_uint64(plain))
