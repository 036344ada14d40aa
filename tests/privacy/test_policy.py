"""A device says no to everything that its owner did not allow, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedface.errors import PolicyRefusal
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.ledger import Ledger
from fedface.privacy.plan import Plan, Schedule, Terms, make_plan
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.target import NoPromise, PrivacyTarget

SCHEDULE = Schedule(rounds=4, steps_per_round=2, sampling_rate=0.2, expected_batch=8, clip_norm=1.0)
TERMS = Terms(schedule=SCHEDULE, noise_multiplier=1.0)
COST = epsilon_of(TERMS.event(), 1e-5).upper
POLICY = DevicePolicy(max_epsilon=COST + 1e-6, delta=1e-5, smallest_cohort=3)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.db")


def test_a_run_within_the_budget_is_admitted_to_its_last_round(ledger: Ledger) -> None:
    for round in range(4):
        POLICY.admit(TERMS, 3, "encrypted", "generator", ledger, run="r")
        POLICY.book(TERMS, ledger, run="r", round=round)
        ledger.store_reply("r", round, b"payload")
    assert ledger.spent(1e-5).upper <= POLICY.max_epsilon


def test_an_entry_says_what_was_asked_of_what_unit(ledger: Ledger) -> None:
    marks = json.loads(POLICY.book(TERMS, ledger, run="r", round=0, marks={"model": "abc"}).marks)
    assert marks["noise_multiplier"] == "1" and marks["clip_norm"] == "1" and marks["expected_batch"] == "8"
    assert marks["unit"] == "photo" and marks["sampler"] == "poisson" and marks["model"] == "abc"


def test_the_same_run_under_another_name_is_refused_with_asked_spent_and_allowed(ledger: Ledger) -> None:
    for round in range(2):
        POLICY.book(TERMS, ledger, run="r", round=round)
    with pytest.raises(PolicyRefusal) as refusal:
        POLICY.admit(TERMS, 3, "encrypted", "generator", ledger, run="s")
    spent = ledger.spent(1e-5).upper
    for figure in (f"asks for epsilon {COST:.3f}", f"{spent:.3f} of {POLICY.max_epsilon:g}", "delta 1e-05"):
        assert figure in str(refusal.value)


def test_booking_stops_at_the_budget_even_if_two_runs_were_admitted(ledger: Ledger) -> None:
    for run in ("a", "b"):
        POLICY.admit(TERMS, 3, "encrypted", "generator", ledger, run=run)
    with pytest.raises(PolicyRefusal):
        for round in range(4):
            for run in ("a", "b"):
                POLICY.book(TERMS, ledger, run=run, round=round)
    assert len(ledger.entries()) == 4


def test_an_epsilon_that_is_told_is_not_believed(ledger: Ledger) -> None:
    """A plan that claims epsilon 0.001 with hardly any noise is priced by its noise."""
    liar = Plan(promise=PrivacyTarget(epsilon=0.001, delta=1e-5), schedule=SCHEDULE, noise_multiplier=0.3)
    with pytest.raises(PolicyRefusal, match="asks for epsilon"):
        POLICY.admit(liar, 3, "encrypted", "generator", ledger)


@pytest.mark.parametrize(
    ("cohort", "protocol", "objective", "reason"),
    [
        (2, "encrypted", "generator", "only among 3 or more"),
        (3, "plain", "generator", 'send updates "plain"'),
        (3, "encrypted", "celebrities", 'to train "celebrities"'),
        (3, "encrypted", "evaluation", "evaluation figures"),
    ],
)
def test_purposes_are_refused_unless_allowed(
    ledger: Ledger, cohort: int, protocol: str, objective: str, reason: str
) -> None:
    with pytest.raises(PolicyRefusal, match=reason):
        POLICY.admit(TERMS, cohort, protocol, objective, ledger)


def test_a_run_without_a_promise_needs_the_owners_word(ledger: Ledger) -> None:
    plan = make_plan(NoPromise(), SCHEDULE)
    with pytest.raises(PolicyRefusal, match="epsilon inf"):
        POLICY.admit(plan, 3, "encrypted", "generator", ledger)
    with pytest.raises(PolicyRefusal, match="no noise"):
        POLICY.book(plan, ledger, run="r", round=0)
    willing = DevicePolicy(max_epsilon=1.0, delta=1e-5, allow_unpromised=True)
    willing.admit(plan, 3, "encrypted", "generator", ledger)
    willing.book(plan, ledger, run="r", round=0)
    assert ledger.spent(1e-5).lower == float("inf")
    with pytest.raises(PolicyRefusal, match="inf of 1"):
        willing.admit(TERMS, 3, "encrypted", "generator", ledger)


def test_the_example_policy_is_a_policy() -> None:
    example = Path(__file__).resolve().parents[2] / "clients" / "policy.example.yaml"
    values = yaml.safe_load(example.read_text())
    policy = DevicePolicy(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )
    assert policy.protocols == ("encrypted",) and not policy.allow_unpromised


@pytest.mark.parametrize("change", [{"max_epsilon": 0.0}, {"delta": 2.0}, {"smallest_cohort": 0}])
def test_a_policy_out_of_bounds_cannot_be_written_down(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DevicePolicy(**{"max_epsilon": 1.0, "delta": 1e-5, **change})  # type: ignore[arg-type]
