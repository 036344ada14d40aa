"""Metrics that the server computes of a model: samples after each round, bias, leakage, cost of secure aggregation.

Everything here uses public images only: the probe, synthetic faces, and generated faces. An audit attacks updates
computed from images of the probe, never from a device's photos.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    MaskedConfig,
    PlainConfig,
)
from fedface.aggregation.rehearsal import rehearse_protocol
from fedface.audits.bias import DARKER_FROM, measure_bias
from fedface.audits.feature_distances import face_distance
from fedface.audits.gradient_inversion import (
    AttackResult,
    CosineSearch,
    NoDefense,
    attack_update,
    candidate_identification,
)
from fedface.audits.group_metrics import mean_interval
from fedface.errors import WeightsError
from fedface.experiment import AttackConfig, Experiment, UpsamplingConfig
from fedface.measurements import Measurement, NotMeasured, rate_interval
from fedface.models.checkpoint import weights_hash
from fedface.models.model import Model
from fedface.photos.skin_tone import measure_tone
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.plan import Plan
from fedface.public_data.device_photos import device_faces
from fedface.public_data.probe import PublicProbe
from fedface.randomness import Streams
from fedface.reports.formatting import defense_label
from fedface.reports.run_record import AggregationRecord, AttackRecord, BiasRecord
from fedface.tensor_types import Images, LowImages, Vector
from fedface.training.training_round import TrainingRound
from fedface.upsampling.degradation import Degradation, apply_degradation
from fedface.upsampling.methods import BASELINES, Method, default_method, make_upsampler
from fedface.upsampling.upsampler import Upsampled

MIN_FACES = 40  # minimum for a kernel distance
SAMPLES = 256  # faces sampled from the generator for the metrics of a round
MAX_SUMMED = 8  # updates whose encryption is measured: each takes seconds and megabytes


@dataclass(frozen=True, kw_only=True)
class ReferenceSet:
    """The faces with which every model of a run is compared."""

    faces: Images  # like the devices'
    inputs: Images  # other faces of the same distribution: inputs of upsamplers, degraded
    downscale: Degradation

    def samples(self, model: Model, count: int, rng: torch.Generator) -> Images:
        """A generator's samples, or an upsampler's outputs for degraded faces, clamped to [0, 1].

        Args:
            count: How many; an upsampler gives at most one for each face of `inputs`.
            rng: For a generator's latents.

        Raises:
            WeightsError: They are not finite.
        """
        if model.is_upsampler:
            images = upsample_with(model, self.inputs[:count], self.downscale)
        else:
            images = model.generator.sample(count, rng)
        if not bool(torch.isfinite(images).all()):
            raise WeightsError(
                "the model generates pictures that are not finite: its training has diverged. No device is asked "
                "again; start a new run with smaller learning rates"
            )
        return images


def upsample_with(model: Model, faces: Images, downscale: Degradation) -> Images:
    """An upsampler's outputs for degraded faces (n, 3, s, s), clamped to [0, 1]."""
    low = downscale.apply(faces).clamp(0.0, 1.0)
    upsampler = make_upsampler(default_method(model), model, downscale, Streams(0), size=model.size)
    return upsampler.upsample(low, faces_per_photo=1).images[:, 0]


def make_reference_set(experiment: Experiment, probe: PublicProbe, size: int) -> ReferenceSet:
    """Public faces like the devices'; the probe if the devices' faces are private."""
    parts = [device_faces(experiment, SAMPLES, size, part=part) for part in range(2)]
    faces, inputs = (probe.images if part is None or not len(part) else part for part in parts)
    return ReferenceSet(faces=faces, inputs=inputs, downscale=experiment.upsampling.downscale)


def sample_metrics(model: Model, reference: ReferenceSet, seed: int) -> dict[str, Measurement]:
    """Kernel distance of the samples to faces like the devices', their mean Monk tone, and the share of darker ones."""
    streams = Streams(seed).child("samples")
    like_devices = reference.faces
    generated = reference.samples(model, SAMPLES, streams.generator("latents"))
    monk = measure_tone(generated).monk.double().numpy()
    distance: Measurement = NotMeasured(not_measured=f"needs {MIN_FACES} faces to compare with")
    if len(like_devices) >= MIN_FACES:
        distance = face_distance(like_devices, generated, streams.numpy("blocks"))
    tones = {
        "monk": mean_interval(monk, streams.numpy("resamples")),
        "dark_fraction": rate_interval(int((monk >= DARKER_FROM).sum()), len(monk)),
    }
    return {"distance": distance, **tones}


@dataclass(frozen=True, kw_only=True)
class MethodEvaluation:
    """A method's outputs for the probe with one set of weights."""

    method: Method
    bias: BiasRecord  # its hash covers the networks that the method uses; empty if none
    low: LowImages
    upsampled: Upsampled
    seconds: float  # wall time of the search


def evaluate_on_probe(
    model: Model | None,
    probe: PublicProbe,
    config: UpsamplingConfig,
    method: Method,
    seed: int,
    progress: Callable[[int, int], None],
) -> MethodEvaluation:
    """Degrade the probe, upsample it, and compare by group; the model is None for methods without a network."""
    streams = Streams(seed).child("upsampling")
    low = apply_degradation(config.downscale, probe.images, streams.generator("camera"))
    size = probe.images.shape[-1]
    search = make_upsampler(method, model, config.downscale, streams, size=size, progress=progress)
    started = time.perf_counter()
    found = search.upsample(low, faces_per_photo=config.faces_per_photo)
    seconds = time.perf_counter() - started
    report = measure_bias(
        probe.images,
        probe.groups,
        found,
        streams.numpy("bootstrap"),
        true_tone=probe.tone,
        expected=probe.expected,
    )
    return MethodEvaluation(
        method=method,
        bias=BiasRecord(
            weights_hash=weights_hash(*_networks_of(method, model)), probe=probe.description, report=report
        ),
        low=low,
        upsampled=found,
        seconds=seconds,
    )


def _networks_of(method: Method, model: Model | None) -> tuple[nn.Module, ...]:
    """The networks that a method uses."""
    if model is None or method in BASELINES:
        return ()
    return (model.upsampler if model.is_upsampler else model.generator,)


@dataclass(frozen=True, kw_only=True)
class LeakageFinding:
    """One attack with its images."""

    record: AttackRecord
    result: AttackResult


def audit_update_leakage(
    work: TrainingRound, probe: PublicProbe, candidates: Images, plan: Plan, config: AttackConfig, seed: int
) -> list[LeakageFinding]:
    """Invert one step on one image, without noise and as the plan's mechanism releases it.

    A server that adds noise adds it to the sum, so a single update has none.
    """
    mechanism = plan.mechanism()
    # A run without DP shows the effect of noise with multiplier 1.
    noised = mechanism if isinstance(mechanism, GaussianSum) else GaussianSum(
        clip_norm=mechanism.clip_norm, sigma=1.0
    )  # fmt: skip
    spread = torch.linspace(0, len(probe.images) - 1, config.photos).round().long()
    known = candidates[: config.candidates]

    def attack(defense: NoDefense | GaussianSum) -> LeakageFinding:
        streams = Streams(seed).child(f"attack/{defense_label(defense)}")
        result = attack_update(
            work.per_example_release(Streams(seed).child("attack")),
            probe.images[spread],
            defense,
            candidates,
            searches=(CosineSearch(iterations=config.iterations),),
            generator=streams.generator("search"),
        )
        identification = candidate_identification(
            work.per_example_release(Streams(seed).child("attack")),
            known,
            defense,
            trials=config.trials,
            generator=streams.generator("gallery"),
        )
        record = AttackRecord(
            weights_hash=weights_hash(*work.model.modules()),
            scores=result.scores,
            identification=identification,
            pictures=("attack",),
        )
        return LeakageFinding(record=record, result=result)

    with ThreadPoolExecutor(2) as pool:
        noise_free = plan.dp_parameters.is_private and plan.dp_parameters.noise != "local"
        return list(pool.map(attack, (NoDefense(),) if noise_free else (NoDefense(), noised)))


def aggregation_costs(
    update: Vector, config: AggregationConfig, agreement: AggregationParameters, devices: int
) -> list[AggregationRecord]:
    """Sum this update with itself under each protocol, for so many devices."""
    no_one = "no one, unless more devices than the sum tolerates collude with the server"
    nor_without = f"{no_one}, which also needs the key of the devices"
    configs: list[tuple[AggregationConfig, str]] = [
        (PlainConfig(), "the server reads every update"),
        (config if isinstance(config, MaskedConfig) else MaskedConfig(), no_one),
        (config if isinstance(config, HomomorphicConfig) else HomomorphicConfig(), nor_without),
    ]
    return [_cost(each, sees, update, agreement, devices) for each, sees in configs]


def _cost(
    config: AggregationConfig, sees: str, update: Vector, agreement: AggregationParameters, devices: int
) -> AggregationRecord:
    done = rehearse_protocol(config, agreement, update, devices)
    return AggregationRecord(
        protocol=config.kind,
        sees=sees,
        bytes_per_device=round(done.bytes_up),
        seconds_device=done.seconds_device,
        seconds_server=done.seconds_server,
        max_error=float((done.result.total - devices * update).abs().max()),
        count=devices,
    )


def examples(probe: PublicProbe) -> list[int]:
    """The positions of one or two faces of each group, ten at most, to show before and after."""
    per_group = 2 if len(probe.expected) <= 5 else 1
    chosen: list[int] = []
    for name in probe.expected:
        chosen += [i for i, group in enumerate(probe.groups) if group == name][:per_group]
    return chosen[:10]
