"""What the device log says of kinds of payloads: what left, what never left, and what no price covers."""

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
    "refusal": ("refusal", "refusals"),
}
_NOT_COVERED = (
    "that this device took part, when it answered and how long that took: the server knows it, and nothing of it "
    "is counted",
    "refusals: they hold nothing of a photo, but may reveal how much is spent and allowed",
    "messages that a task failed: they name the kind of error and are not listed here",
    "what is true of people in general: somebody may learn it from others' photos, with yours or without",
    "photos that you shared in other ways",
    "programs: the server may send code of its own unless you forbid it (clients/README.md)",
)


def kinds(sent: Sequence[Transmission]) -> list[str]:
    """How many payloads of each kind left, each counted once however often it was sent: "2 updates"."""
    again: Counter[str] = Counter(line.kind for line in sent if line.resent)
    said = []
    for what, (one, many) in _KINDS.items():
        count = sum(line.kind == what for line in sent) - again[what]
        if count or again[what]:
            twice = f" ({again[what]} sent again)" if again[what] else ""
            said.append(f"{count} {one if count == 1 else many}{twice}")
    return said


def what_left(sent: Sequence[Transmission], device: str) -> list[str]:
    """What kinds of things left, in words."""
    there = {line.kind for line in sent}
    said = {
        "update": "updates: how a network's weights would change, computed from your photos and protected as each line "
        "says",
        "metrics": "metrics: how well a model serves your photos, and how many of them (or of your occasions) have "
        "which skin tones, as sums that are protected as each line says",
        "update sum": "decrypted sums of updates: of several devices together",
        "metrics sum": "decrypted sums of metrics: of several devices together",
        "refusal": "refusals, each a sentence that says why",
    }
    return [
        *(words for what, words in said.items() if what in there),
        *([f"the name “{device}”, with every answer"] if sent else []),
    ]


def never_left(sent: Sequence[Transmission], without_noise: int) -> list[str]:
    """What was in no payload; counts are left out where something of them was."""
    metrics = any(line.kind == "metrics" for line in sent)
    if without_noise:
        counts = []  # nothing hides from the server what an update without noise lets it guess
    elif metrics:
        counts = [
            "how many photos or faces there are, but for the counts among the metrics, which have noise"
        ]
    else:
        counts = ["how many photos or faces there are"]
    return [
        "photos, and faces cut from them",
        *counts,
        "when and where they were taken, and with which camera",
        "names of files and folders",
    ]


def not_covered(without_noise: int) -> list[str]:
    """What no epsilon of a device says; first, if there was any, what the server saw without noise."""
    server = (
        "the server itself: it saw "
        + ("one of these payloads" if without_noise == 1 else f"{without_noise} of these payloads")
        + " without noise, and towards it there is no epsilon. The numbers here hold for those who get the network or "
        "the report later, if the server added the noise and forgot what it was sent"
    )
    return [*([server] if without_noise else []), *_NOT_COVERED]


def moment(written: str) -> str:
    """`3 May 2026, 21:04 UTC`, of a time in ISO 8601."""
    time = datetime.fromisoformat(written)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"
