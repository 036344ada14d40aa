"""Commands for the owner of a device: its key, and what its ledger has booked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedface.aggregation.encrypted import make_keys
from fedface.cli.terminal import JsonOption, cell, console
from fedface.errors import ConfigError
from fedface.experiment import read_experiment
from fedface.privacy.ledger import Ledger

device = typer.Typer(help="For the owner of a device.", no_args_is_help=True, rich_markup_mode=None)
ledger = typer.Typer(help="What a device has spent.", no_args_is_help=True, rich_markup_mode=None)


@device.command("key")
def device_key(
    out: Annotated[Path, typer.Argument(help="Where the key goes; readable by you alone.")],
    experiment: Annotated[Path, typer.Option(help="The experiment whose sums it protects.")],
) -> None:
    """Make the secret key that the devices of a run share. Never give it to the server."""
    recipe = read_experiment(experiment)
    keys = make_keys(recipe.aggregation, recipe.agreement)
    if keys is None:
        raise ConfigError(f"{experiment}: sums travel in the open, so there is no key to share")
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys.save(out)
    console.print(
        f"wrote {out} (key {keys.name}); copy it to each device, not to the server", highlight=False
    )


@ledger.command("show")
def ledger_show(
    path: Annotated[Path, typer.Argument(help="A device's ledger.sqlite.")],
    delta: Annotated[float, typer.Option(min=1e-10, max=0.5, help="Where epsilon is read.")] = 1e-5,
    json_out: JsonOption = False,
) -> None:
    """Print what a device has booked, and what it all costs together."""
    if not path.is_file():
        raise ConfigError(f"{path}: no ledger here")
    # SQLite takes a file of a few bytes for an empty book and would begin one over it.
    if path.stat().st_size < 512 and not path.with_name(f"{path.name}.head").exists():
        raise ConfigError(f"{path}: no ledger here, only {path.stat().st_size} bytes")
    book = Ledger.open(path)
    entries, spent = book.export(), book.spent(delta)
    if json_out:
        print(
            json.dumps({"entries": entries, "delta": delta, "unit": "photo", "epsilon": str(spent)}, indent=2)
        )
        return
    table = Table(box=None)
    for heading in ("no.", "written", "run", "round", "attempt"):
        table.add_column(heading)
    for entry in entries:
        table.add_row(*(cell(entry[key]) for key in ("number", "written", "run", "round", "attempt")))
    console.print(table)
    console.print(
        f"epsilon spent: {spent} at delta {delta:g}, per photo (a run's own promise may name another delta)",
        highlight=False,
    )
