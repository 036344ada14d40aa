"""The methods of fedface on the page."""

from __future__ import annotations

import pytest
from fading import Known
from fastapi.testclient import TestClient
from speaking import HOME, PORT, events_of, photo_bytes, pixels_in
from tiny import tiny_gan

from fedface.errors import ConfigError
from fedface.randomness import Streams
from fedface.reports.charts import pixels_of
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.methods import METHODS, is_deterministic
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.web.app import make_app
from fedface.web.image_encoding import images_of
from fedface.web.method_provider import MethodCatalog, describe_training_data, method_info
from fedface.web.upload import Reader


def test_every_method_is_offered_with_a_description_and_pulse_comes_first() -> None:
    """Each once."""
    methods = MethodCatalog(None).methods
    assert methods[0].name == "pulse"
    assert {method.name for method in methods} == set(METHODS)
    assert len({method.description for method in methods}) == len(methods)


def test_deterministic_methods_offer_one_face() -> None:
    """As the upsamplers do."""
    assert all(method_info(method).several != is_deterministic(method) for method in METHODS.values())


def test_the_bundled_generators_training_data_is_stated() -> None:
    """85 % had light skin; interpolation has no training data."""
    provider = MethodCatalog(None)
    assert "85 % had light skin" in provider.training_data("pulse")
    assert provider.training_data("nearest") == ""


@pytest.mark.parametrize(
    "notes",
    [{}, {"recipe": "a sentence"}, {"recipe": {"light_fraction": 7}}, {"recipe": {"light_fraction": True}}],
)
def test_missing_notes_give_no_sentence(notes: dict[str, object]) -> None:
    """A checkpoint may come from elsewhere."""
    assert describe_training_data(notes) == ""


def test_an_encoders_notes_may_contain_its_generators() -> None:
    """Of the generator that it was trained for."""
    notes = {"generator_notes": {"recipe": {"light_fraction": 0.25}}}
    assert "25 % had light skin" in describe_training_data(notes)


@pytest.mark.parametrize(("method", "side", "words"), [
    ("pulse", 5, "5"), ("nothing", 8, "no method named 'nothing'"), ("guidance", 8, "guidance")])  # fmt: skip
def test_unsupported_requests_are_one_sentence(method: str, side: int, words: str) -> None:
    """A side that is not a divisor, an unknown method, a generator that is not a flow."""
    with pytest.raises(ConfigError, match=words):
        MethodCatalog(tiny_gan()).make(method, side=side, seed=0, progress=None, watch=None)


def test_the_page_gives_the_same_faces_as_pulse() -> None:
    """Equal pixels and seed give the faces, consistency errors and marks of a search without the page."""
    provider, reader = MethodCatalog(tiny_gan()), Reader(16, lambda: Known(0))
    with TestClient(make_app(provider, reader, port=PORT), base_url=HOME["origin"], headers=HOME) as client:
        reported = client.post("/photo", content=photo_bytes(16, 16)).json()
        asked = {"photo": reported["photo"], "face": 0, "side": 4}
        low = images_of(pixels_in(client.get("/pixels", params=asked).json()["picture"]))
        query = {**asked, "method": "pulse", "faces": 2, "seed": 3}
        events = events_of(client.post("/search", json=query).text)
    assert events[-1][0] == "end"
    search = PulseUpsampler(tiny_gan().generator, BicubicPulse(4), PulseConfig(), Streams(3))
    generated = search.upsample(low, faces_per_photo=2)
    for face, picture, consistency_error in zip(
        events[-1][1]["faces"], generated.images[0], generated.consistency_error[0].tolist(), strict=True
    ):
        difference = images_of(pixels_in(face["picture"])) - images_of(pixels_of(picture))
        assert float(difference.abs().max()) <= 1 / 255 + 1e-6
        assert face["consistency_error"] == pytest.approx(consistency_error, rel=1e-3)
