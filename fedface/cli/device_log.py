"""Commands for the owner of a device about what left it: read the log, leave a run, erase what is kept.

Registered by devices.py. Words and decisions are those of reports/device_log.py and device/withdrawal.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedface import number_format
from fedface.cli.console import cell, console, progress_bars, warn
from fedface.cli.options import JsonOption
from fedface.device.config import check_kind, is_accessible_to_others
from fedface.device.state import DeviceState, device_state, export, verify, write_alone
from fedface.device.withdrawal import (
    FileToErase,
    describe_erasure,
    erase,
    files_to_erase,
    withdraw,
    withdrawal_impact,
)
from fedface.errors import ConfigError, LedgerError
from fedface.privacy.budget import overspending
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.transmission_log import Transmission
from fedface.reports import device_log_text
from fedface.reports.device_log import DeviceLog, LoggedTransmission, make_log, render
from fedface.reports.device_log_text import moment

DeviceArgument = Annotated[Path, typer.Argument(help="The device's file, such as device.yaml.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def device_log(
    device: DeviceArgument,
    run: Annotated[str | None, typer.Option(help="Only what this run asked.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write one HTML page there, for you alone; an older one is replaced.")
    ] = None,
    json_out: JsonOption = False,
) -> None:
    """Say everything that ever left a device: when, to whom, how large, how protected, at what cost."""
    if page is not None and page.suffix != ".html":
        raise ConfigError(f"--page {page}: wanted a name that ends in .html")
    kept = owned(device)
    lines = kept.transmissions()
    entries = kept.entries()
    if run is not None and run not in (known := kept.runs()):
        raise ConfigError(f"this device knows no run {run!r}; it knows {', '.join(known) or 'none'}")
    log = make_log(
        kept.device.name,
        kept.device.policy,
        entries,
        lines,
        receiver=kept.device.server,
        now=utc_now(),
        run=run,
    )
    if page is not None:
        with progress_bars() as bars:
            bars.stage("pricing", len(entries))
            text = render(log)
        page.unlink(missing_ok=True)
        write_alone(page, text)
    if json_out:
        print(json.dumps(log.record(), indent=2))
        return
    _print_log(log, unpromised=kept.device.policy.allow_no_dp)
    if page is not None:
        console.print(f"wrote {page}", highlight=False, soft_wrap=True)


def owned(path: Path) -> DeviceState:
    """What the device of an owner's file keeps; a warning where others may look into it.

    Raises:
        ConfigError: The file cannot be read, or is of another kind.
    """
    check_kind(path, "device")
    kept = device_state(path)
    warn_of_open(kept.device.state)
    return kept


def warn_of_open(state: Path) -> None:
    """A folder that others may look into tells them which runs asked and what was booked."""
    if is_accessible_to_others(state):
        warn(f"others may look into {state}; run chmod 700 on it (the device refuses to work until then)")


def _print_log(log: DeviceLog, *, unpromised: bool) -> None:
    _say(f"What left {log.device}{'' if log.run is None else f' for {log.run}'}, newest last")
    if not log.kept:
        _say("Nothing was sent since this device keeps a journal: there is none yet.")
    elif not log.told:
        _say("Nothing was sent.")
    for told in log.told:
        _print_told(told)
    _say("")
    payloads = "1 payload" if len(log.sent) == 1 else f"{len(log.sent)} payloads"
    _say(f"Together: {number_format.size(log.bytes)} in {payloads}.".replace(number_format.SPACE, " "))
    for budget in log.budgets:
        _say(budget.in_words() + (" (all runs together)" if log.run is not None else ""))
        if (over := overspending(budget.spent.upper, budget.budget, unpromised=unpromised)) is not None:
            _say(f"{over[0].upper()}{over[1:]}.")
    if log.unsent:
        numbers = ", ".join(str(entry.number) for entry in log.unsent)
        _say(
            f"Booked without a line above: entries {numbers}. Nothing of them was sent, or it was before this device "
            "kept a journal; they count as spent."
        )
    for name, when in log.withdrawn.items():
        _say(f"You left {name}: nothing but refusals leaves for it since {moment(when)}.")
    if log.sent:
        _say("Not covered by these numbers:")
        _list(device_log_text.not_covered(log.bare))


def _print_told(told: LoggedTransmission) -> None:
    line = told.line
    _say(f"{line.number:>4}  {', '.join(told.when())}  {told.what()}")
    if isinstance(line, Transmission):
        size = number_format.size(line.bytes).replace(number_format.SPACE, " ")
        _say(f"      {size} to {line.receiver}; {line.protection}")
        _say(f"      cost: {told.cost()}")


def device_withdraw(
    device: DeviceArgument,
    run: Annotated[str, typer.Option(help="The run to leave, by the name that `fedface device log` tells.")],
    reason: Annotated[str, typer.Option(help="Your reason; it stays on this device.")] = "",
    yes: YesOption = False,
) -> None:
    """Leave a run for good: nothing of it leaves this device from now on, and the server is told."""
    kept = owned(device)
    mine = withdrawal_impact(kept, run)
    if mine.transmissions is None:
        _say(f"Leaving {run}:")
        _list(mine.ahead())
        _say("What cannot be undone:")
        _list(mine.lasting())
        _ask(f"Leave {run}", yes)
    dropped = withdraw(kept, run, reason)
    when = "now" if mine.transmissions is None else f"already, on {moment(mine.transmissions)}"
    _say(f"You have left {run} {when}; kept answers dropped: {dropped}.")


def device_erase(
    device: DeviceArgument,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Erase the ledger and the journal too; think twice.")
    ] = False,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="With --ledger: write both to this new file first.")
    ] = None,
    no_export: Annotated[bool, typer.Option("--no-export", help="With --ledger: keep no copy.")] = False,
    yes: YesOption = False,
) -> None:
    """Erase what this device keeps: answers, key, index of photos. Photos are never touched."""
    if not ledger and (export_to is not None or no_export):
        raise ConfigError(
            "--export and --no-export go with --ledger; `fedface ledger export` copies at any time"
        )
    if ledger and (export_to is None) != no_export:
        raise ConfigError("--ledger wants either --export FILE, for a copy first, or --no-export")
    kept = owned(device)
    if export_to is not None and export_to.exists():
        # Written by this very command before it was cut short, or something else that must not be lost.
        if not _is_copy(export_to, kept):
            raise ConfigError(f"{export_to}: is there already, and is not overwritten; name another file")
        _say(f"{export_to} holds a copy of ledger and journal as they are.")
        export_to = None
    plan = files_to_erase(kept, books=ledger)
    _say(f"Erasing what {kept.device.name} keeps:")
    _list([str(one) for one in plan if one.found] or ["no file of it is there"])
    for one in plan:
        if not one.found:
            _say(f"{one}.")
    _say("What it means:")
    _list(["Stop the device first: while it works, it may write anew what is deleted here."])
    _list(_meaning(kept, plan, books=ledger))
    _ask("Erase it", yes)
    if export_to is not None:
        write_alone(export_to, _copy(kept))
        _say(f"Wrote {export_to}.")
    for sentence in erase(kept, books=ledger).describe():
        _say(sentence)


def _meaning(kept: DeviceState, plan: Sequence[FileToErase], *, books: bool) -> list[str]:
    """What erasing means for this device, without what it does to files that are not there."""
    found = [one.file for one in plan if one.found]
    there = {
        "Kept answers go": kept.ledger.path.is_file(),
        "The shared key goes": kept.device.key_path in found,
        "The index of your photos goes": kept.index in found,
        "Files are deleted": bool(found),
    }
    return [
        sentence
        for sentence in describe_erasure(books=books)
        if all(is_there or not sentence.startswith(words) for words, is_there in there.items())
    ]


def _is_copy(file: Path, kept: DeviceState) -> bool:
    """Whether a file is an export of ledger and journal as they are now.

    Raises:
        ConfigError: They cannot be read any more.
    """
    try:
        told, now = json.loads(file.read_text(encoding="utf-8")), json.loads(_copy(kept))
    except LedgerError as error:
        raise ConfigError(
            f"{error}. {file} is there already: if it is the copy of an erasure that was cut short, --no-export in "
            "place of --export ends it"
        ) from error
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {**told, "made": now["made"]} == now


def _copy(kept: DeviceState) -> str:
    policy = kept.device.policy
    books = verify(kept.ledger, kept.journal)
    return export(books, delta=policy.delta, unit=policy.unit, now=utc_now())


def _ask(question: str, yes: bool) -> None:
    """Go on if the owner says so; without a terminal to ask on, only --yes says it."""
    if not yes and not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on, so nothing was done; --yes goes on without asking")
    if not yes and not typer.confirm(f"{question}?"):
        _say("Nothing was done.")
        raise typer.Exit(1)


def _list(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        _say(f"  - {sentence}")


def _say(words: str) -> None:
    console.print(cell(words), highlight=False, soft_wrap=True)
