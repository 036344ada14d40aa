"""Responses to the page's requests."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from fading import SIZE, STEPS, FadingSearcher, Known, faces_of
from fastapi.testclient import TestClient
from speaking import HOME, Open, events_of, photo_bytes, pixels_in

from fedface.photos.image_io import png_bytes
from fedface.reports.charts import pixels_of
from fedface.web import app
from fedface.web.image_encoding import images_of
from fedface.web.upload import Reader


def drop(client: TestClient, content: bytes | None = None) -> dict[str, Any]:
    """Upload a photo and return the response."""
    reply = client.post("/photo", content=photo_bytes() if content is None else content)
    assert reply.status_code == 200, reply.text
    return reply.json()


def query(reported: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A search request of the page."""
    return {
        "photo": reported["photo"],
        "face": 0,
        "side": 8,
        "method": "fading",
        "faces": 3,
        "seed": 0,
        **changes,
    }


def low_pixels(client: TestClient, reported: dict[str, Any], side: int) -> np.ndarray:
    """The pixelated face as the page shows it."""
    reply = client.get("/pixels", params={"photo": reported["photo"], "face": 0, "side": side})
    return pixels_in(reply.json()["picture"])


def searching(client: TestClient, reported: dict[str, Any]) -> tuple[list[str], threading.Thread]:
    """A background search: the name of its last event, once the thread has ended."""
    ends: list[str] = []
    thread = threading.Thread(
        target=lambda: ends.append(events_of(client.post("/search", json=query(reported)).text)[-1][0])
    )
    thread.start()
    return ends, thread


def test_an_uploaded_photo_gives_its_faces_largest_first(open_page: Open) -> None:
    """Three faces are found; each has an image and the sides that divide 16."""
    reported = drop(open_page(faces=3))
    assert reported["found"] == 3
    widths = [face["width"] for face in reported["faces"]]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3
    assert [face["sides"] for face in reported["faces"]] == [[2, 4, 8]] * 3
    assert pixels_in(reported["faces"][0]["picture"]).shape == (256, 256, 3)


def test_a_photo_without_a_face_offers_its_centre_square(open_page: Open) -> None:
    """It may be used as a face, and is as wide as the photo is high."""
    reported = drop(open_page(faces=0), photo_bytes(100, 180))
    assert (reported["found"], reported["detected"]) == (0, True)
    assert [face["width"] for face in reported["faces"]] == [100]


def test_a_picture_of_eight_pixels_is_the_input(open_page: Open) -> None:
    """No detection runs, and its own pixels are searched."""
    client = open_page(faces=0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    reported = drop(client, png_bytes(pixels))
    assert (reported["found"], reported["detected"]) == (0, False)
    assert (low_pixels(client, reported, 8) == pixels).all()


def test_a_small_picture_offers_no_pixelation_finer_than_itself(open_page: Open) -> None:
    """Four pixels a side cannot be shown in eight."""
    client = open_page()
    reported = drop(client, photo_bytes(4, 4))
    assert reported["faces"][0]["sides"] == [2, 4]
    reply = client.post("/search", json=query(reported))
    assert reply.status_code == 400 and "2, 4 pixels" in reply.json()["error"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"no picture at all", "not a picture"), (photo_bytes()[:200], "broken PNG"),
     (photo_bytes(1, 1), "too few"), (b"GIF89a" + bytes(40), "GIF")],
)  # fmt: skip
def test_invalid_bytes_get_one_sentence(open_page: Open, content: bytes, words: str) -> None:
    """The sentence has the reason and no internals."""
    reply = open_page().post("/photo", content=content)
    assert reply.status_code == 400
    assert words in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its announced length, and by its actual length if none is announced."""
    monkeypatch.setattr(app, "MAX_UPLOAD", 1000)
    client = open_page()
    for content in (bytes(1001), iter([bytes(600), bytes(600)])):
        reply = client.post("/photo", content=content)
        assert reply.status_code == 413 and "larger than" in reply.json()["error"]


def test_a_synthetic_face_can_be_used_without_a_photo(open_page: Open) -> None:
    """Equal seeds give equal faces, and the page gets one face."""
    reported = open_page().post("/synthetic", json={}).json()
    assert reported["found"] == 1 and len(reported["faces"]) == 1
    reader = Reader(SIZE, lambda: Known(0))
    one, two = (reader.synthetic_face(5).crops[0].truth for _ in range(2))
    assert torch.equal(one, two) and one.shape == (1, 3, SIZE, SIZE)


def test_the_stream_ends_with_the_faces_that_the_search_returned(open_page: Open) -> None:
    """Faces, consistency errors and marks are the upsampler's, and the pixels searched are those shown."""
    client = open_page()
    reported = drop(client)
    low = images_of(low_pixels(client, reported, 8))
    name, end = events_of(client.post("/search", json=query(reported)).text)[-1]
    assert name == "end" and end["steps"] == STEPS
    for shown, expected in zip(end["faces"], faces_of(low, 3), strict=True):
        assert (pixels_in(shown["picture"]) == pixels_of(expected)).all()
    assert [face["fits"] for face in end["faces"]] == [True, False, False]
    consistency_errors = [face["consistency_error"] for face in end["faces"]]
    assert consistency_errors == sorted(
        consistency_errors, reverse=True
    )  # face 3 keeps its blue, face 1 lost most
    assert (
        end["sentences"][0] == "These people do not exist; the pixels do not determine which face is right."
    )


def test_progress_events_show_faces_while_the_search_runs(open_page: Open) -> None:
    """Each event has a later step, brighter faces and more progress."""
    client = open_page(pause=0.15)
    events = events_of(client.post("/search", json=query(drop(client))).text)
    seen = [event for name, event in events if name == "faces" and event["faces"]]
    assert len(seen) >= 3
    steps, shares = [event["step"] for event in seen], [event["share"] for event in seen]
    assert steps == sorted(set(steps)) and shares == sorted(shares)
    light = [pixels_in(event["faces"][2]["picture"]).mean() for event in seen]
    assert light == sorted(light) and light[0] < light[-1]


def test_the_standard_deviation_between_the_faces_is_shown(open_page: Open) -> None:
    """Blue is a third, two thirds and all of itself: its deviation is sqrt(2/27), over three colours."""
    client = open_page()
    reported = drop(client, png_bytes(np.full((8, 8, 3), 255, dtype=np.uint8)))
    _, end = events_of(client.post("/search", json=query(reported)).text)[-1]
    deviation = 255 * (2 / 27 / 3) ** 0.5
    assert end["spread"]["most"] == round(deviation)
    assert end["spread"]["mean"] == pytest.approx(deviation, abs=0.06)
    assert (pixels_in(end["spread"]["picture"]) == 255).all()


def test_a_single_face_is_shown_once_without_a_deviation(open_page: Open) -> None:
    """Three faces were requested of a method that gives one."""
    client = open_page()
    _, end = events_of(client.post("/search", json=query(drop(client), method="single")).text)[-1]
    assert len(end["faces"]) == 1 and end["spread"] is None
    assert "although others are possible" in end["sentences"][1]


def test_an_unsupported_pixelation_is_explained(open_page: Open) -> None:
    """Before a search and instead of one."""
    client = open_page()
    fits = client.get("/fits", params={"method": "single", "side": 4}).json()
    assert "choose 8" in fits["sentence"]
    assert client.get("/fits", params={"method": "single", "side": 8}).json()["sentence"] == ""
    name, event = events_of(client.post("/search", json=query(drop(client), method="single", side=4)).text)[
        -1
    ]
    assert name == "failed" and "choose 8" in event["error"]


@pytest.mark.parametrize(("faces", "toned"), [(1, True), (0, False)])
def test_a_square_without_a_face_has_no_skin_tone(open_page: Open, faces: int, toned: bool) -> None:
    """The centre square of a photo without faces can be searched, but has no skin tone."""
    client = open_page(faces=faces)
    _, end = events_of(client.post("/search", json=query(drop(client))).text)[-1]
    assert [end["tone"] is not None, end["faces"][0]["tone"] is not None] == [toned, toned]
    assert any("Monk scale" in sentence for sentence in end["sentences"]) == toned


def test_the_page_gets_a_methods_training_data(open_page: Open) -> None:
    """As the provider describes it."""
    fits = open_page().get("/fits", params={"method": "fading", "side": 8}).json()
    assert fits["training_data"] == "fading has learned from 85 light faces in 100."


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_search_ends_it_with_a_sentence_and_frees_the_session(open_page: Open) -> None:
    """The traceback goes to the terminal, not to the page."""
    client = open_page()
    reported = drop(client)
    name, event = events_of(client.post("/search", json=query(reported, method="broken")).text)[-1]
    assert name == "failed" and "bug" not in event["error"]
    assert events_of(client.post("/search", json=query(reported)).text)[-1][0] == "end"


def test_a_stopped_search_ends_at_its_next_step(open_page: Open) -> None:
    """Eight steps of a quarter second are interrupted, and another search may start."""
    client = open_page(pause=0.25)
    reported = drop(client)
    started = time.monotonic()
    ends, thread = searching(client, reported)
    time.sleep(0.4)
    assert client.post("/stop", json={"photo": reported["photo"]}).json() == {"stopped": True}
    thread.join()
    assert ends == ["stopped"] and time.monotonic() - started < 1.5
    assert client.get("/sheet", params={"photo": reported["photo"]}).status_code == 410


def test_a_second_search_is_refused_while_one_runs(open_page: Open) -> None:
    """And the first one finishes."""
    client = open_page(pause=0.1)
    reported = drop(client)
    ends, thread = searching(client, reported)
    time.sleep(0.3)
    reply = client.post("/search", json=query(reported))
    assert reply.status_code == 409 and "Another search is running" in reply.json()["error"]
    thread.join()
    assert ends == ["end"]


def test_a_photo_is_deleted_when_another_is_uploaded(open_page: Open) -> None:
    """Its key is not valid any more; neither is an unknown key."""
    client = open_page()
    old = drop(client)
    new = drop(client)
    for key in (old["photo"], "guessed"):
        assert client.get("/pixels", params={"photo": key, "face": 0, "side": 8}).status_code == 410
        assert client.post("/search", json=query({"photo": key})).status_code == 410
    assert low_pixels(client, new, 8).shape == (8, 8, 3)
    client.post("/forget", json={"photo": new["photo"]})
    assert client.get("/pixels", params={"photo": new["photo"], "face": 0, "side": 8}).status_code == 410


def test_a_new_photo_ends_the_search_of_the_old_one(open_page: Open) -> None:
    """There is one photo and one search at a time."""
    client = open_page(pause=0.25)
    reported = drop(client)
    ends, thread = searching(client, reported)
    time.sleep(0.4)
    drop(client)
    thread.join()
    assert ends == ["stopped"]


def test_the_sheet_is_a_download(open_page: Open) -> None:
    """A PNG with a file name, once there are faces."""
    client = open_page()
    reported = drop(client)
    assert client.get("/sheet", params={"photo": reported["photo"]}).status_code == 410
    client.post("/search", json=query(reported))
    reply = client.get("/sheet", params={"photo": reported["photo"]})
    assert reply.content.startswith(b"\x89PNG") and "faces.png" in reply.headers["content-disposition"]


@pytest.mark.parametrize(
    "changes", [{"faces": 0}, {"faces": 13}, {"seed": -1}, {"face": 7}, {"face": -1}, {"method": "none"},
                {"side": 5}, {"side": 0}, {"faces": "many"}],
)  # fmt: skip
def test_an_invalid_search_request_gets_one_sentence(open_page: Open, changes: dict[str, Any]) -> None:
    """Numbers out of range, unknown faces and methods."""
    client = open_page()
    reply = client.post("/search", json=query(drop(client), **changes))
    assert reply.status_code in (400, 422)
    assert reply.json()["error"].endswith(".")


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(open_page: Open) -> None:
    """No address in it, and a policy that allows only its own."""
    reply = open_page().get("/")
    assert "://" not in reply.text and "src=" not in reply.text.replace("img-src", "")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert reply.text.count(f'nonce="{nonce}"') == 2
    assert reply.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:9", "localhost:9", "[::1]:8123", "evil.example:8123", ""]
)
def test_another_name_for_this_machine_is_refused(open_page: Open, host: str) -> None:
    """Another site may point its name here; the Host header then has that name."""
    reply = open_page().get("/", headers={"host": host})
    assert reply.status_code == 403 and "is available only at" in reply.json()["error"]


def test_a_request_without_a_photo_is_limited_in_size(open_page: Open) -> None:
    """A megabyte to /stop is refused before it is read; a normal one is answered."""
    client = open_page()
    reply = client.post("/stop", content=b"x" * 1_000_000)
    assert reply.status_code == 403 and "at most 65536 bytes" in reply.json()["error"]
    assert client.post("/stop", json={}).status_code != 403


def test_both_names_of_the_loopback_are_answered(open_page: Open) -> None:
    """127.0.0.1 and localhost, with the port."""
    client = open_page()
    for host in (HOME["host"], "localhost:8123"):
        assert client.get("/", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8123"]
)
def test_requests_from_another_page_are_refused(open_page: Open, origin: str) -> None:
    """With another origin, and without one."""
    client = open_page()
    assert client.post("/synthetic", json={}, headers={"origin": origin}).status_code == 403
    del client.headers["origin"]
    assert client.post("/synthetic", json={}).status_code == 403


def test_images_are_not_available_to_other_pages(open_page: Open) -> None:
    """A link may lead here; other cross-site requests are refused."""
    client = open_page()
    reported = drop(client)
    del client.headers["origin"]
    elsewhere = {"sec-fetch-site": "cross-site"}
    asked = {"photo": reported["photo"], "face": 0, "side": 8}
    assert client.get("/pixels", params=asked, headers=elsewhere).status_code == 403
    assert client.get("/pixels", params=asked, headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert client.get("/", headers=elsewhere).status_code == 200


def test_the_test_provider_implements_its_protocol() -> None:
    """Its size is the size of its faces."""
    assert FadingSearcher().size == faces_of(torch.zeros(1, 3, 8, 8), 2).shape[-1]
