"""One sum from beginning to end in one process, with every byte that devices and server exchange: what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    Exchange,
    Payload,
    SumContext,
)
from fedface.aggregation.protocols import DeviceKeys, device_sum, make_keys, server_sum
from fedface.aggregation.sums import DeviceSum, ServerSum, SumResult
from fedface.tensor_types import Vector

Absent = Mapping[Exchange, frozenset[int]]  # exchange -> the members that are gone from it on


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One sum and its costs."""

    result: SumResult
    bytes_up: float  # of one device, all exchanges, mean
    bytes_down: float
    seconds_device: float  # processor time of one device, mean
    seconds_server: float  # of the server, for all


def rehearse_protocol(
    config: AggregationConfig,
    agreement: AggregationParameters,
    vector: Vector,
    devices: int,
    absent: Absent | None = None,
) -> Rehearsal:
    """Sum this vector of so many devices under a protocol, with fresh keys."""
    context = SumContext(run="rehearsal", round=1, sum_of="updates", model="", terms="", cohort=devices)
    keys = make_keys(config, agreement)
    members = {
        member: device_sum(
            config, agreement, DeviceKeys(signing=Ed25519PrivateKey.generate(), encryption=keys), context
        )
        for member in range(devices)
    }
    server = server_sum(config, agreement, context, len(vector))
    return rehearse(server, members, lambda member: vector, context.round, absent)


def rehearse(
    server: ServerSum,
    devices: Mapping[int, DeviceSum],
    update: Callable[[int], Vector],
    round: int,
    absent: Absent | None = None,
) -> Rehearsal:
    """Sum one vector of each device.

    Args:
        devices: By member.
        update: Of a member: shape (d,).
        absent: Members that give no answers any more.

    Raises AggregationError if too few remain.
    """
    gone: set[int] = set()
    stored: dict[int, Payload] = {}
    known: dict[bytes, bytes] = {}  # equal vectors share memory
    requests: dict[int, dict[Exchange, bytes]] = {member: {} for member in devices}
    seconds = {"device": 0.0, "server": 0.0}
    up = down = 0

    @contextmanager
    def timed(who: Literal["device", "server"]) -> Iterator[None]:
        started = time.process_time()
        yield
        seconds[who] += time.process_time() - started

    for member, device in devices.items():
        vector = update(member)
        with timed("device"):
            protected = device.protect(vector, round)
            sent = device.opening(protected.to_bytes())
        with timed("server"):
            server.accept(member, Payload.from_bytes(sent), f"device {member}")
        up += len(sent)
        parts = tuple(known.setdefault(part, part) for part in protected.parts)
        stored[member] = replace(protected, parts=parts)
    server.close()
    exchanges = server.exchanges()
    while True:
        with timed("server"):
            request = next(exchanges, None)
        if request is None:
            break
        gone |= (absent or {}).get(request.exchange, frozenset())
        for member, content in request.contents.items():
            down += len(content)
            if member in gone:
                continue
            requests[member][request.exchange] = content
            written = stored[member].to_bytes()
            with timed("device"):
                answer = devices[member].answer(request.exchange, requests[member], written)
            with timed("server"):
                request.receive(member, answer)
            up += len(answer)
    count = len(devices)
    return Rehearsal(
        result=server.result(),
        bytes_up=up / count,
        bytes_down=down / count,
        seconds_device=seconds["device"] / count,
        seconds_server=seconds["server"],
    )
