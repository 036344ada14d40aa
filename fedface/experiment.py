"""An experiment: one question and everything its answer depends on, as one frozen value read from one YAML file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, assert_never

from fedface.aggregation.mask_graph import mask_graph
from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    MaskedConfig,
    PlainConfig,
    corrupt_share,
    fewest_summed,
)
from fedface.aggregation.protocols import sum_ring
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.audits.gradient_inversion import FULL_ITERATIONS
from fedface.codec import encode
from fedface.config import local_path, read, section, value_of
from fedface.errors import AggregationError, ConfigError
from fedface.models.checkpoint import (
    ENCODER_PATH,
    FLOW_PATH,
    GAN_PATH,
    STYLE_ENCODER_PATH,
    SUPER_RESOLUTION_PATH,
    load_as,
)
from fedface.models.model import (
    Architecture,
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
from fedface.training.gan import GAN_NEEDS_LOCAL_NOISE, GanTrainingConfig
from fedface.training.latent_prior import PriorTrainingConfig
from fedface.training.training_methods import Training
from fedface.training.upsampler import UpsamplerTrainingConfig
from fedface.upsampling.degradation import BicubicPulse, Degradation, format_degradation
from fedface.upsampling.methods import Method, check_method, default_method
from fedface.validation import AtLeast, In, checked

NO_DP_LABEL = "∞"  # the epsilon of a run without differential privacy
EVALUATIONS = 2  # of a run: the model before and after
Fraction = Annotated[float, In("[0, 1]")]
VARY = "vary"  # the key of a file that describes several runs


@dataclass(frozen=True, kw_only=True)
@checked
class SyntheticDevices:
    """Simulated devices with synthetic faces; each has its own fraction of light skin."""

    kind: ClassVar[str] = "synthetic-devices"

    light_fractions: tuple[Fraction, ...] = (0.9, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    devices_per_fraction: Annotated[int, AtLeast(1)] = 1  # with each of these fractions
    photos_per_device: Annotated[int, AtLeast(2)] = 400
    photos_per_occasion: Annotated[int, AtLeast(1)] = 1  # of one person in one light

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
        return len(self.light_fractions) * self.devices_per_fraction

    def light_fraction(self, number: int) -> float:
        """The fraction of light skin of one device, numbered from 0."""
        return self.light_fractions[number % len(self.light_fractions)]


@dataclass(frozen=True, kw_only=True)
@checked
class LabelledDevices:
    """Simulated devices among which one public folder of labelled photos is divided."""

    kind: ClassVar[str] = "labelled-devices"

    folder: Path = Path("photos")  # replaced by --photos
    set: str = ""  # which set of the folder, where it holds several
    label: str = "race"  # the column with the groups
    profile_faces: Literal["exclude", "include"] = "exclude"  # faces turned far from the camera
    count: Annotated[int, AtLeast(1)] = 7
    split: ByGroup | Dirichlet | Even = field(default_factory=ByGroup)


@dataclass(frozen=True, kw_only=True)
@checked
class RemoteDevices:
    """Real devices, which connect to the server; it never sees their photos."""

    kind: ClassVar[str] = "remote-devices"

    at_least: Annotated[int, AtLeast(1)] = 3  # a round begins when this many are connected
    # Of one round: sums and keys have room for as many. Others take part in later rounds
    at_most: Annotated[int, In("[1, 4096]")] = 64
    wait_minutes: Annotated[float, In("(0, 1e5]")] = 10.0  # for them to connect, before each round
    answer_minutes: Annotated[float, In("(0, 1e4]")] = 60.0  # for them to answer; a later reply is left out

    def __post_init__(self) -> None:
        if self.at_most < self.at_least:
            raise ValueError(f"at_most must be at least at_least={self.at_least}, got {self.at_most}")

    @property
    def count(self) -> int:
        """How many devices a round has at least."""
        return self.at_least


Devices = SyntheticDevices | LabelledDevices | RemoteDevices


@dataclass(frozen=True, kw_only=True)
@checked
class SyntheticProbe:
    """Public probe: new synthetic faces, clean and as cameras record them, by default equally many per tone group."""

    kind: ClassVar[str] = "synthetic-probe"

    per_group: Annotated[int, In("[2, 1000]")] = 12  # faces per tone group
    # If given: five times as many faces, from a population with this fraction of light skin.
    light_fraction: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
@checked
class LabelledProbe:
    """Public probe: labelled photos that no device has, equally many in each group."""

    kind: ClassVar[str] = "labelled-probe"

    folder: Path = Path("photos")  # replaced by --photos
    set: str = ""
    label: str = "race"
    profile_faces: Literal["exclude", "include"] = "exclude"  # faces turned far from the camera
    per_group: Annotated[int, In("[2, 1000]")] = 12


@dataclass(frozen=True, kw_only=True)
@checked
class UpsamplingConfig:
    """How probes are degraded and upsampled."""

    downscale: Degradation = field(default_factory=lambda: BicubicPulse(4))
    method: Method | None = None  # None: the default for the model, such as PULSE for a GAN
    faces_per_photo: Annotated[int, In("[1, 64]")] = 1


@dataclass(frozen=True, kw_only=True)
@checked
class AttackConfig:
    """The gradient inversion attack on single updates."""

    photos: Annotated[int, In("[2, 100]")] = 4  # updates attacked, one photo each
    iterations: Annotated[int, AtLeast(1)] = FULL_ITERATIONS
    candidates: Annotated[int, In("[2, 10000]")] = 100  # of candidate identification
    trials: Annotated[int, In("[1, 10000]")] = 50


@dataclass(frozen=True, kw_only=True)
@checked
class EvaluationConfig:
    """Metrics that devices compute on their own photos before and after the run.

    They use a fraction of epsilon; the photos that they are computed on are held out of training.
    """

    # Fraction of the target epsilon; the rest is for training.
    epsilon_fraction: Annotated[float, In("(0, 1)")] = 0.25
    # Fraction of the units that is evaluated and not trained on.
    holdout_fraction: Annotated[float, In("(0, 1)")] = 0.2
    # q, the probability with which a held-out unit is sampled for an evaluation.
    sampling_rate: Annotated[float, In("(0, 1]")] = 1.0
    metrics: LocalMetricsConfig = field(default_factory=LocalMetricsConfig)


def metrics_dp_parameters(
    target: PrivacyTarget, evaluations: int, sampling_rate: float, *, honest_devices: int = 0
) -> DPParameters:
    """The least noise with which this many evaluations, and nothing else, meet a privacy target.

    Raises:
        PrivacyError: No amount of noise does.
    """
    schedule = Schedule(
        rounds=evaluations,
        steps_per_round=1,
        sampling_rate=sampling_rate,
        expected_batch_size=1,
        clip_norm=1.0,
    )
    return make_plan(target, schedule, honest_devices=honest_devices).dp_parameters


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
    base: Path | None = None  # a checkpoint; None is the bundled one for this kind of training
    training: Training = field(default_factory=GanTrainingConfig)
    aggregation: AggregationConfig = field(default_factory=MaskedConfig)
    policy: DevicePolicy | None = None  # of simulated devices; None allows exactly this run
    min_responses: int = 2  # a round with fewer replies is not applied
    upsampling: UpsamplingConfig = field(default_factory=UpsamplingConfig)
    evaluation: EvaluationConfig | None = None  # metrics on the devices' own photos; None: none
    # For privacy per library: the largest L2 norm of one device's update, in public ranges.
    update_clip_norm: Annotated[float, In("[1e-6, 1e6]")] = 1.0
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question must not be empty: state the question that this run answers")
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
        if not 0 < len(self.name) <= 100 or set(self.name) - allowed or self.name[0] in ".-":
            raise ValueError(
                f"name must be letters, digits, '-', '_' and '.', 100 at most, got {self.name!r:.120}"
            )
        if not 1 <= self.min_responses <= self.devices.count:
            raise ValueError(
                f"min_responses must lie between 1 and the {self.devices.count} devices, got {self.min_responses}"
            )
        if not isinstance(self.aggregation, PlainConfig):
            if (fewest := self.aggregation.min_devices) > self.devices.count:
                raise ValueError(
                    f"aggregation: min_devices must be at most the {self.devices.count} devices, got {fewest}; "
                    "no sum could be revealed"
                )
            if fewest > self.min_responses:
                raise ValueError(
                    f"min_responses must be at least aggregation.min_devices={fewest}, got {self.min_responses}: "
                    "devices would pay for a sum that is not revealed"
                )
            try:
                sum_ring(self.aggregation, self.agreement)
            except AggregationError as error:
                raise ValueError(f"aggregation: {error}") from error
        elif self.aggregation.rule != "mean":
            self._check_robust_rule(self.aggregation.rule)
        if isinstance(self.training, UpsamplerTrainingConfig):
            if self.training.downscale != self.upsampling.downscale:
                raise ValueError(
                    "upsampling: downscale must be that of the training,  "
                    f"{format_degradation(self.training.downscale)} (training.downscale), "
                    f"got {format_degradation(self.upsampling.downscale)}"
                )
        if isinstance(self.privacy, PrivacyTarget):
            self._check_privacy(self.privacy)
        elif self.evaluation is not None:
            raise ValueError(
                "evaluation needs a privacy target: metrics on the devices' own photos always have noise"
            )

    def _check_robust_rule(self, rule: str) -> None:
        if isinstance(self.training, PriorTrainingConfig):
            raise ValueError(
                "aggregation: rule must be mean for prior-training, whose sums of latents grow with a library, "
                f"got {rule}"
            )
        if isinstance(self.privacy, PrivacyTarget) and self.privacy.noise == "central":
            raise ValueError(
                "aggregation: rule must be mean with central noise, which is calibrated to how far one device moves a "
                f"sum, got {rule}"
            )

    def _check_privacy(self, target: PrivacyTarget) -> None:
        if target.noise == "distributed":
            self._check_distributed(target)
        if isinstance(self.devices, SyntheticDevices) and target.unit != "library":
            photos = 1 if target.unit == "photo" else self.devices.photos_per_occasion
            bound = photos / self.devices.photos_per_device
            if target.delta >= bound:
                raise ValueError(
                    f"privacy: delta must lie below 1 / {target.unit}s of a device = {bound:g}, "
                    f"got {format_delta(target.delta)}"
                )
        if target.unit == "library":
            if target.noise == "central" and not isinstance(self.aggregation, PlainConfig):
                raise ValueError(
                    "aggregation must be plain with central noise, where the server adds the noise to the sum "
                    f"and must be able to read it; got {self.aggregation.kind}"
                )
            if isinstance(self.training, PriorTrainingConfig):
                raise ValueError(
                    "training: noise is added to sums of latents on the device; use privacy per photo or occasion"
                )
            if self.evaluation is not None:
                self._check_library_evaluation(self.evaluation)
        if self.evaluation is not None and self.upsampling.downscale.noise_std > 0:
            raise ValueError(
                "evaluation needs a downscale without noise, so that metrics depend on the photo alone"
            )

    def _check_distributed(self, target: PrivacyTarget) -> None:
        if not isinstance(self.aggregation, MaskedConfig):
            raise ValueError(
                "aggregation must be masked with distributed noise, since a single update has too little noise to "
                f"be seen by anyone; got {self.aggregation.kind}"
            )
        config, count = self.aggregation, self.devices.count
        graph = mask_graph(count, corrupt_share=config.corrupt_share, dropout_share=config.dropout_share)
        if graph.contributors < self.honest_devices:
            raise ValueError(
                f"aggregation: a sum of {count} devices may have the noise of only {graph.contributors} honest ones; "
                f"min_devices={config.min_devices} with privacy.honest_fraction={target.honest_fraction:g} relies on "
                f"{self.honest_devices}, so lower one of them"
            )
        if target.unit == "library":
            return
        if isinstance(self.training, GanTrainingConfig):
            raise ValueError(f"training: {GAN_NEEDS_LOCAL_NOISE}")
        if (steps := self.training.schedule().steps_per_round) != 1:
            raise ValueError(
                f"training: steps_per_round must be 1 with distributed noise per {target.unit}, since a second step "
                f"would read the first without noise; got {steps}"
            )

    def _check_library_evaluation(self, evaluation: EvaluationConfig) -> None:
        if evaluation.sampling_rate != 1:
            raise ValueError(
                "evaluation: sampling_rate must be 1 with privacy per library, since every device takes part, "
                f"got {evaluation.sampling_rate:g}"
            )
        if self.devices.count < (fewest := evaluation.metrics.min_group_size):
            raise ValueError(
                f"evaluation: groups smaller than min_group_size={fewest} are suppressed, and with privacy per library "
                f"each device counts as one, so no metric would be reported; got {self.devices.count} devices. "
                "Use more devices, privacy per photo or occasion, or no evaluation"
            )

    @property
    def agreement(self) -> AggregationParameters:
        """The aggregation parameters of devices and server; updates are divided by their public ranges."""
        return AggregationParameters(value_range=1.0, max_devices=max(2, self.most_devices))

    @property
    def most_devices(self) -> int:
        """How many devices are in one sum at most."""
        return self.devices.at_most if isinstance(self.devices, RemoteDevices) else self.devices.count

    def plan(self) -> Plan:
        """The mechanism that meets the privacy target; calibrating its noise takes a second or two."""
        evaluation: DPParameters | None = None
        if self.evaluation is not None and isinstance(self.privacy, PrivacyTarget):
            part = replace(self.privacy, epsilon=self.evaluation.epsilon_fraction * self.privacy.epsilon)
            evaluation = metrics_dp_parameters(
                part, EVALUATIONS, self.evaluation.sampling_rate, honest_devices=self.honest_devices
            )
        return make_plan(
            self.privacy,
            self.training.schedule(),
            update_clip_norm=self.update_clip_norm,
            honest_devices=self.honest_devices,
            evaluation=evaluation,
        )

    @property
    def honest_devices(self) -> int:
        """Of distributed noise: how many devices in the smallest sum must add their share; otherwise 0."""
        if not isinstance(self.privacy, PrivacyTarget) or self.privacy.noise != "distributed":
            return 0
        fewest = fewest_summed(self.aggregation, self.devices.count)
        return max(1, math.floor(self.privacy.honest_fraction * fewest))

    @property
    def holdout_fraction(self) -> float:
        """The fraction of each device's units that is not trained on."""
        return 0.0 if self.evaluation is None else self.evaluation.holdout_fraction

    def device_policy(self) -> DevicePolicy:
        """The policy of a simulated device: the given one, or one that allows exactly this run."""
        if self.policy is not None:
            return self.policy
        match self.privacy:
            case PrivacyTarget() as target:
                return DevicePolicy(
                    max_epsilon=target.epsilon, delta=target.delta, objectives=(self.training.objective,),
                    min_cohort_size=1, protocols=(self.aggregation.kind,), unit=target.unit,
                    trust_server=target.noise == "central", honest_fraction=target.honest_fraction,
                    evaluation=self.evaluation is not None, corrupt_share=corrupt_share(self.aggregation),
                )  # fmt: skip
            case NoPrivacy():
                return DevicePolicy(
                    max_epsilon=1.0, delta=1e-5, objectives=(self.training.objective,), min_cohort_size=1,
                    protocols=(self.aggregation.kind,), allow_no_dp=True, corrupt_share=corrupt_share(self.aggregation),
                )  # fmt: skip
            case _:
                assert_never(self.privacy)

    @property
    def rounds(self) -> int:
        """How many rounds the run has."""
        return self.training.schedule().rounds

    def method_for(self, model: Model) -> Method:
        """The upsampling method for this model."""
        return default_method(model) if self.upsampling.method is None else self.upsampling.method

    def start(self) -> Model:
        """The model before the first round, of the architecture that this training needs.

        Raises:
            WeightsError: The checkpoint cannot be read, or has another architecture.
            ConfigError: The method or the downscale of `upsampling` does not suit it.
        """
        bundled: Path
        architecture: type[Architecture]
        match self.training:
            case GanTrainingConfig():
                bundled, architecture = GAN_PATH, GanArchitecture
            case PriorTrainingConfig():
                bundled, architecture = ENCODER_PATH, EncoderArchitecture
            case FlowTrainingConfig():
                bundled, architecture = FLOW_PATH, FlowArchitecture
            case UpsamplerTrainingConfig(learner="style-encoder"):
                bundled, architecture = STYLE_ENCODER_PATH, StyleEncoderArchitecture
            case UpsamplerTrainingConfig():
                bundled, architecture = SUPER_RESOLUTION_PATH, SuperResolutionArchitecture
            case _:
                assert_never(self.training)
        model = load_as(self.base or bundled, architecture)
        # Checked before hours of training: otherwise the audits would fail after the last round.
        try:
            check_method(self.method_for(model), model, self.upsampling.downscale, size=model.size)
        except ConfigError as error:
            raise ConfigError(f"upsampling: {error}") from error
        return model

    def digest(self) -> str:
        """SHA-256 of all that training and the devices' evaluations depend on, the first 16 hex digits.

        Left out are audits and when a round begins and ends, which a resumed run may change, and the path of the base,
        whose weights are compared.
        """
        audits = {"question", "attack", "base"}
        audits |= {"upsampling"} if self.evaluation is None else set()
        audits |= {"probe"} if isinstance(self.devices, SyntheticDevices) else set()
        encoded = encode(self, leave_out=audits)
        if isinstance(self.devices, RemoteDevices):
            for waiting in ("at_least", "wait_minutes", "answer_minutes"):
                del encoded["devices"][waiting]
        return hashlib.sha256(json.dumps(encoded, sort_keys=True).encode()).hexdigest()[:16]


def devices_folder(run: Path) -> Path:
    """Where simulated devices keep keys and ledgers: beside a run's folder, which can be published without them."""
    return run.with_name(f"{run.name}.private")


def ranking_name(experiment: Experiment) -> str:
    """The name of the run that ranks models by an experiment."""
    return f"{experiment.name}-ranking"


def for_ranking(experiment: Experiment) -> Experiment:
    """The experiment with an evaluation of all photos, since nothing is trained.

    Raises:
        ConfigError: It has no privacy target.
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
        ConfigError: With file, line, key, what was expected and what came; or the file describes several runs.
    """
    if section(path, VARY) is not None:
        raise ConfigError(f"{path}: describes several runs (its key {VARY}); run them with `fedface compare`")
    return read_one(path, photos=photos, changes=from_here(changes or {}))


def from_here(changes: Mapping[str, str]) -> dict[str, str]:
    """Changes from the command line, where paths are relative to the current folder."""
    base = value_of("base", changes["base"]) if "base" in changes else None
    here = (
        {"base": json.dumps(str(local_path(Path(base), Path.cwd())))}
        if isinstance(base, str) and base
        else {}
    )
    return {**changes, **here}


def read_one(
    path: Path, *, photos: Path | None = None, changes: Mapping[str, str] | None = None
) -> Experiment:
    """Like `read_experiment`, for one of several runs that a file describes: `changes` say which.

    A `base` is relative to the folder of the file.
    """
    merged = dict(changes or {})
    first = read(path, Experiment, changes=merged, leave_out=(VARY,))
    if first.base is not None:
        merged["base"] = json.dumps(str(local_path(first.base, path.parent)))
    if photos is None:
        return first if first.base is None else read(path, Experiment, changes=merged, leave_out=(VARY,))
    if not isinstance(first.devices, LabelledDevices) and not isinstance(first.probe, LabelledProbe):
        raise ConfigError(
            f"{path}: --photos needs labelled devices or a labelled probe; this file has neither"
        )
    for part in ("devices", "probe"):
        if isinstance(getattr(first, part), (LabelledDevices, LabelledProbe)):
            merged[f"{part}.folder"] = json.dumps(str(photos))
    return read(path, Experiment, changes=merged, leave_out=(VARY,))
