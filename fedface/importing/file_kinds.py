"""Says what a file is that holds no weights, from its first bytes: compressed, a web page, a pointer, text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Final

from fedface.text import sanitize_text

START: Final = 4096  # bytes that are looked at
_COMPRESSED: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"\x04\x22\x4d\x18": "lz4",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
}
_OTHERS: Final[Mapping[bytes, str]] = {
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF-": "a PDF document",
    b"\x89HDF\r\n": "an HDF5 file",
}
# How pickles of protocol 0 begin, which are text as well: dictionary, list, class, and the number of torch.save.
_TEXT_PICKLE: Final = re.compile(r"\((?:dp?[0-9]|lp?[0-9]|[dlicSVp(])|[]}]|c[\w.]+\n[\w.]+\n|L[0-9]+L\n")


def kind_without_weights(start: bytes) -> str:
    """The kind of a file and the remedy, as the end of a sentence; "" if it may hold weights.

    Args:
        start: The first `START` bytes of the file.
    """
    if not start:
        return "is empty: download or copy it again"
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"is compressed ({name}): unpack it first and import the file within"
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it first and import the file within"
    for magic, name in _OTHERS.items():
        if start.startswith(magic):
            return f"is {name}, not weights"
    text = _text_of(start)
    if all(letter.isprintable() or letter.isspace() for letter in text):
        return _kind_of_text(text.strip())
    return ""


def _text_of(start: bytes) -> str:
    """In UTF-8, in UTF-16 with its mark, or in whatever encoding a page has; a zero where it is none of them."""
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return start.decode("cp1252", "replace") if start.lstrip().startswith(b"<") else "\0"


def _kind_of_text(text: str) -> str:
    if text.startswith("version https://git-lfs"):
        return "is a git-LFS pointer to weights, not the weights: run git lfs pull where it comes from"
    if text.startswith("<"):
        if re.search("<(!doctype )?(html|head|title|body|script)", text, re.IGNORECASE):
            title = re.search(r"<title[^>]*>([^<]*)<", text, re.IGNORECASE)
            shown = f" ({sanitize_text(' '.join(title[1].split()), 60)})" if title else ""
            return (
                f"is a web page{shown}, not weights: download again, from the link to the file itself; where a "
                "server limits downloads, open the page in a browser, or wait a day"
            )
        content = " ".join(re.sub("<[^>]*>", " ", text).split())
        return f"is XML ({sanitize_text(content, 60)}), not weights: download again"
    if re.match(r'\{\s*["}]|\[\s*["{\]]', text):
        return f"is JSON ({sanitize_text(' '.join(text.split()), 60)}), not weights: download again"
    if _TEXT_PICKLE.match(text):
        return ""
    return f"is text ({sanitize_text(' '.join(text.split()), 60)}), not weights"
