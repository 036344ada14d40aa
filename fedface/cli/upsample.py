"""The command `fedface upsample`: a photo or a folder of photos to sheets of faces.

Called from fedface/cli. Parses, calls `reports.portraits`, and says in a line each what came of every photo.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from fedface.audits.bias import ToneHistogram, tone_histogram
from fedface.cli.console import LONGEST, DetectorOption, JsonOption, ProgressBars, console, progress_bars
from fedface.cli.photos import chosen_detector
from fedface.config import plain
from fedface.errors import ConfigError, LibraryError
from fedface.inference.contact_sheet import NEAREST, NO_FACE, MethodRunner, describe_output
from fedface.inference.pipeline import (
    SheetFolder,
    SheetRecord,
    SheetSettings,
    SkippedPhoto,
    check_sheet,
    images_in,
    run_pipeline,
)
from fedface.models.checkpoint import load_model, weights_hash
from fedface.models.generator_protocol import sample
from fedface.models.model import FlowArchitecture, Model, SuperResolutionArchitecture
from fedface.photos.face_alignment import Detector
from fedface.text import sanitize_text
from fedface.upsampling.degradation import Area, Bicubic, BicubicPulse, Degradation
from fedface.upsampling.methods import METHODS, Method, default_method, pair_with_models, with_workers
from fedface.upsampling.pulse import PulseConfig

TONES = 1000  # samples whose skin tones are counted for a sheet

MethodOption = Annotated[
    list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}, or all; may be repeated.")
]
FactorOption = Annotated[int, typer.Option(min=1, help="How much the face is shrunk.")]
Downscale = Literal["bicubic-pulse", "bicubic", "area"]
DownscaleOption = Annotated[Downscale, typer.Option(help="How the face is shrunk.")]


def upsample(
    photo: Annotated[
        Path, typer.Argument(help="A photo with a face, a small square face, or a folder of such photos.")
    ],
    method: MethodOption = None,
    faces: Annotated[int, typer.Option(min=1, max=16, help="How many faces of each method.")] = 6,
    factor: FactorOption = 4,
    downscale: DownscaleOption = "bicubic-pulse",
    max_faces: Annotated[
        int, typer.Option(min=1, help="How many people of one photo, the largest first.")
    ] = 1,
    no_detect: Annotated[
        bool, typer.Option("--no-detect", help="Skip face detection; use the centre square.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint; the embedded ones otherwise.")
    ] = None,
    detector: DetectorOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The PNG for one photo, the folder for many; PHOTO-faces.png or faces/ here otherwise."
        ),
    ] = None,
    json_out: JsonOption = False,
) -> None:
    """Show what upsamplers make of a face: several people who shrink to the same pixels, as nearly as they can."""
    if not photo.exists():
        raise LibraryError(f"there is no photo or folder {photo}")
    given = None if checkpoint is None else load_model(checkpoint)
    methods = chosen_methods(method, given)
    size, pairs = pair_with_models([with_workers(each, cores()) for each in methods], given)
    known = shrinking(downscale, factor, size)
    wanted = SheetSettings(
        degradation=known,
        size=size,
        faces=faces,
        max_faces=max_faces,
        detect="at the whole" if no_detect else "for faces",
    )
    settings = {
        "methods": [plain(each) for each in methods], "weights": [_hash(model) for _, model in pairs],
        "downscale": plain(known), "faces": faces, "people": max_faces, "whole": no_detect, "seed": seed, 
        "detector": str(detector or ""),
    }  # fmt: skip
    with progress_bars() as bars:
        bars.stage("preparing", 0)
        painters = MethodRunner(pairs, known, size=size, seed=seed, progress=lambda done, of: bars.advance(
            round(1000 * done / max(1, of))
        ))  # fmt: skip
        finder = cache(lambda: chosen_detector(detector))
        # JSON stands alone on standard output; sentences then go beside the bars.
        job = _Job(wanted, painters, finder, _tones(pairs), bars, bars.message if json_out else _aloud)
        if photo.is_dir():
            found = _folder(job, photo, out or Path("faces"), settings)
        else:
            found = _one(job, photo, out)
    if json_out:
        print(json.dumps(found, indent=1))
        return
    console.print(NO_FACE, highlight=False)


def shrinking(kind: Downscale, factor: int, size: int) -> Degradation:
    """The downscale of `--downscale` and `--factor`; raises ConfigError unless it divides faces of `size` pixels."""
    if size % factor:
        raise ConfigError(f"--factor must divide the {size} pixels of a face, got {factor}")
    match kind:
        case "bicubic-pulse":
            return BicubicPulse(factor)
        case "bicubic":
            return Bicubic(factor)
        case "area":
            return Area(factor)


def cores() -> int:
    """How many processors this process may use, 8 at most."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def chosen_methods(names: list[str] | None, given: Model | None) -> list[Method]:
    """The methods of `--method`, or the one that goes with a checkpoint; raises ConfigError for an unknown name."""
    if not names:
        return [PulseConfig() if given is None else default_method(given)]
    wanted = list(METHODS) if "all" in names else list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in METHODS]:
        near = difflib.get_close_matches(unknown[0], METHODS, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, or all, got {unknown[0]}{hint}")
    return [METHODS[name] for name in wanted]


def _hash(model: Model | None) -> str:
    return "" if model is None else weights_hash(*model.modules())


def _tones(pairs: Sequence[tuple[Method, Model | None]]) -> ToneHistogram | None:
    """Of the first generator that is asked: what it never drew it cannot answer."""
    for _, model in pairs:
        if model is not None and not isinstance(
            model.architecture, SuperResolutionArchitecture | FlowArchitecture
        ):
            rng = torch.Generator().manual_seed(1)
            return tone_histogram(sample(model.generator, TONES if model.size <= 64 else 16, rng, batch=32))
    return None


@dataclass(frozen=True)
class _Job:
    """What every photo is met with."""

    wanted: SheetSettings
    painters: MethodRunner
    finder: Callable[[], Detector]
    tones: ToneHistogram | None
    bars: ProgressBars
    say: Callable[[str], None]

    def sheets(
        self, photos: Sequence[Path], place: Callable[[Path, int], Path]
    ) -> Iterator[tuple[Path, tuple[SheetRecord, ...] | SkippedPhoto]]:
        """Each photo with its result, told as it comes."""
        for path, result in run_pipeline(
            photos, place, self.wanted, self.painters, self.finder, self.tones, self.bars
        ):
            yield path, result
            if not isinstance(result, SkippedPhoto):
                for made in result:
                    self.say("\n".join(sanitize_text(line, LONGEST) for line in _told(made, self.wanted)))


def _aloud(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _one(job: _Job, photo: Path, out: Path | None) -> list[dict[str, Any]]:
    """Every person of one photo; why there is none is an error."""
    target = out or Path(f"{photo.stem}-faces.png")
    check_sheet(target, photo)

    def place(_: Path, person: int) -> Path:
        return target if person == 1 else target.with_name(f"{target.stem}-{person}{target.suffix}")

    found = []
    for _, result in job.sheets([photo], place):
        if isinstance(result, SkippedPhoto):
            raise LibraryError(f"{photo}: {result.reason}")
        found += [{"photo": str(photo), **made.plain()} for made in result]
    return found


def _folder(job: _Job, photos: Path, out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every photo of a folder that has no sheet yet; photos without a face are counted and named."""
    pictures = images_in(photos)
    sheets = SheetFolder(out, photos, settings)
    left = sheets.left(pictures)
    if len(left) < len(pictures):
        job.say(f"{len(pictures) - len(left)} of {len(pictures)} photos were done before")
    for path, result in job.sheets(left, sheets.place):
        sheets.keep(path, result)
        if isinstance(result, SkippedPhoto):
            job.say(sanitize_text(f"{result.photo}: left out: {result.reason}", LONGEST))
    without = sum("left_out" in entry for entry in sheets.found)
    made = sum(len(entry.get("sheets", ())) for entry in sheets.found)
    job.say(f"{len(pictures)} photos, {made} sheets in {out}, {without} left out")
    return list(sheets.found)


def _told(made: SheetRecord, wanted: SheetSettings) -> list[str]:
    """What was found in a photo, and each method's answer, in a line each."""
    lines = []
    if made.people == 0:
        lines.append(f"{made.photo}: taken whole as a face, {made.side:.0f} pixels a side")
        shown = made.portrait.shown.low.shape[-1]
        if made.side > shown and wanted.size % int(made.side) == 0:
            factor = wanted.size // int(made.side)
            lines.append(
                f"  shrunk once more, to {shown}; --factor {factor} takes its own pixels as they are"
            )
    else:
        more = f"person {made.person} of {made.people}" if made.people > 1 else "one face"
        turned = f", found with the photo turned by {made.turned} degrees" if made.turned else ""
        lines.append(f"{made.photo}: {more}{turned}")
    if made.person == 1 and made.people > wanted.max_faces:
        lines.append(
            f"  {made.people} faces in the photo, the largest taken; --max-faces {made.people} takes all"
        )
    if made.side < made.portrait.shown.low.shape[-1]:
        lines.append(
            f"  the face is only {made.side:.0f} pixels wide: less than what is shown was ever there"
        )
    lines += [f"  {describe_output(answer)}" for answer in made.portrait.answers]
    if not any(bool(answer.made.converged.any()) for answer in made.portrait.answers):
        lines.append(f"  {NEAREST}")
    return [*lines, f"  open {made.sheet}"]
