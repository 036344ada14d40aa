"""The Flower ServerApp of a bundle (`flwr run .`). `fedface server run` needs no bundle of this checkout."""

from pathlib import Path

from fedface.server_app import server_app

app = server_app(Path(__file__).resolve().parents[1])
