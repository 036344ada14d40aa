"""From what the plan, the audits and the machine say to what the record holds.

Called by the coordinator when a run ends. Nothing is computed here but words; a number that is not finite
becomes a `NotMeasured` with its reason.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import assert_never

from fedface import number_format
from fedface.audits.bias import BiasReport
from fedface.audits.dp_metric_estimates import DPMetricEstimates, GroupEstimates
from fedface.audits.dp_ratio_estimates import DP_METRICS, DPRatioEstimate, describe
from fedface.audits.gradient_inversion import (
    AttackResult,
    CosineSearch,
    Defense,
    NoDefense,
    Search,
    SquaredSearch,
)
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.accounting import ADJACENCY, reconstruction_success_bound
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import NoPrivacy as NoTarget
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy_units import Unit, unit_in_words
from fedface.reports import formatting
from fedface.reports.device_metrics_record import DeviceMetricsGroup, DeviceMetricsRecord
from fedface.reports.run_record import (
    AttackRecord,
    BiasRecord,
    GapRecord,
    GroupRecord,
    MachineRecord,
    NoPrivacyRecord,
    PlanRecord,
)

PACKAGES = ("fedface", "torch", "flwr", "opacus", "tenseal", "dp-accounting", "numpy", "scikit-image")
_TELLING = ("skin_difference", "same_group", "consistency_error")  # what a short answer looks at first
THREAT = "Somebody who sees one device's update alone and knows the network: a server without encryption."
NOT_TESTED = (
    "a generator of faces as the attacker's prior",
    "several updates of one device put together",
    "a server that changes the network so that it leaks more",
)


def plan_record(plan: Plan) -> PlanRecord | NoPrivacyRecord:
    """A plan as the page prints it.

    Raises:
        ValueError: The plan makes a promise and its price is infinite, which `make_plan` rules out.
    """
    match plan.privacy:
        case NoTarget():
            return NoPrivacyRecord(no_privacy="no noise is added, so epsilon is infinite.")
        case PrivacyTarget(epsilon=target, delta=delta, unit=unit):
            bounds = plan.epsilon()
            price = bounds.measured() if bounds else NotMeasured(not_measured="none")
            if isinstance(price, NotMeasured):
                raise ValueError(f"a promise needs a finite price, got {bounds}")
            return PlanRecord(
                guarantee=formatting.promise_words(
                    unit=unit,
                    target=target,
                    delta=delta,
                    rounds=plan.schedule.rounds,
                    noise_at=plan.dp_parameters.noise_at,
                ),
                unit=unit,
                target_epsilon=target,
                epsilon=price,
                noise_multiplier=plan.noise_multiplier,
                sampling_rate=plan.schedule.sampling_rate,
                rounds=plan.schedule.rounds,
                steps_per_round=plan.schedule.steps_per_round,
                clip_norm=plan.schedule.clip_norm,
                expected_batch_size=float(plan.schedule.expected_batch_size),
                adjacency=ADJACENCY,
                adjacency_text=_neighbouring(unit),
                covers=unit_in_words(unit),
                noise_at=plan.dp_parameters.noise_at,
                update_clip_norm=plan.update_clip_norm if unit == "library" else 0.0,
                metrics_noise_multiplier=tuple(terms.noise_multiplier for terms in plan.additional_releases),
            )
        case _:
            assert_never(plan.promise)


def _neighbouring(unit: Unit) -> str:
    if unit == "library":
        return (
            "It compares a run with one in which a device's library is empty: the two give any model with nearly the "
            "same probability. The server, which adds the noise, is trusted and sees each device's update."
        )
    return (
        f"It compares a device's library with the same library without one {unit}: "
        "the two give any update with nearly the same probability."
    )


def bias_record(report: BiasReport, *, weights_hash: str, probe: str) -> BiasRecord:
    """An audit of bias as the page prints it; groups that were too small are named with their counts.

    Args:
        weights_hash: Of the weights that were audited.
        probe: Which photos, in words.
    """
    groups = [
        GroupRecord(group=name, count=service.consistency_error.count, metrics=dict(vars(service)))
        for name, service in report.groups.items()
    ]
    groups += [GroupRecord(group=name, count=count, metrics={}) for name, count in report.unmeasured.items()]
    return BiasRecord(
        weights_hash=weights_hash,
        probe=probe,
        photos=report.photos,
        faces_per_photo=report.faces_per_photo,
        overall=dict(vars(report.overall)),
        groups=tuple(groups),
        gaps={
            name: GapRecord(worst=gap.worst, best=gap.best, difference=gap.difference)
            for name, gap in report.gaps.items()
        },
        sentences=tuple(report.sentences()),
    )


def private_record(
    figures: DPMetricEstimates,
    *,
    when: str,
    weights_hash: str,
    method: str,
    devices: int,
    refusals: Sequence[str],
    epsilon: Epsilon | NotMeasured,
    noise_multiplier: float,
    answered: Sequence[str] = (),
) -> DeviceMetricsRecord:
    """What devices told of one model, as the page prints it; groups that were too small are named, without numbers.

    Args:
        figures: As read from the noised sum.
        when: "before", "after", or a candidate's name.
        weights_hash: Of the model in question.
        method: How photos were made large again, in words.
        devices: How many are in the sum.
        refusals: Why others are not, without names.
        epsilon: What the question cost one unit.
        noise_multiplier: Of each device; per library of the server.
        answered: Names of the devices in the sum.
    """
    few = f"below {figures.min_count:.0f} units, noise included"
    told = {name: _private_group(name, group) for name, group in figures.groups.items()}
    groups = [
        told.get(name) or DeviceMetricsGroup(group=name, units=NotMeasured(not_measured=few), figures={})
        for name in light_to_dark([*figures.groups, *figures.suppressed])
    ]
    overall = (
        DeviceMetricsGroup(group="all", units=NotMeasured(not_measured=few), figures={})
        if figures.overall is None
        else _private_group("all", figures.overall)
    )
    return DeviceMetricsRecord(
        when=when,
        weights_hash=weights_hash,
        method=method,
        devices=devices,
        refusals=tuple(refusals),
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        overall=overall,
        groups=tuple(groups),
        sentences=tuple(figures.sentences()),
        lead=_lead(figures),
        answered=tuple(answered),
    )


def _private_group(name: str, group: GroupEstimates) -> DeviceMetricsGroup:
    return DeviceMetricsGroup(
        group=name,
        units=group.count,
        figures={measure: group.estimate(measure) for measure in group.means},
        at_end=tuple(name for name, mean in group.means.items() if _at_end(mean)),
    )


def _at_end(mean: DPRatioEstimate) -> bool:
    """Whether noise pushed a mean to an end of its range, or beyond it."""
    lowest, highest = mean.ends
    return not lowest < mean.above / mean.below < highest


def light_to_dark(groups: Sequence[str]) -> list[str]:
    """Tone groups by the Monk steps in their names, lightest first; others stay in their order."""
    steps = [re.search(r"Monk (\d+)", name) for name in groups]
    if any(step is None for step in steps):
        return list(groups)
    return [
        name
        for _, name in sorted((int(step[1]), name) for step, name in zip(steps, groups, strict=True) if step)
    ]


def _lead(figures: DPMetricEstimates) -> str:
    """What devices' own photos say of whom a model serves worse, in one sentence: a clear gap, or what noise hides."""
    start = "By the devices' own photos"
    for measure in (*_TELLING, *figures.gaps):
        gap = figures.gaps.get(measure)
        if gap is not None and gap.clear and round(abs(gap.difference.estimate), DP_METRICS[measure].digits):
            worst, best = (figures.groups[name].estimate(measure) for name in (gap.worst, gap.best))
            return (
                f"{start}, {gap.worst} is served worse than {gap.best}: {DP_METRICS[measure].title} "
                f"{describe(worst, measure)} against {describe(best, measure)}, noise included."
            )
    for measure in _TELLING:
        if measure in figures.hidden:
            width = f"{figures.hidden[measure][0]:.{DP_METRICS[measure].digits}f} {DP_METRICS[measure].unit}".rstrip()
            return (
                f"{start}, nobody is shown to be served worse, but a gap in {DP_METRICS[measure].title} below {width} "
                "would be hidden by their number and the noise."
            )
    return (
        f"{start}, whom it serves worse cannot be said: no two groups are told from the noise "
        f"(at least {math.ceil(figures.min_count)} units each)."
    )


def attack_record(
    result: AttackResult,
    gallery: Interval,
    *,
    gallery_size: int,
    weights_hash: str,
    pictures: Sequence[str],
    threat: str = THREAT,
    not_tested: Sequence[str] = NOT_TESTED,
) -> AttackRecord:
    """An attack on updates as the page prints it.

    Args:
        result: Of `attack_update`.
        gallery: Of `candidate_identification` under the same defence.
        gallery_size: How many candidates the attacker was given.
        weights_hash: Of the network that was attacked.
        pictures: Names in the record's pictures.
    """
    ceiling = _ceiling(result.defense, gallery_size)
    return AttackRecord(
        threat=threat,
        defense=defence_words(result.defense),
        weights_hash=weights_hash,
        attack=f"{_search_words(result.search)}; one photo per update.",
        psnr=result.psnr,
        ssim=result.ssim,
        baseline_psnr=result.baseline_psnr,
        baseline_ssim=result.baseline_ssim,
        gain=result.gain,
        gallery=gallery,
        gallery_size=gallery_size,
        gallery_ceiling=ceiling,
        pictures=tuple(pictures),
        sentence=f"{_gain_words(result.gain)} {_gallery_words(gallery, gallery_size)}",
        not_tested=tuple(not_tested),
    )


def defence_words(defence: Defense) -> str:
    """A defence in a few words, such as a table's first column."""
    match defence:
        case NoDefense():
            return "no DP"
        case ClippedSum(clip_norm=clip_norm):
            return f"clipping at {number_format.constant(clip_norm)} alone"
        case GaussianSum(sigma=sigma):
            return f"DP sigma={sigma:.3g}"
        case _:
            assert_never(defence)


def machine_record() -> MachineRecord:
    """The cores that this process may use and the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineRecord(cores=len(os.sched_getaffinity(0)), memory_gib=round(memory / 2**30, 1))


def version_record(packages: Sequence[str] = PACKAGES) -> Mapping[str, str]:
    """The versions that the numbers depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _ceiling(defence: Defense, gallery_size: int) -> float:
    match defence:
        case NoDefense() | ClippedSum():
            return 1.0
        case GaussianSum():
            return reconstruction_success_bound(defence.event(), 1 / gallery_size)
        case _:
            assert_never(defence)


def _search_words(search: Search) -> str:
    match search:
        case CosineSearch(iterations=iterations, total_variation=weight):
            start = f"Cosine distance with total variation {number_format.constant(weight)}"
            return f"{start}, {iterations} steps of signed Adam"
        case SquaredSearch(evaluations=evaluations):
            return f"Squared distance, {evaluations} evaluations of L-BFGS"
        case _:
            assert_never(search)


def _gain_words(gain: Interval) -> str:
    if gain.low > 0:
        return "Pictures came back closer to the photos than a guess that does without the update."
    return (
        "No search in this list came closer to the photos than the mean public face; "
        "that does not prove that none could."
    )


def _gallery_words(gallery: Interval, gallery_size: int) -> str:
    named = number_format.percent(gallery.estimate) if gallery.estimate else f"0{number_format.SPACE}%"
    rng = number_format.percent(1 / gallery_size)
    verdict = "more often than chance" if gallery.low > 1 / gallery_size else "which chance alone explains"
    start = f"Among {gallery_size} candidates the right photo was named in {named} of updates"
    return f"{start} (chance {rng}), {verdict}."
