"""The owner's policy: which runs may use this device's photos, when, and up to what price.

The policy is a YAML file that only the owner edits (see clients/policy.example.yaml and docs/policy.md). Everything is
refused unless it is allowed, no message of a server widens it, and the price is computed here, from the noise, the
sampling rate and the steps: an epsilon that a server reports is never used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

from fedface.codec import encode
from fedface.errors import PolicyRefusal
from fedface.number_format import format_delta
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import LedgerEntry, PlannedRound, is_run_name, metrics_ledger_key
from fedface.privacy.participation_conditions import (
    ConditionsNotMet,
    Environment,
    ParticipationConditions,
    SystemEnvironment,
    parse_expiry,
)
from fedface.privacy.plan import DPParameters, Plan, RunReleases
from fedface.privacy.privacy_target import Delta
from fedface.privacy_units import UNITS, Unit, covers, describe_unit
from fedface.validation import Above, AtLeast, In, checked

OBJECTIVES = ("generator", "upsampler")  # what can be trained, in the word of a policy
COOLDOWN = timedelta(minutes=15)  # after a computation began, where the policy has a max_load
EVALUATION = "evaluation"  # the objective of a task that only measures
LEAST_RATE = 10  # times delta: a smaller sampling rate lets delta cover the disclosure of those that join
LARGE_DELTA = 1e-2  # above it, the probability that the bound does not hold must be stated
CONDITIONS = ("hours", "require_ac_power", "min_battery", "max_load")  # when a device may work
PROTOCOLS = ("masked", "homomorphic", "plain")  # the kinds of aggregation that there are
OWN_METADATA = ("unit", "neighbours", "sampler", "noise")  # marks that follow from the terms alone


@dataclass(frozen=True, kw_only=True)
@checked
class Period:
    """At most `epsilon` in any `days` days, besides what is allowed for life.

    Raises:
        ValueError: A number outside its bounds.
    """

    days: Annotated[float, Above(0)]
    epsilon: Annotated[float, Above(0)]


class Purpose(NamedTuple):
    """The purpose of a run."""

    cohort_size: int  # the fewest devices whose updates may be summed
    protocol: str  # how updates are protected: "masked", "homomorphic" or "plain"
    objective: str  # what is trained, such as "generator", or "evaluation"
    # Of the devices, which may collude with the server and read no one's update; 0 without masks.
    corrupt_share: float


@dataclass(frozen=True, kw_only=True)
@checked
class DevicePolicy:
    """What the owner of a device allows.

    Raises:
        ValueError: A number outside its bounds, a day, an hour or a purpose that does not exist, a folder outside
            the photos.
    """

    max_epsilon: Annotated[float, Above(0)]  # for all runs together, for the life of the library
    delta: Delta  # where every epsilon is read; fixed for the life of the library
    unit: Unit = "photo"  # of what budgets count the loss; fixed for the life of the library
    periods: tuple[Period, ...] = ()  # further budgets, for any so many days
    objectives: tuple[str, ...] = OBJECTIVES  # what photos may help to train
    evaluation: bool = False  # may this device compute metrics on its photos, with noise?
    protocols: tuple[str, ...] = ("masked", "homomorphic")  # how updates may be sent
    # Fewest devices whose updates are summed: of two, one that knows its own knows the other.
    min_cohort_size: Annotated[int, AtLeast(1)] = 3
    # With masks: at least this share of the devices may collude with the server and not read this device's update.
    corrupt_share: Annotated[float, In("[0, 0.5)")] = 0.1
    trust_server: bool = False  # may runs take part whose noise the server adds?
    # Of the devices in a sum, how many are trusted to add their shares of distributed noise and to keep them secret?
    honest_fraction: Annotated[float, In("[0, 1]")] = 0.5
    allow_no_dp: bool = False  # may runs without noise use these photos?
    folders: tuple[Path, ...] = ()  # below the photos: only these may be used; none named: all
    # Below the photos: these may not be used, also where `folders` holds them
    exclude_folders: tuple[Path, ...] = ()
    hours: tuple[str, ...] = ()  # such as "22:00-07:00", local time; none: at any time
    require_ac_power: bool = False  # only when plugged in?
    min_battery: float = 0.0  # off the mains only with this share of charge, 0 to 1
    max_load: float | None = None  # load average of the last minute per core; None: any
    expires: str | None = None  # the last day, such as 2027-01-31; from the next on everything is refused

    def __post_init__(self) -> None:
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                hint = "; metrics are allowed by evaluation: true" if objective == EVALUATION else ""
                raise ValueError(
                    f'objectives must be among {", ".join(OBJECTIVES)}, got "{objective:.40}"{hint}'
                )
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                near = difflib.get_close_matches(protocol, PROTOCOLS, 1)
                meant = f'; did you mean "{near[0]}"?' if near else ""
                raise ValueError(
                    f'protocols must be among {", ".join(PROTOCOLS)}, got "{protocol:.40}"{meant}'
                )
        for key, folders in (("folders", self.folders), ("exclude_folders", self.exclude_folders)):
            for folder in folders:
                _check_folder(key, folder)
        if self.expires is not None:
            try:
                parse_expiry(self.expires)
            except ValueError as error:
                raise ValueError(f"expires {error}") from error
        _ = self.conditions

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budget for life, then that of each period."""
        return (
            Budget(epsilon=self.max_epsilon, delta=self.delta, unit=self.unit),
            *(
                Budget(epsilon=period.epsilon, delta=self.delta, unit=self.unit, days=period.days)
                for period in self.periods
            ),
        )

    @property
    def terms_digest(self) -> str:
        """A hash of everything but budgets and times: what may be sent, of which photos, and with whose noise."""
        own = encode(self, leave_out=("max_epsilon", "periods", "expires", *CONDITIONS))
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    @property
    def conditions(self) -> ParticipationConditions:
        """When this device may work."""
        return ParticipationConditions(
            hours=self.hours,
            require_ac_power=self.require_ac_power,
            min_battery=self.min_battery,
            max_load=self.max_load,
        )

    def admit(
        self,
        plan: Plan | DPParameters | RunReleases,
        purpose: Purpose,
        ledger: Ledger,
        *,
        run: str = "",
        round: int = 1,
        environment: Environment | None = None,
    ) -> None:
        """Return if a run may use these photos now; otherwise say why not, the first reason that there is.

        The order: the last day, the purpose, the unit and who is trusted, the hours and the power, the budgets. The
        whole run must fit into the budget for life, its next round into that of each period: a long run pauses here
        when a period's budget is used up.

        Args:
            plan: Everything that the run releases: only its schedules and noise are read, never its epsilon.
            purpose: What is trained or evaluated, among how many devices, and how updates are protected.
            ledger: The ledger of these photos.
            run: The run's name in the ledger, if it has begun.
            round: The requested round; if it is recorded already, `record` alone decides about it.
            environment: Says the time, the power and the load; this machine if None.

        Raises:
            ConditionsNotMet: The owner's conditions do not hold; the reason is in its `private`, for the owner's log
                alone.
            PolicyRefusal: With the requested, the spent and the allowed epsilon.
            LedgerError: The ledger cannot be trusted, so nothing can be admitted.
        """
        planned = _planned(plan, run, round, purpose)
        self.check_static(planned.dp, purpose, environment=environment)
        here = environment or SystemEnvironment()
        self.conditions.check(here)
        if self.max_load is not None and ledger.began_within(COOLDOWN, here.now()):
            # Otherwise a server that repeats its requests learns from the load how long the last work took.
            raise ConditionsNotMet(
                "a computation began less than 15 minutes ago, and the load may be its own"
            )
        if planned.dp.is_private:
            self._admit_price(planned, ledger)

    def check_static(
        self, dp: DPParameters, purpose: Purpose, *, environment: Environment | None = None
    ) -> None:
        """All that `admit` checks except cost and load; it also holds for a stored reply.

        Raises:
            PolicyRefusal: As for `admit`.
        """
        here = environment or SystemEnvironment()
        self._admit_today(here)
        self._admit_purpose(purpose)
        self._admit_guarantee(dp)
        self._admit_honest(dp, purpose)
        replace(self.conditions, max_load=None).check(here)  # a stored reply costs no work

    def check_exchange(self, protocol: str, *, environment: Environment | None = None) -> None:
        """Return if this device may help to reveal a sum that it has a part in; no photo is read for that.

        Raises:
            PolicyRefusal: The last day is over, or sums of this kind are not allowed.
        """
        self._admit_today(environment or SystemEnvironment())
        self._admit_protocol(protocol)

    def _admit_today(self, environment: Environment) -> None:
        if self.expires is not None and environment.now().date() > parse_expiry(self.expires):
            raise PolicyRefusal(f"the permission of this device's owner has ended ({self.expires})")

    def _admit_purpose(self, purpose: Purpose) -> None:
        objective = purpose.objective
        if objective == EVALUATION:
            if not self.evaluation:
                raise PolicyRefusal("this run requests evaluation metrics; this device does not compute any")
        elif objective not in self.objectives:
            raise PolicyRefusal(
                f'this run requests training of "{objective}"; this device allows '
                f"{', '.join(self.objectives) or 'nothing'}"
            )
        self._admit_protocol(purpose.protocol)
        if purpose.cohort_size < self.min_cohort_size:
            raise PolicyRefusal(
                f"this run may sum only {purpose.cohort_size} devices; this device takes part only among "
                f"{self.min_cohort_size} or more"
            )
        if purpose.protocol != "plain" and purpose.corrupt_share < self.corrupt_share:
            raise PolicyRefusal(
                f"the masks of this run withstand a server with {purpose.corrupt_share:.0%} of the devices; the owner "
                f"of this device demands {self.corrupt_share:.0%}",
                advice="Raise aggregation.corrupt_share.",
            )

    def _admit_protocol(self, protocol: str) -> None:
        if protocol not in self.protocols:
            raise PolicyRefusal(
                f'this run requests updates as "{protocol}"; this device allows '
                f"{', '.join(self.protocols) or 'nothing'}"
            )

    def _admit_guarantee(self, terms: DPParameters) -> None:
        if not terms.is_private:
            if not self.allow_no_dp:
                raise PolicyRefusal(
                    "this run requests epsilon infinite at every delta: it adds no noise; this device allows at most "
                    f"{self.budgets[0]}",
                    advice="Give it a privacy target, or ask the owner to allow it.",
                )
            return
        if not covers(terms.unit, self.unit):
            raise PolicyRefusal(
                f"this run's guarantee is per {terms.unit}; the owner of this device counts per {self.unit}"
            )
        if terms.noise == "central" and not self.trust_server:
            raise PolicyRefusal(
                "in this run the server adds the noise; the owner of this device does not trust servers with that"
            )
        rate = terms.schedule.sampling_rate
        if terms.unit != "library" and rate < LEAST_RATE * self.delta:
            raise PolicyRefusal(
                f"the sampling rate {rate:g} is below {LEAST_RATE} times this device's delta "
                f"{format_delta(self.delta)}: delta alone would cover a step that discloses the few units that join it",
                advice="Raise the sampling rate.",
            )

    def _admit_honest(self, terms: DPParameters, purpose: Purpose) -> None:
        # This device's own share is always honest: noise that is complete on each device needs no other.
        trusted = max(1, math.floor(self.honest_fraction * purpose.cohort_size))
        if terms.honest_devices > trusted:
            raise PolicyRefusal(
                f"this run relies on the noise of {terms.honest_devices} devices in sums that may have only "
                f"{purpose.cohort_size}; the owner of this device trusts at most {self.honest_fraction:.0%} of them",
                advice="Lower privacy.honest_fraction, so that each device adds more noise.",
            )

    def _admit_price(self, planned: PlannedRound, ledger: Ledger) -> None:
        life, *periods = self.budgets
        short = ledger.check_round(planned, [life])
        if short is not None:
            rounds = sum(part.schedule.rounds for part in planned.releases.parts)
            raise PolicyRefusal(
                f"over {rounds} round{'' if rounds == 1 else 's'} this run requests {short.describe()}",
                advice="Lower the rounds, raise the noise, or ask the owner of this device for a larger budget.",
            )
        short = ledger.check_round(planned, periods)
        if short is not None:
            later = (
                "That is more than this period ever allows."
                if short.requested > short.budget.epsilon
                else "Try again later."
            )
            raise PolicyRefusal(f"with one more round this run requests {short.describe()}", advice=later)

    def record(
        self,
        plan: Plan | DPParameters | RunReleases,
        ledger: Ledger,
        *,
        run: str,
        round: int,
        metadata: Mapping[str, str] | None = None,
        environment: Environment | None = None,
    ) -> LedgerEntry:
        """Record one round within this policy's budgets, on disk when this returns; then compute it.

        What `admit` checked is checked again where it may have changed since: the last day, the unit, who is trusted,
        and every budget, in one transaction with the record.

        Args:
            plan: Everything that the run releases; the round's numbers are noted beside its event.
            ledger: The ledger of these photos.
            run: The run's name in the ledger, which says whether this is an evaluation.
            round: Which round, from 1.
            metadata: What else identifies the release, such as the model's hash. They cannot change `OWN_METADATA`.
            environment: Says the day; this machine if None.

        Raises:
            PolicyRefusal: The budget does not allow this run or round, the run was recorded with other releases, or it
                has no noise and may not.
            LedgerError: The ledger is damaged, or this round has a reply for another release.
        """
        planned = _planned(plan, run, round)
        terms = planned.dp
        self._admit_today(environment or SystemEnvironment())
        self._admit_guarantee(terms)
        own = terms.metadata()
        noted = {**own, **(metadata or {}), **{key: own[key] for key in OWN_METADATA}}
        if terms.is_private:
            return ledger.record_round(planned, self.budgets, metadata=noted)
        return ledger.record(terms.event(1), run=run, round=round, metadata=noted)

    def ended(self, environment: Environment) -> str | None:
        """That the last day is over, as a sentence without full stop; None as long as it is not."""
        if self.expires is None or environment.now().date() <= parse_expiry(self.expires):
            return None
        return f"this policy ended on {self.expires}; everything is refused"

    def warnings(self) -> list[str]:
        """Entries that are valid but probably unintended, one sentence each, without full stops."""
        large = f"delta {format_delta(self.delta)} is large: with about this probability the bound need not hold at all"
        return [
            *([large] if self.delta > LARGE_DELTA else []),
            *(
                f"{key} is an empty list, so that nothing of the kind is allowed"
                for key in ("objectives", "protocols")
                if not getattr(self, key)
            ),
            *(
                f"{limit} is more than the {self.max_epsilon:g} for life, so this period limits nothing"
                for limit in self.budgets[1:]
                if limit.epsilon > self.max_epsilon
            ),
        ]

    def describe(self) -> list[str]:
        """What is allowed, one sentence each, without full stops."""
        conditions = replace(self.conditions, hours=()).describe()
        if self.hours:
            hours = " or ".join("from {} to {}".format(*options.split("-")) for options in self.hours)
            conditions = [f"{hours}, local time", *conditions]
        return [
            f"photos may help to train {_or([f'{objective}s' for objective in self.objectives])}",
            "evaluations of models on these photos are "
            + ("allowed, with noise" if self.evaluation else "refused")
            + (", or without where the server adds it" if self.evaluation and self.trust_server else ""),
            f"updates may be sent {_or(self.protocols)}, where {self.min_cohort_size} devices or more are summed"
            if self.protocols
            else "updates may not be sent at all: every run is refused",
            *(
                [f"masks must withstand a server that colludes with {self.corrupt_share:.0%} of the devices"]
                if set(self.protocols) - {"plain"}
                else []
            ),
            *(f"at most {limit}" for limit in self.budgets),
            f"the budget counts {describe_unit(self.unit)}",
            f"a run's guarantee must be per {_or([unit for unit in UNITS if covers(unit, self.unit)])}",
            "the noise may be added by the server, which then sees updates and metrics without noise"
            if self.trust_server
            else "the noise must be added on devices: runs whose noise the server adds are refused",
            f"where each device adds a share of the noise, at most {self.honest_fraction:.0%} of the devices in a sum "
            "may be needed for the guarantee",
            "RUNS WITHOUT NOISE MAY USE THESE PHOTOS: of such a run epsilon is infinite at every delta"
            if self.allow_no_dp
            else "runs without noise are refused",
            f"photos {_in(self.folders)} may be used"
            if self.folders
            else "photos in all folders may be used",
            *([f"photos {_in(self.exclude_folders)} may never be used"] if self.exclude_folders else []),
            f"this device takes part only {', '.join(conditions)}"
            if conditions
            else "this device takes part at any time",
            f"until the end of {self.expires}" if self.expires else "without a last day",
        ]


def _planned(
    plan: Plan | DPParameters | RunReleases, key: str, round: int, purpose: Purpose | None = None
) -> PlannedRound:
    """A round of what a run releases; DP parameters alone are those of a run that does nothing else."""
    if purpose is not None and purpose.objective == EVALUATION and is_run_name(key):
        key = metrics_ledger_key(key)
    match plan:
        case RunReleases():
            releases = plan
        case Plan():
            releases = plan.releases
        case DPParameters():
            releases = RunReleases(training=plan) if is_run_name(key) else RunReleases(evaluation=plan)
    return PlannedRound(key=key, round=round, releases=releases)


def _check_folder(key: str, folder: Path) -> None:
    if folder.is_absolute() or not folder.parts or ".." in folder.parts or folder.parts[0].startswith("~"):
        raise ValueError(f'{key} must name folders below the photos, without "..", got "{folder}"')


def _or(options: tuple[str, ...] | list[str]) -> str:
    return " or ".join(options) or "nothing"


def _in(folders: tuple[Path, ...]) -> str:
    return f"in {' and '.join(folder.as_posix() for folder in folders)}"
