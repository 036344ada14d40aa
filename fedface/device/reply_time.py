"""When a reply leaves: a time that follows from public numbers alone, whichever photos took part.

Before a round, a device computes one of its steps on grey images, as many as a library of `max_photos` gives to a step.
The reply then leaves at a whole multiple of `answer_seconds` of the clock: `MARGIN` times as long after the computation
began as all steps take, and the time to read `max_photos` photos. The device does nothing else until then, so that the
time of no other reply shows when the computation ended.

The number of photos in a round exceeds the number rehearsed with probability `OVERFLOW_PROBABILITY` at most
(Bernstein's inequality; Boucheron, Lugosi and Massart 2013, "Concentration Inequalities", Corollary 2.11). Work that
still takes longer, since the machine is slower than in the rehearsal, leaves after 2, 4, 8, ... times as long, and so
do the run's later replies.

While the owner's conditions do not hold, the process is stopped (transport/worker.py). That time passes neither for the
rehearsal nor for the work: the reply leaves later by as many slots as the device was stopped, which shows when the
conditions held, and nothing of a photo. Time in which the machine sleeps does not pass either, except on Windows, and a
clock that is set while a request is answered changes nothing: the reply then leaves between multiples of
`answer_seconds`, which shows for how long the machine slept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fedface.photos.training_crops import MAX_STORED_SIDE
from fedface.training.unit_clipping import MAX_PHOTOS_PER_UNIT

READING_SECONDS = 0.5  # allowed for each photo, new ones included: decoding, finding the face, cutting it out
READING_LARGE_SECONDS = (
    8.0  # the same for faces larger than those that are stored: decoded anew in each round
)
EXCHANGE_SECONDS = 1.0  # in place of `answer_seconds`, for work on one protected vector and on no photo
MARGIN = 2.0  # by how much the rehearsal is multiplied: a step may need one microbatch more than the mean
OVERFLOW_PROBABILITY = 1e-12  # that the photos of a round are more than were rehearsed


def photos_per_step(max_photos: int, probability: float, *, steps: int, in_units: bool) -> int:
    """How many photos a step uses on average over a round, at most, except with `OVERFLOW_PROBABILITY`.

    Args:
        max_photos: The largest library, >= 1.
        probability: With which each photo joins a step, in (0, 1].
        steps: Steps of the round, >= 1.
        in_units: Whether photos join together, `MAX_PHOTOS_PER_UNIT` at most.
    """
    largest = MAX_PHOTOS_PER_UNIT if in_units else 1
    mean = max_photos * probability * steps
    variance = mean * largest * (1 - probability)
    log_odds = -math.log(OVERFLOW_PROBABILITY)
    linear = largest * log_odds / 3
    excess = linear + math.sqrt(linear**2 + 2 * variance * log_odds)
    return min(max_photos, math.ceil((mean + excess) / steps))


def reading_seconds(max_photos: int, size: int) -> float:
    """The seconds allowed for reading a library's faces of `size` pixels a side."""
    return max_photos * (READING_SECONDS if size <= MAX_STORED_SIDE else READING_LARGE_SECONDS)


class ReplyTime:
    """The time at which the reply to one request leaves."""

    def __init__(self, answer_seconds: float, stopped: Callable[[], float] = lambda: 0.0) -> None:
        """The request came now.

        Args:
            answer_seconds: Replies leave at whole multiples of this, at least one after the request; 0: at once.
            stopped: How many seconds in all this process was stopped since it began.
        """
        self._slot, self._stopped = answer_seconds, stopped
        self._announced = 1  # slots
        # The clock as of the request, which goes on as if it were never set and stands still while the machine sleeps.
        self._clock_ahead = time.time() - time.perf_counter()
        self._start, self._stopped_before = self._now(), stopped()

    def timer(self) -> float:
        """Seconds of a clock that stands still while this process is stopped."""
        return time.perf_counter() - self._stopped()

    def begin_work(self, seconds: float) -> None:
        """Work that takes `seconds` at most begins now; both are public."""
        self._start, self._stopped_before = self._now(), self._stopped()
        if self._slot > 0:
            self._announced = max(1, math.ceil(seconds / self._slot))

    def overran(self) -> float | None:
        """The seconds that the work takes instead of those announced; None if it takes no longer."""
        slots = self._slots()
        return None if slots == self._announced else slots * self._slot

    def wait(self) -> None:
        """Sleep until the reply may leave."""
        while self._slot > 0:
            slots, stopped = self._slots(), self._stopped()
            later = math.ceil((stopped - self._stopped_before) / self._slot)
            time.sleep(max(0.0, (self._first() + slots + later) * self._slot - self._now()))
            if self._stopped() == stopped:
                return

    def _now(self) -> float:
        return time.perf_counter() + self._clock_ahead

    def _first(self) -> int:
        return math.ceil(self._start / self._slot)

    def _slots(self) -> int:
        """After how many slots in which this process ran the reply leaves: 1, 2, 4, ... times those announced."""
        slots, now = self._announced, self._now() - (self._stopped() - self._stopped_before)
        while self._slot > 0 and (self._first() + slots) * self._slot < now:
            slots *= 2
        return slots
