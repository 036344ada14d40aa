"""Commands about the embedded generator: train it, draw a sheet of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fedface.audits.bias import tone_histogram
from fedface.cli.terminal import console, progress_bars
from fedface.models.weights import load_base, load_model, save_model
from fedface.reports.figures import face_grid
from fedface.training.pretrain import PretrainConfig, pretrain

base = typer.Typer(help="The embedded generator.", no_args_is_help=True, rich_markup_mode=None)


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
    with progress_bars() as bars:
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
    save_model(out, gan)
    console.print(f"wrote {out} ({gan.notes['seconds']} s)", highlight=False)


@base.command("sheet")
def base_sheet(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    generator: Annotated[Path | None, typer.Option(help="A checkpoint; the embedded one otherwise.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Draw a sheet of samples of a checkpoint, and count their skin tones."""
    model = load_base() if generator is None else load_model(generator)
    tones = tone_histogram(model.generator.sample(1000, torch.Generator().manual_seed(seed + 1)))
    for step, (count, share) in enumerate(zip(tones.counts, tones.shares, strict=True), start=1):
        bar = "#" * round(100 * share.estimate)
        console.print(f"Monk {step:2}: {count:4} {bar}", highlight=False)
    console.print(f"darker half of the Monk scale, by pixels: {tones.darker}", highlight=False)
    made = model.generator.sample(60, torch.Generator().manual_seed(seed))
    rows = [(f"{10 * row + 1}-{10 * row + 10}", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, [""] * 10, side=96))
    console.print(f"open {out}", highlight=False, soft_wrap=True)
