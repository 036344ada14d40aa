"""The coordinator's interface to its devices, independent of the transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedface.messages.messages import Failure, Reply, Task

OnReply = Callable[[int], None]  # called with a device's number when its reply has arrived


class Cohort(Protocol):
    """Devices that can be sent tasks, each under a number that is constant during a run."""

    def members(self, count: int) -> Sequence[int]:
        """The numbers of the connected devices, ascending; waits until at least `count` are connected.

        Raises:
            FederationError: They did not connect in time.
        """

    def ask(self, task: Task, members: Sequence[int], on_reply: OnReply) -> Mapping[int, Reply | Failure]:
        """Send one task to some devices and collect their replies: one entry per member, none missing."""
