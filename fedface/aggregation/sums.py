"""One sum, whatever protects it, as its devices and its server see it.

A device first sends the result of training or evaluation (`opening`, `accept`). What follows depends on the protocol:
nothing for plain sums, the decryption for homomorphic ones, four exchanges for masked ones (masked.py). The server's
side is a state machine, which coordinator/aggregate.py drives; a device answers each exchange for one request only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fedface.aggregation.payload import Aggregation, Exchange, Payload
from fedface.atomic_io import replace_bytes
from fedface.errors import AggregationError
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


class CombinedDevice:
    """A device whose first payload can be added as it is: plain or homomorphic sums."""

    def __init__(self, aggregation: Aggregation) -> None:
        self._aggregation = aggregation

    def protect(self, update: Vector, round: int) -> Payload:
        """The payload of one update."""
        return self._aggregation.protect(update, round)

    def opening(self, stored: bytes) -> bytes:
        """The same: it is sent as it is stored."""
        return stored

    def closed(self, stored: bytes) -> bytes:
        """The same."""
        return stored

    def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes], stored: bytes) -> bytes:
        """The decrypted sum, little-endian float32. Raises AggregationError as `Aggregation.reveal`."""
        if exchange != "decrypt":
            raise AggregationError(f"sums of this run have no exchange {exchange!r}")
        total, own = Payload.from_bytes(requests[exchange]), Payload.from_bytes(stored)
        if total.round != own.round:
            raise AggregationError(f"expected the sum of round {own.round}, got that of round {total.round}")
        return self._aggregation.reveal(total).numpy().astype("<f4").tobytes()


def _to_store(total: Payload, contents: Sequence[bytes]) -> bytes:
    header = {"length": total.length, "round": total.round, "count": total.count}
    return Payload(kind="begun", header=header, parts=(total.to_bytes(), *contents)).to_bytes()


def _stored_sum(written: bytes) -> tuple[Payload, tuple[bytes, ...]]:
    """Inverse of `_to_store`. Raises AggregationError."""
    total, *contents = Payload.from_bytes(written).parts
    return Payload.from_bytes(total), tuple(contents)


@dataclass(kw_only=True)
class _KeySum:
    """The sum of what is encrypted with one key, or not at all."""

    total: Payload
    members: set[int] = field(default_factory=set)

    def result(self, revealed: Vector) -> SumResult:
        """The sum, revealed."""
        return SumResult(total=revealed, members=frozenset(self.members), count=self.total.count)


class CombinedServer:
    """Adds payloads as they arrive, and none is stored: plain or homomorphic sums."""

    def __init__(
        self,
        aggregation: Aggregation,
        round: int,
        length: int,
        *,
        largest: float | None = None,
        stored: Path | None = None,
    ) -> None:
        """Sum payloads of that round and length.

        Args:
            largest: The sum can be read without devices, and its numbers go up to this; None: a device decrypts it.
            stored: Where the sum is stored before a device is asked to decrypt it; what is there is asked for again.
        """
        self._stored = stored
        self._aggregation, self._round, self._length, self._largest = aggregation, round, length, largest
        self._sums: dict[str, _KeySum] = {}  # by the public name of the key
        self._result: SumResult | None = None
        self._seen: dict[tuple[str, bytes], int] = {}  # member by what it sent

    def accept(self, member: int, payload: Payload, device: str) -> None:
        """Add a payload. Raises AggregationError, and leaves the sums as they were, if it cannot be added."""
        if (payload.round, payload.length, payload.count) != (self._round, self._length, 1):
            raise AggregationError(
                f"expected one update of round {self._round} with {self._length} weights, got {payload.count} of "
                f"round {payload.round} with {payload.length}"
            )
        if self._largest is not None:
            found = float(self._aggregation.reveal(payload).abs().max())
            if found > self._largest:
                raise AggregationError(
                    f"expected numbers of about one public range, {self._largest:.0f} at most, got {found:.3g}"
                )
        key = str(payload.header.get("key", ""))
        # One update must count once. Two programs with one state folder send one stored reply; no two ciphertexts are
        # equal unless one is a copy; without encryption two devices of other names may send the same numbers.
        content = "" if key else device, hashlib.sha256(b"".join(payload.parts[:1])).digest()
        if content in self._seen:
            raise AggregationError(
                "another device sent the same bytes: if two programs use one state folder, stop one"
            )
        if key in self._sums:
            self._sums[key].total = self._aggregation.combine([self._sums[key].total, payload])
        else:
            self._sums[key] = _KeySum(total=self._aggregation.combine([payload]))
        self._sums[key].members.add(member)
        self._seen[content] = member

    @property
    def _largest_sum(self) -> tuple[str, _KeySum]:
        return max(self._sums.items(), key=lambda item: len(item[1].members))

    def close(self) -> Mapping[int, str]:
        """Those whose updates are encrypted with another key than most."""
        if not self._sums:
            return {}
        most, _ = self._largest_sum
        reason = f"its update is encrypted with another key than most devices' ({most}); give it a copy of that key"
        others = (known.members for key, known in self._sums.items() if key != most)
        return {member: reason for members in others for member in members}

    def exchanges(self) -> Iterator[Request]:
        """Ask one device after the other to decrypt the sum, until one does; none if the server can read it.

        Raises AggregationError if none does.
        """
        known = self._continued()

        def decrypted(member: int, content: bytes) -> None:
            vector = np.frombuffer(content, dtype="<f4") if len(content) == 4 * self._length else None
            if vector is None or not np.isfinite(vector).all():
                raise AggregationError("decrypted something else")
            self._result = known.result(torch.from_numpy(vector.astype(np.float32)))

        if self._largest is not None:
            self._result = known.result(self._aggregation.reveal(known.total))
            return
        total = known.total.to_bytes()
        for member in sorted(known.members):
            yield Request(exchange="decrypt", contents={member: total}, receive=decrypted)
            if self._result is not None:
                return
        raise AggregationError("no device decrypted the sum")

    def _continued(self) -> _KeySum:
        """The sum to decrypt: the one that devices were asked for before, or this one, which is stored.

        A server that asked for two sums of a round would learn their difference, which may be one update.
        """
        _, known = self._largest_sum
        if self._stored is None or self._largest is not None:
            return known
        if self._stored.exists():
            total, contents = _stored_sum(self._stored.read_bytes())
            sent = {content: member for (_, content), member in self._seen.items()}
            return _KeySum(total=total, members={sent[each] for each in contents if each in sent})
        own = [content for (_, content), member in self._seen.items() if member in known.members]
        self._stored.parent.mkdir(exist_ok=True, mode=0o700)
        replace_bytes(self._stored, _to_store(known.total, own))
        return known

    def result(self) -> SumResult:
        """The sum under the key that most devices use."""
        assert self._result is not None
        return self._result
