"""The page's application with known faces, a client that speaks as its own page would, and real servers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from fading import SIZE, FadingSearcher, Known
from fastapi.testclient import TestClient
from PIL import Image

from fedface.page.app import make_app
from fedface.page.offers import Searcher
from fedface.page.serving import listen, port_of, server_of
from fedface.page.sitting import Reader
from fedface.photos.pixels import png_bytes

PORT = 8123
HOME = {"host": f"127.0.0.1:{PORT}", "origin": f"http://127.0.0.1:{PORT}"}


def pixels_in(uri: str) -> np.ndarray:
    """The pixels of a PNG inside an address."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(content)))


def photo_bytes(height: int = 120, width: int = 120) -> bytes:
    """A photo with a slope of colours."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return png_bytes(ramp.astype(np.uint8))


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events in their order."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [
        (name.removeprefix("event: "), json.loads(value.removeprefix("data: "))) for name, value in blocks
    ]


Open = Callable[..., TestClient]


@pytest.fixture
def open_page() -> Iterator[Open]:
    """Makes a client of an application whose detector finds `faces` in each photo."""
    opened: list[TestClient] = []

    def open_one(*, faces: int = 1, pause: float = 0.0) -> TestClient:
        app = make_app(FadingSearcher(pause), Reader(SIZE, lambda: Known(faces)), port=PORT)
        client = TestClient(app, base_url=HOME["origin"], headers=HOME, raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield open_one
    for client in opened:
        client.__exit__(None, None, None)


@dataclass(frozen=True)
class Running:
    """A server that really listens."""

    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        """One that speaks as the page would."""
        return httpx.Client(base_url=self.address, headers={"origin": self.address}, timeout=60)


@pytest.fixture
def run_page() -> Iterator[Callable[[Searcher, Reader], Running]]:
    """Starts servers on free ports, and ends them."""
    ends = []

    def run_one(searcher: Searcher, reader: Reader) -> Running:
        listening = listen(0)
        server = server_of(make_app(searcher, reader, port=port_of(listening)))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        ends.append((server, thread))
        return Running(port_of(listening))

    yield run_one
    for server, thread in ends:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
