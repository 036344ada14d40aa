"""Texts of the device log: what left, what never left, and what no epsilon covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from fedface.privacy.ledger_records import Transmission

_KINDS = {
    "update": ("update", "updates"),
    "metrics": ("set of metrics", "sets of metrics"),
    "update sum": ("decrypted sum of updates", "decrypted sums of updates"),
    "metrics sum": ("decrypted sum of metrics", "decrypted sums of metrics"),
    "exchange": ("message that reveals a sum", "messages that reveal a sum"),
    "refusal": ("refusal", "refusals"),
}
_NOT_COVERED = (
    "that this device took part, when it replied and how long that took: the server observes it, and it is in no "
    "epsilon",
    "refusals: they contain nothing about a photo, but may reveal how much is spent and allowed",
    "messages that a task failed: they contain the type of error and are not listed here",
    "facts about people in general, which can be learned from other people's photos, with or without yours",
    "photos that you shared in other ways",
    "other programs on this device, which may read what you can read; no code of a server is executed here",
)


def kinds(sent: Sequence[Transmission]) -> list[str]:
    """The number of distinct payloads of each kind: "2 updates"."""
    again: Counter[str] = Counter(line.kind for line in sent if line.resent)
    texts = []
    for what, (one, many) in _KINDS.items():
        count = sum(line.kind == what for line in sent) - again[what]
        if count or again[what]:
            twice = f" ({again[what]} sent again)" if again[what] else ""
            texts.append(f"{count} {one if count == 1 else many}{twice}")
    return texts


def what_left(sent: Sequence[Transmission], device: str) -> list[str]:
    """The kinds of content that left, in text."""
    there = {line.kind for line in sent}
    sentences = {
        "update": "updates: how a network's weights would change, computed from your photos and protected as each line "
        "says",
        "metrics": "metrics: how well a model serves your photos, and how many of them (or of your occasions) have "
        "which skin tones, as sums that are protected as each line says",
        "update sum": "decrypted sums of updates: of several devices together, still masked",
        "metrics sum": "decrypted sums of metrics: of several devices together, still masked",
        "exchange": "messages that reveal a sum: public keys, signatures, and encrypted shares of random masks, with "
        "nothing of a photo",
        "refusal": "refusals, each a sentence that says why",
    }
    return [
        *(text for what, text in sentences.items() if what in there),
        *([f"the name “{device}”, with every reply"] if sent else []),
    ]


def never_left(sent: Sequence[Transmission], without_noise: int) -> list[str]:
    """What no payload contained; counts are omitted if some payload depended on them."""
    metrics = any(line.kind == "metrics" for line in sent)
    if without_noise:
        counts = []  # an update without noise may reveal counts to the server
    elif metrics:
        counts = ["how many photos or faces there are, except for noised counts among the metrics"]
    else:
        counts = ["how many photos or faces there are"]
    return [
        "photos, and faces cut from them",
        *counts,
        "when and where they were taken, and with which camera",
        "names of files and folders",
    ]


def not_covered(without_noise: int) -> list[str]:
    """What no epsilon of a device covers, starting with what the server saw without noise."""
    server = (
        "the server itself: it saw "
        + ("one of these payloads" if without_noise == 1 else f"{without_noise} of these payloads")
        + " without noise, and no epsilon bounds what it learned. The numbers here bound what is learned from the "
        "published model and report, if the server added the noise and deleted what it received"
    )
    return [*([server] if without_noise else []), *_NOT_COVERED]


def moment(written: str) -> str:
    """`3 May 2026, 21:04 UTC`, of a time in ISO 8601."""
    time = datetime.fromisoformat(written)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"
