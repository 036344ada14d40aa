"""Markdown for reports: tables, code blocks, and escaped text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&!~])")


def plain(text: str) -> str:
    """Text on one line, with Markdown and HTML escaped."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; cells are not escaped."""
    first = list(heads)
    return [f"| {' | '.join(row)} |" for row in (first, ["---"] * len(first), *rows)]


def code_block(text: str) -> list[str]:
    """Text verbatim in a code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [fence, text, fence]
