"""The coordinator's interface to its devices, independent of the transport."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fedface.messages.messages import Failure, Reply, Task


class Cohort(Protocol):
    """Devices that can be sent tasks, each under a number that is constant during a run."""

    def members(self, count: int) -> Sequence[int]:
        """The numbers of the connected devices, ascending; waits until at least `count` are connected.

        Raises:
            FederationError: They did not connect in time.
        """

    def ask(self, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Reply | Failure]]:
        """Send tasks of one kind to devices; their numbers and replies as they arrive, one per task, none missing."""
