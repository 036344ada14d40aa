"""The methods of fedface as the page offers them."""

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
from fedface.web.method_catalog import learned_from
from fedface.web.method_provider import MethodCatalog, offer_of
from fedface.web.upload import Reader


def test_every_method_is_offered_in_words_and_pulse_comes_first() -> None:
    """Each once, with its own words."""
    offers = MethodCatalog(None).offers
    assert offers[0].name == "pulse"
    assert {offer.name for offer in offers} == set(METHODS)
    assert len({offer.words for offer in offers}) == len(offers)


def test_a_method_with_one_answer_says_so() -> None:
    """As the upsamplers do."""
    assert all(offer_of(method).several != is_deterministic(method) for method in METHODS.values())


def test_the_shipped_generator_tells_whose_faces_it_has_learned_from() -> None:
    """85 % had light skin; enlarging pixels has learned from nobody."""
    provider = MethodCatalog(None)
    assert "85 % had light skin" in provider.learned("pulse")
    assert provider.learned("nearest") == ""


@pytest.mark.parametrize(
    "notes",
    [{}, {"recipe": "a sentence"}, {"recipe": {"light_fraction": 7}}, {"recipe": {"light_fraction": True}}],
)
def test_notes_that_do_not_say_make_no_sentence(notes: dict[str, object]) -> None:
    """A checkpoint may come from a stranger."""
    assert learned_from(notes) == ""


def test_an_encoder_may_name_its_generators_recipe() -> None:
    """Its notes hold those of the generator that it was trained for."""
    notes = {"generator_notes": {"recipe": {"light_fraction": 0.25}}}
    assert "25 % had light skin" in learned_from(notes)


@pytest.mark.parametrize(("method", "side", "words"), [
    ("pulse", 5, "5"), ("nothing", 8, "no method named 'nothing'"), ("guidance", 8, "guidance")])  # fmt: skip
def test_what_a_checkpoint_cannot_do_is_a_sentence(method: str, side: int, words: str) -> None:
    """A side that does not divide, a name that is none, a generator that is no flow."""
    with pytest.raises(ConfigError, match=words):
        MethodCatalog(tiny_gan()).make(method, side=side, seed=0, progress=None, watch=None)


def test_the_page_ends_with_the_faces_that_pulse_finds() -> None:
    """Equal pixels and seed give the faces, misfits and marks of a search without the page."""
    provider, reader = MethodCatalog(tiny_gan()), Reader(16, lambda: Known(0))
    with TestClient(make_app(provider, reader, port=PORT), base_url=HOME["origin"], headers=HOME) as client:
        told = client.post("/photo", content=photo_bytes(16, 16)).json()
        asked = {"photo": told["photo"], "face": 0, "side": 4}
        low = images_of(pixels_in(client.get("/pixels", params=asked).json()["picture"]))
        query = {**asked, "method": "pulse", "faces": 2, "seed": 3}
        events = events_of(client.post("/search", json=query).text)
    assert events[-1][0] == "end"
    search = PulseUpsampler(tiny_gan().generator, BicubicPulse(4), PulseConfig(), Streams(3))
    made = search.upsample(low, faces_per_photo=2)
    for face, picture, consistency_error in zip(
        events[-1][1]["faces"], made.images[0], made.consistency_error[0].tolist(), strict=True
    ):
        difference = images_of(pixels_in(face["picture"])) - images_of(pixels_of(picture))
        assert float(difference.abs().max()) <= 1 / 255 + 1e-6
        assert face["consistency_error"] == pytest.approx(consistency_error, rel=1e-3)
