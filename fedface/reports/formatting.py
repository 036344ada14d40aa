"""Numbers into words: how a report writes an interval, an epsilon, a size, a promise.

Called by reports.page and reports.card, so that both say the same. Nothing here computes a result.
"""

from __future__ import annotations

import math
from typing import Literal

from fedface import number_format
from fedface.audits.bias import METRICS
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.reports.run_record import AttackRecord, GapRecord, NoPrivacyRecord, PlanRecord, RunRecord

# What the probe says after each round: name -> (title, unit, whether zero belongs on the axis).
PROBE_FIGURES = {
    "distance": (
        "Distance to faces like the devices'",
        "kernel distance (squared MMD), lower is closer",
        True,
    ),
    "monk": ("Skin tone of samples", "mean Monk step, 1 light to 10 dark", False),
    "dark_fraction": ("Share of darker samples", "share of samples", True),
}
NO_DEFENCE = "no DP"  # in the words of filling.defence_words


def title_of(measure: str) -> str:
    """The title of a measure of bias, in the words of the audit."""
    return METRICS[measure].title if measure in METRICS else measure.replace("_", " ")


def unit_of(measure: str) -> str:
    """The unit of a measure of bias; empty for a share."""
    return METRICS[measure].unit.strip() if measure in METRICS else ""


def with_unit(text: str, measure: str) -> str:
    """A number and the unit of its measure, where it has one."""
    return f"{text} {unit_of(measure)}".rstrip()


def promise_words(*, unit: str, target: float, delta: float, rounds: int, noise_at: str) -> str:
    """The promise in one sentence, from its numbers."""
    price = f"is worth at most epsilon {number_format.constant(target)} at delta {number_format.format_delta(delta)} per {unit}"
    whom = f"to anybody who wants to know about one {unit}"
    if noise_at == "server":
        return (
            f"What the trusted server publishes of {number_format.counted(rounds, 'round')} {price} {whom}; "
            "the server itself sees all that each device sends, bare."
        )
    return f"All that leaves a device in {number_format.counted(rounds, 'round')} {price} {whom}."


def meaning(value: Epsilon, *, noise_at: Literal["device", "server"] = "device") -> str:
    """What an epsilon promises, as a bet about one unit: from one half to e^epsilon / (1 + e^epsilon)."""
    sure = 1.0 / (1.0 + math.exp(-value.upper))
    seen = "leaves a device" if noise_at == "device" else "is published by the server, which adds the noise"
    sentence = (
        f"Somebody who sees everything that ever {seen}, and who holds it for an even bet that one "
        f"{value.unit} was among those used, can afterwards be at most {number_format.at_most_percent(sure)} sure; besides, "
        f"the promise allows for exceptions that weigh {number_format.one_in(value.delta)} together."
    )
    if noise_at == "server":
        sentence += " It says nothing about the server, which sees all that each device sends, bare."
    if sure > 0.9:
        tested = (
            "the attacks in this report test" if noise_at == "device" else "no attack in this report tests"
        )
        sentence += f" Taken alone that is a weak bound; {tested} the noise behind it."
    return sentence


def promise(plan: PlanRecord | NoPrivacyRecord) -> str:
    """The promise in one sentence; older records have one without its delta."""
    match plan:
        case PlanRecord(guarantee=words) if "delta" in words:
            return words
        case PlanRecord():
            return promise_words(
                unit=plan.unit,
                target=plan.target_epsilon,
                delta=plan.epsilon.delta,
                rounds=plan.rounds,
                noise_at=plan.noise_at,
            )
        case NoPrivacyRecord(no_privacy=reason):
            return f"No promise: {reason}"


def spent(record: RunRecord) -> Epsilon | NotMeasured:
    """The privacy loss after the last round."""
    if not record.rounds:
        return NotMeasured(not_measured="no round was run")
    return record.rounds[-1].epsilon


def gap_sentence(gap: GapRecord, measure: str) -> str:
    """Who is served worse than whom by one measure."""
    title = title_of(measure)
    match gap.difference:
        case Interval(low=low, high=high) if low <= 0 <= high:
            return f"By {title}, no gap between groups is clear: {gap.difference}."
        case Interval():
            unit = f", in {unit_of(measure)}" if unit_of(measure) else ""
            return f"Served worse by {title}: {gap.worst} than {gap.best}; gap {gap.difference}{unit}."
        case NotMeasured(not_measured=reason):
            return f"By {title}, the gap between groups was not measured: {reason}."


def named_sentence(attack: AttackRecord) -> str:
    """How often an update gave away which photo was in it; inversion alone would give false comfort."""
    match attack.gallery:
        case Interval(estimate=rate, low=low, high=high, count=count):
            rng = number_format.percent(1 / attack.gallery_size)
            return (
                f"With {attack.defense}, somebody with {attack.gallery_size} candidate photos named the one in the "
                f"update in {number_format.percent(rate)} of cases [{number_format.percent(low)}, {number_format.percent(high)}] (n = {count}); chance is {rng}."
            )
        case NotMeasured(not_measured=reason):
            return f"With {attack.defense}, naming the photo in an update was not measured: {reason}."


def attack_sentence(attack: AttackRecord) -> str:
    """What one attack achieved beyond guessing."""
    match attack.gain:
        case Interval(low=low, high=high) as gain:
            verdict = "more than" if low > 0 else "less than" if high < 0 else "about as much as"
            start = f"With {attack.defense}, the attack recovered {verdict} a guess without the update"
            return f"{start}: {_gain(gain)}."
        case NotMeasured(not_measured=reason):
            return f"With {attack.defense}, what the attack recovered was not measured: {reason}."


def _gain(gain: Interval) -> str:
    return f"{number_format.signed(gain.estimate)} dB [{number_format.signed(gain.low)}, {number_format.signed(gain.high)}] (n{number_format.SPACE}={number_format.SPACE}{gain.count})"
