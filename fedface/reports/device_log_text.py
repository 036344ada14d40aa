"""What the log of a device says of kinds of payloads: what left, what never left, and what no price covers.

Called from reports/device_log.py (the page) and cli/device_log.py (the terminal), so that both say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from fedface.privacy.transmission_log import RESENT, Transmission

_KINDS = {
    "update": ("update", "updates"),
    "figures": ("set of figures", "sets of figures"),
    "opened sum": ("opened sum", "opened sums"),
    "refusal": ("refusal", "refusals"),
}
_NOT_COVERED = (
    "that this device took part, when it answered and how long that took: the server knows it, and nothing of it "
    "is counted",
    "refusals: they hold nothing of a photo, but may tell how much is spent and allowed",
    "messages that a task failed: they name the kind of error and are not listed here",
    "what is true of people in general: somebody may learn it from others' photos, with yours or without",
    "what left before this device kept a journal, and photos that you shared in other ways",
    "programs: the server may send code of its own unless you forbid it (clients/README.md)",
)


def kinds(sent: Sequence[Transmission]) -> list[str]:
    """How many payloads of each kind left, each counted once however often it was sent: "2 updates"."""
    again: Counter[str] = Counter(line.kind for line in sent if line.reason.startswith(RESENT))
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
        "figures": "figures: how well a model serves your photos, and how many of them (or of your occasions) have "
        "which skin tones, as sums that are protected as each line says",
        "opened sum": "opened sums: of several devices together",
        "refusal": "refusals, each a sentence that says why",
    }
    return [
        *(words for what, words in said.items() if what in there),
        *([f"the name “{device}”, with every answer"] if sent else []),
    ]


def never_left(sent: Sequence[Transmission], bare: int) -> list[str]:
    """What was in no payload; counts are left out where something of them was."""
    figures = any(line.kind == "figures" for line in sent)
    if bare:
        counts = []  # nothing hides from the server what an update without noise lets it guess
    elif figures:
        counts = [
            "how many photos or faces there are, but for the counts among the figures, which have noise"
        ]
    else:
        counts = ["how many photos or faces there are"]
    return [
        "photos, and faces cut from them",
        *counts,
        "when and where they were taken, and with which camera",
        "names of files and folders",
    ]


def not_covered(bare: int) -> list[str]:
    """What no epsilon of a device says; first, if there was any, what the server saw without noise."""
    server = (
        "the server itself: it saw "
        + ("one of these payloads" if bare == 1 else f"{bare} of these payloads")
        + " without noise, and towards it there is no epsilon. The figures here hold for those who get the network or "
        "the report later, if the server added the noise and forgot what it was sent"
    )
    return [*([server] if bare else []), *_NOT_COVERED]


def moment(written: str) -> str:
    """`3 May 2026, 21:04 UTC`, of a time in ISO 8601."""
    time = datetime.fromisoformat(written)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"
