"""Untrusted text, sanitised for printing, and addresses."""

from __future__ import annotations

import re

from fedface.errors import ConfigError


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 host has square brackets. Raises ConfigError if it is something else."""
    found = re.fullmatch(r"\[?([^\s\[\]/]+)\]?:(\d{1,5})", address)
    if found is None:
        raise ConfigError(f"expected HOST:PORT such as fedface.example.org:8443, got {address!r:.100}")
    return found[1], int(found[2])


def sanitize_text(text: str, most: int = 100) -> str:
    """Untrusted text for a terminal: one line, no control characters, at most `most` characters."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:most])
    return printable if len(text) <= most else f"{printable}..."
