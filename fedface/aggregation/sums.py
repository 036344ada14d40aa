"""One sum, whatever protects it, as its devices and its server see it.

A device first sends the result of training or evaluation (`opening`, `accept`). What follows depends on the protocol:
nothing for plain sums, four exchanges for masked ones (masked.py), and one more for homomorphic ones. The server's
side is a state machine, which coordinator/aggregate.py drives; a device answers each exchange for one request only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedface.aggregation.payload import Exchange, Payload
from fedface.tensor_types import Vector


class DeviceSum(Protocol):
    """The device's side of one sum."""

    def protect(self, update: Vector, round: int) -> Payload:
        """What the device stores: one update, shape (d,), in public ranges, with count 1.

        Raises AggregationError before anything leaves if the update is not finite or not a vector.
        """

    def opening(self, stored: bytes) -> bytes:
        """What is sent as the result of training or evaluation; it follows from what is stored."""

    def closed(self, stored: bytes) -> bytes:
        """What the device stores instead once it has answered the last exchange."""

    def check_terms(self, stored: bytes) -> None:
        """Raises AggregationError if the owner has changed the policy since a vector was computed that has not left."""

    def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes], stored: bytes) -> bytes:
        """The answer to one exchange.

        Args:
            exchange: Which one.
            requests: What was asked in it and in those before it.
            stored: What `protect` returned, as bytes.

        Raises AggregationError if nothing may be sent.
        """


@dataclass(frozen=True, kw_only=True)
class Request:
    """One exchange: what to ask of each member, and where the answers go."""

    exchange: Exchange
    contents: Mapping[int, bytes]  # by member
    # The answer of a member, as it arrives; raises AggregationError to leave it out.
    receive: Callable[[int, bytes], None]


@dataclass(frozen=True, kw_only=True)
class SumResult:
    """A sum."""

    total: Vector  # float32, (d,), in public ranges
    members: frozenset[int]  # whose vectors are in it
    count: int  # of vectors in it; a member that has gone since is counted and not named


class ServerSum(Protocol):
    """One sum at the server, from the first answer to the last."""

    def accept(self, member: int, payload: Payload, device: str) -> None:
        """Take the result of a member with the name `device`. Raises AggregationError with what is wrong with it."""

    def close(self) -> Mapping[int, str]:
        """No further results come; the members whose results cannot be in the sum after all, and why."""

    def exchanges(self) -> Iterator[Request]:
        """The exchanges that follow; the next is made from the answers to the one before.

        Raises AggregationError if no sum can be revealed.
        """

    def result(self) -> SumResult:
        """The sum, after all exchanges."""
