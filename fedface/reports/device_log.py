"""What a device gave away, told to its owner: every payload, to whom, at what price, and how much is left.

Called by `fedface device log`, `fedface ledger show` and device/withdrawal.py with what privacy/transmission_log.py and
privacy/ledger.py have read and verified; nothing here writes to either. The page's layout is device_log.html beside
this file: one file, no script, nothing from any network, and a content security policy that names its style by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fedface import number_format
from fedface.measurements import Epsilon
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Entry
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.spending import (
    belongs_to,
    line_record,
    payments,
    price_of,
    spending_curve,
    spent_against,
)
from fedface.privacy.transmission_log import OF_FIGURES, RESENT, Transmission, Withdrawal
from fedface.privacy_units import unit_in_words
from fedface.reports import device_log_text
from fedface.reports.device_log_text import moment

TEMPLATE = Path(__file__).with_name("device_log.html")
MOMENTS = 24  # how often a total is computed for a table or a curve; each takes about a second
MINUS = "\N{MINUS SIGN}"  # a line does not break after it
WIDE, HIGH = 344.0, 120.0  # of the plot, in units of the page's SVG


@dataclass(frozen=True, kw_only=True)
class LoggedTransmission:
    """One line of the journal, and what it cost."""

    line: Transmission | Withdrawal
    price: Epsilon | None  # of the entry that paid, alone; None where nothing was paid

    def what(self) -> str:
        """What left, for which run."""
        match self.line:
            case Transmission(kind="update", run=run, round=round):
                return f"An update of a network's weights, for {run}, round {round}"
            case Transmission(kind="figures", run=run, round=round):
                return f"Figures about how well a model serves these photos, for {run}, question {round}"
            case Transmission(kind="opened sum", run=run, round=round, reason=words) if OF_FIGURES in words:
                return f"The opened sum of several devices' figures, for {run}, question {round}"
            case Transmission(kind="opened sum", run=run, round=round):
                return f"The opened sum of several devices, for {run}, round {round}"
            case Transmission(run=run, round=round, reason=words):
                return f"A refusal, to {run}, round {round}: {words.removeprefix(RESENT).removeprefix(': ')}"
            case Withdrawal(run=run, reason=why):
                return f"You left {run}" + (f": {why}" if why else "")

    def cost(self) -> str:
        """What it cost, in words."""
        match self.line:
            case Transmission(entry=entry) if self.price is not None:
                return f"{self.price}, for this alone (entry {entry})"
            case Transmission(kind="opened sum"):
                return "nothing more: each device's part in the sum is paid for"
            case Transmission(entry=int() as entry):
                return f"nothing more: the same bytes as before, paid by entry {entry}"
            case _:
                return "nothing"

    def when(self) -> tuple[str, str]:
        """The day and the time of day, UTC."""
        day, _, hour = moment(self.line.time_text).partition(", ")
        return day, hour


@dataclass(frozen=True, kw_only=True)
class BudgetStatus:
    """One limit of the policy and what is spent of it now."""

    budget: Budget
    spent: Epsilon

    @property
    def left(self) -> float:
        """What the upper bound leaves, >= 0."""
        return max(0.0, self.budget.epsilon - self.spent.upper)

    @property
    def at(self) -> str:
        """At which delta and of which unit it counts."""
        return f"at delta {number_format.format_delta(self.budget.delta)} per {self.budget.unit}"

    def in_words(self) -> str:
        """Spent, allowed and left, in two sentences."""
        return (
            f"Spent {'so far' if self.budget.days is None else f'in the last {self.budget.days:g} days'}: "
            f"{self.spent}. Allowed {self.budget.period}: {self.budget.epsilon:g}; left: {number_format.format_epsilon(self.left)}."
        )


@dataclass(frozen=True, kw_only=True)
class DeviceLog:
    """Everything that an owner may want to know of what left, verified and priced."""

    device: str  # its public name
    receiver: str  # whom it is connected to now
    run: str | None  # only the lines of this run; None: of all
    kept: bool  # whether there is a journal; without one nothing was sent since journals are kept
    told: tuple[LoggedTransmission, ...]  # oldest first
    entries: tuple[Entry, ...]  # of the whole ledger
    budgets: tuple[BudgetStatus, ...]  # of the policy, for all runs together; the first counts for life
    unsent: tuple[Entry, ...]  # booked, without a line in the journal
    withdrawn: Mapping[str, str]  # runs that the owner has left, and when
    bare: int  # payloads that the server saw without noise, because it adds the noise itself
    now: datetime

    @property
    def sent(self) -> tuple[Transmission, ...]:
        """What left, oldest first."""
        return tuple(told.line for told in self.told if isinstance(told.line, Transmission))

    @property
    def bytes(self) -> int:
        """All payloads together."""
        return sum(line.bytes for line in self.sent)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device": self.device, "run": self.run, "journal": self.kept, "made": self.now.isoformat(),
            "lines": [
                {**line_record(told.line), "price": None if told.price is None else told.price.to_record()}
                for told in self.told
            ],
            "bytes": self.bytes,
            "seen_by_the_server_without_noise": self.bare,
            "budgets": [
                {"allowed": asdict(budget.budget), "spent": budget.spent.to_record(), "left": budget.left}
                for budget in self.budgets
            ],
            "withdrawn": dict(self.withdrawn),
            "booked_without_a_line": [entry.number for entry in self.unsent],
        }  # fmt: skip


def make_log(
    device: str,
    policy: DevicePolicy,
    entries: Sequence[Entry],
    lines: Sequence[Transmission | Withdrawal] | None,
    *,
    receiver: str,
    now: datetime,
    run: str | None = None,
) -> DeviceLog:
    """Join what left with what it cost.

    Args:
        device: Its public name.
        policy: Says at which delta, of which unit and against which limits prices are told.
        entries: The whole ledger; empty if there is none.
        lines: The whole journal, read before the ledger; None if there is none.
        receiver: Whom the device is connected to.
        now: Where periods end.
        run: Tell only what this run asked; budgets are for all runs all the same.

    Raises:
        LedgerError: Journal and ledger contradict each other, or an entry cannot be priced.
    """
    paid = payments(lines or (), entries)
    told = [
        LoggedTransmission(
            line=line,
            price=price_of([paid[line.number]], delta=policy.delta, unit=policy.unit)
            if isinstance(line, Transmission) and line.number in paid and not line.reason.startswith(RESENT)
            else None,
        )
        for line in lines or ()
        if run is None or line.run == run
    ]
    numbers = {entry.number for entry in paid.values()}
    withdrawn: dict[str, str] = {}
    for line in lines or ():
        if isinstance(line, Withdrawal) and run in (None, line.run):
            withdrawn.setdefault(line.run, line.time_text)
    return DeviceLog(
        device=device,
        receiver=receiver,
        run=run,
        kept=lines is not None,
        told=tuple(told),
        entries=tuple(entries),
        budgets=tuple(
            BudgetStatus(budget=limit, spent=spent_against(entries, limit, now)) for limit in policy.budgets
        ),
        unsent=tuple(
            entry
            for entry in entries
            if entry.number not in numbers and (run is None or belongs_to(entry, run))
        ),
        withdrawn=withdrawn,
        bare=sum(_is_bare(each.line, paid) for each in told),
        now=now,
    )


def _is_bare(line: Transmission | Withdrawal, paid: Mapping[int, Entry]) -> bool:
    if not isinstance(line, Transmission) or line.number not in paid or line.reason.startswith(RESENT):
        return False
    return bool(json.loads(paid[line.number].metadata).get("noise_at") == "server")


def render(log: DeviceLog) -> str:
    """The page as HTML text; takes about a second for each point of its curves."""
    source = TEMPLATE.read_text(encoding="utf-8")
    style = source.partition("<style>")[2].partition("</style>")[0]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        size=number_format.size,
        shown=number_format.format_epsilon,
        whole=lambda words: re.sub(r"(?<=\de)-(?=\d)", MINUS, words),
    )
    life = log.budgets[0]
    return environment.from_string(source).render(
        log=log,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        made=moment(log.now.isoformat()),
        life=life,
        unbounded=math.inf,
        charts=[_chart(log.entries, budget, log.now) for budget in log.budgets] if log.entries else [],
        days=[told.when()[0] for told in log.told if isinstance(told.line, Transmission)],
        unit=unit_in_words(life.spent.unit),
        sure=number_format.percent(1 / (1 + math.exp(-life.spent.upper))),
        one_in=number_format.one_in(life.spent.delta),
        kinds=device_log_text.kinds(log.sent),
        what_left=device_log_text.what_left(log.sent, log.device),
        never_left=device_log_text.never_left(log.sent, log.bare),
        not_covered=device_log_text.not_covered(log.bare),
        left_runs={run: moment(when) for run, when in log.withdrawn.items()},
    )


def _chart(entries: Sequence[Entry], budget: BudgetStatus, now: datetime) -> dict[str, Any]:
    """A stair of what is spent, in units of the template's SVG."""
    points = spending_curve(entries, budget.budget, now)
    first, last = points[0][0], points[-1][0]
    span = max((last - first).total_seconds(), 1.0)
    known = [epsilon for _, epsilon in points if math.isfinite(epsilon)]
    roof = (1.15 if len(known) == len(points) else 1.6) * max([budget.budget.epsilon, *known])
    path, height = f"M0,{HIGH:g}", HIGH
    for at, epsilon in points:
        height = HIGH * (1 - min(epsilon / roof, 1.0))
        path += f"H{WIDE * (at - first).total_seconds() / span:.1f}V{height:.1f}"
    allowed = HIGH * (1 - budget.budget.epsilon / roof)
    detail = "%H:%M" if last - first < timedelta(days=2) else "%Y"
    return {
        "budget": budget,
        "path": path,
        "allowed": allowed,
        "height": height,
        "below": abs(height - allowed) < 16 or height < 12,  # write the number under its line
        "from": f"{first.day} {first:%B} {first.strftime(detail)}",
        "to": f"{last.day} {last:%B} {last.strftime(detail)}",
    }
