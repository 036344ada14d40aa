"""The command `fedface policy check`.

Nothing is written. Exit code 0: the device would take part, or no run was named; 1: it would refuse something that the
run requests; 2: a file or an option is wrong, or the ledger is damaged or missing although its head or witness exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.options import JsonOption, SetOption, command_group, example, parse_changes
from fedface.errors import ConfigError

policy = command_group("What the owner of a device allows.")


@policy.command("check", epilog=example("fedface policy check device.yaml --experiment family.yaml"))
def policy_check(
    file: Annotated[Path, typer.Argument(help="A policy file, or a device file with a policy section.")],
    experiment: Annotated[
        Path | None, typer.Option(help="Would this device take part in this experiment? Exit code 1 if not.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="A ledger; default: that of the device file, or an empty one.")
    ] = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Explain what a policy allows, and whether its device would take part in a run."""
    from fedface.cli.policy_check import ledger_or_empty, print_report, print_report_as_json, read_policy_file
    from fedface.device.config import check_kind

    if experiment is None and set:
        raise ConfigError("--set changes an experiment; name one with --experiment")
    if experiment is not None:
        check_kind(experiment, "experiment")
    source, report = read_policy_file(file, ledger), None
    with ledger_or_empty(source.ledger) as session:
        if experiment is not None:
            from fedface.cli.policy_verdicts import judge_experiment

            report = judge_experiment(experiment, parse_changes(set), source.policy, session)
        spent = [session.spent_against(budget).upper for budget in source.policy.budgets]
    if json_out:
        print_report_as_json(source, spent, report)
    else:
        print_report(file, source, spent, report)
    if report is not None and report.refusal is not None:
        raise typer.Exit(1)
