"""Chunks of faces processed in parallel threads.

Torch releases Python's lock inside its kernels, so that threads which search different faces keep several cores busy;
docs/speed.md compares this with torch's own threads within one operation. Chunks start in their order, one at a time,
so that random numbers do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fedface.tensor_types import Images, LowImages
from fedface.upsampling.upsampler import Progress, StepCallback, StepSnapshot, Upsampled, join

T = TypeVar("T")
R = TypeVar("R")


class _SingleThreaded:
    """One torch thread within operations while any caller is inside, restored once the last one has left."""

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


_SINGLE_THREADED = _SingleThreaded()


def map_in_threads(items: Iterator[T], work: Callable[[T], R], workers: int) -> list[R]:
    """`work` on every item, by `workers` threads; results in the order of the items.

    Items are taken one after the other, whenever a thread is free. The first error of `work` is raised; other threads
    finish their item and take no more. With more than one worker, torch uses one thread within an operation
    meanwhile, in the whole process; one worker is the calling thread.
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
            try:
                results[place] = work(item)
            except BaseException:
                stopped.set()
                raise

    with _SINGLE_THREADED, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run) for _ in range(workers)]
    for future in futures:
        future.result()
    return [results[place] for place in sorted(results)]


class ChunkedConfig(Protocol):
    """The settings of a method that searches faces in chunks."""

    @property
    def steps(self) -> int: ...
    @property
    def faces_at_once(self) -> int: ...
    @property
    def workers(self) -> int: ...


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """Faces that are searched together."""

    place: int  # among the chunks
    faces: Tensor  # (m,) int64: which of the n * f faces these are
    target: LowImages  # (m, 3, lh, lw)
    start: T
    progress: ProgressAggregator

    def step(
        self, step: int, images: Images, consistency_error: Tensor, active: Tensor | None = None
    ) -> None:
        """Report a step, from 1, of all faces or of those at the places `active`; images are not clamped."""
        faces = self.faces if active is None else self.faces[active]
        self.progress.step(self.place, step, faces, images, consistency_error)


def search_in_chunks(
    targets: LowImages,
    faces_per_photo: int,
    config: ChunkedConfig,
    prepare: Callable[[Tensor], T],
    search: Callable[[Chunk[T]], Upsampled],
    *,
    progress: Progress | None,
    watch: StepCallback | None,
) -> Upsampled:
    """Search a face for each target, in chunks of `faces_at_once` at most, by `workers` threads.

    Args:
        targets: One photo for each face, (n * f, 3, lh, lw), photo by photo.
        faces_per_photo: f.
        config: Sizes of chunks, threads and steps.
        prepare: The numbers of a chunk's faces -> where its search starts; called chunk by chunk in their order.
        search: Of one chunk, with one face for each target.
        progress: Called after every step with how far all faces are.
        watch: Called with the faces of every step.
    """
    share = max(1, math.ceil(len(targets) / config.workers))
    places = torch.split(torch.arange(len(targets)), min(config.faces_at_once, share))
    aggregator = ProgressAggregator(len(places), config.steps, progress, watch)
    chunks = (
        Chunk(place, faces, targets[faces], prepare(faces), aggregator) for place, faces in enumerate(places)
    )
    return join(map_in_threads(chunks, search, config.workers), faces_per_photo)


class ProgressAggregator:
    """Adds up the steps of all chunks and passes them on, from one thread at a time."""

    def __init__(
        self, chunks: int, steps: int, progress: Progress | None, watch: StepCallback | None
    ) -> None:
        self._done = [0] * chunks
        self._steps = steps
        self._progress, self._watch = progress, watch
        self._lock = Lock()

    def step(self, chunk: int, step: int, faces: Tensor, images: Images, consistency_error: Tensor) -> None:
        """The chunk with this number has taken a step."""
        with self._lock:
            self._done[chunk] = step
            if self._progress is not None:
                self._progress(sum(self._done), len(self._done) * self._steps)
            if self._watch is not None:
                self._watch(
                    StepSnapshot(
                        step=step,
                        steps=self._steps,
                        faces=faces,
                        images=images,
                        consistency_error=consistency_error,
                    )
                )

    def end(self, chunk: int) -> None:
        """The chunk with this number needs no more steps."""
        with self._lock:
            self._done[chunk] = self._steps
