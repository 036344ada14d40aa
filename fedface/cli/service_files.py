"""The file by which a system starts a device when its owner logs in: systemd, launchd or the Task Scheduler.

Each starts `fedface device start` as the owner, again after it has ended, and after other programs. RESTART_SECONDS is
more than the minute for which Flower turns away a device that was killed. Nothing here touches the system.
"""

from __future__ import annotations

import plistlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

RESTART_SECONDS = 75
TASK_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"

# What a user's own manager can enforce without namespaces, which need rights that some systems do not give; Landlock
# restricts files (fedface/sandbox.py).
UNIT = """\
# Written by `fedface device service`; `fedface device uninstall` removes it.
[Unit]
Description=fedface device

[Service]
ExecStart={command}
{environment}Restart=always
RestartSec={restart}
UMask=0077
NoNewPrivileges=true
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
LockPersonality=true
SystemCallArchitectures=native
SystemCallFilter=@system-service landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp
SystemCallErrorNumber=EPERM
MemoryMax=4G
TasksMax=256
CPUWeight=20
Nice=10

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A device that starts with its owner's session."""

    name: str  # such as fedface-laptop: letters, digits and hyphens
    command: tuple[str, ...]  # the program and its arguments, with absolute paths
    log: Path  # of what it prints, where the system keeps no journal
    environment: Mapping[str, str] = field(
        default_factory=dict
    )  # that the owner's shell set and a session may not

    @property
    def label(self) -> str:
        """Its name for launchd, such as org.fedface.laptop."""
        return f"org.{self.name.replace('-', '.', 1)}"


def service_name(device: str) -> str:
    """`fedface-my-laptop` for My Laptop."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"fedface-{words[:40] or 'device'}"


def systemd_unit(service: Service) -> str:
    """A unit of systemd's user manager (systemd.service(5), systemd.exec(5))."""
    environment = "".join(
        f"Environment={systemd_word(f'{key}={value}', dollar='$')}\n"
        for key, value in service.environment.items()
    )
    command = " ".join(systemd_word(word) for word in service.command)
    return UNIT.format(command=command, environment=environment, restart=RESTART_SECONDS)


def systemd_word(word: str, *, dollar: str = "$$") -> str:
    """One word of a command in quotes, without specifiers and variables; `dollar` is how a dollar sign is written."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    return f'"{text}"'


def launchd_plist(service: Service) -> str:
    """A launch agent (launchd.plist(5))."""
    agent = {
        "Label": service.label,
        "ProgramArguments": list(service.command),
        "EnvironmentVariables": dict(service.environment),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": RESTART_SECONDS,
        "ProcessType": "Background",
        "LowPriorityIO": True,
        "Nice": 10,
        "Umask": 0o077,
        "StandardOutPath": str(service.log),
        "StandardErrorPath": str(service.log),
    }
    return plistlib.dumps(agent, sort_keys=False).decode()


def scheduled_task(service: Service) -> str:
    """A task of Windows's Task Scheduler (the schema of `schtasks /XML`), with the owner's ordinary rights."""
    program, *arguments = service.command
    return f"""\
<Task version="1.2" xmlns="{TASK_NAMESPACE}">
  <RegistrationInfo><Description>fedface device</Description></RegistrationInfo>
  <Triggers><LogonTrigger><Enabled>true</Enabled></LogonTrigger></Triggers>
  <Principals><Principal id="Author">
    <LogonType>InteractiveToken</LogonType><RunLevel>LeastPrivilege</RunLevel>
  </Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
    <Priority>8</Priority>
    <RestartOnFailure><Interval>PT{RESTART_SECONDS}S</Interval><Count>999</Count></RestartOnFailure>
  </Settings>
  <Actions Context="Author"><Exec>
    <Command>{escape(program)}</Command>
    <Arguments>{escape(subprocess.list2cmdline(arguments))}</Arguments>
  </Exec></Actions>
</Task>"""
