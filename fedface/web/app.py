"""The web application: one page and its requests. The only module that imports FastAPI.

Every user error gets a response of one sentence; a traceback in the terminal is a bug in fedface. Nothing is written to
disk, and nothing is loaded from the network.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from fedface.errors import ConfigError, FedfaceError
from fedface.photos.face_crops import TURNS
from fedface.photos.image_io import MAX_BYTES
from fedface.reports.charts import pixels_of
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampler
from fedface.web.background_job import BackgroundSearch, in_background
from fedface.web.events import ResultContext, final_event, progress_event, sheet_of
from fedface.web.image_encoding import data_uri
from fedface.web.local_only_middleware import LocalOnlyMiddleware
from fedface.web.method_provider import MethodProvider
from fedface.web.session import Session
from fedface.web.upload import Crop, Reader, Upload

PAGE = Path(__file__).with_name("page.html")
MAX_UPLOAD = MAX_BYTES
MAX_FACES = 12
MAX_SEED = 2**32 - 1
POLL_INTERVAL = 0.02  # s, polling interval of a search
EVENT_INTERVAL = 0.2  # s, minimum interval between progress events
HEARTBEAT = 2.0  # s, heartbeat interval, to detect a closed page
GONE = "This photo was replaced by another one. Upload it again."
BUSY = "Another search is running, perhaps in another window. Stop it or wait until it ends."


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    photo: str
    face: int
    side: int
    method: str
    faces: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Named:
    photo: str


class RequestHandlers:
    """The handlers of the page's requests, for one provider, one reader and one session."""

    def __init__(self, provider: MethodProvider, reader: Reader, session: Session) -> None:
        self.provider, self.reader, self.session = provider, reader, session
        self.page = PAGE.read_text(encoding="utf-8")
        self.refused = lru_cache(maxsize=256)(self._refused)

    async def show(self) -> Response:
        """The page, whose only script has a random nonce."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            f"connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        )
        return HTMLResponse(self.page.replace("NONCE", nonce), headers={"content-security-policy": policy})

    async def about(self) -> Response:
        """The methods and limits to choose from."""
        size = self.provider.size
        return JSONResponse(
            {
                "size": size,
                "side": max(8, size // 32) if size > 8 else size // 2,
                "methods": [asdict(method) for method in self.provider.methods],
                "most_faces": MAX_FACES,
                "max_upload": MAX_UPLOAD,
            }
        )

    async def photo(self, request: Request) -> Response:
        """Receive the bytes of a photo and return its faces."""
        content = bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > MAX_UPLOAD:
            return _error_response(413, _too_large())
        async for part in request.stream():
            content += part
            if len(content) > MAX_UPLOAD:
                return _error_response(413, _too_large())
        cancelled = Event()
        reading = in_background(lambda: self.reader.read(bytes(content), cancelled))
        try:
            while not reading.done():
                await asyncio.sleep(POLL_INTERVAL)
                # The page is closed or shows another photo: nothing of this one is stored.
                if request.app.state.stopping() or await request.is_disconnected():
                    return _error_response(410, GONE)
        finally:
            cancelled.set()
        upload = reading.result()
        if await request.is_disconnected():
            return _error_response(410, GONE)
        self.session.set_photo(upload)
        return JSONResponse(await run_in_threadpool(_upload_record, upload))

    async def detection(self) -> Response:
        """How far face detection in a photo is."""
        return JSONResponse({"turns": self.reader.turns, "of": len(TURNS)})

    async def synthetic(self) -> Response:
        """Render a synthetic face, as if it had been uploaded."""
        upload = await run_in_threadpool(self.reader.synthetic_face, secrets.randbelow(2**31))
        self.session.set_photo(upload)
        return JSONResponse(await run_in_threadpool(_upload_record, upload))

    def pixels(self, photo: str, face: int, side: int) -> Response:
        """The low-resolution input of a search."""
        crop = self._crop(photo, face)
        if crop is None:
            return _error_response(410, GONE)
        return JSONResponse({"picture": data_uri(pixels_of(crop.low(side)[0]))})

    def fits(self, method: str, side: int) -> Response:
        """Whether a method supports a pixelation (an empty sentence: yes), and its training data."""
        sentence = self.refused(method, side)
        data = "" if sentence else self.provider.training_data(method)
        return JSONResponse({"sentence": sentence, "training_data": data})

    async def search(self, query: SearchRequest, request: Request) -> Response:
        """Start a search and stream its progress until it ends or the page is closed."""
        method = next((one for one in self.provider.methods if one.name == query.method), None)
        if method is None:
            raise ConfigError(f"There is no method named {query.method!r}.")
        if not 1 <= query.faces <= MAX_FACES:
            raise ConfigError(f"The number of faces must lie between 1 and {MAX_FACES}.")
        if not 0 <= query.seed <= MAX_SEED:
            raise ConfigError(f"The seed must be an integer between 0 and {MAX_SEED}.")
        upload, crop = self.session.upload(query.photo), self._crop(query.photo, query.face)
        if upload is None or crop is None:
            return _error_response(410, GONE)
        context = ResultContext(several=method.several, face=upload.found > 0 or not upload.detected)
        low = crop.low(query.side)
        faces = query.faces if method.several else 1

        def make(progress: Progress, watch: StepCallback) -> Upsampler:
            return self.provider.make(
                query.method, side=query.side, seed=query.seed, progress=progress, watch=watch
            )

        started = self.session.begin(query.photo, lambda: BackgroundSearch(make, low, faces, crop.truth))
        if started is None:
            return _error_response(409, BUSY)
        return StreamingResponse(_event_stream(started, request, context), media_type="text/event-stream")

    async def stop(self, named: Named) -> Response:
        """Stop the search for a photo; its event stream ends when it has stopped."""
        search = self.session.search(named.photo)
        if search is not None:
            search.stop()
        return JSONResponse({"stopped": search is not None})

    async def forget(self, named: Named) -> Response:
        """Delete a photo and everything computed from it from memory."""
        self.session.forget(named.photo)
        return JSONResponse({})

    def sheet(self, photo: str) -> Response:
        """The last search's faces as one PNG to download."""
        search = self.session.search(photo)
        picture = sheet_of(search) if search is not None else None
        if picture is None:
            return _error_response(410, "There are no faces to save yet.")
        headers = {"content-disposition": 'attachment; filename="faces.png"'}
        return Response(picture, media_type="image/png", headers=headers)

    def _crop(self, key: str, face: int) -> Crop | None:
        upload = self.session.upload(key)
        if upload is None:
            return None
        if not 0 <= face < len(upload.crops):
            raise ConfigError(f"This photo has no face number {face}.")
        return upload.crops[face]

    def _refused(self, method: str, side: int) -> str:
        try:
            self.provider.make(method, side=side, seed=0, progress=None, watch=None)
        except FedfaceError as error:
            return str(error)
        return ""


def make_app(provider: MethodProvider, reader: Reader, *, port: int) -> FastAPI:
    """The application, for a server that listens at 127.0.0.1:`port`."""
    session = Session()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(session.close)
        reader.close()

    app = FastAPI(title="fedface", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.stopping = lambda: False  # replaced by who serves it
    handlers = RequestHandlers(provider, reader, session)
    app.add_api_route("/", handlers.show, methods=["GET"], response_model=None)
    for name in ("about", "fits", "pixels", "sheet", "detection"):
        app.add_api_route(f"/{name}", getattr(handlers, name), methods=["GET"], response_model=None)
    for name in ("photo", "synthetic", "search", "stop", "forget"):
        app.add_api_route(f"/{name}", getattr(handlers, name), methods=["POST"], response_model=None)
    app.add_exception_handler(FedfaceError, _on_fedface_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(LocalOnlyMiddleware, port=port)
    return app


async def _event_stream(
    search: BackgroundSearch, request: Request, context: ResultContext
) -> AsyncIterator[str]:
    """Server-sent events: `faces` while it runs, then one of `end`, `stopped` or `failed`."""
    sent = time.monotonic()
    try:
        while search.outcome is None:
            await asyncio.sleep(POLL_INTERVAL)
            silence = time.monotonic() - sent
            if silence < EVENT_INTERVAL:
                continue
            if request.app.state.stopping() or await request.is_disconnected():
                return
            event = await run_in_threadpool(progress_event, search)
            if event is not None or silence >= HEARTBEAT:
                sent = time.monotonic()
                yield _event("faces", event) if event is not None else ": still here\n\n"
        name, last = await run_in_threadpool(final_event, search, context)
        yield _event(name, last)
    finally:
        search.stop()


def _event(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False)}\n\n"


def _upload_record(upload: Upload) -> dict[str, Any]:
    return {
        "photo": upload.key,
        "found": upload.found,
        "detected": upload.detected,
        "faces": [
            {"picture": data_uri(crop.preview), "width": crop.width, "sides": crop.sides}
            for crop in upload.crops
        ],
    }


def _error_response(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)


def _too_large() -> str:
    return f"This file is larger than {MAX_UPLOAD // 1_000_000} MB; use a smaller copy of the photo."


async def _on_fedface_error(_: Request, error: Exception) -> Response:
    return _error_response(400, str(error))


async def _on_invalid_request(_: Request, error: Exception) -> Response:
    return _error_response(422, "The page sent an invalid request; reload it.")


async def _on_bug(_: Request, error: Exception) -> Response:
    return _error_response(500, "Internal error in fedface; see its terminal.")
