"""The page's application with known faces, and real servers of it."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
from fading import SIZE, FadingSearcher, Known
from fastapi.testclient import TestClient
from speaking import HOME, PORT, Open, Run, Running

from fedface.web.app import make_app
from fedface.web.method_provider import MethodProvider
from fedface.web.server import listen, port_of, server_of
from fedface.web.upload import Reader


@pytest.fixture
def open_page() -> Iterator[Open]:
    """Builds a client of an application whose detector finds `faces` in each photo."""
    opened: list[TestClient] = []

    def open_one(*, faces: int = 1, pause: float = 0.0) -> TestClient:
        app = make_app(FadingSearcher(pause), Reader(SIZE, lambda: Known(faces)), port=PORT)
        client = TestClient(app, base_url=HOME["origin"], headers=HOME, raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield open_one
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def run_page() -> Iterator[Run]:
    """Starts servers on free ports, and ends them."""
    ends = []

    def run_one(provider: MethodProvider, reader: Reader) -> Running:
        listening = listen(0)
        server = server_of(make_app(provider, reader, port=port_of(listening)))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        ends.append((server, thread))
        return Running(port_of(listening))

    yield run_one
    for server, thread in ends:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
