"""The commands `fedface run`, `plan` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import locked_folder
from fedface.cli.console import print_json, progress_bars, say
from fedface.cli.options import JsonOption, PhotosOption, SetOption, command_line, parse_changes


def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/NAME, or the next free one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many devices work at a time; default: one per core.")
    ] = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Run an experiment on simulated devices and write its report.

    Everything runs in this process; for remote devices see docs/fifty-devices.md.
    """
    import torch

    from fedface.cli.tables import print_run
    from fedface.coordinator.run import initialize_run, run_experiment
    from fedface.coordinator.run_folder import new_folder, resume_run
    from fedface.coordinator.run_state import weights_path
    from fedface.experiment import devices_folder, read_experiment
    from fedface.public_data.labelled_sets import check_simulated
    from fedface.simulation.in_process import in_process_cohort

    changes = parse_changes(set)
    recipe = read_experiment(experiment, photos=photos, changes=changes)
    check_simulated(recipe, experiment)
    # Devices and searches run in parallel, one thread each: small networks gain nothing from a second one.
    torch.set_num_threads(1)
    folder = resume_run(recipe.name, out) if resume else new_folder(recipe.name, out)
    with locked_folder(folder, "run"), progress_bars() as bars:
        if not resume:
            initialize_run(recipe, folder)
        record = run_experiment(
            recipe,
            in_process_cohort(recipe, devices_folder(folder), workers),
            folder,
            progress=bars,
            command=command_line("run", experiment, photos, changes),
        )
    if json_out:
        print_json(record)
        return
    print_run(record, folder)
    say(f"the trained model: {weights_path(folder, recipe.rounds)}")


def plan(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    photos: PhotosOption = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Print an experiment's privacy, noise, rounds and traffic.

    Nothing is run and no photo is read.
    """
    from fedface.cli.plan_summary import can_list_devices, measure_traffic, plan_lines, plan_record
    from fedface.experiment import read_experiment

    recipe = read_experiment(experiment, photos=photos, changes=parse_changes(set))
    with progress_bars() as bars:
        bars.stage("computing the noise", 0)  # minutes for very many rounds
        plan = recipe.plan()
        traffic = measure_traffic(recipe, plan)
    if json_out:
        print_json(plan_record(recipe, plan, traffic))
        return
    say(recipe.question, style="bold")
    list_devices = can_list_devices(recipe, photos_given=photos is not None)
    for line in plan_lines(recipe, plan, traffic, list_devices=list_devices):
        say(f"  {line}")


def report(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write report and model card of a run again; of an unfinished one, a report of its rounds so far."""
    from fedface.coordinator.run import unaudited_record
    from fedface.reports import html_report, model_card, run_record

    if (folder / "state.json").exists() and not (folder / run_record.FILE).exists():
        # The run may be going on in another process: nothing is written that it writes.
        say(f"so far, open {html_report.write_so_far(unaudited_record(folder), folder)}")
        return
    record = run_record.read(folder)
    with locked_folder(folder, "run"):
        model_card.write(record, folder)
        say(f"open {html_report.write(record, folder)}")
