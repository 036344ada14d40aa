"""What an owner's policy allows and what of it is spent, without writing: no ledger is created, nothing is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedface.cli.console import cell, print_json, say
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
class Owned:
    """A policy, and the ledger that was named, or that its device keeps if the file is a device's."""

    policy: DevicePolicy
    ledger: Path | None  # None: there is none, nor a trace of one
    book: Ledger | None  # the same, verified
    doubts: Sequence[str]  # what is probably not meant, one sentence each


def read_owned(file: Path, ledger: Path | None) -> Owned:
    """The policy of a file and its ledger; a missing ledger is an error where its head or witness exists."""
    doubts: list[str] = []
    if all(section(file, key) is None for key in DEVICE_KEYS):
        check_kind(file, "policy")
        allowed, own = read(file, DevicePolicy), None
    else:
        state = _working(file)
        allowed, own = state.config.policy, state.ledger
        if is_accessible_to_others(own.path):  # opening a ledger does it by itself
            doubts = [f"others could read {own.path}; run chmod 600 on it"]
    doubts = [*allowed.warnings(), *doubts]
    if ledger is None:
        book = None if own is None else own.open_existing()
        path = None if own is None or book is None else own.path
        return Owned(policy=allowed, ledger=path, book=book, doubts=doubts)
    named = own if own is not None and own.path.resolve() == ledger.resolve() else LedgerFiles.at(ledger)
    book = named.open_existing()
    if book is None:
        raise ConfigError(f"{ledger}: no ledger here")
    return Owned(policy=allowed, ledger=ledger, book=book, doubts=doubts)


def _working(file: Path) -> DeviceState:
    """The state of a device file, after checking that the device could work and that its policy's folders exist."""
    read_device_config(file)
    state = device_state(file)
    lost = missing_policy_folders(state.config.policy, state.config.photos)
    if lost:
        raise ConfigError(f"{file}: policy.{lost[0].describe()}")
    return state


@contextmanager
def opened(owned: Owned) -> Iterator[Ledger]:
    """The existing ledger, or an empty temporary one."""
    if owned.book is not None:
        yield owned.book
        return
    with TemporaryDirectory() as folder:
        yield Ledger.open(Path(folder) / "ledger.sqlite")


def _now(allowed: DevicePolicy) -> str | None:
    """Why the owner's conditions do not hold now."""
    try:
        allowed.conditions.check(SystemEnvironment())
    except ConditionsNotMet as reason:
        return reason.private
    return None


def _left(owned: Owned, spent: Sequence[float]) -> list[str]:
    """What is spent of each budget, and where nothing is left."""
    if owned.ledger is None:
        return ["no ledger yet: nothing is spent"]
    lines = []
    for epsilon, limit in zip(spent, owned.policy.budgets, strict=True):
        lines.append(f"spent according to {owned.ledger}: {format_upper_bound(epsilon)}; allowed: {limit}")
        over = overspending(epsilon, limit, unpromised=owned.policy.allow_no_dp)
        lines += [] if over is None else [over]
    return lines


def print_answer(file: Path, owned: Owned, spent: Sequence[float], answer: PolicyReport | None) -> None:
    """For people, in sentences."""
    ended = owned.policy.ended(SystemEnvironment())
    lines = [
        *([] if answer is None else answer.describe()),
        *([] if ended is None else [ended]),
        f"{file} allows:",
        *(f"  {line}" for line in owned.policy.describe()),
        *_left(owned, spent),
        *(f"warning: {doubt}" for doubt in owned.doubts),
    ]
    if (reason := _now(owned.policy)) is not None:
        lines.append(f"not now: {reason}")
    for line in lines:
        say(cell(line))


def print_as_json(owned: Owned, spent: Sequence[float], answer: PolicyReport | None) -> None:
    """For programs."""
    record = {
        "policy": encode(owned.policy),
        "ledger": None if owned.ledger is None else str(owned.ledger),
        "spent": [
            {
                **asdict(limit),
                "spent": epsilon,
                "nothing_left": overspending(epsilon, limit, unpromised=owned.policy.allow_no_dp),
            }
            for epsilon, limit in zip(spent, owned.policy.budgets, strict=True)
        ],
        "asked": [] if answer is None else [asdict(verdict) for verdict in answer.verdicts],
        "together": None if answer is None or answer.together is None else asdict(answer.together),
        "privacy": None if answer is None else answer.privacy,
        "would_take_part": None if answer is None else answer.refusal is None,
        "refusal": None if answer is None else answer.refusal,
        "ended": owned.policy.ended(SystemEnvironment()),
        "warnings": list(owned.doubts),
        "not_at_this_moment": _now(owned.policy),
    }
    print_json(record)
