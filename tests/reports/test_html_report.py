"""The HTML report and the model card: complete, explicit about missing values, and safe against hostile text."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from skimage.io import imread

from fedface.measurements import Interval, NotMeasured
from fedface.privacy.plan import make_plan
from fedface.privacy.privacy_target import NoPrivacy
from fedface.reports import headline_summary, html_report, model_card
from fedface.reports.run_record import BiasRecord, RunRecord

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_{1}$&amp;{{ 7 * 7 }}"
VOID = {"meta", "img", "link", "br", "hr", "path", "use", "rect"}


class Reader(HTMLParser):
    """Collects tags, links, visible text and ids, and detects a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.events: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.events.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.text += data + " "


def read(html: str) -> Reader:
    """Parse the page as a browser would, approximately."""
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def html(record: RunRecord, folder: Path) -> str:
    return html_report.render(record, folder)


def test_the_headline_is_the_question_and_the_summary_is_computed(html: str) -> None:
    """The gap is 8 deviations of 0.6 times how much worse than even: 5.28 before, 1.44 after."""
    text = read(html).text
    assert "Do eight phones of mostly darker faces mend" in text
    assert "shrank from 5.28 to 1.44 dE00" in text
    comparison = re.search(
        r"5\.28 to 1\.44 dE00 \(95 % intervals (\[[^]]+\]) and (\[[^]]+\]), n\s=\s[\d,]+\)", text
    )
    assert (
        comparison is not None and text.count(f"{comparison[1]} and {comparison[2]}") == 2
    )  # answer and tile
    assert "at most epsilon 7.920 at delta 1e-5 (between 7.880 and 7.920), within the guaranteed 8" in text


def test_a_gap_that_only_changed_its_sign_did_not_change_its_size(record: RunRecord) -> None:
    """Worse may mean more or less of a measure; what the answer compares is how far apart the groups are."""
    before = record.bias_before
    assert isinstance(before, BiasRecord)
    gap = before.report.gaps["skin_difference"]
    mirrored = replace(gap, difference=Interval(estimate=-5.28, low=-5.88, high=-4.68, count=80))
    after = replace(before, report=replace(before.report, gaps={"skin_difference": mirrored}))
    swapped = replace(record, bias_before=before, bias_after=after)
    assert "no change is shown" in headline_summary.headline_summary(swapped)[0]


def test_each_curve_states_how_many_samples_it_is_of(record: RunRecord, folder: Path) -> None:
    """Its interval means nothing without; a count that changes is given for each."""
    before = Interval(estimate=4.0, low=3.5, high=4.5, count=64)
    rounds = tuple(replace(entry, metrics={"monk": before}) for entry in record.rounds[:-1])
    rounds += (replace(record.rounds[-1], metrics={"monk": replace(before, count=48)}),)
    page = html_report.render(replace(record, metrics_before={"monk": before}, rounds=rounds), folder)
    assert "mean Monk step, 1 light to 10 dark; n = 64, 48" in page


def test_the_page_loads_nothing_from_the_network(html: str) -> None:
    reader = read(html)
    assert all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert "@import" not in html and "url(http" not in html


def test_ids_are_unique_across_charts(html: str) -> None:
    ids = read(html).ids
    assert len(ids) == len(set(ids))


def test_a_hostile_question_device_and_group_inject_nothing(record: RunRecord, folder: Path) -> None:
    bias = record.bias_after
    assert not isinstance(bias, NotMeasured)
    groups = {HOSTILE: bias.report.groups["very light"], **bias.report.groups}
    counts = {HOSTILE: 40, **bias.report.counts}
    pictures = {name: replace(entry, caption=HOSTILE, alt=HOSTILE) for name, entry in record.pictures.items()}
    hostile = replace(
        record,
        name=HOSTILE,
        question=HOSTILE,
        devices=(replace(record.devices[0], id=HOSTILE, description=HOSTILE), *record.devices[1:]),
        command=HOSTILE,
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        experiment={HOSTILE: HOSTILE},
        bias_after=replace(bias, probe=HOSTILE, report=replace(bias.report, groups=groups, counts=counts)),
        pictures=pictures,
    )
    reader = read(html_report.render(hostile, folder))
    assert "script" not in reader.tags
    assert reader.events == []
    assert all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert "{{ 7 * 7 }}" in reader.text
    shown = read(MarkdownIt("commonmark", {"html": True}).enable("table").render(model_card.render(hostile)))
    assert not {"script", "img"} & set(shown.tags)
    assert shown.events == []


def test_missing_values_are_stated_and_never_nan_or_none(record: RunRecord, folder: Path) -> None:
    missing = NotMeasured(not_measured="the probe has no faces")
    rounds = tuple(
        replace(entry, epsilon=missing, metrics={name: missing for name in entry.metrics})
        for entry in record.rounds
    )
    reduced = replace(
        record,
        plan=make_plan(NoPrivacy(), record.plan.schedule),
        planned_epsilon=missing,
        metrics_before={"distance": missing},
        rounds=rounds,
        bias_before=missing,
        bias_after=missing,
        tones=(),
        aggregation=(),
        notes=(),
    )
    for each in (reduced, replace(reduced, rounds=(), devices=(), attacks=(), pictures={})):
        for text in (read(html_report.render(each, folder)).text, model_card.render(each)):
            assert "not measured: the probe has no faces" in text.lower()
            assert not re.search(r"\b(nan|none|null|inf|undefined)\b", text.replace("No ", "").lower())


def test_a_missing_picture_is_named(record: RunRecord, tmp_path: Path) -> None:
    assert "the file faces.png is not in the run's folder" in html_report.render(record, tmp_path)


def test_the_card_has_every_group_the_spent_epsilon_and_both_hashes(record: RunRecord) -> None:
    text = model_card.render(record)
    for expected in (
        "| very light |",
        "| dark |",
        "Spent: epsilon 7.90",
        record.base_hash,
        record.final_hash,
    ):
        assert expected in text


@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_shows_the_page_within_its_width(
    record: RunRecord, folder: Path, tmp_path: Path, width: int
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium, which is not installed here")
    shot = tmp_path / "shot.png"
    path = html_report.write(record, folder)
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{name}" for name in quiet),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={max(width, 500)},2400",
            f"--screenshot={shot}",
            path.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(imread(shot))[..., :3].astype(int)
    paper = pixels[0, 0]
    inked = np.abs(pixels - paper).sum(axis=2) > 60
    assert inked.mean() > 0.02
    assert not inked[:, -8:].any()
