"""The command line: parse, call the library, print one result. Only these files import typer.

A command imports what it needs when it runs, so that `--help` never loads torch. Every `FedfaceError` ends as one
sentence and exit code 2; a traceback means a bug in fedface.
"""

from __future__ import annotations

import os
from typing import Annotated

# Waiting threads must sleep: a busy second core slows every small convolution many times over.
# These variables must be set before torch, Flower and Ray are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer

from fedface.cli.benchmark import benchmark
from fedface.cli.console import call
from fedface.cli.device import device, ledger
from fedface.cli.options import example
from fedface.cli.photos import photos
from fedface.cli.policy import policy
from fedface.cli.pretrain import pretrain
from fedface.cli.quality import evaluate
from fedface.cli.run import compare, plan, rank_models, report, run
from fedface.cli.server import server
from fedface.cli.upsample import upsample
from fedface.cli.web import web
from fedface.cli.weights import weights

app = typer.Typer(
    name="fedface",
    help="Federated learning for face generators and upsamplers under differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=example("fedface run experiments/demo.yaml"),
)
app.suggest_commands = False  # click suggests a command too; "Did you mean" would appear twice
COMMANDS = (
    ("run", run, "fedface run experiments/demo.yaml --set training.rounds=2"),
    ("plan", plan, "fedface plan experiments/demo.yaml --set privacy.epsilon=3"),
    ("report", report, "fedface report runs/demo"),
    ("compare", compare, "fedface compare experiments/adaptation.yaml"),
    ("rank-models", rank_models, "fedface rank-models experiments/own-photos.yaml base other.safetensors"),
    ("evaluate", evaluate, "fedface evaluate runs/demo/model.safetensors --count 1000"),
    ("upsample", upsample, "fedface upsample photo.jpg --method pulse --method hmc --faces 6"),
    ("benchmark", benchmark, "fedface benchmark --method all --per-group 12"),
    ("web", web, "fedface web --open"),
)
GROUPS = {
    "photos": photos, "pretrain": pretrain, "weights": weights, "device": device, "ledger": ledger, "policy": policy,
    "server": server,
}  # fmt: skip
for name, command, shown in COMMANDS:
    app.command(name, epilog=example(shown))(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"fedface {version('fedface')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning for face generators and upsamplers under differential privacy."""


def main() -> None:
    """Run the command line; a `FedfaceError` becomes one sentence and exit code 2."""
    call(app)
