"""The work of `fedface device log`, `withdraw` and `erase`; fedface/cli/device.py declares them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from fedface import number_format
from fedface.atomic_io import check_output, create_bytes, write_output
from fedface.cli.console import print_json, progress_bars, say, warn
from fedface.device.config import check_kind, is_accessible_to_others
from fedface.device.state import DeviceState, device_state, export, known_runs
from fedface.device.withdrawal import (
    describe_erasure,
    erase,
    files_to_erase,
    withdraw,
    withdrawal_impact,
)
from fedface.errors import ConfigError, LedgerError
from fedface.privacy.budget import overspending
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.ledger_records import Transmission
from fedface.reports import device_log_text
from fedface.reports.device_log import PAGE_MARK, DeviceLog, LoggedRecord, make_log, render
from fedface.reports.device_log_text import moment


def device_log(device: Path, run: str | None, page: Path | None, json_out: bool) -> None:
    if page is not None and page.suffix != ".html":
        raise ConfigError(f"--page {page}: expected a name that ends in .html")
    if page is not None:
        check_output(page, PAGE_MARK)
    state = open_device(device)
    snapshot = state.ledger.read()
    if run is not None and run not in (known := known_runs(snapshot)):
        raise ConfigError(f"this device knows no run {run!r}; it knows {', '.join(known) or 'none'}")
    log = make_log(
        state.config.name,
        state.config.policy,
        snapshot,
        receiver=state.config.server,
        now=utc_now(),
        run=run,
    )
    if page is not None:
        with progress_bars() as bars:
            bars.stage("pricing", len(log.history))
            text = render(log)
        write_output(page, text.encode(), PAGE_MARK, mode=0o600)
    if json_out:
        print_json(log.record())
        return
    _print_log(log, no_dp_allowed=state.config.policy.allow_no_dp)
    if page is not None:
        say(f"wrote {page}")


def open_device(path: Path) -> DeviceState:
    """The stored state of the device that an owner's file describes; a warning where others can read it.

    Raises:
        ConfigError: The file cannot be read, or is of another kind.
    """
    check_kind(path, "device")
    state = device_state(path)
    warn_if_accessible(state.config.state)
    return state


def warn_if_accessible(state: Path) -> None:
    """Others who can read the folder learn which runs sent tasks and which releases were recorded."""
    if is_accessible_to_others(state):
        warn(f"others can read {state}; run chmod 700 on it (the device refuses to work until then)")


def _print_log(log: DeviceLog, *, no_dp_allowed: bool) -> None:
    say(f"What left {log.device}{'' if log.run is None else f' for {log.run}'}, newest last")
    if not log.records:
        say("Nothing was sent.")
    for logged in log.records:
        _print_record(logged)
    say("")
    payloads = number_format.counted(len(log.transmissions), "payload")
    say(f"Together: {number_format.size(log.bytes)} in {payloads}.")
    for budget in log.budgets:
        say(budget.describe() + (" (all runs together)" if log.run is not None else ""))
        if (over := overspending(budget.spent.upper, budget.budget, no_dp_allowed=no_dp_allowed)) is not None:
            say(f"{over[0].upper()}{over[1:]}.")
    if log.unsent:
        numbers = ", ".join(str(entry.number) for entry in log.unsent)
        say(f"Recorded and not sent: entries {numbers}. They count as spent.")
    for name, when in log.withdrawn.items():
        say(f"You withdrew from {name}: only refusals have been sent to it since {moment(when)}.")
    if log.transmissions:
        say("Not covered by these numbers:")
        _list(device_log_text.not_covered(log.without_noise))


def _print_record(logged: LoggedRecord) -> None:
    record = logged.record
    say(f"{record.number:>4}  {', '.join(logged.when())}  {logged.what()}")
    if isinstance(record, Transmission):
        say(f"      {number_format.size(record.bytes)} to {record.receiver}; {record.protection}")
        say(f"      cost: {logged.cost()}")


def device_withdraw(device: Path, run: str, reason: str, yes: bool) -> None:
    state = open_device(device)
    mine = withdrawal_impact(state, run)
    if mine.withdrawn is None:
        say(f"Withdrawing from {run}:")
        _list(mine.ahead())
        say("What cannot be undone:")
        _list(mine.lasting())
        confirm(f"Withdraw from {run}", yes)
    deleted = withdraw(state, run, reason)
    when = "now" if mine.withdrawn is None else f"already, on {moment(mine.withdrawn)}"
    say(f"You have withdrawn from {run} {when}; stored replies deleted: {deleted}.")


def device_erase(device: Path, ledger: bool, export_to: Path | None, no_export: bool, yes: bool) -> None:
    if not ledger and (export_to is not None or no_export):
        raise ConfigError(
            "--export and --no-export need --ledger; `fedface ledger export` copies at any time"
        )
    if ledger and (export_to is None) != no_export:
        raise ConfigError("--ledger needs either --export FILE, for a copy first, or --no-export")
    state = open_device(device)
    if export_to is not None and export_to.exists():
        # Written by this very command before it was cut short, or something else that must not be lost.
        if not _is_copy(export_to, state):
            raise ConfigError(f"{export_to}: is there already, and is not overwritten; name another file")
        say(f"{export_to} is an export of the ledger as it is.")
        export_to = None
    plan = files_to_erase(state, ledger=ledger)
    say(f"Erasing what {state.config.name} stores:")
    _list([str(file) for file in plan if file.found] or ["no file of it is there"])
    for file in plan:
        if not file.found:
            say(f"{file}.")
    say("What it means:")
    _list(["Stop the device first: while it works, it may write anew what is deleted here."])
    _list(describe_erasure(state, ledger=ledger))
    confirm("Erase it", yes)
    if export_to is not None:
        create_bytes(export_to, _copy(state).encode())
        say(f"Wrote {export_to}.")
    for sentence in erase(state, ledger=ledger).describe():
        say(sentence)


def _is_copy(file: Path, state: DeviceState) -> bool:
    """Whether a file is an export of the ledger as it is now.

    Raises:
        ConfigError: The ledger cannot be read any more.
    """
    try:
        exported, now = json.loads(file.read_text(encoding="utf-8")), json.loads(_copy(state))
    except LedgerError as error:
        raise ConfigError(
            f"{error}. {file} is there already: if it is the copy of an erasure that was cut short, --no-export in "
            "place of --export ends it"
        ) from error
    except (OSError, ValueError):
        return False
    return isinstance(exported, dict) and {**exported, "created": now["created"]} == now


def _copy(state: DeviceState) -> str:
    policy = state.config.policy
    return export(state.ledger.verify(), delta=policy.delta, unit=policy.unit, now=utc_now())


def confirm(question: str, yes: bool) -> None:
    """Go on if the owner says so; without a terminal, only --yes says it."""
    if not yes and not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal to confirm on, so nothing was done; --yes continues without confirmation"
        )
    if not yes and not typer.confirm(f"{question}?"):
        say("Nothing was done.")
        raise typer.Exit(1)


def _list(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        say(f"  - {sentence}")
