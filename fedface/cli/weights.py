"""Commands about files of weights: import another program's, show, hash and sample our own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

from fedface.cli.console import JsonOption, console, progress_bars
from fedface.errors import ConfigError
from fedface.importing.import_weights import ImportedModel, import_file
from fedface.models.checkpoint import check_place, load_model, save_model
from fedface.models.generator_protocol import Generator, sample
from fedface.models.model_summary import ModelSummary, format_summary, summarize
from fedface.models.stylegan2 import ClassConditioned, StyleGAN2
from fedface.reports.charts import face_grid
from fedface.tensor_types import Images
from fedface.text import sanitize_text

weights = typer.Typer(help="Files of weights.", no_args_is_help=True, rich_markup_mode=None)

FileArgument = Annotated[Path, typer.Argument(help="A .safetensors file that fedface wrote.")]
LabelOption = Annotated[
    int | None, typer.Option(min=0, help="Which class to draw, for a generator that has classes.")
]
PsiOption = Annotated[
    list[float] | None,
    typer.Option(min=0, max=1, help="Truncation, one row each: 0 is the mean face, 1 the full variety."),
]
SHOWN = 256  # pixels a side of one face on a sheet, at most


@weights.command("import")
def weights_import(
    file: Annotated[
        Path,
        typer.Argument(help="NVIDIA's stylegan2-ada .pkl, rosinality's .pt, or StyleGAN1's synthesis.pt."),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    mapping: Annotated[
        Path | None, typer.Option(help="StyleGAN1's mapping.pt, where it is kept apart.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="A PNG of samples to write.")] = None,
    json_out: JsonOption = False,
) -> None:
    """Convert weights of another program, without running anything that their file carries."""
    if out.resolve() in {path.resolve() for path in (file, mapping) if path is not None}:
        raise ConfigError(f"{out}: is the file to import; name another to write")
    check_place(out)
    with progress_bars() as bars:
        bars.stage("reading", 0)
        found = import_file(file, mapping)
        model = found.model()
        facts = summarize(model)
        save_model(out, model)
        if sheet is not None:
            bars.stage("drawing samples", 0)
            count = 8 if facts.size <= SHOWN else 4
            sheet.write_bytes(sheet_of(model.generator, count=count, psis=(0.7, 1.0), seed=1, label=None))
    if json_out:
        told = {"found": found.kind, "ignored": found.ignored, "notes": dict(found.notes), **asdict(facts)}
        print(json.dumps(told | {"out": str(out)}, indent=2))
        return
    for line in _lines(found, facts):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    if sheet is not None:
        console.print(f"open {sheet}", highlight=False, soft_wrap=True)


@weights.command()
def show(file: FileArgument, json_out: JsonOption = False) -> None:
    """Print what a file of ours holds: family, size, weights, shape, notes, hash."""
    model = load_model(file)
    facts = summarize(model)
    if json_out:
        print(json.dumps({**asdict(facts), "notes": dict(model.notes)}, indent=2))
        return
    for line in _described(facts):
        console.print(line, highlight=False, soft_wrap=True)
    for key, value in model.notes.items():
        words = f"{sanitize_text(key.replace('_', ' '))}: {_short(value)}"
        console.print(words, highlight=False, soft_wrap=True)


@weights.command("hash")
def weights_hash_of(file: FileArgument, json_out: JsonOption = False) -> None:
    """Print the hash of the weights in a file, the one that reports carry; the file's own bytes do not count."""
    facts = summarize(load_model(file))
    print(json.dumps({"file": str(file), "hash": facts.hash}) if json_out else facts.hash)


@weights.command("sample")
def weights_sample(
    file: FileArgument,
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    count: Annotated[int, typer.Option(min=1, max=64, help="How many people, one column each.")] = 8,
    psi: PsiOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    label: LabelOption = None,
    json_out: JsonOption = False,
) -> None:
    """Draw a sheet of samples; the rows show the same people at each truncation."""
    model = load_model(file)
    psis = tuple(psi or (0.7, 1.0))
    with progress_bars() as bars:
        bars.stage("drawing samples", 0)
        picture = sheet_of(model.generator, count=count, psis=psis, seed=seed, label=label)
    out.write_bytes(picture)
    if json_out:
        told = {"hash": summarize(model).hash, "count": count, "psi": psis, "seed": seed, "label": label}
        print(json.dumps(told | {"out": str(out)}, indent=2))
        return
    console.print(f"open {out}", highlight=False, soft_wrap=True)


def sheet_of(generator: Any, *, count: int, psis: tuple[float, ...], seed: int, label: int | None) -> bytes:
    """A PNG with one row for each truncation and one column for each person.

    Raises:
        ConfigError: A label was given to a generator without classes, or one that it does not have.
    """
    classes = generator.config.classes if isinstance(generator, StyleGAN2) else 0
    if label is not None and not classes:
        raise ConfigError("this generator has no classes; leave --label out")
    rows = []
    for shown in range(min(classes, 3)) if classes and label is None else (label,):
        of: Generator = generator if shown is None else ClassConditioned(generator, shown)
        for psi in psis:
            named = f"psi {psi:g}" if shown is None else f"class {shown}, psi {psi:g}"
            rows.append((named, _faces(of, count, psi, seed)))
    return face_grid(rows, [""] * count, side=max(96, min(SHOWN, generator.size)))


def _faces(generator: Generator, count: int, psi: float, seed: int) -> Images:
    """Samples, made small one batch at a time; the same people for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    step = 64 if generator.size <= SHOWN else 2
    parts = []
    for first in range(0, count, step):
        made = sample(generator, min(step, count - first), rng, psi=psi, batch=16)
        parts.append(functional.avg_pool2d(made, max(1, generator.size // SHOWN)))
    return torch.cat(parts)


def _lines(found: ImportedModel, facts: ModelSummary) -> list[str]:
    lines = [f"found: {found.kind}", *_described(facts)]
    if found.discriminator is None:
        lines.append("discriminator: none in the file")
    if found.ignored:
        lines.append(f"not taken: {', '.join(found.ignored)}")
    remarks = found.notes.get("remarks")
    # A file of ours may come from a stranger, who wrote its notes.
    return lines + [f"note: {_short(remark)}" for remark in (remarks if isinstance(remarks, list) else ())]


def _described(facts: ModelSummary) -> list[str]:
    size = f"{facts.size} x {facts.size} pixels"
    return [f"{facts.family}, {size}", *map(format_summary, facts.networks), f"hash: {facts.hash}"]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return sanitize_text(text, 200) + (" (--json shows all)" if len(text) > 200 else "")
