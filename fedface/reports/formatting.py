"""The sentences that the HTML report, the model card and the console share."""

from __future__ import annotations

import math
from typing import assert_never

from fedface import number_format
from fedface.audits.bias import METRICS
from fedface.audits.gradient_inversion import (
    AttackScores,
    CandidateIdentification,
    CosineSearch,
    Defense,
    NoDefense,
    SquaredSearch,
)
from fedface.audits.group_metrics import Gap
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import DPParameters, Plan, attack_ceilings
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.reports.run_record import AttackRecord, RunRecord

# The server's metrics after each round: name -> (title, unit, whether zero belongs on the axis).
SAMPLE_METRICS = {
    "distance": (
        "Distance to faces like the devices'",
        "kernel distance (squared MMD), lower is closer",
        True,
    ),
    "monk": ("Skin tone of samples", "mean Monk step, 1 light to 10 dark", False),
    "dark_fraction": ("Share of darker samples", "share of samples", True),
}


def title_of(metric: str) -> str:
    """The title of a bias metric."""
    return METRICS[metric].title


def unit_of(metric: str) -> str:
    """The unit of a bias metric; empty for a share."""
    return METRICS[metric].unit.strip()


def title_and_unit(metric: str) -> str:
    """The title of a bias metric, and its unit in brackets where it has one."""
    return f"{title_of(metric)} ({unit_of(metric)})" if unit_of(metric) else title_of(metric)


def with_unit(text: str, metric: str) -> str:
    """A number and the unit of its metric, where it has one."""
    return f"{text} {unit_of(metric)}".rstrip()


def privacy_guarantee(plan: Plan) -> str:
    """The privacy guarantee of a plan in one or two sentences."""
    match plan.privacy:
        case PrivacyTarget() as target:
            rounds = number_format.counted(plan.schedule.rounds, "round")
            bound = (
                f"at most epsilon {number_format.constant(target.epsilon)} at delta "
                f"{number_format.format_delta(target.delta)} per {target.unit}"
            )
            match plan.dp_parameters.noise:
                case "local":
                    return f"Everything that leaves a device in {rounds} satisfies differential privacy with {bound}."
                case "central":
                    return (
                        f"What the trusted server publishes about {rounds} satisfies differential privacy with "
                        f"{bound}. The server itself receives every update without noise."
                    )
                case "distributed":
                    return (
                        f"The sums that the server receives in {rounds} satisfy differential privacy with {bound}, "
                        f"{_if_honest(plan.dp_parameters)}. The server sees no single update without its mask."
                    )
        case _:
            return "No privacy guarantee: no noise is added, so epsilon is infinite."


def _if_honest(dp: DPParameters) -> str:
    devices = number_format.counted(dp.honest_devices, "device")
    return f"if at least {devices} in each sum add their share of the noise and keep it from the server"


def adjacency(dp: DPParameters) -> str:
    if dp.unit == "library":
        seen = (
            "The server, which adds the noise, is trusted and sees each device's update."
            if dp.noise == "central"
            else "Each device adds a share of the noise, and the server sees only sums."
        )
        return (
            "The guarantee compares a run with one in which a device's library is empty: both give any model with "
            f"nearly the same probability. {seen}"
        )
    seen = "sum over devices" if dp.noise == "distributed" else "update"
    return (
        f"The guarantee compares a device's library with the same library without one {dp.unit}: "
        f"both give any {seen} with nearly the same probability."
    )


def meaning(value: Epsilon, dp: DPParameters) -> str:
    """What an epsilon bounds: the posterior probability e^epsilon / (1 + e^epsilon) from a prior of one half."""
    posterior = 1.0 / (1.0 + math.exp(-value.upper))
    seen = {
        "local": "leaves a device",
        "central": "is published by the server, which adds the noise",
        "distributed": "the server can read, the sums over devices",
    }[dp.noise]
    sentence = (
        f"Someone with a prior of 50{number_format.SPACE}% that a given {value.unit} was used, who sees everything "
        f"that {seen}, can afterwards be at most {number_format.at_most_percent(posterior)} sure; the bound may fail "
        f"with a probability of {number_format.one_in(value.delta)}."
    )
    match dp.noise:
        case "central":
            sentence += (
                " It does not bound what the server learns, which receives every update without noise."
            )
        case "distributed":
            sentence += f" It holds against the server too, {_if_honest(dp)}."
    if posterior > 0.9:
        tested = (
            "the attacks in this report test the noise"
            if dp.noise == "local"
            else "no attack in this report tests the noise"
        )
        sentence += f" By itself this is a weak bound; {tested}."
    return sentence


def spent(record: RunRecord) -> Epsilon | NotMeasured:
    """The privacy loss after the last round."""
    if not record.rounds:
        return NotMeasured(not_measured="no round was run")
    return record.rounds[-1].epsilon


def intervals(old: Interval, new: Interval) -> str:
    """The 95 % intervals and counts of two compared estimates, such as before and after."""
    counts = " and ".join(dict.fromkeys(f"{each.count:,}" for each in (old, new)))
    return f"95 % intervals {old.texts()[1]} and {new.texts()[1]}, n{number_format.SPACE}={number_format.SPACE}{counts}"


def rate_interval(rate: Interval) -> str:
    """The interval of a rate, in percent."""
    return f"[{number_format.percent(rate.low)}, {number_format.percent(rate.high)}]"


def gap_sentence(gap: Gap, metric: str) -> str:
    """Who is served worse than whom by one metric."""
    title = title_of(metric)
    if not gap.clear:
        return f"By {title}, no gap between groups is clear: {gap.difference}."
    unit = f", in {unit_of(metric)}" if unit_of(metric) else ""
    return f"Served worse by {title}: {gap.worst} than {gap.best}; gap {gap.difference}{unit}."


def defense_label(defense: Defense) -> str:
    match defense:
        case NoDefense():
            return "no DP"
        case ClippedSum(clip_norm=clip_norm):
            return f"clipping to {number_format.constant(clip_norm)} only"
        case GaussianSum(sigma=sigma):
            return f"DP sigma={sigma:.3g}"
        case _:
            assert_never(defense)


def attack_description(attack: AttackRecord) -> str:
    """Which search was used, and what the scores show."""
    match attack.scores.search:
        case CosineSearch(iterations=iterations, total_variation=weight):
            search = (
                f"cosine distance with total variation {number_format.constant(weight)}, {iterations} steps of signed "
                "Adam"
            )
        case SquaredSearch(evaluations=evaluations):
            search = f"squared distance, {evaluations} evaluations of L-BFGS"
        case _:
            assert_never(attack.scores.search)
    result = (
        "The reconstructions are closer to the photos than a guess without the update."
        if attack.scores.gain.low > 0
        else "The attack did not come closer to the photos than the mean public face; that does not prove that no "
        "attack could."
    )
    return f"Attack: {search}; one photo per update. {result}"


def ceilings_sentence(plan: Plan, candidates: int) -> str:
    """What the privacy guarantee allows any attack, for each event; empty without noise."""
    ceilings = attack_ceilings(plan.releases, candidates)
    if not ceilings:
        return ""
    listed = "; ".join(f"from {each.given}: {number_format.percent(each.ceiling)}" for each in ceilings)
    return (
        f"The guarantee bounds how often any attack names the right one of {candidates} candidates: {listed}. "
        "The attack here saw the first."
    )


def identification_sentence(found: CandidateIdentification, defense: Defense) -> str:
    """How often an update revealed which candidate was in it."""
    guessing = 1 / found.candidates
    verdict = (
        "more often than guessing"
        if found.rate.low > guessing
        else "no more often than guessing would explain"
        if found.rate.low <= guessing <= found.rate.high
        else "less often than guessing"
    )
    return (
        f"With {defense_label(defense)}, an attacker with {found.candidates} candidate photos identified the one that "
        f"a step surely holds in {number_format.percent(found.rate.estimate)} of cases {rate_interval(found.rate)} "
        f"(n = {found.rate.count}), {verdict} ({number_format.percent(guessing)})."
    )


def inversion_sentence(scores: AttackScores) -> str:
    """What gradient inversion achieved beyond guessing."""
    gain = scores.gain
    verdict = "more than" if gain.low > 0 else "less than" if gain.high < 0 else "about as much as"
    low, high = number_format.signed(gain.low), number_format.signed(gain.high)
    shortened = f" {scores.shortened}" if scores.shortened else ""
    return (
        f"With {defense_label(scores.defense)}, gradient inversion recovered {verdict} a guess without the update: "
        f"{number_format.signed(gain.estimate)} dB [{low}, {high}] "
        f"(n{number_format.SPACE}={number_format.SPACE}{gain.count}).{shortened}"
    )
