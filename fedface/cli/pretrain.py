"""The commands `fedface pretrain ...`: train the bundled checkpoints from synthetic faces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from fedface.cli.console import progress_bars, say
from fedface.cli.options import CheckpointOption, SeedOption, command_group, example
from fedface.errors import ConfigError

SEED, LIGHT_FRACTION, SIZE = 7, 0.85, 32  # of the bundled checkpoints
LightFractionOption = Annotated[
    float, typer.Option(min=0, max=1, help="Fraction of training faces with light skin.")
]
StepFractionOption = Annotated[
    float, typer.Option(min=0.0001, max=1, help="Run only this fraction of all steps, to try it out.")
]


def _checked_place(out: Path) -> Path:
    from fedface.models.checkpoint import check_place

    check_place(out)
    return out


OutOption = Annotated[Path, typer.Option(help="The checkpoint to write.", callback=_checked_place)]

pretrain = command_group("Train the bundled checkpoints from synthetic faces.")


@pretrain.command("gan", epilog=example("fedface pretrain gan --out gan32.safetensors --step-fraction 0.01"))
def pretrain_gan_command(
    out: OutOption = Path("gan32.safetensors"),
    seed: SeedOption = SEED,
    light_fraction: LightFractionOption = LIGHT_FRACTION,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the StyleGAN2 generator and discriminator; the defaults reproduce the bundled checkpoint."""
    from fedface.training.pretrain_gan import GanPretrainConfig, pretrain_gan

    full = GanPretrainConfig(seed=seed, light_fraction=light_fraction)
    config = _scaled(full, step_fraction, "paired_steps", "adversarial_steps")
    _write(out, _pretrained(pretrain_gan, config))


@pretrain.command("flow", epilog=example("fedface pretrain flow --size 32 --step-fraction 0.01"))
def pretrain_flow_command(
    out: OutOption = Path("flow32.safetensors"),
    seed: SeedOption = SEED,
    light_fraction: LightFractionOption = LIGHT_FRACTION,
    size: Annotated[int, typer.Option(help="Pixels a side: 16, 32 or 64.")] = SIZE,
    step_fraction: StepFractionOption = 1.0,
) -> None:
    """Train the rectified flow; the defaults reproduce the bundled checkpoint."""
    from fedface.training.pretrain_flow import FlowPretrainConfig, pretrain_flow

    full = FlowPretrainConfig(seed=seed, light_fraction=light_fraction)
    if size not in (16, 32, 64):
        raise ConfigError(f"--size must be 16, 32 or 64, got {size}")
    flow_config = replace(full.flow, size=cast(Literal[16, 32, 64], size))
    config = _scaled(replace(full, flow=flow_config), step_fraction, "steps")
    _write(out, _pretrained(pretrain_flow, config))


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
    from fedface.models.checkpoint import weights_hash
    from fedface.models.model import EncoderArchitecture, Model
    from fedface.training.pretrain_encoder import EncoderPretrainConfig, pretrain_encoder

    generator = _unconditional_generator(checkpoint)
    full = EncoderPretrainConfig(seed=seed)
    encoder_config = replace(full.encoder, size=generator.size, latent_width=generator.latent_width)
    config = _scaled(replace(full, encoder=encoder_config), step_fraction, "steps")
    if checkpoint is not None:  # only the bundled generator's latents are the parameters of synthetic faces
        config = replace(config, pool=0)
    started = time.monotonic()
    encoder = _pretrained(pretrain_encoder, generator, config)
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
    from fedface.models.style_encoder import StyleEncoderNetworkConfig
    from fedface.training.pretrain_upsampler import UpsamplerPretrainConfig, pretrain_style_encoder

    generator = _unconditional_generator(checkpoint)
    shape = StyleEncoderNetworkConfig(
        side=generator.size // 2,
        style_inputs=generator.style_inputs,
        style_width=generator.config.style_width,
    )
    config = _scaled(UpsamplerPretrainConfig(seed=seed), step_fraction, "steps")
    _write(out, _pretrained(pretrain_style_encoder, generator, config, shape))


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
    from fedface.models.super_resolution import SuperResolutionNetworkConfig
    from fedface.training.pretrain_upsampler import UpsamplerPretrainConfig, pretrain_super_resolution

    if size not in (16, 32, 64, 128, 256):
        raise ConfigError(f"--size must be a power of two from 16 to 256, got {size}")
    config = _scaled(UpsamplerPretrainConfig(seed=seed), step_fraction, "steps")
    _write(out, _pretrained(pretrain_super_resolution, config, SuperResolutionNetworkConfig(side=size // 2)))


def _scaled(full: Any, fraction: float, *steps: str) -> Any:
    """A pretraining configuration with this fraction of its pool of faces and of the named numbers of steps."""
    counts = {name: max(1, round(getattr(full, name) * fraction)) for name in steps}
    return replace(full, pool=max(64, round(full.pool * fraction)), **counts)


def _unconditional_generator(checkpoint: Path | None) -> Any:
    """The StyleGAN2 generator of a checkpoint, or the bundled one; raises ConfigError for one with classes."""
    from fedface.models.checkpoint import load_gan, load_model
    from fedface.models.stylegan2 import StyleGAN2

    model = load_gan() if checkpoint is None else load_model(checkpoint)
    generator = model.generator
    classes = generator.config.classes if isinstance(generator, StyleGAN2) else 0
    if classes or not isinstance(generator, StyleGAN2):
        found = f"{model.architecture.description}{f' and {classes} classes' if classes else ''}"
        raise ConfigError(f"{checkpoint}: expected a StyleGAN2 generator without classes, got {found}")
    return generator


def _pretrained(pretraining: Callable[..., Any], *arguments: Any) -> Any:
    """What a pretraining returns for these arguments and a callback for (stage, step, steps, metrics)."""
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

        return pretraining(*arguments, progress)


def _write(out: Path, model: Any) -> None:
    from fedface.models.checkpoint import save_model

    save_model(out, model)
    say(f"wrote {out} ({model.notes['seconds']} s)")
