"""The log for a device's owner: every payload that left, its receiver, its privacy cost, and the remaining budgets.

The page's layout is device_log.html beside this file: one file, no script, nothing from any network, and a content
security policy that names its style by hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fedface import number_format
from fedface.measurements import Epsilon
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import LedgerSnapshot
from fedface.privacy.ledger_records import LedgerEntry, LedgerRecord, Transmission, Withdrawal
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.spending import price_of, spending_curve, spent_against
from fedface.privacy_units import describe_unit
from fedface.reports import device_log_text
from fedface.reports.device_log_text import moment
from fedface.reports.templates import html_template

TEMPLATE = Path(__file__).with_name("device_log.html")
PAGE_MARK = '<meta name="generator" content="fedface device log">'  # in every page
WIDE, HIGH = 344.0, 120.0  # size of the plot, in units of the page's SVG


@dataclass(frozen=True, kw_only=True)
class LoggedRecord:
    """One transmission or withdrawal, and what it cost."""

    record: Transmission | Withdrawal
    price: Epsilon | None  # cost of its ledger entry alone; None if it has none, or was sent before
    without_noise: bool = False  # whether the server, which adds the noise, saw it without noise

    def what(self) -> str:
        """What left, for which run."""
        match self.record:
            case Withdrawal(run=run, reason=reason):
                return f"You withdrew from {run}" + (f": {reason}" if reason else "")
            case Transmission(kind="update", run=run, round=round):
                return f"An update of a network's weights, for {run}, round {round}"
            case Transmission(kind="metrics", run=run, round=round):
                return f"Metrics of how well a model serves these photos, for {run}, evaluation {round}"
            case Transmission(kind="metrics sum", run=run, round=round):
                return f"The decrypted sum of several devices' metrics, still masked, for {run}, evaluation {round}"
            case Transmission(kind="update sum", run=run, round=round):
                return (
                    f"The decrypted sum of several devices' updates, still masked, for {run}, round {round}"
                )
            case Transmission(kind="exchange", run=run, round=round):
                return f"Keys, signatures or shares of masks of a sum of several devices, for {run}, round {round}"
            case Transmission(run=run, round=round, reason=reason):
                return f"A refusal, to {run}, round {round}: {reason}"

    def cost(self) -> str:
        """Its cost, in words."""
        match self.record:
            case Transmission(entry=entry) if self.price is not None:
                return f"{self.price}, for this release alone (entry {entry})"
            case Transmission(kind="update sum" | "metrics sum"):
                return "none: each device's part in the sum is already recorded"
            case Transmission(entry=int() as entry):
                return f"none: the same bytes as before, recorded as entry {entry}"
            case _:
                return "nothing"

    def when(self) -> tuple[str, str]:
        """The day and the time of day, UTC."""
        day, _, hour = moment(self.record.written).partition(", ")
        return day, hour


@dataclass(frozen=True, kw_only=True)
class BudgetStatus:
    """One budget of the policy and how much of it is spent."""

    budget: Budget
    spent: Epsilon

    @property
    def remaining(self) -> float:
        """The remaining epsilon by the upper bound, >= 0."""
        return max(0.0, self.budget.epsilon - self.spent.upper)

    @property
    def at(self) -> str:
        """The budget's delta and unit."""
        return f"at delta {number_format.format_delta(self.budget.delta)} per {self.budget.unit}"

    def describe(self) -> str:
        """Spent, allowed and remaining epsilon, in two sentences."""
        return (
            f"Spent {'so far' if self.budget.days is None else f'in the last {self.budget.days:g} days'}: "
            f"{self.spent}. Allowed {self.budget.period}: {self.budget.epsilon:g}; "
            f"remaining: {number_format.format_epsilon(self.remaining)}."
        )


@dataclass(frozen=True, kw_only=True)
class DeviceLog:
    """What left a device, its privacy cost, and the remaining budgets, for its owner."""

    device: str  # its public name
    receiver: str  # the server that it is connected to
    run: str | None  # only the records of this run; None: all runs
    records: tuple[LoggedRecord, ...]  # oldest first
    history: tuple[LedgerRecord, ...]  # every record of the whole ledger, oldest first
    # Of the policy, for all runs together; the first is the lifetime budget
    budgets: tuple[BudgetStatus, ...]
    unsent: tuple[LedgerEntry, ...]  # recorded releases without a transmission
    withdrawn: Mapping[str, str]  # runs that the owner withdrew from -> UTC time, ISO 8601
    head: str  # digest of the ledger's newest record
    now: datetime

    @property
    def transmissions(self) -> tuple[Transmission, ...]:
        """What left, oldest first."""
        return tuple(each.record for each in self.records if isinstance(each.record, Transmission))

    @property
    def bytes(self) -> int:
        """Total size of all payloads."""
        return sum(sent.bytes for sent in self.transmissions)

    @property
    def without_noise(self) -> int:
        """Number of payloads that the server, which adds the noise, saw without noise."""
        return sum(each.without_noise for each in self.records)

    def record(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "run": self.run,
            "created": self.now.isoformat(),
            "records": [
                {
                    "record": each.record.KIND,
                    **asdict(each.record),
                    "price": None if each.price is None else each.price.to_record(),
                }
                for each in self.records
            ],
            "bytes": self.bytes,
            "seen_by_the_server_without_noise": self.without_noise,
            "budgets": [
                {
                    "allowed": asdict(budget.budget),
                    "spent": budget.spent.to_record(),
                    "remaining": budget.remaining,
                }
                for budget in self.budgets
            ],
            "withdrawn": dict(self.withdrawn),
            "recorded_and_not_sent": [entry.number for entry in self.unsent],
        }


def make_log(
    device: str,
    policy: DevicePolicy,
    snapshot: LedgerSnapshot,
    *,
    receiver: str,
    now: datetime,
    run: str | None = None,
) -> DeviceLog:
    """Combine transmissions with their privacy costs.

    Args:
        policy: Gives the delta and unit of costs, and the budgets.
        receiver: The server that the device is connected to.
        now: The end of periods.
        run: Only records of this run; budgets are always for all runs.

    Raises:
        LedgerError: The cost of an entry cannot be computed.
    """
    entries = snapshot.entries
    by_number = {entry.number: entry for entry in entries}

    def logged(record: Transmission | Withdrawal) -> LoggedRecord:
        if isinstance(record, Withdrawal) or record.entry is None or record.resent:
            return LoggedRecord(record=record, price=None)
        entry = by_number[record.entry]
        return LoggedRecord(
            record=record,
            price=price_of([entry], delta=policy.delta, unit=policy.unit),
            without_noise=entry.metadata.get("noise") == "central",
        )

    sent = {record.entry for record in snapshot.transmissions}
    return DeviceLog(
        device=device,
        receiver=receiver,
        run=run,
        records=tuple(logged(record) for record in snapshot.log if run in (None, record.run)),
        history=snapshot.records,
        budgets=tuple(
            BudgetStatus(budget=limit, spent=spent_against(snapshot.records, limit, now))
            for limit in policy.budgets
        ),
        unsent=tuple(e for e in entries if e.number not in sent and (run is None or e.is_of(run))),
        withdrawn={name: when for name, when in snapshot.withdrawals.items() if run in (None, name)},
        head=snapshot.head,
        now=now,
    )


def render(log: DeviceLog) -> str:
    """The page as HTML text; takes about a second for each point of its curves."""
    life = log.budgets[0]
    return html_template(TEMPLATE.read_text(encoding="utf-8")).render(
        log=log,
        mark=PAGE_MARK,
        style_hash=style_hash(page_style()),
        created=moment(log.now.isoformat()),
        life=life,
        unbounded=math.inf,
        charts=[_chart(log.history, budget, log.now) for budget in log.budgets] if log.history else [],
        days=[each.when()[0] for each in log.records if isinstance(each.record, Transmission)],
        unit=describe_unit(life.spent.unit),
        sure=number_format.percent(1 / (1 + math.exp(-life.spent.upper))),
        one_in=number_format.one_in(life.spent.delta),
        kinds=device_log_text.kinds(log.transmissions),
        what_left=device_log_text.what_left(log.transmissions, log.device),
        never_left=device_log_text.never_left(log.transmissions, log.without_noise),
        not_covered=device_log_text.not_covered(log.without_noise),
        withdrawals={run: moment(when) for run, when in log.withdrawn.items()},
    )


def page_style() -> str:
    """The style sheet of an owner's pages."""
    return TEMPLATE.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]


def style_hash(style: str) -> str:
    """By which a content security policy allows a style sheet, and no other."""
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _chart(history: Sequence[LedgerRecord], budget: BudgetStatus, now: datetime) -> dict[str, Any]:
    """The spent epsilon over time as a step curve, in units of the template's SVG."""
    points = spending_curve(history, budget.budget, now)
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
