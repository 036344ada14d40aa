"""A contact sheet for one photo: several generated faces that all match the same pixelated input.

`MethodRunner` runs each method; `contact_sheet` lays out the low-resolution input, the faces with their downscaled
versions, their standard deviation pixel by pixel, and the skin tones that the generator produces, because a method
cannot find faces that its generator cannot generate.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn import functional

from fedface.audits.bias import ToneHistogram
from fedface.models.model import Model
from fedface.photos.face_crops import FaceCrop
from fedface.photos.image_io import SOFTWARE
from fedface.photos.skin_tone import MONK_SWATCHES, measure_tone
from fedface.randomness import Streams
from fedface.reports.charts import STYLE, figure_png, pixels_of
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import Degradation, apply_degradation, format_degradation
from fedface.upsampling.methods import Method, is_deterministic, make_upsampler, title_of
from fedface.upsampling.upsampler import Progress, Upsampled, Upsampler, pixel_std

NO_FACE = "The generated people do not exist; the pixels do not determine which face is right."
NEAREST = "No method found a face that fits; the closest are shown."

_SIDE, _SMALL, _GAP, _LEFT = 124, 44, 10, 164  # pixels of the sheet
_CELL, _ROW = _SIDE + _GAP, _SIDE + _SMALL + 30


@dataclass(frozen=True, kw_only=True)
class DegradedFace:
    """A face and its low-resolution version, the input of the methods."""

    face: FaceCrop
    truth: Images  # (1, 3, size, size): the aligned face, or a small picture enlarged
    low: LowImages  # (1, 3, side, side) in [0, 1]
    degradation: Degradation


@dataclass(frozen=True, kw_only=True)
class MethodOutput:
    """The result of one method."""

    method: Method
    upsampled: Upsampled  # of one photo
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ContactSheet:
    """A face, its low-resolution version, and every method's output."""

    shown: DegradedFace
    outputs: tuple[MethodOutput, ...]


def show(face: FaceCrop, degradation: Degradation, *, size: int, seed: int = 0) -> DegradedFace:
    """Degrade a face; a picture that already has the low resolution is used unchanged.

    Raises:
        ValueError: The degradation does not support faces of `size` pixels.
    """
    crop = torch.from_numpy(face.crop.copy()).permute(2, 0, 1)[None].float() / 255.0
    own, low_side = crop.shape[-1], degradation.low_side(size)
    truth = crop
    if own != size:
        truth = functional.interpolate(crop, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    if face.already_small and own == low_side:
        low = crop
    else:
        low = apply_degradation(degradation, truth, Streams(seed).generator("camera"))
    return DegradedFace(face=face, truth=truth, low=low, degradation=degradation)


class MethodRunner:
    """Methods with their weights, prepared once for many photos; the output depends on the photo, not on the order."""

    def __init__(
        self,
        methods: Sequence[tuple[Method, Model | None]],
        degradation: Degradation,
        *,
        size: int,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        """Prepare every method.

        Args:
            methods: Each with the checkpoint that it needs, see `upsampling.methods.pair_with_models`.
            degradation: The degradation of the inputs.
            size: Side of the faces in pixels.
            progress: Called with steps done and steps in all of one photo, a thousand for each method.

        Raises:
            ConfigError: A method does not support its checkpoint or this downscale.
        """
        self._prepared: list[tuple[Method, Upsampler]] = []
        for number, (method, model) in enumerate(methods):

            def on_step(done: int, of: int, number: int = number) -> None:
                if progress is not None:
                    progress(1000 * number + round(1000 * done / max(1, of)), 1000 * len(methods))

            upsampler = make_upsampler(method, model, degradation, Streams(seed), size=size, progress=on_step)
            self._prepared.append((method, upsampler))

    def run(self, shown: DegradedFace, *, faces: int) -> ContactSheet:
        """Run every method, with `faces` (>= 1) faces from those that can generate several."""
        outputs = []
        for method, upsampler in self._prepared:
            started = time.perf_counter()
            generated = upsampler.upsample(
                shown.low, faces_per_photo=1 if is_deterministic(method) else faces
            )
            outputs.append(
                MethodOutput(method=method, upsampled=generated, seconds=time.perf_counter() - started)
            )
        return ContactSheet(shown=shown, outputs=tuple(outputs))


def describe_output(output: MethodOutput) -> str:
    """One line about a method's output: how many faces fit, and how well."""
    consistency_error, fits = output.upsampled.consistency_error[0], output.upsampled.converged[0]
    best = f"smallest consistency error {float(consistency_error.min()):.5f}"
    if is_deterministic(output.method):
        return f"{title_of(output.method)}: one face, {'fits' if bool(fits[0]) else 'does not fit'}, {best}"
    return f"{title_of(output.method)}: {int(fits.sum())} of {len(fits)} faces fit, {best}"


def contact_sheet(
    content: ContactSheet, tones: ToneHistogram | None = None, *, software: str = SOFTWARE
) -> bytes:
    """The sheet as PNG on white.

    Args:
        content: At least one method's output.
        tones: Skin tones of the generator's samples; None if no generator was used.
        software: The PNG entry by which the file is known as ours.
    """
    shown = content.shown
    several = [output for output in content.outputs if not is_deterministic(output.method)]
    single = [output for output in content.outputs if is_deterministic(output.method)]
    columns = max(5, len(single), *(output.upsampled.faces_per_photo + 1 for output in several), 0)
    width, top = _LEFT + columns * _CELL + 16, 46 + _SIDE + 54
    height = top + (len(several) + bool(single)) * _ROW + 16 * bool(single) + 64
    with matplotlib.rc_context({**STYLE, "font.size": 9.0}):
        sheet = _Sheet(width, height)
        side, own = shown.low.shape[-1], measure_tone(shown.truth)
        sheet.text(_LEFT, 10, f"the photo's face\nMonk {float(own.monk[0]):.1f}")
        sheet.picture(_LEFT, 46, _SIDE, shown.truth[0])
        text = "\n".join(textwrap.wrap(format_degradation(shown.degradation), 24))
        sheet.text(_LEFT + _CELL, 10, f"input:\n{side} x {side} pixels")
        sheet.picture(_LEFT + _CELL, 46, _SIDE, shown.low[0])
        sheet.text(_LEFT + _CELL, 46 + _SIDE + 6, text, small=True)
        if tones is not None:
            generated = torch.cat(
                [measure_tone(output.upsampled.images[0]).monk for output in content.outputs]
            )
            sheet.tones(_LEFT + 2 * _CELL + 56, 46, width - 24, _SIDE, tones, own.monk, generated)
        for number, output in enumerate(several):
            _row(sheet, top + number * _ROW, output, shown.degradation)
        if single:
            _single_row(sheet, top + len(several) * _ROW, single, shown.degradation)
        fits = any(bool(output.upsampled.converged.any()) for output in content.outputs)
        sheet.text(16, height - 44, NO_FACE if fits else f"{NEAREST} {NO_FACE}", bold=True)
        return sheet.png(software)


def _row(sheet: _Sheet, y: int, output: MethodOutput, degradation: Degradation) -> None:
    """One method: its faces, each downscaled, and their standard deviation."""
    generated = output.upsampled
    title, _, rest = title_of(output.method).partition(" from ")
    lines = [f"from {rest}"] if rest else []
    lines += [
        f"{int(generated.converged[0].sum())} of {generated.faces_per_photo} fit",
        f"{output.seconds:.2g} s",
    ]
    sheet.text(16, y + 8, title, bold=True)
    sheet.text(16, y + 28, "\n".join(lines), small=True)
    for number in range(generated.faces_per_photo):
        _face(sheet, _LEFT + number * _CELL, y, output, number, degradation)
    x, spread = _LEFT + generated.faces_per_photo * _CELL, pixel_std(generated.images[0])
    sheet.heat(x, y, spread)
    mean, most = 100 * float(spread.mean()), 100 * float(spread.max())
    text = f"where they differ: {mean:.0f} %\non average, bright: {most:.0f} %"
    sheet.text(x, y + _SIDE + 8, text, small=True)


def _single_row(sheet: _Sheet, y: int, outputs: Sequence[MethodOutput], degradation: Degradation) -> None:
    """Methods that give one face, side by side."""
    sheet.text(16, y + 24, "one face each,", bold=True)
    sheet.text(16, y + 44, "although many faces\nwould fit", small=True)
    for number, output in enumerate(outputs):
        sheet.text(_LEFT + number * _CELL, y, title_of(output.method), bold=True)
        _face(sheet, _LEFT + number * _CELL, y + 18, output, 0, degradation)


def _face(sheet: _Sheet, x: int, y: int, output: MethodOutput, number: int, degradation: Degradation) -> None:
    """One face, its downscaled version, and whether that matches the input."""
    upsampled = output.upsampled
    face, error = upsampled.images[0, number], float(upsampled.consistency_error[0, number])
    sheet.picture(x, y, _SIDE, face)
    sheet.picture(x, y + _SIDE + 4, _SMALL, degradation.apply(face[None])[0].clamp(0, 1))
    verdict = "fits" if bool(upsampled.converged[0, number]) else "no fit"
    sheet.text(x + _SMALL + 6, y + _SIDE + 8, f"{verdict}\nerror {error:.5f}", small=True)


class _Sheet:
    """A white canvas, sizes in pixels; y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._canvas = Canvas(figsize=(width / 100, height / 100), dpi=100, facecolor="white")

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self._canvas.add_axes(box)

    def picture(self, x: int, y: int, side: int, face: Tensor) -> None:
        axes = self._axes(x, y, side, side)
        axes.imshow(pixels_of(face), interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def heat(self, x: int, y: int, spread: Tensor) -> None:
        axes = self._axes(x, y, _SIDE, _SIDE)
        most = max(0.01, float(spread.max()))
        axes.imshow(spread.numpy(), cmap="magma", vmin=0.0, vmax=most, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, *, small: bool = False, bold: bool = False) -> None:
        self._canvas.text(
            x / self.width,
            1 - y / self.height,
            text,
            va="top",
            fontsize=8.0 if small else 9.5,
            fontweight="bold" if bold else "normal",
            linespacing=1.3,
        )

    def tones(
        self, left: int, y: int, right: int, height: int, tones: ToneHistogram, own: Tensor, generated: Tensor
    ) -> None:
        """Histogram of the generator's skin tones, with the photo's and the outputs' tones above."""
        axes = self._axes(left, y, right - left, height)
        steps = np.arange(1, 11)
        shares = 100.0 * np.asarray(tones.counts) / tones.count
        axes.bar(steps, shares, 0.86, color=MONK_SWATCHES.numpy(), edgecolor="#3b3f46", linewidth=0.6)
        most = 1.5 * max(shares)
        axes.set_ylim(0, most)
        axes.plot(generated, np.full(len(generated), 0.80 * most), "|", color="#0072b2", markersize=9)
        axes.plot(own, [0.93 * most], "v", color="#d55e00", markersize=7)
        axes.set_xticks(steps)
        axes.set_xlim(0.4, 10.6)
        axes.set_xlabel("Monk scale, estimated from pixels")
        axes.set_ylabel("share, %")
        axes.grid(axis="x", visible=False)
        self.text(left - 36, y - 36, f"skin tones of the generator's samples (n = {tones.count});")
        self.text(left - 36, y - 20, "above: the photo (orange), the outputs (blue)", small=True)

    def png(self, software: str) -> bytes:
        return figure_png(self._canvas, software)
