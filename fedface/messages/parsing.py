"""Messages from outside, decoded: every part is checked for type, size and range, and nothing in it is executed."""

from __future__ import annotations

from typing import Any, cast, get_args, get_type_hints

import torch

from fedface.codec import CodecError, decode, read_json
from fedface.errors import FederationError, FedfaceError
from fedface.messages.messages import VERSION, Message, Reply, Task, vector_from
from fedface.tensor_types import Vector


def read_task(message: Message) -> Task:
    """The task in a message.

    Raises:
        FederationError: It is not a task of this version, or a part is missing or out of range.
    """
    return cast(Task, _read(message, get_args(Task), "task"))


def read_reply(message: Message) -> Reply:
    """The reply in a message; the reason of a refusal is truncated to 1000 printable characters.

    Raises:
        FederationError: It is not a reply of this version, or a part is missing or out of range.
    """
    return cast(Reply, _read(message, get_args(Reply), "reply"))


def _read(message: Message, classes: tuple[Any, ...], what: str) -> Any:
    header = _header(message)
    kinds = {cls.kind: cls for cls in classes}
    cls = kinds.get(str(header.get("kind")))
    if cls is None:
        raise FederationError(f"expected a {what} ({', '.join(kinds)}), got {header.get('kind')!r:.80}")
    if isinstance(reason := header.get("reason"), str):
        header["reason"] = "".join(letter if letter.isprintable() else " " for letter in reason[:1000])
    types = {name: hint for name, hint in get_type_hints(cls).items() if hint in (bytes, Vector)}
    try:
        blobs = {
            name: _blob(name, types[name], written)
            for name, written in message.blobs.items()
            if name in types
        }
        return decode(cls, header | blobs, complete=True)
    except (ValueError, TypeError, OverflowError, MemoryError, FedfaceError) as error:
        raise FederationError(f"this {what} cannot be read: {error}") from error


def _header(message: Message) -> dict[str, Any]:
    try:
        header = read_json(message.header)
    except CodecError as error:
        raise FederationError(f"this message has no readable header: {error}") from error
    if not isinstance(header, dict) or header.pop("version", None) != VERSION:
        raise FederationError(f"expected a message of version {VERSION}; update the older of the two sides")
    return header


def _blob(name: str, expected: Any, written: bytes) -> bytes | Vector:
    if expected is bytes:
        return written
    return torch.zeros(0) if name == "buffers" and not written else vector_from(written)
