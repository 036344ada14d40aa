"""The command `fedface rank-models`: devices choose between models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import locked_folder
from fedface.cli.console import note, print_json, progress_bars
from fedface.cli.options import JsonOption, PhotosOption, SetOption, command_line, parse_changes
from fedface.errors import RunError


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
