"""The command `fedface device check`: what will work and what will not, a sentence each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from fedface import number_format
from fedface.aggregation.homomorphic import HomomorphicKeys, Scheme
from fedface.aggregation.payload import HomomorphicConfig
from fedface.cli.console import say
from fedface.cli.device_plans import verdict
from fedface.cli.device_start import check_files, check_registration, check_server
from fedface.cli.device_status import SUPERNODE_LOG, existing_device, is_connected, is_running
from fedface.cli.policy_check import ledger_or_empty
from fedface.device.config import PAUSED_FILE, read_device_config
from fedface.device.device import admitted_plans
from fedface.device.state import DeviceState
from fedface.errors import ConfigError, FederationError, FedfaceError, LibraryError
from fedface.messages.run_plan import RunPlan
from fedface.photos.library import summary
from fedface.privacy.participation_conditions import SystemEnvironment

MIN_FREE = 200_000_000  # bytes; a round of a large model stores tens of megabytes

Check = tuple[str, Callable[[], str]]  # a heading, and what gives a sentence or raises FedfaceError


def device_check(path: Path) -> None:
    """`fedface device check`; exit code 2 if something will not work."""
    read_device_config(path)
    state = existing_device(path)
    failures = 0
    for heading, check in _checks(path, state):
        try:
            sentence, works = check(), True
        except FedfaceError as error:
            sentence, works = str(error), False
            failures += 1
        say(f"{'ok' if works else 'FAILS':<7}{heading:<9}{sentence}", style=None if works else "bold")
    if failures:
        say(f"{number_format.counted(failures, 'thing')} will not work.")
        raise typer.Exit(2)
    say("Everything works.")


def _checks(path: Path, state: DeviceState) -> Iterator[Check]:
    config = state.config
    yield "server", lambda: _server(path, state)
    yield "key", lambda: _key(path, state)
    yield "photos", lambda: _photos(state)
    yield "state", lambda: _state(state)
    plans = admitted_plans(config)

    def admitted() -> list[RunPlan] | None:
        return None if plans is None else list(plans.read().values())

    yield "policy", lambda: _policy(state, admitted())
    yield "sum.key", lambda: _sum_key(state, admitted() or [])
    yield "disk", lambda: _disk(config.state)


def _server(path: Path, state: DeviceState) -> str:
    config = state.config
    check_files(path, config.certificate, config.node_key)
    ahead = check_server(path, config.server, config.certificate, config.node_key)
    clock = "agrees with its clock"
    if abs(ahead) >= 2:  # the server gives its time in whole seconds
        clock = f"is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} its clock"
    return (
        f"{config.server} answers and proves itself by {config.certificate.name}; this device's clock {clock}"
    )


def _key(path: Path, state: DeviceState) -> str:
    config = state.config
    if not is_running(config.state):
        check_registration(path)
        return f"{config.server} accepts this device's key"
    if not is_connected(config.state):
        raise FederationError(
            f"this device runs, and is not connected to {config.server}; {config.state / SUPERNODE_LOG} says why"
        )
    return f"this device is connected to {config.server}"


def _photos(state: DeviceState) -> str:
    photos, most = state.config.photos, state.config.max_photos
    if not os.access(photos, os.R_OK | os.X_OK):
        raise ConfigError(f"{photos} cannot be read by this user")
    try:
        found = summary(photos)
    except LibraryError:
        return f"{photos} can be read; no face is indexed yet: `fedface photos scan {photos}` does it now"
    if found.with_face == 0:
        return f"{photos} has no photo with a face: replies are noise alone"
    more = f"; raise max_photos ({most}), or replies show by their time that it is a large library"
    return (
        f"{number_format.counted(found.with_face, 'photo')} with a face "
        f"{'is' if found.with_face == 1 else 'are'} indexed in {photos}{more if found.with_face > most else ''}"
    )


def _state(state: DeviceState) -> str:
    folder = state.config.state
    records = len(state.ledger.read().entries)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written by this user")
    if (folder / PAUSED_FILE).exists():
        raise ConfigError("this device is paused: it refuses every task until `fedface device resume`")
    return f"{folder} is private; its ledger is intact, with {number_format.counted(records, 'release')}"


def _policy(state: DeviceState, plans: list[RunPlan] | None) -> str:
    policy = state.config.policy
    if (ended := policy.ended(SystemEnvironment())) is not None:
        raise ConfigError(ended)
    if plans is None:
        return "no operator is named, so every request is answered that the policy allows"
    if not plans:
        raise ConfigError(
            "no run plan is admitted, so every request is refused; `fedface device admit` admits one"
        )
    with ledger_or_empty(state.ledger.open_existing()) as ledger:
        verdicts = [(plan.name, *verdict(plan, state, ledger)) for plan in plans]
    text = "; ".join(f"the run {name} {why}" for name, _, why in verdicts)
    if not all(fits for _, fits, _ in verdicts):
        raise ConfigError(text)
    return text


def _sum_key(state: DeviceState, plans: list[RunPlan]) -> str:
    encrypted = [
        (plan.name, part.aggregation, part.agreement)
        for plan in plans
        for part in plan.parts
        if isinstance(part.aggregation, HomomorphicConfig)
    ]
    if not encrypted and (plans or "homomorphic" not in state.config.policy.protocols):
        return "no admitted run has encrypted sums, so none is needed"
    if not state.key_path.exists():
        raise ConfigError(
            f"there is no {state.key_path}: copy it from another device of the run, or generate the run's first with "
            "`fedface device keygen`"
        )
    keys = HomomorphicKeys.load(state.key_path)
    for name, config, agreement in encrypted:
        if Scheme(config=config, agreement=agreement).public["parameters"] != keys.parameters:
            raise ConfigError(f"{state.key_path} does not fit the encryption of the run {name}")
    decrypts = "it decrypts sums" if keys.secret else "it encrypts and does not decrypt"
    return f"key {keys.name}; {decrypts}; every device of the run must have the same"


def _disk(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    text = f"{number_format.size(free)} free at {folder}"
    if free < MIN_FREE:
        raise ConfigError(f"only {text}; a round may need more")
    return text
