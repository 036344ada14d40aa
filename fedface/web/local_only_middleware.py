"""Middleware that accepts requests only from this page in a browser on this computer.

Other pages are refused: by the Host header (DNS rebinding), by the Origin header (forms), and by Sec-Fetch-Site
(embedding our images).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

HEADERS = (
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
MAX_REQUEST = 65_536  # bytes of a request without a photo


def accepted_hosts(port: int) -> tuple[str, ...]:
    names = ("127.0.0.1", "localhost")
    return tuple(f"{name}:{port}" for name in names) + (names if port == 80 else ())


def refusal(method: str, headers: Sequence[tuple[str, str]], port: int) -> str | None:
    """Why a request is not of the page at this port in a browser on this computer; None if it is."""
    accepted = accepted_hosts(port)
    hosts = [value.lower() for name, value in headers if name.lower() == "host"]
    origins = [value.lower() for name, value in headers if name.lower() == "origin"]
    if len(hosts) != 1 or hosts[0] not in accepted:
        return f"This page is available only at http://{accepted[0]}/."
    safe = method in ("GET", "HEAD")
    if (origins or not safe) and (
        len(origins) != 1 or origins[0] not in [f"http://{host}" for host in accepted]
    ):
        return "Requests from other pages are refused."
    return None


class LocalOnlyMiddleware:
    """Refuses requests from elsewhere, and adds headers that keep other pages from using the responses."""

    def __init__(self, app: Application, *, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        reason = self._refusal(scope)
        if reason is None:
            await self._app(scope, receive, send_with_headers)
            return
        headers = [(b"content-type", b"application/json")]
        await send_with_headers({"type": "http.response.start", "status": 403, "headers": headers})
        await send_with_headers(
            {"type": "http.response.body", "body": json.dumps({"error": reason}).encode()}
        )

    def _refusal(self, scope: Message) -> str | None:
        headers = [
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        if (elsewhere := refusal(scope["method"], headers, self._port)) is not None:
            return elsewhere
        sites = [value.lower() for name, value in headers if name == "sec-fetch-site"]
        safe = scope["method"] in ("GET", "HEAD")
        lengths = [value for name, value in headers if name == "content-length"]
        counted = len(lengths) == 1 and lengths[0].isdigit() and int(lengths[0]) <= MAX_REQUEST
        if not safe and scope["path"] != "/photo" and not counted:
            return f"A request must state its length and have at most {MAX_REQUEST} bytes."
        # A link on another page may open this page and nothing else.
        opens = safe and scope["path"] == "/"
        if not opens and any(site not in ("same-origin", "none") for site in sites):
            return "Other pages may not show this page's images."
        return None
