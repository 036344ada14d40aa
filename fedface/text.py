"""Untrusted text, sanitised for printing."""

from __future__ import annotations


def sanitize_text(words: str, most: int = 100) -> str:
    """Untrusted text for a terminal: one line, no control characters, at most `most` characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in words[:most])
    return shown if len(words) <= most else f"{shown}..."
