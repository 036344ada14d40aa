"""Text from strangers, made safe to print."""

from __future__ import annotations


def sanitize_text(words: str, most: int = 100) -> str:
    """A stranger's words for a terminal: one line, no control characters, not long."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in words[:most])
    return shown if len(words) <= most else f"{shown}..."
