"""Commands about the embedded models: train them, draw a sheet of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer

from fedface.audits.bias import tone_histogram
from fedface.cli.console import console, progress_bars
from fedface.config import plain
from fedface.errors import ConfigError
from fedface.models.checkpoint import (
    check_place,
    load_gan,
    load_model,
    save_model,
    weights_hash,
)
from fedface.models.model import EncoderArchitecture, Model
from fedface.models.style_encoder import StyleEncoderNetworkConfig
from fedface.models.stylegan2 import StyleGAN2
from fedface.models.super_resolution import SuperResolutionNetworkConfig
from fedface.reports.charts import face_grid
from fedface.training.pretrain_encoder import EncoderPretrainConfig, pretrain_encoder
from fedface.training.pretrain_flow import FlowPretrainConfig, pretrain_flow
from fedface.training.pretrain_gan import GanPretrainConfig, pretrain_gan
from fedface.training.pretrain_upsampler import (
    UpsamplerPretrainConfig,
    pretrain_style_encoder,
    pretrain_super_resolution,
)

StepFractionOption = Annotated[
    float, typer.Option(min=0.0001, max=1, help="Take this share of all steps, to try it.")
]

pretrain = typer.Typer(help="The embedded models.", no_args_is_help=True, rich_markup_mode=None)


@pretrain.command("gan")
def pretrain_gan_command(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("gan32.safetensors"),
    seed: Annotated[int, typer.Option(min=0)] = GanPretrainConfig().seed,
    light_fraction: Annotated[float, typer.Option(min=0, max=1)] = GanPretrainConfig().light_fraction,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the base checkpoint from drawn faces; the defaults make the shipped one."""
    check_place(out)
    full = GanPretrainConfig()
    config = GanPretrainConfig(
        seed=seed,
        light_fraction=light_fraction,
        pool=max(64, round(full.pool * step_fraction)),
        paired_steps=max(1, round(full.paired_steps * step_fraction)),
        adversarial_steps=max(1, round(full.adversarial_steps * step_fraction)),
    )
    with _report() as report:
        gan = pretrain_gan(config, report)
    _keep(out, gan)


@pretrain.command("flow")
def pretrain_flow_command(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("flow32.safetensors"),
    seed: Annotated[int, typer.Option(min=0)] = FlowPretrainConfig().seed,
    light_fraction: Annotated[float, typer.Option(min=0, max=1)] = FlowPretrainConfig().light_fraction,
    size: Annotated[int, typer.Option(help="Pixels a side: 16, 32 or 64.")] = FlowPretrainConfig().flow.size,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the base checkpoint of the rectified flow from drawn faces; the defaults make the shipped one."""
    full = FlowPretrainConfig()
    if size not in (16, 32, 64):
        raise ConfigError(f"--size must be 16, 32 or 64, got {size}")
    check_place(out)
    config = replace(
        full,
        seed=seed,
        light_fraction=light_fraction,
        pool=max(64, round(full.pool * step_fraction)),
        steps=max(1, round(full.steps * step_fraction)),
        flow=replace(full.flow, size=cast(Literal[16, 32, 64], size)),
    )
    with _report() as report:
        flow = pretrain_flow(config, report)
    _keep(out, flow)


@pretrain.command("encoder")
def pretrain_encoder_command(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint with a StyleGAN2 generator; the embedded one otherwise.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where generator and encoder go.")] = Path(
        "encoder32.safetensors"
    ),
    seed: Annotated[int, typer.Option(min=0)] = EncoderPretrainConfig().seed,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the encoder that finds a photo's latent, from a generator's own pictures; `prior-training` needs one."""
    check_place(out)
    full = EncoderPretrainConfig()
    model = load_gan() if checkpoint is None else load_model(checkpoint)
    if not isinstance(model.generator, StyleGAN2):
        raise ConfigError(f"{checkpoint}: wanted a StyleGAN2 generator, got {model.architecture.description}")
    made = model.generator
    if made.config.classes:
        raise ConfigError(
            f"{checkpoint}: its generator has {made.config.classes} classes, and an encoder finds latents alone; "
            "wanted a generator without classes"
        )
    config = replace(
        full,
        seed=seed,
        # Only the embedded base reads a latent's numbers as the parameters of a drawn face.
        pool=max(64, round(full.pool * step_fraction)) if checkpoint is None else 0,
        steps=max(1, round(full.steps * step_fraction)),
        encoder=replace(full.encoder, size=made.size, latent_width=made.latent_width),
    )
    started = time.monotonic()
    with _report() as report:
        encoder = pretrain_encoder(made, config, report)
    notes = {
        "made_by": "fedface pretrain encoder",
        "recipe": plain(config),
        "generator": weights_hash(made),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
    }
    architecture = EncoderArchitecture(generator=made.config, encoder=encoder.config)
    _keep(out, Model(architecture, {"generator": made, "encoder": encoder}, notes))


@pretrain.command("style-encoder")
def pretrain_style_encoder_command(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint with a StyleGAN2 generator; the embedded one otherwise.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where generator and encoder go.")] = Path(
        "style-encoder32.safetensors"
    ),
    seed: Annotated[int, typer.Option(min=0)] = UpsamplerPretrainConfig().seed,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the style encoder from drawn faces: a photo of few pixels to a face of a generator, in one pass."""
    check_place(out)
    model = load_gan() if checkpoint is None else load_model(checkpoint)
    made = model.generator
    if not isinstance(made, StyleGAN2) or made.config.classes:
        raise ConfigError(
            f"{checkpoint}: wanted a StyleGAN2 generator without classes, got {model.architecture.description}"
        )
    shape = StyleEncoderNetworkConfig(
        side=made.size // 2, style_inputs=made.style_inputs, style_width=made.config.style_width
    )
    with _report() as report:
        styled = pretrain_style_encoder(
            made, _shortened(UpsamplerPretrainConfig(seed=seed), step_fraction), shape, report
        )
    _keep(out, styled)


@pretrain.command("super-resolution")
def pretrain_super_resolution_command(
    out: Annotated[Path, typer.Option(help="Where the network goes.")] = Path(
        "super-resolution32.safetensors"
    ),
    size: Annotated[int, typer.Option(help="Pixels a side of the faces, a power of two.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = UpsamplerPretrainConfig().seed,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the super-resolution network from drawn faces, the baseline that most products ship."""
    check_place(out)
    if size not in (16, 32, 64, 128, 256):
        raise ConfigError(f"--size must be a power of two from 16 to 256, got {size}")
    config = _shortened(UpsamplerPretrainConfig(seed=seed), step_fraction)
    with _report() as report:
        resolved = pretrain_super_resolution(config, SuperResolutionNetworkConfig(side=size // 2), report)
    _keep(out, resolved)


def _shortened(full: UpsamplerPretrainConfig, share: float) -> UpsamplerPretrainConfig:
    return replace(full, pool=max(64, round(full.pool * share)), steps=max(1, round(full.steps * share)))


@contextmanager
def _report() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """What a training calls with (stage, step, steps, figures)."""
    with progress_bars() as bars:
        stage = ""

        def progress(name: str, done: int, of: int, figures: dict[str, float]) -> None:
            nonlocal stage
            if name != stage:
                stage = name
                bars.stage(name, of)
            bars.advance(done)
            if figures and done % 500 == 0:
                told = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                bars.message(f"{name} {done}: {told}")

        yield progress


def _keep(out: Path, model: Model) -> None:
    save_model(out, model)
    console.print(f"wrote {out} ({model.notes['seconds']} s)", highlight=False)


@pretrain.command("sheet")
def base_sheet(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    generator: Annotated[Path | None, typer.Option(help="A checkpoint; the embedded one otherwise.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Draw a sheet of samples of a checkpoint, and count their skin tones."""
    model = load_gan() if generator is None else load_model(generator)
    tones = tone_histogram(model.generator.sample(1000, torch.Generator().manual_seed(seed + 1)))
    for step, (count, share) in enumerate(zip(tones.counts, tones.shares, strict=True), start=1):
        bar = "#" * round(100 * share.estimate)
        console.print(f"Monk {step:2}: {count:4} {bar}", highlight=False)
    console.print(f"darker half of the Monk scale, by pixels: {tones.darker}", highlight=False)
    made = model.generator.sample(60, torch.Generator().manual_seed(seed))
    rows = [(f"{10 * row + 1}-{10 * row + 10}", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, [""] * 10, side=96))
    console.print(f"open {out}", highlight=False, soft_wrap=True)
