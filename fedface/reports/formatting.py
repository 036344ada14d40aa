"""Numbers into words: how a report writes an interval, an epsilon, a size, a promise.

Called by reports.page and reports.card, so that both say the same. Nothing here computes a result.
"""

from __future__ import annotations

import math
from typing import Literal

from fedface.audits.bias import METRICS
from fedface.privacy.privacy_target import format_delta
from fedface.reports.measurements import Epsilon, Interval, Measurement, NotMeasured, rounded_down, rounded_up
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
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


def number(value: float, digits: int = 3) -> str:
    """A number to read: three significant digits, no exponent from 0.0001 to a million, a true minus sign."""
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{short}e{int(exponent)}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}".replace("-", "−")


def constant(value: float) -> str:
    """A number that somebody chose, as they would write it: no zeros at its end."""
    return f"{value:g}".replace("e-0", "e-").replace("-", "−")


def delta_words(delta: float) -> str:
    """A delta to read: 0.001, 1e−4."""
    return format_delta(delta).replace("-", "−")


def signed(value: float) -> str:
    """A difference in dB to read, with its sign and one place."""
    return f"{value:+.1f}".replace("-", "−")


def interval(value: Interval) -> tuple[str, str]:
    """The estimate and `[low, high]`, with places enough for two digits of half its width."""
    half = (value.high - value.low) / 2
    if not 1e-6 <= half < 1e6:
        return number(value.estimate), f"[{number(value.low)}, {number(value.high)}]"
    places = max(0, 1 - math.floor(math.log10(half)))
    if value.estimate and abs(value.estimate) < 0.5 * 10.0**-places:  # a small number is no perfect zero
        places = min(6, -math.floor(math.log10(abs(value.estimate))))
    texts = [f"{end:,.{places}f}".replace("-", "−") for end in (value.estimate, value.low, value.high)]
    return texts[0], f"[{texts[1]}, {texts[2]}]"


def figure(value: Measurement) -> str:
    """`3.21 [2.80, 3.70], n = 60`, or `not measured: why`."""
    match value:
        case Interval(count=count):
            estimate, ends = interval(value)
            return f"{estimate} {ends}, n{SPACE}={SPACE}{count:,}"
        case NotMeasured(not_measured=reason):
            return f"not measured: {reason}"


def epsilon(value: Epsilon | NotMeasured) -> str:
    """`epsilon 7.998 (between 7.998 and 8.000) at delta 1e-5 per photo`, or `not measured: why`."""
    match value:
        case Epsilon(estimate=estimate, delta=delta, unit=unit):
            return f"epsilon {number(estimate, 4)} ({bounds(value)}) at delta {delta_words(delta)} per {unit}"
        case NotMeasured(not_measured=reason):
            return f"not measured: {reason}"


def bounds(value: Epsilon) -> str:
    """`between 7.998 and 8.000`, rounded outwards."""
    return f"between {rounded_down(value.lower)} and {rounded_up(value.upper)}"


def counted(count: int, word: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def size(count: float) -> str:
    """Bytes to read, in powers of a thousand."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}bytes"


def seconds(value: float) -> str:
    """A duration to read, from milliseconds to hours."""
    if value < 1:
        return f"{number(value * 1000, 2)}{SPACE}ms"
    if value < 120:
        return f"{number(value)}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share in percent; close to all is not rounded up to all."""
    if share >= 1:
        return f"100{SPACE}%"
    if share < 0.99:
        return f"{number(100 * share, 2)}{SPACE}%"
    places = min(12, max(0, -2 - math.floor(math.log10(1 - share))))
    return f"{math.floor(100 * share * 10**places) / 10**places:.{places}f}{SPACE}%"


def at_most_percent(share: float) -> str:
    """An upper bound in percent, rounded up; to all only where the rest is too small to print."""
    if share > 1 - 1e-10:
        return f"100{SPACE}%"
    places = min(12, max(1, -1 - math.floor(math.log10(1 - share))))
    return f"{math.ceil(100 * share * 10**places) / 10**places:.{places}f}{SPACE}%"


def one_in(probability: float) -> str:
    """A small probability to read: `1 in 100,000`."""
    return f"1 in {round(1 / probability):,}"


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
    price = f"is worth at most epsilon {constant(target)} at delta {delta_words(delta)} per {unit}"
    whom = f"to anybody who wants to know about one {unit}"
    if noise_at == "server":
        return (
            f"What the trusted server publishes of {counted(rounds, 'round')} {price} {whom}; "
            "the server itself sees all that each device sends, bare."
        )
    return f"All that leaves a device in {counted(rounds, 'round')} {price} {whom}."


def meaning(value: Epsilon, *, noise_at: Literal["device", "server"] = "device") -> str:
    """What an epsilon promises, as a bet about one unit: from one half to e^epsilon / (1 + e^epsilon)."""
    sure = 1.0 / (1.0 + math.exp(-value.upper))
    seen = "leaves a device" if noise_at == "device" else "is published by the server, which adds the noise"
    sentence = (
        f"Somebody who sees everything that ever {seen}, and who holds it for an even bet that one "
        f"{value.unit} was among those used, can afterwards be at most {at_most_percent(sure)} sure; besides, "
        f"the promise allows for exceptions that weigh {one_in(value.delta)} together."
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
            return f"By {title}, no gap between groups is clear: {figure(gap.difference)}."
        case Interval():
            unit = f", in {unit_of(measure)}" if unit_of(measure) else ""
            return (
                f"Served worse by {title}: {gap.worst} than {gap.best}; gap {figure(gap.difference)}{unit}."
            )
        case NotMeasured(not_measured=reason):
            return f"By {title}, the gap between groups was not measured: {reason}."


def share(rate: float) -> str:
    """A share in percent that may be nothing at all."""
    return percent(rate) if rate else f"0{SPACE}%"


def named_sentence(attack: AttackRecord) -> str:
    """How often an update gave away which photo was in it; inversion alone would give false comfort."""
    match attack.gallery:
        case Interval(estimate=rate, low=low, high=high, count=count):
            rng = percent(1 / attack.gallery_size)
            return (
                f"With {attack.defense}, somebody with {attack.gallery_size} candidate photos named the one in the "
                f"update in {share(rate)} of cases [{share(low)}, {share(high)}] (n = {count}); chance is {rng}."
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
    return (
        f"{signed(gain.estimate)} dB [{signed(gain.low)}, {signed(gain.high)}] (n{SPACE}={SPACE}{gain.count})"
    )
