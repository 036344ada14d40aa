"""Serve the page on the loopback interface. The only module that imports uvicorn."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from fedface.errors import ConfigError

LOOPBACK = "127.0.0.1"
PATIENCE = 1  # s, timeout of open streams when the server ends


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface; port 0 chooses a free port.

    Raises:
        ConfigError: The port is in use or not permitted.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} cannot be used ({error.strerror}); choose another one, or --port 0 for any free port"
        ) from error
    return listening


def port_of(listening: socket.socket) -> int:
    """The port at which a socket listens."""
    return int(listening.getsockname()[1])


def server_of(app: FastAPI) -> uvicorn.Server:
    """A server for the application; `run(sockets=[...])` serves until `should_exit` or Ctrl-C."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=PATIENCE,
        )
    )
    app.state.stopping = lambda: server.should_exit  # streams end by themselves, before they are cut off
    return server


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until Ctrl-C."""
    try:
        server_of(app).run(sockets=[listening])
    except KeyboardInterrupt:
        return
