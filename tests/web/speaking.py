"""A test client of the page: requests as the page sends them, and parsed responses. For the tests of the page and their
fixtures.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from fedface.photos.image_io import png_bytes
from fedface.web.method_provider import MethodProvider
from fedface.web.upload import Reader

PORT = 8123
HOME = {"host": f"127.0.0.1:{PORT}", "origin": f"http://127.0.0.1:{PORT}"}


def pixels_in(uri: str) -> np.ndarray:
    """The pixels of a PNG data URI."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(content)))


def photo_bytes(height: int = 120, width: int = 120) -> bytes:
    """A photo with a gradient of colours."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return png_bytes(ramp.astype(np.uint8))


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events in order."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [
        (name.removeprefix("event: "), json.loads(value.removeprefix("data: "))) for name, value in blocks
    ]


Open = Callable[..., TestClient]


@dataclass(frozen=True)
class Running:
    """A real server."""

    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        """A client with the page's headers."""
        return httpx.Client(base_url=self.address, headers={"origin": self.address}, timeout=60)


Run = Callable[[MethodProvider, Reader], Running]
