"""Chunks of faces processed in parallel threads.

Torch releases Python's lock inside its kernels, so that threads which search different faces keep several cores busy;
docs/speed.md compares this with torch's own threads within one operation. Chunks start in their order, one at a time,
so that random numbers do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TypeVar

import torch
from torch import Tensor

from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot

T = TypeVar("T")
R = TypeVar("R")


class _Quiet:
    """One torch thread within operations while anybody is inside; as before once the last one has left."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


_QUIET = _Quiet()


def map_in_threads(items: Iterator[T], work: Callable[[T], R], workers: int) -> list[R]:
    """`work` on every item, by `workers` threads; results in the order of the items.

    With more than one worker, torch uses one thread within an operation meanwhile, in the whole process.

    Args:
        items: Taken one after the other, whenever a thread is free.
        work: Safe to call in several threads at once.
        workers: >= 1; 1 works in the calling thread.

    Raises:
        Exception: The first error of `work`; other threads finish their item and take no more.
    """
    if workers == 1:
        return [work(item) for item in items]
    numbered, taking, stopped = enumerate(items), Lock(), Event()
    results: dict[int, R] = {}

    def run() -> None:
        while not stopped.is_set():
            with taking:
                taken = next(numbered, None)
            if taken is None:
                return
            place, item = taken
            ended = False
            try:
                results[place] = work(item)
                ended = True
            finally:
                if not ended:
                    stopped.set()

    with _QUIET, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run) for _ in range(workers)]
    for future in futures:
        future.result()
    return [results[place] for place in sorted(results)]


def partition_batch(faces: int, workers: int, at_once: int) -> tuple[Tensor, ...]:
    """The places 0 ... faces - 1 in chunks, int64, at most `at_once` in each, so that every worker has one."""
    share = max(1, math.ceil(faces / workers))
    return torch.split(torch.arange(faces), min(at_once, share))


class ProgressAggregator:
    """Adds up the steps of all chunks and passes them on, from one thread at a time."""

    def __init__(
        self, chunks: int, steps: int, progress: Progress | None, watch: StepCallback | None
    ) -> None:
        self._done = [0] * chunks
        self._steps = steps
        self._progress, self._watch = progress, watch
        self._lock = Lock()

    def step(self, chunk: int, snapshot: StepSnapshot) -> None:
        """The chunk with this number has taken a step."""
        with self._lock:
            self._done[chunk] = snapshot.step
            if self._progress is not None:
                self._progress(sum(self._done), len(self._done) * self._steps)
            if self._watch is not None:
                self._watch(snapshot)

    def end(self, chunk: int) -> None:
        """The chunk with this number needs no more steps."""
        with self._lock:
            self._done[chunk] = self._steps
