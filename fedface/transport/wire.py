"""The wire form of a message: a Flower record with one JSON header and named byte arrays.

An error's text may name a photo or a folder of the owner, so only the text of errors about the task itself is sent. Of
all others the server learns only the type; the owner finds the text in the device's log.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedface.errors import FederationError
from fedface.messages.messages import Message

STYPE = "fedface.bytes"
HEADER, BLOBS = "fedface", "blobs"  # the two records of a message
MAX_HEADER = 1 << 20  # characters; headers have about two thousand
MAX_REASON = 500  # characters of an error that are sent or stored
DEVICE_ERROR = 500  # Flower reserves codes below 100
TRAIN, EVALUATE, EXCHANGE = "train", "evaluate", "query.exchange"  # Flower's message types


def to_record(message: Message) -> RecordDict:
    """A message as a Flower record: the header as text, each blob as an array of bytes.

    Blobs in a ConfigRecord would be thirty times slower.
    """
    arrays = {
        name: Array(dtype="uint8", shape=(), stype=STYPE, data=bytes(blob))
        for name, blob in message.blobs.items()
    }
    return RecordDict({HEADER: ConfigRecord({"header": message.header}), BLOBS: ArrayRecord(arrays)})


def from_record(record: RecordDict) -> Message:
    """Inverse of `to_record`; nothing in the record is executed or unpickled.

    Raises:
        FederationError: The record has another form.
    """
    header, blobs = record.get(HEADER), record.get(BLOBS)
    if len(record) != 2 or not isinstance(header, ConfigRecord) or not isinstance(blobs, ArrayRecord):
        raise FederationError(
            f"expected the records {HEADER} and {BLOBS}, got {', '.join(record)[:200] or 'none'}"
        )
    text = header.get("header")
    if not isinstance(text, str) or len(header) != 1 or len(text) > MAX_HEADER:
        raise FederationError(f"expected one header of at most {MAX_HEADER} characters")
    for name, array in blobs.items():
        if array.stype != STYPE or tuple(array.shape) != ():
            raise FederationError(
                f"expected bytes under {name[:80]!r}, got an array of type {array.stype[:80]!r}"
            )
    return Message(text, {name: array.data for name, array in blobs.items()})
