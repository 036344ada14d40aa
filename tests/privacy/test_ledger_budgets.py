"""Budgets hold for life and in any period, per unit, whatever the clock does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dp_accounting as dp
import pytest
from priced import DELTA, EVENT, cost_of, one_sum, record_run
from pytest import approx

from fedface.errors import LedgerError, PolicyRefusal
from fedface.number_format import format_delta
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.adjacency import replace_one_event
from fedface.privacy.budget import Budget, format_upper_bound
from fedface.privacy.hash_chain import Record
from fedface.privacy.ledger import LateRelease, Ledger
from fedface.privacy.ledger_records import (
    LedgerEntry,
    LedgerRecord,
    StoredReply,
    TransmissionInfo,
    decode,
)
from fedface.privacy.renyi_filter import filter_epsilon


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.db")


def test_a_budget_holds_and_the_refusal_has_requested_spent_and_allowed(ledger: Ledger) -> None:
    budget = cost_of(4)
    for run in "abcd":
        record_run(ledger, [Budget(epsilon=budget, delta=DELTA)], run=run)
    with pytest.raises(PolicyRefusal) as refusal:
        record_run(ledger, [Budget(epsilon=budget, delta=DELTA)], run="e")
    asked = epsilon_of(EVENT, DELTA).upper
    spent = format_upper_bound(ledger.spent(DELTA).upper)
    assert f"requests {format_upper_bound(asked)}; {spent} of {budget:g} is already" in str(refusal.value)
    assert len(ledger.entries()) == 4


@pytest.mark.parametrize(("days", "decoded"), [(None, []), (30.0, [1, 2, 3])])
def test_a_run_that_is_over_is_read_as_one_charge_unless_a_period_counts_its_releases(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float | None, decoded: list[int]
) -> None:
    """A long life makes no request slow: three rounds of one run, then another run in a new session."""
    budgets = [
        Budget(epsilon=30.0, delta=DELTA),
        *([] if days is None else [Budget(epsilon=30.0, delta=DELTA, days=days)]),
    ]
    for round in (1, 2, 3):
        record_run(ledger, budgets, run="over", round=round, terms=one_sum(rounds=3))
    ledger.close()
    found = []

    def noted(record: Record) -> LedgerRecord:
        found.append(decode(record))
        return found[-1]

    monkeypatch.setattr("fedface.privacy.ledger.decode", noted)
    with Ledger.open(tmp_path / "ledger.db") as session:
        record_run(session, budgets, run="new")
        assert [
            entry.round for entry in found if isinstance(entry, LedgerEntry) and entry.run == "over"
        ] == decoded
        assert len(session.entries()) == 4 and {entry.covered_by for entry in session.entries()} == {1, 5}


class Calendar:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.today = datetime(2031, 5, 1, 12, 0, 0, 700_000, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.today


def runs_until_refused(ledger: Ledger, name: str, *limits: Budget) -> int:
    """The number of runs of one round recorded before one is refused."""
    for number in range(100):
        try:
            entry = record_run(ledger, limits, run=f"{name} {number}")
        except PolicyRefusal:
            return number
        ledger.store_reply(entry.run, 1, b"payload", attempt=entry.attempt)
    raise AssertionError("no limit held")


def test_a_period_budget_frees_up_and_the_lifetime_budget_does_not(tmp_path: Path) -> None:
    """Three runs in any 30 days, seven for life: 3 in the first month, 3 in the next, then 1, then none."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    monthly = Budget(epsilon=cost_of(3), delta=DELTA, days=30)
    lifelong = Budget(epsilon=cost_of(7), delta=DELTA)
    recorded = []
    for days in (0, 29, 32, 32, 365):
        clock.today += timedelta(days=days)
        recorded.append(runs_until_refused(ledger, str(clock.today), lifelong, monthly))
    assert recorded == [3, 0, 3, 1, 0]
    shortfall = ledger.check_budget(EVENT, [monthly, lifelong], run_unit="photo")
    assert shortfall is not None and shortfall.budget == lifelong
    assert f"delta {format_delta(DELTA)}, per photo for life" in shortfall.describe()


def test_a_period_ends_to_the_second(tmp_path: Path) -> None:
    """An entry counts while it is at most 31 days old, to the second: its reply may leave for a day."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    monthly = Budget(epsilon=cost_of(1), delta=DELTA, days=30)
    entry = record_run(ledger, [monthly], run="r")
    ledger.store_reply("r", 1, b"payload", attempt=entry.attempt)
    start = clock.today
    clock.today = start + timedelta(days=31)
    shortfall = ledger.check_budget(EVENT, [monthly], run_unit="photo")
    assert shortfall is not None and "per photo in any 30 days" in shortfall.describe()
    clock.today = start + timedelta(days=31, seconds=1)
    assert ledger.check_budget(EVENT, [monthly], run_unit="photo") is None
    assert ledger.spent_against(monthly).upper == 0.0
    clock.today = start + timedelta(days=31)
    assert ledger.spent_against(monthly).upper > 0.0


def test_a_clock_set_back_frees_nothing(tmp_path: Path) -> None:
    """Otherwise a year back and forth would empty every period."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    monthly = Budget(epsilon=cost_of(2), delta=DELTA, days=30)
    start = clock.today
    record_run(ledger, [monthly], run="a")
    clock.today = start - timedelta(days=400)
    assert runs_until_refused(ledger, "b", monthly) == 1
    clock.today = start + timedelta(days=1)
    assert runs_until_refused(ledger, "c", monthly) == 0


def test_an_entry_with_a_late_reply_counts_from_its_reply(tmp_path: Path) -> None:
    """It counts for a day while it may still be computed; after that the period is checked again."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    weekly = [Budget(epsilon=50.0, delta=DELTA), Budget(epsilon=cost_of(1), delta=DELTA, days=7)]
    first = record_run(ledger, weekly, run="r")
    clock.today += timedelta(days=7, hours=20)
    with pytest.raises(PolicyRefusal, match="in any 7 days"):
        record_run(ledger, weekly, run="s")
    clock.today += timedelta(hours=8)
    other = record_run(ledger, weekly, run="s")  # the first can no longer be answered by itself
    with pytest.raises(PolicyRefusal, match="in any 7 days"):
        record_run(ledger, weekly, run="r")
    ledger.store_reply("s", 1, b"payload", attempt=other.attempt)
    clock.today += timedelta(days=8, hours=1)
    assert record_run(ledger, weekly, run="r") == first
    ledger.record_attempt("r", 1, attempt=1)
    clock.today += timedelta(hours=23)
    ledger.store_reply("r", 1, b"payload", attempt=1)
    clock.today += timedelta(days=7, hours=23)
    with pytest.raises(PolicyRefusal, match="in any 7 days"):
        record_run(ledger, weekly, run="t")
    clock.today += timedelta(hours=2)
    record_run(ledger, weekly, run="t")


def test_what_leaves_after_its_period_must_fit_the_present_one(tmp_path: Path) -> None:
    """A masked vector waits until it is asked for: hoarded ones cannot all leave in one week."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    weekly = [Budget(epsilon=50.0, delta=DELTA), Budget(epsilon=cost_of(1), delta=DELTA, days=7)]

    def computed(run: str) -> TransmissionInfo:
        entry = record_run(ledger, weekly, run=run)
        ledger.store_reply(run, 1, b"keys", attempt=entry.attempt)
        return TransmissionInfo(
            run=run, round=1, kind="update", receiver="", protection="", entry=entry.number, masked=True
        )

    first = computed("a")
    clock.today += timedelta(days=9)
    second = computed("b")
    with pytest.raises(LateRelease, match="round 1 of a was computed in an earlier period.*in any 7 days"):
        ledger.record_transmission(b"vector", first, weekly)
    clock.today += timedelta(hours=20)
    ledger.record_transmission(b"vector", second, weekly)
    clock.today += timedelta(days=8)
    with pytest.raises(LateRelease):
        ledger.record_transmission(b"vector", first, weekly)
    clock.today += timedelta(seconds=2)
    ledger.record_transmission(b"vector", first, weekly)
    with pytest.raises(PolicyRefusal, match="in any 7 days"):  # it counts from when it left
        computed("c")
    ledger.record_transmission(b"vector", first, weekly)  # again, while it counts


def test_what_waits_fits_the_periods_of_today(tmp_path: Path) -> None:
    """Three weekly runs wait, and the owner makes the period a month, or has two; what had left is sent again."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    life, one = Budget(epsilon=50.0, delta=DELTA), cost_of(1)
    weekly, monthly = Budget(epsilon=one, delta=DELTA, days=7), Budget(epsilon=one, delta=DELTA, days=30)
    infos = []
    for run in "ab":
        entry = record_run(ledger, [life, weekly], run=run)
        ledger.store_reply(run, 1, b"keys", attempt=entry.attempt)
        infos.append(
            TransmissionInfo(
                run=run, round=1, kind="update", receiver="", protection="", entry=entry.number, masked=True
            )
        )
        clock.today += timedelta(days=9)
    ledger.store_exchange("b", 1, "reveal", b"", b"", closed=b"closed")  # closes; it is no use of the entry
    large = Budget(epsilon=30.0, delta=DELTA, days=40)
    for periods in ([monthly], [large, monthly]):
        with pytest.raises(LateRelease, match="in any 30 days"):
            ledger.record_transmission(b"vector", infos[1], [life, *periods])
    ledger.record_transmission(b"vector", infos[1], [life, weekly])
    ledger.record_transmission(b"vector", infos[1], [life, monthly])
    with pytest.raises(LateRelease, match="in any 7 days"):
        ledger.record_transmission(b"vector", infos[0], [life, weekly])


def test_a_late_round_counts_as_its_whole_run_where_that_fits_the_period(tmp_path: Path) -> None:
    """A run of two rounds beside another of one: in a period that fits two releases it is too much."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    budgets = [Budget(epsilon=50.0, delta=DELTA), Budget(epsilon=cost_of(2), delta=DELTA, days=7)]
    entry = record_run(ledger, budgets, run="a", terms=one_sum(rounds=2))
    ledger.store_reply("a", 1, b"keys", attempt=entry.attempt)
    clock.today += timedelta(days=9)
    record_run(ledger, budgets, run="b")
    info = TransmissionInfo(
        run="a", round=1, kind="update", receiver="", protection="", entry=entry.number, masked=True
    )
    with pytest.raises(LateRelease):
        ledger.record_transmission(b"vector", info, budgets)


def test_a_stored_reply_is_sent_again_where_nothing_more_may_be_released(tmp_path: Path) -> None:
    """Later, with the period full and the lifetime budget lowered: the same bytes are no further release."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    terms = one_sum(rounds=20)
    week = Budget(epsilon=cost_of(1), delta=DELTA, days=7)  # room for one round, not for the run
    first = record_run(ledger, [Budget(epsilon=50.0, delta=DELTA), week], terms=terms)
    ledger.store_reply("r", 1, b"payload", attempt=first.attempt)
    clock.today += timedelta(hours=1)
    limits = [Budget(epsilon=1e-3, delta=DELTA), week]
    assert record_run(ledger, limits, terms=terms) == first and ledger.load_reply("r", 1) == b"payload"
    with pytest.raises(PolicyRefusal):
        record_run(ledger, limits, round=2, terms=terms)


def test_a_round_has_one_answer_and_three_computations_however_late_it_is_asked_again(tmp_path: Path) -> None:
    """A server that asks once a day for a round whose computations last for days gets no second answer unpaid."""
    clock = Calendar()
    ledger = Ledger.open(tmp_path / "ledger.db", now=clock)
    limits = [Budget(epsilon=50.0, delta=DELTA), Budget(epsilon=40.0, delta=DELTA, days=7)]
    attempts = []
    for _ in range(5):
        attempts.append(record_run(ledger, limits).attempt)
        ledger.record_attempt("r", 1, attempt=attempts[-1])
        clock.today += timedelta(days=2)
    assert attempts == [1, 1, 1, 2, 2]
    with pytest.raises(LedgerError, match="for more than 1 day; nothing is sent"):
        ledger.store_reply("r", 1, b"one", attempt=1)
    assert ledger.spent(DELTA).upper == filter_epsilon([(EVENT, 2)], DELTA)


def test_nothing_is_released_without_a_budget(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="at least one limit"):
        record_run(ledger, [], run="r")
    assert ledger.entries() == []


def test_a_run_per_library_costs_a_photo_as_much_as_half_the_noise(ledger: Ledger) -> None:
    """A photo more or less changes its library's content: replace one, at most twice as far."""
    ledger.record(EVENT, run="r", round=0, metadata={"unit": "library"})
    half = epsilon_of(replace_one_event(EVENT), DELTA)
    assert ledger.spent(DELTA) == half
    assert half.upper == approx(
        epsilon_of(dp.GaussianDpEvent(2.0), DELTA).upper, abs=2e-3
    )  # beside the floor of a round
    assert ledger.spent(DELTA, unit="library") == epsilon_of(EVENT, DELTA, unit="library")
    _, so_far, together = ledger.price(EVENT, Budget(epsilon=9, delta=DELTA), run_unit="library")
    assert so_far == half
    assert together.upper == approx(filter_epsilon([(replace_one_event(EVENT), 2)], DELTA), rel=1e-9)


def test_a_run_per_photo_uses_up_every_budget_per_occasion(ledger: Ledger) -> None:
    """The number of photos of an occasion is unknown."""
    per_occasion = Budget(epsilon=1e6, delta=DELTA, unit="occasion")
    shortfall = ledger.check_budget(EVENT, [per_occasion], run_unit="photo")
    assert shortfall is not None and shortfall.requested == shortfall.together == float("inf")
    with pytest.raises(PolicyRefusal, match="requests epsilon inf.*per occasion for life"):
        record_run(ledger, [per_occasion])
    assert ledger.check_budget(EVENT, [per_occasion], run_unit="occasion") is None


def test_nearly_free_releases_do_not_fill_the_disk_or_slow_a_device_down(
    tmp_path: Path,
) -> None:
    """A new run each time, with its own noise: the last sixteen replies are stored, and all are accounted for."""
    ledger = Ledger.open(tmp_path / "ledger.db")
    limit = Budget(epsilon=1.0, delta=DELTA)
    for number in range(20):
        terms = one_sum(sigma=9000.0 + number)
        for again in range(2):
            entry = record_run(ledger, [limit], run=f"run-{number}-{again}", terms=terms)
            ledger.store_reply(entry.run, 1, b"x" * 1000, attempt=entry.attempt)
    stored = [entry.run for entry in ledger.entries() if ledger.load_reply(entry.run, 1) is not None]
    assert stored == [f"run-{number}-{again}" for number in range(12, 20) for again in range(2)]
    assert {record.entry for record in ledger.read().records if isinstance(record, StoredReply)} == {
        entry.number for entry in ledger.entries()
    }
    assert len(ledger.entries()) == 40
    # Each costs at least the floor of a round, one Gaussian release with multiplier 200: 40 of them are one with 31.6.
    floor = filter_epsilon([(dp.GaussianDpEvent(200.0), 40)], DELTA)
    assert ledger.spent(DELTA).upper == approx(floor, rel=1e-2)
