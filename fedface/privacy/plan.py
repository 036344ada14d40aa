"""From a privacy target and a schedule to one mechanism and its price, once, before anything runs.

A device receives the parameters, never an epsilon, and prices them itself. The noise is the least with which everything
together meets the target: all rounds, and what is released beside them, such as evaluation metrics.

Where noise is added follows from the unit. Photo and occasion: on the device, in every private step. Library: on
the server, once to each round's sum of whole updates, each clipped to `update_clip_norm`; the server is trusted with
the sum. A third place is not built: on the device, as a discrete share of the noise that only the sum completes
(library without a trusted server, Kairouz et al. 2021, arXiv:2102.06387). It would be one more mechanism of
`DPParameters.central_mechanism`, clipped, noised and priced alike.

Source: DP-SGD, Abadi et al. (2016), arXiv:1607.00133; Poisson sampling with a public rate and divisor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal, assert_never

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
from fedface.privacy.privacy_target import NoPrivacy, PrivacyGuarantee, PrivacyTarget
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

    @property
    def is_private(self) -> bool:
        """Whether there is noise, hence a finite epsilon."""
        return self.noise_multiplier > 0

    @property
    def noise_at(self) -> Literal["device", "server"]:
        """Who adds the noise: the device in each step, or the server, trusted, to each sum."""
        return "server" if self.unit == "library" else "device"

    def mechanism(self) -> GaussianSum | ClippedSum:
        """What each step on the device releases; its type says whether the device adds noise."""
        if self.is_private and self.noise_at == "device":
            return GaussianSum(clip_norm=self.schedule.clip_norm, sigma=self.noise_multiplier)
        return ClippedSum(clip_norm=self.schedule.clip_norm)

    def central_mechanism(self) -> GaussianSum | None:
        """What cuts each device's whole update and noises their sum, in public ranges; None where steps do it."""
        if self.is_private and self.noise_at == "server":
            return GaussianSum(clip_norm=self.update_clip_norm, sigma=self.noise_multiplier)
        return None

    def event(self, rounds: int | None = None) -> Event:
        """What `rounds` rounds (all of them if None) release about one unit, derived from the mechanism.

        Each round also pays `mechanism.round_floor`. Nothing is claimed from sampling at the server: every device may
        be asked in every round.
        """
        count = self.schedule.rounds if rounds is None else rounds
        if count < 1:
            raise ValueError(f"rounds must be at least 1, got {count}")
        floor = round_floor(count)
        at_server = self.central_mechanism()
        if at_server is not None:
            return compose([SampledGaussian(sampling_rate=1.0, sum=at_server, steps=count).event(), floor])
        mechanism = self.mechanism()
        match mechanism:
            case GaussianSum():
                steps = SampledGaussian(
                    sampling_rate=self.schedule.sampling_rate,
                    sum=mechanism,
                    steps=count * self.schedule.steps_per_round,
                )
                return compose([steps.event(), floor])
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
        return {
            **asked,
            "neighbours": ADJACENCY,
            "sampler": "everybody" if self.unit == "library" else "poisson",
            "noise_at": self.noise_at,
        }


@dataclass(frozen=True, kw_only=True)
class RunReleases:
    """Everything that one run releases about the same units, fixed at its first release: a change is a new run.

    Since all of it is fixed before the first answer, its privacy loss distributions compose, whatever the server asks
    first and wherever it stops: each release is a randomised function of one draw from its dominating pair, and all
    pairs can be drawn in advance (Zhu, Dong and Wang 2022, arXiv:2106.08567, Theorem 10; Vadhan and Zhang 2023,
    arXiv:2207.08335, for any interleaving).

    Raises:
        ValueError: There is neither training nor evaluation, or they differ in their unit or in whether there is noise.
    """

    training: DPParameters | None = None  # None: the run only evaluates
    evaluation: DPParameters | None = None  # its schedule counts the evaluations; None: there are none

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a run needs training or evaluation, got neither")
        if len({(part.unit, part.is_private) for part in self.parts}) > 1:
            raise ValueError(
                "training and evaluation of a run must share its privacy unit, and both have noise or none"
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
    evaluation: DPParameters | None = None  # of the metrics that devices compute on their own photos

    def __post_init__(self) -> None:
        if (self.noise_multiplier > 0) != isinstance(self.privacy, PrivacyTarget):
            raise ValueError(f"{self.privacy} does not go with noise_multiplier {self.noise_multiplier}")

    @property
    def dp_parameters(self) -> DPParameters:
        """What is sent to a device."""
        return _terms(self.privacy, self.schedule, self.noise_multiplier, self.update_clip_norm)

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
                    *self._noise(target.unit),
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

    def _noise(self, unit: Unit) -> list[str]:
        s, sigma = self.schedule, self.noise_multiplier
        if unit == "library":
            return [
                f"each device's whole update is clipped to L2 norm {self.update_clip_norm:g}, in public ranges",
                f"noise multiplier {sigma:g}: the trusted server adds Gaussian noise of standard deviation "
                f"{sigma * self.update_clip_norm:.3g} to every number of each round's sum",
            ]
        return [
            f"noise multiplier {sigma:g}: Gaussian noise of standard deviation "
            f"{sigma * s.clip_norm / s.expected_batch_size:.3g} on every number and step",
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
    noise = dp.central_mechanism() or dp.mechanism()
    if isinstance(noise, ClippedSum):
        return ()
    s = dp.schedule
    steps, q = (1, 1.0) if dp.noise_at == "server" else (s.steps_per_round, s.sampling_rate)

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
    evaluation: DPParameters | None = None,
) -> Plan:
    """Find the least noise with which a schedule meets a privacy target.

    Args:
        privacy: The guarantee over everything, or `NoPrivacy()`.
        schedule: How often units are looked at.
        update_clip_norm: Longest update of one device, in public ranges; counts for unit library alone.
        evaluation: What evaluation releases about the same units, with its noise already chosen.

    Returns:
        A plan whose upper price, with all additional releases, is at most the target epsilon.

    Raises:
        PrivacyError: No amount of noise meets the target.
    """
    match privacy:
        case PrivacyTarget():
            others = [] if evaluation is None else [evaluation.event()]

            sigma = calibrate_noise_multiplier(
                privacy, lambda s: compose([_terms(privacy, schedule, s, update_clip_norm).event(), *others])
            )
        case NoPrivacy():
            sigma = 0.0
        case _:
            assert_never(privacy)
    return Plan(
        privacy=privacy,
        schedule=schedule,
        noise_multiplier=sigma,
        update_clip_norm=update_clip_norm,
        evaluation=evaluation,
    )


def _terms(
    privacy: PrivacyGuarantee, schedule: Schedule, sigma: float, update_clip_norm: float
) -> DPParameters:
    unit: Unit = privacy.unit if isinstance(privacy, PrivacyTarget) else "photo"
    return DPParameters(
        schedule=schedule, noise_multiplier=sigma, unit=unit, update_clip_norm=update_clip_norm
    )


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
