"""The command that lets devices choose between models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.cli.console import JsonOption, console, notes, progress_bars
from fedface.cli.run import PhotosOption, SetOption, changes_of, command_of
from fedface.coordinator.model_ranking import load_candidates, ranking_parameters, run_ranking
from fedface.coordinator.run_folder import locked, new_folder, resume_ranking
from fedface.errors import ConfigError, RunError
from fedface.experiment import RemoteDevices, for_ranking, read_experiment
from fedface.privacy.privacy_target import PrivacyTarget, format_delta
from fedface.public_data.labelled_sets import check_sources
from fedface.reports import device_metrics_section, strict
from fedface.reports.model_ranking_report import RankingReport
from fedface.simulation.in_process import in_process_cohort
from fedface.transport.run_config import devices_folder


def rank_models(
    experiment: Annotated[
        Path, typer.Argument(help="The experiment's YAML file: devices, promise, downscale.")
    ],
    candidates: Annotated[
        list[str], typer.Argument(help='Files of weights, or the word "base"; two at least.')
    ],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the tournament; runs/NAME-tournament otherwise.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the one that was cut short.")] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Send models to devices, which score them on their own photos: only sums come back, noised."""
    changes = changes_of(set)
    recipe = for_ranking(read_experiment(experiment, photos=photos, changes=changes))
    if isinstance(recipe.devices, RemoteDevices):
        raise ConfigError(
            f"{experiment}: waits for real devices; see server/README.md, or use pretended devices"
        )
    models = load_candidates(candidates, recipe)
    terms = ranking_parameters(
        recipe, len(models)
    )  # a promise that cannot be kept is said before a folder is made
    if not json_out and isinstance(recipe.privacy, PrivacyTarget):
        notes.print(
            f"{len(models)} models, each on all photos of {recipe.devices.count} devices; a device's answers cost each "
            f"{recipe.privacy.unit} epsilon {recipe.privacy.epsilon:g} at delta {format_delta(recipe.privacy.delta)} "
            f"together, with noise multiplier {terms.noise_multiplier:.3g}",
            highlight=False,
            soft_wrap=True,
        )
    torch.set_num_threads(1)
    name = f"{recipe.name}-tournament"
    folder = resume_ranking(name, out) if resume else new_folder(name, out)
    if not resume and (folder / "answers.json").exists():
        raise RunError(f"{folder}: holds a tournament; continue it with --resume, or choose another folder")
    check_sources(recipe)
    with locked(folder), progress_bars() as bars:
        record = run_ranking(
            recipe,
            models,
            in_process_cohort(recipe, devices_folder(folder)),
            folder,
            watcher=bars,
            command=command_of("tournament", experiment, photos, changes, candidates),
        )
    if json_out:
        print(strict.dumps(record))
        return
    _print(record, folder)


def _print(record: RankingReport, folder: Path) -> None:
    console.print(record.title(), style="bold", highlight=False)
    measures = device_metrics_section.measures_of(record.candidates)
    table = Table(box=None, title="All units together", title_justify="left")
    for heading in ("candidate", "units", *(device_metrics_section.title(name) for name in measures)):
        table.add_column(heading)
    for told in record.candidates:
        table.add_row(told.when, *device_metrics_section.texts(told.overall, measures))
    console.print(table)
    for sentence in device_metrics_section.end_sentence(record.candidates):
        console.print(sentence, highlight=False)
    if record.undecided():
        console.print(f"Best first: {record.verdicts()[0]}", highlight=False)
    else:
        _print_orders(record)
    for told in record.candidates[:1]:
        console.print(f"each candidate: {device_metrics_section.spent_words(told)}", highlight=False)
    console.print(record.price_sentence(), highlight=False)
    console.print(record.asked, highlight=False)
    console.print(f"open {folder / 'tournament.png'}", highlight=False, soft_wrap=True)
    console.print(f"also {folder / 'tournament.md'}", highlight=False, soft_wrap=True)


def _print_orders(record: RankingReport) -> None:
    orders = Table(box=None, title="Best first", title_justify="left")
    for heading in ("measure", "for", "order", "cannot be told apart"):
        orders.add_column(heading)
    for ranking in record.rankings:
        ties = "; ".join(" and ".join(pair) for pair in ranking.ties) or "all are told apart"
        order = ", ".join(ranking.order)
        if ranking.all_tied(len(record.candidates)):
            order, ties = "none", "no two of them"
        orders.add_row(device_metrics_section.title(ranking.measure), ranking.by, order, ties)
    console.print(orders)
