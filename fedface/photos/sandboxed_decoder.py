"""Decodes photos in a child process, so that a hostile file can hang or crash the child and nothing else.

Called by `scan`. The child runs `fedface.photos.image_io` under limits on memory, processor time and files;
when it dies or dawdles it is replaced, and the file that it was reading is refused with that reason. Requests
are lines of JSON, answers a length-prefixed line of JSON and the raw pixels: no pickles cross the pipe.
One file is read ahead, so that decoding and face detection overlap.
"""

from __future__ import annotations

import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

import fedface
from fedface.errors import LibraryError, PhotoError
from fedface.photos.image_io import Photo, PhotoUnreadable, read_photo

HEADER = struct.Struct("<IQ")  # bytes of JSON, bytes of pixels
START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one photo may cost the child process."""

    seconds: float = 30.0  # per file, on the clock and on the processor, > 0
    memory: int = 4 << 30  # address space of the child in bytes

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be > 0, got {self.seconds}")
        if self.memory < 1 << 28:
            raise ValueError(f"memory must be at least 256 MiB, got {self.memory} bytes")


class _ReaderDied(Exception):
    """The child ended before it answered."""


class _ReaderDawdled(Exception):
    """The child had to be ended before it answered."""


class SandboxedDecoder:
    """Reads photos through one child process; a context manager that ends the child on leaving."""

    def __init__(self, *, longest_side: int | None, limits: Limits | None = None) -> None:
        self._longest_side = longest_side
        self._limits = limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self.restarts = 0  # children that had to be replaced

    def __enter__(self) -> SandboxedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def process(self) -> int | None:
        """The number of the child process, if one is running."""
        return self._child.pid if self._child is not None else None

    def read(self, path: Path) -> Photo | PhotoError:
        """Decode one photo; a refusal is a value, as it is expected."""
        return next(self.read_all([path]))[1]

    def read_all(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Photo | PhotoError]]:
        """Decode photos one after the other; the next one is decoded while the caller uses this one."""
        waiting: Path | None = None
        for path in paths:
            if waiting is None:
                waiting = path
                self._ask(path)
                continue
            photo = self._answer_about(waiting)
            self._ask(path)
            yield waiting, photo
            waiting = path
        if waiting is not None:
            yield waiting, self._answer_about(waiting)

    def _ask(self, path: Path) -> None:
        if self._child is None or self._child.poll() is not None:
            self._start()
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(os.fsencode(path).hex()).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the child is gone: the answer will say so

    def _answer_about(self, path: Path) -> Photo | PhotoError:
        try:
            return self._answer()
        except _ReaderDied as death:
            self._end()
            self.restarts += 1
            return PhotoError(str(death))
        except _ReaderDawdled as delay:
            self._end()
            self.restarts += 1
            return PhotoUnreadable(str(delay))

    def _answer(self) -> Photo | PhotoError:
        deadline = time.monotonic() + self._limits.seconds
        text_length, pixel_length = HEADER.unpack(self._receive(HEADER.size, deadline))
        answer = json.loads(self._receive(text_length, deadline))
        if "unavailable" in answer:
            return PhotoUnreadable(answer["unavailable"])
        if "refused" in answer:
            return PhotoError(answer["refused"])
        pixels = np.frombuffer(self._receive(pixel_length, deadline), dtype=np.uint8)
        return Photo(
            pixels=pixels.reshape(answer["shape"]),
            width=answer["width"],
            height=answer["height"],
            kind=answer["kind"],
            taken=datetime.fromisoformat(answer["taken"]) if answer["taken"] else None,
            place=tuple(answer["place"]) if answer["place"] else None,
            camera=answer["camera"],
        )

    def _receive(self, count: int, deadline: float) -> bytearray:
        """Exactly `count` bytes from the child, or the reason why they did not come."""
        assert self._child is not None and self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        received = bytearray()
        while len(received) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise _ReaderDawdled(f"took longer than {self._limits.seconds:g} s to decode")
            chunk = os.read(descriptor, min(count - len(received), 1 << 20))
            if not chunk:
                raise _ReaderDied(f"stopped the decoder ({_ending(self._child)})")
            received += chunk
        return received

    def _start(self) -> None:
        # -P keeps the current folder, which may be the photo folder, out of the child's module search path.
        code = [sys.executable, "-P", "-m", "fedface.photos.sandboxed_decoder"]
        arguments = [str(self._longest_side or 0), str(self._limits.seconds), str(self._limits.memory)]
        home = str(Path(fedface.__file__).resolve().parents[1])
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [*code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": home, **one_thread},
            start_new_session=True,  # an interrupt at the keyboard is for the parent, which ends the child
        )
        try:
            self._receive(HEADER.size, time.monotonic() + START_SECONDS)
        except (_ReaderDied, _ReaderDawdled) as cause:
            self._end()
            raise LibraryError(f"the process that decodes photos does not start: it {cause}") from cause

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def _ending(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def decode_requests(
    requests: BinaryIO, answers: BinaryIO, *, longest_side: int | None, limits: Limits
) -> None:
    """The child's loop: an empty answer when ready, then one for each request, until the requests end."""
    answers.write(HEADER.pack(0, 0))
    answers.flush()
    for line in requests:
        path = Path(os.fsdecode(bytes.fromhex(json.loads(line))))
        _allow_processor_time(limits.seconds)
        pixels = b""
        try:
            photo = read_photo(path, longest_side=longest_side)
        except PhotoUnreadable as refusal:
            answer: dict[str, object] = {"unavailable": str(refusal)}
        except PhotoError as refusal:
            answer = {"refused": str(refusal)}
        else:
            pixels = photo.pixels.tobytes()
            answer = {
                "shape": photo.pixels.shape,
                "width": photo.width,
                "height": photo.height,
                "kind": photo.kind,
                "taken": photo.taken.isoformat() if photo.taken else None,
                "place": photo.place,
                "camera": photo.camera,
            }
        text = json.dumps(answer).encode()
        answers.write(HEADER.pack(len(text), len(pixels)) + text)
        answers.write(pixels)
        answers.flush()


def _allow_processor_time(seconds: float) -> None:
    """Let this process run for `seconds` more on the processor; after that the kernel ends it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + seconds) + 1)


def _limit(what: int, wanted: int) -> None:
    """Set a soft limit, as far as the hard limit that this process was given allows."""
    hard = resource.getrlimit(what)[1]
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (soft, hard))


def main(arguments: list[str]) -> None:
    """Become the child: tighten the limits, keep the pipe to ourselves, and serve."""
    limits = Limits(seconds=float(arguments[1]), memory=int(arguments[2]))
    if sys.platform == "linux":  # macOS refuses to lower the address space
        _limit(resource.RLIMIT_AS, limits.memory)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not end up among the pixels
    decode_requests(sys.stdin.buffer, answers, longest_side=int(arguments[0]) or None, limits=limits)


if __name__ == "__main__":
    main(sys.argv[1:])
