"""The commands `fedface server ...`, for the operator of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.options import (
    JsonOption,
    PhotosOption,
    RankOption,
    SetOption,
    command_group,
    example,
    run_request,
)

server = command_group("For the operator of a server.")

FolderArgument = Annotated[Path, typer.Argument(help="The folder of `fedface server init`.")]
ExperimentArgument = Annotated[Path, typer.Argument(help="An experiment with remote devices.")]
RunArgument = Annotated[str | None, typer.Argument(help="The run's name; default: the latest.")]
DeviceArgument = Annotated[str, typer.Argument(help="The device's name.")]


@server.command("init", epilog=example("fedface server init ~/fedface-server fedface.example.org"))
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for the server's files.")],
    hosts: Annotated[
        list[str], typer.Argument(help="Names or addresses at which devices reach it; localhost is added.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port for devices.")] = 8443,
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="TCP port of SuperLink, on this machine alone.")
    ] = 8000,
    enrolment_port: Annotated[
        int, typer.Option(min=1, max=65535, help="TCP port that enrols devices, on this machine alone.")
    ] = 8001,
    listen: Annotated[
        str, typer.Option(help="Address on which devices are let in; *: all of this machine.")
    ] = "*",
) -> None:
    """Generate a server's certificates and keys, and an nginx configuration that lets only devices in."""
    from fedface.cli.server_flower import Ports
    from fedface.cli.server_init import server_init

    ports = Ports(
        host=hosts[0], listen=listen, devices=port, superlink=superlink_port, enrolment=enrolment_port
    )
    server_init(folder.expanduser(), ports, hosts)


@server.command("up", epilog=example("fedface server up ~/fedface-server"))
def up(folder: FolderArgument) -> None:
    """Start SuperLink, its executor and nginx until Ctrl-C; devices can then connect."""
    from fedface.cli.server_up import server_up

    server_up(folder.expanduser())


@server.command(
    "renew", epilog=example("fedface server renew ~/fedface-server --authority-key /media/stick/ca.key")
)
def renew(
    folder: FolderArgument,
    authority_key: Annotated[Path, typer.Option(help="The authority's private key, ca.key.")],
) -> None:
    """Replace the server's certificate before it expires; devices need nothing new."""
    from fedface.cli.console import say
    from fedface.cli.server_certificates import renew_certificate

    until = renew_certificate(folder.expanduser() / "certificates", authority_key)
    say(f"the server's certificate is valid until {until:%Y-%m-%d}; restart the server to use it")


@server.command(
    "invite", epilog=example("fedface server invite ~/fedface-server kitchen experiments/own-photos.yaml")
)
def invite(
    folder: FolderArgument,
    devices: Annotated[list[str], typer.Argument(help="Names of your choice, one for each device.")],
    experiment: ExperimentArgument,
    set: SetOption = None,
    rank: RankOption = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="How long it is valid.")] = 7,
    qr: Annotated[bool, typer.Option(help="Also print it as a QR code.")] = True,
    csv: Annotated[
        Path | None, typer.Option(help="Write the codes to this new file, readable only by you, instead.")
    ] = None,
) -> None:
    """Print for each device a code with which it finds this server, trusts it, and enrols once."""
    from fedface.cli.server_plans import server_invite

    run = run_request(experiment, set, rank)
    table = None if csv is None else csv.expanduser()
    server_invite(folder.expanduser(), devices, run, days=days, qr=qr, table=table)


@server.command("publish", epilog=example("fedface server publish ~/fedface-server family.yaml"))
def publish(
    folder: FolderArgument, experiment: ExperimentArgument, set: SetOption = None, rank: RankOption = None
) -> None:
    """Sign the run plan of another experiment, for the owners of enrolled devices to admit."""
    from fedface.cli.server_plans import server_publish

    server_publish(folder.expanduser(), run_request(experiment, set, rank))


@server.command("enrolment", hidden=True, epilog=example("fedface server enrolment ~/fedface-server"))
def enrolment(folder: FolderArgument) -> None:
    """Enrol invited devices; `fedface server up` runs this."""
    from fedface.cli.server_enrolment import serve

    serve(folder)


@server.command("register", epilog=example("fedface server register ~/fedface-server kitchen node.pub"))
def register(
    folder: FolderArgument,
    device: DeviceArgument,
    key: Annotated[Path, typer.Argument(help="The device's public key, such as node.pub.")],
) -> None:
    """Let a device connect whose public key its owner sent you."""
    from fedface.cli.server_devices import server_register

    server_register(folder.expanduser(), device, key.expanduser())


@server.command("devices", epilog=example("fedface server devices ~/fedface-server"))
def devices(folder: FolderArgument, json_out: JsonOption = False) -> None:
    """List the devices of a running server: name, state, since when, and Flower's id."""
    from fedface.cli.server_devices import server_devices

    server_devices(folder.expanduser(), as_json=json_out)


@server.command("revoke", epilog=example("fedface server revoke ~/fedface-server kitchen"))
def revoke(folder: FolderArgument, device: DeviceArgument) -> None:
    """Forbid a device to connect, for good; says what that cannot undo."""
    from fedface.cli.server_devices import server_revoke

    server_revoke(folder.expanduser(), device)


@server.command("run", epilog=example("fedface server run ~/fedface-server family.yaml"))
def run(
    folder: FolderArgument,
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file, with remote-devices.")],
    photos: PhotosOption = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of runs; default: runs in the server's.")] = None,
    rank: RankOption = None,
    set: SetOption = None,
) -> None:
    """Start or continue a run on the connected devices, and show it.

    Exit code 0: finished; 1: stopped; 2: failed, or an error; 3: you left the display.
    """
    from fedface.cli.server_run import server_run

    folder = folder.expanduser()
    place = (runs or folder / "runs").expanduser().resolve()
    raise typer.Exit(server_run(folder, run_request(experiment, set, rank, photos), place))


@server.command("stop", epilog=example("fedface server stop ~/fedface-server family"))
def stop(
    folder: FolderArgument,
    run: Annotated[
        str | None, typer.Argument(help="The run's name; default: the one that is going on.")
    ] = None,
) -> None:
    """Stop a run; `fedface server run` continues it."""
    from fedface.cli.server_run import server_stop

    server_stop(folder.expanduser(), run)


@server.command("status", epilog=example("fedface server status ~/fedface-server"))
def status(folder: FolderArgument, json_out: JsonOption = False) -> None:
    """Show whether the server runs, its devices, and how far its latest run is: round, refusals, missing answers."""
    from fedface.cli.server_status import server_status

    server_status(folder.expanduser(), as_json=json_out)


@server.command("report", epilog=example("fedface server report ~/fedface-server family"))
def report(folder: FolderArgument, run: RunArgument = None) -> None:
    """Write the report of a run again, or of its rounds so far while it is not finished, and print its path."""
    from fedface.cli.server_status import server_report

    server_report(folder.expanduser(), run)
