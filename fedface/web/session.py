"""The one photo and the one search that exist at a time, whichever window they came from.

Thread-safe. A new photo replaces the old one and ends its search.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from fedface.web.background_job import BackgroundSearch
from fedface.web.upload import Upload

IDLE_TIMEOUT = 5.0  # seconds in which a stopped search must have ended when the page closes


class Session:
    """Holds what may be in memory: nothing that was replaced."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sitting: Upload | None = None
        self._search: BackgroundSearch | None = None

    def seat(self, upload: Upload) -> None:
        """Put a new photo on the session; what lay there is forgotten."""
        with self._lock:
            self._clear()
            self._sitting = upload

    def upload(self, key: str) -> Upload | None:
        """The photo on the session, for who knows its key."""
        with self._lock:
            upload = self._sitting
        return upload if upload is not None and upload.key == key else None

    def search(self, key: str) -> BackgroundSearch | None:
        """The last search for the photo with this key."""
        with self._lock:
            return self._search if self._sitting is not None and self._sitting.key == key else None

    def begin(self, key: str, start: Callable[[], BackgroundSearch]) -> BackgroundSearch | None:
        """Start a search unless one still runs or the photo has been replaced; None where it was not started."""
        with self._lock:
            if self._sitting is None or self._sitting.key != key:
                return None
            if self._search is not None and self._search.outcome is None:
                return None
            self._search = start()
            return self._search

    def forget(self, key: str) -> None:
        """Forget the photo with this key, and end its search."""
        with self._lock:
            if self._sitting is not None and self._sitting.key == key:
                self._clear()

    def close(self) -> None:
        """Forget everything and wait until nothing runs any more."""
        with self._lock:
            search = self._search
            self._clear()
        if search is not None:
            search.wait(IDLE_TIMEOUT)

    def _clear(self) -> None:
        if self._search is not None:
            self._search.stop()
        self._sitting = self._search = None
