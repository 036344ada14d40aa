"""The command that serves the local page, for people who would rather look than type."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from threading import Timer
from typing import Annotated

import torch
import typer

from fedface.cli.console import DetectorOption, console
from fedface.cli.photos import chosen_detector
from fedface.models.checkpoint import load_model
from fedface.web.app import make_app
from fedface.web.method_provider import MethodCatalog
from fedface.web.server import LOOPBACK, listen, port_of, serve
from fedface.web.upload import Reader


def web(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint for all methods; each its embedded one otherwise.")
    ] = None,
    detector: DetectorOption = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in this computer's browser.")
    ] = False,
) -> None:
    """Serve a page on this computer alone: drop a photo, pixelate it, watch faces appear. Ctrl-C ends it."""
    # Checked before the page is there: a wrong path is one sentence here, and would be a riddle there.
    if detector is not None:
        chosen_detector(detector)
    searcher = MethodCatalog(None if checkpoint is None else load_model(checkpoint))
    if searcher.size <= 64:
        # Small networks gain nothing from a second core, which the page can use.
        torch.set_num_threads(1)
    with listen(port) as listening:
        address = f"http://{LOOPBACK}:{port_of(listening)}/"
        app = make_app(
            searcher, Reader(searcher.size, lambda: chosen_detector(detector)), port=port_of(listening)
        )
        console.print(f"open {address}", highlight=False, soft_wrap=True)
        console.print("only this computer can reach it; Ctrl-C ends it", highlight=False)
        if open_browser:
            Timer(0.5, webbrowser.open, [address]).start()
        serve(app, listening)
    console.print("ended; photos and faces are forgotten", highlight=False)
