"""The work of `fedface device status`, `pause` and `resume`; fedface/cli/device.py declares them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedface.atomic_io import replace_bytes
from fedface.cli.console import facts_of, print_json, say
from fedface.cli.device_log import open_device
from fedface.cli.policy_check import not_now
from fedface.device.config import PAUSED_FILE, PLANS_FOLDER, check_state_folder
from fedface.device.state import DeviceState
from fedface.platforms import lock, open_to_lock
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.ledger_records import Transmission
from fedface.privacy.participation_conditions import SystemEnvironment
from fedface.privacy.spending import spent_against
from fedface.reports.device_log import BudgetStatus, LoggedRecord

SUPERNODE_LOG = "supernode.log"  # in the state folder; the SuperNode holds a lock on it
CONNECTED = ("SuperNode ID:", "Connection successful")  # what the SuperNode logs
DISCONNECTED = ("retrying in", "Giving up reconnection")


@dataclass(frozen=True, kw_only=True)
class WorkingState:
    """What a device does now."""

    name: str
    server: str
    running: bool
    connected: bool  # as the SuperNode logged last
    busy: bool  # with a task, which may be stopped until the owner's conditions hold
    paused: bool
    not_now: str | None  # which of the owner's conditions does not hold now; for the owner alone
    ended: str | None  # that the policy's last day is over


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """What an owner wants to know of a device at a glance."""

    now: WorkingState
    budgets: tuple[BudgetStatus, ...]
    last: Transmission | None  # what left last
    plans: tuple[str, ...]  # hashes of the admitted run plans

    def record(self) -> dict[str, Any]:
        return {
            **asdict(self.now),
            "budgets": [
                {**asdict(each.budget), "spent": each.spent.to_record(), "remaining": each.remaining}
                for each in self.budgets
            ],
            "last": None if self.last is None else asdict(self.last),
            "plans": list(self.plans),
        }


def read_status(state: DeviceState) -> DeviceStatus:
    """The status of a device now; nothing is written, and a ledger is not created."""
    snapshot, now = state.ledger.read(), utc_now()
    return DeviceStatus(
        now=read_working_state(state),
        budgets=tuple(
            BudgetStatus(budget=budget, spent=spent_against(snapshot.records, budget, now))
            for budget in state.config.policy.budgets
        ),
        last=snapshot.transmissions[-1] if snapshot.transmissions else None,
        plans=admitted_hashes(state),
    )


def admitted_hashes(state: DeviceState) -> tuple[str, ...]:
    """The hashes of the run plans that the owner has admitted."""
    return tuple(sorted(path.stem for path in (state.config.state / PLANS_FOLDER).glob("*.plan")))


def read_working_state(state: DeviceState) -> WorkingState:
    """What a device does now; its ledger is not opened."""
    config, policy, folder = state.config, state.config.policy, state.config.state
    running = is_running(folder)
    return WorkingState(
        name=config.name,
        server=config.server,
        running=running,
        connected=running and is_connected(folder),
        busy=running and is_locked(folder),
        paused=(folder / PAUSED_FILE).exists(),
        not_now=not_now(policy),
        ended=policy.ended(SystemEnvironment()),
    )


def is_running(state: Path) -> bool:
    try:
        with (state / SUPERNODE_LOG).open("rb") as log:
            lock(log.fileno(), wait=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def is_locked(state: Path) -> bool:
    """Whether a process works on a task of the device with this state folder."""
    handle = open_to_lock(state)
    try:
        lock(handle, wait=False)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def is_connected(state: Path) -> bool:
    """Whether a SuperNode that runs has logged a connection later than the loss of one."""
    log = (state / SUPERNODE_LOG).read_text(encoding="utf-8", errors="replace")
    found, lost = (max(map(log.rfind, words)) for words in (CONNECTED, DISCONNECTED))
    return found > lost


def device_status(device: Path, json_out: bool) -> None:
    state = existing_device(device)
    status = read_status(state)
    now = status.now
    if json_out:
        print_json(status.record())
        return
    rows = (
        ("Device", f"{now.name}: {_state(now, device)}"),
        *((("Now", f"takes no part: {now.ended or now.not_now}"),) if now.ended or now.not_now else ()),
        *(("Budget", budget.describe()) for budget in status.budgets),
        ("Last sent", _last(status.last)),
        ("Runs", f"{len(status.plans)} admitted; `fedface device plans {device}` lists them"),
        ("Page", f"`fedface device web {device}` shows all this, and what left, in a browser"),
    )
    say(facts_of(rows))


def _state(now: WorkingState, device: Path) -> str:
    parts = [f"running, {'connected' if now.connected else 'trying to connect'} to {now.server}"]
    if not now.running:
        parts = [f"not running; `fedface device start {device}` starts it"]
    if now.busy:
        parts.append("busy with a task")
    if now.paused:
        parts.append(f"paused; `fedface device resume {device}` goes on")
    return "; ".join(parts)


def _last(sent: Transmission | None) -> str:
    if sent is None:
        return "nothing, ever"
    when = sent.written[:16].replace("T", " ")
    return f"{when} UTC: {LoggedRecord(record=sent, price=None).what()}"


def pause(state: DeviceState) -> None:
    """Refuse every task from now on."""
    replace_bytes(state.config.state / PAUSED_FILE, b"", mode=0o600)


def resume(state: DeviceState) -> None:
    """End a pause, if there is one."""
    (state.config.state / PAUSED_FILE).unlink(missing_ok=True)


def device_pause(device: Path) -> None:
    pause(existing_device(device))
    say(
        f'Paused: every task is refused until `fedface device resume {device}`; the server sees only "not now".'
    )


def device_resume(device: Path) -> None:
    state = existing_device(device)
    resume(state)
    running = "" if is_running(state.config.state) else f", once it runs: fedface device start {device}"
    say(f"Resumed: tasks that the policy allows are answered{running}.")


def existing_device(device: Path) -> DeviceState:
    """The state of an owner's device. Raises ConfigError if its state folder is not there."""
    state = open_device(device)
    check_state_folder(device, state.config.state)
    return state
