"""The work of `fedface device status`, `pause` and `resume`; fedface/cli/device.py declares them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedface.atomic_io import replace_bytes
from fedface.cli.console import cell, print_json, say, table_of
from fedface.cli.device_log import open_device
from fedface.device.config import PAUSED_FILE, PLANS_FOLDER, check_state_folder
from fedface.device.state import DeviceState
from fedface.platforms import lock
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.ledger_records import Transmission
from fedface.privacy.participation_conditions import ConditionsNotMet, SystemEnvironment
from fedface.privacy.spending import spent_against
from fedface.reports.device_log import BudgetStatus, LoggedRecord

SUPERNODE_LOG = "supernode.log"  # in the state folder; the SuperNode holds a lock on it
CONNECTED = ("SuperNode ID:", "Connection successful")  # what the SuperNode logs
DISCONNECTED = ("retrying in", "Giving up reconnection")


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """What an owner wants to know of a device at a glance."""

    name: str
    server: str
    running: bool
    connected: bool  # as the SuperNode logged last
    paused: bool
    not_now: str | None  # which of the owner's conditions does not hold now; for the owner alone
    ended: str | None  # that the policy's last day is over
    budgets: tuple[BudgetStatus, ...]
    last: Transmission | None  # what left last
    plans: tuple[str, ...]  # hashes of the admitted run plans

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("budgets", "last", "plans")},
            "budgets": [
                {**asdict(each.budget), "spent": each.spent.to_record(), "remaining": each.remaining}
                for each in self.budgets
            ],
            "last": None if self.last is None else asdict(self.last),
            "plans": list(self.plans),
        }


def read_status(state: DeviceState) -> DeviceStatus:
    """The status of a device now; nothing is written, and a ledger is not created."""
    config, policy, folder = state.config, state.config.policy, state.config.state
    snapshot, now = state.ledger.read(), utc_now()
    running = is_running(folder)
    try:
        policy.conditions.check(SystemEnvironment())
        not_now = None
    except ConditionsNotMet as reason:
        not_now = reason.private
    return DeviceStatus(
        name=config.name,
        server=config.server,
        running=running,
        connected=running and is_connected(folder),
        paused=(folder / PAUSED_FILE).exists(),
        not_now=not_now,
        ended=policy.ended(SystemEnvironment()),
        budgets=tuple(
            BudgetStatus(budget=budget, spent=spent_against(snapshot.records, budget, now))
            for budget in policy.budgets
        ),
        last=snapshot.transmissions[-1] if snapshot.transmissions else None,
        plans=tuple(sorted(path.stem for path in (folder / PLANS_FOLDER).glob("*.plan"))),
    )


def is_running(state: Path) -> bool:
    """Whether the SuperNode of a device runs."""
    try:
        with (state / SUPERNODE_LOG).open("rb") as log:
            lock(log.fileno(), wait=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def is_connected(state: Path) -> bool:
    """Whether a SuperNode that runs has logged a connection later than the loss of one."""
    log = (state / SUPERNODE_LOG).read_text(encoding="utf-8", errors="replace")
    found, lost = (max(map(log.rfind, words)) for words in (CONNECTED, DISCONNECTED))
    return found > lost


def device_status(device: Path, json_out: bool) -> None:
    """`fedface device status`."""
    state = existing_device(device)
    status = read_status(state)
    if json_out:
        print_json(status.record())
        return
    table = table_of("", "")
    table.show_header = False
    for heading, sentence in (
        ("Device", f"{status.name}: {_state(status, device)}"),
        *(
            (("Now", f"takes no part: {status.ended or status.not_now}"),)
            if status.ended or status.not_now
            else ()
        ),
        *(("Budget", budget.describe()) for budget in status.budgets),
        ("Last sent", _last(status.last)),
        ("Runs", f"{len(status.plans)} admitted; `fedface device plans {device}` lists them"),
    ):
        table.add_row(heading, cell(sentence))
    say(table)


def _state(status: DeviceStatus, device: Path) -> str:
    paused = f"paused; `fedface device resume {device}` goes on" if status.paused else ""
    if not status.running:
        return "; ".join(filter(None, (f"not running; `fedface device start {device}` starts it", paused)))
    running = f"running, {'connected' if status.connected else 'trying to connect'} to {status.server}"
    return "; ".join(filter(None, (running, paused)))


def _last(sent: Transmission | None) -> str:
    if sent is None:
        return "nothing, ever"
    when = sent.written[:16].replace("T", " ")
    return f"{when} UTC: {LoggedRecord(record=sent, price=None).what()}"


def device_pause(device: Path) -> None:
    """`fedface device pause`."""
    folder = existing_device(device).config.state
    replace_bytes(folder / PAUSED_FILE, b"", mode=0o600)
    say(
        cell(
            f'Paused: every task is refused until `fedface device resume {device}`; the server sees only "not now".'
        )
    )


def device_resume(device: Path) -> None:
    """`fedface device resume`."""
    folder = existing_device(device).config.state
    (folder / PAUSED_FILE).unlink(missing_ok=True)
    running = "" if is_running(folder) else f", once it runs: fedface device start {device}"
    say(cell(f"Resumed: tasks that the policy allows are answered{running}."))


def existing_device(device: Path) -> DeviceState:
    """The state of an owner's device. Raises ConfigError if its state folder is not there."""
    state = open_device(device)
    check_state_folder(device, state.config.state)
    return state
