"""The session of the page: one photo and one search at a time, for all windows.

Thread-safe. A new photo replaces the old one and ends its search.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from fedface.web.background_job import BackgroundSearch
from fedface.web.upload import Upload

IDLE_TIMEOUT = 5.0  # s, timeout of a stopped search when the page closes


class Session:
    """The current photo and search; replaced ones are deleted."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._upload: Upload | None = None
        self._search: BackgroundSearch | None = None

    def set_photo(self, upload: Upload) -> None:
        """Set a new photo; the old one is deleted."""
        with self._lock:
            self._clear()
            self._upload = upload

    def upload(self, key: str) -> Upload | None:
        """The photo with this key, if it is the current one."""
        with self._lock:
            upload = self._upload
        return upload if upload is not None and upload.key == key else None

    def search(self, key: str) -> BackgroundSearch | None:
        """The last search for the photo with this key."""
        with self._lock:
            return self._search if self._upload is not None and self._upload.key == key else None

    def begin(self, key: str, start: Callable[[], BackgroundSearch]) -> BackgroundSearch | None:
        """Start a search; None if one is running or the photo was replaced."""
        with self._lock:
            if self._upload is None or self._upload.key != key:
                return None
            if self._search is not None and self._search.outcome is None:
                return None
            self._search = start()
            return self._search

    def forget(self, key: str) -> None:
        """Delete the photo with this key, and end its search."""
        with self._lock:
            if self._upload is not None and self._upload.key == key:
                self._clear()

    def close(self) -> None:
        """Delete everything and wait until no search is running."""
        with self._lock:
            search = self._search
            self._clear()
        if search is not None:
            search.wait(IDLE_TIMEOUT)

    def _clear(self) -> None:
        if self._search is not None:
            self._search.stop()
        self._upload = self._search = None
