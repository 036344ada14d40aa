"""The smallest run: two devices with synthetic faces and networks of some thousand weights. A whole run takes a few
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedface.coordinator.device_evaluation import Evaluation
from fedface.coordinator.requests import round_config
from fedface.coordinator.run import initialize_run
from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.experiment import Experiment, devices_folder, read_experiment
from fedface.messages.messages import EvaluateTask, TrainTask
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, save_model, weights_hash
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.latent_encoder import LatentEncoderConfig
from fedface.models.model import (
    Architecture,
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
    build_model,
)
from fedface.models.rectified_flow import FlowConfig
from fedface.models.style_encoder import StyleEncoderNetworkConfig
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.models.super_resolution import SuperResolutionNetworkConfig
from fedface.randomness import Streams
from fedface.simulation.devices import prepare, simulated_device

GENERATOR = StyleGAN2Config(
    size=16, channel_base=64, channel_max=8, latent_width=64, style_width=16, mapping_layers=2
)
DISCRIMINATOR = DiscriminatorConfig(size=16, channel_base=64, channel_max=8)

TARGET = "{kind: privacy-target, epsilon: 8, delta: 1e-3}"
NO_PRIVACY = "{kind: no-privacy}"

RECIPE = """
question: Does a small run end?
name: tiny
privacy: {kind: privacy-target, epsilon: 8, delta: 1e-3}
devices: {kind: synthetic-devices, light_fractions: [0.9, 0.1], photos_per_device: 24}
probe: {kind: synthetic-probe, per_group: 2}
training:
  kind: gan-training
  rounds: 2
  steps_per_round: 2
  sampling_rate: 0.5
  expected_batch_size: 8
  fake_batch_size: 4
  discriminator_lr: 0.2
aggregation: {kind: plain}
upsampling: {method: {kind: pulse, steps: 5, mapping_samples: 64}}
attack: {photos: 2, iterations: 2, candidates: 10, trials: 2}
base: BASE
"""


class SilentProgress:
    """Discards all progress."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""

    def message(self, sentence: str) -> None:
        """Nothing."""


def tiny_gan(name: str = "tiny") -> Model:
    """Networks of 16 px with random weights; equal names give equal weights."""
    architecture = GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR)
    return build_model(architecture, Streams(5).generator(name))


ENCODER = LatentEncoderConfig(size=16, channel_base=64, channel_max=8)
STYLES = StyleEncoderNetworkConfig(side=8, style_inputs=6, style_width=16, width=8, blocks=1, hidden=16)
RESOLVER = SuperResolutionNetworkConfig(side=8, factor=2, width=8, blocks=1)
FLOW = FlowConfig(size=16, width=16, multipliers=(1.0,), time_width=16, steps=2)

# The `training` of each method, with a model architecture that supports it.
WAYS: Mapping[str, tuple[str, Architecture]] = {
    "full": (
        "{kind: gan-training, rounds: 1, steps_per_round: 2, sampling_rate: 1, expected_batch_size: 8, "
        "fake_batch_size: 4}",
        GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR),
    ),
    "lora": (
        "{kind: gan-training, rounds: 1, steps_per_round: 2, sampling_rate: 1, expected_batch_size: 8, "
        "fake_batch_size: 4, "
        "adapt: {kind: lora, rank: 2}}",
        GanArchitecture(generator=GENERATOR, discriminator=DISCRIMINATOR),
    ),
    "prior": (
        "{kind: prior-training, expected_batch_size: 8}",
        EncoderArchitecture(generator=GENERATOR, encoder=ENCODER),
    ),
    "flow": (
        "{kind: flow-training, rounds: 1, sampling_rate: 1, expected_batch_size: 8}",
        FlowArchitecture(flow=FLOW),
    ),
    "flow-lora": (
        "{kind: flow-training, rounds: 1, sampling_rate: 1, expected_batch_size: 8, adapt: {kind: lora, rank: 2}}",
        FlowArchitecture(flow=FLOW),
    ),
    "styles": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch_size: 8}",
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
    ),
    "styles-lora": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch_size: 8, adapt: {kind: lora, rank: 2}}",
        StyleEncoderArchitecture(generator=GENERATOR, encoder=STYLES),
    ),
    "resolver": (
        "{kind: upsampler-training, rounds: 1, sampling_rate: 1, expected_batch_size: 8, learner: super-resolution}",
        SuperResolutionArchitecture(network=RESOLVER),
    ),
}  # fmt: skip


def tiny_way(folder: Path, way: str, changes: Mapping[str, str] | None = None) -> Experiment:
    """The tiny experiment with one of `WAYS` as training method, with a checkpoint of that family."""
    training, shape = WAYS[way]
    tiny_file(folder)
    save_model(folder / f"{way}.safetensors", build_model(shape, Streams(5).generator(way)))
    reported = {"training": training, "base": str(folder / f"{way}.safetensors")}
    if "upsampler-training" in training:
        reported["upsampling"] = "{}"  # the network itself answers, not PULSE
    return read_experiment(folder / "tiny.yaml", changes={**reported, **(changes or {})})


def tiny_file(folder: Path) -> Path:
    """`tiny.yaml` and its checkpoint in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "base.safetensors", tiny_gan())
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("BASE", str(folder / "base.safetensors")))
    return path


def tiny_experiment(folder: Path, changes: Mapping[str, str] | None = None) -> Experiment:
    """The experiment of `tiny_file`, with changes by dotted key."""
    return read_experiment(tiny_file(folder), changes=changes)


def started(experiment: Experiment, folder: Path) -> Path:
    """A run's folder with its simulated devices, before the first round."""
    initialize_run(experiment, folder)
    prepare(experiment, devices_folder(folder))
    return folder


def train_task(
    experiment: Experiment, gan: Model, *, run: str = "tiny", round: int = 1, cohort: int = 2
) -> TrainTask:
    """The coordinator's task for one round."""
    return TrainTask(
        run=run,
        round=round,
        cohort=cohort,
        seed=3,
        config=round_config(experiment, experiment.plan(), gan),
        weights=flatten_parameters(*gan.modules()),
        buffers=flatten_buffers(*gan.modules()),
        model=weights_hash(*gan.modules()),
    )


def evaluate_task(experiment: Experiment) -> EvaluateTask:
    """The coordinator's request for the metrics of the model before training."""
    assert experiment.evaluation is not None
    evaluation = Evaluation(
        run="tiny",
        number=1,
        name="before training",
        model=tiny_gan(),
        releases=experiment.plan().releases,
        config=experiment.evaluation.metrics,
        holdout_fraction=experiment.evaluation.holdout_fraction,
    )
    return evaluation.task(experiment, 2)


def first_device(experiment: Experiment, folder: Path) -> Device:
    """Simulated device 0 of a run with device states in `folder`."""
    prepare(experiment, folder)
    return simulated_device(experiment, 0, folder)


def answered_device(folder: Path) -> tuple[Device, Experiment]:
    """A device that has answered one round, with its `device.yaml` and empty photos in this folder; and its run."""
    experiment = tiny_experiment(folder)
    device = first_device(experiment, folder / "devices")
    handle_task(train_task(experiment, tiny_gan()), device)
    (folder / "photos").mkdir()
    (folder / "device.yaml").write_text(
        "name: a\nphotos: photos\nstate: devices/device-00\npolicy: {max_epsilon: 8, delta: 1e-3}\n"
    )
    return device, experiment
