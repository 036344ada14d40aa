"""What `fedface upsample` does with each photo: choose methods, run them, write sheets, describe the results."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedface.audits.bias import ToneHistogram, tone_histogram
from fedface.cli.console import ProgressBars
from fedface.cli.options import Downscale
from fedface.errors import ConfigError, LibraryError
from fedface.inference.contact_sheet import NEAREST, MethodRunner, describe_output
from fedface.inference.pipeline import (
    SheetFolder,
    SheetRecord,
    SheetSettings,
    SkippedPhoto,
    check_sheet,
    images_in,
    run_pipeline,
)
from fedface.models.generator_protocol import sample
from fedface.models.model import FlowArchitecture, Model, SuperResolutionArchitecture
from fedface.photos.face_alignment import Detector
from fedface.photos.photo_files import describe_skipped
from fedface.platforms import usable_cores
from fedface.upsampling.degradation import Area, Bicubic, BicubicPulse, Degradation
from fedface.upsampling.methods import METHODS, Method, default_method
from fedface.upsampling.pulse import PulseConfig

TONE_SAMPLES = 1000  # whose skin tones a sheet shows; fewer for generators above 64 pixels


def make_degradation(kind: Downscale, factor: int, size: int) -> Degradation:
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


def available_cores() -> int:
    """How many processors this process may use, 8 at most."""
    return min(8, usable_cores())


def choose_methods(names: list[str] | None, given: Model | None) -> list[Method]:
    """The methods of `--method`, or the one that goes with a checkpoint; raises ConfigError for an unknown name."""
    if not names:
        return [PulseConfig() if given is None else default_method(given)]
    if unknown := [name for name in names if name not in (*METHODS, "all")]:
        near = difflib.get_close_matches(unknown[0], METHODS, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, or all, got {unknown[0]}{hint}")
    return [METHODS[name] for name in (METHODS if "all" in names else dict.fromkeys(names))]


def generator_tones(pairs: Sequence[tuple[Method, Model | None]]) -> ToneHistogram | None:
    """Skin tones of samples of the first generator: it cannot generate what its samples never show."""
    for _, model in pairs:
        if model is not None and not isinstance(
            model.architecture, SuperResolutionArchitecture | FlowArchitecture
        ):
            rng = torch.Generator().manual_seed(1)
            return tone_histogram(
                sample(model.generator, TONE_SAMPLES if model.size <= 64 else 16, rng, batch=32)
            )
    return None


@dataclass(frozen=True, kw_only=True)
class SheetJob:
    settings: SheetSettings
    runner: MethodRunner
    detector: Callable[[], Detector]
    tones: ToneHistogram | None
    bars: ProgressBars
    describe: Callable[[str], None]  # prints a line of what came of a photo

    def sheets(
        self, photos: Sequence[Path], place: Callable[[Path, int], Path]
    ) -> Iterator[tuple[Path, tuple[SheetRecord, ...] | SkippedPhoto]]:
        """Each photo with its result, described as soon as it is there."""
        for path, result in run_pipeline(
            photos, place, self.settings, self.runner, self.detector, self.tones, self.bars
        ):
            yield path, result
            if not isinstance(result, SkippedPhoto):
                for sheet in result:
                    for line in _description(sheet, self.settings):
                        self.describe(line)


def upsample_photo(job: SheetJob, photo: Path, out: Path | None) -> list[dict[str, Any]]:
    """A sheet for each face of one photo.

    Raises:
        LibraryError: The photo has no usable face.
    """
    target = out or Path(f"{photo.stem}-faces.png")
    check_sheet(target, photo)

    def place(_: Path, person: int) -> Path:
        return target if person == 1 else target.with_name(f"{target.stem}-{person}{target.suffix}")

    found = []
    for _, result in job.sheets([photo], place):
        if isinstance(result, SkippedPhoto):
            raise LibraryError(f"{photo}: {result.reason}")
        found += [{"photo": str(photo), **sheet.plain()} for sheet in result]
    return found


def upsample_folder(job: SheetJob, photos: Path, out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Sheets for the photos of a folder that have none yet; photos without a face are named and counted."""
    pictures, skipped = images_in(photos)
    sheets = SheetFolder(out, photos, settings)
    pending = sheets.pending(pictures)
    if len(pending) < len(pictures):
        job.describe(f"{len(pictures) - len(pending)} of {len(pictures)} photos already have their sheets")
    for path, result in job.sheets(pending, sheets.place):
        sheets.store(path, result)
        if isinstance(result, SkippedPhoto):
            job.describe(f"{result.photo}: skipped: {result.reason}")
    without = sum("skipped" in entry for entry in sheets.found)
    made = sum(len(entry.get("sheets", ())) for entry in sheets.found)
    job.describe(f"{len(pictures)} photos, {made} sheets in {out}, {without} skipped")
    if skipped:
        job.describe(f"skipped: {describe_skipped(skipped)}")
    return list(sheets.found)


def _description(sheet: SheetRecord, settings: SheetSettings) -> list[str]:
    """What was found in a photo, and one line per method."""
    lines = []
    low_side = sheet.content.shown.low.shape[-1]
    if sheet.people == 0:
        lines.append(f"{sheet.photo}: used whole as a face, {sheet.side:.0f} pixels a side")
        if sheet.side > low_side and settings.size % int(sheet.side) == 0:
            factor = settings.size // int(sheet.side)
            lines.append(
                f"  shrunk once more, to {low_side}; --factor {factor} uses its own pixels unchanged"
            )
    else:
        which = f"face {sheet.person} of {sheet.people}" if sheet.people > 1 else "one face"
        turned = f", found with the photo rotated by {sheet.rotation} degrees" if sheet.rotation else ""
        lines.append(f"{sheet.photo}: {which}{turned}")
    if sheet.person == 1 and sheet.people > settings.max_faces:
        lines.append(
            f"  {sheet.people} faces in the photo, used the largest; --max-faces {sheet.people} uses all"
        )
    if sheet.side < low_side:
        lines.append(
            f"  the face is only {sheet.side:.0f} pixels wide, fewer than the {low_side} of the input shown"
        )
    lines += [f"  {describe_output(output)}" for output in sheet.content.outputs]
    if not any(bool(output.upsampled.converged.any()) for output in sheet.content.outputs):
        lines.append(f"  {NEAREST}")
    return [*lines, f"  open {sheet.sheet}"]
