"""A device refuses everything that its owner did not allow, with a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest

from fedface.aggregation.payload import AggregationConfig
from fedface.config import dump, parse, read
from fedface.errors import ConfigError, PolicyRefusal
from fedface.number_format import format_delta
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.adjacency import replace_one_event
from fedface.privacy.budget import Budget, format_upper_bound, overspending
from fedface.privacy.ledger import Ledger
from fedface.privacy.participation_conditions import NOT_NOW_MESSAGE, ConditionsNotMet, Power
from fedface.privacy.plan import DPParameters, Plan, Schedule, make_plan
from fedface.privacy.policy import EVALUATION, PROTOCOLS, DevicePolicy, Period, Purpose
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.privacy_units import Unit

SCHEDULE = Schedule(rounds=4, steps_per_round=2, sampling_rate=0.2, expected_batch_size=8, clip_norm=1.0)
TERMS = DPParameters(schedule=SCHEDULE, noise_multiplier=1.0)
PURPOSE = Purpose(3, "homomorphic", "generator", 0.1)
COST = epsilon_of(TERMS.event(), 1e-5).upper
POLICY = DevicePolicy(max_epsilon=COST + 1e-6, delta=1e-5, min_cohort_size=3)
ONE_ROUND = epsilon_of(TERMS.event(1), 1e-5).upper
CLIENTS = Path(__file__).resolve().parents[2] / "clients"


@dataclass
class Noon:
    """A machine on battery at noon; `day` may be set."""

    day: str = "2027-01-31"
    mains: bool = False

    def now(self) -> datetime:
        return datetime.fromisoformat(f"{self.day}T12:00:00+01:00")

    def power(self) -> Power:
        return Power(on_ac=self.mains, battery=0.37)

    def load(self) -> float | None:
        return 0.1


def per(unit: Unit, noise: float = 1.0) -> DPParameters:
    """The same steps, with a guarantee per some unit."""
    return replace(
        TERMS, unit=unit, noise_multiplier=noise, noise="central" if unit == "library" else "local"
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.db")


def test_a_run_within_the_budget_is_admitted_to_its_last_round(ledger: Ledger) -> None:
    for round in (1, 2, 3, 4):
        POLICY.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run="r", round=round)
        POLICY.record(TERMS, ledger, run="r", round=round)
        ledger.store_reply("r", round, b"payload")
    assert ledger.spent(1e-5).upper <= POLICY.max_epsilon


def test_an_entry_has_the_request_and_its_unit(ledger: Ledger) -> None:
    metadata = POLICY.record(TERMS, ledger, run="r", round=1, metadata={"model": "abc"}).metadata
    assert (
        metadata["noise_multiplier"] == "1"
        and metadata["clip_norm"] == "1"
        and metadata["expected_batch_size"] == "8"
    )
    assert metadata["unit"] == "photo" and metadata["sampler"] == "poisson" and metadata["model"] == "abc"


def test_the_same_run_under_another_name_is_refused_with_its_numbers(ledger: Ledger) -> None:
    for round in (1, 2):
        POLICY.record(TERMS, ledger, run="r", round=round)
    with pytest.raises(PolicyRefusal) as refusal:
        POLICY.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run="s")
    spent = ledger.spent(1e-5).upper
    for metric in (
        f"requests {format_upper_bound(COST)}; {format_upper_bound(spent)} of {POLICY.max_epsilon:g} is already spent",
        "every epsilon here at delta 1e-5, per photo for life",
    ):
        assert metric in str(refusal.value)


def test_recording_stops_at_the_budget_even_if_two_runs_were_admitted(ledger: Ledger) -> None:
    for run in ("a", "b"):
        POLICY.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run=run)
    for round in (1, 2, 3, 4):
        POLICY.record(TERMS, ledger, run="a", round=round)
        with pytest.raises(PolicyRefusal):
            POLICY.record(TERMS, ledger, run="b", round=round)
    assert len(ledger.entries()) == 4


def test_an_epsilon_of_the_server_is_ignored(ledger: Ledger) -> None:
    """A plan that claims epsilon 0.001 with hardly any noise has the cost of its noise."""
    liar = Plan(privacy=PrivacyTarget(epsilon=0.001, delta=1e-5), schedule=SCHEDULE, noise_multiplier=0.3)
    with pytest.raises(PolicyRefusal, match="requests epsilon"):
        POLICY.admit(liar, Purpose(3, "homomorphic", "generator", 0.1), ledger)


@pytest.mark.parametrize(
    ("cohort", "protocol", "objective", "reason"),
    [
        (2, "homomorphic", "generator", "only among 3 or more"),
        (3, "plain", "generator", 'requests updates as "plain"'),
        (3, "homomorphic", "celebrities", 'requests training of "celebrities"'),
        (3, "homomorphic", "evaluation", "evaluation metrics"),
    ],
)
def test_purposes_are_refused_unless_allowed(
    ledger: Ledger, cohort: int, protocol: str, objective: str, reason: str
) -> None:
    with pytest.raises(PolicyRefusal, match=reason):
        POLICY.admit(TERMS, Purpose(cohort, protocol, objective, 0.1), ledger)


def test_a_run_without_dp_needs_the_owners_permission(ledger: Ledger) -> None:
    plan = make_plan(NoPrivacy(), SCHEDULE)
    with pytest.raises(
        PolicyRefusal, match=r"epsilon infinite.* at most epsilon [\d.]+ at delta 1e-5 per photo"
    ):
        POLICY.admit(plan, Purpose(3, "homomorphic", "generator", 0.1), ledger)
    with pytest.raises(PolicyRefusal, match="no noise"):
        POLICY.record(plan, ledger, run="r", round=1)
    willing = DevicePolicy(max_epsilon=1.0, delta=1e-5, allow_no_dp=True)
    willing.admit(plan, Purpose(3, "homomorphic", "generator", 0.1), ledger)
    willing.record(plan, ledger, run="r", round=1)
    assert ledger.spent(1e-5).lower == float("inf")
    with pytest.raises(PolicyRefusal, match="epsilon infinite of 1 is"):
        willing.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger)


def test_the_examples_are_policies_and_show_every_key() -> None:
    """The example files can be read and are cautious."""
    example = CLIENTS / "policy.example.yaml"
    policy = read(example, DevicePolicy)
    assert policy.protocols == ("masked", "homomorphic")
    assert not (policy.allow_no_dp or policy.trust_server or policy.evaluation)
    text, page = example.read_text(), (CLIENTS.parent / "docs" / "policy.md").read_text()
    for key in DevicePolicy.__dataclass_fields__:
        assert f"\n{key}: " in text or f"\n# {key}: " in text, key
        assert f"| `{key}: " in page, key


@pytest.mark.parametrize(
    "change",
    [
        {"max_epsilon": 0.0},
        {"delta": 2.0},
        {"min_cohort_size": 0},
        {"unit": "person"},
        {"objectives": ("faces",)},
        {"folders": (Path("/etc"),)},
        {"folders": (Path("."),)},
        {"exclude_folders": (Path("a/../../b"),)},
        {"exclude_folders": (Path("~/Pictures"),)},
        {"hours": ("22-7",)},
        {"min_battery": 30.0},
        {"max_load": -1.0},
        {"expires": "2027-02-30"},
    ],
)
def test_a_policy_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))} "):
        DevicePolicy(**{"max_epsilon": 1.0, "delta": 1e-5, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"days": 0.0}, {"epsilon": 0.0}, {"epsilon": float("inf")}])
def test_a_period_out_of_bounds_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))} "):
        Period(**{"days": 7.0, "epsilon": 1.0, **change})


def test_a_policy_is_read_from_yaml() -> None:
    """A day needs no quotes, a period is a small table, folders are paths."""
    text = """
max_epsilon: 8
delta: 1e-6
unit: occasion
periods: [{days: 7, epsilon: 1.5}]
exclude_folders: [Private, "Work/2024"]
hours: ["22:00-07:00"]
expires: 2027-01-31
"""
    policy = parse(text, DevicePolicy, name="p.yaml")
    assert policy.budgets == (
        Budget(epsilon=8, delta=1e-6, unit="occasion"),
        Budget(epsilon=1.5, delta=1e-6, unit="occasion", days=7),
    )
    assert policy.exclude_folders == (Path("Private"), Path("Work/2024")) and policy.expires == "2027-01-31"
    assert parse(dump(policy), DevicePolicy, name="again.yaml") == policy  # as a run's record writes it


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("expires: soon", r'p.yaml:3: expires: must be a day such as 2027-01-31, got "soon"'),
        ("expires: 2027-02-30", r"p.yaml:3: expires: must be a day"),
        ("hours: [22-7]", r'p.yaml:3: hours: must be written like "22:00-07:00"'),
        ("periods: [{days: 7, epsilon: 0}]", r"p.yaml:3: periods.0.epsilon: must be a finite number above 0"),
        ("folders: [../elsewhere]", r"p.yaml:3: folders: must name folders below the photos"),
        ("objectives: [faces]", r'p.yaml:3: objectives: must be among generator, upsampler, got "faces"'),
        ("objectives: [evaluation]", r"metrics are allowed by evaluation: true"),
        ("unit: person", r"p.yaml:3: unit: expected one of photo, occasion, library"),
        ("require_ac_powr: true", r'did you mean "require_ac_power"'),
    ],
)
def test_a_typo_is_reported_with_its_line(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(f"max_epsilon: 8\ndelta: 1e-6\n{line}\n", DevicePolicy, name="p.yaml")


def test_from_the_day_after_the_last_nothing_is_allowed(ledger: Ledger) -> None:
    """Neither a new run nor another round of an old one, nor a stored reply."""
    policy, here = replace(POLICY, expires="2027-01-31"), Noon()
    policy.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, environment=here)
    policy.record(TERMS, ledger, run="r", round=1, environment=here)
    here.day = "2027-02-01"
    with pytest.raises(PolicyRefusal, match="has ended"):
        policy.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, environment=here)
    for round in (1, 2):
        with pytest.raises(PolicyRefusal, match="has ended"):
            policy.record(TERMS, ledger, run="r", round=round, environment=here)
    assert len(ledger.entries()) == 1


def test_a_finer_unit_is_refused_and_a_coarser_one_is_converted(ledger: Ledger) -> None:
    """For a policy per occasion: a guarantee per photo is refused, one per occasion is unchanged."""
    policy = replace(POLICY, unit="occasion")
    with pytest.raises(
        PolicyRefusal, match="guarantee is per photo; the owner of this device counts per occasion"
    ):
        policy.admit(per("photo"), Purpose(3, "homomorphic", "generator", 0.1), ledger)
    with pytest.raises(PolicyRefusal, match="counts per occasion"):
        policy.record(per("photo"), ledger, run="r", round=1)
    policy.admit(per("occasion"), Purpose(3, "homomorphic", "generator", 0.1), ledger)


def test_a_policy_per_photo_refuses_runs_per_occasion(ledger: Ledger) -> None:
    """A photo that links two occasions is in neither cost: without it they are two units instead of one."""
    for ask in (
        lambda: POLICY.admit(per("occasion"), Purpose(3, "homomorphic", "generator", 0.1), ledger),
        lambda: POLICY.record(per("occasion"), ledger, run="r", round=1),
    ):
        with pytest.raises(PolicyRefusal, match="per occasion; the owner of this device counts per photo"):
            ask()
    assert "a run's guarantee must be per photo or library" in POLICY.describe()


def test_a_policy_per_photo_charges_the_cost_of_replacing_a_library(ledger: Ledger) -> None:
    """One photo more or less changes the content of the library."""
    trusting = replace(POLICY, trust_server=True, max_epsilon=5.0)
    dearer = epsilon_of(replace_one_event(per("library", 3.0).event()), 1e-5).upper
    with pytest.raises(PolicyRefusal, match=f"requests {format_upper_bound(dearer)}"):
        trusting.admit(per("library", 3.0), Purpose(3, "homomorphic", "generator", 0.1), ledger)
    willing = replace(trusting, max_epsilon=dearer + 1e-6)
    willing.record(per("library", 3.0), ledger, run="r", round=1)
    assert ledger.spent(1e-5, unit="photo").upper > ledger.spent(1e-5, unit="library").upper


def test_metadata_cannot_change_the_unit(ledger: Ledger) -> None:
    """The DP parameters determine the unit; contradicting metadata are overwritten."""
    policy = replace(POLICY, max_epsilon=50.0, unit="occasion")
    entry = policy.record(
        per("occasion"), ledger, run="r", round=1, metadata={"unit": "photo", "noise": "moon"}
    )
    assert (entry.metadata["unit"], entry.metadata["noise"]) == ("occasion", "local")


def test_a_server_that_adds_the_noise_needs_trust(ledger: Ledger) -> None:
    terms = per("library", noise=8.0)
    policy = replace(POLICY, max_epsilon=20.0)
    for ask in (
        lambda: policy.admit(terms, Purpose(3, "homomorphic", "generator", 0.1), ledger),
        lambda: policy.record(terms, ledger, run="r", round=1),
    ):
        with pytest.raises(
            PolicyRefusal, match="server adds the noise; the owner of this device does not trust"
        ):
            ask()
    trusting = replace(policy, trust_server=True)
    trusting.admit(terms, Purpose(3, "homomorphic", "generator", 0.1), ledger)
    trusting.record(terms, ledger, run="r", round=1)


@pytest.mark.parametrize(
    ("change", "closes"),
    [
        ({"objectives": ("upsampler",)}, True),
        ({"evaluation": True}, True),
        ({"protocols": ("masked",)}, True),
        ({"min_cohort_size": 4}, True),
        ({"corrupt_share": 0.2}, True),
        ({"trust_server": True}, True),
        ({"honest_fraction": 0.1}, True),
        ({"allow_no_dp": True}, True),
        ({"folders": (Path("summer"),)}, True),
        ({"exclude_folders": (Path("private"),)}, True),
        ({"max_epsilon": 99.0}, False),
        ({"periods": (Period(days=7, epsilon=1),)}, False),
        ({"hours": ("22:00-07:00",)}, False),
        ({"require_ac_power": True}, False),
        ({"min_battery": 0.5}, False),
        ({"max_load": 1.0}, False),
        ({"expires": "2099-01-01"}, False),
    ],
)
def test_every_term_of_a_policy_but_budgets_and_times_closes_what_waits(
    change: dict[str, object], closes: bool
) -> None:
    """Unit and delta cannot change. A field that is added to the policy must be listed here."""
    assert (replace(POLICY, **change).terms_digest != POLICY.terms_digest) is closes  # type: ignore[arg-type]


def test_an_owner_bounds_the_colluders_that_masks_must_withstand(ledger: Ledger) -> None:
    """A tenth by default; a server that sets none is refused, and plain sums have no masks."""
    with pytest.raises(
        PolicyRefusal, match="withstand a server with 5% of the devices; the owner .* demands 10%"
    ):
        POLICY.admit(TERMS, Purpose(3, "masked", "generator", 0.05), ledger)
    POLICY.admit(TERMS, Purpose(3, "masked", "generator", 0.1), ledger)
    careful = replace(POLICY, corrupt_share=0.2, protocols=("plain", "homomorphic"))
    with pytest.raises(PolicyRefusal, match="demands 20%"):
        careful.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger)
    careful.admit(TERMS, Purpose(3, "plain", "generator", 0.0), ledger)


def test_distributed_noise_needs_no_trusted_server_but_honest_devices(ledger: Ledger) -> None:
    """Half of eight are four; noise that is complete on each device needs no other; none may need more."""
    terms = replace(per("library", noise=8.0), noise="distributed", honest_devices=4)
    policy = replace(POLICY, max_epsilon=20.0)
    policy.admit(terms, Purpose(8, "homomorphic", "generator", 0.1), ledger)
    with pytest.raises(PolicyRefusal, match="relies on the noise of 4 devices in sums that may have only 7"):
        policy.admit(terms, Purpose(7, "homomorphic", "generator", 0.1), ledger)
    alone = replace(policy, honest_fraction=0.0)
    alone.admit(replace(terms, honest_devices=1), Purpose(3, "homomorphic", "generator", 0.1), ledger)
    with pytest.raises(PolicyRefusal, match="trusts at most 0% of them"):
        alone.admit(terms, Purpose(8, "homomorphic", "generator", 0.1), ledger)
    entry = policy.record(terms, ledger, run="r", round=1)
    assert (entry.metadata["noise"], entry.metadata["honest_devices"]) == ("distributed", "4")


def test_evaluation_is_admitted_and_recorded_like_training(ledger: Ledger) -> None:
    policy = replace(POLICY, evaluation=True, objectives=())
    policy.admit(TERMS, Purpose(3, "homomorphic", EVALUATION, 0.1), ledger)
    with pytest.raises(PolicyRefusal, match="allows nothing"):
        policy.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger)
    for round in (1, 2, 3, 4):
        policy.record(TERMS, ledger, run="r/metrics", round=round)
    with pytest.raises(PolicyRefusal, match="is already spent"):
        policy.admit(TERMS, Purpose(3, "homomorphic", EVALUATION, 0.1), ledger)


def test_a_period_pauses_a_run_and_lets_it_continue(tmp_path: Path) -> None:
    """A budget for one round in any seven days: the second waits eight, since a reply may leave for a day, and the
    lifetime budget covers all four.
    """
    time = datetime(2027, 1, 1, tzinfo=UTC)
    ledger = Ledger.open(tmp_path / "ledger.db", now=lambda: time)
    policy = replace(POLICY, periods=(Period(days=7, epsilon=ONE_ROUND + 1e-6),))
    for round in (1, 2, 3, 4):
        policy.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run="r", round=round)
        entry = policy.record(TERMS, ledger, run="r", round=round)
        ledger.store_reply("r", round, b"payload", attempt=entry.attempt)
        policy.admit(
            TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run="r", round=round
        )  # asked once more
        if round == 4:
            break
        with pytest.raises(PolicyRefusal, match="in any 7 days.*Try again later"):
            policy.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, run="r", round=round + 1)
        with pytest.raises(PolicyRefusal, match="in any 7 days"):
            policy.record(TERMS, ledger, run="r", round=round + 1)
        time += timedelta(days=8, seconds=1)
    assert [entry.round for entry in ledger.entries()] == [1, 2, 3, 4]


def test_the_server_gets_one_sentence_about_hours_and_power(ledger: Ledger) -> None:
    """The battery's charge and the hours stay on the device; the owner's log has them."""
    policy = replace(POLICY, hours=("22:00-07:00",), min_battery=0.5)
    heard = set()
    for held, private in ((policy, "it is 12:00"), (replace(policy, hours=()), "the battery is at 37%")):
        with pytest.raises(ConditionsNotMet) as refusal:
            held.admit(TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, environment=Noon())
        assert private in refusal.value.private
        heard.add(str(refusal.value))
    assert heard == {NOT_NOW_MESSAGE}
    replace(policy, hours=()).admit(
        TERMS, Purpose(3, "homomorphic", "generator", 0.1), ledger, environment=Noon(mains=True)
    )


def test_reasons_are_ordered_to_reveal_least(ledger: Ledger) -> None:
    """The last day, the purpose, the guarantee, the conditions, the budget: each hides those after it."""
    strict = DevicePolicy(
        max_epsilon=1e-3, delta=1e-5, min_cohort_size=3, unit="occasion", hours=("22:00-07:00",), expires="2027-01-01"
    )  # fmt: skip
    steps = [
        ("has ended", strict),
        ("2 devices", replace(strict, expires=None)),
        ("guarantee is per photo", replace(strict, expires=None, min_cohort_size=2)),
        ("conditions do not hold", replace(strict, expires=None, min_cohort_size=2, unit="photo")),
        ("requests epsilon", replace(strict, expires=None, min_cohort_size=2, unit="photo", hours=())),
    ]
    for words, policy in steps:
        with pytest.raises(PolicyRefusal, match=words):
            policy.admit(TERMS, Purpose(2, "homomorphic", "generator", 0.1), ledger, environment=Noon())


def test_every_epsilon_in_the_description_of_a_policy_has_its_delta_unit_and_period() -> None:
    policy = replace(
        POLICY, periods=(Period(days=7, epsilon=0.5),), allow_no_dp=True, exclude_folders=(Path("Private"),)
    )
    words = policy.describe()
    assert f"at most epsilon {policy.max_epsilon:g} at delta 1e-5 per photo for life" in words
    assert "at most epsilon 0.5 at delta 1e-5 per photo in any 7 days" in words
    assert "photos in Private may never be used" in words
    assert any(line.startswith("RUNS WITHOUT NOISE") and "delta" in line for line in words)
    assert all("delta" in line for line in words if "epsilon" in line)


@pytest.mark.parametrize(
    ("delta", "words"),
    [(1e-4, "1e-4"), (1e-5, "1e-5"), (2.5e-6, "2.5e-6"), (1e-10, "1e-10"), (1e-3, "0.001"), (0.05, "0.05")],
)
def test_a_delta_is_written_in_one_way_and_is_read_back(delta: float, words: str) -> None:
    assert format_delta(delta) == words and float(words) == delta


def test_an_upper_bound_is_rounded_up() -> None:
    """ "At most 2.000" for 2.0004 would be wrong."""
    assert (
        format_upper_bound(2.0004) == "epsilon at most 2.001"
        and format_upper_bound(2.0) == "epsilon at most 2.000"
    )
    assert format_upper_bound(float("inf")) == "epsilon infinite" and format_upper_bound(0) == "epsilon 0"


def test_implausible_settings_give_warnings() -> None:
    """A delta above 0.01, a period's budget above the lifetime budget; the examples have neither."""
    assert POLICY.warnings() == read(CLIENTS / "policy.example.yaml", DevicePolicy).warnings() == []
    odd = DevicePolicy(
        max_epsilon=8.0, delta=0.05, periods=(Period(days=7, epsilon=9.0), Period(days=1, epsilon=8))
    )
    large, period = odd.warnings()
    assert large.startswith("delta 0.05 is large")
    assert period.startswith("epsilon 9 at delta 0.05 per photo in any 7 days is more than the 8 for life")


def test_an_expired_policy_reports_its_date() -> None:
    """The last day itself is still allowed."""
    policy = replace(POLICY, expires="2027-01-31")
    assert policy.ended(Noon("2027-01-31")) is None and POLICY.ended(Noon()) is None
    assert policy.ended(Noon("2027-02-01")) == "this policy ended on 2027-01-31; everything is refused"


def test_an_overspent_budget_reports_by_how_much() -> None:
    """Nothing is left of a budget used up to the last bit; a period frees up again."""
    life, week = Budget(epsilon=8, delta=1e-4), Budget(epsilon=1, delta=1e-4, days=7)
    assert overspending(7.9, life, no_dp_allowed=False) is None
    assert overspending(10.0, life, no_dp_allowed=False) == (
        "nothing remains: everything will be refused; over by epsilon at most 2.000 at delta 1e-4 per photo"
    )
    assert "every run with noise will be refused until" in str(overspending(1.5, week, no_dp_allowed=True))
    assert "over without a bound" in str(overspending(float("inf"), life, no_dp_allowed=False))


def test_a_policy_is_described_in_grammatical_sentences() -> None:
    words = replace(POLICY, hours=("22:00-07:00", "12:00-13:00"), require_ac_power=True).describe()
    assert words[0] == "photos may help to train generators or upsamplers"
    assert (
        "this device takes part only from 22:00 to 07:00 or from 12:00 to 13:00, local time, on mains"
        in words
    )
    assert "this device takes part at any time" in POLICY.describe()
    assert replace(POLICY, objectives=()).describe()[0] == "photos may help to train nothing"


def test_unknown_protocols_are_refused() -> None:
    """A typo would otherwise refuse every run silently."""
    kinds = {config.kind for config in get_args(AggregationConfig)}
    assert set(PROTOCOLS) == kinds
    with pytest.raises(
        ValueError, match='protocols must be among masked, homomorphic, plain, got "homomorfic"; did you mean'
    ):
        DevicePolicy(max_epsilon=1, delta=1e-6, protocols=("homomorfic",))
    none = DevicePolicy(max_epsilon=1, delta=1e-6, protocols=(), objectives=())
    assert "updates may not be sent at all: every run is refused" in none.describe()
    assert sum("is an empty list" in doubt for doubt in none.warnings()) == 2


def test_the_load_of_a_computation_is_not_an_answer(ledger: Ledger) -> None:
    """For 15 minutes after one began, a device with a max_load gives one reply, whatever is asked and the load is."""
    now = datetime(2031, 5, 1, 12, tzinfo=UTC)

    class Machine(Noon):
        def now(self) -> datetime:
            return now

    record_run = Ledger.open(ledger._chain.path.with_name("other.db"), now=lambda: now)
    policy = replace(POLICY, max_load=0.5)
    entry = policy.record(TERMS, record_run, run="r", round=1, environment=Machine())
    record_run.record_attempt("r", 1, attempt=entry.attempt)
    for run in ("r", "costs too much"):
        with pytest.raises(ConditionsNotMet):
            policy.admit(TERMS, PURPOSE, record_run, run=run, round=2, environment=Machine())
    now += timedelta(minutes=16)
    policy.admit(TERMS, PURPOSE, record_run, run="r", round=2, environment=Machine())

    now += timedelta(days=365)  # a clock that is wrong, and set right after the next computation
    record_run.record_attempt("r", 1, attempt=entry.attempt)
    now -= timedelta(minutes=5)
    with pytest.raises(ConditionsNotMet):
        policy.admit(TERMS, PURPOSE, record_run, run="r", round=2, environment=Machine())
    now -= timedelta(days=365)
    policy.admit(TERMS, PURPOSE, record_run, run="r", round=2, environment=Machine())
    record_run.record_attempt("r", 1, attempt=entry.attempt)  # dated a year ahead, as the record above
    now += timedelta(minutes=14)
    with pytest.raises(ConditionsNotMet):
        policy.admit(TERMS, PURPOSE, record_run, run="r", round=2, environment=Machine())
    now += timedelta(minutes=2)
    policy.admit(TERMS, PURPOSE, record_run, run="r", round=2, environment=Machine())


def test_a_sampling_rate_below_ten_times_delta_is_refused(ledger: Ledger) -> None:
    """At sigma 0.01 and a rate below delta, epsilon 0.05 is true while those that join are disclosed."""
    rare = replace(SCHEDULE, rounds=1, steps_per_round=1, sampling_rate=9e-6)
    terms = DPParameters(schedule=rare, noise_multiplier=0.01, unit="photo")
    assert epsilon_of(terms.event(), 1e-5).upper < 0.06
    policy = DevicePolicy(max_epsilon=8, delta=1e-5, unit="photo", objectives=("generator",))
    purpose = Purpose(8, "homomorphic", "generator", 0.1)
    for rate in (9e-6, 9e-5):
        with pytest.raises(PolicyRefusal, match="below 10 times this device's delta"):
            policy.check_static(replace(terms, schedule=replace(rare, sampling_rate=rate)), purpose)
    policy.check_static(replace(terms, schedule=replace(rare, sampling_rate=1e-4)), purpose)
