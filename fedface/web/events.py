"""Events of a search for the page: faces that changed, and the result.

Encoding images takes time, so `app` calls these in threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fedface.photos.skin_tone import measure_tone
from fedface.reports.charts import face_grid, pixels_of
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.upsampler import pixel_std
from fedface.web.background_job import BackgroundSearch, Failed, Finished, Stopped
from fedface.web.image_encoding import data_uri, shown, spread_record

TONE = (
    "Tone is the skin tone estimated from the picture, on the Monk scale from 1 (light) to 10 (dark); it includes "
    "light and camera."
)
CONSISTENCY_ERROR = "Error is the mean squared difference between the degraded face and the given pixels."
NOT_REAL = "These people do not exist; the pixels do not determine which face is right."


@dataclass(frozen=True, kw_only=True)
class ResultContext:
    """The properties of a request that its result's description depends on."""

    several: bool  # the method can generate several faces
    face: bool  # the input is a face, so it has a skin tone


def progress_event(search: BackgroundSearch) -> dict[str, Any] | None:
    """The faces that changed since the last event; None if none did."""
    news = search.progress()
    if not news.faces and not news.share:
        return None
    return {
        "share": news.share,
        "step": news.step,
        "steps": news.steps,
        "faces": [
            {
                "number": face.number,
                "picture": data_uri(pixels_of(face.picture)),
                "consistency_error": _finite(face.consistency_error),
            }
            for face in news.faces
        ],
    }


def final_event(search: BackgroundSearch, context: ResultContext) -> tuple[str, dict[str, Any]]:
    """The name and content of the last event."""
    match search.outcome:
        case Finished() as finished:
            return "end", _result_record(search, finished, context)
        case Failed(sentence):
            return "failed", {"error": sentence}
        case Stopped() | None:
            return "stopped", {}


def sheet_of(search: BackgroundSearch) -> bytes | None:
    """The faces of a finished search as one PNG; None if it is not finished."""
    if not isinstance(search.outcome, Finished):
        return None
    upsampled = search.outcome.upsampled
    faces, side = upsampled.images[0].clamp(0, 1), search.low.shape[-1]
    size = (faces.shape[-1], faces.shape[-1])
    given = F.interpolate(search.low, size=size, mode="nearest")
    columns = ["photo", f"{side} x {side}\ninput"]
    for number, (consistency_error, fits) in enumerate(
        zip(upsampled.consistency_error[0].tolist(), upsampled.converged[0].tolist(), strict=True)
    ):
        columns.append(f"face {number + 1}{'' if fits else ', no fit'}\nerror {consistency_error:.4f}")
    shrink = BicubicPulse(size[0] // side).apply
    above = [search.truth, given, faces]
    below = [shrink(search.truth), search.low, shrink(faces)]
    if len(faces) > 1:
        columns.append("where they\ndiffer")
        apart = pixel_std(faces)
        brightest = float(apart.max()) or 1.0
        above.append(apart.expand(1, 3, *size) / brightest)
        below.append(pixel_std(below[2]).expand(1, 3, side, side) / brightest)
    rows = [
        ("photo and\nfaces found", torch.cat(above)),
        (f"downscaled to\n{side} x {side}", torch.cat(below)),
    ]
    return face_grid(rows, columns)


def _result_record(search: BackgroundSearch, finished: Finished, context: ResultContext) -> dict[str, Any]:
    upsampled = finished.upsampled
    images = upsampled.images[0].clamp(0, 1)
    side = search.low.shape[-1]
    shrunk = BicubicPulse(images.shape[-1] // side).apply(images)
    tones = measure_tone(images).monk.tolist()
    consistency_errors, fits = upsampled.consistency_error[0].tolist(), upsampled.converged[0].tolist()
    faces = [
        {
            "number": number,
            "picture": data_uri(pixels_of(picture)),
            "shrunk": data_uri(pixels_of(shrunk[number])),
            "consistency_error": _finite(consistency_errors[number]),
            "fits": fits[number],
            "tone": round(tones[number], 1) if context.face else None,
        }
        for number, picture in enumerate(shown(images))
    ]
    return {
        "faces": faces,
        "spread": spread_record(images) if context.several and len(images) > 1 else None,
        "tone": round(float(measure_tone(search.truth).monk[0]), 1) if context.face else None,
        "seconds": round(finished.seconds, 1),
        "steps": upsampled.steps,
        "sentences": _sentences(context, side, images.shape[-1], fits),
    }


def _sentences(context: ResultContext, side: int, size: int, fits: list[bool]) -> list[str]:
    """The result in plain sentences, the most important one first."""
    numbers = f"{side} × {side} pixels are {3 * side * side} numbers; a face here has {3 * size * size}"
    terms = [TONE, CONSISTENCY_ERROR] if context.face else [CONSISTENCY_ERROR]
    if not context.several:
        agrees = (
            "Downscaled, it gives the same pixels, as many other faces would."
            if fits[0]
            else "Downscaled, it does not even give the same pixels."
        )
        return [
            NOT_REAL,
            f"This method gives one face, although others are possible. {agrees}",
            f"{numbers}. The rest comes from the images that the method was trained on, if any.",
            " ".join(terms),
        ]
    fitting = sum(fits)
    if fitting == len(fits) > 1:
        found = f"All {fitting} faces match the same pixels: nothing in the photo favours one of them."
    elif fitting:
        found = f"{fitting} of {len(fits)} faces give the same pixels when downscaled; the others are close."
    else:
        found = (
            "No face gives exactly the same pixels when downscaled: the generator cannot generate one, and the closest "
            "are shown."
        )
    return [
        NOT_REAL,
        found,
        f"{numbers}. The rest comes from the generator's training data and looks like it: this is how a photo of a "
        "dark-skinned person can become light-skinned.",
        " ".join(terms),
    ]


def _finite(consistency_error: float) -> float | None:
    return consistency_error if math.isfinite(consistency_error) else None
