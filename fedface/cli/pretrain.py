"""The commands `fedface pretrain ...`: train the bundled checkpoints from synthetic faces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from fedface.cli.console import progress_bars, say
from fedface.cli.options import CheckpointOption, SeedOption, example
from fedface.errors import ConfigError

SEED, LIGHT_FRACTION, SIZE = 7, 0.85, 32  # of the bundled checkpoints
LightFractionOption = Annotated[
    float, typer.Option(min=0, max=1, help="Fraction of training faces with light skin.")
]
StepFractionOption = Annotated[
    float, typer.Option(min=0.0001, max=1, help="Run only this fraction of all steps, to try it out.")
]
OutOption = Annotated[Path, typer.Option(help="The checkpoint to write.")]

pretrain = typer.Typer(
    help="Train the bundled checkpoints from synthetic faces.", no_args_is_help=True, rich_markup_mode=None
)


@pretrain.command("gan", epilog=example("fedface pretrain gan --out gan32.safetensors --step-fraction 0.01"))
def pretrain_gan_command(
    out: OutOption = Path("gan32.safetensors"),
    seed: SeedOption = SEED,
    light_fraction: LightFractionOption = LIGHT_FRACTION,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the StyleGAN2 generator and discriminator; the defaults reproduce the bundled checkpoint."""
    from fedface.models.checkpoint import check_place
    from fedface.training.pretrain_gan import GanPretrainConfig, pretrain_gan

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
    _write(out, gan)


@pretrain.command("flow", epilog=example("fedface pretrain flow --size 32 --step-fraction 0.01"))
def pretrain_flow_command(
    out: OutOption = Path("flow32.safetensors"),
    seed: SeedOption = SEED,
    light_fraction: LightFractionOption = LIGHT_FRACTION,
    size: Annotated[int, typer.Option(help="Pixels a side: 16, 32 or 64.")] = SIZE,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the rectified flow; the defaults reproduce the bundled checkpoint."""
    from fedface.models.checkpoint import check_place
    from fedface.training.pretrain_flow import FlowPretrainConfig, pretrain_flow

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
    _write(out, flow)


@pretrain.command("encoder", epilog=example("fedface pretrain encoder --step-fraction 0.01"))
def pretrain_encoder_command(
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("encoder32.safetensors"),
    seed: SeedOption = SEED,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the encoder from photos to latents on a generator's own samples; `prior-training` needs one."""
    import torch

    from fedface.codec import encode
    from fedface.models.checkpoint import check_place, load_gan, load_model, weights_hash
    from fedface.models.model import EncoderArchitecture, Model
    from fedface.models.stylegan2 import StyleGAN2
    from fedface.training.pretrain_encoder import EncoderPretrainConfig, pretrain_encoder

    check_place(out)
    full = EncoderPretrainConfig()
    model = load_gan() if checkpoint is None else load_model(checkpoint)
    if not isinstance(model.generator, StyleGAN2):
        raise ConfigError(
            f"{checkpoint}: expected a StyleGAN2 generator, got {model.architecture.description}"
        )
    generator = model.generator
    if generator.config.classes:
        raise ConfigError(
            f"{checkpoint}: expected a generator without classes, got one with {generator.config.classes}; "
            "an encoder outputs latents only"
        )
    config = replace(
        full,
        seed=seed,
        # Only the bundled generator's latents are the parameters of synthetic faces.
        pool=max(64, round(full.pool * step_fraction)) if checkpoint is None else 0,
        steps=max(1, round(full.steps * step_fraction)),
        encoder=replace(full.encoder, size=generator.size, latent_width=generator.latent_width),
    )
    started = time.monotonic()
    with _report() as report:
        encoder = pretrain_encoder(generator, config, report)
    notes = {
        "made_by": "fedface pretrain encoder",
        "recipe": encode(config),
        "generator": weights_hash(generator),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
    }
    architecture = EncoderArchitecture(generator=generator.config, encoder=encoder.config)
    _write(out, Model(architecture, {"generator": generator, "encoder": encoder}, notes))


@pretrain.command("style-encoder", epilog=example("fedface pretrain style-encoder --step-fraction 0.01"))
def pretrain_style_encoder_command(
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("style-encoder32.safetensors"),
    seed: SeedOption = SEED,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the style encoder: a low-resolution photo to the styles of a generator, in one forward pass."""
    from fedface.models.checkpoint import check_place, load_gan, load_model
    from fedface.models.style_encoder import StyleEncoderNetworkConfig
    from fedface.models.stylegan2 import StyleGAN2
    from fedface.training.pretrain_upsampler import UpsamplerPretrainConfig, pretrain_style_encoder

    check_place(out)
    model = load_gan() if checkpoint is None else load_model(checkpoint)
    generator = model.generator
    if not isinstance(generator, StyleGAN2) or generator.config.classes:
        raise ConfigError(
            f"{checkpoint}: expected a StyleGAN2 generator without classes, got {model.architecture.description}"
        )
    shape = StyleEncoderNetworkConfig(
        side=generator.size // 2,
        style_inputs=generator.style_inputs,
        style_width=generator.config.style_width,
    )
    with _report() as report:
        styled = pretrain_style_encoder(
            generator, _scaled_steps(UpsamplerPretrainConfig(seed=seed), step_fraction), shape, report
        )
    _write(out, styled)


@pretrain.command(
    "super-resolution", epilog=example("fedface pretrain super-resolution --step-fraction 0.01")
)
def pretrain_super_resolution_command(
    out: OutOption = Path("super-resolution32.safetensors"),
    size: Annotated[int, typer.Option(help="Pixels a side of the faces, a power of two.")] = SIZE,
    seed: SeedOption = SEED,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the super-resolution network, a feed-forward baseline that outputs one face."""
    from fedface.models.checkpoint import check_place
    from fedface.models.super_resolution import SuperResolutionNetworkConfig
    from fedface.training.pretrain_upsampler import UpsamplerPretrainConfig, pretrain_super_resolution

    check_place(out)
    if size not in (16, 32, 64, 128, 256):
        raise ConfigError(f"--size must be a power of two from 16 to 256, got {size}")
    config = _scaled_steps(UpsamplerPretrainConfig(seed=seed), step_fraction)
    with _report() as report:
        resolved = pretrain_super_resolution(config, SuperResolutionNetworkConfig(side=size // 2), report)
    _write(out, resolved)


def _scaled_steps(full: Any, fraction: float) -> Any:
    """A pretraining configuration with this fraction of its steps and of its pool of faces."""
    return replace(
        full, pool=max(64, round(full.pool * fraction)), steps=max(1, round(full.steps * fraction))
    )


@contextmanager
def _report() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """The progress callback of a pretraining: (stage, step, steps, metrics)."""
    with progress_bars() as bars:
        stage = ""

        def progress(name: str, done: int, of: int, metrics: dict[str, float]) -> None:
            nonlocal stage
            if name != stage:
                stage = name
                bars.stage(name, of)
            bars.advance(done)
            if metrics and done % 500 == 0:
                values = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())
                bars.message(f"{name} {done}: {values}")

        yield progress


def _write(out: Path, model: Any) -> None:
    from fedface.models.checkpoint import save_model

    save_model(out, model)
    say(f"wrote {out} ({model.notes['seconds']} s)")
