"""The command `fedface web`: the local web page."""

from __future__ import annotations

import webbrowser
from threading import Timer

from fedface.cli.console import say
from fedface.cli.options import CheckpointOption, DetectorOption, OpenBrowserOption, PortOption


def web(
    port: PortOption = 0,
    checkpoint: CheckpointOption = None,
    detector: DetectorOption = None,
    open_browser: OpenBrowserOption = False,
) -> None:
    """Serve a web page for upsampling on this computer only.

    Upload a photo, pixelate it, and watch faces appear while the search runs.
    """
    import torch

    from fedface.models.checkpoint import load_model
    from fedface.photos.detectors import load_detector
    from fedface.web.app import make_app
    from fedface.web.method_provider import MethodCatalog
    from fedface.web.server import LOOPBACK, listen, port_of, serve
    from fedface.web.upload import Reader

    # Report a wrong path here, before the page is served.
    if detector is not None:
        load_detector(detector)
    provider = MethodCatalog(None if checkpoint is None else load_model(checkpoint))
    if provider.size <= 64:
        # Small networks gain nothing from a second core, which the page can use.
        torch.set_num_threads(1)
    with listen(port) as listening:
        address = f"http://{LOOPBACK}:{port_of(listening)}/"
        app = make_app(
            provider, Reader(provider.size, lambda: load_detector(detector)), port=port_of(listening)
        )
        say(f"open {address}")
        say("only this computer can reach it; Ctrl-C ends it")
        if open_browser:
            Timer(0.5, webbrowser.open, [address]).start()
        serve(app, listening)
    say("stopped; photos and generated faces were in memory only")
