"""Which files of a folder may be photos: one walk for every reader of folders, which counts skipped files.

Thumbnails that NAS systems and photo managers store beside the photos, and deleted photos, are skipped with
hidden files and our own pictures. Nothing is changed, links are not followed, and memory holds open folders alone.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 100  # folders in folders
HIDDEN = "hidden files and folders"
LINKS = "links and special files"
THUMBNAILS = "folders of thumbnails or deleted photos"
OWN_PICTURES = "pictures made by fedface"
THUMBNAIL_FOLDERS = frozenset({
    "@eadir", ".@__thumb", "@__thumb", ".thumbnails", "thumbnails", ".thumbs", "thumbs", ".thumb", "_thumbs", "_thumb",
    ".picasaoriginals", "iphoto thumbnails", ".photostructure", ".dtrash", "@tmp", "#recycle", "@recycle",
    "#snapshot", "@recently-snapshot", "@snapshots", "~snapshot", "$recycle.bin", ".trash", ".trashes", "lost+found",
    "@synoresource", "@transcode", "@sharebin", "@quarantine", "recycler", "recycled", "recycle_bin", "trashbox",
    "system volume information", "network trash folder", "temporary items", "files_trashbin",
})  # fmt: skip


@dataclass(frozen=True)
class FoundFile:
    """Something met on the walk: a regular file, or a path that cannot be read, with the reason."""

    path: Path
    status: os.stat_result | None
    reason: str = ""


def walk(folder: Path, skipped: Counter[str], depth: int = 0) -> Iterator[FoundFile]:
    """Regular files below a folder, depth first, in no order.

    Args:
        skipped: Counts skipped files and folders by reason; a folder counts as one.
        depth: How deep `folder` lies below the first one.
    """
    if depth > MAX_DEPTH:
        yield FoundFile(folder, None, f"nested deeper than {MAX_DEPTH} folders")
        return
    try:
        entries = os.scandir(folder)
    except OSError as cause:
        yield FoundFile(folder, None, f"folder cannot be opened: {cause.strerror or cause}")
        return
    with entries:
        for entry in entries:
            path = Path(entry.path)
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as cause:
                yield FoundFile(path, None, f"cannot be read: {cause.strerror}")
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if is_folder and entry.name.lower() in THUMBNAIL_FOLDERS:
                skipped[THUMBNAILS] += 1
            elif entry.name.startswith("."):
                skipped[HIDDEN] += 1
            elif is_folder:
                yield from walk(path, skipped, depth + 1)
            elif stat.S_ISREG(status.st_mode):
                yield FoundFile(path, status)
            else:
                skipped[LINKS] += 1


def describe_skipped(skipped: dict[str, int]) -> str:
    """`3 hidden files and folders, 1 links and special files`; empty if nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
