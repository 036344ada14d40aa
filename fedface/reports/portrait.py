"""One photo -> one picture that shows how little a pixelated face says: several faces, all equally right.

Called by `fedface upsample` and the local page. `Painters` asks each method for faces; `portrait_sheet` lays them out:
what was shown, the faces with what they shrink to, how far they differ pixel by pixel, and beside them the skin tones
that the generator has learned to draw, because what it never saw it cannot answer.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn import functional

from fedface.audits.bias import ToneHistogram
from fedface.models.family import Model
from fedface.photos.subjects import Subject
from fedface.photos.tone import MONK_SWATCHES, measure_tone
from fedface.randomness import Streams
from fedface.reports.figures import STYLE, pixels_of
from fedface.shapes import Images, LowImages
from fedface.upsampling.contracts import Progress, Upsampled, Upsampler
from fedface.upsampling.degrade import Degradation, in_words, measure
from fedface.upsampling.methods import Method, has_one_answer, make_upsampler, title_of

NOBODY = (
    "These people do not exist. The pixels do not say which face is right: all that fit are equally possible."
)

_SIDE, _SMALL, _GAP, _LEFT = 116, 44, 8, 150  # pixels of the sheet


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A face and what of it is shown to the methods."""

    subject: Subject
    truth: Images  # (1, 3, size, size): the aligned face, or a small picture enlarged
    low: LowImages  # (1, 3, side, side) in [0, 1]
    degradation: Degradation


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one method made of it."""

    method: Method
    made: Upsampled  # of one photo
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """A face, what was shown, and every method's answer."""

    shown: Shown
    answers: tuple[Answer, ...]


def show(subject: Subject, degradation: Degradation, *, size: int, seed: int = 0) -> Shown:
    """Shrink a face as a camera would; a picture that is as small as that already is taken as it is.

    Raises:
        ValueError: The degradation does not go with faces of `size` pixels.
    """
    crop = torch.from_numpy(subject.crop.copy()).permute(2, 0, 1)[None].float() / 255.0
    own, low_side = crop.shape[-1], degradation.low_side(size)
    truth = crop
    if own != size:
        truth = functional.interpolate(crop, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    if subject.already_small and own == low_side:
        low = crop
    else:
        low = measure(degradation, truth, Streams(seed).generator("camera"))
    return Shown(subject=subject, truth=truth, low=low, degradation=degradation)


class Painters:
    """Methods with their weights, prepared once for many photos; equal photos get equal answers, in any order."""

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
            methods: Each with the checkpoint that it needs, see `upsampling.methods.with_models`.
            degradation: What the photos have gone through.
            size: Side of the faces in pixels.
            seed: Of starts and draws.
            progress: Called with steps done and steps in all of one photo, a thousand for each method.

        Raises:
            ConfigError: A method does not go with its checkpoint or with this downscale.
        """
        self._prepared: list[tuple[Method, Upsampler]] = []
        for number, (method, model) in enumerate(methods):

            def tell(done: int, of: int, number: int = number) -> None:
                if progress is not None:
                    progress(1000 * number + round(1000 * done / max(1, of)), 1000 * len(methods))

            upsampler = make_upsampler(method, model, degradation, Streams(seed), size=size, progress=tell)
            self._prepared.append((method, upsampler))

    def portray(self, shown: Shown, *, faces: int) -> Portrait:
        """Ask every method, those that have more than one answer for `faces` (>= 1) of them."""
        answers = []
        for method, upsampler in self._prepared:
            started = time.perf_counter()
            made = upsampler.upsample(shown.low, faces_per_photo=1 if has_one_answer(method) else faces)
            answers.append(Answer(method=method, made=made, seconds=time.perf_counter() - started))
        return Portrait(shown=shown, answers=tuple(answers))


def spread_of(faces: Images) -> Tensor:
    """How far faces (f, 3, s, s) differ: standard deviation at each pixel, mean over colours, (s, s)."""
    return faces.clamp(0, 1).std(dim=0, correction=0).mean(dim=0)


def answer_words(answer: Answer) -> str:
    """One line about a method's answer: how many faces fit, and how well."""
    misfit, fits = answer.made.misfit[0], answer.made.converged[0]
    best = f"smallest misfit {float(misfit.min()):.5f}"
    if has_one_answer(answer.method):
        return f"{title_of(answer.method)}: one answer, {'fits' if bool(fits[0]) else 'does not fit'}, {best}"
    return f"{title_of(answer.method)}: {int(fits.sum())} of {len(fits)} faces fit, {best}"


def portrait_sheet(portrait: Portrait, tones: ToneHistogram | None = None, *, source: str = "") -> bytes:
    """The picture of a portrait, PNG on white.

    Args:
        portrait: At least one answer.
        tones: Skin tones of what the generator draws; left out where no generator was asked.
        source: Where the photo comes from, for the last line.
    """
    shown, answers = portrait.shown, portrait.answers
    columns = max(3, max(answer.made.faces_per_photo for answer in answers) + 1)
    cell, row = _SIDE + _GAP, _SIDE + _SMALL + 52
    width, top = _LEFT + columns * cell + 16, 34 + _SIDE + 44
    height = top + len(answers) * row + 56
    with matplotlib.rc_context({**STYLE, "font.size": 9.0}):
        sheet = _Sheet(width, height)
        side, own = shown.low.shape[-1], measure_tone(shown.truth)
        sheet.words(_LEFT, 10, f"the photo's face (Monk {float(own.monk[0]):.1f})")
        sheet.picture(_LEFT, 30, _SIDE, shown.truth[0])
        sheet.words(_LEFT + cell, 10, f"what is shown: {side} x {side} pixels")
        sheet.picture(_LEFT + cell, 30, _SIDE, shown.low[0])
        sheet.words(_LEFT + cell, 30 + _SIDE + 4, in_words(shown.degradation), small=True)
        if tones is not None:
            readings = [measure_tone(answer.made.images[0]).monk for answer in answers]
            sheet.tones(_LEFT + 2 * cell + 40, 30, width - 24, _SIDE, tones, own.monk, torch.cat(readings))
        for number, answer in enumerate(answers):
            _row(sheet, top + number * row, cell, answer, shown.degradation)
        sheet.words(16, height - 40, NOBODY, bold=True)
        if source:
            sheet.words(16, height - 20, source, small=True)
        return sheet.png()


def _row(sheet: _Sheet, y: int, cell: int, answer: Answer, degradation: Degradation) -> None:
    """One method: its faces, what each shrinks to, and how far they differ."""
    made = answer.made
    faces = made.images[0]
    title, _, rest = title_of(answer.method).partition(" from ")
    sheet.words(16, y + 8, title, bold=True)
    lines = [f"from {rest}"] if rest else []
    lines += [f"{int(made.converged[0].sum())} of {len(faces)} fit", f"{answer.seconds:.2g} s"]
    sheet.words(16, y + 28, "\n".join(lines), small=True)
    low = degradation.apply(faces).clamp(0, 1)
    for i, (misfit, fits) in enumerate(zip(made.misfit[0].tolist(), made.converged[0].tolist(), strict=True)):
        x = _LEFT + i * cell
        sheet.picture(x, y, _SIDE, faces[i])
        sheet.picture(x, y + _SIDE + 4, _SMALL, low[i])
        verdict = f"{'fits' if fits else 'no fit'}\nmisfit {misfit:.4f}"
        sheet.words(x + _SMALL + 6, y + _SIDE + 8, verdict, small=True)
    x = _LEFT + len(faces) * cell
    if has_one_answer(answer.method):
        sheet.words(x + 4, y + 8, "it has one answer,\nwhatever else would fit", small=True)
    else:
        spread = spread_of(faces)
        sheet.heat(x, y, _SIDE, spread)
        sheet.words(
            x, y + _SIDE + 8, f"where they differ,\n{100 * float(spread.mean()):.0f} % on average", small=True
        )


class _Sheet:
    """A white picture of so many pixels; y grows downwards."""

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

    def heat(self, x: int, y: int, side: int, spread: Tensor) -> None:
        axes = self._axes(x, y, side, side)
        axes.imshow(spread.numpy(), cmap="magma", vmin=0.0, vmax=0.3, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def words(self, x: float, y: float, text: str, *, small: bool = False, bold: bool = False) -> None:
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
        self, left: int, y: int, right: int, height: int, tones: ToneHistogram, own: Tensor, made: Tensor
    ) -> None:
        """What the generator draws, tone by tone, with the photo's own and the answers' readings above."""
        axes = self._axes(left, y, right - left, height)
        steps = np.arange(1, 11)
        shares = 100.0 * np.asarray(tones.counts) / tones.count
        axes.bar(steps, shares, 0.86, color=MONK_SWATCHES.numpy(), edgecolor="#3b3f46", linewidth=0.6)
        most = 1.5 * max(shares)
        axes.set_ylim(0, most)
        axes.plot(made, np.full(len(made), 0.80 * most), "|", color="#0072b2", markersize=9)
        axes.plot(own, [0.93 * most], "v", color="#d55e00", markersize=7)
        axes.set_xticks(steps)
        axes.set_xlim(0.4, 10.6)
        axes.set_xlabel("Monk scale, read from pixels")
        axes.set_ylabel("share, %")
        axes.grid(axis="x", visible=False)
        self.words(left - 30, y - 20, f"skin tones that this generator draws (n = {tones.count})")
        self.words(left + 6, y + 4, "the photo (orange), the answers (blue)", small=True)

    def png(self) -> bytes:
        target = io.BytesIO()
        FigureCanvasAgg(self._canvas)
        self._canvas.savefig(target, format="png", metadata={"Software": None})
        return target.getvalue()
