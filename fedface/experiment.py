"""The whole recipe of a run as one frozen value, read from one YAML file; each part's config lives with its owner.

Called by the command line and both Flower apps. An experiment is a question: `question` stands first, and
everything that the answer depends on stands below it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, assert_never

from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    PlainConfig,
)
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.codec import encode
from fedface.config import read, section
from fedface.errors import ConfigError
from fedface.models.checkpoint import (
    load_as,
    load_encoder,
    load_flow,
    load_gan,
    load_style_encoder,
    load_super_resolution,
)
from fedface.models.model import (
    EncoderArchitecture,
    FlowArchitecture,
    GanArchitecture,
    Model,
    StyleEncoderArchitecture,
    SuperResolutionArchitecture,
)
from fedface.number_format import format_delta
from fedface.photos.client_partition import ByGroup, Dirichlet, Even
from fedface.privacy.plan import DPParameters, Plan, Schedule, make_plan
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.training.flow import FlowTrainingConfig
from fedface.training.gan import GanTrainingConfig
from fedface.training.latent_prior import PriorTrainingConfig
from fedface.training.training_methods import Training
from fedface.training.upsampler import UpsamplerTrainingConfig
from fedface.upsampling.degradation import BicubicPulse, Degradation, format_degradation
from fedface.upsampling.methods import Method, check_method, default_method
from fedface.validation import AtLeast, In, checked

NO_DP_LABEL = "∞"  # where others have an epsilon: a run without a promise
EVALUATIONS = 2  # of a run: the model before and after
Fraction = Annotated[float, In("[0, 1]")]
VARY = "vary"  # the key of a file that describes several runs


@dataclass(frozen=True, kw_only=True)
@checked
class SyntheticDevices:
    """Pretended devices, each with drawn faces in a mix of its own."""

    kind: ClassVar[str] = "synthetic-devices"

    light_fractions: tuple[Fraction, ...] = (0.9, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # one per device
    photos_per_device: Annotated[int, AtLeast(2)] = 400
    photos_per_occasion: Annotated[int, AtLeast(1)] = 1  # of one person, in one light, side by side

    def __post_init__(self) -> None:
        if not self.light_fractions:
            raise ValueError("light_fractions must name at least one device, got none")
        if self.photos_per_occasion < 1 or self.photos_per_device % self.photos_per_occasion:
            raise ValueError(
                f"photos_per_occasion must divide the {self.photos_per_device} photos of a device, "
                f"got {self.photos_per_occasion}"
            )

    @property
    def count(self) -> int:
        """How many devices."""
        return len(self.light_fractions)


@dataclass(frozen=True, kw_only=True)
@checked
class LabelledDevices:
    """Pretended devices that share out one public folder of labelled photos."""

    kind: ClassVar[str] = "labelled-devices"

    folder: Path = Path("photos")  # replaced by --photos
    set: str = ""  # which set of the folder, where it holds several
    label: str = "race"  # which column tells the groups
    profile_faces: Literal["leave-out", "keep"] = "leave-out"  # faces turned far from the camera
    count: Annotated[int, AtLeast(1)] = 7
    split: ByGroup | Dirichlet | Even = field(default_factory=ByGroup)


@dataclass(frozen=True, kw_only=True)
@checked
class RemoteDevices:
    """Devices of real people, that connect by themselves; the server learns nothing of their photos."""

    kind: ClassVar[str] = "remote-devices"

    count: Annotated[int, AtLeast(1)] = 3  # wait for this many devices before the first round


Devices = SyntheticDevices | LabelledDevices | RemoteDevices


@dataclass(frozen=True, kw_only=True)
@checked
class SyntheticProbe:
    """Public probe: freshly drawn faces in plain light and through cameras, by default as many of each tone group."""

    kind: ClassVar[str] = "synthetic-probe"

    per_group: Annotated[int, AtLeast(2)] = 12  # faces per tone group
    # Instead five times as many of a population with this share of light skin.
    light_fraction: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
@checked
class LabelledProbe:
    """Public probe: labelled photos that no device holds, equally many in each group."""

    kind: ClassVar[str] = "labelled-probe"

    folder: Path = Path("photos")  # replaced by --photos
    set: str = ""
    label: str = "race"
    profile_faces: Literal["leave-out", "keep"] = "leave-out"  # faces turned far from the camera
    per_group: Annotated[int, AtLeast(2)] = 12


@dataclass(frozen=True, kw_only=True)
@checked
class UpsamplingConfig:
    """How probes are shrunk and made large again."""

    downscale: Degradation = field(default_factory=lambda: BicubicPulse(4))
    method: Method | None = None  # None is the one that goes with the model: PULSE for a GAN
    faces_per_photo: Annotated[int, AtLeast(1)] = 1


@dataclass(frozen=True, kw_only=True)
@checked
class AttackConfig:
    """The inversion attack on one update."""

    photos: Annotated[int, AtLeast(2)] = 4  # updates attacked, one photo each
    iterations: Annotated[int, AtLeast(1)] = 300
    candidates: Annotated[int, AtLeast(2)] = 100  # of the gallery question
    trials: Annotated[int, AtLeast(1)] = 50


@dataclass(frozen=True, kw_only=True)
@checked
class EvaluationConfig:
    """What devices tell of how a model serves their own photos, before the run and after it.

    A part of the promised epsilon pays for it; the photos that are asked are held out of training.
    """

    # Of the promised epsilon; the rest is for training.
    epsilon_fraction: Annotated[float, In("(0, 1)")] = 0.25
    # Share of the units that is asked and not trained on.
    holdout_fraction: Annotated[float, In("(0, 1)")] = 0.2
    # q, the probability with which a held-out unit joins an evaluation.
    sampling_rate: Annotated[float, In("(0, 1]")] = 1.0
    metrics: LocalMetricsConfig = field(default_factory=LocalMetricsConfig)

    def dp_parameters(self, promise: PrivacyTarget, questions: int) -> DPParameters:
        """The least noise with which so many questions cost their share of a promise."""
        return metrics_dp_parameters(
            replace(promise, epsilon=self.epsilon_fraction * promise.epsilon), questions, self.sampling_rate
        )


def metrics_dp_parameters(promise: PrivacyTarget, questions: int, sampling_rate: float) -> DPParameters:
    """The least noise with which so many questions keep a promise that is theirs alone.

    Raises:
        PrivacyError: No amount of noise does.
    """
    schedule = Schedule(
        rounds=questions, steps_per_round=1, sampling_rate=sampling_rate, expected_batch_size=1, clip_norm=1.0
    )
    return make_plan(promise, schedule).dp_parameters


@dataclass(frozen=True, kw_only=True)
@checked
class Experiment:
    """One question and everything its answer depends on."""

    question: str
    name: str  # of the run's folder
    privacy: PrivacyTarget | NoPrivacy
    devices: Devices
    probe: SyntheticProbe | LabelledProbe = field(default_factory=SyntheticProbe)
    seed: Annotated[int, AtLeast(0)] = 0
    base: Path | None = None  # a checkpoint; None is the embedded one of the family that `training` needs
    training: Training = field(default_factory=GanTrainingConfig)
    aggregation: AggregationConfig = field(default_factory=HomomorphicConfig)
    policy: DevicePolicy | None = None  # of pretended devices; None allows exactly this run
    min_responses: int = 2  # a round with fewer answers is not applied
    upsampling: UpsamplingConfig = field(default_factory=UpsamplingConfig)
    evaluation: EvaluationConfig | None = None  # what devices tell of their own photos; None: nothing
    # For privacy per library: the largest L2 norm of one device's update, in public ranges.
    update_clip_norm: Annotated[float, In("[1e-6, 1e6]")] = 1.0
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question must not be empty: what does this run settle?")
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
        if not 0 < len(self.name) <= 100 or set(self.name) - allowed or self.name[0] in ".-":
            raise ValueError(
                f"name must be letters, digits, '-', '_' and '.', 100 at most, got {self.name!r:.120}"
            )
        if not 1 <= self.min_responses <= self.devices.count:
            raise ValueError(
                f"min_responses must lie between 1 and the {self.devices.count} devices, got {self.min_responses}"
            )
        if isinstance(self.aggregation, HomomorphicConfig):
            if (fewest := self.aggregation.min_devices) > self.devices.count:
                raise ValueError(
                    f"aggregation: min_devices must be at most the {self.devices.count} devices, got {fewest}; "
                    "nobody could open a sum"
                )
        if isinstance(self.training, UpsamplerTrainingConfig):
            if self.training.downscale != self.upsampling.downscale:
                raise ValueError(
                    "upsampling: downscale must be the one that the network learns to undo, "
                    f"{format_degradation(self.training.downscale)} (training.downscale), "
                    f"got {format_degradation(self.upsampling.downscale)}"
                )
        if isinstance(self.privacy, PrivacyTarget):
            self._check_promise(self.privacy)
        elif self.evaluation is not None:
            raise ValueError("evaluation needs a promise: what devices tell of their photos is always noised")

    def _check_promise(self, promise: PrivacyTarget) -> None:
        if isinstance(self.devices, SyntheticDevices) and promise.unit != "library":
            each = 1 if promise.unit == "photo" else self.devices.photos_per_occasion
            most = each / self.devices.photos_per_device
            if promise.delta >= most:
                raise ValueError(
                    f"privacy: delta must lie below 1 / {promise.unit}s of a device = {most:g}, "
                    f"got {format_delta(promise.delta)}"
                )
        if promise.unit == "library":
            if not isinstance(self.aggregation, PlainConfig):
                raise ValueError(
                    "aggregation must be plain with a promise per library: the server adds the noise to the sum, "
                    f"and cannot add it to what it cannot read; got {self.aggregation.kind}"
                )
            if isinstance(self.training, PriorTrainingConfig):
                raise ValueError(
                    "training: sums of latents are noised on the device; promise per photo or occasion"
                )
            self._check_figures_of_libraries()
        if self.evaluation is not None and self.upsampling.downscale.noise_std > 0:
            raise ValueError("evaluation needs a downscale without noise: a photo's figures must be its own")

    def _check_figures_of_libraries(self) -> None:
        if self.evaluation is None:
            return
        if self.evaluation.sampling_rate != 1:
            raise ValueError(
                "evaluation: sampling_rate must be 1 with a promise per library, since every device is asked, "
                f"got {self.evaluation.sampling_rate:g}"
            )
        if self.devices.count < (fewest := self.evaluation.metrics.min_group_size):
            raise ValueError(
                "evaluation: with a promise per library a device counts as one, and figures of fewer than "
                f"min_group_size = {fewest} are not told, so nothing would be; got {self.devices.count} devices. "
                "Ask more devices, promise per photo or occasion, or leave the figures out"
            )

    @property
    def agreement(self) -> AggregationParameters:
        """What devices and server must share to sum updates, which are divided by their public ranges."""
        return AggregationParameters(value_range=1.0, max_devices=max(2, self.devices.count))

    def plan(self) -> Plan:
        """The mechanism that keeps the promise; takes a second or two, once."""
        beside: list[DPParameters] = []
        if self.evaluation is not None and isinstance(self.privacy, PrivacyTarget):
            beside.append(self.evaluation.dp_parameters(self.privacy, EVALUATIONS))
        return make_plan(
            self.privacy,
            self.training.schedule(),
            update_clip_norm=self.update_clip_norm,
            additional_releases=beside,
        )

    @property
    def holdout_fraction(self) -> float:
        """The share of each device's units that no update is computed from."""
        return 0.0 if self.evaluation is None else self.evaluation.holdout_fraction

    def device_policy(self) -> DevicePolicy:
        """What a pretended device allows: the written policy, or exactly this run."""
        if self.policy is not None:
            return self.policy
        match self.privacy:
            case PrivacyTarget(epsilon=epsilon, delta=delta, unit=unit, trust=trust):
                return DevicePolicy(
                    max_epsilon=epsilon, delta=delta, objectives=(self.training.objective,), min_cohort_size=1,
                    protocols=(self.aggregation.kind,), unit=unit, trust_server=trust == "server",
                    evaluation=self.evaluation is not None,
                )  # fmt: skip
            case NoPrivacy():
                return DevicePolicy(
                    max_epsilon=1.0, delta=1e-5, objectives=(self.training.objective,), min_cohort_size=1,
                    protocols=(self.aggregation.kind,), allow_no_dp=True,
                )  # fmt: skip
            case _:
                assert_never(self.privacy)

    @property
    def rounds(self) -> int:
        """How many rounds the run has."""
        return self.training.schedule().rounds

    def method_for(self, model: Model) -> Method:
        """How probes are made large again with this model."""
        return default_method(model) if self.upsampling.method is None else self.upsampling.method

    def start(self) -> Model:
        """The model before the first round, of the family that this way of training needs.

        Raises:
            WeightsError: The checkpoint cannot be read, or is of another family.
            ConfigError: Its pictures cannot be shrunk as `upsampling` says.
        """
        match self.training:
            case GanTrainingConfig():
                model = load_gan() if self.base is None else load_as(self.base, GanArchitecture)
            case PriorTrainingConfig():
                model = load_encoder() if self.base is None else load_as(self.base, EncoderArchitecture)
            case FlowTrainingConfig():
                model = load_flow() if self.base is None else load_as(self.base, FlowArchitecture)
            case UpsamplerTrainingConfig(learner="style-encoder"):
                model = (
                    load_style_encoder()
                    if self.base is None
                    else load_as(self.base, StyleEncoderArchitecture)
                )
            case UpsamplerTrainingConfig():
                model = (
                    load_super_resolution()
                    if self.base is None
                    else load_as(self.base, SuperResolutionArchitecture)
                )
            case _:
                assert_never(self.training)
        # What no audit could be made with must not be found out after the last round.
        try:
            check_method(self.method_for(model), model, self.upsampling.downscale, size=model.size)
        except ConfigError as error:
            raise ConfigError(f"upsampling: {error}") from error
        return model

    def digest(self) -> str:
        """SHA-256 of the whole recipe, the first 16 hex digits."""
        return hashlib.sha256(json.dumps(encode(self), sort_keys=True).encode()).hexdigest()[:16]


def for_ranking(experiment: Experiment) -> Experiment:
    """The recipe with an evaluation of all photos, which nothing is trained on.

    Raises:
        ConfigError: It promises nothing.
    """
    if not isinstance(experiment.privacy, PrivacyTarget):
        raise ConfigError(
            "a ranking needs a privacy target: metrics of devices' own photos are always noised"
        )
    try:
        return replace(experiment, evaluation=experiment.evaluation or EvaluationConfig())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_experiment(
    path: Path, *, photos: Path | None = None, changes: Mapping[str, str] | None = None
) -> Experiment:
    """Read an experiment; `photos` replaces the folder of labelled devices and probe.

    Raises:
        ConfigError: With file, line, key, what was expected and what came; or the file varies its recipe.
    """
    if section(path, VARY) is not None:
        raise ConfigError(f"{path}: describes several runs (its key {VARY}); run them with `fedface compare`")
    return read_one(path, photos=photos, changes=changes)


def read_one(
    path: Path, *, photos: Path | None = None, changes: Mapping[str, str] | None = None
) -> Experiment:
    """Like `read_experiment`, for one of the runs of a file that varies its recipe: `changes` say which."""
    merged = dict(changes or {})
    first = read(path, Experiment, changes=merged, leave_out=(VARY,))
    if photos is None:
        return first
    if not isinstance(first.devices, LabelledDevices) and not isinstance(first.probe, LabelledProbe):
        raise ConfigError(
            f"{path}: --photos goes with labelled devices or a labelled probe; this file has neither"
        )
    for part in ("devices", "probe"):
        if isinstance(getattr(first, part), (LabelledDevices, LabelledProbe)):
            merged[f"{part}.folder"] = json.dumps(str(photos))
    return read(path, Experiment, changes=merged, leave_out=(VARY,))
