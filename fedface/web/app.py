"""The web application: one page, and the few requests that it makes. The only door to FastAPI.

`serving` runs it on the loopback. Every mistake is answered with one sentence; a traceback in the terminal means a
bug in fedface. Nothing is written to disk and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from fedface.errors import ConfigError, FedfaceError
from fedface.reports.charts import pixels_of
from fedface.upsampling.upsampler import Progress, StepCallback, Upsampler
from fedface.web.background_job import BackgroundSearch
from fedface.web.events import Asked, final_event, progress_event, sheet_of
from fedface.web.image_encoding import data_uri
from fedface.web.local_only_middleware import LocalOnlyMiddleware
from fedface.web.method_catalog import MethodProvider
from fedface.web.session import Session
from fedface.web.upload import Crop, Reader, Upload

PAGE = Path(__file__).with_name("page.html")
MAX_UPLOAD = 40_000_000  # bytes
MAX_FACES = 12
MAX_SEED = 2**32 - 1
LOOK = 0.02  # seconds between looks at a search
TELL = 0.2  # seconds between two tellings, at least
ALIVE = 2.0  # seconds after which silence is broken, so that a closed page is noticed
GONE = "This photo is no longer here: another one took its place. Drop it again."
BUSY = "A search is running already, perhaps in another window. Stop it, or wait until it is done."


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What the page asks to be searched."""

    photo: str
    face: int
    side: int
    method: str
    faces: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Named:
    """A photo by its key."""

    photo: str


class RequestHandlers:
    """The answers to the page's requests, for one searcher, one reader and one desk."""

    def __init__(self, searcher: MethodProvider, reader: Reader, desk: Session) -> None:
        self.searcher, self.reader, self.desk = searcher, reader, desk
        self.page = PAGE.read_text(encoding="utf-8")
        self.refused = lru_cache(maxsize=256)(self._refused)

    async def show(self) -> Response:
        """The page itself; its one script carries a number that no other script can know."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            f"connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        )
        return HTMLResponse(self.page.replace("NONCE", nonce), headers={"content-security-policy": policy})

    async def about(self) -> Response:
        """What there is to choose from."""
        size = self.searcher.size
        return JSONResponse(
            {
                "size": size,
                "side": max(8, size // 32) if size > 8 else size // 2,
                "offers": [asdict(offer) for offer in self.searcher.offers],
                "most_faces": MAX_FACES,
                "max_upload": MAX_UPLOAD,
            }
        )

    async def photo(self, request: Request) -> Response:
        """Take the bytes of a photo, and answer with the faces in it."""
        content = bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > MAX_UPLOAD:
            return _sorry(413, _too_large())
        async for part in request.stream():
            content += part
            if len(content) > MAX_UPLOAD:
                return _sorry(413, _too_large())
        sitting = await run_in_threadpool(self.reader.read, bytes(content))
        if await request.is_disconnected():
            # Nobody is there to ask for it to be forgotten: it is forgotten now.
            return _sorry(410, GONE)
        self.desk.seat(sitting)
        return JSONResponse(await run_in_threadpool(_told_sitting, sitting))

    async def drawn(self) -> Response:
        """Draw a face, as if somebody had dropped it."""
        sitting = await run_in_threadpool(self.reader.draw, secrets.randbelow(2**31))
        self.desk.seat(sitting)
        return JSONResponse(await run_in_threadpool(_told_sitting, sitting))

    def pixels(self, photo: str, face: int, side: int) -> Response:
        """The pixels that would be searched."""
        crop = self._crop(photo, face)
        if crop is None:
            return _sorry(410, GONE)
        return JSONResponse({"picture": data_uri(pixels_of(crop.low(side)[0]))})

    def fits(self, method: str, side: int) -> Response:
        """Whether a method can do a pixelation (no sentence: it can), and whose faces it has learned from."""
        sentence = self.refused(method, side)
        learned = "" if sentence else self.searcher.learned(method)
        return JSONResponse({"sentence": sentence, "learned": learned})

    async def search(self, wish: SearchRequest, request: Request) -> Response:
        """Start a search and tell how it goes, until it ends or the page is closed."""
        offer = next((offer for offer in self.searcher.offers if offer.name == wish.method), None)
        if offer is None:
            raise ConfigError(f"There is no method named {wish.method!r}.")
        if not 1 <= wish.faces <= MAX_FACES:
            raise ConfigError(f"The number of faces must lie between 1 and {MAX_FACES}.")
        if not 0 <= wish.seed <= MAX_SEED:
            raise ConfigError(f"The seed must be a whole number between 0 and {MAX_SEED}.")
        sitting, crop = self.desk.sitting(wish.photo), self._crop(wish.photo, wish.face)
        if sitting is None or crop is None:
            return _sorry(410, GONE)
        asked = Asked(several=offer.several, face=sitting.found > 0 or not sitting.looked)
        low = crop.low(wish.side)
        faces = wish.faces if offer.several else 1

        def make(progress: Progress, watch: StepCallback) -> Upsampler:
            return self.searcher.make(
                wish.method, side=wish.side, seed=wish.seed, progress=progress, watch=watch
            )

        started = self.desk.begin(wish.photo, lambda: BackgroundSearch(make, low, faces, crop.truth))
        if started is None:
            return _sorry(409, BUSY)
        return StreamingResponse(_telling(started, request, asked), media_type="text/event-stream")

    async def stop(self, named: Named) -> Response:
        """Stop the search for a photo; the stream of the search tells when it has stopped."""
        search = self.desk.search(named.photo)
        if search is not None:
            search.stop()
        return JSONResponse({"stopped": search is not None})

    async def forget(self, named: Named) -> Response:
        """Forget a photo and everything that was made of it."""
        self.desk.forget(named.photo)
        return JSONResponse({})

    def sheet(self, photo: str) -> Response:
        """The last search's faces as one PNG to keep."""
        search = self.desk.search(photo)
        picture = sheet_of(search) if search is not None else None
        if picture is None:
            return _sorry(410, "There are no faces to save yet.")
        headers = {"content-disposition": 'attachment; filename="faces.png"'}
        return Response(picture, media_type="image/png", headers=headers)

    def _crop(self, key: str, face: int) -> Crop | None:
        sitting = self.desk.sitting(key)
        if sitting is None:
            return None
        if not 0 <= face < len(sitting.crops):
            raise ConfigError(f"This photo has no face number {face}.")
        return sitting.crops[face]

    def _refused(self, method: str, side: int) -> str:
        try:
            self.searcher.make(method, side=side, seed=0, progress=None, watch=None)
        except FedfaceError as error:
            return str(error)
        return ""


def make_app(searcher: MethodProvider, reader: Reader, *, port: int) -> FastAPI:
    """The application, for a server that listens at 127.0.0.1:`port`."""
    desk = Session()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.close)
        reader.close()

    app = FastAPI(title="fedface", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answers = RequestHandlers(searcher, reader, desk)
    asked: dict[str, Callable[..., Any]] = {"/": answers.show, "/about": answers.about, "/fits": answers.fits,
                                            "/pixels": answers.pixels, "/sheet": answers.sheet}  # fmt: skip
    for path, answer in asked.items():
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    ordered: dict[str, Callable[..., Any]] = {"/photo": answers.photo, "/drawn": answers.drawn,
                                              "/search": answers.search, "/stop": answers.stop,
                                              "/forget": answers.forget}  # fmt: skip
    for path, answer in ordered.items():
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    app.add_exception_handler(FedfaceError, _mended)
    app.add_exception_handler(RequestValidationError, _misread)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(LocalOnlyMiddleware, port=port)
    return app


async def _telling(search: BackgroundSearch, request: Request, asked: Asked) -> AsyncIterator[str]:
    """Server-sent events: `faces` while it runs, then one of `end`, `stopped` or `failed`."""
    told = time.monotonic()
    try:
        while search.outcome is None:
            await asyncio.sleep(LOOK)
            silence = time.monotonic() - told
            if silence < TELL:
                continue
            if await request.is_disconnected():
                return
            event = await run_in_threadpool(progress_event, search)
            if event is not None or silence >= ALIVE:
                told = time.monotonic()
                yield _event("faces", event) if event is not None else ": still here\n\n"
        name, last = await run_in_threadpool(final_event, search, asked)
        yield _event(name, last)
    finally:
        search.stop()


def _event(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False)}\n\n"


def _told_sitting(sitting: Upload) -> dict[str, Any]:
    return {
        "photo": sitting.key,
        "found": sitting.found,
        "looked": sitting.looked,
        "faces": [
            {"picture": data_uri(crop.preview), "width": crop.width, "sides": crop.sides}
            for crop in sitting.crops
        ],
    }


def _sorry(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)


def _too_large() -> str:
    return f"This file is larger than {MAX_UPLOAD // 1_000_000} MB; a smaller copy of the photo will do."


async def _mended(_: Request, error: Exception) -> Response:
    return _sorry(400, str(error))


async def _misread(_: Request, error: Exception) -> Response:
    return _sorry(422, "The page asked for something that this program does not understand; reload it.")


async def _broken(_: Request, error: Exception) -> Response:
    return _sorry(500, "Something went wrong inside fedface; its terminal says what.")
