"""The owner's policy: which runs may use this device's photos, and up to what price.

Called from federation/device.py before a photo is read. The policy is a YAML file that only the owner edits
(see clients/policy.example.yaml). Everything is refused unless it is allowed, and the price is computed here,
from the noise, the sampling rate and the steps: an epsilon that somebody tells is never believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedface.errors import PolicyRefusal
from fedface.privacy.ledger import Entry, Ledger
from fedface.privacy.limits import Limit
from fedface.privacy.plan import Plan, Terms
from fedface.privacy.target import check_delta

EVALUATION = "evaluation"  # the objective of a task that only measures


@dataclass(frozen=True, kw_only=True)
class DevicePolicy:
    """What the owner of a device allows.

    Raises:
        ValueError: A number outside its bounds.
    """

    max_epsilon: float  # for all runs together, for the life of the library, > 0
    delta: float  # where epsilon is read; fixed for the life of the library
    objectives: tuple[str, ...] = ("generator", "upsampler")  # what photos may help to train
    protocols: tuple[str, ...] = ("encrypted",)  # how updates may travel
    smallest_cohort: int = 2  # fewest devices whose updates are summed, >= 1
    allow_unpromised: bool = False  # may runs without noise use these photos?
    evaluation: bool = False  # may this device answer noised questions about its held-out photos?

    def __post_init__(self) -> None:
        if not (self.max_epsilon > 0 and math.isfinite(self.max_epsilon)):
            raise ValueError(f"max_epsilon must be a finite number above 0, got {self.max_epsilon}")
        check_delta(self.delta)
        if self.smallest_cohort < 1:
            raise ValueError(f"smallest_cohort must be at least 1, got {self.smallest_cohort}")

    def admit(
        self,
        plan: Plan | Terms,
        cohort_size: int,
        protocol: str,
        objective: str,
        ledger: Ledger,
        *,
        run: str | None = None,
        round: int | None = None,
    ) -> None:
        """Return if a run may use these photos; otherwise say why not.

        Args:
            plan: What the run asks: only its schedule and noise are read, never its epsilon.
            cohort_size: How many devices' updates are summed.
            protocol: How updates travel, such as "plain" or "encrypted".
            objective: What is trained, such as "generator", or "evaluation".
            ledger: What these photos have paid so far.
            run: The run's name, if it has begun: its booked rounds are then not asked for again.
            round: The round that is asked for; if it is booked already, `book` alone decides about it.

        Raises:
            PolicyRefusal: With what was asked, what is spent and what is allowed.
            LedgerError: The ledger cannot be trusted, so nothing can be admitted.
        """
        self._admit_purpose(cohort_size, protocol, objective)
        if plan.noise_multiplier == 0:
            if not self.allow_unpromised:
                raise PolicyRefusal(
                    "this run asks for epsilon inf: it adds no noise; this device allows "
                    f"{self.max_epsilon:g}. Give it a privacy target, or ask the owner to allow it."
                )
            return
        done = 0 if run is None else ledger.rounds_booked(run)
        booked = run is not None and round is not None and ledger.already(run, round)
        rounds = max(plan.schedule.rounds - done, 0 if booked else 1)
        if rounds == 0:
            return
        shortfall = ledger.room_for(plan.event(rounds), [self._limit()], told=_terms(plan).unit)
        if shortfall is not None:
            raise PolicyRefusal(
                f"over {rounds} rounds this run asks for {shortfall.in_words()}. Lower the rounds, raise the "
                "noise, or ask the owner of this device for a larger budget."
            )

    def _limit(self) -> Limit:
        return Limit(epsilon=self.max_epsilon, delta=self.delta)

    def _admit_purpose(self, cohort_size: int, protocol: str, objective: str) -> None:
        if objective == EVALUATION:
            if not self.evaluation:
                raise PolicyRefusal("this run asks for evaluation figures; this device does not answer any")
        elif objective not in self.objectives:
            raise PolicyRefusal(
                f'this run asks to train "{objective}"; this device allows '
                f"{', '.join(self.objectives) or 'nothing'}"
            )
        if protocol not in self.protocols:
            raise PolicyRefusal(
                f'this run asks to send updates "{protocol}"; this device allows '
                f"{', '.join(self.protocols) or 'nothing'}"
            )
        if cohort_size < self.smallest_cohort:
            raise PolicyRefusal(
                f"this run sums {cohort_size} devices; this device takes part only among "
                f"{self.smallest_cohort} or more"
            )

    def book(
        self,
        plan: Plan | Terms,
        ledger: Ledger,
        *,
        run: str,
        round: int,
        marks: Mapping[str, str] | None = None,
    ) -> Entry:
        """Book one round within this policy's budget, on disk when this returns; then compute it.

        Args:
            plan: What the run asks; its numbers are noted beside the event.
            ledger: What these photos have paid so far.
            run: The run's name.
            round: Which round, >= 0.
            marks: What else identifies the release, such as the model's hash.

        Raises:
            PolicyRefusal: The budget does not allow this round, or the run promises nothing and may not.
            LedgerError: The ledger is damaged, or this round was answered for a different release.
        """
        event, marks = plan.event(1), {**plan.marks(), **(marks or {})}
        if plan.noise_multiplier > 0:
            return ledger.book_within(event, [self._limit()], run=run, round=round, marks=marks)
        if not self.allow_unpromised:
            raise PolicyRefusal("this run adds no noise, and this device does not allow that")
        return ledger.book(event, run=run, round=round, marks=marks)


def _terms(plan: Plan | Terms) -> Terms:
    return plan.terms if isinstance(plan, Plan) else plan
