"""Contact sheets and descriptions of checkpoints, for the commands `fedface weights ...`."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.nn import functional

from fedface.audits.bias import ToneHistogram, tone_histogram
from fedface.errors import ConfigError
from fedface.importing.import_weights import ImportedModel
from fedface.models.generator_protocol import Generator, sample
from fedface.models.model_summary import ModelSummary, format_summary
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2
from fedface.reports.charts import face_grid
from fedface.tensor_types import Images
from fedface.text import sanitize_text

MAX_SIDE = 256  # pixels a side of one face on a sheet


def sheet_of(generator: Any, *, count: int, psis: tuple[float, ...], seed: int, label: int | None) -> bytes:
    """A PNG with one row per truncation and one column per latent.

    Raises:
        ConfigError: The label is not one of the generator's classes.
    """
    classes = generator.config.classes if isinstance(generator, StyleGAN2) else 0
    if label is not None and not classes:
        raise ConfigError("this generator has no classes; omit --label")
    rows = []
    for shown in range(min(classes, 3)) if classes and label is None else (label,):
        of: Generator = generator if shown is None else ClassConditioned(generator, shown)
        for psi in psis:
            named = f"psi {psi:g}" if shown is None else f"class {shown}, psi {psi:g}"
            rows.append((named, _faces(of, count, psi, seed)))
    return face_grid(rows, [""] * count, side=max(96, min(MAX_SIDE, generator.size)))


def count_tones(generator: Generator, count: int, seed: int) -> ToneHistogram:
    """The skin tones of samples, by Monk step."""
    return tone_histogram(sample(generator, count, torch.Generator().manual_seed(seed), batch=32))


def _faces(generator: Generator, count: int, psi: float, seed: int) -> Images:
    """Samples, shrunk batch by batch; the same latents for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    step = 64 if generator.size <= MAX_SIDE else 2
    parts = []
    for first in range(0, count, step):
        images = sample(generator, min(step, count - first), rng, psi=psi, batch=16)
        parts.append(functional.avg_pool2d(images, max(1, generator.size // MAX_SIDE)))
    return torch.cat(parts)


def describe_import(found: ImportedModel, facts: ModelSummary) -> list[str]:
    lines = [f"found: {found.kind}", *describe_model(facts)]
    if found.discriminator is None:
        lines.append("discriminator: none")
    if found.ignored:
        more = f" and {len(found.ignored) - 20:,} more" if len(found.ignored) > 20 else ""
        lines.append(f"ignored: {', '.join(found.ignored[:20])}{more}")
    remarks = found.notes.get("remarks")
    # Notes may come from another author.
    return lines + [f"note: {shorten(remark)}" for remark in (remarks if isinstance(remarks, list) else ())]


def describe_model(facts: ModelSummary) -> list[str]:
    size = f"{facts.size} x {facts.size} pixels"
    return [f"{facts.family}, {size}", *map(format_summary, facts.networks), f"hash: {facts.hash}"]


def shorten(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return sanitize_text(text, 200) + (" (--json shows all)" if len(text) > 200 else "")
