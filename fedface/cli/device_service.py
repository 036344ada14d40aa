"""The work of `fedface device service` and `uninstall`; fedface/cli/device.py declares them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from fedface.atomic_io import check_output, has_mark, write_output
from fedface.cli.console import one_line, say
from fedface.cli.device_status import existing_device
from fedface.cli.service_files import (
    Service,
    launchd_plist,
    scheduled_task,
    service_name,
    systemd_unit,
    systemd_word,
)
from fedface.device.config import DeviceConfig, read_device_config
from fedface.errors import ConfigError, FederationError

SECONDS = 60.0  # for a command of the system
INHERITED = ("XDG_STATE_HOME",)  # where the photo index is


@dataclass(frozen=True, kw_only=True)
class Installation:
    """How this system runs a device as a service of its owner."""

    file: Path
    content: bytes
    mark: (
        str  # the device file as the content names it: a file without it is another device's, or of no device
    )
    on: tuple[tuple[str, ...], ...]  # commands that start it, now and at each login
    off: tuple[tuple[str, ...], ...]
    note: str  # when it runs, a sentence


def installation(device: Path, name: str, state: Path) -> Installation:
    """For this system; `device` is the device file and `name` that of the service. Raises ConfigError."""
    service = Service(
        name=name,
        command=(sys.executable, "-m", "fedface.cli", "device", "start", str(device)),
        log=state / "service.log",
        environment={key: os.environ[key] for key in INHERITED if os.environ.get(key)},
    )
    if not all(word.isprintable() for word in service.command):
        raise ConfigError(f"{device}: its path has characters that no service can have; move the folder")
    if sys.platform == "win32":
        file = state / f"{name}.xml"  # the Task Scheduler has a copy of its own
        task = ("/TN", f"fedface\\{service.name}")
        return Installation(
            file=file,
            content=scheduled_task(service).encode("utf-16"),
            mark="",
            on=(("schtasks", "/Create", *task, "/XML", str(file), "/F"), ("schtasks", "/Run", *task)),
            off=(("schtasks", "/End", *task), ("schtasks", "/Delete", *task, "/F")),
            note="It runs while you are logged in.",
        )
    if sys.platform == "darwin":
        file = Path.home() / "Library" / "LaunchAgents" / f"{service.label}.plist"
        domain = f"gui/{os.getuid()}"
        return Installation(
            file=file,
            content=launchd_plist(service).encode(),
            mark=f"<string>{escape(str(device))}</string>",
            on=(("launchctl", "bootstrap", domain, str(file)),),
            off=(("launchctl", "bootout", f"{domain}/{service.label}"),),
            note="It runs while you are logged in.",
        )
    unit = f"{service.name}.service"
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    systemctl = ("systemctl", "--user")
    return Installation(
        file=configuration / "systemd" / "user" / unit,
        content=systemd_unit(service).encode(),
        mark=systemd_word(str(device)),
        on=((*systemctl, "daemon-reload"), (*systemctl, "enable", unit), (*systemctl, "restart", unit)),
        off=((*systemctl, "disable", "--now", unit),),
        note="It runs while you are logged in; `loginctl enable-linger` lets it run at any time, also after a restart.",
    )


def _service_of(device: Path, config: DeviceConfig) -> Installation:
    """The service that a device has, also under an earlier name of the device, or would have."""
    service = installation(device, service_name(config.name), config.state)
    for file in service.file.parent.glob(f"*fedface[-.]*{service.file.suffix}"):
        if has_mark(file, service.mark):
            return installation(device, file.stem.removeprefix("org.").replace(".", "-", 1), config.state)
    return service


def install_service(device: Path) -> str:
    """Run a device now and at each login of its owner; returns a sentence.

    Raises:
        ConfigError: The device file is wrong, or the service is that of another device.
        FederationError: This system runs no services of users.
    """
    device = device.resolve()
    service = _service_of(device, read_device_config(device))
    service.file.parent.mkdir(parents=True, exist_ok=True)
    check_output(service.file, service.mark)
    if service.file.exists():
        _run_all(service.off)
    write_output(service.file, service.content, service.mark, mode=0o600)
    if failures := _run_all(service.on):
        service.file.unlink()
        raise FederationError(failures[0])
    return f"Installed {service.file}: this device runs now and after each login. {service.note}"


def device_service(device: Path) -> None:
    say(install_service(device))
    say(f"`fedface device status {device}` shows its state; `fedface device uninstall {device}` removes it.")


def device_uninstall(device: Path) -> None:
    state = existing_device(device)
    device, config = device.resolve(), state.config
    service = _service_of(device, config)
    if service.file.exists() and has_mark(service.file, service.mark):
        for failure in _run_all(service.off):
            say(f"{failure}; its file is removed regardless")
        service.file.unlink()
        say(f"Removed {service.file}: this device no longer starts by itself.")
    else:
        say(f"{config.name} has no service here.")
    for sentence in (
        f"What stays: your photos, as they were; {device}, the node key, and in {config.state} the ledger, which knows "
        "what these photos have spent. Keep it as long as the photos.",
        "What has been sent cannot be taken back, and the server goes on asking this device: `fedface device withdraw` "
        "leaves a run for good, and the server's operator can revoke the device.",
        f"`fedface device erase {device}` deletes stored replies, the key for sums and the photo index.",
    ):
        say(sentence)


def _run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run commands of the system, all of them; returns why those failed that did, in the system's own words."""
    failures = []
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except FileNotFoundError:
            failures.append(f"{command[0]} is not installed, so that no service can be managed here")
        except subprocess.TimeoutExpired:
            failures.append(f"{' '.join(command)} did not end within {SECONDS:.0f} s")
        else:
            if done.returncode != 0:
                failures.append(f"{' '.join(command)} failed: {one_line(done.stderr or done.stdout)[:300]}")
    return failures
