"""What a coordinator needs of its devices, whichever transport carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedface.messages.messages import Failure, Reply, Task

OnReply = Callable[[int], None]  # called with a device's number when its reply has arrived


class Cohort(Protocol):
    """Devices that can be asked, each under a number that stays the same during a run."""

    def members(self, wanted: int) -> Sequence[int]:
        """The numbers of the connected devices, ascending; waits until `wanted` of them are connected.

        Raises:
            FederationError: They did not connect in time.
        """
        ...

    def ask(self, task: Task, members: Sequence[int], on_reply: OnReply) -> Mapping[int, Reply | Failure]:
        """Send one task to some devices and collect their replies: one entry per member, none missing."""
        ...
