"""The commands `fedface weights ...`: import, show, hash and sample checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import check_output, write_output
from fedface.cli.console import print_json, progress_bars, say
from fedface.cli.options import JsonOption, SeedOption, command_group, example

weights = command_group("Checkpoints: import, show, hash, sample.")

FileArgument = Annotated[Path, typer.Argument(help="A checkpoint (.safetensors) written by fedface.")]
LabelOption = Annotated[
    int | None, typer.Option(min=0, help="Class to sample, for a class-conditional generator.")
]
PsiOption = Annotated[
    list[float] | None,
    typer.Option(
        min=0, max=1, help="Truncation, one row each: 0 is the mean face, 1 is no truncation; repeatable."
    ),
]

TONE_SAMPLES = 1000


@weights.command(
    "import",
    epilog=example("fedface weights import stylegan2-ffhq.pkl --out ffhq.safetensors --sheet ffhq.png"),
)
def weights_import(
    file: Annotated[
        Path,
        typer.Argument(help="NVIDIA's stylegan2-ada .pkl, rosinality's .pt, or StyleGAN1's synthesis.pt."),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    mapping: Annotated[
        Path | None, typer.Option(help="StyleGAN1's mapping.pt, if it is a separate file.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="A PNG of samples to write.")] = None,
    json_out: JsonOption = False,
) -> None:
    """Convert a StyleGAN checkpoint of another program, without executing any code in the file."""
    from fedface.cli.weights_sheet import MAX_SIDE, describe_import, sheet_of
    from fedface.importing.import_weights import import_file
    from fedface.models.checkpoint import check_place, save_model
    from fedface.models.model_summary import summarize
    from fedface.photos.image_io import PICTURE_MARK

    check_place(out)
    if sheet is not None:
        check_output(sheet, PICTURE_MARK)
    with progress_bars() as bars:
        bars.stage("reading", 0)
        found = import_file(file, mapping)
        model = found.model()
        facts = summarize(model)
        save_model(out, model)
        if sheet is not None:
            bars.stage("sampling", 0)
            count = 8 if facts.size <= MAX_SIDE else 4
            picture = sheet_of(model.generator, count=count, psis=(0.7, 1.0), seed=1, label=None)
            write_output(sheet, picture, PICTURE_MARK)
    if json_out:
        record = {"found": found.kind, "ignored": found.ignored, "notes": dict(found.notes), **asdict(facts)}
        print_json(record | {"out": str(out)})
        return
    for line in describe_import(found, facts):
        say(line)
    say(f"wrote {out}")
    if sheet is not None:
        say(f"open {sheet}")


@weights.command(epilog=example("fedface weights show gan32.safetensors"))
def show(file: FileArgument, json_out: JsonOption = False) -> None:
    """Print family, size, networks, notes and hash of a checkpoint."""
    from fedface.cli.weights_sheet import describe_model, shorten
    from fedface.models.checkpoint import load_model
    from fedface.models.model_summary import summarize

    model = load_model(file)
    facts = summarize(model)
    if json_out:
        print_json({**asdict(facts), "notes": dict(model.notes)})
        return
    for line in describe_model(facts):
        say(line)
    for key, value in model.notes.items():
        say(f"{key.replace('_', ' ')}: {shorten(value)}")


@weights.command("hash", epilog=example("fedface weights hash gan32.safetensors"))
def weights_hash_of(file: FileArgument, json_out: JsonOption = False) -> None:
    """Print the hash of a checkpoint's weights, as in reports; it does not depend on the file's other bytes."""
    from fedface.models.checkpoint import load_model
    from fedface.models.model_summary import summarize

    facts = summarize(load_model(file))
    print(json.dumps({"file": str(file), "hash": facts.hash}) if json_out else facts.hash)


@weights.command(
    "sample", epilog=example("fedface weights sample gan32.safetensors --out samples.png --psi 0.7 --tones")
)
def weights_sample(
    file: Annotated[
        Path | None, typer.Argument(help="A checkpoint (.safetensors); default: the bundled generator.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, max=64, help="Samples, one column each.")] = 8,
    psi: PsiOption = None,
    seed: SeedOption = 1,
    label: LabelOption = None,
    tones: Annotated[
        bool, typer.Option("--tones", help=f"Also count the skin tones of {TONE_SAMPLES} samples.")
    ] = False,
    json_out: JsonOption = False,
) -> None:
    """Write a sheet of samples; each row shows the same latents at one truncation."""
    from fedface.cli.weights_sheet import count_tones, sheet_of
    from fedface.models.checkpoint import load_gan, load_model
    from fedface.models.model_summary import summarize
    from fedface.photos.image_io import PICTURE_MARK

    model = load_gan() if file is None else load_model(file)
    check_output(out, PICTURE_MARK)
    psis = tuple(psi or (0.7, 1.0))
    with progress_bars() as bars:
        bars.stage("sampling", 0)
        picture = sheet_of(model.generator, count=count, psis=psis, seed=seed, label=label)
        histogram = count_tones(model.generator, TONE_SAMPLES, seed + 1) if tones else None
    write_output(out, picture, PICTURE_MARK)
    if json_out:
        record = {"hash": summarize(model).hash, "count": count, "psi": psis, "seed": seed, "label": label}
        shares = {} if histogram is None else {"monk_counts": list(histogram.counts)}
        print_json({**record, **shares, "out": str(out)})
        return
    if histogram is not None:
        for step, (number, share) in enumerate(zip(histogram.counts, histogram.shares, strict=True), start=1):
            say(f"Monk {step:2}: {number:4} {'#' * round(100 * share.estimate)}")
        say(f"darker half of the Monk scale, by pixels: {histogram.darker}")
    say(f"open {out}")
