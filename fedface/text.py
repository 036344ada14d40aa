"""Untrusted text, sanitised for printing."""

from __future__ import annotations


def sanitize_text(text: str, most: int = 100) -> str:
    """Untrusted text for a terminal: one line, no control characters, at most `most` characters."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:most])
    return printable if len(text) <= most else f"{printable}..."
