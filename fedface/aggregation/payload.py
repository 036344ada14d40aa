"""The settings of sums, and the payload that a device sends to be summed.

A payload is untrusted, so `Payload.from_bytes` checks everything: every length is bounded and exact, the header is flat
JSON, and any deviation is an AggregationError.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NoReturn, TypeAlias

from fedface.errors import AggregationError
from fedface.privacy.policy import Purpose
from fedface.validation import Above, AtLeast, In, checked

PlainValue: TypeAlias = int | float | str

MAGIC = b"FFP1"
MAX_HEADER_BYTES = 4096
MAX_HEADER_KEYS = 64
MAX_PARTS = 1 << 16
MAX_BYTES = 1 << 31  # Flower carries at most 2 GiB in one message
MAX_WEIGHTS = 1 << 30
_FRONT = struct.Struct(">4s32sII")  # magic, SHA-256 of everything after the digest, header bytes, parts
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, kw_only=True)
@checked
class AggregationParameters:
    """The public numbers that every device and the server of one run share.

    None of them may be computed from photos: the range is derived from the run's constants, for example the
    clip norm, or learning rate times steps.
    """

    # R, weight units; a coordinate outside [-R, R] is clamped on the device.
    value_range: Annotated[float, Above(0)]
    max_devices: Annotated[int, In(f"[1, {1 << 20}]")]  # how many updates may be in one sum


SumOf = Literal["updates", "metrics"]
# "decrypt": of homomorphic sums alone.
Exchange = Literal["shares", "masked", "survivors", "decrypt", "reveal"]


@dataclass(frozen=True, kw_only=True)
class SumContext:
    """What one sum is of."""

    run: str
    round: int
    sum_of: SumOf
    model: str  # hash of the weights that the round began with
    terms: str  # hash of everything else that the devices were asked for
    cohort: int  # how many devices were asked

    @cached_property
    def digest(self) -> bytes:
        """SHA-256, 32 bytes."""
        content = [self.run, self.round, self.sum_of, self.model, self.terms, self.cohort]
        return hashlib.sha256(json.dumps(content).encode()).digest()


@dataclass(frozen=True, kw_only=True)
@checked
class PlainConfig:
    """Unencrypted float32: the server sees every update, so it can use a rule that dishonest devices move less."""

    kind: ClassVar[str] = "plain"

    # How updates are combined; metrics are always summed.
    rule: Literal["mean", "median", "trimmed-mean"] = "mean"
    # Of "trimmed-mean": share of the devices left out at each end.
    trim: Annotated[float, In("(0, 0.5)")] = 0.2


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Of sums whose vectors have masks that cancel in the sum."""

    bits: Annotated[int, In("[2, 24]")] = 16  # for one value of one device
    min_devices: Annotated[int, AtLeast(2)] = 2  # a sum of fewer vectors is not revealed
    # Share of the devices that may drop out; None: a third of fewer than 40, a tenth of more.
    dropout_share: Annotated[float, In("[0, 0.5)")] | None = None
    corrupt_share: Annotated[float, In("[0, 0.5)")] = 0.1  # of the devices, which may collude with the server


@dataclass(frozen=True, kw_only=True)
@checked
class MaskedConfig(MaskSettings):
    """Integers modulo 2^32 under masks; no one has a key."""

    kind: ClassVar[str] = "masked"


@dataclass(frozen=True, kw_only=True)
@checked
class HomomorphicConfig(MaskSettings):
    """Integers under masks, which are also encrypted (BFV) with a key that the server never has."""

    kind: ClassVar[str] = "homomorphic"

    # Devices encrypt with a public key, and only a device with the secret key decrypts; otherwise all share one key.
    public_key: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnerTerms:
    """What the owner of a device allows of its masked vectors."""

    smallest_cohort: int = 1  # fewest vectors in a sum
    digest: str = ""  # of everything else that was allowed when a vector was computed


AggregationConfig: TypeAlias = PlainConfig | MaskedConfig | HomomorphicConfig


def fewest_summed(config: AggregationConfig, cohort: int) -> int:
    """The fewest updates that the sum of a round may contain, if `cohort` devices are asked."""
    return cohort if isinstance(config, PlainConfig) else min(cohort, config.min_devices)


def corrupt_share(config: AggregationConfig) -> float:
    """The share of the devices that may collude with the server while masks hold; 0 without masks."""
    return config.corrupt_share if isinstance(config, MaskSettings) else 0.0


def purpose_of(config: AggregationConfig, cohort: int, objective: str) -> Purpose:
    """What a run asks of a device's policy, if `cohort` devices are asked."""
    return Purpose(fewest_summed(config, cohort), config.kind, objective, corrupt_share(config))


def _refuse(problem: str) -> NoReturn:
    raise AggregationError(f"this payload cannot be read: {problem}; ask its sender for a new one")


def _is_plain(value: object) -> bool:
    # A bool is an int in Python, and NaN is not equal to itself: neither is allowed in a header.
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return type(value) is str or (type(value) is float and math.isfinite(value))


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One message of the protocol: a flat public header and opaque parts.

    Every header has `length` (d, the number of weights), `count` (how many updates are summed in it) and
    `round`; the protocol named by `kind` adds its own entries. The header is public and unsigned: it detects mistakes,
    and no secret may depend on it.
    """

    kind: str  # "plain", "masked", or "homomorphic" for what is encrypted
    header: Mapping[str, PlainValue]  # flat; 64-bit integers, finite floats, strings
    parts: tuple[bytes, ...] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", dict(self.header))
        if type(self.kind) is not str or not 1 <= len(self.kind) <= 32:
            _refuse("its kind is not a short string")
        if len(self.header) > MAX_HEADER_KEYS:
            _refuse(f"its header has {len(self.header)} keys, more than {MAX_HEADER_KEYS}")
        for name, value in self.header.items():
            if type(name) is not str or not _is_plain(value):
                _refuse(f"its header entry {name!r} is not a 64-bit integer, a finite float or a string")
        if len(self.parts) > MAX_PARTS:
            _refuse(f"it has {len(self.parts)} parts, more than {MAX_PARTS}")

    def whole(self, name: str, *, least: int, most: int) -> int:
        """The header's integer `name`, which must lie in least..most. Raises AggregationError."""
        value = self.header.get(name)
        if type(value) is not int:
            raise AggregationError(f"the payload's header needs an integer {name!r}, got {value!r}")
        if not least <= value <= most:
            raise AggregationError(f"the payload's {name} must lie in {least}..{most}, got {value}")
        return value

    @property
    def length(self) -> int:
        """d, the number of weights, 1..2^30. Raises AggregationError if it is missing."""
        return self.whole("length", least=1, most=MAX_WEIGHTS)

    @property
    def count(self) -> int:
        """The number of summed updates according to the header, >= 1."""
        return self.whole("count", least=1, most=1 << 20)

    @property
    def round(self) -> int:
        """The round this belongs to, >= 0."""
        return self.whole("round", least=0, most=(1 << 31) - 1)

    def _header_bytes(self) -> bytes:
        flat = {"kind": self.kind, "header": dict(self.header)}
        return json.dumps(flat, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def nbytes(self) -> int:
        """The length of `to_bytes()`, in bytes, without building it."""
        return _FRONT.size + len(self._header_bytes()) + sum(_LENGTH.size + len(part) for part in self.parts)

    def to_bytes(self) -> bytes:
        """The wire form: magic, SHA-256, lengths, JSON header, then each part behind its length.

        The digest detects corruption, not tampering: anyone who can change a payload can change the digest.
        """
        header = self._header_bytes()
        if len(header) > MAX_HEADER_BYTES:
            _refuse(f"its header takes {len(header)} bytes, more than {MAX_HEADER_BYTES}")
        if self.nbytes > MAX_BYTES:
            _refuse(f"it takes {self.nbytes} bytes, more than {MAX_BYTES}")
        pieces = [header]
        for part in self.parts:
            pieces += [_LENGTH.pack(len(part)), part]
        body = b"".join(pieces)
        lengths = struct.pack(">II", len(header), len(self.parts))
        return _FRONT.pack(MAGIC, _digest(lengths, body), len(header), len(self.parts)) + body

    @staticmethod
    def from_bytes(wire: bytes) -> Payload:
        """Parse an untrusted payload. Nothing in it is executed.

        Raises:
            AggregationError: Truncated, longer than announced, damaged, or with an invalid header.
        """
        if not _FRONT.size <= len(wire) <= MAX_BYTES:
            _refuse(f"expected {_FRONT.size}..{MAX_BYTES} bytes, got {len(wire)}")
        magic, digest, header_bytes, parts_count = _FRONT.unpack_from(wire)
        if magic != MAGIC:
            _refuse(f"it starts with {magic!r} instead of {MAGIC!r}")
        if header_bytes > MAX_HEADER_BYTES or parts_count > MAX_PARTS:
            _refuse(f"it announces {header_bytes} bytes of header and {parts_count} parts")
        body = memoryview(wire)[_FRONT.size :]
        if _digest(bytes(wire[_FRONT.size - 8 : _FRONT.size]), body) != digest:
            _refuse("its bytes are damaged or truncated")
        kind, header = _read_header(bytes(body[:header_bytes]), header_bytes)
        parts, at = [], header_bytes
        for _ in range(parts_count):
            if at + _LENGTH.size > len(body):
                _refuse("it ends before its last part")
            (size,) = _LENGTH.unpack_from(body, at)
            at += _LENGTH.size
            if at + size > len(body):
                _refuse("it ends inside a part")
            parts.append(bytes(body[at : at + size]))
            at += size
        if at != len(body):
            _refuse(f"{len(body) - at} bytes follow its last part")
        return Payload(kind=kind, header=header, parts=tuple(parts))


def _digest(lengths: bytes, body: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(lengths)
    digest.update(body)
    return digest.digest()


def _pairs_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _read_header(text: bytes, announced: int) -> tuple[str, dict[str, PlainValue]]:
    if len(text) != announced:
        _refuse("it ends inside its header")
    try:
        flat = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs_once)
    except (ValueError, RecursionError):
        _refuse("its header is not JSON")
    if type(flat) is not dict or set(flat) != {"kind", "header"} or type(flat["header"]) is not dict:
        _refuse("its header is not of the form {kind, header}")
    return flat["kind"], flat["header"]  # Payload checks each entry


def same_shape(payloads: Sequence[Payload], kind: str) -> tuple[int, int, int]:
    """Check that payloads of one kind belong to one sum; returns (length d, round, summed count).

    Raises AggregationError: no payloads, another kind, or other lengths or rounds among them.
    """
    if not payloads:
        raise AggregationError("there are no payloads to sum; wait for at least one device")
    for payload in payloads:
        if payload.kind != kind:
            raise AggregationError(f"this run sums {kind!r} payloads, got {payload.kind!r}")
    lengths = sorted({payload.length for payload in payloads})
    rounds = sorted({payload.round for payload in payloads})
    if len(lengths) != 1:
        raise AggregationError(f"payloads of one sum must have one length, got {lengths}")
    if len(rounds) != 1:
        raise AggregationError(f"payloads of one sum must be of one round, got {rounds}")
    return lengths[0], rounds[0], sum(payload.count for payload in payloads)
