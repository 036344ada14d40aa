"""The command line: parse, call one library function, print one result. The only door to typer.

Every error of ours ends here as one sentence and exit code 2; a traceback means a bug in fedface.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

# Threads that wait must sleep: a busy second core otherwise slows every small convolution many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedface.aggregation.encrypted import make_device, make_keys
from fedface.audits.bias import tone_histogram
from fedface.errors import ConfigError, FedfaceError
from fedface.experiment import Experiment, RealDevices, read_experiment
from fedface.federation.coordinator import begin, coordinate
from fedface.federation.flower import devices_folder, in_process_cohort
from fedface.federation.folders import locked, new_folder, resumed_folder
from fedface.federation.simulated import check_sources, describe_devices, prepare
from fedface.models.weights import load_base, load_gan, save_gan, vector_of
from fedface.photos.detection_rates import measure_detection
from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector
from fedface.photos.drawn import ToneMix, sample_faces
from fedface.photos.drawn import draw as draw_faces
from fedface.photos.faces import Detector
from fedface.photos.library import scan_table, summary
from fedface.photos.scan import ScanReport, scan_library
from fedface.privacy.ledger import Ledger
from fedface.reports import card, page, run, wording
from fedface.reports.figures import face_grid
from fedface.reports.portrait import portrait_sheet, upsample_photo
from fedface.reports.run import BiasRecord, Interval, RunRecord
from fedface.training.pretrain import PretrainConfig, pretrain
from fedface.upsampling.pulse import PulseConfig

app = typer.Typer(
    name="fedface",
    help="Improve face generators and upsamplers with photos that never leave their devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
photos = typer.Typer(help="Read a photo library.", no_args_is_help=True, rich_markup_mode=None)
base = typer.Typer(help="The embedded generator.", no_args_is_help=True, rich_markup_mode=None)
device = typer.Typer(help="For the owner of a device.", no_args_is_help=True, rich_markup_mode=None)
ledger = typer.Typer(help="What a device has spent.", no_args_is_help=True, rich_markup_mode=None)
for part, name in ((photos, "photos"), (base, "base"), (device, "device"), (ledger, "ledger")):
    app.add_typer(part, name=name)

# A pipe has no width of its own; eighty columns would fold every table.
console = Console(width=None if sys.stdout.isatty() else 140)
notes = Console(stderr=True)

PhotosOption = Annotated[
    Path | None, typer.Option(help="Folder of labelled photos, for experiments that use one.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key, such as promise.epsilon=3.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DetectorOption = Annotated[
    Path | None, typer.Option(help="A YuNet .onnx file; the embedded detector otherwise.")
]


class Bars:
    """Progress bars on the terminal, plain lines elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: int | None = None
        self._live = progress.console.is_terminal

    def stage(self, name: str, steps: int) -> None:
        """A stage begins."""
        self._finish()
        if not self._live:
            self._progress.console.print(f"{name} ...", highlight=False)
        self._task = int(self._progress.add_task(name, total=steps))

    def step(self, done: int) -> None:
        """A stage moves."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)  # type: ignore[arg-type]

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._progress.console.print(sentence, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)  # type: ignore[arg-type]
            self._task = None


@contextmanager
def _bars() -> Iterator[Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as progress:
        yield Bars(progress)


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


@app.command("run")
def run_experiment(
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
    changes = _changes(set)
    recipe = read_experiment(experiment, photos=photos, changes=changes)
    if isinstance(recipe.devices, RealDevices):
        raise ConfigError(
            f"{experiment}: waits for real devices; see server/README.md, or use pretended devices"
        )
    # Devices and searches run side by side, each in one thread: small networks leave a second one idle.
    torch.set_num_threads(1)
    folder = resumed_folder(recipe.name, out) if resume else new_folder(recipe.name, out)
    check_sources(recipe)
    with locked(folder), _bars() as bars:
        if not resume:
            begin(recipe, folder)
        state = devices_folder(folder)
        prepare(recipe, state)
        record = coordinate(
            recipe,
            in_process_cohort(recipe, state),
            folder,
            watcher=bars,
            command=_command(experiment, photos, changes),
        )
    if json_out:
        print(record.to_json())
        return
    _print_summary(record, folder)


@app.command()
def check(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    photos: PhotosOption = None,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Print the plan of an experiment without running it: promise, noise, rounds, what travels."""
    recipe = read_experiment(experiment, photos=photos, changes=_changes(set))
    plan = recipe.plan()
    gan = recipe.start()
    weights = vector_of(*gan.modules())
    config = recipe.aggregation
    up = _upload_bytes(recipe)
    down = 4 * len(weights)
    if json_out:
        bounds = plan.epsilon()
        told = {
            "question": recipe.question,
            "noise_multiplier": plan.noise_multiplier,
            "schedule": asdict(plan.schedule),
            "epsilon": None if bounds is None else asdict(bounds),
            "promise": asdict(recipe.promise),
            "weights": len(weights),
            "bytes_up_per_device_and_round": up,
            "bytes_down_per_device_and_round": down,
            "protocol": config.kind,
        }
        print(json.dumps(told, indent=2))
        return
    console.print(recipe.question, style="bold", highlight=False)
    for line in plan.describe():
        console.print(f"  {line}", highlight=False)
    console.print(
        f"  devices: {recipe.devices.count}; at least {recipe.fewest_answers} must answer", highlight=False
    )
    if not isinstance(recipe.devices, RealDevices) and (
        photos is not None or "Drawn" in type(recipe.devices).__name__
    ):
        for name, words, count in describe_devices(recipe):
            console.print(f"    {name}: {words}, {count} photos", highlight=False)
    console.print(
        f"  what travels up: one vector of {len(weights):,} weight changes per device and round, {config.kind}, "
        f"{wording.size(up)}; no photo, no gradient of a photo, no count of photos",
        highlight=False,
    )
    console.print(
        f"  what travels down: the weights, {wording.size(down)} per device and round", highlight=False
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Write a finished run's report and model card anew."""
    record = run.read(folder)
    card.write(record, folder)
    console.print(f"open {page.write(record, folder)}", highlight=False, soft_wrap=True)


@app.command()
def upsample(
    photo: Annotated[Path, typer.Argument(help="A photo with a face, or a small square face.")],
    generator: Annotated[Path | None, typer.Option(help="A checkpoint; the embedded one otherwise.")] = None,
    detector: DetectorOption = None,
    factor: Annotated[int, typer.Option(min=2, help="How much the face is shrunk.")] = 4,
    faces: Annotated[int, typer.Option(min=1, max=16, help="How many faces to search.")] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; PHOTO-faces.png here otherwise.")
    ] = None,
) -> None:
    """Show what PULSE makes of a face: several people, all of whom shrink to the same pixels."""
    gan = load_base() if generator is None else load_gan(generator)
    target = out or Path(f"{photo.stem}-faces.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name the PNG to write")
    with _bars() as bars:
        bars.stage("searching faces", 100)
        found = upsample_photo(
            photo,
            gan.generator,
            lambda: _detector(detector),
            factor=factor,
            faces=faces,
            seed=seed,
            progress=lambda done, of: bars.step(round(100 * done / max(1, of))),
        )
    target.write_bytes(portrait_sheet(found))
    if found.faces_in_photo > 1:
        console.print(f"{found.faces_in_photo} faces in the photo; the largest was taken", highlight=False)
    for i, (misfit, fits) in enumerate(zip(found.made.misfit[0], found.made.converged[0], strict=True)):
        verdict = (
            "shrinks to the same pixels" if fits else f"does not fit: {PulseConfig().eps:g} or less would"
        )
        console.print(f"face {i + 1}: misfit {misfit:.5f}, {verdict}", highlight=False)
    if not bool(found.made.converged.any()):
        console.print(
            "This generator cannot make a face that fits; what it shows is the nearest it knows.",
            highlight=False,
        )
    console.print("These people do not exist; the pixels do not say which face is right.", highlight=False)
    console.print(f"open {target}", highlight=False, soft_wrap=True)


@photos.command()
def scan(
    folder: Annotated[Path, typer.Argument(help="A photo library; it is read, never written.")],
    detector: DetectorOption = None,
    cache: Annotated[
        Path | None, typer.Option(help="The index file; in the user's state folder otherwise.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many lines to print.")] = 40,
    json_out: JsonOption = False,
) -> None:
    """Read a folder of photos: what is there, where faces are, and what cannot be read and why."""
    finder = _detector(detector)
    with _bars() as bars:
        bars.stage("files read", 0)

        def progress(so_far: ScanReport) -> None:
            bars.step(so_far.files)

        done = scan_library(folder, detector=finder, cache=cache, progress=progress)
    found = summary(folder, cache=cache, detector=finder.name)
    lines = scan_table(folder, cache=cache, detector=finder.name)
    if json_out:
        told = {"scan": asdict(done), "summary": asdict(found), "files": [asdict(row) for row in lines]}
        print(json.dumps(told, indent=2, default=str))
        return
    table = Table(box=None)
    for heading in ("file", "kind", "pixels", "taken", "place", "faces", "why not"):
        table.add_column(heading, overflow="ellipsis", no_wrap=heading != "why not", max_width=44)
    left = 0
    for number, row in enumerate(lines):
        if number >= rows:
            left += 1
            continue
        values = asdict(row)
        table.add_row(*(_cell(value) for value in values.values()))
    console.print(table)
    if left:
        console.print(f"... and {left} more (--rows {rows + left}, or --json)", highlight=False)
    for key, value in asdict(found).items():
        console.print(f"{key.replace('_', ' ')}: {_cell(value)}", highlight=False)


@photos.command()
def draw(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    size: Annotated[int, typer.Option(min=16, max=256, help="Pixels a side.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a sheet of faces with known tone, light and camera; tone rises from left to right."""
    chance = torch.Generator().manual_seed(seed)
    everyone = sample_faces(60, ToneMix(light_share=0.5), chance)
    by_tone = everyone[everyone.tone.argsort().reshape(10, 6).T.reshape(-1)]
    made = draw_faces(by_tone, size, noise=chance)
    tones = by_tone.tone.reshape(6, 10)
    columns = [f"Monk {low:.1f}-{high:.1f}" for low, high in zip(tones.amin(0), tones.amax(0), strict=True)]
    rows = [("", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, columns))
    console.print(f"open {out}", highlight=False, soft_wrap=True)


@photos.command()
def detectors(
    faces: Annotated[Path, typer.Option(help="A labelled set of faces.")],
    yunet: Annotated[Path | None, typer.Option(help="A YuNet .onnx file, to measure it as well.")] = None,
    per_cell: Annotated[int, typer.Option(min=1, help="Photos of each race and gender.")] = 10,
    json_out: JsonOption = False,
) -> None:
    """Measure in whose photos each face detector finds a face."""
    finders: list[Detector] = [HogDetector(), EmbeddedDetector(), *([YuNetDetector(yunet)] if yunet else [])]
    rates = []
    with _bars() as bars:
        bars.stage("detectors", len(finders))
        for number, finder in enumerate(finders, start=1):
            rates += measure_detection(faces, finder, per_cell=per_cell)
            bars.step(number)
    if json_out:
        print(json.dumps([{**asdict(rate), "interval": rate.interval} for rate in rates], indent=2))
        return
    table = Table(box=None)
    for heading in ("group", "photos", *(finder.name for finder in finders)):
        table.add_column(heading)
    for group in dict.fromkeys(rate.group for rate in rates):
        row = {rate.detector: rate for rate in rates if rate.group == group}
        cells = [f"{r.rate:.0%} [{r.interval[0]:.0%}, {r.interval[1]:.0%}]" for r in row.values()]
        table.add_row(group, str(next(iter(row.values())).count), *cells)
    console.print(table)


@base.command("train")
def base_train(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("base32.safetensors"),
    seed: Annotated[int, typer.Option(min=0)] = PretrainConfig().seed,
    light_share: Annotated[float, typer.Option(min=0, max=1)] = PretrainConfig().light_share,
    shorten: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Take this share of all steps, to try it.")
    ] = 1.0,
) -> None:
    """Train the base checkpoint from drawn faces; the defaults make the shipped one."""
    full = PretrainConfig()
    config = PretrainConfig(
        seed=seed,
        light_share=light_share,
        pool=max(64, round(full.pool * shorten)),
        paired_steps=max(1, round(full.paired_steps * shorten)),
        adversarial_steps=max(1, round(full.adversarial_steps * shorten)),
    )
    with _bars() as bars:
        stage = ""

        def progress(name: str, done: int, of: int, figures: dict[str, float]) -> None:
            nonlocal stage
            if name != stage:
                stage = name
                bars.stage(name, of)
            bars.step(done)
            if figures and done % 500 == 0:
                bars.say(
                    f"{name} {done}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                )

        gan = pretrain(config, progress)
    save_gan(out, gan)
    console.print(f"wrote {out} ({gan.notes['seconds']} s)", highlight=False)


@base.command("sheet")
def base_sheet(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    generator: Annotated[Path | None, typer.Option(help="A checkpoint; the embedded one otherwise.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Draw a sheet of samples of a checkpoint, and count their skin tones."""
    gan = load_base() if generator is None else load_gan(generator)
    tones = tone_histogram(gan.generator.sample(1000, torch.Generator().manual_seed(seed + 1)))
    for step, (count, share) in enumerate(zip(tones.counts, tones.shares, strict=True), start=1):
        bar = "#" * round(100 * share.estimate)
        console.print(f"Monk {step:2}: {count:4} {bar}", highlight=False)
    console.print(f"darker half of the Monk scale, by pixels: {tones.darker}", highlight=False)
    made = gan.generator.sample(60, torch.Generator().manual_seed(seed))
    rows = [(f"{10 * row + 1}-{10 * row + 10}", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, [""] * 10, side=96))
    console.print(f"open {out}", highlight=False, soft_wrap=True)


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
        table.add_row(*(str(entry[key]) for key in ("number", "written", "run", "round", "attempt")))
    console.print(table)
    console.print(
        f"epsilon spent: {spent} at delta {delta:g}, per photo (a run's own promise may name another delta)",
        highlight=False,
    )


def _detector(path: Path | None) -> Detector:
    return EmbeddedDetector() if path is None else YuNetDetector(path)


def _changes(words: list[str] | None) -> dict[str, str]:
    changes = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set wants KEY=VALUE such as promise.epsilon=3, got {word}")
        changes[key] = value
    return changes


def _command(experiment: Path, photos: Path | None, changes: dict[str, str]) -> str:
    words = ["fedface", "run", str(experiment)]
    words += ["--photos", str(photos)] if photos else []
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"]
    return " ".join(words)


def _upload_bytes(recipe: Experiment) -> int:
    """The size of one protected update, made and measured."""
    gan = recipe.start()
    zeros = torch.zeros_like(vector_of(*gan.modules()))
    keys = make_keys(recipe.aggregation, recipe.agreement)
    return make_device(recipe.aggregation, recipe.agreement, keys).protect(zeros, 1).nbytes


def _print_summary(record: RunRecord, folder: Path) -> None:
    for sentence in wording.answer(record):
        console.print(sentence, highlight=False)
    table = Table(box=None, title="Served by group", title_justify="left")
    for heading in ("group", "photos", "misfit before", "after", "colour difference before", "after"):
        table.add_column(heading)
    before, after = record.bias_before, record.bias_after
    if isinstance(before, BiasRecord) and isinstance(after, BiasRecord):
        for old, new in zip(before.groups, after.groups, strict=True):
            pairs = [(old, "misfit"), (new, "misfit"), (old, "skin_difference"), (new, "skin_difference")]
            table.add_row(
                old.group, str(old.count), *(_estimate(group.figures[name]) for group, name in pairs)
            )
    console.print(table)
    console.print(f"open {folder / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"also {folder / 'run.json'} and {folder / 'model-card.md'}", highlight=False, soft_wrap=True
    )


def _estimate(figure: object) -> str:
    if not isinstance(figure, Interval):
        return "not measured"
    return f"{wording.number(figure.estimate)} [{wording.number(figure.low)}, {wording.number(figure.high)}]"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(part)}" for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(_cell(part) for part in value)
    return str(value)


def main() -> None:
    """Run the command line; our own errors become one sentence and exit code 2."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        app()
    except FedfaceError as error:
        notes.print(f"fedface: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        # A disk that is full or a path that cannot be: what has no file to name may be a bug, and stays one.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        reason = f"{error.filename or 'the disk'}: {error.strerror}"
        notes.print(f"fedface: {reason}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as end:
        # Typer turns an interrupt into this code, without a word.
        if end.code == 130:
            notes.print(
                "interrupted; what was finished is kept, continue a run with --resume", highlight=False
            )
        raise
