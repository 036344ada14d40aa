"""The command line: parse, call one library function, print one result. The only door to typer.

`app` is put together here from one file for each part; `main` is what `fedface` and `python -m fedface.cli` call.
Every error of ours ends as one sentence and exit code 2; a traceback means a bug in fedface.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

# Threads that wait must sleep: a busy second core otherwise slows every small convolution many times over.
# This comes before whatever imports torch, and so before the parts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer

from fedface.cli.base import base
from fedface.cli.comparisons import compare_runs
from fedface.cli.devices import device, ledger
from fedface.cli.faces import photos
from fedface.cli.figures import quality
from fedface.cli.methods import compare as compare_methods
from fedface.cli.pages import page
from fedface.cli.policies import policy
from fedface.cli.runs import check, report, run_experiment
from fedface.cli.terminal import call
from fedface.cli.tournaments import tournament
from fedface.cli.upsampling import upsample
from fedface.cli.weights import weights

app = typer.Typer(
    name="fedface",
    help="Improve face generators and upsamplers with photos that never leave their devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.suggest_commands = False  # click suggests too: "Did you mean" stood twice
app.command("run")(run_experiment)
app.command("compare")(compare_runs)
app.command()(tournament)
app.command()(check)
app.command()(report)
app.command()(quality)
app.command()(upsample)
app.command("methods")(compare_methods)
app.command("page")(page)
GROUPS = {
    "photos": photos, "base": base, "weights": weights, "device": device, "ledger": ledger, "policy": policy,
}  # fmt: skip
for name, part in GROUPS.items():
    app.add_typer(part, name=name)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedface {version('fedface')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Improve face generators and upsamplers with photos that never leave their devices."""


def main() -> None:
    """Run the command line; our own errors become one sentence and exit code 2."""
    call(app)
