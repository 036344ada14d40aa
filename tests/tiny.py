"""The smallest run there is: two devices with drawn faces and networks of some thousand weights.

Used by tests of federation/, the command line and the stories. A whole run of it takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedface.experiment import Experiment, read_experiment
from fedface.federation.coordinator import begin
from fedface.federation.device import Device
from fedface.federation.orders import devices_folder
from fedface.federation.simulated import prepare, simulated_device
from fedface.federation.task import Agreed, TrainTask
from fedface.models.critic import CriticConfig
from fedface.models.encoder import EncoderConfig
from fedface.models.family import (
    EncodedShape,
    FlowShape,
    Gan,
    GanShape,
    ResolvedShape,
    Shape,
    StyledShape,
    build,
    new_gan,
)
from fedface.models.flow import FlowConfig
from fedface.models.resolver import ResolverConfig
from fedface.models.style_encoder import StyleEncoderConfig
from fedface.models.stylegan2 import GeneratorConfig
from fedface.models.weights import buffers_of, save_model, vector_of, weights_hash
from fedface.randomness import Streams

GENERATOR = GeneratorConfig(
    size=16, channel_base=64, channel_max=8, latent_width=64, style_width=16, mapping_layers=2
)
CRITIC = CriticConfig(size=16, channel_base=64, channel_max=8)

PROMISE = "{kind: privacy-target, epsilon: 8, delta: 1e-3}"
NO_PROMISE = "{kind: no-promise}"

RECIPE = """
question: Does a small run end?
name: tiny
promise: {kind: privacy-target, epsilon: 8, delta: 1e-3}
devices: {kind: drawn-devices, light_shares: [0.9, 0.1], photos_each: 24}
probe: {kind: drawn-probe, each: 2}
training:
  kind: gan-training
  rounds: 2
  steps_per_round: 2
  sampling_rate: 0.5
  expected_batch: 8
  made_batch: 4
  critic_rate: 0.2
aggregation: {kind: plain}
upsampling: {method: {kind: pulse, steps: 5, mapping_samples: 64}}
attack: {photos: 2, iterations: 2, candidates: 10, trials: 2}
base: BASE
"""


def tiny_gan(name: str = "tiny") -> Gan:
    """Networks of 16 px with random weights; equal names give equal weights."""
    return new_gan(GENERATOR, CRITIC, Streams(5).generator(name))


ENCODER = EncoderConfig(size=16, channel_base=64, channel_max=8)
STYLES = StyleEncoderConfig(side=8, style_inputs=6, style_width=16, width=8, blocks=1, hidden=16)
RESOLVER = ResolverConfig(side=8, factor=2, width=8, blocks=1)
FLOW = FlowConfig(size=16, width=16, multipliers=(1.0,), time_width=16, steps=2)

# A recipe's `training` for each way, with the shape of a model that can learn so.
WAYS: Mapping[str, tuple[str, Shape]] = {
    "full": (
        "{kind: gan-training, rounds: 1, steps_per_round: 2, sampling_rate: 1, expected_batch: 8, made_batch: 4}",
        GanShape(generator=GENERATOR, critic=CRITIC),
    ),
    "lora": (
        "{kind: gan-training, rounds: 1, steps_per_round: 2, sampling_rate: 1, expected_batch: 8, made_batch: 4, "
        "adapt: {kind: lora, rank: 2}}",
        GanShape(generator=GENERATOR, critic=CRITIC),
    ),
    "prior": (
        "{kind: prior-training, expected_batch: 8}",
        EncodedShape(generator=GENERATOR, encoder=ENCODER),
    ),
    "flow": (
        "{kind: flow-training, rounds: 1, sampling_rate: 1, expected_batch: 8}",
        FlowShape(flow=FLOW),
    ),
    "flow-lora": (
        "{kind: flow-training, rounds: 1, sampling_rate: 1, expected_batch: 8, adapt: {kind: lora, rank: 2}}",
        FlowShape(flow=FLOW),
    ),
    "styles": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch: 8}",
        StyledShape(generator=GENERATOR, encoder=STYLES),
    ),
    "styles-lora": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch: 8, adapt: {kind: lora, rank: 2}}",
        StyledShape(generator=GENERATOR, encoder=STYLES),
    ),
    "resolver": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch: 8, learner: super-resolution}",
        ResolvedShape(resolver=RESOLVER),
    ),
}  # fmt: skip


def tiny_way(folder: Path, way: str, changes: Mapping[str, str] | None = None) -> Experiment:
    """The tiny recipe learning in one of `WAYS`, with a checkpoint of that family."""
    training, shape = WAYS[way]
    tiny_file(folder)
    save_model(folder / f"{way}.safetensors", build(shape, Streams(5).generator(way)))
    told = {"training": training, "base": str(folder / f"{way}.safetensors")}
    if "upsampler-training" in training:
        told["upsampling"] = "{}"  # the network itself answers, not PULSE
    return read_experiment(folder / "tiny.yaml", changes={**told, **(changes or {})})


def tiny_file(folder: Path) -> Path:
    """`tiny.yaml` and its checkpoint in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "base.safetensors", tiny_gan())
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("BASE", str(folder / "base.safetensors")))
    return path


def tiny_experiment(folder: Path, changes: Mapping[str, str] | None = None) -> Experiment:
    """The recipe of `tiny_file`, with changes by dotted key."""
    return read_experiment(tiny_file(folder), changes=changes)


def begun(experiment: Experiment, folder: Path) -> Path:
    """A run's folder with its pretended devices, before the first round."""
    begin(experiment, folder)
    prepare(experiment, devices_folder(folder))
    return folder


def train_task(
    experiment: Experiment, gan: Gan, *, run: str = "tiny", round: int = 1, cohort: int = 2
) -> TrainTask:
    """What a coordinator asks in one round."""
    return TrainTask(
        run=run,
        round=round,
        cohort=cohort,
        seed=3,
        agreed=Agreed(
            terms=experiment.plan().terms,
            training=experiment.training,
            shape=gan.shape,
            aggregation=experiment.aggregation,
            agreement=experiment.agreement,
        ),
        weights=vector_of(*gan.modules()),
        buffers=buffers_of(*gan.modules()),
        model=weights_hash(*gan.modules()),
    )


def first_device(experiment: Experiment, folder: Path) -> Device:
    """Pretended device 0 of a run whose devices' states lie in `folder`."""
    prepare(experiment, folder)
    return simulated_device(experiment, 0, folder)
