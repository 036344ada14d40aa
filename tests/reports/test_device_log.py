"""The log of a device: each payload with its cost, each budget with what is left, and a page for phones."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedface import number_format
from fedface.number_format import rounded_down, rounded_up
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.ledger import Ledger, LedgerSnapshot
from fedface.privacy.ledger_records import (
    LedgerEntry,
    Transmission,
    TransmissionInfo,
    TransmissionKind,
    Withdrawal,
)
from fedface.privacy.mechanism import ClippedSum, Event, GaussianSum
from fedface.privacy.policy import DevicePolicy, Period
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.privacy.spending import MOMENTS, price_of, spending_curve, totals
from fedface.reports import device_log, device_log_text
from fedface.reports.device_log import DeviceLog, make_log, render

START = datetime(2026, 3, 1, 21, 4, tzinfo=UTC)
POLICY = DevicePolicy(max_epsilon=8, delta=1e-6, periods=(Period(days=30, epsilon=2),))
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


def noised(sigma: float) -> Event:
    """One Gaussian release at sampling rate 1, whose cost is quick to compute."""
    return GaussianSum(sigma=sigma, clip_norm=1.0).event()


class Owner:
    """A ledger with a controlled clock."""

    def __init__(self, folder: Path) -> None:
        self.now = START
        self.ledger = Ledger.open(folder / "ledger.sqlite", now=lambda: self.now)

    def pass_days(self, days: float) -> None:
        self.now += timedelta(days=days)

    def record(self, event: Event, *, run: str = "r", round: int = 1, unit: str = "photo") -> LedgerEntry:
        metadata = {"unit": unit, "objective": "generator"}
        return self.ledger.record(event, run=run, round=round, metadata=metadata)

    def send(
        self, payload: bytes, entry: LedgerEntry, *, run: str = "r", kind: TransmissionKind = "update"
    ) -> Transmission:
        if self.ledger.load_reply(entry.run, entry.round) is None:
            self.ledger.store_reply(entry.run, entry.round, payload)
        info = TransmissionInfo(
            run=run,
            round=entry.round,
            kind=kind,
            receiver="home:8000",
            protection="noise",
            entry=entry.number,
        )
        return self.ledger.record_transmission(payload, info)

    def log(self, *, run: str | None = None, policy: DevicePolicy = POLICY) -> DeviceLog:
        return make_log("kitchen", policy, self.ledger.read(), receiver="home:8000", now=self.now, run=run)


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


def test_each_payload_has_the_cost_of_its_own_entry(owner: Owner) -> None:
    for number, sigma in enumerate((5.0, 9.0), start=1):
        owner.send(b"x" * number, owner.record(noised(sigma), round=number))
    reported = owner.log().records
    prices = [line.price for line in reported]
    assert [price for price in prices if price] == [epsilon_of(noised(sigma), 1e-6) for sigma in (5.0, 9.0)]
    assert all(price is not None and (price.delta, price.unit) == (1e-6, "photo") for price in prices)
    assert "at delta 1e-6 per photo, for this release alone (entry 4)" in reported[1].cost()


def test_bytes_are_those_of_the_payloads_and_the_digest_is_theirs(owner: Owner) -> None:
    owner.send(b"payload", owner.record(noised(5)))
    log = owner.log()
    assert log.bytes == 7 and log.transmissions[0].payload_digest == hashlib.sha256(b"payload").hexdigest()


def test_a_resent_reply_has_no_further_cost(owner: Owner) -> None:
    entry = owner.record(noised(5))
    for _ in range(2):
        owner.send(b"payload", entry)
    first, second = owner.log().records
    assert first.price is not None and second.price is None
    assert second.cost() == "none: the same bytes as before, recorded as entry 1"


def test_refusals_and_decrypted_sums_have_no_cost(owner: Owner) -> None:
    kinds: tuple[TransmissionKind, ...] = ("refusal", "update sum", "metrics sum")
    for kind in kinds:
        info = TransmissionInfo(
            run="r", round=1, kind=kind, receiver="home", protection="", reason="not today"
        )
        owner.ledger.record_transmission(b"no", info)
    refusal, opened, metrics = owner.log().records
    assert refusal.what() == "A refusal, to r, round 1: not today" and refusal.cost() == "nothing"
    for each in (opened, metrics):
        assert each.cost().startswith("none: ") and each.price is None
    assert opened.what() == "The decrypted sum of several devices' updates, still masked, for r, round 1"
    assert (
        metrics.what() == "The decrypted sum of several devices' metrics, still masked, for r, evaluation 1"
    )


def test_all_entries_together_have_the_ledgers_cost(owner: Owner) -> None:
    """Also if a run has a coarser unit than the policy."""
    owner.record(noised(5))
    owner.record(noised(9), round=2, unit="library")
    for unit in ("photo", "library"):
        assert price_of(owner.ledger.entries(), delta=1e-6, unit=unit) == owner.ledger.spent(1e-6, unit=unit)


def test_an_entry_of_a_coarser_unit_is_shown_at_the_owners_unit(owner: Owner) -> None:
    owner.send(b"x", owner.record(noised(5), unit="library"))
    (line,) = owner.log().records
    event = convert_unit(noised(5), source="library", target="photo")
    assert line.price is not None and line.price == epsilon_of(event, 1e-6)


def test_totals_are_those_of_the_first_entries(owner: Owner) -> None:
    """Two Gaussians of sigma 6 have the Rényi divergence of one with 6 / sqrt(2)."""
    for number in (1, 2):
        owner.record(noised(6), round=number)
    found = totals(owner.ledger.entries(), delta=1e-6, unit="photo")
    assert found[1] == epsilon_of(noised(6), 1e-6)
    assert found[2].upper == pytest.approx(filter_epsilon([(noised(6 / math.sqrt(2)), 1)], 1e-6), rel=1e-3)


def test_totals_of_a_long_ledger_are_computed_at_some_entries(owner: Owner) -> None:
    for number in range(MOMENTS + 9):
        owner.record(noised(40), round=number)
    entries = owner.ledger.entries()
    found = totals(entries, delta=1e-6, unit="photo")
    assert len(found) == MOMENTS and 1 in found and len(entries) in found
    assert len(totals(entries, delta=1e-6, unit="photo", most=None)) == len(entries)


def test_an_old_entry_counts_only_for_the_lifetime_budget(owner: Owner) -> None:
    """An entry of 40 days ago is outside the period."""
    owner.record(noised(5))
    owner.pass_days(40)
    owner.record(noised(9), round=2)
    life, month = owner.log().budgets
    assert month.spent == epsilon_of(noised(9), 1e-6)
    assert life.spent == owner.ledger.spent(1e-6)
    assert life.remaining == 8 - life.spent.upper and month.remaining == 2 - month.spent.upper


def test_an_overspent_budget_has_zero_left(owner: Owner) -> None:
    """An owner who lowers the budget below what is spent has 0 left, not less."""
    owner.record(noised(1))
    assert owner.log(policy=replace(POLICY, max_epsilon=0.5)).budgets[0].remaining == 0


def test_the_lifetime_curve_never_falls_and_a_periods_curve_returns_to_zero(owner: Owner) -> None:
    for number in (1, 2, 3):
        owner.record(noised(6), round=number)
        owner.pass_days(3)
    owner.pass_days(60)
    entries = owner.ledger.entries()
    life, month = (spending_curve(entries, limit, owner.now) for limit in POLICY.budgets)
    heights = [height for _, height in life]
    assert heights == sorted(heights) and heights[-1] == owner.ledger.spent(1e-6).upper
    assert max(height for _, height in month) == heights[-1] and month[-1] == (owner.now, 0.0)
    assert [at for at, _ in month] == sorted(at for at, _ in month)


def test_a_record_without_a_transmission_is_named_and_counts(owner: Owner) -> None:
    owner.send(b"x", owner.record(noised(5)))
    owner.record(noised(5), round=2)
    log = owner.log()
    assert [entry.round for entry in log.unsent] == [2]
    assert log.budgets[0].spent == owner.ledger.spent(1e-6)


def test_the_log_of_one_run_omits_others_and_shows_total_spending(owner: Owner) -> None:
    """Its metrics are recorded under its name and a slash."""
    for run in ("r", "s", "s/metrics"):
        owner.record(noised(9), run=run)
    owner.send(b"abc", owner.ledger.entries()[1], run="s")
    owner.ledger.withdraw("r", "why")
    log = owner.log(run="s")
    assert [logged.record.run for logged in log.records] == ["s"] and log.bytes == 3 and log.withdrawn == {}
    assert [entry.run for entry in log.unsent] == ["s/metrics"]
    assert log.budgets[0].spent == owner.ledger.spent(1e-6)


def test_withdrawals_are_in_order_with_their_first_time(owner: Owner) -> None:
    owner.send(b"x", owner.record(noised(5)))
    first = owner.ledger.withdraw("r", "I do not like it")
    owner.pass_days(1)
    owner.ledger.withdraw("r")
    log = owner.log()
    assert [type(logged.record) for logged in log.records] == [Transmission, Withdrawal, Withdrawal]
    assert log.records[1].what() == "You withdrew from r: I do not like it" and log.withdrawn == {
        "r": first.written
    }


def test_infinite_epsilon_is_valid_json(owner: Owner) -> None:
    """A release without noise; strict JSON."""
    owner.send(b"x", owner.record(ClippedSum(clip_norm=1.0).event()))
    reported = json.loads(json.dumps(owner.log().record(), allow_nan=False))
    assert reported["records"][0]["price"]["upper"] == "infinite" and reported["budgets"][0]["remaining"] == 0
    assert reported["records"][0]["record"] == "transmission" and reported["bytes"] == 1


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (9.27812, "9.278"), (0.000421333, "0.000421"), (math.inf, "no bound")]
)
def test_an_epsilon_is_written_with_enough_digits(value: float, words: str) -> None:
    assert number_format.format_epsilon(value) == words


def busy(owner: Owner) -> DeviceLog:
    """Updates, one of them resent, a refusal and a withdrawal, of a run and a device with hostile names."""
    for number in (1, 2, 3):
        entry = owner.record(noised(8), run=HOSTILE, round=number)
        owner.send(b"x" * 40_000, entry, run=HOSTILE)
        owner.pass_days(9)
    owner.send(b"x" * 40_000, entry, run=HOSTILE)
    refusal = TransmissionInfo(
        run=HOSTILE, round=4, kind="refusal", receiver=HOSTILE, protection="nothing", reason=HOSTILE
    )
    owner.ledger.record_transmission(b"no", refusal)
    owner.ledger.withdraw(HOSTILE, HOSTILE)
    return replace(owner.log(), device=HOSTILE)


def test_the_page_has_every_record_and_every_budget(owner: Owner) -> None:
    text = render(busy(owner))
    assert text.count('<td class="number">') == 6 and text.count("<svg") == 2
    spent = owner.ledger.spent(1e-6)
    assert (
        f"{number_format.number(spent.estimate, 4)} (between {rounded_down(spent.lower)} and "
        f"{rounded_up(spent.upper)}) at delta 1e" in text
    )
    assert f"{8 - spent.upper:.3f} remaining" in text and "allowed: 2</text>" in text
    for words in (
        "What these numbers mean",
        "Delta",
        "Unit",
        "What never left",
        "names of files and folders",
    ):
        assert words in text


def test_nothing_hostile_becomes_markup_and_nothing_is_loaded(owner: Owner) -> None:
    """No script, no event, no address; the policy lists the one style by its hash."""
    text = render(busy(owner))
    assert "<script" not in text and "<img" not in text and "{{ 7 * 7 }}" in text and "49" not in text[:200]
    assert not re.search(r"<[^>]*\s(on\w+|src|href|style)=", text)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'" in text


def test_what_the_server_saw_without_noise_comes_first(owner: Owner) -> None:
    """A guarantee per library excludes the server; a guarantee per photo includes it."""
    metadata = {"unit": "library", "noise": "central"}
    entry = owner.ledger.record(noised(5.0), run="r", round=1, metadata=metadata)
    for _ in range(2):  # sent twice, seen once
        owner.send(b"plain", entry)
    log = owner.log(policy=replace(POLICY, unit="library"))
    assert log.without_noise == 1 and device_log_text.kinds(log.transmissions) == ["1 update (1 sent again)"]
    text = render(log)
    assert "no epsilon bounds what it learned" in text and "anyone except the server" in text
    assert device_log_text.not_covered(log.without_noise)[0].startswith(
        "the server itself: it saw one of these payloads"
    )
    assert "how many photos" not in text.partition("What never left</h3>")[2].partition("</ul>")[0]


def test_counts_are_not_listed_as_unsent_when_metrics_were_sent(owner: Owner) -> None:
    owner.send(b"x", owner.record(noised(5.0)))
    assert device_log_text.never_left(owner.log().transmissions, 0)[1] == "how many photos or faces there are"
    entry = owner.record(noised(6.0), run="r/metrics")
    owner.send(b"y", entry, kind="metrics")
    text = render(owner.log())
    assert "except for noised counts among the metrics" in text and "1 update, 1 set of metrics" in text
    assert "have which skin tones" in text


def test_a_page_without_a_ledger_reports_no_transmissions(tmp_path: Path) -> None:
    text = render(make_log("kitchen", POLICY, LedgerSnapshot(), receiver="home", now=START))
    assert "Nothing was sent." in text and "Nothing left, so nothing is listed." in text
    assert "Nothing was recorded, so nothing is spent." in text and "<svg" not in text


def test_a_page_about_a_release_without_noise_warns(owner: Owner) -> None:
    owner.send(b"x", owner.record(ClippedSum(clip_norm=1.0).event()))
    text = render(owner.log())
    assert (
        "Nothing bounds the recorded privacy loss: a release had no noise" in text
        and "epsilon infinite at delta" in text
    )
    assert "can be at most 100" in text and "NaN" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, and none was found")
@pytest.mark.parametrize("width", [360, 1000])
def test_a_browser_shows_it_without_errors_or_horizontal_scrolling(
    owner: Owner, tmp_path: Path, width: int
) -> None:
    """On a phone and on a desktop; the style is allowed, and nothing else is requested."""
    from playwright.sync_api import Error, sync_playwright

    path = tmp_path / "log.html"
    path.write_text(render(busy(owner)), encoding="utf-8")
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=CHROMIUM)
        except Error as error:
            pytest.skip(f"needs a Chromium that starts: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints: list[str] = []
        asked: list[str] = []
        page.on("console", lambda result: complaints.append(result.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        cell = page.locator("td").first.evaluate("cell => getComputedStyle(cell).display")
        browser.close()
    assert complaints == [] and asked == [path.as_uri()] and wide <= width
    assert cell == ("block" if width == 360 else "table-cell")


def test_the_template_is_in_the_package() -> None:
    """Where package-data expects it."""
    assert device_log.TEMPLATE == Path(device_log.__file__).with_suffix(".html")
