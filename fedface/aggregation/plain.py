"""Plain sums: each update is sent as float32, and the server can read it.

The baseline for encrypted sums, which must agree with it up to quantisation. Use it where noise is added on the
device, or where devices and server have one owner. There is no key, so anyone can `reveal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedface.aggregation.payload import Payload, PlainConfig, same_shape
from fedface.aggregation.quantisation import finite_vector
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

KIND = PlainConfig().kind
FORMAT = 1
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
        """The sum in float64, so that sums of sums lose no digits. Raises AggregationError; see Aggregation."""
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
