"""The command `fedface device join`: from an invitation to a device that can start.

The device file is written last: until it exists, the same command goes on where it ended, and the server gives the same
answer to the same token and key.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import typer

from fedface.aggregation.payload import MaskSettings, PlainConfig
from fedface.atomic_io import create_bytes, locked_folder, replace_bytes
from fedface.cli.console import note, say
from fedface.cli.device_service import install_service
from fedface.cli.run_plan_text import plan_event, plan_price, plan_table
from fedface.device.config import KEY_FILE, PLANS_FOLDER, check_name, filled_device_file
from fedface.device.node_key import node_public_key
from fedface.errors import ConfigError, FedfaceError
from fedface.messages.invite import Invite
from fedface.messages.run_plan import AdmittedPlans, RunPlan
from fedface.privacy.participation_conditions import ParticipationConditions
from fedface.privacy.policy import LEAST_RATE, DevicePolicy
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.privacy.spending import fits_alone
from fedface.transport.enrolment import Server, fetch_authority

T = TypeVar("T")

DEVICE_FILE, CERTIFICATE, NODE_KEY, STATE = "device.yaml", "ca.crt", "node", "state"
DELTA = 1e-6  # of a new device, unless the plan needs a smaller one
LEAST_COHORT = 2  # of a run whose sums are not encrypted: its plan states no least number
ANY_TIME = "any"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the owner wrote on the command line; what is None is asked for, or its default is taken."""

    photos: str | None
    name: str | None
    epsilon: str | None
    hours: str | None
    ask: bool  # on the terminal

    def __post_init__(self) -> None:
        for given, check in ((self.photos, _photos), (self.name, _name), (self.hours, _hours)):
            if given is not None:
                check(given)
        if self.ask and not sys.stdin.isatty():
            raise ConfigError("there is no terminal to ask you on; --yes accepts the run and every default")

    def get(self, given: str | None, question: str, default: str | None, convert: Callable[[str], T]) -> T:
        """The answer to one question, asked again until it is possible; an empty default is not shown."""
        if given is not None:
            return convert(given)
        while self.ask:
            said = typer.prompt(question, default=default, show_default=bool(default))
            try:
                return convert(said)
            except ConfigError as error:
                say(f"  {error}")
        if default is None:
            raise ConfigError(f"{question}: there is no default; give it with its option")
        return convert(default)

    def confirm(self, question: str) -> bool:
        """Yes where nothing is asked."""
        return not self.ask or typer.confirm(question, default=True)


def device_join(code: str, folder: Path, answers: Answers, *, service: bool) -> None:
    """Join the server of an invitation with a new folder, and start the device as a service if `service`.

    Raises:
        ConfigError: The invitation is mistyped, the folder is that of a device, or an answer is impossible.
        RunError: The folder contains something else.
        FederationError: The server is another one, refuses, or cannot be reached.
    """
    invite, file = Invite.from_code(code), folder / DEVICE_FILE
    if file.exists():
        raise ConfigError(
            f"{file} exists: this device has joined already; `fedface device start {file}` starts it, and another "
            "device needs another folder"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked_folder(folder, "device"):
        try:
            _join(invite, folder, answers)
        except (typer.Abort, KeyboardInterrupt):
            note("\nStopped; this device has not joined. The same command goes on.")
            raise typer.Exit(1) from None
    _start(file, answers, service=service)


def _start(file: Path, answers: Answers, *, service: bool) -> None:
    """Install the service, or say how to start the device without one."""
    try:
        if service and answers.confirm("Start it now, and each time you log in"):
            say(install_service(file))
            say(
                f"`fedface device web {file}` shows it in a browser, `fedface device pause {file}` pauses it."
            )
            return
    except typer.Abort:
        pass
    except FedfaceError as error:
        say(f"No service was installed: {error}")
    say(f"Start it: fedface device start {file}")


def _join(invite: Invite, folder: Path, answers: Answers) -> None:
    server = _trusted_server(invite, folder)
    say(f"{invite.address} is the server of your invitation.")
    signed = server.fetch_plan(invite.plan.hex(), invite.operator)
    photos, name, policy = _decide(signed.plan, answers)
    registered = server.enrol(invite.token, node_public_key(folder / NODE_KEY))
    plans = AdmittedPlans(folder=folder / STATE / PLANS_FOLDER, operator=invite.operator)
    for place in (plans.folder.parent, plans.folder):
        place.mkdir(exist_ok=True, mode=0o700)
    replace_bytes(plans.path(signed.hash), signed.to_bytes(), mode=0o600)
    file = folder / DEVICE_FILE
    content = filled_device_file(
        {
            "name": name or _name(registered),
            "photos": str(photos),
            "server": invite.address,
            "operator": invite.operator.hex(),
            "max_epsilon": policy.max_epsilon,
            "delta": policy.delta,
            "unit": policy.unit,
            "objectives": list(policy.objectives),
            "evaluation": policy.evaluation,
            "protocols": list(policy.protocols),
            "min_cohort_size": policy.min_cohort_size,
            "corrupt_share": policy.corrupt_share,
            "trust_server": policy.trust_server,
            "honest_fraction": policy.honest_fraction,
            **({"hours": list(policy.hours)} if policy.hours else {}),
        }
    )
    create_bytes(file, content.encode())
    say("")
    say(f"Joined as {name or registered}. Your settings are in {file}; change them at any time.")
    if "homomorphic" in policy.protocols:
        say(
            f"Missing: {folder / STATE / KEY_FILE}, which encrypts updates and which the server must never have."
        )
        say(
            f"  the first device of the run: fedface device keygen {folder / STATE / KEY_FILE} --device {file}"
        )
        say("  every other: copy the file that it names from the first device, not by way of the server")


def _trusted_server(invite: Invite, folder: Path) -> Server:
    """The server of an invitation, its authority's certificate checked and stored."""
    authority = fetch_authority(invite.address, invite.authority)
    place = folder / CERTIFICATE
    if place.exists() and place.read_text(encoding="utf-8") != authority:
        raise ConfigError(f"{folder}: was begun with the invitation of another server; name another folder")
    replace_bytes(place, authority.encode(), mode=0o600)
    return Server(address=invite.address, authority=authority)


def _decide(plan: RunPlan, answers: Answers) -> tuple[Path, str, DevicePolicy]:
    """Show a plan and ask for photos, name and policy; the name is empty for the one that the operator chose.

    Raises:
        ConfigError: The plan is one that is not joined like this, or the owner does not accept it.
    """
    policy = _least_policy(plan)
    say("")
    say(plan_table(plan, delta=policy.delta, unit=policy.unit))
    say("")
    photos = answers.get(answers.photos, "Folder of your photos", _default_photos(), _photos)
    name = answers.get(
        answers.name,
        "Name of this device in reports (Enter: the one that the operator gave it)",
        "",
        lambda text: text and _name(text),
    )
    say(
        "The privacy budget is for all runs together, as long as you keep these photos; smaller is more private."
    )
    say(policy.budgets[0].meaning())
    policy = answers.get(
        answers.epsilon,
        "Budget (Enter: enough for this run, and for one round again after a crash)",
        f"{policy.max_epsilon:g}",
        lambda text: _with_budget(policy, text, plan),
    )
    hours = answers.get(answers.hours, "Hours at which it may work, such as 22:00-07:00", ANY_TIME, _hours)
    policy = replace(policy, hours=hours)
    if plan.training is not None and policy.evaluation:
        policy = replace(
            policy,
            evaluation=answers.confirm(
                "May the run also measure models on your photos? (it is in the privacy cost)"
            ),
        )
    if policy.trust_server and not (
        answers.ask
        and typer.confirm("May the server see this device's numbers without noise?", default=False)
    ):
        raise ConfigError(
            f"the run {plan.name} needs an owner who trusts the server with numbers without noise; this device has not "
            "joined"
        )
    if not answers.confirm("Take part in this run"):
        raise typer.Abort
    return photos, name, policy


def _least_policy(plan: RunPlan) -> DevicePolicy:
    """The strictest policy that admits a plan, with a budget for the run and for one round computed again."""
    releases = plan.releases
    if not releases.parts[0].is_private:
        raise ConfigError(
            f"the run {plan.name} adds no noise, so that nothing bounds what anyone can infer about your photos; "
            "such a run is not joined by an invitation"
        )
    rate = min(part.schedule.sampling_rate for part in releases.parts)
    delta, unit = min(DELTA, float(f"{rate / LEAST_RATE:.0e}")), releases.unit
    sums = [part.aggregation for part in plan.parts]
    fewest = [LEAST_COHORT if isinstance(each, PlainConfig) else each.min_devices for each in sums]
    events = [(plan_event(plan, unit), 1), (releases.parts[0].event(1), 1)]
    honest = releases.parts[0].honest_devices
    return DevicePolicy(
        max_epsilon=math.ceil(10 * filter_epsilon(events, delta)) / 10,
        delta=delta,
        unit=unit,
        objectives=() if plan.training is None else (plan.training.training.objective,),
        evaluation=bool(plan.evaluations),
        protocols=tuple(dict.fromkeys(each.kind for each in sums)),
        min_cohort_size=min(fewest),
        corrupt_share=min(
            (each.corrupt_share for each in sums if isinstance(each, MaskSettings)), default=0.1
        ),
        trust_server=releases.parts[0].noise == "central",
        honest_fraction=min(1.0, math.ceil(100 * honest / min(fewest)) / 100) if honest > 1 else 0.5,
    )


def _with_budget(policy: DevicePolicy, text: str, plan: RunPlan) -> DevicePolicy:
    """A policy with another budget for life; ConfigError unless the run fits it."""
    try:
        policy = replace(policy, max_epsilon=float(text))
    except ValueError as error:
        raise ConfigError(f"a budget is a number above 0, such as 8, got {text!r:.40}") from error
    if not fits_alone(plan.releases.event(), plan.releases.unit, policy.budgets[0]):
        price = plan_price(plan, delta=policy.delta, unit=policy.unit)
        raise ConfigError(
            f"this run costs {price.at_most()}: with a budget of {policy.max_epsilon:g} this device would refuse it"
        )
    return policy


def _default_photos() -> str | None:
    pictures = Path("~/Pictures")
    return str(pictures) if pictures.expanduser().is_dir() else None


def _photos(text: str) -> Path:
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"photos: there is no folder {folder}")
    return folder


def _name(text: str) -> str:
    check_name(text)
    return text


def _hours(text: str) -> tuple[str, ...]:
    """Such as 22:00-07:00, or several with commas; none for any time."""
    if text.strip() == ANY_TIME:
        return ()
    hours = tuple(part.strip() for part in text.split(","))
    try:
        return ParticipationConditions(hours=hours).hours
    except ValueError as error:
        raise ConfigError(str(error)) from error
