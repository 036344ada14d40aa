"""The commands `fedface device ...` and `fedface ledger ...`, for the owner of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.options import JsonOption, OpenBrowserOption, PortOption, command_group, example
from fedface.errors import ConfigError
from fedface.privacy_units import UNITS

device = command_group("For the owner of a device: join, watch, pause, leave.")
ledger = command_group("What a device has spent of its privacy budget.")

DEVICE = Path("~/fedface/device.yaml")  # what `fedface device join` writes


def _device_file(path: Path) -> Path:
    """Raises ConfigError if no device file is named and this user has none."""
    file = path.expanduser()
    if path == DEVICE and not file.exists():
        raise ConfigError(
            f"{file}: no such file; `fedface device join` writes it, or name that of your device"
        )
    return file


DeviceArgument = Annotated[Path, typer.Argument(help="The device file.", callback=_device_file)]
LedgerArgument = Annotated[Path, typer.Argument(help="A device file (.yaml), or a ledger.sqlite.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
DeltaOption = Annotated[
    float | None,
    typer.Option(
        min=1e-10, max=0.5, help="Delta of every epsilon; default: the policy's, or 1e-5 for a ledger."
    ),
]
UnitOption = Annotated[
    str | None,
    typer.Option(help=f"Privacy unit: {', '.join(UNITS)}; default: the policy's, or the entries'."),
]


@device.command("join", epilog=example("fedface device join FEDFACE1-... ~/fedface"))
def join(
    code: Annotated[str, typer.Argument(help="The invitation, from the operator of a server.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the device's files.")] = Path("~/fedface"),
    photos: Annotated[
        str | None, typer.Option(help="The folder of your photos; default: ~/Pictures, if it exists.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The name in reports; default: the one that the operator gave it.")
    ] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="The privacy budget for life; default: enough for the run.")
    ] = None,
    hours: Annotated[
        str | None, typer.Option(help="When it may work, such as 22:00-07:00; default: any time.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: accept the run, and the default of what is not given.")
    ] = False,
    no_service: Annotated[
        bool, typer.Option("--no-service", help="Do not start the device now and at each login.")
    ] = False,
) -> None:
    """Join a server by its invitation. Shows the run and its privacy cost, asks you, and starts this device."""
    from fedface.cli.device_join import Answers, device_join

    answers = Answers(photos=photos, name=name, epsilon=epsilon, hours=hours, ask=not yes)
    device_join(code, folder.expanduser(), answers, service=not no_service)


@device.command(
    "keygen",
    epilog=example("fedface device keygen ~/fedface/state/sum.key --device ~/fedface/device.yaml"),
)
def keygen(
    out: Annotated[Path, typer.Argument(help="The key file to write, readable only by you.")],
    device: Annotated[
        Path | None, typer.Option(help="A device file whose admitted run plan has encrypted sums.")
    ] = None,
    experiment: Annotated[Path | None, typer.Option(help="Or the experiment with encrypted sums.")] = None,
) -> None:
    """Generate the key of the devices of a run. Never give it to the server."""
    from fedface.cli.ledger import device_keygen

    device_keygen(out, device, experiment)


@device.command("start", epilog=example("fedface device start"))
def start(device: DeviceArgument = DEVICE) -> None:
    """Connect to the server and answer its tasks until Ctrl-C. With installed code only."""
    from fedface.cli.device_start import device_start

    device_start(device)


@device.command("status", epilog=example("fedface device status"))
def status(device: DeviceArgument = DEVICE, json_out: JsonOption = False) -> None:
    """Show the connection, the remaining budget, and what left last."""
    from fedface.cli.device_status import device_status

    device_status(device, json_out)


@device.command("web", epilog=example("fedface device web"))
def web(
    device: DeviceArgument = DEVICE, port: PortOption = 0, open_browser: OpenBrowserOption = False
) -> None:
    """Show this device in a browser: state, what left, what is left of the budget, and a pause button."""
    from fedface.cli.device_web import device_web

    device_web(device, port, open_browser=open_browser)


@device.command("check", epilog=example("fedface device check"))
def check(device: DeviceArgument = DEVICE) -> None:
    """Check what will work and what will not. Exit code 2 if something will not."""
    from fedface.cli.device_check import device_check

    device_check(device)


@device.command("pause", epilog=example("fedface device pause"))
def pause(device: DeviceArgument = DEVICE) -> None:
    """Refuse every task from now on. A device that runs stays connected."""
    from fedface.cli.device_status import device_pause

    device_pause(device)


@device.command("resume", epilog=example("fedface device resume"))
def resume(device: DeviceArgument = DEVICE) -> None:
    """End a pause."""
    from fedface.cli.device_status import device_resume

    device_resume(device)


@device.command("plans", epilog=example("fedface device plans"))
def plans(
    device: DeviceArgument = DEVICE,
    remove: Annotated[
        str | None, typer.Option(help="Take back the admission of the plan whose hash begins like this.")
    ] = None,
    json_out: JsonOption = False,
) -> None:
    """List the runs that you admitted. With their privacy cost, and whether each fits the policy."""
    from fedface.cli.device_plans import device_plans

    device_plans(device, remove, json_out)


@device.command("admit", epilog=example("fedface device admit 3328cabf..."))
def admit(
    plan: Annotated[str, typer.Argument(help="The hash of the run plan, from the server's operator.")],
    device: DeviceArgument = DEVICE,
    yes: YesOption = False,
) -> None:
    """Admit another run of the same server. Fetches its plan, shows it with its privacy cost, and asks."""
    from fedface.cli.device_plans import device_admit

    device_admit(device, plan, yes)


@device.command("service", epilog=example("fedface device service"))
def service(device: DeviceArgument = DEVICE) -> None:
    """Run this device now and at each login. By systemd, launchd or the Task Scheduler; replaces an older one."""
    from fedface.cli.device_service import device_service

    device_service(device)


@device.command("uninstall", epilog=example("fedface device uninstall"))
def uninstall(device: DeviceArgument = DEVICE) -> None:
    """Stop and remove the service. Ledger, keys and photos stay, and it says what else does."""
    from fedface.cli.device_service import device_uninstall

    device_uninstall(device)


@device.command("log", epilog=example("fedface device log device.yaml --page log.html"))
def log(
    device: DeviceArgument = DEVICE,
    run: Annotated[str | None, typer.Option(help="Only what this run received.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML page, readable only by you; replaces an older one."),
    ] = None,
    json_out: JsonOption = False,
) -> None:
    """List everything that ever left. When, to whom, size, protection, privacy cost."""
    from fedface.cli.device_log import device_log

    device_log(device, run, page, json_out)


@device.command("withdraw", epilog=example("fedface device withdraw device.yaml --run family"))
def withdraw(
    run: Annotated[str, typer.Option(help="The run to leave, by its name in `fedface device log`.")],
    device: DeviceArgument = DEVICE,
    reason: Annotated[str, typer.Option(help="Your reason; it stays on this device.")] = "",
    yes: YesOption = False,
) -> None:
    """Withdraw from a run for good. The device sends it nothing more, and the server is notified."""
    from fedface.cli.device_log import device_withdraw

    device_withdraw(device, run, reason, yes)


@device.command("erase", epilog=example("fedface device erase device.yaml"))
def erase(
    device: DeviceArgument = DEVICE,
    ledger: Annotated[
        bool,
        typer.Option("--ledger", help="Erase the ledger too: spent budget is no longer known afterwards."),
    ] = False,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="With --ledger: first export it to this new file.")
    ] = None,
    no_export: Annotated[bool, typer.Option("--no-export", help="With --ledger: keep no copy.")] = False,
    yes: YesOption = False,
) -> None:
    """Erase what this device stores. Cached replies, key, index of photos; photos are never touched."""
    from fedface.cli.device_log import device_erase

    device_erase(device, ledger, export_to, no_export, yes)


@ledger.command("show", epilog=example("fedface ledger show device.yaml --delta 1e-6"))
def show(
    path: LedgerArgument,
    delta: DeltaOption = None,
    unit: UnitOption = None,
    all_totals: Annotated[
        bool,
        typer.Option("--all-totals", help="Compute the running total of every entry: about a second each."),
    ] = False,
    json_out: JsonOption = False,
) -> None:
    """Print each recorded release with its epsilon, and the epsilon of all together."""
    from fedface.cli.ledger import ledger_show

    ledger_show(path, delta, unit, all_totals, json_out)


@ledger.command("verify", epilog=example("fedface ledger verify device.yaml"))
def verify(path: LedgerArgument, json_out: JsonOption = False) -> None:
    """Verify every record of a device's ledger; damage is reported in one sentence with exit code 2."""
    from fedface.cli.ledger import ledger_verify

    ledger_verify(path, json_out)


@ledger.command("export", epilog=example("fedface ledger export device.yaml --out ledger.json"))
def export(
    path: LedgerArgument,
    out: Annotated[
        Path | None, typer.Option(help="A new file, readable only by you; default: standard output.")
    ] = None,
    delta: DeltaOption = None,
    unit: UnitOption = None,
) -> None:
    """Write a device's ledger as JSON: every record, the chain heads, and the total epsilon."""
    from fedface.cli.ledger import ledger_export

    ledger_export(path, out, delta, unit)
