"""What the coordinator needs of a cohort, whoever carries the messages.

Implemented by transport/flower.py over Flower's Grid: in this process, in Ray's actors, or on real devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedface.messages.messages import Failure, Reply, Task

OnReply = Callable[[int], None]  # called with the number of a device when its reply is there


class Cohort(Protocol):
    """Devices that can be asked, each under a number that stays the same during a run."""

    def members(self, wanted: int) -> Sequence[int]:
        """The numbers of the devices that are there, ascending; waits until there are `wanted`.

        Raises:
            FederationError: They did not come within the cohort's patience.
        """
        ...

    def ask(self, task: Task, members: Sequence[int], heard: OnReply) -> Mapping[int, Reply | Failure]:
        """Send one task to some devices and gather what comes back; one entry per member, none missing."""
        ...
