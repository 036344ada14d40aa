"""`fedface device service` and `uninstall`: what each system is given, and what stays."""

from __future__ import annotations

import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import Result, caller
from fake_programs import fake_programs

from fedface.cli.service_files import (
    TASK_NAMESPACE,
    Service,
    launchd_plist,
    scheduled_task,
    service_name,
    systemd_unit,
)

ODD = Service(
    name="fedface-kitchen",
    command=(
        sys.executable,
        "-m",
        "fedface.cli",
        "device",
        "start",
        '/home/a b/50% "$HOME" & <c>\\d/device.yaml',
    ),
    log=Path("/home/a b/state/service.log"),
    environment={"XDG_STATE_HOME": "/mnt/$x 1"},
)
LINUX_FILE = ".config/systemd/user/fedface-kitchen.service"
SYSTEMS = {
    "linux": (LINUX_FILE, "systemctl"),
    "darwin": ("Library/LaunchAgents/org.fedface.kitchen.plist", "launchctl"),
    "win32": ("fedface/state/fedface-kitchen.xml", "schtasks"),
}


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `fedface device ...` in this process."""
    return caller(monkeypatch, capsys, "device")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of an owner of a device in ~/fedface, on a system whose programs note their calls."""
    for name in ("photos", "fedface"):
        (tmp_path / name).mkdir()
    (tmp_path / "fedface" / "state").mkdir(mode=0o700)
    policy = "policy: {max_epsilon: 8, delta: 1e-6}"
    (tmp_path / "fedface" / "device.yaml").write_text(
        f"name: Kitchen\nphotos: ../photos\nstate: state\n{policy}\n"
    )
    programs = fake_programs(tmp_path / "bin", "systemctl", "launchctl", "schtasks")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_unit_starts_the_device_with_every_odd_character_of_its_path() -> None:
    """systemd replaces specifiers and variables unless they are doubled."""
    (line,) = [line for line in systemd_unit(ODD).splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart=").replace("$$", "$").replace("%%", "%"))
    assert words == [word.replace("$", "$") for word in ODD.command]
    assert 'Environment="XDG_STATE_HOME=/mnt/$x 1"' in systemd_unit(ODD)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_unit_of_a_user(tmp_path: Path) -> None:
    """By its own judgement, and it restricts what a user's manager can restrict."""
    unit = tmp_path / "fedface-kitchen.service"
    unit.write_text(systemd_unit(ODD))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", unit],
        capture_output=True, text=True, timeout=60, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert verified.returncode == 0 and unit.name not in verified.stderr, verified.stderr
    scored = subprocess.run(
        ["systemd-analyze", "security", "--user", "--offline=true", "--no-pager", "--threshold=70", unit],
        capture_output=True, text=True, timeout=60, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert scored.returncode == 0, scored.stdout[-300:]  # 9.8 of 10 without the restrictions
    for line in (
        "NoNewPrivileges=true",
        "RestrictNamespaces=true",
        "MemoryMax=4G",
        "WantedBy=default.target",
    ):
        assert line in unit.read_text().splitlines()


def test_a_launch_agent_reads_back() -> None:
    """As Apple's plistlib wrote it: the same arguments, restarted after a minute and more, in the background."""
    agent = plistlib.loads(launchd_plist(ODD).encode())
    assert agent["ProgramArguments"] == list(ODD.command) and agent["Label"] == "org.fedface.kitchen"
    assert agent["KeepAlive"] and agent["RunAtLoad"] and agent["ThrottleInterval"] > 60
    assert (
        agent["EnvironmentVariables"] == {"XDG_STATE_HOME": "/mnt/$x 1"}
        and agent["ProcessType"] == "Background"
    )


def test_a_scheduled_task_reads_back() -> None:
    """With the owner's ordinary rights, at each login, without an end, on battery too: the policy decides that."""
    task = ElementTree.fromstring(scheduled_task(ODD))

    def text(path: str) -> str | None:
        return task.findtext("/".join(f"{{{TASK_NAMESPACE}}}{name}" for name in path.split("/")))

    assert text("Actions/Exec/Command") == sys.executable
    assert text("Actions/Exec/Arguments") == subprocess.list2cmdline(ODD.command[1:])
    assert text("Principals/Principal/RunLevel") == "LeastPrivilege"
    assert text("Triggers/LogonTrigger/Enabled") == "true" and text("Settings/ExecutionTimeLimit") == "PT0S"
    assert text("Settings/DisallowStartIfOnBatteries") == "false"


@pytest.mark.parametrize(
    ("device", "name"),
    [("Laura's Laptop", "fedface-laura-s-laptop"), ("Küche", "fedface-k-che"), ("写真", "fedface-device")],
)
def test_a_service_has_a_name_that_every_system_takes(device: str, name: str) -> None:
    assert service_name(device) == name


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_service_is_installed_again_and_removed(  # type: ignore[no-untyped-def]
    fedface, home: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """With the programs of each system; ledger, key and settings stay, and it says so."""
    monkeypatch.setattr(sys, "platform", system)
    place, program = SYSTEMS[system]
    device, calls = home / "fedface" / "device.yaml", home / "bin" / "calls"
    for _ in range(2):
        result = fedface("service", device)
        assert result.code == 0 and "runs now and after each login" in result.out, result.err
    assert (home / place).stat().st_mode & 0o077 == 0
    assert {line.split()[0] for line in calls.read_text().splitlines()} == {program}
    removed = fedface("uninstall", device)
    assert removed.code == 0 and "What stays: your photos" in removed.out and "revoke" in removed.out
    assert not (home / place).exists() and device.exists() and (home / "fedface" / "state").is_dir()
    assert "Kitchen has no service here" in fedface("uninstall", device).out


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_renamed_device_has_one_service(  # type: ignore[no-untyped-def]
    fedface, home: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Under its first name, so that two never run and the one is removed."""
    monkeypatch.setattr(sys, "platform", system)
    device, place = home / "fedface" / "device.yaml", home / SYSTEMS[system][0]
    fedface("service", device)
    device.write_text(device.read_text().replace("Kitchen", "Parlour"))
    fedface("service", device)
    assert [file.name for file in place.parent.glob(f"*fedface*{place.suffix}")] == [place.name]
    assert "Removed" in fedface("uninstall", device).out and not place.exists()


def test_a_service_that_cannot_be_started_leaves_no_file(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """In a container, for example."""
    fake_programs(home / "bin", "systemctl", fails=True)
    sentence = fedface("service", home / "fedface" / "device.yaml").sentence
    assert sentence == "systemctl --user daemon-reload failed: no bus"
    assert not (home / LINUX_FILE).exists()


def test_a_file_of_another_device_or_person_is_not_replaced(fedface, home: Path) -> None:  # type: ignore[no-untyped-def]
    """Two devices of one name, or a unit that the owner wrote."""
    other = home / LINUX_FILE
    other.parent.mkdir(parents=True)
    other.write_text("[Service]\nExecStart=/bin/true\n")
    assert "exists and will not be replaced" in fedface("service", home / "fedface" / "device.yaml").sentence
    assert "has no service here" in fedface("uninstall", home / "fedface" / "device.yaml").out
    assert other.read_text() == "[Service]\nExecStart=/bin/true\n"


def test_a_system_without_the_program_is_named(  # type: ignore[no-untyped-def]
    fedface, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(home / "photos"))
    assert "systemctl is not installed" in fedface("service", home / "fedface" / "device.yaml").sentence
