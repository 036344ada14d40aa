"""One sum from beginning to end in one process, with every byte that devices and server exchange: what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedface.aggregation.payload import Exchange, Payload
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
    up = down = 0
    device_seconds = server_seconds = 0.0
    clock = time.process_time
    for member, device in devices.items():
        vector = update(member)
        started = clock()
        stored[member] = device.protect(vector, round)
        sent = device.opening(stored[member]).to_bytes()
        between = clock()
        server.accept(member, Payload.from_bytes(sent), f"device {member}")
        device_seconds, server_seconds = (
            device_seconds + between - started,
            server_seconds + clock() - between,
        )
        up += len(sent)
        parts = tuple(known.setdefault(part, part) for part in stored[member].parts)
        stored[member] = replace(stored[member], parts=parts)
    server.close()
    started = clock()
    for request in server.exchanges():
        server_seconds += clock() - started
        gone |= (absent or {}).get(request.exchange, frozenset())
        for member, content in request.contents.items():
            down += len(content)
            if member in gone:
                continue
            started = clock()
            requests[member][request.exchange] = content
            answer = devices[member].answer(request.exchange, requests[member], stored[member])
            between = clock()
            request.receive(member, answer)
            device_seconds, server_seconds = (
                device_seconds + between - started,
                server_seconds + clock() - between,
            )
            up += len(answer)
        started = clock()
    server_seconds += clock() - started
    count = len(devices)
    return Rehearsal(
        result=server.result(),
        bytes_up=up / count,
        bytes_down=down / count,
        seconds_device=device_seconds / count,
        seconds_server=server_seconds,
    )
