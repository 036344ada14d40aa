"""Homomorphic sums: masked vectors that are also encrypted; the server adds ciphertexts, and a device decrypts the sum.

The only module that imports TenSEAL; the server's `EncryptedRing` is built without a key. The scheme is BFV (Brakerski
2012, ePrint 2012/078; Fan and Vercauteren 2012, ePrint 2012/144) in Microsoft SEAL: degree 4096, coefficient primes of
40 + 32 + 37 bits, which SEAL's own table accepts for 128-bit security. Not CKKS: a decrypted CKKS sum contains the
encryption noise, from which the key can be recovered once it is published (Li and Micciancio 2021, ePrint 2020/1533); a
BFV sum is an exact integer.

The plaintexts are masked (masked.py), modulo the plain modulus t, so the key alone opens nothing: neither for a device
that sees another's upload, nor for a server that has obtained the key, nor for the device that decrypts. And without
the key an upload stays closed even if more devices collude than the masks bear. There are two kinds of keys:

    * shared: all devices have one secret key; ciphertexts are symmetric and seeded, half as large. It protects from
      whoever has no device: those who record traffic, today or with a quantum computer, which breaks X25519.
    * public (`public_key: true`): devices encrypt with a public key, one of them alone has the secret key. It protects
      also from a server that follows the protocol and colludes with any number of other devices.

A malicious server can have one ciphertext decrypted in each round, and one chosen ciphertext can reveal a BFV key
(Chenal and Tang 2014); then the masks remain. What a sum reveals is another matter: encryption without noise is not
privacy.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tenseal
from tenseal import sealapi

from fedface.aggregation.masked import Residues, keystream, quantiser
from fedface.aggregation.payload import (
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainValue,
)
from fedface.aggregation.quantisation import Packing, Quantiser
from fedface.atomic_io import create_bytes
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

KIND = HomomorphicConfig().kind
FORMAT = 2
SLOTS = 4096  # polynomial degree, and slots that one ciphertext adds at once
PRIME_BITS = (40, 32, 37)  # the last prime is for keys only: ciphertexts live modulo the first two, 72 bits
MAX_PLAIN_BITS = 60  # SEAL's bound on the plain modulus
# The noise of a fresh ciphertext: SEAL samples in -21..21; rounding q m / t adds at most 1/2.
MAX_ERROR = 22
# With a public key SEAL encrypts modulo all three primes and divides by the last, which leaves a rounding error of at
# most 1/2 in each coefficient, times the ternary secret key: by Hoeffding above 300 with probability below 2^-60.
MAX_ERROR_PUBLIC = 300
MAX_PART_BYTES = 2 * 2 * 8 * SLOTS + 1024  # two polynomials, two primes, 8 bytes a coefficient
KEY_MAGIC = b"FFK2"
MAX_KEY_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")


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
        * A sum of n = `max_devices` honest updates fits its slots and decrypts exactly, as 2 t n e < q where e is the
          largest noise of a ciphertext: always with a shared key, and with a public key but for a probability below
          2^-60 in each coefficient.
    """

    config: HomomorphicConfig
    agreement: AggregationParameters

    def __post_init__(self) -> None:
        _ = self.context  # fail at construction, not at first use

    @cached_property
    def quantiser(self) -> Quantiser:
        """The grid that updates are rounded to."""
        return quantiser(self.config, self.agreement)

    @cached_property
    def _coefficient_primes(self) -> list[Any]:
        return list(sealapi.CoeffModulus.Create(SLOTS, list(PRIME_BITS)))

    @cached_property
    def _room(self) -> tuple[int, Any]:
        """(values per slot, plain modulus t): as many values as fit, then the smallest t that holds them."""
        width = self.quantiser.sum_bits
        primes = [int(prime.value()) for prime in self._coefficient_primes]
        q = primes[0] * primes[1]
        error = MAX_ERROR_PUBLIC if self.config.public_key else MAX_ERROR
        for per_slot in range(MAX_PLAIN_BITS // width, 0, -1):
            largest = sum(self.quantiser.largest_sum << (width * place) for place in range(per_slot))
            for bits in range(max(per_slot * width, 20), min(per_slot * width + 3, MAX_PLAIN_BITS + 1)):
                modulus = sealapi.PlainModulus.Batching(SLOTS, bits)
                t = int(modulus.value())
                exact = 2 * t * self.agreement.max_devices * error < q
                if largest < t and exact and t not in primes:
                    return per_slot, modulus
        raise AggregationError(f"sums of {width} bits do not fit a slot; lower bits or max_devices")

    @cached_property
    def packing(self) -> Packing:
        """How integers share the slots of a ciphertext."""
        return Packing(width=self.quantiser.sum_bits, per_slot=self._room[0])

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
            "public_key": int(self.config.public_key),
        }
        named["value_range"] = float(self.agreement.value_range)
        named["max_devices"] = self.agreement.max_devices
        primes = [str(prime.value()) for prime in self._coefficient_primes]
        derived = [SLOTS, primes, str(self.plain_modulus), self.packing.per_slot]
        written = json.dumps([named, derived], sort_keys=True).encode()
        return {**named, "parameters": hashlib.sha256(written).hexdigest()}

    def read(self, sent: bytes, length: int) -> tuple[str, list[Any]]:
        """The name of the key and the ciphertexts of untrusted bytes, a vector (length,) or a sum of such.

        Raises AggregationError for other parameters, another length, or what is not an ordinary ciphertext.
        """
        payload = Payload.from_bytes(sent)
        if payload.kind != KIND or payload.length != length:
            raise AggregationError(
                f"expected {length} encrypted weights, got a {payload.kind} payload of {payload.length}"
            )
        for name, ours in self.public.items():
            theirs = payload.header.get(name)
            if theirs != ours or type(theirs) is not type(ours):
                problem = f"this payload has {name} {theirs!r}, this run has {ours!r}"
                raise AggregationError(f"{problem}; use the same versions and settings on both sides")
        key = payload.header.get("key")
        if not isinstance(key, str):
            raise AggregationError("an encrypted payload must name its key")
        want = -(-self.packing.slots_for(length) // SLOTS)
        if len(payload.parts) != want:
            raise AggregationError(f"{length} weights take {want} parts, got {len(payload.parts)}")
        return key, [self.ciphertext(part) for part in payload.parts]

    def payload(self, key: str, parts: tuple[bytes, ...], length: int) -> Payload:
        """A payload with this scheme's header, under the key of that name."""
        return Payload(kind=KIND, header={**self.public, "key": key, "length": length}, parts=parts)

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
    """What devices need to encrypt, and with the secret key to decrypt; the server must never see it.

    Generated by one device and transferred to the others over a channel that the server can neither read nor change.
    `repr` does not show the secret. Python cannot wipe memory: anyone who reads a device's memory has the key.
    """

    parameters: str  # the hash of the scheme it belongs to
    secret: bytes = field(repr=False, default=b"")
    public: bytes = field(repr=False, default=b"")  # empty: the secret key encrypts, and every device has it

    @staticmethod
    def make(config: HomomorphicConfig, agreement: AggregationParameters) -> HomomorphicKeys:
        """New keys; SEAL takes its randomness from the operating system."""
        scheme = Scheme(config=config, agreement=agreement)
        generator = sealapi.KeyGenerator(scheme.context)
        public = sealapi.PublicKey()
        if config.public_key:
            generator.create_public_key(public)
        return HomomorphicKeys(
            parameters=str(scheme.public["parameters"]),
            secret=_saved(generator.secret_key()),
            public=_saved(public) if config.public_key else b"",
        )

    def for_others(self) -> HomomorphicKeys:
        """What the other devices get: the public key, or the shared one."""
        return replace(self, secret=b"") if self.public else self

    @property
    def name(self) -> str:
        """A public name: 16 hex digits of a hash of the key that every device has."""
        return hashlib.sha256(b"fedface key name" + (self.public or self.secret)).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """The SECRET key as bytes: magic, parameter hash, SHA-256, both keys. Never send this to the server."""
        body = _LENGTH.pack(len(self.secret)) + self.secret + self.public
        return KEY_MAGIC + bytes.fromhex(self.parameters) + hashlib.sha256(body).digest() + body

    @staticmethod
    def from_bytes(written: bytes) -> HomomorphicKeys:
        """Inverse of `to_bytes`. Raises AggregationError if the bytes are damaged or not a key."""
        if not 72 < len(written) <= MAX_KEY_BYTES or written[:4] != KEY_MAGIC:
            raise AggregationError(f"this is not a fedface key: expected {KEY_MAGIC!r} first")
        parameters, digest, body = written[4:36], written[36:68], written[68:]
        if hashlib.sha256(body).digest() != digest:
            raise AggregationError("this key is damaged or truncated; copy it again from the original")
        end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
        return HomomorphicKeys(
            parameters=parameters.hex(), secret=body[_LENGTH.size : end], public=body[end:]
        )

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


class EncryptedRing:
    """Integers modulo the plain modulus t, several updates' values in each, sent as ciphertexts.

    A `Ring` of masked sums (masked.py).
    """

    encrypted: ClassVar[bool] = True

    def __init__(
        self,
        config: HomomorphicConfig,
        agreement: AggregationParameters,
        keys: HomomorphicKeys | None = None,
    ) -> None:
        """Without keys it is the server's. Raises AggregationError if the keys are for other parameters."""
        self.scheme = Scheme(config=config, agreement=agreement)
        self.key, self._encryptor, self._decryptor = "", None, None
        if keys is None:
            return
        if keys.parameters != self.scheme.public["parameters"]:
            raise AggregationError(f"key {keys.name} is for other settings or versions; make a new key")
        context, self.key = self.scheme.context, keys.name
        if keys.public:
            public = _load(sealapi.PublicKey(), context, keys.public, "public key")
            self._encryptor = sealapi.Encryptor(context, public)
        if keys.secret:
            secret = _load(sealapi.SecretKey(), context, keys.secret, "key")
            self._decryptor = sealapi.Decryptor(context, secret)
            if not keys.public:
                self._encryptor = sealapi.Encryptor(context, secret)

    @property
    def decrypts(self) -> bool:
        """Whether this device has the secret key."""
        return self._decryptor is not None

    def to_ring(self, update: Vector) -> Residues:
        """Quantise and pack an update (d,), weight units; coordinates outside [-R, R] are clamped."""
        return self.scheme.packing.pack(self.scheme.quantiser.quantise(update)).astype(np.uint64)

    def from_ring(self, total: Residues, length: int, count: int) -> Vector:
        """The sum of `count` updates, exact up to count * step / 2. Raises AggregationError for an impossible one."""
        integers = self.scheme.packing.unpack(total.astype(np.int64), length)
        return self.scheme.quantiser.dequantise_sum(integers, count)

    def read(self, written: bytes, length: int) -> Residues:
        """Inverse of `write`. Raises AggregationError for another length, or a number that is not below t."""
        slots = np.frombuffer(written, dtype="<u8") if len(written) % 8 == 0 else np.zeros(0, np.uint64)
        if (
            len(slots) != self.scheme.packing.slots_for(length)
            or int(slots.max()) >= self.scheme.plain_modulus
        ):
            raise AggregationError(f"expected {self.scheme.packing.slots_for(length)} slots below t")
        return slots.astype(np.uint64)

    def write(self, residues: Residues) -> bytes:
        """8 bytes each."""
        return residues.astype("<u8").tobytes()

    def add_mask(self, total: Residues, key: bytes, *, subtract: bool = False) -> None:
        """Add, in place, those words of the AES-256-CTR keystream that are below t, cut to as many bits as t has."""
        t, at = np.uint64(self.scheme.plain_modulus), 0
        bits = np.uint64((1 << self.scheme.plain_modulus.bit_length()) - 1)
        for words in keystream(key, "<u8"):
            below = words & bits
            below = below[below < t][: len(total) - at]
            part = total[at : at + len(below)]
            part += t - below if subtract else below
            part -= np.where(part >= t, t, np.uint64(0))
            at += len(below)
            if at == len(total):
                return

    def send(self, masked: Residues, length: int) -> bytes:
        """Encrypted, under the key's name. Raises AggregationError without a key."""
        if self._encryptor is None:
            raise AggregationError("the server has no key and cannot encrypt an update; ask a device")
        encoder, plain = sealapi.BatchEncoder(self.scheme.context), sealapi.Plaintext()
        parts = []
        for start in range(0, len(masked), SLOTS):
            encoder.encode(masked[start : start + SLOTS].tolist(), plain)
            if self.scheme.config.public_key:
                ciphertext = sealapi.Ciphertext(self.scheme.context)
                self._encryptor.encrypt(plain, ciphertext)
            else:
                ciphertext = self._encryptor.encrypt_symmetric(plain)
            parts.append(_saved(ciphertext))
        return self.scheme.payload(self.key, tuple(parts), length).to_bytes()

    def adder(self, length: int) -> CiphertextAdder:
        """Needs no key."""
        return CiphertextAdder(self.scheme, length)

    def decrypt(self, total: bytes, length: int) -> Residues:
        """A sum of masked vectors, uint64 below t, uniformly random.

        Raises AggregationError: no secret key, another key or other parameters, no noise budget left.
        """
        if self._decryptor is None:
            raise AggregationError("this device has no secret key, so it decrypts no sum")
        key, parts = self.scheme.read(total, length)
        if key != self.key:
            raise AggregationError(f"this sum is encrypted with key {key}, this device has {self.key}")
        encoder, plain = sealapi.BatchEncoder(self.scheme.context), sealapi.Plaintext()
        slots: list[int] = []
        for part in parts:
            if self._decryptor.invariant_noise_budget(part) <= 0:
                raise AggregationError("no noise budget is left: a damaged sum, or too many additions")
            self._decryptor.decrypt(part, plain)
            slots += encoder.decode_uint64(plain)
        return np.array(slots[: self.scheme.packing.slots_for(length)], dtype=np.uint64)


class CiphertextAdder:
    """The encrypted sum, at the server."""

    def __init__(self, scheme: Scheme, length: int) -> None:
        self._scheme, self._length = scheme, length
        self._evaluator = sealapi.Evaluator(scheme.context)
        self._key, self._total = "", list[Any]()

    def add(self, sent: bytes) -> None:
        """Raises AggregationError, and leaves the sum as it was, for what no `EncryptedRing` of this run sends."""
        key, parts = self._scheme.read(sent, self._length)
        if self._total and key != self._key:
            raise AggregationError(f"encrypted with key {key}, the others with {self._key}")
        self._total = [*map(self._added, self._total, parts)] if self._total else parts
        self._key = key

    def _added(self, one: Any, other: Any) -> Any:
        total = sealapi.Ciphertext(self._scheme.context)
        try:
            self._evaluator.add(one, other, total)
        except (RuntimeError, ValueError) as reason:  # two uploads whose sum is a transparent ciphertext
            raise AggregationError(f"SEAL cannot add these uploads: {reason}") from reason
        return total

    def to_bytes(self) -> bytes:
        """As one device sends its vector."""
        return self._scheme.payload(self._key, tuple(map(_saved, self._total)), self._length).to_bytes()
