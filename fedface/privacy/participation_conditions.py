"""When a device may take part: the hours, the power and the load that its owner's policy requires.

The state of the machine is read behind `Environment`, so that tests can replace it. A condition that the machine cannot
reply counts as not met. The server gets `NOT_NOW_MESSAGE` and no more: when the owner sleeps or how full a battery is
stays on the device.
"""

from __future__ import annotations

import os
import re
import sys
import time as clock
from collections import deque
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Protocol

import psutil

from fedface.errors import PolicyRefusal
from fedface.validation import Above, In, checked

NOT_NOW_MESSAGE = "this device does not take part now (its owner's conditions do not hold)"
POWER_SUPPLIES = Path("/sys/class/power_supply")  # where Linux lists batteries
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)")
A_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
MIDNIGHT = 24 * 60  # minutes
LOAD_SECONDS = 10.0  # over which the load of other programs is measured while this one computes


class ConditionsNotMet(PolicyRefusal):
    """A "no" that may be a "yes" later; its text is all that the server sees."""

    def __init__(self, private: str) -> None:
        super().__init__(NOT_NOW_MESSAGE)
        self.private = private  # the reason in full, for the owner's log alone


@dataclass(frozen=True, kw_only=True)
class Power:
    """What feeds a machine. None stands for what cannot be read."""

    on_ac: bool | None  # plugged in, or without a battery
    battery: float | None  # of the battery's charge, 0 to 1; None also where there is no battery


UNKNOWN_POWER = Power(on_ac=None, battery=None)


class Environment(Protocol):
    """What a machine says of itself."""

    def now(self) -> datetime:
        """The owner's local time."""

    def power(self) -> Power:
        """Mains and battery."""

    def load(self) -> float | None:
        """The load average of the last minute per core, >= 0; None if it cannot be read."""


class SystemEnvironment:
    """What the machine says on which this runs."""

    def now(self) -> datetime:
        """The clock and the time zone of the system."""
        return datetime.now().astimezone()

    def power(self) -> Power:
        """The machine's own battery, and whether it is plugged in; a machine without a battery is on mains."""
        supplies = _supplies()
        if supplies is None:
            return UNKNOWN_POWER
        if sys.platform == "linux" and not any(supply.feeds_machine for supply in supplies):
            return Power(on_ac=True, battery=None)
        try:
            battery = psutil.sensors_battery()
        except (AttributeError, OSError, RuntimeError, ValueError):
            return UNKNOWN_POWER
        if battery is None:
            # On a Mac this means that there is none, elsewhere also that it does not answer.
            return Power(on_ac=True, battery=None) if sys.platform == "darwin" else UNKNOWN_POWER
        plugged = battery.power_plugged
        if plugged is None and any(supply.is_online for supply in supplies):
            plugged = True
        share = battery.percent / 100.0
        return Power(on_ac=plugged, battery=share if share >= 0 else None)

    def load(self) -> float | None:
        """The system's load average over the number of cores."""
        try:
            return os.getloadavg()[0] / (os.cpu_count() or 1)
        except (AttributeError, OSError):
            return None


class EnvironmentOfWork(SystemEnvironment):
    """The same while this process, or one that it started, computes: only other programs count as load.

    The load average cannot tell them apart, so that a computation would stop itself. Processor time can.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()

    def load(self) -> float | None:
        """How many processors other programs used in the last `LOAD_SECONDS`, since first asked, per core."""
        try:
            now, used = clock.monotonic(), _seconds_of_others()
        except (OSError, psutil.Error):
            return None
        self._samples.append((now, used))
        while len(self._samples) > 2 and self._samples[1][0] <= now - LOAD_SECONDS:
            self._samples.popleft()
        since, used_then = self._samples[0]
        return max(0.0, used - used_then) / max(now - since, LOAD_SECONDS) / (os.cpu_count() or 1)


def _seconds_of_others() -> float:
    """Processor time of all programs since the start of the machine, without this process and its descendants."""
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - sum(getattr(machine, name, 0.0) for name in _NOT_OTHERS)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            own = process.cpu_times()
        except psutil.NoSuchProcess:  # its time is now its parent's
            continue
        busy -= (
            own.user + own.system + getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
        )
    return busy


# Waiting for a disk is no use of a processor; time of guests is also counted as that of users.
_NOT_OTHERS = ("iowait", "steal", "guest", "guest_nice")


@dataclass(frozen=True)
class _Supply:
    """One folder of /sys/class/power_supply: its files of these names."""

    type: str  # "Battery", "Mains", "USB"
    scope: str  # "Device" for the battery of a mouse or a headset
    online: str  # "1" where a plug gives power

    @property
    def feeds_machine(self) -> bool:
        return self.type == "Battery" and self.scope != "Device"

    @property
    def is_online(self) -> bool:
        return self.type != "Battery" and self.scope != "Device" and self.online == "1"


def _supplies() -> list[_Supply] | None:
    """What Linux lists, nothing on other systems or where it knows no supplies; None if it cannot be read."""
    try:
        folders = sorted(POWER_SUPPLIES.iterdir()) if POWER_SUPPLIES.exists() else []
        return [
            _Supply(*(_word(folder / name) for name in ("type", "scope", "online"))) for folder in folders
        ]
    except (OSError, UnicodeDecodeError):
        return None


def _word(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


@dataclass(frozen=True, kw_only=True)
@checked
class ParticipationConditions:
    """When a device may work; with no field given, always.

    Raises:
        ValueError: An hour, a share or a load that cannot be.
    """

    hours: tuple[str, ...] = ()  # such as "22:00-07:00", local time, the end excluded; none: at any time
    require_ac_power: bool = False  # only when plugged in
    # Share of the charge, 0 to 1; counts off the mains alone.
    min_battery: Annotated[float, In("[0, 1]")] = 0.0
    max_load: Annotated[float, Above(0)] | None = None  # load average of the last minute per core

    def __post_init__(self) -> None:
        for text in self.hours:
            start, end = _minutes(text)
            if start == end:
                raise ValueError(f'hours must differ, got "{text}"; for any time leave hours out')

    def check(self, environment: Environment) -> None:
        """Return if every condition holds now.

        Raises:
            ConditionsNotMet: One does not, or cannot be read; only its `private` says which.
        """
        for private in (self._hour(environment), self._power(environment), self._load(environment)):
            if private is not None:
                raise ConditionsNotMet(private)

    def describe(self) -> list[str]:
        """Each condition as a phrase that can follow "takes part only"."""
        conditions = []
        if self.hours:
            conditions.append(f"between {' or '.join(self.hours)}, local time")
        if self.require_ac_power:
            conditions.append("on mains")
        elif self.min_battery > 0:
            conditions.append(f"on mains, or with the battery at {self.min_battery:.0%} or more")
        if self.max_load is not None:
            conditions.append(f"while the load per core is {self.max_load:g} or less")
        return conditions

    def _hour(self, environment: Environment) -> str | None:
        if not self.hours:
            return None
        now = environment.now()
        if any(_holds(text, now.time()) for text in self.hours):
            return None
        return f"it is {now:%H:%M}; the policy's hours are {', '.join(self.hours)}"

    def _power(self, environment: Environment) -> str | None:
        if not self.require_ac_power and self.min_battery == 0:
            return None
        power = environment.power()
        if power.on_ac:
            return None
        if self.require_ac_power:
            how = "is unknown" if power.on_ac is None else "is not connected"
            return f"mains {how}; the policy requires it (require_ac_power)"
        if power.battery is None:
            return "neither mains nor the battery's charge can be read; the policy requires it (min_battery)"
        if power.battery >= self.min_battery:
            return None
        return (
            f"the battery is at {power.battery:.0%}; the policy requires {self.min_battery:.0%} (min_battery)"
        )

    def _load(self, environment: Environment) -> str | None:
        if self.max_load is None:
            return None
        load = environment.load()
        if load is None or not load >= 0:
            return "the load cannot be read; the policy limits it (max_load)"
        if load <= self.max_load:
            return None
        return f"the load per core is {load:.2f}; the policy allows {self.max_load:g} (max_load)"


def parse_expiry(text: str) -> date:
    """A day such as "2027-01-31".

    Raises:
        ValueError: The text is not a day of the calendar.
    """
    try:
        if A_DAY.fullmatch(text) is None:
            raise ValueError("year-month-day was expected")
        return date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f'must be a day such as 2027-01-31, got "{text:.40}" ({error})') from error


def _minutes(text: str) -> tuple[int, int]:
    """Start and end in minutes after midnight; an end of 24:00 is 1440."""
    found = HOURS.fullmatch(text)
    if found is None:
        raise ValueError(f'hours must be written like "22:00-07:00", got "{text:.40}"')
    start = 60 * int(found[1]) + int(found[2])
    return start, MIDNIGHT if found[3] is None else 60 * int(found[3]) + int(found[4])


def _holds(text: str, now: time) -> bool:
    start, end = _minutes(text)
    minute = 60 * now.hour + now.minute
    return start <= minute < end if start < end else minute >= start or minute < end
