"""Decodes photos in a child process, so that a hostile file can hang or crash the child and nothing else.

Pixels, EXIF and colour profiles of a stranger's file are parsed in the child alone, under limits on memory and
processor time, and without the right to write files or to use the network where the system can enforce that
(fedface/sandbox.py). A child that dies or takes too long is replaced, and the file that it was reading is refused with
that reason. Requests are lines of JSON, followed by the bytes of a photo in memory; replies are a length-prefixed
JSON object of bounded numbers and short texts, and the raw pixels, all checked by the parent.
One file is decoded ahead, so that decoding and face detection overlap.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np

import fedface
from fedface.errors import LibraryError, PhotoError
from fedface.photos.capture_date import YEARS
from fedface.photos.exif import MAX_TEXT_LENGTH, ExifMetadata
from fedface.photos.image_io import (
    MAX_BYTES,
    MAX_PIXELS,
    READ_KINDS,
    Photo,
    PhotoUnreadable,
    read_photo,
    read_photo_bytes,
)
from fedface.platforms import limit
from fedface.sandbox import restrict
from fedface.validation import Above, AtLeast, checked

HEADER = struct.Struct("<IQ")  # bytes of JSON, bytes of pixels
MAX_JSON = 4096  # bytes of JSON in a reply
MAX_REASON = 200  # characters of a refusal
START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
@checked
class Limits:
    """What one photo may cost the child process."""

    seconds: Annotated[float, Above(0)] = 30.0  # per file, on the clock and on the processor
    memory: Annotated[int, AtLeast(256 << 20)] = 4 << 30  # address space of the child in bytes


class _DecoderFailed(Exception):
    """The child ended, did not reply in time, or sent what no decoder sends."""


class _TimeLimit:
    """Ends a child that does not reply in time, and with it the wait for its reply; Windows has no other way.

    While this process is stopped (`fedface device pause`), no time passes.
    """

    STEP_SECONDS = 1.0

    def __init__(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        self.has_passed = False
        self._child, self._seconds = child, seconds
        self._replied = threading.Event()

    def __enter__(self) -> _TimeLimit:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._replied.set()

    def _watch(self) -> None:
        left = self._seconds
        while left > 0:
            step = min(left, self.STEP_SECONDS)
            if self._replied.wait(step):
                return
            left -= step
        self.has_passed = True
        self._child.kill()


class SandboxedDecoder:
    """Reads photos through one child process; a context manager that ends the child on leaving."""

    def __init__(self, *, longest_side: int | None = None, limits: Limits | None = None) -> None:
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

    def read(self, path: Path, *, longest_side: int | None = None) -> Photo | PhotoError:
        """Decode one photo, shrunk to `longest_side` if it is given; a refusal is a value, as it is expected."""
        self._send(path, longest_side or self._longest_side)
        return self._reply()

    def read_bytes(self, content: bytes) -> Photo | PhotoError:
        """Decode a photo that is in memory."""
        if len(content) > MAX_BYTES:
            return PhotoError(f"larger than {MAX_BYTES // 1_000_000} MB")
        self._send(content, self._longest_side)
        return self._reply()

    def read_all(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Photo | PhotoError]]:
        """Decode photos one after the other; the next one is decoded while the caller uses this one."""
        waiting: Path | None = None
        for path in paths:
            if waiting is None:
                waiting = path
                self._send(path, self._longest_side)
                continue
            photo = self._reply()
            self._send(path, self._longest_side)
            yield waiting, photo
            waiting = path
        if waiting is not None:
            yield waiting, self._reply()

    def _send(self, photo: Path | bytes, longest_side: int | None) -> None:
        if self._child is None or self._child.poll() is not None:
            self._start()
        assert self._child is not None and self._child.stdin is not None
        request: dict[str, Any] = {"longest_side": longest_side}
        if isinstance(photo, bytes):
            request["bytes"], content = len(photo), photo
        else:
            request["path"], content = os.fsencode(photo).hex(), b""
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n" + content)
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the child is gone, which reading its reply reports

    def _reply(self) -> Photo | PhotoError:
        assert self._child is not None
        try:
            with _TimeLimit(self._child, self._limits.seconds) as time_limit:
                text_length, pixel_length = HEADER.unpack(self._receive(HEADER.size, time_limit))
                if text_length > MAX_JSON or pixel_length > 3 * MAX_PIXELS:
                    raise _DecoderFailed("made the decoder send a reply that is too long")
                text = self._receive(text_length, time_limit)
                pixels = self._receive(pixel_length, time_limit)
            try:
                return parse_reply(json.loads(text), pixels)
            except (ValueError, TypeError, LookupError, RecursionError) as cause:
                raise _DecoderFailed("made the decoder send an invalid reply") from cause
        except _DecoderFailed as failure:
            self._end()
            self.restarts += 1
            return PhotoError(str(failure))  # not tried again: a slow photo would delay every round

    def _receive(self, count: int, time_limit: _TimeLimit) -> bytearray:
        """Exactly `count` bytes from the child, or the reason why they did not come."""
        assert self._child is not None and self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        received = bytearray()
        while len(received) < count:
            chunk = os.read(descriptor, min(count - len(received), 1 << 20))
            if time_limit.has_passed:
                raise _DecoderFailed(f"took longer than {self._limits.seconds:g} s to decode")
            if not chunk:
                raise _DecoderFailed(f"stopped the decoder ({_ending(self._child)})")
            received += chunk
        return received

    def _start(self) -> None:
        # -P keeps the current folder, which may be the photo folder, out of the child's module search path.
        code = [sys.executable, "-P", "-m", "fedface.photos.sandboxed_decoder"]
        arguments = [str(self._limits.seconds), str(self._limits.memory)]
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
            with _TimeLimit(self._child, START_SECONDS) as time_limit:
                self._receive(HEADER.size, time_limit)
        except _DecoderFailed as cause:
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


def parse_reply(reply: Any, pixels: bytearray) -> Photo | PhotoError:
    """The photo in a reply of the child, which a hostile file may have taken over: every field is checked.

    Raises:
        ValueError, TypeError, LookupError: A field is missing, of another type or out of its range.
    """
    for key, refusal in (("unavailable", PhotoUnreadable), ("refused", PhotoError)):
        if key in reply:
            return refusal(_short_text(reply[key], MAX_REASON))
    height, width, channels = (_whole(length, MAX_PIXELS) for length in reply["shape"])
    if channels != 3 or len(pixels) != height * width * 3:
        raise ValueError(f"{len(pixels)} bytes are not a picture of {height} x {width} x {channels}")
    if reply["kind"] not in READ_KINDS:
        raise ValueError("unknown kind")
    taken, place, camera = reply["taken"], reply["place"], reply["camera"]
    date = None if taken is None else datetime.fromisoformat(_short_text(taken, MAX_TEXT_LENGTH))
    if date is not None and (date.tzinfo is not None or date.year not in YEARS):
        raise ValueError("a date with a zone, or of another century")
    if reply["date_precision"] not in (("exact", "unreadable") if date is None else ("exact", "day", "utc")):
        raise ValueError("a precision that does not match the date")
    if place is not None:
        latitude, longitude = map(float, place)
        if not (math.isfinite(latitude + longitude) and abs(latitude) <= 90 and abs(longitude) <= 180):
            raise ValueError("the place lies outside the globe")
        place = latitude, longitude
    return Photo(
        pixels=np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3),
        width=_whole(reply["width"], MAX_PIXELS),
        height=_whole(reply["height"], MAX_PIXELS),
        kind=reply["kind"],
        metadata=ExifMetadata(
            taken=date,
            place=place,
            camera=None if camera is None else _short_text(camera, MAX_TEXT_LENGTH),
            date_precision=reply["date_precision"],
        ),
    )


def _whole(value: Any, maximum: int) -> int:
    if type(value) is not int or not 1 <= value <= maximum:
        raise ValueError(f"expected a whole number in 1..{maximum}")
    return value


def _short_text(value: Any, maximum: int) -> str:
    if not isinstance(value, str) or len(value) > maximum or not value.isprintable():
        raise ValueError(f"expected at most {maximum} printable characters")
    return value


def decode_requests(requests: BinaryIO, replies: BinaryIO, *, limits: Limits) -> None:
    """The child's loop: an empty reply when ready, then one for each request, until the requests end."""
    replies.write(HEADER.pack(0, 0))
    replies.flush()
    for line in requests:
        request = json.loads(line)
        content = requests.read(request["bytes"]) if "bytes" in request else None
        limit("CPU", int(time.process_time() + limits.seconds) + 1)  # more, and the kernel ends this process
        pixels = b""
        try:
            if content is None:
                path = Path(os.fsdecode(bytes.fromhex(request["path"])))
                photo = read_photo(path, longest_side=request["longest_side"])
            else:
                photo = read_photo_bytes(content, longest_side=request["longest_side"])
        except PhotoUnreadable as refusal:
            reply: dict[str, object] = {"unavailable": _one_line(refusal)}
        except PhotoError as refusal:
            reply = {"refused": _one_line(refusal)}
        else:
            pixels, metadata = photo.pixels.tobytes(), photo.metadata
            reply = {
                "shape": photo.pixels.shape,
                "width": photo.width,
                "height": photo.height,
                "kind": photo.kind,
                "taken": metadata.taken.isoformat() if metadata.taken else None,
                "place": metadata.place,
                "camera": metadata.camera,
                "date_precision": metadata.date_precision,
            }
        text = json.dumps(reply).encode()
        replies.write(HEADER.pack(len(text), len(pixels)) + text)
        replies.write(pixels)
        replies.flush()


def _one_line(refusal: PhotoError) -> str:
    """The reason without control characters, which a file's own bytes may have put there."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(refusal))[:MAX_REASON]


def main(arguments: list[str]) -> None:
    """Run the child: tighten the limits, reserve the output for replies, and decode until the requests end."""
    limits = Limits(seconds=float(arguments[0]), memory=int(arguments[1]))
    if sys.platform == "linux":  # macOS refuses to lower the address space
        limit("AS", limits.memory)
    limit("FSIZE", 0)
    limit("CORE", 0)
    restrict(read=[Path("/")], write=[], connect=[])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a decoder must not be mixed with the pixels
    decode_requests(sys.stdin.buffer, replies, limits=limits)


if __name__ == "__main__":
    main(sys.argv[1:])
