"""What the server measures of a model, as records: samples after each round, bias, leakage, cost of encryption.

Called by coordinator.py. Everything here looks at public pictures only: the probe, drawn faces, and what the
generator makes. An audit attacks updates computed from probe pictures, never a device's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from fedface.aggregation.encrypted import make_device, make_keys, make_server
from fedface.aggregation.protocol import Agreement, AggregationConfig, EncryptedConfig, PlainConfig
from fedface.audits.bias import DARKER_FROM, MEASURES, BiasReport, measure_bias, tone_histogram
from fedface.audits.disaggregate import mean_interval, rate_interval
from fedface.audits.features import compare_faces
from fedface.audits.inversion import (
    AttackResult,
    CosineSearch,
    Defence,
    NoDefence,
    attack_update,
    gallery_attack,
)
from fedface.experiment import AttackConfig, UpsamplingConfig
from fedface.federation.simulated import PublicFaces
from fedface.models.weights import Gan, weights_hash
from fedface.photos.tone import measure_tone
from fedface.privacy.accounting import success_ceiling
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.plan import Plan
from fedface.randomness import Streams
from fedface.reports.run import (
    AggregationRecord,
    AttackRecord,
    BiasRecord,
    Figure,
    GapRecord,
    GroupRecord,
    ToneRecord,
    figure,
)
from fedface.shapes import Images, LowImages, Vector
from fedface.upsampling.contracts import Upsampled
from fedface.upsampling.pulse import Pulse

SAMPLES = 256  # faces drawn from the generator for every figure of a round
MONK_NAMES = tuple(f"Monk {step}" for step in range(1, 11))


def sample_figures(gan: Gan, like_devices: Images, seed: int) -> dict[str, Figure]:
    """Distance of samples to faces like the devices', their mean Monk tone, and the share of darker ones."""
    streams = Streams(seed).child("samples")
    made = gan.generator.sample(SAMPLES, streams.generator("latents"))
    monk = measure_tone(made).monk.double().numpy()
    distance = compare_faces(like_devices, made, streams.numpy("blocks")).kernel
    figures = {
        "distance": distance,
        "monk": mean_interval(monk, streams.numpy("resamples")),
        "dark_share": rate_interval(int((monk >= DARKER_FROM).sum()), len(monk)),
    }
    return {name: figure(asdict(value), otherwise="too few faces") for name, value in figures.items()}


def tone_record(source: str, label: str, images: Images) -> ToneRecord:
    """The Monk histogram of some faces, by pixels."""
    counts = tone_histogram(images).counts
    return ToneRecord(source=source, label=label, groups=MONK_NAMES, counts=counts)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What PULSE made of the probe with one set of weights."""

    record: BiasRecord
    low: LowImages
    upsampled: Upsampled


def serve_probe(
    gan: Gan, probe: PublicFaces, config: UpsamplingConfig, seed: int, progress: Callable[[int, int], None]
) -> Served:
    """Shrink the probe, search it again, and compare group by group."""
    streams = Streams(seed).child("upsampling")
    low = config.downscale.apply(probe.images)
    search = Pulse(gan.generator, config.downscale, config.pulse, streams, progress=progress)
    found = search.upsample(low, faces_per_photo=config.faces_per_photo)
    report = measure_bias(
        probe.images,
        probe.groups,
        found,
        streams.numpy("bootstrap"),
        true_tone=probe.tone,
        expected=probe.expected,
    )
    return Served(record=bias_record(report, gan, probe), low=low, upsampled=found)


def bias_record(report: BiasReport, gan: Gan, probe: PublicFaces) -> BiasRecord:
    """An audit's report in the words of the run's record."""
    why = "fewer than two photos"

    def figures(service: object) -> dict[str, Figure]:
        return {name: figure(asdict(getattr(service, name)), otherwise=why) for name in MEASURES}

    groups = [
        GroupRecord(group=name, count=service.misfit.count, figures=figures(service))
        for name, service in report.groups.items()
    ]
    groups += [
        GroupRecord(group=name, count=count, figures={name: figure({}, otherwise=why) for name in MEASURES})
        for name, count in report.unmeasured.items()
    ]
    order = {name: i for i, name in enumerate(probe.expected)}
    return BiasRecord(
        weights_hash=weights_hash(gan.generator),
        probe=probe.description,
        photos=report.photos,
        faces_per_photo=report.faces_per_photo,
        overall=figures(report.overall),
        groups=tuple(sorted(groups, key=lambda group: order.get(group.group, len(order)))),
        gaps={
            name: GapRecord(
                worst=gap.worst, best=gap.best, difference=figure(asdict(gap.difference), otherwise=why)
            )
            for name, gap in report.gaps.items()
        },
        sentences=tuple(report.sentences()),
    )


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One attack with its pictures."""

    record: AttackRecord
    result: AttackResult


def attack_updates(
    gan: Gan, probe: PublicFaces, candidates: Images, plan: Plan, config: AttackConfig, seed: int
) -> list[Attacked]:
    """Invert one critic update on one picture, as it is and as the plan's mechanism releases it."""
    mechanism = plan.mechanism()
    # A run without a promise still asks what noise would have done: one unit of it.
    noised = mechanism if isinstance(mechanism, GaussianSum) else GaussianSum(
        clip_norm=mechanism.clip_norm, sigma=1.0
    )  # fmt: skip
    spread = torch.linspace(0, len(probe.images) - 1, config.photos).round().long()
    attacked = []
    for defence, name in ((NoDefence(), "no DP"), (noised, f"DP sigma={noised.sigma:.2f}")):
        streams = Streams(seed).child(f"attack/{name}")
        result = attack_update(
            gan.critic,
            probe.images[spread],
            defence,
            candidates,
            searches=(CosineSearch(iterations=config.iterations),),
            generator=streams.generator("search"),
        )
        gallery = gallery_attack(
            gan.critic,
            candidates[: config.candidates],
            defence,
            trials=config.trials,
            generator=streams.generator("gallery"),
        )
        attacked.append(
            Attacked(result=result, record=_attack_record(gan, name, defence, result, asdict(gallery), config, len(candidates)))
        )
    return attacked


def _attack_record(
    gan: Gan, name: str, defence: Defence, result: AttackResult, gallery: dict[str, float],
    config: AttackConfig, candidates: int,
) -> AttackRecord:  # fmt: skip
    size = min(config.candidates, candidates)
    ceiling = 1.0 if isinstance(defence, NoDefence) else success_ceiling(defence.event(), 1.0 / size)

    def told(values: object) -> Figure:
        return figure(asdict(values), otherwise="too few photos")  # type: ignore[call-overload]

    return AttackRecord(
        threat="an honest but curious server that sees one device's critic update, computed from one photo",
        defence=name,
        weights_hash=weights_hash(gan.critic),
        attack=f"gradient inversion: cosine distance, total variation, signed Adam, {config.iterations} steps",
        psnr=told(result.psnr),
        ssim=told(result.ssim),
        baseline_psnr=told(result.baseline_psnr),
        baseline_ssim=told(result.baseline_ssim),
        gain=told(result.gain),
        gallery=figure(gallery, otherwise="no trial"),
        gallery_size=size,
        gallery_ceiling=ceiling,
        pictures=("attack",),
        sentence=(
            f"With {name}, the attacker who knows {size} candidate photos named the right one in "
            f"{gallery['estimate']:.0%} of {int(gallery['count'])} updates "
            f"[{gallery['low']:.0%}, {gallery['high']:.0%}]; chance is {1 / size:.0%}"
            + (f", and no attack on one such release can exceed {ceiling:.0%}." if ceiling < 1 else ".")
        ),
        not_tested=(
            "attackers with a face prior, such as the generator itself",
            "updates of several steps or several photos at once",
            "a malicious server that changes the networks",
        ),
    )


def aggregation_costs(update: Vector, config: AggregationConfig, agreement: Agreement) -> list[AggregationRecord]:
    """Sum this update with itself under both protocols, for as many devices as the run has."""
    encrypted = config if isinstance(config, EncryptedConfig) else EncryptedConfig()
    truth = update * agreement.most_devices
    return [
        _cost(PlainConfig(), "the server reads every update", update, truth, agreement),
        _cost(encrypted, "any device with the shared key; the server reads only the sum", update, truth, agreement),
    ]


def _cost(
    config: AggregationConfig, sees: str, update: Vector, truth: Vector, agreement: Agreement
) -> AggregationRecord:
    device = make_device(config, agreement, make_keys(config, agreement))
    server = make_server(config, agreement)
    started = time.perf_counter()
    payloads = [device.protect(update, 1) for _ in range(agreement.most_devices)]
    protected = time.perf_counter()
    total = server.combine(payloads)
    combined = time.perf_counter()
    opened = device.reveal(total)
    revealed = time.perf_counter()
    return AggregationRecord(
        protocol=config.kind,
        sees=sees,
        bytes_per_device=payloads[0].nbytes,
        seconds_protect=(protected - started) / agreement.most_devices,
        seconds_combine=combined - protected,
        seconds_reveal=revealed - combined,
        max_error=float((opened - truth).abs().max()),
        count=agreement.most_devices,
    )


def examples(probe: PublicFaces) -> list[int]:
    """One or two pictures of each group, ten at most, for the picture of faces before and after."""
    per_group = 2 if len(probe.expected) <= 5 else 1
    chosen: list[int] = []
    for name in probe.expected:
        chosen += [i for i, group in enumerate(probe.groups) if group == name][:per_group]
    return chosen[:10]


def enlarged(low: LowImages, size: int) -> Images:
    """The low-resolution pictures enlarged by bicubic interpolation, for comparison."""
    return functional.interpolate(low, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
