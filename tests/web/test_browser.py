"""The page in a real browser, from uploading a photo to the result."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fading import SIZE, FadingSearcher, Known
from playwright.sync_api import Error, Page, expect, sync_playwright
from speaking import Run, photo_bytes

from fedface.web.upload import Reader

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium), and none was found"
)


@pytest.fixture
def window() -> Iterator[Page]:
    """A new window; any error message of the page fails the test."""
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=CHROMIUM)
        except Error as error:
            pytest.skip(f"needs a Chromium that starts; {CHROMIUM} does not: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda reported: complaints.append(reported.text) if reported.type == "error" else None
        )
        elsewhere: list[str] = []
        page.on("request", lambda asked: elsewhere.append(asked.url))
        yield page
        browser.close()
        assert complaints == []
        assert [url for url in elsewhere if not url.startswith(("http://127.0.0.1:", "data:"))] == []


def drop_file(page: Page, content: bytes, name: str) -> None:
    """Drop a file onto the page."""
    page.evaluate(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], name, { type: "image/png" }));
            const place = document.getElementById("drop");
            for (const what of ["dragenter", "dragover", "drop"])
                place.dispatchEvent(new DragEvent(what, { bubbles: true, cancelable: true, dataTransfer: carried }));
        }""",
        [base64.b64encode(content).decode(), name],
    )


def picture(page: Page, place: str) -> Any:
    """The content of an <img>."""
    return page.get_attribute(place, "src")


def test_a_photo_is_dropped_and_faces_appear(run_page: Run, window: Page, tmp_path: Path) -> None:
    """From the start page to the result, by drop, keyboard and click."""
    running = run_page(FadingSearcher(pause=0.25), Reader(SIZE, lambda: Known(2)))
    window.goto(running.address)
    drop_file(window, photo_bytes(), "photo.png")
    expect(window.locator("#photoText")).to_have_text("2 faces found.")
    expect(window.locator("#people input")).to_have_count(2)
    window.locator("#people input").nth(1).check()

    expect(window.locator("#low")).to_have_attribute("data-side", "8")
    fine = picture(window, "#low")
    window.locator("#side").focus()
    window.keyboard.press("ArrowLeft")
    expect(window.locator("#sideText")).to_have_text("4 × 4 pixels")
    expect(window.locator("#low")).to_have_attribute("data-side", "4")
    assert picture(window, "#low") != fine

    window.select_option("#method", label="Single")
    expect(window.locator("#refused")).to_contain_text("choose 8")
    expect(window.locator("#start")).to_be_disabled()
    window.select_option("#method", label="Fading")
    expect(window.locator("#start")).to_be_enabled()
    window.fill("#faces", "4")
    window.click("#start")

    face = window.locator("#card-3 img").first
    seen = {face.get_attribute("src")}
    while len(seen) < 3:
        assert not window.locator("#spread").is_visible(), "faces should change while the search runs"
        window.wait_for_timeout(50)
        seen.add(face.get_attribute("src"))
    expect(window.locator("#stop")).to_be_enabled()
    expect(window.locator("#summary")).to_have_text(
        "These people do not exist; the pixels do not determine which face is right."
    )
    expect(window.locator("#card-0 .fits")).to_have_text("✓ same pixels")
    expect(window.locator("#card-3 .warn")).to_have_text("✗ does not fit")
    expect(window.locator("#spread")).to_be_visible()
    window.screenshot(path=tmp_path / "page.png", full_page=True)

    with window.expect_download() as saved:
        window.click("#save")
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_search_is_stopped_and_a_synthetic_face_tried(run_page: Run, window: Page) -> None:
    """Without a photo."""
    running = run_page(FadingSearcher(pause=0.5), Reader(SIZE, lambda: Known(0)))
    window.goto(running.address)
    window.click("#synthetic")
    expect(window.locator("#photoText")).to_have_text("A synthetic face; this person does not exist.")
    window.click("#start")
    expect(window.locator("#card-0")).to_be_visible()
    window.click("#stop")
    expect(window.locator("#status")).to_contain_text("Stopped.")
    expect(window.locator("#start")).to_be_enabled()


def test_a_photo_without_a_face_is_reported_and_its_centre_can_be_used(run_page: Run, window: Page) -> None:
    """With the file button."""
    running = run_page(FadingSearcher(), Reader(SIZE, lambda: Known(0)))
    window.goto(running.address)
    window.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo_bytes()})
    expect(window.locator("#photoText")).to_contain_text("No face was found")
    expect(window.locator("#work")).to_be_hidden()
    window.click("#whole")
    expect(window.locator("#low")).to_have_attribute("data-side", "8")
