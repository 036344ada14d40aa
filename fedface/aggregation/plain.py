"""Plain sums: each update is sent as float32, and the server can read it.

Only here can a rule look at single updates: the median or trimmed mean of each coordinate (Yin, Chen, Ramchandran and
Bartlett 2018, arXiv 1803.01498) bounds what fewer than half of the devices, or than `trim` of them, can do.

The baseline for encrypted sums, which must agree with it up to quantisation. Use it where noise is added on the
device, or where devices and server have one owner.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedface.aggregation.payload import Exchange, Payload, PlainConfig, same_shape
from fedface.aggregation.quantisation import finite_vector
from fedface.aggregation.sums import Request, SumResult
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

KIND = PlainConfig().kind
FORMAT = 1
LARGEST = 1e3  # public ranges; numbers of other sums are clamped to 1
_TYPES: dict[int, str] = {4: "<f4", 8: "<f8"}  # bytes per value: an update, a sum


def _payload(values: np.ndarray, *, width: int, round: int, count: int) -> Payload:
    header = {"format": FORMAT, "length": len(values), "round": round, "count": count, "width": width}
    return Payload(kind=KIND, header=header, parts=(values.astype(_TYPES[width]).tobytes(),))


def _values(payload: Payload) -> np.ndarray:
    """The numbers of a payload, float64, shape (d,). Raises AggregationError if they do not fit its header."""
    payload.whole("format", least=FORMAT, most=FORMAT)
    width = payload.whole("width", least=4, most=8)
    if width not in _TYPES:
        raise AggregationError(f"a plain payload has 4 or 8 bytes per value, got {width}")
    want = width * payload.length
    if len(payload.parts) != 1 or len(payload.parts[0]) != want:
        sizes = [len(part) for part in payload.parts[:4]]
        raise AggregationError(
            f"a plain payload of length {payload.length} has one part of {want} bytes, got {sizes}"
        )
    values: np.ndarray = np.frombuffer(payload.parts[0], dtype=_TYPES[width]).astype(np.float64)
    if not np.isfinite(values).all():
        raise AggregationError("a plain payload has values that are not finite; exclude that device")
    return values


@dataclass(frozen=True, kw_only=True)
class PlainAggregation:
    """Sum float32 updates in float64.

    Guarantees:
        * The sum of n updates is their exact sum up to one float32 rounding of the result, as long as the
          values of a coordinate lie within a factor 2^29 / n of each other: float64 adds them exactly then.
        * At most `max_devices` updates enter one sum, as under every other protocol.
    """

    max_devices: int  # >= 1

    def __post_init__(self) -> None:
        if self.max_devices < 1:
            raise ValueError(f"max_devices must be >= 1, got {self.max_devices}")

    def protect(self, update: Vector, round: int) -> Payload:
        """The update as little-endian float32, unencrypted. Raises AggregationError if not finite."""
        values = finite_vector(update.float()).numpy()
        return _payload(values, width=4, round=round, count=1)

    def combine(self, payloads: Sequence[Payload]) -> Payload:
        """The sum in float64, so that sums of sums lose no digits.

        Raises AggregationError: no payloads, too many, or different lengths or rounds.
        """
        length, round, count = same_shape(payloads, KIND)
        if count > self.max_devices:
            raise AggregationError(f"at most {self.max_devices} updates may be in one sum, got {count}")
        total = np.zeros(length)
        for payload in payloads:
            total += _values(payload)
        return _payload(total, width=8, round=round, count=count)

    def reveal(self, total: Payload) -> Vector:
        """The sum, float32, shape (d,). Raises AggregationError if the payload does not fit its header."""
        same_shape([total], KIND)
        return torch.from_numpy(_values(total).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class PlainDevice:
    """A device's side of a plain sum: what it sends is what it stores, and nothing follows."""

    plain: PlainAggregation

    def protect(self, update: Vector, round: int) -> Payload:
        """The update as it is sent. Raises AggregationError if it is not finite."""
        return self.plain.protect(update, round)

    def opening(self, stored: bytes) -> bytes:
        """The same."""
        return stored

    def closed(self, stored: bytes) -> bytes:
        """The same."""
        return stored

    def check_terms(self, stored: bytes) -> None:
        """Replies are checked against the policy when they are requested."""

    def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes], stored: bytes) -> bytes:
        """Raises AggregationError: nothing follows."""
        raise AggregationError(f"sums of this run have no exchange {exchange!r}")


def combine_robustly(updates: np.ndarray, config: PlainConfig) -> np.ndarray:
    """The median, trimmed mean or mean of updates (n, d) in each coordinate, times n as a sum would be: (d,).

    The trimmed mean leaves out floor(trim * n) values at each end.
    """
    count = len(updates)
    if config.rule == "median":
        center: np.ndarray = np.median(updates, axis=0)
    else:
        out = math.floor(config.trim * count) if config.rule == "trimmed-mean" else 0
        center = np.sort(updates, axis=0)[out : count - out].mean(axis=0)
    return count * center


class PlainServer:
    """The server's side: adds payloads as they arrive; it stores them only for a rule that needs them all."""

    def __init__(self, plain: PlainAggregation, round: int, length: int, config: PlainConfig) -> None:
        """Combine payloads of that round and length."""
        self._plain, self._round, self._length, self._config = plain, round, length, config
        self._total: Payload | None = None
        self._updates: list[np.ndarray] = []
        self._members: set[int] = set()
        self._seen: set[tuple[str, bytes]] = set()

    def accept(self, member: int, payload: Payload, device: str) -> None:
        """Add a payload. Raises AggregationError, and leaves the sum as it was, if it cannot be added."""
        if (payload.round, payload.length, payload.count) != (self._round, self._length, 1):
            raise AggregationError(
                f"expected one update of round {self._round} with {self._length} weights, got {payload.count} of "
                f"round {payload.round} with {payload.length}"
            )
        largest = float(self._plain.reveal(payload).abs().max())
        if largest > LARGEST:
            raise AggregationError(
                f"expected numbers of about one public range, {LARGEST:.0f} at most, got {largest:.3g}"
            )
        # One update must count once: two programs with one state folder send one stored reply. Two devices of other
        # names may send the same numbers.
        content = device, hashlib.sha256(payload.parts[0]).digest()
        if content in self._seen:
            raise AggregationError(
                "another device sent the same bytes: if two programs use one state folder, stop one"
            )
        if self._config.rule != "mean":
            self._updates.append(_values(payload))
        self._total = self._plain.combine([payload] if self._total is None else [self._total, payload])
        self._members.add(member)
        self._seen.add(content)

    def close(self) -> Mapping[int, str]:
        """All that arrived are in the sum."""
        return {}

    def exchanges(self) -> Iterator[Request]:
        """None."""
        return iter(())

    def result(self) -> SumResult:
        """The sum, or what the rule gives in its place."""
        assert self._total is not None
        total = self._plain.reveal(self._total)
        if self._updates:
            robust = combine_robustly(np.stack(self._updates), self._config)
            total = torch.from_numpy(robust.astype(np.float32))
        return SumResult(total=total, members=frozenset(self._members), count=self._total.count)
