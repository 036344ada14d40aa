"""From a promise and a schedule to one mechanism and its price, once, before anything runs.

Called from experiment.py and `fedface check` (make_plan), and on the device, which receives the terms, never
an epsilon, and prices them itself. The noise is set so that all rounds together keep a photo's promise.
Source: DP-SGD, Abadi et al. (2016), arXiv:1607.00133; Poisson sampling with a public rate and divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, assert_never

from fedface.errors import PrivacyError
from fedface.privacy.accounting import ADJACENCY, Bounds, epsilon_of, noise_for
from fedface.privacy.mechanism import ClippedSum, Event, GaussianSum, SampledGaussian, check_clip_norm
from fedface.privacy.target import NoPromise, PrivacyTarget, Promise

MOST_EXPECTED = 10**9  # photos in a step
MOST_NOISE = 1e7  # ten times what a plan may ask for; the noise itself stays finite in float32


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often a device looks at its photos. Every number is public and the same for every device.

    The rate and the divisor are constants of the run, never derived from how many photos a device has: a
    divisor that follows the library tells 40 photos from 41.
    """

    rounds: int  # >= 1
    steps_per_round: int  # private steps a device takes in one round, >= 1
    sampling_rate: float  # q: the probability with which a photo joins a step, 0 < q <= 1
    expected_batch: int  # what each step's sum is divided by, >= 1
    clip_norm: float  # longest gradient one photo can have, > 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.steps_per_round < 1:
            raise ValueError(f"steps_per_round must be at least 1, got {self.steps_per_round}")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}")
        if self.expected_batch < 1:
            raise ValueError(f"expected_batch must be at least 1, got {self.expected_batch}")
        if self.expected_batch > MOST_EXPECTED:
            raise ValueError(f"expected_batch must be at most {MOST_EXPECTED}, got {self.expected_batch}")
        check_clip_norm(self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a run asks of a device: a schedule and a noise multiplier, which the device prices itself."""

    schedule: Schedule
    noise_multiplier: float  # sigma >= 0; exactly 0 means that nothing is promised

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier <= MOST_NOISE:
            raise ValueError(f"noise_multiplier must lie in [0, {MOST_NOISE:g}], got {self.noise_multiplier}")

    @property
    def promises(self) -> bool:
        """Whether there is noise, hence a finite epsilon."""
        return self.noise_multiplier > 0

    def mechanism(self) -> GaussianSum | ClippedSum:
        """What each private step releases; its type says whether noise is added."""
        if self.promises:
            return GaussianSum(clip_norm=self.schedule.clip_norm, sigma=self.noise_multiplier)
        return ClippedSum(clip_norm=self.schedule.clip_norm)

    def event(self, rounds: int | None = None) -> Event:
        """What `rounds` rounds (all of them if None) release about one photo, derived from the mechanism."""
        count = self.schedule.rounds if rounds is None else rounds
        if count < 1:
            raise ValueError(f"rounds must be at least 1, got {count}")
        mechanism = self.mechanism()
        match mechanism:
            case GaussianSum():
                return SampledGaussian(
                    sampling_rate=self.schedule.sampling_rate,
                    sum=mechanism,
                    steps=count * self.schedule.steps_per_round,
                ).event()
            case ClippedSum():
                return mechanism.event()
            case _:
                assert_never(mechanism)

    def to_record(self) -> dict[str, int | float]:
        """A flat dict of numbers, for a task on the wire."""
        return {**asdict(self.schedule), "noise_multiplier": self.noise_multiplier}

    def marks(self) -> dict[str, str]:
        """The terms in words, for a ledger entry: what was asked, of what unit, between which neighbours."""
        asked = {key: f"{value:.12g}" for key, value in self.to_record().items()}
        return {**asked, "unit": "photo", "neighbours": ADJACENCY, "sampler": "poisson"}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Terms:
        """The terms that `to_record` wrote, checked anew: the sender is not trusted.

        Raises:
            PrivacyError: A key is missing, unknown or out of bounds.
        """
        wanted = {*(field.name for field in fields(Schedule)), "noise_multiplier"}
        if set(record) != wanted:
            raise PrivacyError(f"terms need exactly the keys {sorted(wanted)}, got {sorted(record)}")
        try:
            schedule = Schedule(
                rounds=int(record["rounds"]),
                steps_per_round=int(record["steps_per_round"]),
                sampling_rate=float(record["sampling_rate"]),
                expected_batch=int(record["expected_batch"]),
                clip_norm=float(record["clip_norm"]),
            )
            return Terms(schedule=schedule, noise_multiplier=float(record["noise_multiplier"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise PrivacyError(f"terms out of bounds: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A promise, its schedule, and the noise that keeps it. Made by `make_plan`."""

    promise: Promise
    schedule: Schedule
    noise_multiplier: float  # sigma; 0.0 only for NoPromise

    def __post_init__(self) -> None:
        if (self.noise_multiplier > 0) != isinstance(self.promise, PrivacyTarget):
            raise ValueError(f"{self.promise} does not go with noise_multiplier {self.noise_multiplier}")

    @property
    def terms(self) -> Terms:
        """What is sent to a device."""
        return Terms(schedule=self.schedule, noise_multiplier=self.noise_multiplier)

    def mechanism(self) -> GaussianSum | ClippedSum:
        """What each private step releases."""
        return self.terms.mechanism()

    def marks(self) -> dict[str, str]:
        """The terms in words, for a ledger entry."""
        return self.terms.marks()

    def event(self, rounds: int | None = None) -> Event:
        """What `rounds` rounds (all of them if None) release about one photo."""
        return self.terms.event(rounds)

    def epsilon(self) -> Bounds | None:
        """The price of all rounds at the promise's delta; None where nothing is promised."""
        match self.promise:
            case PrivacyTarget(delta=delta):
                return epsilon_of(self.event(), delta)
            case NoPromise():
                return None
            case _:
                assert_never(self.promise)

    def describe(self) -> list[str]:
        """The plan in words, one line each, for `fedface check` and the report."""
        s = self.schedule
        lines = [
            f"{_counted(s.rounds, 'round')} of {_counted(s.steps_per_round, 'private step')} on each device",
            f"each photo joins a step with probability {s.sampling_rate:g}; "
            f"every sum is divided by {s.expected_batch}",
            f"one photo's gradient is cut to length {s.clip_norm:g}",
        ]
        match self.promise:
            case PrivacyTarget() as target:
                bounds = epsilon_of(self.event(), target.delta)
                lines += [
                    f"noise multiplier {self.noise_multiplier:.4f}: standard deviation "
                    f"{self.noise_multiplier * s.clip_norm / s.expected_batch:.3g} on every number and step",
                    f"promise: epsilon at most {target.epsilon:g} at delta {target.delta:g} "
                    f"per {target.unit}, over all rounds; neighbours: {ADJACENCY}",
                    f"price: epsilon {bounds.estimate:.3f}, certainly between {bounds.lower:.3f} "
                    f"and {bounds.upper:.3f}",
                ]
            case NoPromise():
                lines.append("NO PROMISE: no noise, epsilon is infinite; devices refuse this by default")
            case _:
                assert_never(self.promise)
        return lines


def make_plan(promise: Promise, schedule: Schedule) -> Plan:
    """Find the least noise with which a schedule keeps a promise.

    Args:
        promise: What a photo's owner gets over all rounds, or `NoPromise()`.
        schedule: How often photos are looked at.

    Returns:
        A plan whose upper price is at most the promised epsilon.

    Raises:
        PrivacyError: No amount of noise keeps this promise.
    """
    match promise:
        case PrivacyTarget():
            sigma = noise_for(promise, lambda s: Terms(schedule=schedule, noise_multiplier=s).event())
            return Plan(promise=promise, schedule=schedule, noise_multiplier=sigma)
        case NoPromise():
            return Plan(promise=promise, schedule=schedule, noise_multiplier=0.0)
        case _:
            assert_never(promise)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
