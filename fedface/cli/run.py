"""Commands about experiments: run one, check its plan, write its report anew."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.aggregation.homomorphic import make_device, make_keys
from fedface.aggregation.payload import PlainConfig
from fedface.cli.console import JsonOption, console, progress_bars
from fedface.config import kind_of
from fedface.coordinator.run import initialize_run, run_experiment
from fedface.coordinator.run_folder import locked, new_folder, resume_run
from fedface.coordinator.run_state import weights_path
from fedface.errors import ConfigError
from fedface.experiment import EVALUATIONS, Experiment, RemoteDevices, SyntheticDevices, read_experiment
from fedface.models.checkpoint import flatten_parameters
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.public_data.device_photos import describe_devices
from fedface.public_data.labelled_sets import check_sources
from fedface.reports import formatting, headline_summary, html_report, model_card, run_record
from fedface.reports.measurements import Interval
from fedface.reports.run_record import BiasRecord, RunRecord
from fedface.simulation.in_process import in_process_cohort
from fedface.tensor_types import Vector
from fedface.training.latent_prior import PriorTrainingConfig
from fedface.training.training_methods import common_streams, describe_method, prepare_round
from fedface.transport.run_config import devices_folder

PhotosOption = Annotated[
    Path | None, typer.Option(help="Folder of labelled photos, for experiments that use one.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key, such as promise.epsilon=3.")
]

_MOST_LISTED = 12  # devices; the report lists all


def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME, or the next free, otherwise.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that was cut short.")] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Run an experiment in this process, from photos to report."""
    changes = changes_of(set)
    recipe = read_experiment(experiment, photos=photos, changes=changes)
    if isinstance(recipe.devices, RemoteDevices):
        raise ConfigError(
            f"{experiment}: waits for real devices; see server/README.md, or use pretended devices"
        )
    # Devices and searches run side by side, each in one thread: small networks leave a second one idle.
    torch.set_num_threads(1)
    folder = resume_run(recipe.name, out) if resume else new_folder(recipe.name, out)
    check_sources(recipe)
    with locked(folder), progress_bars() as bars:
        if not resume:
            initialize_run(recipe, folder)
        record = run_experiment(
            recipe,
            in_process_cohort(recipe, devices_folder(folder)),
            folder,
            watcher=bars,
            command=command_of("run", experiment, photos, changes),
        )
    weights = weights_path(folder, recipe.rounds)
    if json_out:
        print(record.to_json())
        return
    _print_summary(record, folder)
    console.print(f"the model after the run: {weights}", highlight=False, soft_wrap=True)


def plan(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    photos: PhotosOption = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Print the plan of an experiment without running it: promise, noise, rounds, what travels."""
    recipe = read_experiment(experiment, photos=photos, changes=changes_of(set))
    plan = recipe.plan()
    model = recipe.start()
    weights = flatten_parameters(*model.modules())
    sent = prepare_round(model, recipe.training, plan.dp_parameters, common_streams(0, 1)).ranges()
    config = recipe.aggregation
    up = _upload_bytes(recipe, torch.zeros_like(sent))
    down = 4 * len(weights)
    if json_out:
        bounds = plan.epsilon()
        told = {
            "question": recipe.question,
            "noise_multiplier": plan.noise_multiplier,
            "schedule": asdict(plan.schedule),
            "epsilon": None if bounds is None else asdict(bounds),
            "promise": asdict(recipe.privacy),
            "training": kind_of(type(recipe.training)),
            "weights": len(weights),
            "numbers_up": len(sent),
            "bytes_up_per_device_and_round": up,
            "bytes_down_per_device_and_round": down,
            "protocol": config.kind,
            "bytes_opening_a_sum": _opening_bytes(recipe, torch.zeros_like(sent)),
            **_figures_up(recipe),
        }
        print(json.dumps(told, indent=2))
        return
    console.print(recipe.question, style="bold", highlight=False)
    for line in plan.describe():
        console.print(f"  {line}", highlight=False)
    if (drowned := _drowned(plan, recipe.devices.count, len(sent))) is not None:
        console.print(f"  warning: {drowned}", highlight=False)
    console.print(
        f"  devices: {recipe.devices.count}; at least {recipe.min_responses} must answer", highlight=False
    )
    if not isinstance(recipe.devices, RemoteDevices) and (
        photos is not None or "Drawn" in type(recipe.devices).__name__
    ):
        described = describe_devices(recipe)
        for name, words, count in described[:_MOST_LISTED]:
            console.print(f"    {name}: {words}, {_held(recipe, count)}", highlight=False)
        if (more := len(described) - _MOST_LISTED) > 0:
            console.print(f"    and {more} more", highlight=False)
    console.print(
        f"  what travels up: one vector of {len(sent):,} {describe_method(recipe.training)} per device and round, "
        f"{config.kind}, {formatting.size(up)}",
        highlight=False,
    )
    if figures := _figures_up(recipe):
        at_server = plan.dp_parameters.noise_at == "server"
        alike = (
            "cut alike, and bare until the server noises their sum"
            if at_server
            else "noised and summed alike"
        )
        console.print(
            f"    besides, of held-out photos: {formatting.counted(figures['figure_sets'], 'set')} of "
            f"{figures['numbers_up_per_figure_set']:,} figures per device over the run, {alike}, "
            f"{formatting.size(figures['bytes_up_per_device_and_figure_set'])} each",
            highlight=False,
        )
    if opening := _opening_bytes(recipe, torch.zeros_like(sent)):
        console.print(
            f"    besides, from one device that holds the key: each opened sum, {formatting.size(opening)} in a round",
            highlight=False,
        )
    console.print(f"  what stays: {_stays(recipe)}", highlight=False)
    console.print(
        f"  what travels down: the weights, {formatting.size(down)} per device and round", highlight=False
    )


def _drowned(plan: Plan, devices: int, numbers: int) -> str | None:
    """That the server's noise is much longer than the sum can be, as a sentence without full stop."""
    mechanism = plan.dp_parameters.central_mechanism()
    times = 0.0 if mechanism is None else mechanism.sigma * math.sqrt(numbers) / devices
    if times < 3:
        return None
    return (
        f"the noise is about {times:,.0f} times as long as the sum of {devices} devices' updates can be, and this run "
        "will harm the model rather than teach it; ask more devices, promise a larger epsilon, or train fewer numbers "
        "(training.adapt)"
    )


def _stays(recipe: Experiment) -> str:
    bare = isinstance(recipe.privacy, PrivacyTarget) and recipe.privacy.unit == "library"
    if isinstance(recipe.training, PriorTrainingConfig):
        stays = "every photo and every latent of a photo"
        counts = "a count of units travels among the numbers, with the promise's noise like the rest"
    elif recipe.evaluation is not None:
        stays = "every photo and every gradient of a single photo"
        counts = (
            "shares of some held-out photos by tone group travel among the figures, bare"
            if bare
            else "counts of held-out units by tone group travel among the figures, with noise"
        )
    else:
        stays = "every photo, every gradient of a single photo, and how many photos there are"
        counts = ""
    match recipe.privacy:
        case PrivacyTarget(unit="library"):
            which = "a bare update" if recipe.evaluation is None else "bare updates and figures"
            let = "lets" if recipe.evaluation is None else "let"
            bound = f"what {which} {let} the server guess about them, nothing bounds"
        case PrivacyTarget(unit=unit):
            bound = f"what the sums let anybody guess about one {unit}, the promise bounds"
        case NoPrivacy():
            bound = "what the sums let anybody guess about them, nothing bounds"
    return "; ".join(part for part in (stays, counts, bound) if part)


def _held(recipe: Experiment, count: int | None) -> str:
    """How many photos a pretended device holds, and how many units the promise covers where those are others."""
    photos = "photos unknown" if count is None else formatting.counted(count, "photo")
    match recipe.privacy, recipe.devices:
        case PrivacyTarget(unit="occasion"), SyntheticDevices(photos_per_occasion=each) if count is not None:
            return f"{photos} in {formatting.counted(count // each, 'occasion')}"
    return photos


def _figures_up(recipe: Experiment) -> dict[str, int]:
    """How many figures of its own photos a device sends, in how many sets; empty where it sends none."""
    if recipe.evaluation is None:
        return {}
    width = recipe.evaluation.metrics.width
    return {
        "figure_sets": EVALUATIONS,
        "numbers_up_per_figure_set": width,
        "bytes_up_per_device_and_figure_set": _upload_bytes(recipe, torch.zeros(width)),
    }


def _opening_bytes(recipe: Experiment, zeros: Vector) -> int:
    """What the one device sends back that opens a round's sum; 0 where the server reads it by itself."""
    return 0 if isinstance(recipe.aggregation, PlainConfig) else 4 * len(zeros)


def report(folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Write a finished run's report and model card anew."""
    record = run_record.read(folder)
    model_card.write(record, folder)
    console.print(f"open {html_report.write(record, folder)}", highlight=False, soft_wrap=True)


def changes_of(words: list[str] | None) -> dict[str, str]:
    """The changes of `--set`; raises ConfigError unless each is KEY=VALUE."""
    changes = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set wants KEY=VALUE such as promise.epsilon=3, got {word}")
        changes[key] = value
    return changes


def command_of(
    verb: str, experiment: Path, photos: Path | None, changes: dict[str, str], more: Sequence[str] = ()
) -> str:
    """What a reader types into a shell to do it again."""
    words = ["fedface", verb, str(experiment), *more]
    words += ["--photos", str(photos)] if photos else []
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def _upload_bytes(recipe: Experiment, zeros: Vector) -> int:
    """The size of one protected update, made and measured."""
    keys = make_keys(recipe.aggregation, recipe.agreement)
    return make_device(recipe.aggregation, recipe.agreement, keys).protect(zeros, 1).nbytes


def _print_summary(record: RunRecord, folder: Path) -> None:
    for sentence in headline_summary.headline_summary(record):
        console.print(sentence, highlight=False)
    table = Table(box=None, title="Served by group", title_justify="left")
    for heading in (
        "group",
        "photos",
        "consistency error before",
        "after",
        "colour difference before",
        "after",
    ):
        table.add_column(heading)
    before, after = record.bias_before, record.bias_after
    if isinstance(before, BiasRecord) and isinstance(after, BiasRecord):
        for old, new in zip(before.groups, after.groups, strict=True):
            pairs = [
                (old, "consistency_error"),
                (new, "consistency_error"),
                (old, "skin_difference"),
                (new, "skin_difference"),
            ]
            table.add_row(
                old.group, str(old.count), *(_estimate(group.metrics[name]) for group, name in pairs)
            )
    console.print(table)
    console.print(f"open {folder / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"also {folder / 'run_record.json'} and {folder / 'model-model_card.md'}",
        highlight=False,
        soft_wrap=True,
    )


def _estimate(figure: object) -> str:
    if not isinstance(figure, Interval):
        return "not measured"
    return f"{formatting.number(figure.estimate)} [{formatting.number(figure.low)}, {formatting.number(figure.high)}]"
