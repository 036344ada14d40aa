"""The commands that read an experiment, `fedface run`, `plan`, `compare` and `rank-models`, and `fedface report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import locked_folder
from fedface.cli.console import note, print_json, progress_bars, say
from fedface.cli.options import JsonOption, PhotosOption, SetOption, command_line, parse_changes
from fedface.errors import ConfigError, RunError

ExperimentArgument = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]


def run(
    experiment: ExperimentArgument,
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
    experiment: ExperimentArgument,
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


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file, with the key `vary`.")],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default: runs/NAME, or the next free one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted comparison; finished runs are reused.")
    ] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Run every combination that an experiment varies."""
    import torch

    from fedface.cli.tables import print_comparison
    from fedface.coordinator.compare_runs import compare_runs
    from fedface.coordinator.run_folder import new_folder, resume_comparison
    from fedface.public_data.labelled_sets import check_simulated
    from fedface.simulation.in_process import in_process_cohort
    from fedface.sweep import read_sweep

    changes = parse_changes(set)
    sweep = read_sweep(experiment, photos=photos, changes=changes)
    for variant in sweep.variants:
        check_simulated(variant.experiment, experiment)
    # Devices train in parallel, one thread each: small networks gain nothing from a second one.
    torch.set_num_threads(1)
    folder = resume_comparison(sweep.name, out) if resume else new_folder(sweep.name, out)
    if not resume and (folder / "runs").exists():
        raise ConfigError(
            f"{folder}: contains a comparison; continue it with --resume, or choose another folder"
        )
    with locked_folder(folder, "comparison"), progress_bars() as bars:
        record = compare_runs(
            sweep,
            folder,
            in_process_cohort,
            progress=bars,
            command=command_line("compare", experiment, photos, changes),
        )
    if json_out:
        print_json(record)
        return
    print_comparison(record, folder)


def rank_models(
    experiment: Annotated[
        Path, typer.Argument(help="The experiment's YAML file: devices, privacy, downscale.")
    ],
    candidates: Annotated[
        list[str], typer.Argument(help='Checkpoints, or "base" for the bundled model; at least two.')
    ],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the ranking; default: runs/NAME-ranking.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted ranking.")] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Let devices rank models on their own photos.

    Each device evaluates every model; only clipped and noised metrics leave it, summed over devices.
    """
    import torch

    from fedface.cli.tables import print_ranking
    from fedface.coordinator.model_ranking import load_candidates, ranking_parameters, run_ranking
    from fedface.coordinator.run_folder import new_folder, resume_ranking
    from fedface.experiment import devices_folder, for_ranking, ranking_name, read_experiment
    from fedface.number_format import format_delta
    from fedface.privacy.privacy_target import PrivacyTarget
    from fedface.public_data.labelled_sets import check_simulated
    from fedface.simulation.in_process import in_process_cohort

    changes = parse_changes(set)
    recipe = for_ranking(read_experiment(experiment, photos=photos, changes=changes))
    check_simulated(recipe, experiment)
    models = load_candidates(candidates, recipe)
    # An impossible privacy target is refused before a folder is created.
    dp = ranking_parameters(recipe, len(models))
    if not json_out and isinstance(recipe.privacy, PrivacyTarget):
        note(
            f"{len(models)} models, each evaluated on all photos of {recipe.devices.count} devices; "
            f"together this costs each {recipe.privacy.unit} epsilon {recipe.privacy.epsilon:g} at delta "
            f"{format_delta(recipe.privacy.delta)}, with noise multiplier {dp.noise_multiplier:.3g}"
        )
    torch.set_num_threads(1)
    name = ranking_name(recipe)
    folder = resume_ranking(name, out) if resume else new_folder(name, out)
    if not resume and (folder / "metrics.json").exists():
        raise RunError(f"{folder}: contains a ranking; continue it with --resume, or choose another folder")
    with locked_folder(folder, "ranking"), progress_bars() as bars:
        record = run_ranking(
            recipe,
            models,
            in_process_cohort(recipe, devices_folder(folder)),
            folder,
            progress=bars,
            command=command_line("rank-models", experiment, photos, changes, candidates),
        )
    if json_out:
        print_json(record)
        return
    print_ranking(record, folder)
