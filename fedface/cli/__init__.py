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

from fedface.cli.benchmark import benchmark
from fedface.cli.compare import compare
from fedface.cli.console import call
from fedface.cli.ledger import device, ledger
from fedface.cli.photos import photos
from fedface.cli.policy import policy
from fedface.cli.pretrain import pretrain
from fedface.cli.quality import evaluate
from fedface.cli.rank_models import rank_models
from fedface.cli.run import plan, report, run
from fedface.cli.upsample import upsample
from fedface.cli.web import web
from fedface.cli.weights import weights

app = typer.Typer(
    name="fedface",
    help="Improve face generators and upsamplers with photos that never leave their devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.suggest_commands = False  # click suggests too: "Did you mean" stood twice
app.command("run")(run)
app.command("compare")(compare)
app.command("rank-models")(rank_models)
app.command()(plan)
app.command()(report)
app.command("evaluate")(evaluate)
app.command()(upsample)
app.command("benchmark")(benchmark)
app.command("web")(web)
GROUPS = {
    "photos": photos, "pretrain": pretrain, "weights": weights, "device": device, "ledger": ledger, "policy": policy,
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
