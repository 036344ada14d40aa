"""Participation conditions: hours, power and load, what cannot be measured, and what a server learns of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from fedface.privacy import participation_conditions
from fedface.privacy.participation_conditions import (
    NOT_NOW_MESSAGE,
    ConditionsNotMet,
    EnvironmentOfWork,
    ParticipationConditions,
    Power,
    SystemEnvironment,
    parse_expiry,
)


@dataclass(frozen=True)
class FakeMachine:
    """A machine with given measurements."""

    clock: str = "12:00"
    mains: bool | None = True
    share: float | None = None
    busy: float | None = 0.0

    def now(self) -> datetime:
        return datetime.fromisoformat(f"2027-01-31T{self.clock}:59+01:00")

    def power(self) -> Power:
        return Power(on_ac=self.mains, battery=self.share)

    def load(self) -> float | None:
        return self.busy


class Silent:
    """A machine that must not be queried."""

    def now(self) -> datetime:
        raise AssertionError("the time must not be read")

    def power(self) -> Power:
        raise AssertionError("the power must not be read")

    def load(self) -> float | None:
        raise AssertionError("the load must not be read")


def reason(expected: ParticipationConditions, machine: FakeMachine) -> str | None:
    """The private reason, None if the conditions hold; the public one is always the same."""
    try:
        expected.check(machine)
    except ConditionsNotMet as refusal:
        assert str(refusal) == NOT_NOW_MESSAGE
        return refusal.private
    return None


def test_without_conditions_nothing_is_read() -> None:
    ParticipationConditions().check(Silent())
    assert ParticipationConditions().describe() == []


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("09:00-17:30", ["09:00", "17:29"], ["08:59", "17:30", "00:00"]),
        ("18:00-24:00", ["18:00", "23:59"], ["17:59", "00:00"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
    ],
)
def test_hours_hold_from_their_start_until_before_their_end(
    hours: str, inside: list[str], outside: list[str]
) -> None:
    expected = ParticipationConditions(hours=(hours,))
    assert [reason(expected, FakeMachine(clock=clock)) for clock in inside] == [None] * len(inside)
    for clock in outside:
        assert reason(expected, FakeMachine(clock=clock)) == f"it is {clock}; the policy's hours are {hours}"


def test_one_of_several_hour_ranges_is_sufficient() -> None:
    expected = ParticipationConditions(hours=("01:00-03:00", "13:00-14:00"))
    assert reason(expected, FakeMachine(clock="02:00")) is None
    assert reason(expected, FakeMachine(clock="13:30")) is None
    assert reason(expected, FakeMachine(clock="05:00")) is not None


@pytest.mark.parametrize(
    ("expected", "machine", "words"),
    [
        (ParticipationConditions(require_ac_power=True), FakeMachine(mains=True), None),
        (
            ParticipationConditions(require_ac_power=True),
            FakeMachine(mains=False, share=1.0),
            "mains is not connected",
        ),
        (
            ParticipationConditions(require_ac_power=True),
            FakeMachine(mains=None, share=1.0),
            "mains is unknown",
        ),
        (ParticipationConditions(min_battery=0.5), FakeMachine(mains=True, share=0.01), None),
        (ParticipationConditions(min_battery=0.5), FakeMachine(mains=False, share=0.5), None),
        (ParticipationConditions(min_battery=0.5), FakeMachine(mains=None, share=0.6), None),
        (
            ParticipationConditions(min_battery=0.5),
            FakeMachine(mains=False, share=0.42),
            "the battery is at 42%",
        ),
        (ParticipationConditions(min_battery=0.5), FakeMachine(mains=None, share=None), "can be read"),
        (ParticipationConditions(min_battery=0.5), FakeMachine(mains=False, share=None), "can be read"),
        (ParticipationConditions(max_load=0.5), FakeMachine(busy=0.5), None),
        (ParticipationConditions(max_load=0.5), FakeMachine(busy=0.75), "the load per core is 0.75"),
        (ParticipationConditions(max_load=0.5), FakeMachine(busy=None), "cannot be read"),
        (ParticipationConditions(max_load=0.5), FakeMachine(busy=float("nan")), "cannot be read"),
    ],
)
def test_power_and_load(expected: ParticipationConditions, machine: FakeMachine, words: str | None) -> None:
    """A condition that the machine cannot measure is not met."""
    found = reason(expected, machine)
    assert found is None if words is None else found is not None and words in found


def test_conditions_are_described() -> None:
    expected = ParticipationConditions(hours=("22:00-07:00",), min_battery=0.3, max_load=0.5)
    assert expected.describe() == [
        "between 22:00-07:00, local time",
        "on mains, or with the battery at 30% or more",
        "while the load per core is 0.5 or less",
    ]


@pytest.mark.parametrize(
    "hours", ["22-7", "22:00", "25:00-07:00", "22:60-07:00", "24:00-01:00", "07:00-07:00", ""]
)
def test_invalid_hours_are_refused(hours: str) -> None:
    with pytest.raises(ValueError, match="^hours must"):
        ParticipationConditions(hours=(hours,))


@pytest.mark.parametrize(
    "wrong",
    [{"min_battery": -0.1}, {"min_battery": 50.0}, {"max_load": 0.0}, {"max_load": float("nan")}],
)
def test_numbers_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ParticipationConditions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", ["2027-02-30", "tomorrow", "20270131", "2027-1-31", "2027-01-31T00:00", ""])
def test_days_that_do_not_exist_are_refused(words: str) -> None:
    assert parse_expiry("2028-02-29").year == 2028
    with pytest.raises(ValueError, match="must be a day such as 2027-01-31"):
        parse_expiry(words)


def supply(folder: Path, name: str, **files: str) -> None:
    """One power supply as Linux shows it."""
    (folder / name).mkdir(parents=True)
    for key, text in files.items():
        (folder / name / key).write_text(f"{text}\n")


def machine(
    monkeypatch: pytest.MonkeyPatch, supplies: Path, battery: object, platform: str = "linux"
) -> Power:
    """The power of a machine with these supplies, of whose battery psutil says this."""
    monkeypatch.setattr(participation_conditions, "POWER_SUPPLIES", supplies)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    return SystemEnvironment().power()


HALF_FULL = SimpleNamespace(percent=50, secsleft=0, power_plugged=None)


def test_a_machine_without_a_battery_is_on_ac_power(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one without any power supply, and one whose only battery is in its mouse."""
    require_ac_power = Power(on_ac=True, battery=None)
    assert machine(monkeypatch, tmp_path / "none", None) == require_ac_power
    supply(tmp_path / "mouse", "hidpp_battery_0", type="Battery", scope="Device")
    assert machine(monkeypatch, tmp_path / "mouse", HALF_FULL) == require_ac_power
    assert machine(monkeypatch, tmp_path / "none", None, platform="darwin") == require_ac_power


def test_a_battery_without_readings_is_not_treated_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unread = Power(on_ac=None, battery=None)
    supply(tmp_path / "laptop", "BAT0", type="Battery", scope="System")
    assert machine(monkeypatch, tmp_path / "laptop", None) == unread
    assert machine(monkeypatch, tmp_path / "none", None, platform="win32") == unread
    (tmp_path / "odd" / "BAT0").mkdir(parents=True)
    (tmp_path / "odd" / "BAT0" / "type").write_bytes(b"\xff\xfe")
    assert machine(monkeypatch, tmp_path / "odd", HALF_FULL) == unread


def test_a_laptops_charge_and_plug_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """psutil only knows plugs named AC; any plug that supplies power counts."""
    supply(tmp_path, "BAT0", type="Battery")
    assert machine(monkeypatch, tmp_path, HALF_FULL) == Power(on_ac=None, battery=0.5)
    away = SimpleNamespace(percent=80, secsleft=0, power_plugged=False)
    assert machine(monkeypatch, tmp_path, away) == Power(on_ac=False, battery=0.8)
    supply(tmp_path, "ADP1", type="Mains", online="1")
    assert machine(monkeypatch, tmp_path, HALF_FULL) == Power(on_ac=True, battery=0.5)


def test_this_machine_has_measurements() -> None:
    here = SystemEnvironment()
    assert here.now().tzinfo is not None
    assert here.load() is None or here.load() >= 0  # type: ignore[operator]
    assert isinstance(here.power(), Power)


def test_only_other_programs_count_as_load_while_this_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores for 100 s, on which this process and its worker use 1.5 and another program 0.5 all the time."""
    seconds = SimpleNamespace(passed=0.0)

    class Family:
        def __init__(self, share: float) -> None:
            self.share = share

        def cpu_times(self) -> SimpleNamespace:
            half = self.share * seconds.passed / 2
            return SimpleNamespace(user=half, system=0.0, children_user=half, children_system=0.0)

        def children(self, recursive: bool) -> list[Family]:
            return [Family(1.4)]

    class Times(NamedTuple):
        user: float
        idle: float
        iowait: float

    monkeypatch.setattr(participation_conditions.clock, "monotonic", lambda: seconds.passed)
    monkeypatch.setattr(psutil, "Process", lambda: Family(0.1))
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(2.0 * seconds.passed, 7.0, seconds.passed))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    environment, loads = EnvironmentOfWork(), []
    for _ in range(20):
        loads.append(environment.load())
        seconds.passed += 1.0
    assert loads[0] == 0.0 and loads[-1] == pytest.approx(0.25)
    assert loads[5] == pytest.approx(0.125)  # a burst counts once it lasts
