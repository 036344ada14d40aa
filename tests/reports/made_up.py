"""A fictitious run for the tests of the reports. FIXTURE: no number in it was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedface.audits.bias import HALVES, METRICS, BiasReport, GroupMetrics, ToneHistogram, fairness_metrics
from fedface.audits.dp_metric_estimates import estimate_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig, PhotoMetrics, metric_vectors
from fedface.audits.gradient_inversion import AttackScores, CandidateIdentification, CosineSearch, NoDefense
from fedface.audits.group_metrics import Gap
from fedface.codec import encode
from fedface.experiment import EvaluationConfig
from fedface.measurements import Epsilon, Interval, Measurement, NotMeasured, rate_interval
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.plan import Plan, Schedule
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.reports import charts
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.run_record import (
    AggregationRecord,
    AttackRecord,
    BiasRecord,
    DeviceRecord,
    MachineRecord,
    PictureRecord,
    RefusalRecord,
    RoundRecord,
    RunRecord,
    ToneRecord,
)
from fedface.synthetic.faces import render
from fedface.synthetic.parameters import ToneMix, sample_faces

GROUPS = ("very light", "light", "intermediate", "tan", "brown", "dark")
BASE, FINAL = "0a" * 32, "f1" * 32
ROUNDS = 8
QUESTION = "Do eight phones of mostly darker faces mend a generator that was taught on lighter ones?"
COUNTS = {
    "devices": (110, 200, 220, 200, 640, 1130, 1300, 1400, 1500, 1300),
    "before": (42, 50, 70, 70, 121, 87, 31, 20, 12, 9),
    "after": (18, 20, 30, 31, 88, 106, 71, 50, 58, 40),
}

# Measure -> (typical value, spread) for the best served group; the worst is served twice as badly.
TYPICAL = {
    "consistency_error": (0.0011, 0.0002),
    "converged": (0.94, 0.03),
    "skin_difference": (6.2, 0.6),
    "face_difference": (9.1, 0.7),
    "lightness_shift": (1.4, 0.8),
    "ita_shift": (4.0, 2.5),
    "monk_shift": (-0.22, 0.12),
    "same_tone_bin": (0.71, 0.06),
    "same_half": (0.95, 0.03),
}


def around(estimate: float, half: float, count: int) -> Interval:
    """An interval of half width `half`."""
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, count=count)


def epsilon_after(rounds: int) -> Epsilon:
    """An epsilon that grows like the square root of rounds, to 7.9 after the last."""
    value = 7.9 * math.sqrt(rounds / ROUNDS)
    return Epsilon(lower=value - 0.02, estimate=value, upper=value + 0.02, delta=1e-5, unit="photo")


def probe_after(share: float, rng: np.random.Generator) -> dict[str, Measurement]:
    """Metrics of the probe after `share` of the rounds."""
    wobble = rng.normal(0, 0.04)
    return {
        "distance": around(3.1 - 1.5 * share + wobble, 0.22, 512),
        "monk": around(3.9 + 1.9 * share + wobble, 0.18, 512),
        "dark_fraction": around(0.14 + 0.29 * share + wobble / 8, 0.035, 512),
    }


def bias(worst: float, digest: str, rng: np.random.Generator) -> BiasRecord:
    """An audit in which the darkest group is served `worst` times as badly as the lightest."""
    groups = {}
    for index, name in enumerate(GROUPS):
        cost = 1 + (worst - 1) * index / (len(GROUPS) - 1)
        values = {}
        for metric, (typical, spread) in TYPICAL.items():
            rate = METRICS[metric].kind == "rate"
            value = 1 - (1 - typical) * cost if rate else typical * cost
            values[metric] = around(value + rng.normal(0, spread / 4), spread, 40)
        groups[name] = GroupMetrics(**values)
    gaps = {
        metric: Gap(worst="dark", best="very light", difference=around(spread * 8 * (worst - 1), spread, 80))
        for metric, (_, spread) in TYPICAL.items()
    }
    overall = {metric: around(typical, spread, 240) for metric, (typical, spread) in TYPICAL.items()}
    even = fairness_metrics(np.eye(2), HALVES)
    return BiasRecord(
        weights_hash=digest,
        probe="synthetic faces in neutral light",
        report=BiasReport(
            photos=240,
            faces_per_photo=4,
            overall=GroupMetrics(**{**overall, "skin_difference": around(7.9, 0.4, 240)}),
            groups=groups,
            counts=dict.fromkeys(GROUPS, 40),
            gaps=gaps,
            tone_bins=even,
            halves=even,
            darker_change=around(0.02, 0.05, 240),
        ),
    )


def attacks() -> tuple[AttackRecord, ...]:
    """One attack without and one with noise."""
    guess = {"baseline_psnr": around(14.1, 1.3, 6), "baseline_ssim": around(0.31, 0.08, 6)}
    return (
        AttackRecord(
            weights_hash=BASE,
            scores=AttackScores(
                defense=NoDefense(), search=CosineSearch(), psnr=around(22.4, 2.0, 6), ssim=around(0.81, 0.07, 6),
                gain=around(8.3, 1.9, 6), **guess,
            ),
            identification=CandidateIdentification(
                rate=Interval(1.0, 0.98, 1.0, 200), candidates=100, bound=1.0
            ),
            pictures=("attack",),
        ),
        AttackRecord(
            weights_hash=BASE,
            scores=AttackScores(
                defense=GaussianSum(clip_norm=1.0, sigma=1.0), search=CosineSearch(), psnr=around(7.2, 0.4, 6),
                ssim=around(0.02, 0.01, 6), gain=around(-6.9, 1.2, 6), **guess,
            ),
            identification=CandidateIdentification(
                rate=Interval(0.025, 0.011, 0.057, 200), candidates=100, bound=0.092
            ),
            pictures=("attack",),
        ),
    )  # fmt: skip


def tones(source: str) -> ToneRecord:
    """A histogram of skin tone."""
    counts, n = COUNTS[source], sum(COUNTS[source])
    darker = sum(counts[5:])
    histogram = ToneHistogram(
        counts=counts,
        shares=tuple(rate_interval(count, n) for count in counts),
        lighter=rate_interval(n - darker, n),
        darker=rate_interval(darker, n),
        count=n,
    )
    return ToneRecord(source=source, histogram=histogram)  # type: ignore[arg-type]


def made_up_run(folder: Path) -> RunRecord:
    """A run with plausible numbers, its pictures of synthetic faces written into `folder`."""
    rng = np.random.Generator(np.random.PCG64(7))
    answered = tuple(f"device-{index}" for index in range(1, 9))
    refusal = RefusalRecord(
        device="device-8",
        reason="this run requests epsilon 8.00; 5.10 of 10.00 is already spent.",
    )
    silent = RefusalRecord(device="device-3", reason="no answer within 60 s.")
    rounds = tuple(
        RoundRecord(
            round=number,
            participants=answered[:-1] if number > 5 else answered,
            refusals=(refusal,) if number > 5 else (),
            dropped=(silent,) if number == 2 else (),
            epsilon=epsilon_after(number),
            bytes_up=8 * 2_030_000,
            bytes_down=8 * 2_300_000,
            bytes_reveal=2_030_000 + 2_300_000,
            seconds=41.0 + rng.normal(0, 2),
            seconds_protect=0.21,
            seconds_combine=0.013,
            seconds_reveal=0.09,
            weights_hash=f"{number:02x}" * 32,
            metrics=probe_after(number / ROUNDS, rng),
        )
        for number in range(1, ROUNDS + 1)
    )
    draw_pictures(folder)
    return RunRecord(
        name="fixture-darker-faces",
        question=QUESTION,
        started="2026-01-05T09:12:00+00:00",
        finished="2026-01-05T09:19:41+00:00",
        command="fedface run experiments/darker-faces.yaml",
        versions={"fedface": "0.1.0", "torch": "2.13.0", "opacus": "1.6.0", "tenseal": "0.3.18"},
        machine=MachineRecord(cores=2, memory_gib=15.6),
        experiment={"question": "FIXTURE", "privacy": {"epsilon": 8.0, "delta": 1e-5}, "rounds": ROUNDS},
        plan=Plan(
            privacy=PrivacyTarget(epsilon=8.0, delta=1e-5),
            schedule=Schedule(
                rounds=ROUNDS, steps_per_round=20, sampling_rate=0.064, expected_batch_size=64, clip_norm=1.0
            ),
            noise_multiplier=0.874,
        ),
        planned_epsilon=epsilon_after(ROUNDS),
        base_hash=BASE,
        final_hash=FINAL,
        devices=tuple(
            DeviceRecord(
                id=name,
                description="synthetic faces, mostly dark" if index < 6 else "synthetic faces, even mix",
                photos=1000 if index else NotMeasured(not_measured="a real device keeps this to itself"),
            )
            for index, name in enumerate(answered)
        ),
        metrics_before=probe_after(0.0, rng),
        rounds=rounds,
        bias_before=bias(2.1, BASE, rng),
        bias_after=bias(1.3, FINAL, rng),
        tones=(tones("devices"), tones("before"), tones("after")),
        attacks=attacks(),
        aggregation=(
            AggregationRecord(
                protocol="masked BFV",
                sees="no single party",
                bytes_per_device=2_030_000,
                seconds_device=0.21,
                seconds_server=0.103,
                max_error=6e-6,
                count=20,
            ),
            AggregationRecord(
                protocol="plain",
                sees="the server",
                bytes_per_device=1_160_000,
                seconds_device=0.0006,
                seconds_server=0.0013,
                max_error=0.0,
                count=20,
            ),
        ),
        pictures={
            "faces": PictureRecord(
                file="faces.png",
                section="faces",
                caption="Synthetic faces: the truth, the upsampler's input, and its output.",
                alt="A grid of synthetic faces, four rows and six columns",
            ),
            "attack": PictureRecord(
                file="attack.png",
                section="attacks",
                caption="What was recovered from one update of the discriminator; every face is synthetic.",
                alt="A grid of synthetic faces and what an attack recovered",
            ),
        },
        notes=(
            "This is a fixture: none of its numbers was measured.",
            "Synthetic faces are not people. Results for them need not hold for photos.",
            "Skin tone is read from pixels and moves with light; it is not ethnicity.",
        ),
        withdrawals=(),
        device_metrics=(),
        reference={},
    )


def own_metrics(
    when: str, worst: float, counts: tuple[int, int, int], noise: float = 1.0
) -> DeviceMetricsRecord:
    """Metrics of three devices for light, medium and dark photos, the dark ones served `worst` times as badly."""
    config, rng = LocalMetricsConfig(), torch.Generator().manual_seed(11)
    group = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    badly = 1.0 + (worst - 1.0) * group / 2
    photos = PhotoMetrics(
        group=group,
        output_group=group,
        consistency_error=0.0006 * badly,
        skin_difference=5.0 * badly + torch.randn(len(group), generator=rng),
        lightness_shift=1.5 * badly,
        detected=torch.ones(len(group), dtype=torch.bool),
    )
    total = metric_vectors(photos, config, clip_norm=1.0).sum(0)
    total = total + noise * math.sqrt(3) * torch.randn(total.shape, generator=rng)
    read = estimate_metrics(total, config=config, clip_norm=1.0, noise_multiplier=noise, devices=3)
    return DeviceMetricsRecord(
        when=when,
        weights_hash=FINAL if when == "after" else BASE,
        method="PULSE",
        participants=("device-1", "device-2", "device-3"),
        refusals=(),
        epsilon=Epsilon(lower=3.99, estimate=4.0, upper=4.0, delta=1e-4, unit="occasion"),
        noise_multiplier=noise,
        estimates=read,
    )


def with_metrics(record: RunRecord, *reported: DeviceMetricsRecord) -> RunRecord:
    """The run with metrics of the devices' own photos."""
    return replace(
        record,
        device_metrics=reported,
        experiment={**record.experiment, "evaluation": encode(EvaluationConfig())},
    )


def draw_pictures(folder: Path) -> None:
    """The two grids of a fictitious run, of synthetic faces."""
    rng = torch.Generator().manual_seed(3)
    faces = torch.cat([render(sample_faces(1, ToneMix(light_fraction=1 - i / 5), rng), 64) for i in range(6)])
    low = torch.nn.functional.avg_pool2d(faces, 8)
    soft = torch.nn.functional.interpolate(low, size=64, mode="bicubic")
    after = (soft + faces) / 2
    rows = [("truth", faces), ("input, 8 pixels", low), ("before", soft * 0.8 + 0.2), ("after", after)]
    (folder / "faces.png").write_bytes(charts.face_grid(rows, GROUPS))
    noise = torch.rand(faces.shape, generator=rng)
    mean = faces.mean(dim=0, keepdim=True).expand_as(faces)
    found = [("recovered,\nno DP", (faces + 0.1 * noise).clamp(0, 1)), ("recovered,\nDP sigma 1", noise)]
    (folder / "attack.png").write_bytes(charts.attack_grid(faces, found, mean))
