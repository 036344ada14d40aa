"""What an owner's policy allows and what of it is spent, without writing: no ledger is created, nothing is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedface.cli.console import print_json, say
from fedface.cli.policy_report import PolicyReport
from fedface.codec import encode
from fedface.config import read, section
from fedface.device.config import (
    check_kind,
    is_accessible_to_others,
    missing_policy_folders,
    read_device_config,
)
from fedface.device.state import DeviceState, LedgerFiles, device_state
from fedface.errors import ConfigError
from fedface.privacy.budget import format_upper_bound, overspending
from fedface.privacy.ledger import Ledger
from fedface.privacy.participation_conditions import ConditionsNotMet, SystemEnvironment
from fedface.privacy.policy import DevicePolicy

DEVICE_KEYS = ("policy", "photos", "state")  # any of them at the top level makes a file a device file


@dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """A policy, and the ledger that was named, or that of its device if the file is a device's."""

    policy: DevicePolicy
    ledger_path: Path | None  # None: there is none, nor a trace of one
    ledger: Ledger | None  # verified
    warnings: Sequence[str]  # one sentence each


def read_policy_file(file: Path, named: Path | None) -> PolicyFile:
    """The policy of a file and its ledger; a missing ledger is an error where its head or witness exists."""
    warnings: list[str] = []
    if all(section(file, key) is None for key in DEVICE_KEYS):
        check_kind(file, "policy")
        allowed, own = read(file, DevicePolicy), None
    else:
        state = _working_state(file)
        allowed, own = state.config.policy, state.ledger
        if is_accessible_to_others(own.path):  # opening a ledger does it by itself
            warnings = [f"others could read {own.path}; run chmod 600 on it"]
    is_own = named is None or (own is not None and own.path.resolve() == named.resolve())
    files = own if is_own or named is None else LedgerFiles.at(named)
    ledger = None if files is None else files.open_existing()
    if ledger is None and named is not None:
        raise ConfigError(f"{named}: no ledger here")
    path = named or (None if own is None or ledger is None else own.path)
    return PolicyFile(
        policy=allowed, ledger_path=path, ledger=ledger, warnings=[*allowed.warnings(), *warnings]
    )


def _working_state(file: Path) -> DeviceState:
    """The state of a device file, after checking that the device could work and that its policy's folders exist."""
    read_device_config(file)
    state = device_state(file)
    lost = missing_policy_folders(state.config.policy, state.config.photos)
    if lost:
        raise ConfigError(f"{file}: policy.{lost[0].describe()}")
    return state


@contextmanager
def ledger_or_empty(ledger: Ledger | None) -> Iterator[Ledger]:
    """A ledger, closed on leaving, or an empty temporary one."""
    with TemporaryDirectory() as folder:
        with ledger or Ledger.open(Path(folder) / "ledger.sqlite") as session:
            yield session


def not_now(policy: DevicePolicy) -> str | None:
    """Which of the owner's conditions does not hold now; for the owner alone."""
    try:
        policy.conditions.check(SystemEnvironment())
    except ConditionsNotMet as reason:
        return reason.private
    return None


def _spending(source: PolicyFile, spent: Sequence[float]) -> list[str]:
    """How much of each budget is spent, and which are exhausted."""
    if source.ledger_path is None:
        return ["no ledger yet: nothing is spent"]
    lines = []
    for epsilon, limit in zip(spent, source.policy.budgets, strict=True):
        lines.append(
            f"spent according to {source.ledger_path}: {format_upper_bound(epsilon)}; allowed: {limit}"
        )
        over = overspending(epsilon, limit, no_dp_allowed=source.policy.allow_no_dp)
        lines += [] if over is None else [over]
    return lines


def print_report(file: Path, source: PolicyFile, spent: Sequence[float], report: PolicyReport | None) -> None:
    ended = source.policy.ended(SystemEnvironment())
    lines = [
        *([] if report is None else report.describe()),
        *([] if ended is None else [ended]),
        f"{file} allows:",
        *(f"  {line}" for line in source.policy.describe()),
        *_spending(source, spent),
        *(f"warning: {warning}" for warning in source.warnings),
    ]
    if (reason := not_now(source.policy)) is not None:
        lines.append(f"not now: {reason}")
    for line in lines:
        say(line)


def print_report_as_json(source: PolicyFile, spent: Sequence[float], report: PolicyReport | None) -> None:
    record = {
        "policy": encode(source.policy),
        "ledger": None if source.ledger_path is None else str(source.ledger_path),
        "spent": [
            {
                **asdict(limit),
                "spent": epsilon,
                "exhausted": overspending(epsilon, limit, no_dp_allowed=source.policy.allow_no_dp),
            }
            for epsilon, limit in zip(spent, source.policy.budgets, strict=True)
        ],
        "requests": [] if report is None else [asdict(verdict) for verdict in report.verdicts],
        "together": None if report is None or report.together is None else asdict(report.together),
        "privacy": None if report is None else report.privacy,
        "would_take_part": None if report is None else report.refusal is None,
        "refusal": None if report is None else report.refusal,
        "ended": source.policy.ended(SystemEnvironment()),
        "warnings": list(source.warnings),
        "not_at_this_moment": not_now(source.policy),
    }
    print_json(record)
