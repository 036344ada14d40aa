"""The commands `fedface server ...`, for the operator of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.options import JsonOption, example

server = typer.Typer(help="For the operator of a server.", no_args_is_help=True, rich_markup_mode=None)

FolderArgument = Annotated[Path, typer.Argument(help="The folder of `fedface server init`.")]
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
) -> None:
    """Generate a server's certificates, its secret, and an nginx configuration that lets only devices in."""
    from fedface.cli.server_init import server_init

    server_init(folder.expanduser(), hosts, port, superlink_port)


@server.command("start", epilog=example("fedface server start ~/fedface-server"))
def start(folder: FolderArgument) -> None:
    """Start SuperLink, its executor and nginx until Ctrl-C; devices can then connect."""
    from fedface.cli.server_start import server_start

    server_start(folder.expanduser())


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
