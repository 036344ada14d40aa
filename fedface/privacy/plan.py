"""From a privacy target and a schedule to one mechanism and its price, once, before anything runs.

A device receives the parameters, never an epsilon, and prices them itself. The noise is the least with which everything
together meets the target: all rounds, and what is released beside them, such as evaluation metrics.

Noise is added in one of three places. Photo and occasion: on the device, in every private step ("local"). Library:
once to each round's sum of whole updates, each clipped to `update_clip_norm`, by the server, which is trusted with
them ("central"). Any unit: in shares by the devices, before what they send is masked ("distributed", see
privacy/distributed_noise.py); per photo or occasion a device then takes one private step in a round, and sends its sum.
The price follows from the noise multiplier alone, not from who adds the noise.

Source: DP-SGD, Abadi et al. (2016), arXiv:1607.00133; Poisson sampling with a public rate and divisor.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, assert_never

from fedface.measurements import Epsilon
from fedface.number_format import format_delta, rounded_up
from fedface.privacy.accounting import (
    ADJACENCY,
    GRID_DIGITS,
    MAX_NOISE_MULTIPLIER,
    calibrate_noise_multiplier,
    epsilon_of,
    reconstruction_success_bound,
)
from fedface.privacy.mechanism import ClipNorm, ClippedSum, Event, GaussianSum, SampledGaussian, round_floor
from fedface.privacy.privacy_target import Noise, NoPrivacy, PrivacyGuarantee, PrivacyTarget, check_noise
from fedface.privacy.releases import compose
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.privacy_units import Unit, describe_unit
from fedface.validation import AtLeast, Digits, In, checked

MAX_STEPS = 2_000  # of a round: more would keep a device busy for days, however cheap the noise makes them
MAX_EXPECTED_BATCH_SIZE = 10**9  # photos in a step


@dataclass(frozen=True, kw_only=True)
@checked
class Schedule:
    """How often a device looks at its units: photos, occasions or all it has. Every number is public and the same.

    The rate and the divisor are constants of the run, never derived from how many photos a device has: a
    divisor that follows the library tells 40 photos from 41.
    """

    rounds: Annotated[int, AtLeast(1)]
    steps_per_round: Annotated[int, In(f"[1, {MAX_STEPS}]")]  # private steps a device takes in one round
    # q, the probability with which a unit joins a step.
    sampling_rate: Annotated[float, In("(0, 1]"), Digits(GRID_DIGITS)]
    # What each step's sum is divided by.
    expected_batch_size: Annotated[int, In(f"[1, {MAX_EXPECTED_BATCH_SIZE}]")]
    clip_norm: ClipNorm  # longest gradient one unit can have in a step


@dataclass(frozen=True, kw_only=True)
@checked
class DPParameters:
    """What a run asks of a device: a schedule and a noise multiplier, which the device prices itself."""

    schedule: Schedule
    # sigma; exactly 0 means no privacy guarantee.
    noise_multiplier: Annotated[float, In(f"[0, {MAX_NOISE_MULTIPLIER:g}]"), Digits(GRID_DIGITS)]
    unit: Unit = "photo"  # whose vector is clipped: what the guarantee covers
    update_clip_norm: ClipNorm = 1.0  # unit library: longest update of one device, in public ranges
    noise: Noise = "local"
    # Of distributed noise: the fewest devices in each sum whose shares the server does not know; otherwise 0.
    honest_devices: Annotated[int, In(f"[0, {1 << 20}]")] = 0

    def __post_init__(self) -> None:
        check_noise(self.unit, self.noise)
        if self.sends_sums and self.schedule.steps_per_round != 1:
            raise ValueError(
                f"steps_per_round must be 1 with distributed noise per {self.unit}: a second step would read the "
                f"first without noise, got {self.schedule.steps_per_round}"
            )
        if (self.honest_devices > 0) != (self.noise == "distributed"):
            raise ValueError(
                "honest_devices must be at least 1 with distributed noise and 0 without, got "
                f"{self.honest_devices} with {self.noise} noise"
            )

    @property
    def is_private(self) -> bool:
        """Whether there is noise, hence a finite epsilon."""
        return self.noise_multiplier > 0

    @property
    def sends_sums(self) -> bool:
        """Whether a device sends the sum of its one private step, to which the devices' shares of noise are added."""
        return self.noise == "distributed" and self.unit != "library"

    def mechanism(self) -> GaussianSum | ClippedSum:
        """What each step computes on the device; its type says whether the device adds all of the noise to it."""
        released = self.released_mechanism()
        return released if self.noise == "local" else ClippedSum(clip_norm=self.schedule.clip_norm)

    def sum_mechanism(self) -> GaussianSum | None:
        """Per library: how whole updates are clipped and their sum is noised, in public ranges; otherwise None."""
        if self.is_private and self.unit == "library":
            return GaussianSum(clip_norm=self.update_clip_norm, sigma=self.noise_multiplier)
        return None

    def released_mechanism(self) -> GaussianSum | ClippedSum:
        """What is priced: the noised sum of each private step, or per library that of whole updates."""
        if not self.is_private:
            return ClippedSum(clip_norm=self.schedule.clip_norm)
        return self.sum_mechanism() or GaussianSum(
            clip_norm=self.schedule.clip_norm, sigma=self.noise_multiplier
        )

    def noises_in_sum(self, devices: int) -> float:
        """How many times the variance that belongs to the noise multiplier is in a sum over so many devices."""
        match self.noise:
            case "local":
                return float(devices)
            case "central":
                return 1.0
            case "distributed":
                return devices / self.honest_devices
            case _:
                assert_never(self.noise)

    def event(self, rounds: int | None = None) -> Event:
        """What `rounds` rounds (all of them if None) release about one unit, derived from the mechanism.

        Each round also pays `mechanism.round_floor`. Nothing is claimed from sampling at the server: every device may
        be asked in every round.
        """
        count = self.schedule.rounds if rounds is None else rounds
        if count < 1:
            raise ValueError(f"rounds must be at least 1, got {count}")
        floor = round_floor(count)
        mechanism = self.released_mechanism()
        match mechanism:
            case GaussianSum():
                steps, rate = self.schedule.steps_per_round, self.schedule.sampling_rate
                if self.unit == "library":
                    steps, rate = 1, 1.0
                sums = SampledGaussian(sampling_rate=rate, sum=mechanism, steps=count * steps)
                return compose([sums.event(), floor])
            case ClippedSum():
                return mechanism.event()
            case _:
                assert_never(mechanism)

    def metadata(self) -> dict[str, str]:
        """The terms in words, for a ledger entry: what was asked, of what unit, between which neighbours."""
        numbers = {**asdict(self.schedule), "noise_multiplier": self.noise_multiplier}
        asked = {**{name: f"{value:.12g}" for name, value in numbers.items()}, "unit": self.unit}
        if self.unit == "library":
            asked["update_clip_norm"] = f"{self.update_clip_norm:.12g}"
        if self.noise == "distributed":
            asked["honest_devices"] = str(self.honest_devices)
        return {
            **asked,
            "neighbours": ADJACENCY,
            "sampler": "everybody" if self.unit == "library" else "poisson",
            "noise": self.noise,
        }


@dataclass(frozen=True, kw_only=True)
class RunReleases:
    """Everything that one run releases about the same units, fixed at its first release: a change is a new run.

    Since all of it is fixed before the first answer, its privacy loss distributions compose, whatever the server asks
    first and wherever it stops: each release is a randomised function of one draw from its dominating pair, and all
    pairs can be drawn in advance (Zhu, Dong and Wang 2022, arXiv:2106.08567, Theorem 10; Vadhan and Zhang 2023,
    arXiv:2207.08335, for any interleaving).

    Raises:
        ValueError: There is neither training nor evaluation, or they differ in their unit or in who adds noise.
    """

    training: DPParameters | None = None  # None: the run only evaluates
    evaluation: DPParameters | None = None  # its schedule counts the evaluations; None: there are none

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a run needs training or evaluation, got neither")
        if len({(part.unit, part.is_private, part.noise, part.honest_devices) for part in self.parts}) > 1:
            raise ValueError(
                "training and evaluation of a run must share its privacy unit, who adds the noise, and both have "
                "noise or none"
            )

    @property
    def parts(self) -> list[DPParameters]:
        """What there is of training and evaluation."""
        return [part for part in (self.training, self.evaluation) if part is not None]

    @property
    def unit(self) -> Unit:
        """The privacy unit of the run."""
        return self.parts[0].unit

    def event(self) -> Event:
        """What the whole run releases about one unit."""
        return compose(part.event() for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A privacy guarantee, its schedule, and the noise that meets it. Made by `make_plan`."""

    privacy: PrivacyGuarantee
    schedule: Schedule
    noise_multiplier: float  # sigma; 0.0 only for NoPrivacy
    update_clip_norm: float = 1.0  # see DPParameters
    honest_devices: int = 0  # see DPParameters
    evaluation: DPParameters | None = None  # of the metrics that devices compute on their own photos

    def __post_init__(self) -> None:
        if (self.noise_multiplier > 0) != isinstance(self.privacy, PrivacyTarget):
            raise ValueError(f"{self.privacy} does not go with noise_multiplier {self.noise_multiplier}")

    @property
    def dp_parameters(self) -> DPParameters:
        """What is sent to a device."""
        unit: Unit = "photo"
        noise: Noise = "local"
        if isinstance(self.privacy, PrivacyTarget):
            unit, noise = self.privacy.unit, self.privacy.noise
        return DPParameters(
            schedule=self.schedule,
            noise_multiplier=self.noise_multiplier,
            unit=unit,
            update_clip_norm=self.update_clip_norm,
            noise=noise,
            honest_devices=self.honest_devices,
        )

    def mechanism(self) -> GaussianSum | ClippedSum:
        """What each private step releases."""
        return self.dp_parameters.mechanism()

    def metadata(self) -> dict[str, str]:
        """The terms in words, for a ledger entry."""
        return self.dp_parameters.metadata()

    def event(self, rounds: int | None = None) -> Event:
        """What `rounds` training rounds (all of them if None) release about one unit."""
        return self.dp_parameters.event(rounds)

    @property
    def releases(self) -> RunReleases:
        """Everything that the run releases, as devices record it."""
        return RunReleases(training=self.dp_parameters, evaluation=self.evaluation)

    def total_event(self) -> Event:
        """What everything releases about one unit: all rounds and all evaluations."""
        return self.releases.event()

    def epsilon(self) -> Epsilon | None:
        """The cost of everything at the target's delta; None without a guarantee."""
        match self.privacy:
            case PrivacyTarget(delta=delta, unit=unit):
                return epsilon_of(self.total_event(), delta, unit=unit)
            case NoPrivacy():
                return None
            case _:
                assert_never(self.privacy)

    def describe(self) -> list[str]:
        """The plan in words, one line each, for `fedface plan` and the report."""
        match self.privacy:
            case PrivacyTarget() as target:
                price = epsilon_of(self.total_event(), target.delta, unit=target.unit)
                return [
                    *self._steps(target.unit),
                    *self._noise(),
                    *(
                        []
                        if self.evaluation is None
                        else [
                            f"evaluation: {_counted(self.evaluation.schedule.rounds, 'set')} of metrics, noise "
                            f"multiplier {self.evaluation.noise_multiplier:g}"
                        ]
                    ),
                    f"privacy guarantee: epsilon at most {target.epsilon:g} at delta {format_delta(target.delta)} "
                    f"per {target.unit}, over the whole run; neighbouring libraries: {ADJACENCY}",
                    f"privacy unit: {describe_unit(target.unit)}",
                    f"privacy cost: {price}",
                    *_beside_others(self.total_event(), target),
                ]
            case NoPrivacy():
                return [
                    *self._steps("photo"),
                    "NO PRIVACY GUARANTEE: no noise, epsilon is infinite; devices refuse this by default",
                ]
            case _:
                assert_never(self.privacy)

    def _steps(self, unit: Unit) -> list[str]:
        s = self.schedule
        kind = "steps" if unit == "library" else "private steps"
        one = "photo" if unit == "library" else unit
        return [
            f"{_counted(s.rounds, 'round')} of {_counted(s.steps_per_round, kind.removesuffix('s'))} on each device",
            f"sampling rate {s.sampling_rate:g}: the probability that one {one} is part of a step; "
            f"each sum is divided by the expected batch size {s.expected_batch_size}",
            f"each {one}'s gradient is clipped to L2 norm {s.clip_norm:g}",
        ]

    def _noise(self) -> list[str]:
        s, sigma = self.schedule, self.noise_multiplier
        honest = self.honest_devices
        clipped, deviation = [], sigma * s.clip_norm / s.expected_batch_size
        if self.dp_parameters.unit == "library":
            deviation, norm = sigma * self.update_clip_norm, f"{self.update_clip_norm:g}"
            clipped = [f"each device's whole update is clipped to L2 norm {norm}, in public ranges"]
        match self.dp_parameters.noise:
            case "local":
                return [
                    f"noise multiplier {sigma:g}: Gaussian noise of standard deviation {deviation:.3g} on every number "
                    "and step",
                ]
            case "central":
                return [
                    *clipped,
                    f"noise multiplier {sigma:g}: the trusted server adds Gaussian noise of standard deviation "
                    f"{deviation:.3g} to every number of each round's sum",
                ]
            case "distributed":
                return [
                    *clipped,
                    f"noise multiplier {sigma:g}: each device adds discrete Gaussian noise of standard deviation "
                    f"{deviation / math.sqrt(honest):.3g} to every number before it is masked, so that any "
                    f"{_counted(honest, 'device')} in a round's sum add {deviation:.3g}",
                    f"the guarantee holds against the server and everyone else as long as {_counted(honest, 'device')} "
                    "in each sum add their noise and keep it from the server",
                ]


@dataclass(frozen=True, kw_only=True)
class AttackCeiling:
    """The highest success rate of any attack that names one of N known candidates, and from what it names it."""

    given: str  # what the attacker sees, a phrase that can follow "from"
    ceiling: float  # in [1 / N, 1]


def attack_ceilings(releases: RunReleases, candidates: int) -> tuple[AttackCeiling, ...]:
    """The ceilings of what the training of a run releases, from one step on, and of everything that the run releases.

    The first is what `audits.gradient_inversion` attacks. A ceiling holds for its own event alone: that of one step is
    not one of a whole update. Source: Hayes et al. (2023), arXiv:2302.07225, see `reconstruction_success_bound`.

    Args:
        releases: Everything that the run releases.
        candidates: N, at least 2.

    Returns:
        Empty without training or noise, where nothing is bounded below 1.
    """
    dp = releases.training
    if dp is None:
        return ()
    noise = dp.released_mechanism()
    if isinstance(noise, ClippedSum):
        return ()
    s = dp.schedule
    steps, q = (1, 1.0) if dp.unit == "library" else (s.steps_per_round, s.sampling_rate)

    def event(rate: float, count: int) -> Event:
        return SampledGaussian(sampling_rate=rate, sum=noise, steps=count).event()

    one = dp.unit
    events = {f"one step that surely holds the {one}": event(1.0, 1)}
    if q < 1:
        events[f"one step that the {one} joins with probability {q:g}"] = event(q, 1)
    if steps > 1:
        events[f"one update of {steps} steps, all of which hold the {one}"] = event(1.0, steps)
        events[f"one update of {steps} steps"] = event(q, steps)
    events[f"all {_counted(s.rounds, 'update')} of the run"] = event(q, s.rounds * steps)
    if releases.evaluation is not None:
        events["everything that the run releases, with its evaluations"] = releases.event()
    return tuple(
        AttackCeiling(given=given, ceiling=reconstruction_success_bound(released, 1 / candidates))
        for given, released in events.items()
    )


def make_plan(
    privacy: PrivacyGuarantee,
    schedule: Schedule,
    *,
    update_clip_norm: float = 1.0,
    honest_devices: int = 0,
    evaluation: DPParameters | None = None,
) -> Plan:
    """Find the least noise with which a schedule meets a privacy target.

    Args:
        privacy: The guarantee over everything, or `NoPrivacy()`.
        schedule: How often units are looked at.
        update_clip_norm: Longest update of one device, in public ranges; counts for unit library alone.
        honest_devices: With distributed noise, how many shares in each sum the server does not know.
        evaluation: What evaluation releases about the same units, with its noise already chosen.

    Returns:
        A plan whose upper price, with all additional releases, is at most the target epsilon.

    Raises:
        PrivacyError: No amount of noise meets the target.
    """
    plan = Plan(
        privacy=privacy,
        schedule=schedule,
        noise_multiplier=0.0 if isinstance(privacy, NoPrivacy) else MAX_NOISE_MULTIPLIER,
        update_clip_norm=update_clip_norm,
        honest_devices=honest_devices,
        evaluation=evaluation,
    )
    if isinstance(privacy, NoPrivacy):
        return plan
    sigma = calibrate_noise_multiplier(privacy, lambda s: replace(plan, noise_multiplier=s).total_event())
    return replace(plan, noise_multiplier=sigma)


def _beside_others(event: Event, target: PrivacyTarget) -> list[str]:
    """What the run counts for on a device that takes part in others too."""
    counted = filter_epsilon([(event, 1)], target.delta)
    return [
        f"beside other runs on the same device it counts as epsilon {rounded_up(counted)} at delta "
        f"{format_delta(target.delta)} per {target.unit}: a server may choose a run after it has seen the answers of "
        "others"
    ]


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
