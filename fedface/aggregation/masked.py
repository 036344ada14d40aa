"""Masked sums: what device and server share of secure aggregation (Bonawitz et al. 2017, ePrint 2017/281).

Each device adds to its integers a mask of its own and one mask for each of its partners, with opposite signs; the
partners' masks cancel in the sum. Masks are uniform in the ring of the integers, so one masked vector is as well.
The partners form a sparse graph (Bell et al. 2020, ePrint 2020/704; mask_graph.py). Integers are modulo 2^32, or, in
homomorphic sums, modulo the plain modulus of an encryption in which they are also sent (homomorphic.py).

The exchanges of one sum, each a request to every device that is still there:

    keys       with the result of training: two fresh public keys (X25519), signed by the device (Ed25519)
    shares     the list of participants -> Shamir shares of the device's two secrets, encrypted to its partners
    masked     the list of those who gave shares, and the partners' -> the masked vector, and a signature of the list
    survivors  the list of those whose vector arrived -> a signature of it
    decrypt    homomorphic sums: to one device with the secret key, the encrypted sum -> the sum, still masked
    reveal     the signatures -> of each survivor the share of its own mask, of each other one that of its masking key

The masks depend on what the sum is of (`payload.SumContext`) and on both lists, so devices that were sent different
models, terms or lists add masks that do not cancel (Pasquini et al. 2022, arXiv:2111.07380). A device answers each
exchange of a round for one request only, so there is one list of survivors, and of each device one of the two secrets
is revealed, never both. A partner reveals a survivor's own mask only if that survivor has signed the list that the
partner knows: otherwise the server could tell one device that all its partners have gone, so that it adds no mask but
its own.

What is assumed: at most `MaskGraph.corrupt` of the participants collude with the server. The server says which devices
exist: one that makes up more participants than that can open the sum of the others.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedface.aggregation.mask_graph import MaskGraph, mask_graph
from fedface.aggregation.payload import (
    AggregationParameters,
    Exchange,
    MaskedConfig,
    MaskSettings,
    Payload,
    PlainValue,
    SumContext,
    same_shape,
)
from fedface.aggregation.quantisation import Quantiser, finite_vector
from fedface.aggregation.shamir import SHARE_BYTES
from fedface.codec import encode
from fedface.errors import AggregationError
from fedface.privacy.distributed_noise import RING_BITS, DistributedNoise, from_sum, noised_integers
from fedface.privacy.plan import DPParameters
from fedface.tensor_types import Vector

KIND = MaskedConfig().kind
EXCHANGES: tuple[Exchange, ...] = ("shares", "masked", "survivors", "reveal")  # with every device
SUM_KEY, DECRYPTS = "sum_key", "decrypts"  # in the header of the keys, where vectors are sent encrypted
KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_PARTICIPANTS = 1 << 14
_AT_ONCE = 1 << 16  # bytes of a mask that stay in the processor's cache
_KEYS = struct.Struct(f">{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s32sI{SIGNATURE_BYTES}s")
_COUNT = struct.Struct(">I")
_SEALED = f">I{2 + 2 * SHARE_BYTES + 16}s"  # index, then number and both shares with a tag of 16 bytes
SEALED = struct.Struct(_SEALED)
GIVEN = struct.Struct(f"{_SEALED}32s32s")  # the same, then what each share is checked against
SHARE = struct.Struct(f">I2s{SHARE_BYTES}s")  # of whom, its number, the share
SIGNATURE = struct.Struct(f">I{SIGNATURE_BYTES}s")

Residues = np.ndarray  # unsigned integers, shape (n,): elements of the ring of a sum


class Adder(Protocol):
    """Adds masked vectors as devices send them."""

    def add(self, sent: bytes) -> None:
        """Raises AggregationError, and leaves the sum as it was, for a vector that cannot be added."""

    def to_bytes(self) -> bytes:
        """The sum of all, as one vector is sent."""


class Ring(Protocol):
    """How vectors of one sum become integers, are masked, sent and added."""

    def to_ring(self, update: Vector) -> Residues:
        """An update (d,) on the grid. Raises AggregationError if it is not a non-empty finite float vector."""

    def from_ring(self, total: Residues, length: int, count: int) -> Vector:
        """The sum of `count` updates, float32, (length,). Raises AggregationError if it is not a possible one."""

    def read(self, written: bytes, length: int) -> Residues:
        """Inverse of `write`, for vectors (length,). Raises AggregationError."""

    def write(self, residues: Residues) -> bytes:
        """Little-endian."""

    def add_mask(self, total: Residues, key: bytes, *, subtract: bool = False) -> None:
        """Add to `total`, in place, a uniformly random mask that follows from a key that is used once."""

    def send(self, masked: Residues, length: int) -> bytes:
        """A masked vector as it leaves the device."""

    def adder(self, length: int) -> Adder:
        """For vectors (length,), at the server."""

    encrypted: ClassVar[bool]  # whether vectors are sent encrypted, so that the sum must be decrypted

    @property
    def key(self) -> str:
        """The public name of the key with which a device encrypts; empty without one."""

    @property
    def decrypts(self) -> bool:
        """Whether this device has the secret key."""

    def decrypt(self, total: bytes, length: int) -> Residues:
        """The sum that an `Adder` gave, still masked. Raises AggregationError without the secret key."""


def digest(*parts: bytes) -> bytes:
    """SHA-256 over parts of any length, each behind its length."""
    return hashlib.sha256(b"".join(_COUNT.pack(len(part)) + part for part in parts)).digest()


def settings(*values: object) -> bytes:
    """SHA-256 of public settings, such as the aggregation of a run."""
    return digest(json.dumps(encode(list(values)), sort_keys=True).encode())


def derive(secret: bytes, purpose: bytes, *bound_to: bytes) -> bytes:
    """A key of 32 bytes for one purpose (HKDF with SHA-256, RFC 5869), bound to public bytes."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=digest(b"fedface", purpose, *bound_to)).derive(secret)


def shared_secret(private: X25519PrivateKey, public: bytes) -> bytes:
    """Raises AggregationError for a public key without a shared secret."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise AggregationError("a participant's public key is of small order; exclude that device") from error


def public_bytes(private: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    """The public key, 32 bytes."""
    return private.public_key().public_bytes_raw()


@dataclass(frozen=True, kw_only=True)
class KeyMessage:
    """The keys of one device for one sum, and the smallest sum that its owner admits."""

    device: bytes  # its long-term public key, Ed25519
    encryption: bytes  # X25519: shares to this device
    masking: bytes  # X25519: masks with this device
    own_mask: bytes  # digest of the secret of its own mask, against which that is checked
    smallest_cohort: int
    signature: bytes = b""

    def _signed(self, context: SumContext) -> bytes:
        smallest = _COUNT.pack(self.smallest_cohort)
        return digest(
            b"fedface keys",
            context.digest,
            self.device,
            self.encryption,
            self.masking,
            self.own_mask,
            smallest,
        )

    def sign(self, signing: Ed25519PrivateKey, context: SumContext) -> KeyMessage:
        """The same with this device's signature."""
        return KeyMessage(**(vars(self) | {"signature": signing.sign(self._signed(context))}))

    def check(self, context: SumContext) -> None:
        """Raises AggregationError unless the device signed these keys for this sum."""
        verify(
            self.device,
            self.signature,
            self._signed(context),
            "the keys of a participant are not signed by it",
        )

    def to_bytes(self) -> bytes:
        """Fixed length."""
        return _KEYS.pack(
            self.device, self.encryption, self.masking, self.own_mask, self.smallest_cohort, self.signature
        )

    @staticmethod
    def from_bytes(written: bytes) -> KeyMessage:
        """Inverse of `to_bytes`; raises AggregationError for another length."""
        if len(written) != _KEYS.size:
            raise AggregationError(f"keys of a participant take {_KEYS.size} bytes, got {len(written)}")
        device, encryption, masking, own_mask, smallest, signature = _KEYS.unpack(written)
        return KeyMessage(
            device=device,
            encryption=encryption,
            masking=masking,
            own_mask=own_mask,
            smallest_cohort=smallest,
            signature=signature,
        )


def verify(public: bytes, signature: bytes, content: bytes, problem: str) -> None:
    """Raises AggregationError with the problem unless this is the key's signature of the content."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError) as error:
        raise AggregationError(problem) from error


@dataclass(frozen=True, kw_only=True)
class Participants:
    """The devices of one sum, by ascending long-term key; elsewhere each is its index here."""

    context: SumContext
    config: MaskSettings
    keys: tuple[KeyMessage, ...]

    def __post_init__(self) -> None:
        devices = [each.device for each in self.keys]
        if not 2 <= len(devices) <= MAX_PARTICIPANTS:
            raise AggregationError(f"a masked sum needs 2 to {MAX_PARTICIPANTS} devices, got {len(devices)}")
        if devices != sorted(set(devices)):
            raise AggregationError("the participants must be ascending, each once")
        if len({key for each in self.keys for key in (each.encryption, each.masking)}) != 2 * len(devices):
            raise AggregationError("two participants have one key")

    def to_bytes(self) -> bytes:
        """The list as a request."""
        return b"".join(each.to_bytes() for each in self.keys)

    @staticmethod
    def from_bytes(written: bytes, context: SumContext, config: MaskSettings) -> Participants:
        """Inverse of `to_bytes`; the signatures are not checked here. Raises AggregationError."""
        if len(written) > _KEYS.size * MAX_PARTICIPANTS:
            raise AggregationError("this list of participants is too long")
        keys = tuple(
            KeyMessage.from_bytes(written[at : at + _KEYS.size]) for at in range(0, len(written), _KEYS.size)
        )
        return Participants(context=context, config=config, keys=keys)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the list and of what the sum is of."""
        return digest(b"participants", self.context.digest, settings(self.config), self.to_bytes())

    @cached_property
    def graph(self) -> MaskGraph:
        """How many partners and which threshold a list of this length has.

        As many participants may collude as `fedface plan` says of all that were asked, however short the list is. Of a
        list that is longer than the server said, as many as of so many.

        Raises AggregationError if a list as short as this cannot bear so many.
        """
        config = self.config
        planned = mask_graph(
            max(self.context.cohort, len(self.keys)),
            corrupt_share=config.corrupt_share,
            dropout_share=config.dropout_share,
        )
        return mask_graph(len(self.keys), corrupt=planned.corrupt, dropout_share=config.dropout_share)

    @property
    def fewest(self) -> int:
        """How many devices must survive and sign."""
        return self.graph.signatures

    @property
    def smallest_cohort(self) -> int:
        """The smallest sum that every participant's owner admits."""
        return max(self.config.min_devices, *(each.smallest_cohort for each in self.keys))

    def mask_key(self, secret: bytes, included: Members, one: int, other: int) -> bytes:
        """The key of the mask that two participants share."""
        pair = (self.keys[index].device for index in sorted((one, other)))
        return derive(secret, b"mask", self.digest, included.written, *pair)

    def own_mask_key(self, secret: bytes, included: Members, own: int) -> bytes:
        """The key of a participant's own mask."""
        return derive(secret, b"own mask", self.digest, included.written, self.keys[own].device)

    def sealing_key(self, private: X25519PrivateKey, sender: int, receiver: int, *, own: int) -> bytes:
        """The key under which one participant encrypts its shares to another; used for one message."""
        other = receiver if own == sender else sender
        secret = shared_secret(private, self.keys[other].encryption)
        return derive(secret, b"shares", self.digest, self.keys[sender].device, self.keys[receiver].device)

    def included_signed(self, included: Members) -> bytes:
        """What a participant signs of the list of those who gave shares."""
        return digest(b"fedface included", self.digest, included.written)

    def survivors_signed(self, included: Members, survivors: Members) -> bytes:
        """What a participant signs of the list of survivors."""
        return digest(b"fedface survivors", self.digest, included.written, survivors.written)

    def signers(self, written: bytes, content: bytes, problem: str) -> frozenset[int]:
        """The participants whose signatures these are. Raises AggregationError with the problem if one is wrong."""
        signed = entries(SIGNATURE, written, len(self.keys), most=len(self.keys))
        for index, (signature,) in signed.items():
            verify(self.keys[index].device, signature, content, problem)
        return frozenset(signed)

    def check_size(self) -> None:
        """Raises AggregationError if an owner demands a larger sum than of all participants."""
        if len(self.keys) < self.smallest_cohort:
            raise AggregationError(
                f"{len(self.keys)} devices gave keys, fewer than the {self.smallest_cohort} that an owner demands in a "
                "sum; nothing was sent"
            )

    def check_survivors(self, included: Members, survivors: Members) -> None:
        """Raises AggregationError if so few are left that a sum of them must not be revealed."""
        if not survivors.indices <= included.indices:
            raise AggregationError("a survivor was not among those that masked their vectors")
        least = max(self.fewest, self.smallest_cohort)
        if len(survivors.indices) < least:
            raise AggregationError(
                f"a sum of {len(survivors.indices)} devices is not revealed: at least {least} of these "
                f"{len(self.keys)} must survive"
            )


@dataclass(frozen=True, kw_only=True)
class Members:
    """Some of the participants, by index."""

    indices: frozenset[int]

    @cached_property
    def written(self) -> bytes:
        """Ascending, 4 bytes each."""
        return b"".join(map(_COUNT.pack, sorted(self.indices)))

    @staticmethod
    def from_bytes(written: bytes, count: int) -> Members:
        """Inverse of `written`, for indices below `count`. Raises AggregationError."""
        if len(written) % _COUNT.size:
            raise AggregationError("a list of participants is cut short")
        indices = [index for (index,) in _COUNT.iter_unpack(written)]
        if indices != sorted(set(indices)) or (indices and indices[-1] >= count):
            raise AggregationError("a list of participants must be ascending, each once")
        return Members(indices=frozenset(indices))


def entries(layout: struct.Struct, written: bytes, count: int, *, most: int) -> dict[int, tuple[bytes, ...]]:
    """Fixed-size entries that begin with a participant's index, by index. Raises AggregationError."""
    if len(written) % layout.size or len(written) > most * layout.size:
        raise AggregationError(
            f"expected at most {most} entries of {layout.size} bytes, got {len(written)} bytes"
        )
    found = [(index, tuple(rest)) for index, *rest in layout.iter_unpack(written)]
    if len(dict(found)) != len(found) or any(index >= count for index, _ in found):
        raise AggregationError("an entry is of an unknown participant, or there are two of one")
    return dict(found)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Integers modulo 2^32, with or without a share of distributed noise.

    Raises:
        AggregationError: A full sum does not fit the ring.
        PrivacyError: The noise of a full sum does not fit it.
    """

    config: MaskedConfig
    agreement: AggregationParameters
    dp: DPParameters | None = None  # whose noise may be distributed

    encrypted: ClassVar[bool] = False
    key: ClassVar[str] = ""
    decrypts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        bits = self._quantiser.sum_bits
        if bits > RING_BITS:
            raise AggregationError(
                f"sums of {self.agreement.max_devices} updates of {self.config.bits} bits take {bits} bits, more than "
                f"{RING_BITS}; lower bits"
            )

    @cached_property
    def _quantiser(self) -> Quantiser:
        return quantiser(self.config, self.agreement)

    def noise(self, length: int) -> DistributedNoise | None:
        """What devices add to vectors (length,), if noise is distributed. Raises PrivacyError if it does not fit."""
        return None if self.dp is None else DistributedNoise.of(self.dp, length, self.agreement.max_devices)

    def to_ring(self, update: Vector) -> Residues:
        """An update (d,) on the grid; where noise is distributed, with this device's share, hence once.

        Raises AggregationError if it is not a non-empty finite float vector.
        """
        noise = self.noise(len(finite_vector(update)))
        integers = self._quantiser.quantise(update) if noise is None else noised_integers(update, noise)
        return integers.astype(np.uint32)

    def from_ring(self, total: Residues, length: int, count: int) -> Vector:
        """The sum of `count` updates, float32, (length,). Raises AggregationError if it is not a possible one."""
        noise = self.noise(length)
        if noise is None:
            return self._quantiser.dequantise_sum(total.astype(np.int64), count)
        return from_sum(total.view(np.int32).astype(np.int64), noise)

    def read(self, written: bytes, length: int) -> Residues:
        """Inverse of `write`. Raises AggregationError for another length."""
        if len(written) != 4 * length:
            raise AggregationError(f"expected {length} masked numbers, got {len(written)} bytes")
        return np.frombuffer(written, dtype="<u4").astype(np.uint32)

    def write(self, residues: Residues) -> bytes:
        """4 bytes each."""
        return residues.astype("<u4").tobytes()

    def add_mask(self, total: Residues, key: bytes, *, subtract: bool = False) -> None:
        """Add, in place, the AES-256-CTR keystream under a key that is used once."""
        at = 0
        for words in keystream(key, "<u4"):
            part = total[at : at + len(words)]
            (np.subtract if subtract else np.add)(part, words[: len(part)], out=part)
            at += len(part)
            if at == len(total):
                return

    def send(self, masked: Residues, length: int) -> bytes:
        """As it is written."""
        return self.write(masked)

    def adder(self, length: int) -> Adder:
        """Adds modulo 2^32."""
        return _WordAdder(self, length)

    def decrypt(self, total: bytes, length: int) -> Residues:
        """Raises AggregationError: nothing is encrypted."""
        raise AggregationError("the vectors of this sum are not encrypted, so there is nothing to decrypt")


class _WordAdder:
    def __init__(self, ring: Words, length: int) -> None:
        self._ring, self._length = ring, length
        self._total = np.zeros(length, np.uint32)

    def add(self, sent: bytes) -> None:
        np.add(self._total, self._ring.read(sent, self._length), out=self._total)

    def to_bytes(self) -> bytes:
        return self._ring.write(self._total)


def quantiser(config: MaskSettings, agreement: AggregationParameters) -> Quantiser:
    """The grid of a sum's vectors."""
    return Quantiser(value_range=agreement.value_range, bits=config.bits, max_devices=agreement.max_devices)


def keystream(key: bytes, dtype: str) -> Iterator[np.ndarray]:
    """The AES-256-CTR keystream under a key, without end, as integers; each array is overwritten by the next."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(_AT_ONCE), bytearray(_AT_ONCE + 16)
    words = np.frombuffer(buffer, dtype=dtype, count=_AT_ONCE // np.dtype(dtype).itemsize)
    while True:
        stream.update_into(zeros, buffer)
        yield words


def asked_before(exchange: Exchange) -> tuple[Exchange, ...]:
    """What a device must have been asked before this."""
    return EXCHANGES[:3] if exchange == "decrypt" else EXCHANGES[: EXCHANGES.index(exchange)]


def message(exchange: str, *parts: bytes, length: int, round: int) -> Payload:
    """One message of a masked sum."""
    header: dict[str, PlainValue] = {"exchange": exchange, "length": length, "round": round, "count": 1}
    return Payload(kind=KIND, header=header, parts=parts)


def read_message(
    written: bytes, exchange: str, parts: int | None, *, length: int, round: int
) -> tuple[bytes, ...]:
    """The parts, so many unless None, of a message of this exchange, round and length. Raises AggregationError."""
    return message_parts(Payload.from_bytes(written), exchange, parts, length=length, round=round)


def message_parts(
    payload: Payload, exchange: str, parts: int | None, *, length: int, round: int
) -> tuple[bytes, ...]:
    """The same of a message that was read. Raises AggregationError."""
    found = payload.header.get("exchange"), *same_shape([payload], KIND), len(payload.parts)
    if found != (exchange, length, round, 1, len(payload.parts) if parts is None else parts):
        raise AggregationError(
            f"expected a message of the exchange {exchange!r} of round {round}, {parts} parts, vectors of {length}; "
            f"got {found}"
        )
    return payload.parts


def traffic(config: MaskSettings, devices: int, length: int, sent: int) -> tuple[int, int]:
    """Bytes that one device sends and receives for one sum of vectors (`length`,) without dropouts, beside the weights.

    A device receives as many shares as it gives, on average, and does not decrypt the sum.

    Args:
        sent: Bytes of one masked vector.
    """
    graph = mask_graph(devices, corrupt_share=config.corrupt_share, dropout_share=config.dropout_share)
    partners, everybody = graph.partners, _COUNT.size * devices
    signatures, senders = SIGNATURE.size * devices, SIGNATURE.size * partners
    up = (
        (_KEYS.size,),
        (GIVEN.size * partners,),
        (sent, SIGNATURE_BYTES),
        (SIGNATURE_BYTES,),
        (KEY_BYTES, SHARE.size * partners),
    )
    down = (_KEYS.size * devices,), (everybody, SEALED.size * partners), (everybody,), (signatures, senders)

    def size(exchanges: tuple[str, ...], parts: tuple[tuple[int, ...], ...]) -> int:
        named = zip(exchanges, parts, strict=True)
        return sum(message(name, *map(bytes, each), length=length, round=1).nbytes for name, each in named)

    return size(("keys", *EXCHANGES), up), size(EXCHANGES, down)
